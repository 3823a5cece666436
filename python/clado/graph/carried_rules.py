"""What an operator makes of differences: a rule for what is linear, bilinear, or has a kernel (docs/numerics.md).

A rule returns the difference of its node's output, or None where it does not apply: then f(x + d) − f(x) does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

import clado_ext

from .differences import Differences
from .streams import batch_dim
from .weights import CONVOLUTIONS

aten = torch.ops.aten
# Ops that are linear in the values they are given together: they act on differences as on values.
_LINEAR = {
    operator.getitem,
    *(
        getattr(getattr(aten, name), overload)
        for name, overloads in {
            "_reshape_alias": ("default",),
            "adaptive_avg_pool2d": ("default",),
            "_adaptive_avg_pool2d": ("default",),
            "alias": ("default",),
            "avg_pool2d": ("default",),
            "cat": ("default",),
            "chunk": ("default",),
            "clone": ("default",),
            "contiguous": ("default",),
            "dropout": ("default",),
            "expand": ("default",),
            "flatten": ("using_ints",),
            "flip": ("default",),
            "mean": ("dim", "default"),
            "movedim": ("int", "intlist"),
            "neg": ("default",),
            "permute": ("default",),
            "pixel_shuffle": ("default",),
            "pixel_unshuffle": ("default",),
            "repeat": ("default",),
            "reshape": ("default",),
            "roll": ("default",),
            "select": ("int",),
            "slice": ("Tensor",),
            "split": ("Tensor",),
            "split_with_sizes": ("default",),
            "squeeze": ("default", "dim", "dims"),
            "stack": ("default",),
            "sum": ("dim_IntList", "default"),
            "t": ("default",),
            "transpose": ("int",),
            "unbind": ("int",),
            "unflatten": ("int",),
            "unfold": ("default",),
            "unsqueeze": ("default",),
        }.items()
        for overload in overloads
    ),
}


def _linear_product(node: Any, at: Differences, x: Tensor, w: Tensor) -> Tensor:
    with at.clean.precision.product():
        return torch.nn.functional.linear(x, w)


def _conv_product(node: Any, at: Differences, x: Tensor, w: Tensor) -> Tensor:
    rest = {name: value for name, value in node.kwargs.items() if name not in ("input", "weight", "bias")}
    with at.clean.precision.product():
        found: Tensor = node.target(x, w, None, *node.args[3:], **rest)
        return found


def _matmul(at: Differences, a: Tensor, b: Tensor) -> Tensor:
    precision = at.clean.precision
    with precision.product():
        return torch.matmul(precision.operand(a), precision.operand(b))


# Operators that multiply with a weight, bias aside.
PRODUCTS: dict[Any, Callable[[Node, Differences, Tensor, Tensor], Tensor]] = {
    aten.linear.default: _linear_product,
    **dict.fromkeys(CONVOLUTIONS, _conv_product),
}


def _weighted(node: Any, at: Differences) -> Any:
    """Linear and convolution under the clean weight: d·Wᵀ."""
    x, w = node.args[0], node.args[1]
    if at.d.get(x) is None or at.varies(w) or (len(node.args) > 2 and at.varies(node.args[2])):
        return None
    return PRODUCTS[node.target](node, at, at.clean.precision.operand(at.d[x]), at.clean.operand(w))


def _product(node: Any, at: Differences) -> Any:
    """matmul and bmm: da·(b + db) + a·db."""
    a, b = node.args[0], node.args[1]
    if not at.varies(a) or not at.varies(b):
        one = a if at.varies(a) else b
        other = at.clean.constants.get(b if one is a else a)
        if not isinstance(other, Tensor):
            return None
        return _matmul(at, at.d[a], other) if one is a else _matmul(at, other, at.d[b])
    da, db = at.d.get(a), at.d.get(b)
    first = None if da is None else _matmul(at, da, at.total(b))
    if db is None:
        return first
    second = _matmul(at, at.repeated(a), db)
    return second if first is None else second.add_(first)


def _mul(node: Any, at: Differences) -> Any:
    """Elementwise product: da·(b + db) + a·db."""
    a, b = node.args[0], node.args[1]
    if not at.varies(a) or not at.varies(b):
        return at.linearly(node)
    da, db = at.d.get(a), at.d.get(b)
    first = None if da is None else da * at.total(b)
    if db is None:
        return first
    second = at.repeated(a) * db
    return second if first is None else second + first


def _div(node: Any, at: Differences) -> Any:
    """Division by what no perturbation reaches."""
    a, b = node.args[0], node.args[1]
    if len(node.args) > 2 or node.kwargs or at.d.get(a) is None or (isinstance(b, Node) and at.d.get(b) is not None):
        return None
    if at.varies(b):
        return at.d[a] / at.total(b)
    return at.linearly(node)


def _add(node: Any, at: Differences) -> Any:
    """Sum and difference of two values, or of a value and a constant."""
    a, b = (argument if isinstance(argument, Node) else None for argument in node.args[:2])
    da, db = at.d.get(a) if a else None, at.d.get(b) if b else None
    alpha = node.kwargs.get("alpha", 1)
    sign = -alpha if node.target == aten.sub.Tensor else alpha
    if da is not None and db is not None:
        fused = add_and_norm(node, at, da.float(), db) if sign == 1 else None
        return torch.add(da.float(), db.float(), alpha=sign) if fused is None else fused
    out = da if db is None else db if sign == 1 else db * sign
    assert out is not None
    dim = batch_dim(node.meta["val"])
    shape = [size * at.streams if d == dim else size for d, size in enumerate(at.x(node).shape)]
    return out if list(out.shape) == shape else out.expand(shape).contiguous()


def add_and_norm(node: Any, at: Differences, residual: Tensor, branch: Tensor) -> Tensor | None:
    """Sum of two differences together with the layer norm that reads it; the norm's value waits in ``at.d``."""
    norms = [user for user in node.users if user.target == aten.layer_norm.default and user.args[0] is node]
    norms = [norm for norm in norms if not at.clean.perturbable(norm)]
    given = _norm_arguments(norms[0], at) if norms and residual.shape == branch.shape else None
    if given is None:
        return None
    total, at.d[norms[0]] = clado_ext.carried_add_layer_norm(
        at.x(node), residual, branch, *given, at.clean.precision.half
    )
    return total


