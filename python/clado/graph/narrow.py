"""What nobody reads is not computed: a classifier that reads one token asks one row of the last block, not all of them.

From the outputs backwards every value learns which part of it is read. Where that is a span of one dimension, and the operator
computes positions along it independently, only the span is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

aten = torch.ops.aten


class Span(NamedTuple):
    """Positions start … stop − 1 along a dimension."""

    dim: int
    start: int
    stop: int


Sources = dict[Node, Span]
Rule = Callable[[Node, Span], Sources | None]


def narrow(graph: Graph, nodes: Sequence[Node], outputs: Sequence[Any]) -> None:
    """Rewrite ``graph`` so that its nodes compute only what is read of them; the outputs stay as they are.

    Args:
        nodes: live nodes in execution order, shapes in ``meta["val"]``; their arguments and shapes are changed in place, and
            slices are added where a narrow value is read from a whole one.
        outputs: what must stay whole.
    """
    live, spans = set(nodes), dict[Node, Span]()
    for node in reversed(nodes):
        span = None if node in outputs else _read(node, live, spans)
        if span is not None and _sources(node, span) is not None:
            spans[node] = span
    slices: dict[tuple[Node, Span], Node] = {}
    shapes = {node: node.meta["val"] for node in spans}
    for node in nodes:
        if node in spans:
            for read, span in (_sources(node, spans[node]) or {}).items():
                node.replace_input_with(read, _taken(graph, read, span, spans, slices))
            if node.target == aten.reshape.default:
                size = list(node.args[1])  # type: ignore[arg-type]
                size[spans[node].dim] = spans[node].stop - spans[node].start
                node.args = (node.args[0], size)
        elif node.args and node.args[0] in spans and (part := _part(node)) is not None:
            source: Any = node.args[0]
            begin = spans[source].start
            moved = (part.start - begin,) if node.target == aten.select.int else (part.start - begin, part.stop - begin)
            node.args = (source, part.dim, *moved)
    for node, value in shapes.items():
        node.meta["val"] = aten.slice.Tensor(value, *spans[node])


def _read(node: Node, live: set[Node], spans: dict[Node, Span]) -> Span | None:
    """The part of a node that its users read; None: all of it, or more than one span of one dimension holds."""
    value = node.meta["val"]
    users = [user for user in node.users if user in live]
    if not isinstance(value, Tensor) or not users:
        return None
    wanted: list[Span] = []
    for user in users:
        part = (_sources(user, spans[user]) or {}).get(node) if user in spans else _part(user)
        if part is None:
            return None
        wanted.append(part)
    dim, start, stop = wanted[0].dim, min(s.start for s in wanted), max(s.stop for s in wanted)
    if any(s.dim != dim for s in wanted) or not isinstance(value.shape[dim], int) or stop - start >= value.shape[dim]:
        return None
    return Span(dim, start, stop)


def _part(node: Node) -> Span | None:
    """What a selection or a slice reads of its input."""
    given: tuple[Any, ...] = node.args
    if node.target == aten.select.int:
        value, dim, start = given
        stop, step = None, 1
    elif node.target == aten.slice.Tensor:
        defaults: tuple[Any, ...] = (None, 0, None, None, 1)
        value, dim, start, stop, step = given + defaults[len(given) :]
    else:
        return None
    shape = value.meta["val"].shape
    dim = dim % len(shape)
    if not all(isinstance(x, (int, type(None))) for x in (shape[dim], start, stop, step)) or step != 1:
        return None
    start, stop, _ = slice(start, stop).indices(shape[dim])
    return Span(dim, start, start + 1 if node.target == aten.select.int else stop)


def _taken(graph: Graph, source: Node, span: Span, spans: dict[Node, Span], slices: dict[Any, Node]) -> Node:
    """``span`` of a source: the source itself where it holds no more, else a slice right behind it."""
    held = spans.get(source)
    if held == span:
        return source
    if (source, span) not in slices:
        begin = held.start if held else 0
        with graph.inserting_after(source):
            part = graph.call_function(aten.slice.Tensor, (source, span.dim, span.start - begin, span.stop - begin))
        part.meta["val"] = aten.slice.Tensor(source.meta["val"], *span)
        slices[source, span] = part
    return slices[source, span]


def _sources(node: Node, span: Span) -> Sources | None:
    """The spans of its inputs from which a node computes a span of its output; None where it needs all of them.

    Inputs that are not named are read whole.
    """
    rule = _RULES.get(node.target)
    return None if rule is None else rule(node, span)


def _pointwise(node: Node, span: Span) -> Sources | None:
    rank, out = node.meta["val"].dim(), Sources()
    for source in node.all_input_nodes:
        value = source.meta.get("val")
        if isinstance(value, Tensor):
            dim = span.dim - (rank - value.dim())
            if dim >= 0 and value.shape[dim] != 1:
                out[source] = span._replace(dim=dim)
    return out


def _rows(node: Node, span: Span) -> Sources | None:
    """A linear layer or a norm: along every dimension but the last ones, only the first input."""
    last = len(node.args[1]) if node.target == aten.layer_norm.default else 1  # type: ignore[arg-type]
    return _first(node, span) if span.dim < node.meta["val"].dim() - last else None


def _along(node: Node, span: Span) -> Sources | None:
    """Softmax, slice: along every dimension but their own."""
    dim = node.args[1] if len(node.args) > 1 else 0
    return _first(node, span) if span.dim != dim % node.meta["val"].dim() else None


def _first(node: Node, span: Span) -> Sources:
    return {node.args[0]: span}  # type: ignore[dict-item]


def _transposed(node: Node, span: Span) -> Sources | None:
    rank = node.meta["val"].dim()
    order = list(range(rank))
    if node.target == aten.permute.default:
        order = [d % rank for d in node.args[1]]  # type: ignore[union-attr]
    else:
        a, b = (d % rank for d in node.args[1:3])
        order[a], order[b] = b, a
    return _first(node, span._replace(dim=order[span.dim]))


def _viewed(node: Node, span: Span) -> Sources | None:
    """A view that keeps the dimension, behind the batch dimension, as it is."""
    source, value = node.args[0], node.meta["val"]
    shape, into = source.meta["val"].shape, value.shape  # type: ignore[union-attr]
    if shape[0] is not into[0] and str(shape[0]) != str(into[0]):
        return None
    if span.dim == 0 or not all(isinstance(size, int) for size in (*shape[1:], *into[1:])):
        return None
    for dim in range(1, len(shape)):
        if shape[dim] == into[span.dim] and math.prod(shape[1:dim]) == math.prod(into[1 : span.dim]):
            return _first(node, span._replace(dim=dim))
    return None


def _attention(node: Node, span: Span) -> Sources | None:
    """The rows of the queries; keys and values are read whole."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    rows, mask = node.meta["val"].dim() - 2, given.get("attn_mask")
    query = given["query"]
    again = query in (given["key"], given["value"], mask)
    if span.dim != rows or given.get("is_causal") or given.get("dropout_p") or again:
        return None
    out = {query: span}
    if isinstance(mask, Node):
        dim = mask.meta["val"].dim() - 2
        if mask.meta["val"].shape[dim] != 1:
            out[mask] = span._replace(dim=dim)
    return out


