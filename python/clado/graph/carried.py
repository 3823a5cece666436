"""Low precision that is right: the difference to the clean forward is carried through the graph (docs/numerics.md).

A perturbed forward in TF32 or bfloat16 rounds relative to the activations and loses the change that is sought, a thousandth of
them. Here every value is a clean tensor, computed once per batch in float32 and shared by all perturbations, and a difference d,
stacked over streams. Products act on d under a rule, so that their rounding is relative to d; what is linear acts on d as it is;
everything else is f(x + d) − f(x) in float32. A value that no perturbation has reached has no difference and costs nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

import clado_ext

from .capture import Captured, evaluate, is_size
from .executor import Executor, Overrides, State, _batch_dim, _slice, _stack

Values = dict[Any, Any]  # differences by node
aten = torch.ops.aten
LOW_PRECISIONS = ("tf32", "bfloat16")
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
_CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)


@dataclass(frozen=True)
class _Whole:
    """A stacked value without a difference: indices, masks, sizes."""

    value: Any


class Precision:
    """How matrix products round their operands; sums are float32."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.half = name == "bfloat16"  # what leaves a product, or enters the next one, is bfloat16; sums are float32
        self._emulated = name == "tf32" and device.type != "cuda"

    def operand(self, x: Tensor) -> Tensor:
        """What enters a product; TF32 is rounded here where no hardware does it."""
        if self.name == "bfloat16":
            return x.bfloat16()
        return _round_tf32(x) if self._emulated else x

    def product(self) -> AbstractContextManager[None]:
        """Where products run."""
        return _tf32_units() if self.name == "tf32" and not self._emulated else nullcontext()


