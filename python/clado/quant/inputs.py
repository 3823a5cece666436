"""Input formats: what a layer's input is rounded to before its weight is applied. A new one is a class and a line of ``INPUTS``.

All of them are plain operators, which every torch exports. Where gradients are asked for they pass straight through: a code is
``s + (code(s) − s)``, whose difference is detached and exact (Sterbenz), so that the sum is the code itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..common import CladoError, require

Pair = tuple[float, float]
STEPS = 95  # shrink factors tried for an integer range


class InputFormat(Protocol):
    """A format of inputs.

    Attributes:
        name: as schemes have it, and files.
        bits: of an element, where operations are counted.
        ranged: whether it needs a range that was seen before.
    """

    @property
    def name(self) -> str: ...

    @property
    def bits(self) -> int: ...

    @property
    def ranged(self) -> bool: ...

    def range_of(self, x: Tensor) -> Pair:
        """(lowest, highest), zero inside, for what was seen of an input."""
        ...

    def constants(self, pair: Pair) -> tuple[float, ...]:
        """What is computed once of a range: the scale first, 0 where the range is empty; of integers then the code of zero, from
        0 on."""
        ...

    def apply(self, x: Tensor, pair: Pair | None, kind: str) -> Tensor:
        """``x`` rounded, of its shape and dtype; ``kind``: what applies the weight to it (:class:`~clado.quant.Layer`)."""
        ...


def _straight(steps: Tensor, code: Callable[[Tensor], Tensor]) -> Tensor:
    """``code(steps)``, whose gradient is that of ``steps``."""
    found = code(steps.detach())
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return found  # a graph that is made without gradients may be run with them
    return steps + (found - steps).detach()


def scale_zero(pair: Pair, bits: int) -> tuple[float, int]:
    """Of the 2^bits levels of a range: the step between two, and the code of zero, from 0 on."""
    low, high = pair
    levels = 2**bits - 1
    scale = (high - low) / levels
    return scale, min(levels, max(0, round(-low / scale))) if scale else 0


def rounded(x: Tensor, low: float, high: float, bits: int) -> Tensor:
    """``x`` on the 2^bits levels of a range; beyond it the ends. An empty range leaves ``x`` as it is."""
    scale, zero = scale_zero((low, high), bits)
    if scale == 0:
        return x
    steps = (x / scale).clamp(-zero, 2**bits - 1 - zero)
    found: Tensor = _straight(steps, torch.round) * scale
    return found


def best_range(x: Tensor, bits: int) -> Pair:
    """(lowest, highest) of least squared rounding error among the tensor's own range and shrunken ones, zero included."""
    flat = x.reshape(-1).float()
    low, high = _extremes(flat)
    pairs = [(low * (1 - step / 100), high * (1 - step / 100)) for step in range(STEPS)]
    errors = torch.stack([(rounded(flat, *pair, bits) - flat).square().sum() for pair in pairs]).tolist()  # one wait
    return min(zip(errors, pairs, strict=True), key=lambda tried: tried[0])[1]


def _extremes(x: Tensor) -> Pair:
    return min(0.0, x.min().item()), max(0.0, x.max().item())


def _token_dims(x: Tensor, kind: str) -> tuple[int, ...]:
    """What a token is: a row of a matrix product's input; a sample of a convolution's, whose kernel spans positions."""
    if not kind.startswith("conv"):
        return (-1,)
    return tuple(range(1 if x.dim() == int(kind[-2]) + 2 else 0, x.dim()))


@dataclass(frozen=True)
class StaticInteger:
    """One asymmetric range per tensor, of least squared error, divided into 2^bits levels."""

    bits: int
    ranged = True

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def range_of(self, x: Tensor) -> Pair:
        return best_range(x, self.bits)

    def constants(self, pair: Pair) -> tuple[float, int]:
        return scale_zero(pair, self.bits)

    def apply(self, x: Tensor, pair: Pair | None, kind: str) -> Tensor:
        assert pair is not None
        return rounded(x, *pair, self.bits)


