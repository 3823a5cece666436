"""Rows in time-major order, as ``nn.MultiheadAttention`` has them, are put in batch-major order.

Streams are stacked along the batch dimension, which must therefore be the outermost part of the dimension that holds it. A
``reshape`` that merges other dimensions in front of it (``[T, N, E]`` to ``[T·N, E]``) is rewritten so that its rows come in the
order ``[N·T, E]``, up to the ``reshape`` that takes them apart. What lies between treats rows alike; where it does not, the
executor's self-test says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

aten = torch.ops.aten
_PRIME = 1_000_003  # stands for the batch size where shapes are factored


def put_batch_first(graph: Graph, batch: torch.SymInt) -> None:
    """Rewrite ``graph`` in place; ``batch``: its batch size."""
    rewriter = _Rewriter(graph, batch)
    for node in list(graph.nodes):
        if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            rewriter.visit(node)


@dataclass(frozen=True)
class _Place:
    """Where the batch is in a shape: ``before`` positions in dimensions in front of its own, then ``outer`` · N · ``inner``."""

    dim: int
    before: int
    outer: int
    inner: int


class _Rewriter:
    def __init__(self, graph: Graph, batch: torch.SymInt) -> None:
        self.graph, self.batch = graph, batch
        self._outer: dict[
            Node, int
        ] = {}  # of values stored as [N, outer, inner] that the model has as [outer, N, inner]
        self._count: Node | None = None

    def visit(self, node: Node) -> None:
        outer = max((self._outer.get(argument, 1) for argument in node.all_input_nodes), default=1)
        if node.target == aten.reshape.default:
            outer = self._reshape(node, outer)
        if outer > 1:
            self._outer[node] = outer

    def _reshape(self, node: Node, outer: int) -> int:
        """Put the rows of a reshape in order; how many positions lie outside the batch in what the model has there."""
        entered: Any = node.args[0]
        shape, into = self._sizes(entered), self._sizes(node)
        place = None if shape is None else _place(shape, outer)
        if shape is None or into is None or place is None:
            return outer
        after = _place_behind(into, place.before * place.outer)
        if after is None or (place.outer == 1 and after.outer == 1):
            return 1 if after is None else after.outer
        split = _split(shape, place)
        joined = _split(into, after)
        with self.graph.inserting_before(node):
            value = self._reshaped(entered, split)
            value = self._moved(value, split.index(None), 0)
            value = self._reshaped(value, [None, *(size for size in joined if size is not None)])
            value = self._moved(value, 0, joined.index(None))
        node.args = (value, *node.args[1:])
        return after.outer

    def _reshaped(self, value: Node, sizes: Sequence[int | None]) -> Node:
        return self._call(aten.reshape.default, value, [self._samples if size is None else size for size in sizes])

    def _moved(self, value: Node, dim: int, to: int) -> Node:
        order = [d for d in range(value.meta["val"].dim()) if d != dim]
        order.insert(to, dim)
        return value if order == sorted(order) else self._call(aten.permute.default, value, order)

    def _call(self, target: Any, *args: Any) -> Node:
        made = self.graph.call_function(target, args)
        made.meta["val"] = target(*torch.fx.node.map_arg(args, lambda n: n.meta["val"]))
        return made

    @property
    def _samples(self) -> Node:
        """The node that counts samples."""
        if self._count is None:
            inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
            counted = next(n for n in inputs if _first_size(n) is not None and str(_first_size(n)) == str(self.batch))
            with self.graph.inserting_after(inputs[-1]):
                self._count = self._call(aten.sym_size.int, counted, 0)
        return self._count

    def _sizes(self, node: Node) -> list[int] | None:
        """A shape with a prime for the batch size; None where the batch is in none or in several dimensions."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        sizes = [_number(size, self.batch.node.expr) for size in value.shape]
        held = [size for size in sizes if size is not None and size % _PRIME == 0]
        return None if None in sizes or len(held) != 1 or 0 in sizes else [int(size or 0) for size in sizes]


def _first_size(node: Node) -> Any:
    value = node.meta.get("val")
    return value.shape[0] if isinstance(value, Tensor) and value.dim() else None


def _number(size: Any, batch: Any) -> int | None:
    if isinstance(size, int):
        return size
    found = size.node.expr.subs(batch, _PRIME)
    return int(found) if found.is_Integer else None


def _place(shape: Sequence[int], outer: int) -> _Place | None:
    dim = next(d for d, size in enumerate(shape) if size % _PRIME == 0)
    inner, rest = divmod(shape[dim] // _PRIME, outer)
    return None if rest else _Place(dim, math.prod(shape[:dim]), outer, inner)


def _place_behind(shape: Sequence[int], positions: int) -> _Place | None:
    """Where the batch is in a shape in which so many positions lie outside of it."""
    dim = next(d for d, size in enumerate(shape) if size % _PRIME == 0)
    outer, rest = divmod(positions, math.prod(shape[:dim]))
    return None if rest or outer == 0 else _place(shape, outer)


def _split(shape: Sequence[int], place: _Place) -> list[int | None]:
    """The shape with the batch, None, in a dimension of its own in front of the positions that share its dimension."""
    return [*shape[: place.dim], None, place.outer, place.inner, *shape[place.dim + 1 :]]