def _linear_op(node: Any, at: Differences) -> Any:
    if any(isinstance(at.d.get(a), tuple) and node.target is not operator.getitem for a in node.all_input_nodes):
        return None
    if node.target is operator.getitem:
        return at.d[node.args[0]][node.args[1]]
    return at.linearly(node)


def _pad(node: Any, at: Differences) -> Any:
    """Padding with a constant leaves zeros in the difference."""
    mode = node.args[2] if len(node.args) > 2 and node.target == aten.pad.default else "constant"
    if mode != "constant":
        return at.linearly(node)
    return torch.nn.functional.pad(at.d[node.args[0]], list(node.args[1]))


def _batch_norm(node: Any, at: Differences) -> Any:
    """Batch norm with running statistics scales the difference."""
    x, weight, _, _, variance = node.args[:5]
    d = at.d.get(x)
    if d is None or any(isinstance(a, Node) and at.varies(a) for a in node.args[1:5]):
        return None
    eps = node.args[6] if node.target == aten._native_batch_norm_legit_no_training.default else node.args[7]
    if node.target == aten.batch_norm.default and node.args[5]:
        return None
    scale = torch.rsqrt(at.clean.constants[variance] + eps)
    scale = scale if weight is None else scale * at.clean.constants[weight]
    out = d * scale.view(-1, *[1] * (d.dim() - 2))
    return (out, None, None) if isinstance(node.meta["val"], (tuple, list)) else out