class _Unranged:
    """A format whose scales come from the input itself."""

    ranged = False

    def range_of(self, x: Tensor) -> Pair:
        raise AssertionError("no range is needed")

    def constants(self, pair: Pair) -> tuple[float, ...]:
        return ()


@dataclass(frozen=True)
class DynamicInteger(_Unranged):
    """Symmetric codes −2^(bits−1) … 2^(bits−1)−1 of a scale per token: its largest magnitude over (2^bits − 1)/2."""

    bits: int

    @property
    def name(self) -> str:
        return f"int{self.bits}_dynamic"

    def apply(self, x: Tensor, pair: Pair | None, kind: str) -> Tensor:
        half = 2 ** (self.bits - 1)
        scale = _token_scale(x, kind, (2**self.bits - 1) / 2)
        return _straight((x / scale).clamp(-half, half - 1), torch.round) * scale


def _token_scale(x: Tensor, kind: str, largest: float) -> Tensor:
    return _scale(x.detach().abs().amax(_token_dims(x, kind), keepdim=True), largest)


def _scale(amax: Tensor, largest: float) -> Tensor:
    """What maps the largest magnitude to the largest code; 1 where all is zero."""
    scale = amax / largest
    return torch.where(scale > 0, scale, torch.ones_like(scale))


@dataclass(frozen=True)
class Element:
    """The values of a small float.

    Attributes:
        name: of the format; ``bits`` stored, ``largest`` value.
        mantissa: stored bits of it.
        smallest: normal value; below it values lie as far apart as right above it.
    """

    name: str
    bits: int
    largest: float
    mantissa: int
    smallest: float

    def nearest(self, steps: Tensor) -> Tensor:
        """The nearest value, ties to even; beyond the largest one that."""
        return _straight(steps.clamp(-self.largest, self.largest), self._code)

    def _code(self, steps: Tensor) -> Tensor:
        """By a multiple of the distance that values have here, a power of two: exact, where torch's casts are slow."""
        wide = steps if steps.dtype == torch.float64 else steps.float()
        apart = _power_below(steps.float()).clamp(min=self.smallest).mul_(2.0**-self.mantissa)
        return (wide / apart).round_().mul_(apart).to(steps.dtype)


def _power_below(x: Tensor) -> Tensor:
    """The power of two at or below the magnitude of float32; infinity where that is not finite."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


E4M3 = Element("e4m3", 8, 448.0, 3, 2.0**-6)
E5M2 = Element("e5m2", 8, 57344.0, 2, 2.0**-14)
E2M1 = Element("e2m1", 4, 6.0, 1, 1.0)


def _largest(pair: Pair) -> float:
    return max(-pair[0], pair[1])


@dataclass(frozen=True)
class StaticFloat:
    """fp8 with one scale per tensor: the largest magnitude that was seen becomes the largest value."""

    element: Element
    ranged = True

    @property
    def name(self) -> str:
        return f"fp8_{self.element.name}"

    @property
    def bits(self) -> int:
        return self.element.bits

    def range_of(self, x: Tensor) -> Pair:
        return _extremes(x)

    def constants(self, pair: Pair) -> tuple[float]:
        return (_largest(pair) / self.element.largest,)

    def apply(self, x: Tensor, pair: Pair | None, kind: str) -> Tensor:
        assert pair is not None
        (scale,) = self.constants(pair)
        return x if scale == 0 else self.element.nearest(x / scale) * scale


@dataclass(frozen=True)
class DynamicFloat(_Unranged):
    """fp8 with a scale per token: its largest magnitude becomes the largest value."""

    element: Element

    @property
    def name(self) -> str:
        return f"fp8_{self.element.name}_dynamic"

    @property
    def bits(self) -> int:
        return self.element.bits

    def apply(self, x: Tensor, pair: Pair | None, kind: str) -> Tensor:
        scale = _token_scale(x, kind, self.element.largest)
        return self.element.nearest(x / scale) * scale


def _in_blocks(x: Tensor, kind: str, size: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``[…, blocks, size]`` of consecutive channels, zeros behind the last one, and what puts blocks back."""
    dim = x.dim() - 1 if not kind.startswith("conv") else x.dim() - int(kind[-2]) - 1
    channels = x.movedim(dim, -1)
    count = channels.shape[-1]
    padded = torch.nn.functional.pad(channels, (0, -count % size))
    blocks = padded.unflatten(-1, (-1, size))
    return blocks, lambda made: made.flatten(-2)[..., :count].movedim(-1, dim)


