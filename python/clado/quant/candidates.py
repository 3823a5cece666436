"""Candidates: what a plan chooses between. A candidate is a layer under a scheme; layers may have different lists."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..common import CladoError, require
from .inputs import INPUTS, known_input
from .layers import Layer
from .numbers import NUMBERS, Number, integer
from .quantizer import Quantizer
from .scaling import stored_nbytes

_INTEGER = re.compile(r"W([2-8])(A.*)")
KEPT = 16  # bits of an input that is not rounded, in a scheme's label
FLOAT_BITS = 32  # of an input that is not rounded, where operations are counted


def _suffix(input: str) -> str:
    """How labels spell the format of an input that is not the weight's own: fp8 is per token unless it says static."""
    if input.startswith("int"):
        return "A" + input.removeprefix("int").upper()
    name, dynamic = input.removesuffix("_dynamic").upper(), input.endswith("_dynamic")
    static = "_STATIC" if input.startswith("fp8") and not dynamic else ""
    return "A" + name.replace("FP8_E4M3", "FP8") + static


_SUFFIXES = {"": f"A{KEPT}"} | {name: _suffix(name) for name in INPUTS}
_OF_SUFFIX = {suffix: name for name, suffix in _SUFFIXES.items()}
_STEMS = {"fp8_e4m3": "FP8"}  # of formats that labels do not call by their names


@dataclass(frozen=True)
class Scheme:
    """A layer's number formats.

    Attributes:
        weight: name of the weight's format, one of ``NUMBERS``.
        input: name of the format that the layer's input is rounded to, one of ``INPUTS``; "": it stays as it is.
    """

    weight: str
    input: str = ""

    def __post_init__(self) -> None:
        known = self.weight in NUMBERS
        require(known, "scheme", "weight", f"be one of {', '.join(NUMBERS)}", repr(self.weight))
        if self.input:
            known_input(self.input)

    @staticmethod
    def of(given: Scheme | str | int, input_bits: int = KEPT) -> Scheme:
        """From a label such as ``W4A16`` or ``FP8``, or from the bits of an integer weight.

        Labels are W2A16 … W8A16 (the input stays as it is), W4A8 (one range per tensor, seen before), W4A8_DYNAMIC (a scale per
        token), W4AFP8, and the names of other formats: alone for inputs of the same format (``FP8``: one scale per tensor;
        ``FP8_DYNAMIC``: one per token; ``NVFP4``, ``MXFP4``, ``MXFP8``: in blocks), or with A16, A8, … behind them.

        Raises:
            CladoError: another label or width.
        """
        if isinstance(given, Scheme):
            return given
        if not isinstance(given, str):
            integer(given)
            return Scheme(f"int{given}", "" if input_bits == KEPT else f"int{input_bits}")
        found = _INTEGER.fullmatch(given)
        if found is not None and found[2] in _OF_SUFFIX:
            return Scheme(f"int{found[1]}", _OF_SUFFIX[found[2]])
        for name in NUMBERS:
            stem = next((s for s in (name.upper(), _stem(name)) if given.startswith(s)), None)
            if _integer(name) or stem is None:
                continue
            rest = given.removeprefix(stem)
            if rest in _OF_SUFFIX:
                return Scheme(name, _OF_SUFFIX[rest])
            if rest == "":
                return Scheme(name, _own_input(name))
            if rest == "_DYNAMIC" and f"{name}_dynamic" in INPUTS:
                return Scheme(name, f"{name}_dynamic")
        raise CladoError(f"scheme: label must be one of {_known_labels()}, got {given!r}")

    @property
    def number(self) -> Number:
        """The weight's format."""
        return NUMBERS[self.weight]

    @property
    def bits(self) -> int:
        """Of an element of the weight, as it is stored."""
        return self.number.bits

    @property
    def input_bits(self) -> int:
        """Of an element of the input; 16 where it stays as it is."""
        return INPUTS[self.input].bits if self.input else KEPT

    @property
    def plain(self) -> bool:
        """Whether the weight is of integers and the input stays as it is, so that bits say it all."""
        return _integer(self.weight) and not self.input

    @property
    def label(self) -> str:
        """As :meth:`of` reads it."""
        if _integer(self.weight):
            return f"W{self.weight.removeprefix('int')}{_SUFFIXES[self.input]}"
        stem = _stem(self.weight)
        if self.input == _own_input(self.weight):
            return stem
        return stem + ("_DYNAMIC" if self.input == f"{self.weight}_dynamic" else _SUFFIXES[self.input])

    def __str__(self) -> str:
        return f"{self.bits} bits" if self.plain else self.label

    def __lt__(self, other: Scheme) -> bool:
        """By stored bits, then by those of the input."""
        return self._order < other._order

    @property
    def _order(self) -> tuple[int, str, int, str]:
        return (self.bits, self.weight, self.input_bits, self.input)


def _integer(number: str) -> bool:
    """Whether a format's name is that of integers, which labels spell by their bits."""
    return re.fullmatch(r"int\d+", number) is not None


def _stem(number: str) -> str:
    """What the labels of a format that is no integer's begin with."""
    return _STEMS.get(number, number.upper())