def _attend(node: Any, at: Differences) -> Any:
    """softmax(s)·v with s = q·kᵀ: ds = dq·(k + dk)ᵀ + q·dkᵀ, then P'·dv + (P' − P)·v."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    q, k, v = (given[name] for name in names[:3])
    mask = given.get("attn_mask")
    heads = [n.meta["val"] for n in (q, k, v)]
    plain = all(m.dim() == 4 and batch_dim(m) == 0 for m in heads) and not given.get("enable_gqa")
    if not plain or given.get("dropout_p") or given.get("is_causal") or (isinstance(mask, Node) and at.varies(mask)):
        return None
    scale, streams = given.get("scale") or heads[0].shape[-1] ** -0.5, at.streams
    operand, half = at.clean.precision.operand, at.clean.precision.half
    if node not in at.clean.attention:
        clean = [at.x(n) for n in (q, k, v)]
        scores = clean[0] @ clean[1].transpose(-1, -2) * scale
        if mask is not None:
            bias = at.clean.constants[mask]
            scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
        at.clean.attention[node] = (scores, scores.softmax(-1), *(operand(x).contiguous() for x in clean))
    scores, probabilities, cq, ck, cv = at.clean.attention[node]
    dq, dk, dv = (None if d is None else operand(d).unflatten(0, (streams, -1)) for d in map(at.d.get, (q, k, v)))

    def pair(first: Tensor | None, second: Tensor | None, dim: int) -> Tensor:
        """Both along a dimension, streams outermost; clean ones serve every stream."""
        parts = [x if x.dim() == 5 else x.expand(streams, *x.shape) for x in (first, second) if x is not None]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim)).flatten(0, 1)

    with at.clean.precision.product():
        if dq is None and dk is None:
            return torch.matmul(operand(pair(probabilities, None, 0)), pair(dv, None, 0))
        one = pair(dq, None if dk is None else cq, -1)
        other = pair(None if dq is None else operand(ck if dk is None else dk + ck), dk, -1)
        moved = torch.matmul(one, other.transpose(-1, -2))
        both = operand(clado_ext.carried_softmax(scores, probabilities, moved, scale, half))
        change = both[..., : scores.shape[-1]] if dv is None else both
        return torch.matmul(change, pair(cv, dv, -2))


def _gelu(node: Any, at: Differences) -> Any:
    x = node.args[0]
    if len(node.args) > 1 or node.kwargs.get("approximate", "none") != "none" or batch_dim(x.meta["val"]) != 0:
        return None
    return clado_ext.carried_gelu(at.x(x), at.d[x], at.clean.precision.half)


def _layer_norm(node: Any, at: Differences) -> Any:
    x, given = node.args[0], _norm_arguments(node, at)
    if given is None:
        return None
    return clado_ext.carried_layer_norm(at.x(x), at.d[x], *given, at.clean.precision.half)


def _norm_arguments(node: Any, at: Differences) -> tuple[Tensor | None, float] | None:
    """(weight, eps) of a layer norm over the last dimension; None: any other."""
    x, shape, weight, bias, eps = (*node.args[:5], *(None, None, 1e-5)[len(node.args) - 2 :])[:5]
    dynamic = any(isinstance(a, Node) and at.varies(a) for a in (weight, bias))
    if len(shape) != 1 or dynamic or node.kwargs or batch_dim(x.meta["val"]) != 0:
        return None
    return None if weight is None else at.clean.constants[weight], eps


Rule = Callable[[Any, Differences], Any]
RULES: dict[Any, Rule] = {
    **dict.fromkeys(_LINEAR, _linear_op),
    **dict.fromkeys(PRODUCTS, _weighted),
    **dict.fromkeys((aten.matmul.default, aten.bmm.default, aten.mm.default), _product),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _mul),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _div),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _add),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _pad),
    **dict.fromkeys((aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default), _batch_norm),
    aten.scaled_dot_product_attention.default: _attend,
    aten.gelu.default: _gelu,
    aten.layer_norm.default: _layer_norm,
}