@dataclass(frozen=True)
class Microscaled(_Unranged):
    """Blocks of 32 channels and a power of two: of the largest magnitude, over that of the largest value (OCP MX 1.0)."""

    name: str
    element: Element

    @property
    def bits(self) -> int:
        return self.element.bits

    def apply(self, x: Tensor, pair: Pair | None, kind: str) -> Tensor:
        blocks, back = _in_blocks(x, kind, 32)
        amax = blocks.detach().abs().amax(-1, keepdim=True).float()
        scale = _scale(_power_below(amax), 2.0 ** math.floor(math.log2(self.element.largest))).to(x.dtype)
        return back(self.element.nearest(blocks / scale) * scale)


@dataclass(frozen=True)
class NvFloat:
    """Blocks of 16 channels with an e4m3 scale each, and one float scale per tensor from the largest magnitude that was seen."""

    name: str = "nvfp4"
    bits: int = 4
    ranged = True

    def range_of(self, x: Tensor) -> Pair:
        return _extremes(x)

    def constants(self, pair: Pair) -> tuple[float]:
        return (_largest(pair) / (E2M1.largest * E4M3.largest),)

    def apply(self, x: Tensor, pair: Pair | None, kind: str) -> Tensor:
        assert pair is not None
        (whole,) = self.constants(pair)
        if whole == 0:
            return x
        blocks, back = _in_blocks(x, kind, 16)
        amax = blocks.detach().abs().amax(-1, keepdim=True)
        scale = E4M3.nearest(amax / (E2M1.largest * whole)) * whole
        scale = torch.where(scale > 0, scale, torch.ones_like(scale) * whole)
        return back(E2M1.nearest(blocks / scale) * scale)


_FORMATS: tuple[InputFormat, ...] = (
    *map(StaticInteger, range(1, 16)),
    *map(DynamicInteger, range(2, 9)),
    StaticFloat(E4M3),
    DynamicFloat(E4M3),
    StaticFloat(E5M2),
    DynamicFloat(E5M2),
    Microscaled("mxfp8", E4M3),
    Microscaled("mxfp4", E2M1),
    NvFloat(),
)
INPUTS: dict[str, InputFormat] = {format.name: format for format in _FORMATS}


@dataclass(frozen=True)
class InputRounding:
    """How a layer's input is rounded; called with what its weight is applied to.

    Attributes:
        input: name of the format, one of ``INPUTS``.
        pair: the range, None where the format needs none.
        kind: of the layer.
    """

    input: str
    pair: Pair | None
    kind: str

    def __post_init__(self) -> None:
        lacks = INPUTS[self.input].ranged and self.pair is None
        require(not lacks, "activations", "ranges", f"be there for inputs of {self.input}", "none")

    def __call__(self, x: Tensor) -> Tensor:
        return INPUTS[self.input].apply(x, self.pair, self.kind)


@dataclass(frozen=True, eq=False)
class Variant:
    """What a candidate changes of its layer.

    Attributes:
        weight: in rows (:meth:`clado.quant.Layer.rows`).
        rounds: the layer's input, where its weight is applied; None: it stays as it is.
    """

    weight: Tensor
    rounds: InputRounding | None = None

    @staticmethod
    def of(given: Variant | Tensor) -> Variant:
        """A weight alone leaves the input as it is."""
        return given if isinstance(given, Variant) else Variant(given)

    def to(self, *target: Any) -> Variant:
        """With the weight on another device or of another dtype."""
        return replace(self, weight=self.weight.to(*target))


def known_input(name: str) -> InputFormat:
    """The format of a name.

    Raises:
        CladoError: none has it.
    """
    if name not in INPUTS:
        raise CladoError(f"scheme: input must be one of {', '.join(INPUTS)}, got {name!r}")
    return INPUTS[name]