def _own_input(number: str) -> str:
    """The input's format under a label that is the weight's format alone."""
    return number if number in INPUTS else ""


def _known_labels() -> str:
    """In words, for a label that none has."""
    stems = [stem for name in NUMBERS if not _integer(name) for stem in _labels_of(name)]
    return ", ".join(["W2A16 … W8A16 (W4A8, W4A8_DYNAMIC: 8-bit inputs)", *stems])


def _labels_of(number: str) -> list[str]:
    own = {_own_input(number), f"{number}_dynamic", ""} & {*INPUTS, ""}
    return sorted((Scheme(number, input).label for input in own), key=len)


@dataclass(frozen=True)
class Candidates:
    """All candidates of a model, layer-major, each layer's by ascending bits.

    Attributes:
        layers: L layers in the order the network runs them.
        schemes: per layer its schemes, at least one.
    """

    layers: tuple[Layer, ...]
    schemes: tuple[tuple[Scheme, ...], ...]

    def __post_init__(self) -> None:
        require(len(self.layers) > 0, "candidates", "layers", "not be empty", "no layer")
        names = [layer.name for layer in self.layers]
        require(len(set(names)) == len(names), "candidates", "layers", "have distinct names", names)
        lists = f"{len(self.schemes)} lists for {len(names)} layers"
        require(len(self.schemes) == len(names), "candidates", "schemes", "hold a list for every layer", lists)
        for name, schemes in zip(names, self.schemes, strict=True):
            ascending = len(schemes) > 0 and list(schemes) == sorted(set(schemes))
            must = "be distinct ones of ascending bits, at least one"
            require(ascending, "candidates", f"schemes of {name}", must, [s.label for s in schemes])
        for layer, schemes in zip(self.layers, self.schemes, strict=True):
            inputs = math.prod(layer.shape[1:])
            for scheme in schemes:
                must = f"have a number of inputs that blocks of {scheme.number.block} divide for {scheme.label}"
                whole = scheme.number.block == 0 or inputs % scheme.number.block == 0
                require(whole, "candidates", f"layer {layer.name}", must, inputs)

    @staticmethod
    def uniform(layers: Iterable[Layer], schemes: Iterable[Scheme | str | int]) -> Candidates:
        """The same schemes for every layer."""
        own, same = tuple(layers), tuple(Scheme.of(scheme) for scheme in schemes)
        return Candidates(own, (same,) * len(own))

    def __len__(self) -> int:
        """V."""
        return int(self.starts[-1])

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Candidates of each layer."""
        return tuple(len(schemes) for schemes in self.schemes)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """``[L + 1]``: layer k has the candidates ``starts[k]`` to ``starts[k + 1] - 1``."""
        return np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)

    @cached_property
    def layer_of(self) -> NDArray[np.int64]:
        """``[V]``: the layer of each candidate."""
        return np.repeat(np.arange(len(self.layers), dtype=np.int64), self.counts)

    @cached_property
    def flat(self) -> tuple[Scheme, ...]:
        """The V schemes."""
        return tuple(scheme for schemes in self.schemes for scheme in schemes)

    @cached_property
    def same_layer(self) -> NDArray[np.bool_]:
        """``[V, V]`` mask of candidate pairs that belong to one layer."""
        found: NDArray[np.bool_] = self.layer_of[:, None] == self.layer_of[None, :]
        return found

    @property
    def distinct(self) -> tuple[Scheme, ...]:
        """The schemes that occur, ascending."""
        return tuple(sorted(set(self.flat)))

    @property
    def bits(self) -> tuple[int, ...]:
        """The weights' bit-widths that occur, ascending."""
        return tuple(sorted({scheme.bits for scheme in self.flat}))

    @cached_property
    def weight_bits(self) -> NDArray[np.int64]:
        """``[V]``: bits per weight, codes alone."""
        return np.array([scheme.bits for scheme in self.flat], np.int64)

    @cached_property
    def code_bits(self) -> NDArray[np.int64]:
        """``[V]``: bits of all the layer's codes."""
        return np.array([layer.numel for layer in self.layers], np.int64)[self.layer_of] * self.weight_bits

    @cached_property
    def numel(self) -> int:
        """Weights of all layers."""
        return sum(layer.numel for layer in self.layers)

    @cached_property
    def pairs(self) -> tuple[tuple[Layer, Scheme], ...]:
        """The V candidates."""
        return tuple((self.layers[k], scheme) for k, scheme in zip(self.layer_of, self.flat, strict=True))

    def stored_bytes(self, quantizer: Quantizer) -> NDArray[np.int64]:
        """``[V]``: bytes of packed codes and scales."""
        return np.array([stored_bytes(layer, scheme, quantizer) for layer, scheme in self.pairs], np.int64)

    def bitops(self, act_bits: int | None = None) -> NDArray[np.int64]:
        """``[V]``: multiply-adds × bits of the weight × bits of the input, for one sample; ``act_bits``: of all inputs."""
        macs = np.array([layer.macs for layer in self.layers], np.int64)
        rounded = [scheme.input_bits if scheme.input else FLOAT_BITS for scheme in self.flat]
        inputs = np.array(rounded if act_bits is None else [act_bits] * len(rounded), np.int64)
        return macs[self.layer_of] * inputs * self.weight_bits

    def block(self, k: int) -> slice:
        """The candidates of layer ``k``."""
        return slice(int(self.starts[k]), int(self.starts[k + 1]))

    def position(self, layer: str) -> int:
        """k of a layer's name."""
        names = self._positions
        require(layer in names, "sensitivity", "layer", f"be one of {len(names)} known layers", repr(layer))
        return names[layer]

    def index(self, layer: str, scheme: Scheme | str | int) -> int:
        """v of (layer, scheme)."""
        k = self.position(layer)
        known, wanted = self.schemes[k], self._scheme(layer, scheme)
        number = isinstance(scheme, int)
        listed = tuple(own.bits for own in known) if number else ", ".join(own.label for own in known)
        fits = wanted in known
        require(fits, "sensitivity", "bits" if number else "scheme", f"be one of {listed} for {layer}", scheme)
        assert wanted is not None
        return int(self.starts[k]) + known.index(wanted)

    def has(self, layer: str, scheme: Scheme | str | int) -> bool:
        """Whether (layer, scheme) is a candidate."""
        return layer in self._positions and self._scheme(layer, scheme) in self.schemes[self._positions[layer]]

    def label(self, v: int) -> str:
        """``layer at 4 bits``."""
        return f"{self.layers[self.layer_of[v]].name} at {self.flat[v]}"

    def indices(self, choice: Mapping[str, Scheme | str | int]) -> NDArray[np.int64]:
        """``[L]``: v of every layer of a choice that names every layer once."""
        names = [layer.name for layer in self.layers]
        count = f"{len(choice)} layers"
        require(set(choice) == set(names), "sensitivity", "choice", "name every layer once", count)
        return np.array([self.index(name, choice[name]) for name in names], np.int64)

    def one_hot(self, choice: Mapping[str, Scheme | str | int]) -> NDArray[np.float64]:
        """x ``[V]`` of a choice that names every layer once."""
        x = np.zeros(len(self))
        x[self.indices(choice)] = 1
        return x

    def choice(self, indices: Sequence[int] | NDArray[np.int64]) -> dict[str, str]:
        """{layer: label} of ``[L]`` candidates, one of every layer."""
        pairs = zip(self.layers, indices, strict=True)
        return {layer.name: self.flat[int(v)].label for layer, v in pairs}

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {layer.name: k for k, layer in enumerate(self.layers)}

    def _scheme(self, layer: str, given: Scheme | str | int) -> Scheme | None:
        """What is meant; bits alone mean the layer's only scheme of that many, None where that is none."""
        if not isinstance(given, (Scheme, str)):
            same = [scheme for scheme in self.schemes[self._positions[layer]] if scheme.bits == given]
            return same[0] if len(same) == 1 else None
        return Scheme.of(given)


