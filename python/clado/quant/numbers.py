"""Number formats: what an element of a weight is stored as. A new one is one class and one line of ``NUMBERS``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..common import require
from .floats import Blocks, Float8, Kept
from .integers import Integer
from .native import NativeNumber, native_nearest, native_scales
from .scaling import Scales, Scaling, Stored, held_by


class Number(Protocol):
    """A number format. A matrix is the ``[rows, columns]`` view of a weight that :meth:`Scaling.matrix` gives.

    Attributes:
        name: as plans and files have it.
        bits: stored bits of an element, scales aside.
        block: consecutive inputs of an output channel that share a scale and must divide its row; 0: none.
    """

    @property
    def name(self) -> str: ...

    @property
    def bits(self) -> int: ...

    @property
    def block(self) -> int: ...

    def scales(self, matrix: Tensor, scaling: Scaling) -> Scales:
        """The scales that the settings ask for."""
        ...

    def encode(self, matrix: Tensor, scales: Scales) -> Tensor:
        """The nearest code of every element, int8 ``[rows, columns]``; of a kept format the element itself."""
        ...

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
        """What codes stand for, ``[rows, columns]`` of ``dtype``."""
        ...

    def nearest(self, matrix: Tensor, scales: Scales) -> Tensor:
        """``decode`` of ``encode``, bit for bit, in the matrix's dtype."""
        ...

    def stored(self, shape: tuple[int, ...], scaling: Scaling) -> Stored:
        """Shapes and dtypes of the tensors that :meth:`pack` gives for a weight."""
        ...

    def pack(self, codes: Tensor, scales: Scales) -> dict[str, Tensor]:
        """Codes and scales as they are stored, by name."""
        ...

    def unpack(self, packed: Mapping[str, Tensor], shape: tuple[int, ...], scaling: Scaling) -> tuple[Tensor, Scales]:
        """Inverse of :meth:`pack`."""
        ...


NUMBERS: dict[str, Number] = {
    **{number.name: number for number in map(Integer, range(2, 9))},
    "mxfp4": Blocks("mxfp4", 4, 32),
    "nvfp4": Blocks("nvfp4", 4, 16, two_levels=True),
    "fp8_e4m3": Float8("fp8_e4m3", torch.float8_e4m3fn),
    "fp8_e5m2": Float8("fp8_e5m2", torch.float8_e5m2),
    "mxfp8": Blocks("mxfp8", 8, 32),
    "bf16": Kept("bf16", torch.bfloat16),
    "fp16": Kept("fp16", torch.float16),
}


def all_scales(numbers: Sequence[Number], matrix: Tensor, scaling: Scaling) -> list[Scales]:
    """:meth:`Number.scales` of a matrix in several formats; those of the kernels share a read of it."""
    together = [number for number in numbers if isinstance(number, NativeNumber)]
    found = iter(native_scales(together, matrix, scaling) if together else [])
    return [next(found) if isinstance(n, NativeNumber) else n.scales(matrix, scaling) for n in numbers]


def all_nearest(numbers: Sequence[Number], matrix: Tensor, scales: Sequence[Scales]) -> list[Tensor]:
    """:meth:`Number.nearest` of a matrix in several formats; those of the kernels share a read of it."""
    pairs = [(number, own) for number, own in zip(numbers, scales, strict=True) if isinstance(number, NativeNumber)]
    values = native_nearest([n for n, _ in pairs], matrix, [own for _, own in pairs]) if pairs else []
    rest = iter(values)
    return [
        next(rest) if isinstance(number, NativeNumber) else number.nearest(matrix, own)
        for number, own in zip(numbers, scales, strict=True)
    ]


def integer(bits: int) -> Number:
    """The format of a bit-width.

    Raises:
        CladoError: a width that none has.
    """
    require(f"int{bits}" in NUMBERS, "quantizer", "bits", "lie in 2..8", bits)
    return NUMBERS[f"int{bits}"]


@dataclass(frozen=True, eq=False)
class Quantized:
    """A weight in a number format.

    Attributes:
        number: the format.
        shape: of the weight.
        codes: ``[rows, columns]``: int8; of a kept format its dtype.
        scales: of the codes.
    """

    number: Number
    shape: tuple[int, ...]
    codes: Tensor
    scales: Scales

    @property
    def scale(self) -> Tensor:
        return self.scales.scale

    @property
    def zero_point(self) -> Tensor | None:
        return self.scales.zero_point

    @staticmethod
    def unpacked(number: Number, shape: tuple[int, ...], packed: Mapping[str, Tensor], scaling: Scaling) -> Quantized:
        """A weight of this shape from the tensors of :meth:`packed`."""
        return Quantized(number, shape, *number.unpack(packed, shape, scaling))

    def held_by(self, dtype: torch.dtype) -> Quantized:
        """With the nearest scales that a model of ``dtype`` holds, where its readers keep them in its dtype."""
        if isinstance(self.number, NativeNumber) and not self.number.scales_held:
            return self
        return replace(self, scales=self.scales._replace(scale=held_by(dtype, self.scale)))

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes stand for."""
        return self.number.decode(self.codes, self.scales, dtype).view(self.shape)

    def packed(self) -> dict[str, Tensor]:
        """The tensors that are stored, by name."""
        return self.number.pack(self.codes, self.scales)

    def cpu(self) -> Quantized:
        """The same on the CPU."""
        return self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> Quantized:
        """The same on a device."""
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))