def _round_tf32(x: Tensor) -> Tensor:
    """Ten bits behind the point, half to even; NaN and infinity stay."""
    bits = x.float().contiguous().view(torch.int32)
    rounded = (bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF
    return torch.where(torch.isfinite(x), rounded.view(torch.float32), x)


@contextmanager
def _tf32_units() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False


class CarriedExecutor(Executor):
    """An :class:`Executor` whose states hold differences. :meth:`finish` returns logit changes.

    A live value that is missing from a state is clean.
    """

    def __init__(
        self, captured: Captured, precision: str, device: torch.device, tested: Executor | None = None
    ) -> None:
        super().__init__(captured)
        if tested is not None:  # the cuts were tried, and the work of every segment counted
            self._flops, self._forward_flops = tested._flops, tested._forward_flops
        self.precision = Precision(precision, device)
        self._dynamic = {*captured.nodes, *captured.inputs}
        self._operands: dict[Node, Tensor] = {}
        self._changes: dict[tuple[Node, int], Tensor] = {}
        self._attention: dict[Node, tuple[Tensor, ...]] = {}
        self._clean: dict[Node, Any] = {}
        self._batch: Any = None
        self._samples = 0

    def start(self, batch: Any) -> State:
        """Run the clean forward once per batch and keep its values."""
        state = super().start(batch)
        if batch is not self._batch:
            values, self._samples = dict(state.values), state.samples
            for node in self.captured.nodes:
                values[node] = self._evaluate(node, values, {}, state.samples)
            self._clean, self._attention, self._batch = values, {}, batch
            self.work += state.samples
        return State(-1, {}, state.samples, ({},))

    def fork(self, state: State, layer: int, variants: Sequence[Tensor]) -> State:
        self._check_at(state, layer)
        node, after = self.captured.nodes[self._starts[layer]], self._live[2 * layer + 2]
        changed = [dict.fromkeys(self.captured.sources[layer], weight) for weight in variants]
        self._count(2 * layer + 1, state.samples * state.streams * len(variants))
        results = self._perturbed(node, state.values, state, changed)
        values = {n: self._repeat(state.values[n], n, len(variants)) for n in state.values if n in after}
        values[node] = _stack(results, node.meta["val"])
        overrides = tuple({**old, **weights} for weights in changed for old in state.overrides)
        return State(2 * layer + 1, values, state.samples, overrides)

    def finish(self, state: State) -> Tensor:
        end = self.advance(state, self.num_layers)
        output = self.captured.outputs[0]
        clean = self._clean[output]
        found = end.values.get(output)
        if found is None:
            return clean.new_zeros(end.streams, *clean.shape)
        return found.float().view(end.streams, end.samples, *clean.shape[1:])

    def outputs(self, state: State) -> list[Any]:
        end = self.advance(state, self.num_layers)
        values = {n: self._whole(n, end.values, end) for n in self.captured.outputs if n in self._dynamic}
        return super().outputs(State(end.position, values, end.samples, end.overrides))

    def clean(self, state: State) -> Tensor:
        return self._clean[self.captured.outputs[0]]

    def changes(self, finished: Tensor, logits: Tensor) -> Tensor:
        return finished

    def _step(self, state: State, position: int) -> State:
        values, live = dict(state.values), self._live[position + 2]
        moved = False
        for index in range(self._bounds[position + 1], self._bounds[position + 2]):
            node = self.captured.nodes[index]
            if node not in values:
                found = self._difference(node, values, state)
                if found is not None:
                    values[node] = found
                    moved = True
            for dead in self._dying[index]:  # what is freed at once is used again: fresh memory costs page faults
                values.pop(dead, None)
        if moved:
            self._count(position + 1, state.samples * state.streams)
        return State(position + 1, {n: v for n, v in values.items() if n in live}, state.samples, state.overrides)

    def _difference(self, node: Any, values: Values, state: State) -> Any:
        """Difference of a node's output under every stream, None where nothing reached it."""
        used = {w for a in node.all_input_nodes for w in self._depends.get(a, ())}
        if used and any(used.intersection(o) for o in state.overrides):
            return self._own_weights(node, values, state)
        moving = [a for a in node.all_input_nodes if values.get(a) is not None]
        if not moving:
            return None
        if any(isinstance(values[a], _Whole) for a in moving):
            return self._recompute(node, values, state)
        rule = _RULES.get(node.target)
        found = None if rule is None else rule(self, node, values, state)
        return self._recompute(node, values, state) if found is None else found

    def _own_weights(self, node: Any, values: Values, state: State) -> Any:
        """A weight that is used again further on: every stream runs under its own."""
        parts = []
        for s, own in enumerate(state.overrides):
            mine = {a: _part(values[a], a, s, state.streams) for a in node.all_input_nodes if values.get(a) is not None}
            parts += self._perturbed(node, mine, State(state.position, mine, state.samples, ({},)), [own])
        return _stack(parts, node.meta["val"])

    def _perturbed(self, node: Any, values: Values, state: State, weights: Sequence[Overrides]) -> list[Any]:
        """Differences of a node under each of several weights, streams stacked: d·Wᵀ + (x + d)·ΔWᵀ where it is a product."""
        x: Any = node.args[0]
        w: Any = node.args[1] if len(node.args) > 1 else None
        product = _PRODUCTS.get(node.target)
        simple = isinstance(x, Node) and x in self._dynamic and isinstance(w, Node) and w not in self._dynamic
        if product is None or not simple or isinstance(values.get(x), _Whole):
            return [self._recompute(node, values, state, own) for own in weights]
        d = values.get(x)
        base = None if d is None else product(self, node, self.precision.operand(d), self._operand(w))
        entry = self._clean[x] if d is None else self._sum(d, x, state.streams)
        entry = self.precision.operand(entry)
        out = []
        for own in weights:
            moved = product(self, node, entry, self._change(w, own))
            if d is None:
                moved = self._repeat(moved, node, state.streams)
            out.append(moved if base is None else moved.add_(base))
        return out

    def _recompute(self, node: Any, values: Values, state: State, weights: Overrides | None = None) -> Any:
        """f(x + d) − f(x), in float32."""
        whole = {a: self._whole(a, values, state) for a in node.all_input_nodes if a in self._dynamic}
        result = self._evaluate(node, whole, weights or {}, state.samples * state.streams)
        return self._subtract(result, self._clean[node], node.meta["val"], state.streams)

    def _subtract(self, result: Any, clean: Any, meta: Any, streams: int) -> Any:
        if isinstance(meta, (tuple, list)):
            return tuple(self._subtract(r, c, m, streams) for r, c, m in zip(result, clean, meta, strict=True))
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return _Whole(result)
        dim = _batch_dim(meta)
        if dim is None:
            return result - clean
        result = result.unflatten(dim, (streams, -1)) - clean.unsqueeze(dim)
        return result.flatten(dim, dim + 1)

    def _whole(self, node: Node, values: Values, state: State) -> Any:
        """The stacked value x + d of a node."""
        found = values.get(node)
        if found is None:
            return self._repeat(self._clean[node], node, state.streams)
        return self._sum(found, node, state.streams)

    def _sum(self, difference: Any, node: Node, streams: int) -> Any:
        def add(d: Any, clean: Any, meta: Any) -> Any:
            if isinstance(meta, (tuple, list)):
                parts = d if isinstance(d, tuple) else (None,) * len(meta)
                return tuple(add(p, c, m) for p, c, m in zip(parts, clean, meta, strict=True))
            if isinstance(d, _Whole):
                return d.value
            if d is None:
                return _stack([clean] * streams, meta)
            dim = _batch_dim(meta)
            if dim is None:
                return d + clean
            return (d.unflatten(dim, (streams, -1)) + clean.unsqueeze(dim)).flatten(dim, dim + 1)

        return add(difference, self._clean[node], node.meta["val"])

    def _repeat(self, value: Any, node: Node, times: int) -> Any:
        if isinstance(value, _Whole):
            return _Whole(_stack([value.value] * times, node.meta["val"]))
        if isinstance(value, tuple):
            return tuple(
                None
                if v is None
                else _Whole(_stack([v.value] * times, m))
                if isinstance(v, _Whole)
                else _stack([v] * times, m)
                for v, m in zip(value, node.meta["val"], strict=True)
            )
        return _stack([value] * times, node.meta["val"])

    def _on_differences(self, node: Any, values: Values, state: State) -> Any:
        """Apply a linear op to the differences of its arguments, zero where there is none."""

        def value(argument: Node) -> Any:
            if argument in self._dynamic:
                found = values.get(argument)
                if found is None:
                    return torch.zeros_like(self._repeat(self._clean[argument], argument, state.streams))
                return found
            if is_size(argument):
                return self._size(argument, state.samples * state.streams)
            return self.captured.constants[argument]

        return evaluate(node, value)

    def _operand(self, weight: Node) -> Tensor:
        if weight not in self._operands:
            self._operands[weight] = self.precision.operand(self.captured.constants[weight])
        return self._operands[weight]

    def _change(self, weight: Node, own: Overrides) -> Tensor:
        """Δ of a weight, ready for a product; kept, since every chunk and pair needs it again."""
        variant = self._constant(weight, own)
        key = (weight, variant.data_ptr())
        if key not in self._changes:
            self._changes[key] = self.precision.operand(variant - self.captured.constants[weight])
        return self._changes[key]


def _part(value: Any, node: Node, stream: int, streams: int) -> Any:
    def part(v: Any, meta: Any) -> Any:
        if v is None:
            return None
        return (
            _Whole(_slice(v.value, meta, stream, streams))
            if isinstance(v, _Whole)
            else _slice(v, meta, stream, streams)
        )

    meta = node.meta["val"]
    return (
        tuple(part(v, m) for v, m in zip(value, meta, strict=True)) if isinstance(value, tuple) else part(value, meta)
    )


def _linear_product(executor: CarriedExecutor, node: Any, x: Tensor, w: Tensor) -> Tensor:
    with executor.precision.product():
        return torch.nn.functional.linear(x, w)


def _conv_product(executor: CarriedExecutor, node: Any, x: Tensor, w: Tensor) -> Tensor:
    rest = {name: value for name, value in node.kwargs.items() if name not in ("input", "weight", "bias")}
    with executor.precision.product():
        return node.target(x, w, None, *node.args[3:], **rest)


def _matmul(executor: CarriedExecutor, a: Tensor, b: Tensor) -> Tensor:
    with executor.precision.product():
        return torch.matmul(executor.precision.operand(a), executor.precision.operand(b))


_PRODUCTS: dict[Any, Callable[[CarriedExecutor, Node, Tensor, Tensor], Tensor]] = {
    aten.linear.default: _linear_product,
    **dict.fromkeys(_CONVOLUTIONS, _conv_product),
}


def _weighted(executor: CarriedExecutor, node: Any, values: Values, state: State) -> Any:
    """Linear and convolution under the clean weight: d·Wᵀ."""
    x, w = node.args[0], node.args[1]
    if values.get(x) is None or w in executor._dynamic or (len(node.args) > 2 and node.args[2] in executor._dynamic):
        return None
    return _PRODUCTS[node.target](executor, node, executor.precision.operand(values[x]), executor._operand(w))


def _product(executor: CarriedExecutor, node: Any, values: Values, state: State) -> Any:
    """matmul and bmm: da·(b + db) + a·db."""
    a, b = node.args[0], node.args[1]
    if a not in executor._dynamic or b not in executor._dynamic:
        one = a if a in executor._dynamic else b
        other = executor.captured.constants.get(b if one is a else a)
        if not isinstance(other, Tensor):
            return None
        return _matmul(executor, values[a], other) if one is a else _matmul(executor, other, values[b])
    da, db = values.get(a), values.get(b)
    first = None if da is None else _matmul(executor, da, executor._whole(b, values, state))
    if db is None:
        return first
    second = _matmul(executor, executor._repeat(executor._clean[a], a, state.streams), db)
    return second if first is None else second.add_(first)


def _mul(executor: CarriedExecutor, node: Any, values: Values, state: State) -> Any:
    """Elementwise product: da·(b + db) + a·db."""
    a, b = node.args[0], node.args[1]
    if a not in executor._dynamic or b not in executor._dynamic:
        return executor._on_differences(node, values, state)
    da, db = values.get(a), values.get(b)
    first = None if da is None else da * executor._whole(b, values, state)
    if db is None:
        return first
    second = executor._repeat(executor._clean[a], a, state.streams) * db
    return second if first is None else second + first


def _div(executor: CarriedExecutor, node: Any, values: Values, state: State) -> Any:
    """Division by what no perturbation reaches."""
    a, b = node.args[0], node.args[1]
    if (
        len(node.args) > 2
        or node.kwargs
        or values.get(a) is None
        or (isinstance(b, Node) and values.get(b) is not None)
    ):
        return None
    if b in executor._dynamic:
        return values[a] / executor._whole(b, values, state)
    return executor._on_differences(node, values, state)


def _add(executor: CarriedExecutor, node: Any, values: Values, state: State) -> Any:
    """Sum and difference of two values, or of a value and a constant."""
    a, b = (argument if isinstance(argument, Node) else None for argument in node.args[:2])
    da, db = values.get(a) if a else None, values.get(b) if b else None
    alpha = node.kwargs.get("alpha", 1)
    sign = -alpha if node.target == aten.sub.Tensor else alpha
    if da is not None and db is not None:
        fused = _add_and_norm(executor, node, da.float(), db, values) if sign == 1 else None
        return torch.add(da.float(), db.float(), alpha=sign) if fused is None else fused
    out = da if db is None else db if sign == 1 else db * sign
    assert out is not None
    dim = _batch_dim(node.meta["val"])
    shape = [size * state.streams if d == dim else size for d, size in enumerate(executor._clean[node].shape)]
    return out if list(out.shape) == shape else out.expand(shape).contiguous()


def _add_and_norm(
    executor: CarriedExecutor, node: Any, residual: Tensor, branch: Tensor, values: Values
) -> Tensor | None:
    """Sum of two differences together with the layer norm that reads it; the norm's value waits in ``values``."""
    norms = [user for user in node.users if user.target == aten.layer_norm.default and user.args[0] is node]
    norms = [norm for norm in norms if not any(executor._depends.get(a) for a in norm.all_input_nodes)]
    given = _norm_arguments(executor, norms[0]) if norms and residual.shape == branch.shape else None
    if given is None:
        return None
    total, values[norms[0]] = clado_ext.carried_add_layer_norm(
        executor._clean[node], residual, branch, *given, executor.precision.half
    )
    return total


def _linear_op(executor: CarriedExecutor, node: Any, values: Values, state: State) -> Any:
    if any(isinstance(values.get(a), tuple) and node.target is not operator.getitem for a in node.all_input_nodes):
        return None
    if node.target is operator.getitem:
        return values[node.args[0]][node.args[1]]
    return executor._on_differences(node, values, state)


def _pad(executor: CarriedExecutor, node: Any, values: Values, state: State) -> Any:
    """Padding with a constant leaves zeros in the difference."""
    mode = node.args[2] if len(node.args) > 2 and node.target == aten.pad.default else "constant"
    if mode != "constant":
        return executor._on_differences(node, values, state)
    return torch.nn.functional.pad(values[node.args[0]], list(node.args[1]))


def _batch_norm(executor: CarriedExecutor, node: Any, values: Values, state: State) -> Any:
    """Batch norm with running statistics scales the difference."""
    x, weight, _, _, variance = node.args[:5]
    d = values.get(x)
    if d is None or any(isinstance(a, Node) and a in executor._dynamic for a in node.args[1:5]):
        return None
    eps = node.args[6] if node.target == aten._native_batch_norm_legit_no_training.default else node.args[7]
    if node.target == aten.batch_norm.default and node.args[5]:
        return None
    scale = torch.rsqrt(executor.captured.constants[variance] + eps)
    scale = scale if weight is None else scale * executor.captured.constants[weight]
    out = d * scale.view(-1, *[1] * (d.dim() - 2))
    return (out, None, None) if isinstance(node.meta["val"], (tuple, list)) else out


def _attend(executor: CarriedExecutor, node: Any, values: Values, state: State) -> Any:
    """softmax(s)·v with s = q·kᵀ: ds = dq·(k + dk)ᵀ + q·dkᵀ, then P'·dv + (P' − P)·v."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    q, k, v = (given[name] for name in names[:3])
    mask = given.get("attn_mask")
    heads = [n.meta["val"] for n in (q, k, v)]
    plain = all(m.dim() == 4 and _batch_dim(m) == 0 for m in heads) and not given.get("enable_gqa")
    if (
        not plain
        or given.get("dropout_p")
        or given.get("is_causal")
        or (isinstance(mask, Node) and mask in executor._dynamic)
    ):
        return None
    scale, streams = given.get("scale") or heads[0].shape[-1] ** -0.5, state.streams
    operand, half = executor.precision.operand, executor.precision.half
    if node not in executor._attention:
        clean = [executor._clean[n] for n in (q, k, v)]
        scores = clean[0] @ clean[1].transpose(-1, -2) * scale
        if mask is not None:
            bias = executor.captured.constants[mask]
            scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
        executor._attention[node] = (scores, scores.softmax(-1), *(operand(x).contiguous() for x in clean))
    scores, probabilities, cq, ck, cv = executor._attention[node]
    dq, dk, dv = (None if d is None else operand(d).unflatten(0, (streams, -1)) for d in map(values.get, (q, k, v)))

    def pair(first: Tensor | None, second: Tensor | None, dim: int) -> Tensor:
        """Both along a dimension, streams outermost; clean ones serve every stream."""
        parts = [x if x.dim() == 5 else x.expand(streams, *x.shape) for x in (first, second) if x is not None]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim)).flatten(0, 1)

    with executor.precision.product():
        if dq is None and dk is None:
            return torch.matmul(operand(pair(probabilities, None, 0)), pair(dv, None, 0))
        one = pair(dq, None if dk is None else cq, -1)
        other = pair(None if dq is None else operand(ck if dk is None else dk + ck), dk, -1)
        moved = torch.matmul(one, other.transpose(-1, -2))
        both = operand(clado_ext.carried_softmax(scores, probabilities, moved, scale, half))
        change = both[..., : scores.shape[-1]] if dv is None else both
        return torch.matmul(change, pair(cv, dv, -2))


def _gelu(executor: CarriedExecutor, node: Any, values: Values, state: State) -> Any:
    x = node.args[0]
    if len(node.args) > 1 or node.kwargs.get("approximate", "none") != "none" or _batch_dim(x.meta["val"]) != 0:
        return None
    return clado_ext.carried_gelu(executor._clean[x], values[x], executor.precision.half)


def _layer_norm(executor: CarriedExecutor, node: Any, values: Values, state: State) -> Any:
    x, given = node.args[0], _norm_arguments(executor, node)
    if given is None:
        return None
    return clado_ext.carried_layer_norm(executor._clean[x], values[x], *given, executor.precision.half)


def _norm_arguments(executor: CarriedExecutor, node: Any) -> tuple[Tensor | None, float] | None:
    """(weight, eps) of a layer norm over the last dimension; None: any other."""
    x, shape, weight, bias, eps = (*node.args[:5], *(None, None, 1e-5)[len(node.args) - 2 :])[:5]
    dynamic = any(isinstance(a, Node) and a in executor._dynamic for a in (weight, bias))
    if len(shape) != 1 or dynamic or node.kwargs or _batch_dim(x.meta["val"]) != 0:
        return None
    return None if weight is None else executor.captured.constants[weight], eps


Rule = Callable[[CarriedExecutor, Any, Values, State], Any]
_RULES: dict[Any, Rule] = {
    **dict.fromkeys(_LINEAR, _linear_op),
    **dict.fromkeys(_PRODUCTS, _weighted),
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