def _product(node: Node, span: Span) -> Sources | None:
    """The rows of a product are those of its first factor."""
    a, b = node.args[:2]
    rows = node.meta["val"].dim() - 2
    fits = a is not b and rows >= 0 and span.dim == rows and a.meta["val"].dim() == rows + 2  # type: ignore[union-attr]
    return _first(node, span) if fits else None


_POINTWISE = {
    "abs": "default",
    "add": "Tensor Scalar",
    "alias": "default",
    "clamp": "default",
    "clone": "default",
    "contiguous": "default",
    "div": "Tensor Scalar",
    "dropout": "default",
    "exp": "default",
    "gelu": "default",
    "hardsigmoid": "default",
    "hardswish": "default",
    "leaky_relu": "default",
    "mul": "Tensor Scalar",
    "neg": "default",
    "pow": "Tensor_Scalar",
    "relu": "default",
    "rsqrt": "default",
    "sigmoid": "default",
    "silu": "default",
    "sqrt": "default",
    "sub": "Tensor Scalar",
    "tanh": "default",
    "to": "dtype",
    "_to_copy": "default",
}
_RULES: dict[Any, Rule] = {
    **{
        getattr(getattr(aten, name), overload): _pointwise
        for name, overloads in _POINTWISE.items()
        for overload in overloads.split()
    },
    **dict.fromkeys((aten.linear.default, aten.layer_norm.default), _rows),
    **dict.fromkeys((aten.softmax.int, aten._softmax.default, aten.slice.Tensor), _along),
    **dict.fromkeys((aten.transpose.int, aten.permute.default), _transposed),
    aten.reshape.default: _viewed,
    **dict.fromkeys((aten.matmul.default, aten.bmm.default), _product),
    aten.scaled_dot_product_attention.default: _attention,
}
