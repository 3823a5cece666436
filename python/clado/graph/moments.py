"""Second moments Σ x xᵀ of what enters a layer: rows of a Linear, patches of a convolution, a small matrix for each group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Node
from torch.nn.functional import pad, unfold

BLOCK = 512  # columns of a product whose lower half is the upper one's mirror image
ELEMENTS = 1 << 24  # of patches that lie side by side at a time
# Of a sample that are looked at: the largest maps of a convolutional net would cost more than all the rest. On EfficientNet-Lite0
# at 4 bits, 128 photographs, 64 of a sample leave a KL to the float net of 0.28, all of them 0.26; in the order of the forward
# 1,024 leave 0.13, all of them 0.15.
POSITIONS = 256


@dataclass(frozen=True)
class Use:
    """How a weight is applied: as a matrix, or as a convolution's kernel.

    Attributes:
        shape: of the weight.
        convolution: None for a Linear; else stride, padding (numbers, or "same" and "valid"), dilation.
        groups: of the convolution.
    """

    shape: tuple[int, ...]
    convolution: tuple[Any, Any, Any] | None = None
    groups: int = 1

    @staticmethod
    def of_node(node: Node, shape: tuple[int, ...]) -> Use:
        """Of ``aten.linear``, ``aten.conv2d`` or ``aten.conv2d.padding``."""
        if len(shape) == 2:
            return Use(shape)
        names = ("stride", "padding", "dilation", "groups")
        given = {**dict(zip(names, node.args[3:], strict=False)), **node.kwargs}
        taken = (given.get("stride", 1), given.get("padding", 0), given.get("dilation", 1))
        return Use(shape, taken, int(given.get("groups", 1)))  # type: ignore[arg-type]

    @property
    def sides(self) -> tuple[int, int]:
        """(G, K): the moments are ``[G, K, K]``; K inputs of an output channel in the order in which the weight has them."""
        return self.groups, math.prod(self.shape[1:])

    def add_moments(self, x: Tensor, total: Tensor) -> None:
        """Add the moments of an input ``[n, …]`` to ``total`` ``[G, K, K]``."""
        for columns in self.columns(x):
            if columns.shape[1] == 1:
                _add_product(total[0], columns[:, 0].transpose(1, 2).reshape(-1, columns.shape[2]))
            else:
                total += (columns @ columns.transpose(2, 3)).sum(0)

    def columns(self, x: Tensor) -> Iterator[Tensor]:
        """What the weight is multiplied with, of an input ``[n, …]``: ``[m, G, K, P]``, some samples after the other.

        Of more than ``POSITIONS`` positions of a sample every second one, or third, and so on, is taken in each direction.
        """
        if self.convolution is None:
            rows = x.reshape(len(x) if x.dim() > 2 else 1, -1, x.shape[-1])
            step = -(-rows.shape[1] // POSITIONS) if x.dim() > 2 else 1
            yield rows[:, step // 2 :: step].reshape(1, 1, -1, x.shape[-1]).transpose(2, 3)
            return
        stride, padding, dilation = self.convolution
        x = pad(x if x.dim() == 4 else x[None], _sides(padding, dilation, self.shape[2:]))
        (groups, inputs), kernel, (down, across) = self.sides, self.shape[2:], _pair(stride)
        covered = (step * (size - 1) + 1 for step, size in zip(_pair(dilation), kernel, strict=True))
        high, wide = (
            (size - own) // by + 1 for size, own, by in zip(x.shape[2:], covered, (down, across), strict=True)
        )
        step = math.ceil(math.sqrt(high * wide / POSITIONS)) if high * wide > POSITIONS else 1
        if step > 1:  # from the middle of each step: the border is not seen more often than it is there
            x = x[:, :, min(step // 2, high - 1) * down :, min(step // 2, wide - 1) * across :]
            down, across = down * step, across * step
        if kernel == (1, 1):
            x = x[:, :, ::down, ::across]
        many = max(1, x.shape[2] * x.shape[3] * x.shape[1] * kernel[0] * kernel[1])
        for part in x.split(max(1, ELEMENTS // many)):
            patches = part if kernel == (1, 1) else unfold(part, kernel, _pair(dilation), 0, (down, across))
            yield patches.reshape(len(part), groups, inputs, -1)


class PairSums:
    """Sums over what two nets, x and y, give to the same layer.

    They are taken around the mean of the first samples, so that second moments around the mean keep their digits.
    """

    def __init__(self, use: Use) -> None:
        self.use, self.count = use, 0
        self._at: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add two inputs ``[n, …]`` of the same samples."""
        for one, other in zip(self.use.columns(x), self.use.columns(y), strict=True):
            if self._at is None:
                self._begin(one, other)
            assert self._at is not None
            self.count += len(one) * one.shape[3]
            left, right = (part - at[..., None] for part, at in zip((one, other), self._at, strict=True))
            self._x += left.sum((0, 3))
            self._y += right.sum((0, 3))
            if len(self._at[0]) == 1:
                rows, others = (part[:, 0].transpose(1, 2).reshape(-1, part.shape[2]) for part in (left, right))
                self._xy[0] += rows.T @ others
                _add_product(self._yy[0], others)
            else:
                self._xy += (left @ right.transpose(2, 3)).sum(0)
                self._yy += (right @ right.transpose(2, 3)).sum(0)

    def moments(self, centered: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """float64 E[x yᵀ] and E[y yᵀ] ``[G, K, K]``, around the means or around zero, and E[x], E[y] ``[G, K]``."""
        assert self._at is not None
        x, y = (total.double() / self.count for total in (self._x, self._y))
        one, other = self._at[0].double() + x, self._at[1].double() + y
        xy = self._xy.double() / self.count - _outer(x, y)
        yy = self._yy.double() / self.count - _outer(y, y)
        if not centered:
            xy, yy = xy + _outer(one, other), yy + _outer(other, other)
        return xy, yy, one, other

    def _begin(self, one: Tensor, other: Tensor) -> None:
        self._at = one.mean((0, 3)), other.mean((0, 3))
        groups, inputs = self.use.sides
        self._xy, self._yy = (one.new_zeros(groups, inputs, inputs) for _ in range(2))
        self._x, self._y = (one.new_zeros(groups, inputs) for _ in range(2))


def used(module: nn.Module, x: Tensor) -> tuple[Use, Tensor]:
    """How a Linear or Conv2d applies its weight, and to what: its input, padded where it is not padded with zeros."""
    weight: Any = module.weight
    if not isinstance(module, nn.Conv2d):
        return Use(tuple(weight.shape)), x
    padding = module.padding
    if module.padding_mode != "zeros":
        x, padding = pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), (0, 0)
    return Use(tuple(weight.shape), (module.stride, padding, module.dilation), module.groups), x


def _add_product(total: Tensor, rows: Tensor) -> None:
    """``total += rowsᵀ rows``; what lies below the blocks on the diagonal is the mirror image of what lies above."""
    columns = rows.shape[1]
    for a in range(0, columns, BLOCK):
        b = min(a + BLOCK, columns)
        part = rows[:, a:b].T @ rows[:, a:]
        total[a:b, a:] += part
        total[b:, a:b] += part[:, b - a :].T


def _outer(one: Tensor, other: Tensor) -> Tensor:
    return one[:, :, None] * other[:, None, :]


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    numbers = list(value)
    return numbers[0], numbers[-1]


def _sides(padding: Any, dilation: Any, kernel: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) of zeros around an input, as torch has them."""
    if not isinstance(padding, str):
        down, across = _pair(padding)
        return across, across, down, down
    if padding == "valid":
        return 0, 0, 0, 0
    high, wide = (step * (size - 1) for step, size in zip(_pair(dilation), kernel, strict=True))
    return wide // 2, wide - wide // 2, high // 2, high - high // 2
