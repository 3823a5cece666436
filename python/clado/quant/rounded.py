"""Weights that were rounded with the help of data: they are kept, since nobody can make them again without the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..common import CladoError, data_digest, require, tensor_digest
from .numbers import NUMBERS, Number, Quantized
from .quantizer import Quantizer

Key = tuple[str, str]  # layer, name of the number format


def joined(packed: Mapping[Key, Mapping[str, Tensor]], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Packed weights, and other tensors, by one name each."""
    named = {
        f"{layer}|{number}|{part}": tensor
        for (layer, number), parts in packed.items()
        for part, tensor in parts.items()
    }
    return named | {f"|{name}": tensor for name, tensor in others.items()}


def parted(tensors: Mapping[str, Tensor]) -> tuple[dict[Key, dict[str, Tensor]], dict[str, Tensor]]:
    """Inverse of :func:`joined`."""
    packed: dict[Key, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, number, part = name.rsplit("|", 2) if not name.startswith("|") else ("", "", name[1:])
        packed.setdefault((layer, number), {})[part] = tensor
    others = packed.pop(("", ""), {})
    return packed, others


@dataclass(frozen=True)
class RoundedBy:
    """How weights were rounded, and which ones came out.

    Attributes:
        rounding: "compensated", or "learned".
        samples: how many decided it.
        data: digest of these samples in order.
        digest: of the codes and scales.
    """

    rounding: str
    samples: int
    data: str
    digest: str

    def __str__(self) -> str:
        return f"{self.rounding} rounding by {self.samples:,} samples"

    @staticmethod
    def from_json(data: Any) -> RoundedBy | None:
        """From ``asdict``; None for None, which stands for nearest rounding.

        Raises:
            CladoError: anything else.
        """
        if data is None:
            return None
        texts = ("rounding", "data", "digest")
        known = isinstance(data, dict) and set(data) == {*texts, "samples"}
        known = known and all(isinstance(data[name], str) for name in texts) and type(data["samples"]) is int
        if not known:
            raise CladoError(f"rounding: file must say rounding, samples, data and digest, got {data!r:.60}")
        return RoundedBy(**data)


@dataclass(frozen=True, eq=False)
class Rounded:
    """Weights of layers in number formats, packed as they are stored.

    Attributes:
        rounding: how.
        weights: digest of the float model's weights.
        quantizer: the settings.
        shapes: {layer: shape of its weight}.
        packed: {(layer, format): the tensors of :meth:`Quantized.packed`}, on the CPU.
        sample_digests: int64 ``[n]``, of the samples whose inputs decided, in order.
        others: {parameter or buffer: its value}: what was adapted with the weights, such as biases.
        damped: {layer: damping as a share of the mean second moment}; layers that nothing was added to are left out.
        dead: {layer: how many inputs were zero in every sample}.
        optimism: {layer: {format: by how much its layer loss is larger on samples that had no part in the rounding}}; empty where
            nobody looked.
    """

    rounding: str
    weights: str
    quantizer: Quantizer
    shapes: Mapping[str, tuple[int, ...]]
    packed: Mapping[Key, Mapping[str, Tensor]]
    sample_digests: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)
    damped: Mapping[str, float] = field(default_factory=dict)
    dead: Mapping[str, int] = field(default_factory=dict)
    optimism: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Everything by one name each, as a file holds it."""
        return joined(self.packed, self.others)

    @cached_property
    def by(self) -> RoundedBy:
        """What plans and matrices note of it."""
        data = data_digest(self.sample_digests.numpy())
        return RoundedBy(self.rounding, len(self.sample_digests), data, tensor_digest(self.tensors))

    def has(self, layer: str, number: Number) -> bool:
        """Whether a layer's weight is there in a format."""
        return (layer, number.name) in self.packed

    def of(self, layer: str, number: Number) -> Quantized:
        """A layer's weight in a format.

        Raises:
            CladoError: it is not there.
        """
        there = f"{len(self.shapes)} layers without it"
        require(self.has(layer, number), "round", "rounded weights", f"hold {layer} as {number.name}", there)
        shape = self.shapes[layer]
        return Quantized.unpacked(number, shape, self.packed[layer, number.name], self.quantizer)

    def header(self) -> dict[str, Any]:
        """What a file says beside the tensors; JSON values."""
        return {
            "by": asdict(self.by),
            "weights": self.weights,
            "quantizer": self.quantizer.to_json(),
            "shapes": {layer: list(shape) for layer, shape in self.shapes.items()},
            "damped": dict(self.damped),
            "dead": dict(self.dead),
            **({"optimism": {layer: dict(own) for layer, own in self.optimism.items()}} if self.optimism else {}),
        }

    @staticmethod
    def from_parts(header: Mapping[str, Any], tensors: Mapping[str, Tensor], sample_digests: Tensor) -> Rounded:
        """Inverse of :meth:`header` and :attr:`tensors`.

        Raises:
            CladoError: tensors that do not fit the header, or are not those that were written.
        """
        quantizer = Quantizer(**header["quantizer"])
        shapes = {str(layer): tuple(map(int, shape)) for layer, shape in header["shapes"].items()}
        packed, others = parted(tensors)
        for (layer, number), parts in packed.items():
            known = layer in shapes and number in NUMBERS
            require(known, "round", "file", "hold weights of its layers in known formats", f"{layer} as {number}")
            wanted = NUMBERS[number].stored(shapes[layer], quantizer)
            found = {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in parts.items()}
            require(found == wanted, "round", "file", f"hold {layer} as {number} whole", found)
        by = RoundedBy.from_json(header["by"])
        if by is None:
            raise CladoError("round: file must say how weights were rounded, got nothing")
        made = Rounded(
            by.rounding,
            str(header["weights"]),
            quantizer,
            shapes,
            packed,
            sample_digests.to(torch.int64),
            others,
            {str(layer): float(share) for layer, share in header["damped"].items()},
            {str(layer): int(count) for layer, count in header["dead"].items()},
            {
                str(layer): {str(number): float(factor) for number, factor in own.items()}
                for layer, own in header.get("optimism", {}).items()
            },
        )
        require(made.by == by, "round", "file", "hold what was written", "damaged data")
        return made
