"""Second moments Σ x xᵀ of what enters a layer: rows of a Linear, patches of a convolution, a small matrix for each group."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import pad

from .weights import KINDS

_CONVOLUTION = ("stride", "padding", "dilation", "groups")
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
        shape: of the weight, output channels first.
        convolution: None for a matrix; else stride, padding (numbers, or "same" and "valid"), dilation.
        groups: of the convolution.
        output_padding: of a transposed convolution; None for a plain one.
    """

    shape: tuple[int, ...]
    convolution: tuple[Any, Any, Any] | None = None
    groups: int = 1
    output_padding: Any = None

    @staticmethod
    def of_node(node: Node, shape: tuple[int, ...]) -> Use:
        """Of an operator that applies a weight (:data:`clado.graph.weights.KINDS`)."""
        return Use.of_call(KINDS[node.target], shape, node.args, node.kwargs)

    @staticmethod
    def of_call(kind: str, shape: tuple[int, ...], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Use:
        """Of a call with an input, a weight, a bias and what else torch's functions of that kind take."""
        if not kind.startswith("conv"):
            return Use(shape)
        turned = "transpose" in kind
        names = ("stride", "padding", "output_padding", "groups", "dilation") if turned else _CONVOLUTION
        given = {**dict(zip(names, args[3:], strict=False)), **kwargs}
        taken = (given.get("stride", 1), given.get("padding", 0), given.get("dilation", 1))
        return Use(shape, taken, int(given.get("groups", 1)), given.get("output_padding", 0) if turned else None)

    @property
    def sides(self) -> tuple[int, int]:
        """(G, K): the moments are ``[G, K, K]``; K inputs of an output channel in the order in which the weight has them."""
        return self.groups, math.prod(self.shape[1:])

    def add_moments(self, x: Tensor, total: Tensor) -> None:
        """Add the moments of an input ``[n, …]`` to ``total`` ``[G, K, K]``."""
        for columns in self.columns(x):
            _add_squares(total, columns)

    def columns(self, x: Tensor, minus: Tensor | None = None) -> Iterator[Tensor]:
        """What the weight is multiplied with, of an input ``[n, …]``: ``[G, K, P]``, some samples after the other.

        Of more than ``POSITIONS`` positions of a sample every second one, or third, and so on, is taken in each direction.

        Args:
            x: the input.
            minus: numbers of its channels, ``[channels]``, that are taken off it.
        """
        groups, inputs = self.sides
        if self.convolution is None:
            rows = x.reshape(len(x) if x.dim() > 2 else 1, -1, inputs)
            step = -(-rows.shape[1] // POSITIONS) if x.dim() > 2 else 1
            rows = rows[:, step // 2 :: step].reshape(-1, inputs)
            yield (rows if minus is None else rows - minus).T[None]
            return
        windows, size = self._windows(x), len(self.shape) - 2
        for part in windows.split(max(1, ELEMENTS // max(1, windows[0].numel()))):
            if groups == 1 and part.shape[1] == inputs:  # a kernel of one element: no copy where channels come last
                rows = part.movedim(1, -1).reshape(-1, inputs)
                yield (rows if minus is None else rows - minus).T[None]
                continue
            turned = part.permute(1, *range(2 + size, 2 + 2 * size), 0, *range(2, 2 + size))
            if minus is not None:
                turned = torch.sub(turned, minus.view(-1, *[1] * (1 + 2 * size)), out=x.new_empty(turned.shape))
            yield turned.reshape(groups, inputs, -1)

    def channel_means(self, x: Tensor) -> Tensor:
        """``[channels]`` of an input ``[n, …]``, as :meth:`columns` takes them off."""
        if self.convolution is None:
            return x.reshape(-1, x.shape[-1]).mean(0)
        return x.movedim(-len(self.shape) + 1, 0).flatten(1).mean(1)

    def over_columns(self, channels: Tensor) -> Tensor:
        """Numbers ``[channels]`` at all positions of a kernel: ``[G, K]``."""
        groups, inputs = self.sides
        return channels.repeat_interleave(groups * inputs // len(channels)).view(groups, inputs)

    def _windows(self, x: Tensor) -> Tensor:
        """What a kernel sees at the positions that are looked at: ``[n, channels, *positions, *kernel]``, a view."""
        assert self.convolution is not None
        kernel, size = self.shape[2:], len(self.shape) - 2
        x = x if x.dim() == size + 2 else x[None]
        stride, padding, dilation = self.convolution
        steps, spread = numbers(stride, size), numbers(dilation, size)
        if self.output_padding is not None:
            x, steps = self._spaced(x, steps, numbers(padding, size), spread), (1,) * size
        else:
            x = pad(x, _sides(padding, dilation, kernel))
        covered = [apart * (own - 1) + 1 for own, apart in zip(kernel, spread, strict=True)]
        places = [(n - own) // by + 1 for n, own, by in zip(x.shape[2:], covered, steps, strict=True)]
        step = math.ceil((math.prod(places) / POSITIONS) ** (1 / size)) if math.prod(places) > POSITIONS else 1
        if step == 1 and math.prod(kernel) > 1:
            x = x.contiguous()  # every element is read several times
        for dim, (own, by, apart) in enumerate(zip(covered, steps, spread, strict=True), 2):
            x = x.unfold(dim, own, by)[..., ::apart]
        if self.output_padding is not None:
            x = x.flip(tuple(range(2 + size, 2 + 2 * size)))
        # From the middle of each step: the border is not seen more often than it is there.
        looked: list[Any] = [..., *(slice(min(step // 2, n - 1), None, step) for n in places), *[slice(None)] * size]
        return x[tuple(looked)]

    def _spaced(self, x: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Tensor:
        """The input of the plain convolution that a transposed one is: zeros between and around its elements."""
        kernel, added = self.shape[2:], numbers(self.output_padding, len(stride))
        wide = x.new_zeros(*x.shape[:2], *((n - 1) * by + 1 for n, by in zip(x.shape[2:], stride, strict=True)))
        places: list[Any] = [..., *(slice(None, None, by) for by in stride)]
        wide[tuple(places)] = x
        sides = []
        for own, apart, cut, more in reversed(list(zip(kernel, dilation, padding, added, strict=True))):
            sides += [apart * (own - 1) - cut, apart * (own - 1) - cut + more]
        return pad(wide, sides)


class PairSums:
    """Sums over what two nets, x and y, give to the same layer.

    They are taken around the mean of the first samples, so that second moments around the mean keep their digits.
    """

    def __init__(self, use: Use) -> None:
        self.use, self.count = use, 0
        self._at: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add two inputs ``[n, …]`` of the same samples."""
        if self._at is None:
            self._begin(x, y)
        assert self._at is not None
        for one, other in zip(*(self.use.columns(z, at) for z, at in zip((x, y), self._at, strict=True)), strict=True):
            self.count += one.shape[2]
            self._x += one.sum(2)
            self._y += other.sum(2)
            self._xy += one @ other.transpose(1, 2)
            _add_squares(self._yy, other)

    def moments(self, centered: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """float64 E[x yᵀ] and E[y yᵀ] ``[G, K, K]``, around the means or around zero, and E[x], E[y] ``[G, K]``."""
        assert self._at is not None
        x, y = (total.double() / self.count for total in (self._x, self._y))
        one, other = (self.use.over_columns(at).double() + mean for at, mean in zip(self._at, (x, y), strict=True))
        xy = self._xy.double() / self.count - _outer(x, y)
        yy = self._yy.double() / self.count - _outer(y, y)
        if not centered:
            xy, yy = xy + _outer(one, other), yy + _outer(other, other)
        return xy, yy, one, other

    def _begin(self, x: Tensor, y: Tensor) -> None:
        self._at = self.use.channel_means(x), self.use.channel_means(y)
        groups, inputs = self.use.sides
        self._xy, self._yy = (x.new_zeros(groups, inputs, inputs) for _ in range(2))
        self._x, self._y = (x.new_zeros(groups, inputs) for _ in range(2))


def _add_squares(total: Tensor, columns: Tensor) -> None:
    """``total += X Xᵀ`` ``[G, K, K]`` for X ``[G, K, P]``.

    Of a single group, whose matrix may be large, what lies below the blocks on the diagonal mirrors what lies above.
    """
    if len(columns) > 1:
        total += columns @ columns.transpose(1, 2)
        return
    inputs = columns.shape[1]
    for a in range(0, inputs, BLOCK):
        b = min(a + BLOCK, inputs)
        part = columns[0, a:b] @ columns[0, a:].T
        total[0, a:b, a:] += part
        total[0, b:, a:b] += part[:, b - a :].T


def _outer(one: Tensor, other: Tensor) -> Tensor:
    return one[:, :, None] * other[:, None, :]


def numbers(value: Any, size: int) -> tuple[int, ...]:
    """One number for each of so many dimensions."""
    given = (value,) if isinstance(value, int) else tuple(value)
    return given if len(given) == size else given * size


def _sides(padding: Any, dilation: Any, kernel: tuple[int, ...]) -> list[int]:
    """Zeros around an input as :func:`torch.nn.functional.pad` has them: before and after, the last dimension first."""
    size, sides = len(kernel), list[int]()
    apart = numbers(dilation, size)
    for k in reversed(range(size)):
        if isinstance(padding, str):
            total = apart[k] * (kernel[k] - 1) if padding == "same" else 0
            sides += [total // 2, total - total // 2]
        else:
            sides += [numbers(padding, size)[k]] * 2
    return sides
