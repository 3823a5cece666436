"""Derivatives by weights, sample by sample: ⟨∂ objective / ∂w, Δ⟩ from what enters a layer and the gradient of what leaves it.

Per sample the derivative by a weight is an outer product. Where a layer runs at many positions, that product and a small one per
variant take less than a product of the layer's own size per variant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..quant import Variant
from .moments import numbers
from .streams import rows
from .weights import CONVOLUTIONS

# Elements of the per-sample weight gradients that exist at once: beyond it they leave the caches of a CPU.
_OUTER_ELEMENTS = 8 << 20


@dataclass(frozen=True)
class Tap:
    """A node that uses a layer's weight, as it ran: what entered and what left it."""

    layer: int
    node: Node
    inputs: dict[Node, Any]
    output: Tensor


def slopes(
    tap: Tap,
    gradient: Tensor,
    clean: Variant,
    variants: Sequence[Variant],
    sources: Sequence[Node],
    under: Callable[[Variant | None], Tensor],
    count: int,
) -> Tensor:
    """⟨gradient, change of the node's output under each variant⟩ per row, ``[rows, variants]``.

    Args:
        gradient: of the objective by the node's output.
        clean: the layer's own weight; ``sources``: its placeholders.
        under: what the node gives under a variant; None: its own.
        count: rows, of all streams and samples.
    """
    node, alike = tap.node, [k for k, variant in enumerate(variants) if variant.rounds == clean.rounds is None]
    weights = [variants[k].weight for k in alike]
    plain = _of_weights(tap, gradient, clean.weight, weights, sources, under, count) if alike else None
    if plain is not None and len(alike) == len(variants):
        return plain
    out = gradient.new_empty(count, len(variants))
    if plain is not None:
        out[:, alike] = plain
    before = under(None)
    for k in sorted(set(range(len(variants))) - set(alike)):
        change = under(variants[k]) - before
        out[:, k] = rows(change * gradient, node.meta["val"], count).flatten(1).sum(1)
    return out


def _of_weights(
    tap: Tap,
    gradient: Tensor,
    clean: Tensor,
    variants: Sequence[Tensor],
    sources: Sequence[Node],
    under: Callable[[Variant | None], Tensor],
    count: int,
) -> Tensor:
    """:func:`slopes` of weights under an input that stays as it is."""
    node = tap.node
    parameters = node.args[1] if len(node.args) > 1 else None
    entry = node.args[0]
    plain = parameters in sources and isinstance(entry, Node) and entry in tap.inputs
    if plain and node.target == torch.ops.aten.linear.default:  # else the weight is used in other ways
        x, g = (rows(t, entry.meta["val"], count) for t in (tap.inputs[entry], gradient))  # type: ignore[union-attr,index]
        if not outer_pays(x.shape[1], len(variants)):
            return torch.stack([((g @ (v - clean)) * x).flatten(1).sum(1) for v in variants], 1)
        return _outer_products(x, g, clean, variants)
    if plain and node.target in CONVOLUTIONS and gradient.dim() == 4:
        x, g = _patches(node, tap.inputs[entry], gradient, clean.shape)  # type: ignore[index]
        if outer_pays(x.shape[2], len(variants)):
            groups = x.shape[1]
            split = [v.reshape(groups, -1, v[0].numel()) for v in (clean, *variants)]
            parts = [_outer_products(x[:, k], g[:, k], split[0][k], [v[k] for v in split[1:]]) for k in range(groups)]
            return torch.stack(parts).sum(0)
    before = under(None)
    changes = (under(Variant(variant)) - before for variant in variants)
    return torch.stack([rows(c * gradient, node.meta["val"], count).flatten(1).sum(1) for c in changes], 1)


def outer_pays(positions: float, variants: int) -> bool:
    """Whether one product for the outer product and a small one per variant is less than a product per variant."""
    return positions * variants > positions + variants


def _outer_products(x: Tensor, g: Tensor, clean: Tensor, variants: Sequence[Tensor]) -> Tensor:
    """⟨gᵀx, variant − clean⟩ per row for x ``[rows, T, K]``, g ``[rows, T, N]``, weights ``[N, K]``: ``[rows, variants]``."""
    weights = torch.stack([v.reshape(clean.shape) - clean for v in variants], -1).flatten(0, 1)
    size = max(1, _OUTER_ELEMENTS // clean.numel())
    parts = zip(x.split(size), g.split(size), strict=True)
    return torch.cat([torch.bmm(q.transpose(1, 2), p).flatten(1) @ weights for p, q in parts])


def _patches(node: Node, x: Tensor, gradient: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Convolution as a product: inputs ``[rows, groups, positions, K]`` and output gradients ``[rows, groups, positions, N]``."""
    given = dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), node.args, strict=False))
    given |= node.kwargs
    stride, dilation = (numbers(given.get(name, 1), 2) for name in ("stride", "dilation"))
    padding, groups, kernel = given.get("padding", 0), given.get("groups", 1), shape[2:]
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
    else:
        total = [2 * p for p in numbers(padding, 2)]
    (top, left), (height, width) = [t // 2 for t in total], total
    x = torch.nn.functional.pad(x, (left, width - left, top, height - top))
    columns = torch.nn.functional.unfold(x, tuple(kernel), dilation, 0, stride).unflatten(1, (groups, -1))
    return columns.transpose(2, 3), gradient.flatten(2).unflatten(1, (groups, -1)).transpose(2, 3)