def all_plain(schemes: Iterable[Scheme]) -> bool:
    """Whether all are of integer weights and round no input, so that bits alone tell them apart."""
    return all(scheme.plain for scheme in schemes)


def scheme_names(schemes: Iterable[Scheme], unit: str = "") -> dict[Scheme, str]:
    """What people read for each scheme, ascending: its bits and ``unit`` where that tells them apart, else its label."""
    distinct = sorted(set(schemes))
    plain = all_plain(distinct)
    return {scheme: f"{scheme.bits}{unit}" if plain else scheme.label for scheme in distinct}


def stored_bytes(layer: Layer, scheme: Scheme, quantizer: Quantizer) -> int:
    """Bytes of a layer's packed codes and scales."""
    return stored_nbytes(scheme.number.stored(layer.shape, quantizer))


def check_bits(bits: Sequence[int]) -> None:
    """Raise unless ``bits`` are candidate widths."""
    ascending = (
        len(bits) > 0 and all(isinstance(b, int) and 2 <= b <= 8 for b in bits) and list(bits) == sorted(set(bits))
    )
    require(ascending, "bits", "bits", "be distinct ascending widths in 2..8", tuple(bits))


def candidates_of(
    layers: Sequence[Layer], schemes: Sequence[Scheme | str | int] | Mapping[str, Sequence[Scheme | str | int]]
) -> Candidates:
    """Candidates of layers from one list of schemes, or from a list per pattern: the first that fits a layer's name counts.

    Raises:
        CladoError: a layer that no pattern fits, a pattern that fits no layer.
    """
    if not isinstance(schemes, Mapping):
        return Candidates.uniform(layers, schemes)
    taken: list[tuple[Scheme, ...]] = []
    unused = set(schemes)
    for layer in layers:
        found = next((p for p in schemes if fnmatch.fnmatchcase(layer.name, p)), None)
        if found is None:
            raise CladoError(f"profile: schemes must have a pattern for every layer, got none for {layer.name}")
        unused.discard(found)
        taken.append(tuple(map(Scheme.of, schemes[found])))
    require(not unused, "profile", "schemes", "hold patterns that fit a layer first", sorted(unused)[:3])
    return Candidates(tuple(layers), tuple(taken))
