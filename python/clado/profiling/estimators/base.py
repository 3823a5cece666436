"""What estimators are made of: what one is, the single perturbations that all of them measure, and what these cost.

An estimator's function returns :class:`Sums` over the chunk's samples, so chunks add up in a fixed order and carry their own
error bars. Candidates are layer-major, bits ascending; a candidate's change is δ_v = outputs(w + Δ_v) − z, in the form
that the loss takes. Where ranks
share a chunk, every entry is measured on one of them and is zero on the others. The sums stay on the device: a host that asked
for them in between would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...graph import Runner, Variants
from ...quant import Variant
from ..losses import Loss
from ..share import Share, longest
from ..sums import Sums

Tick = Callable[[], None]
Later = Sequence[Sequence[int]]
ALONE = Share()


@dataclass(frozen=True)
class Passes:
    """What the passes of a run cost, in forward-equivalents per sample.

    Attributes:
        whole, suffix: the share of the model's own forward that a clean pass takes, and what of it lies behind each layer's cut.
        counts: candidates of each layer.
        members: ranks that share a chunk; work is that of the one that has most to do.
        later: for every layer the layers behind it that it is paired with; None: all of them.
        slopes: what derivatives by the weights take beyond a product each (:meth:`~clado.graph.Runner.slope_share`).
        held: candidates whose changes are there at once; None: all.
    """

    whole: float
    suffix: Sequence[float]
    counts: Sequence[int]
    members: int = 1
    later: Later | None = None
    slopes: Callable[[], Sequence[float]] | None = None
    held: int | None = None

    def longest(self, costs: Sequence[float]) -> float:
        """Of the rank that has most to do, of so much by layer."""
        return longest(costs, self.members)


class Measure(Protocol):
    """Sums over samples that advance together."""

    def __call__(
        self,
        runner: Runner,
        variants: Variants,
        batch: Any,
        loss: Loss,
        tick: Tick,
        share: Share = ...,
        later: Any = ...,
    ) -> Sums: ...


@dataclass(frozen=True)
class Estimator:
    """One way to the matrix.

    Attributes:
        run: measures samples that advance together; only ``run`` of one with ``pairs`` looks at ``later``.
        work: forward-equivalents per sample.
        pairs: whether every pair has a forward of its own: their stacks decide how much memory a chunk takes.
        grouped: whether the outputs of a few candidates at a time serve it, where memory holds no more.
        closed: whether it has the interactions of additive changes, by formula or by the loss alone.
        carries: whether it runs with differences carried in a low precision.
        residual: whether it keeps what the exact value adds to the closed form, and so may be paid for on a part of the samples.
        otherwise: what measures the samples that do not pay for it.
        probed_by: whose errors tell how it bears a low precision; None: its own.
    """

    run: Measure
    work: Callable[[Passes], float]
    pairs: bool = False
    grouped: bool = False
    closed: bool = False
    carries: bool = True
    residual: bool = False
    otherwise: str | None = None
    probed_by: str | None = None


def blocks(variants: Variants) -> list[slice]:
    """The candidates of each layer."""
    ends = accumulate((len(own) for own in variants), initial=0)
    return [slice(first, last) for first, last in pairwise(ends)]


@dataclass(frozen=True)
class Singles:
    """What single perturbations of some layers did.

    Attributes:
        rows: the candidates that they are.
        increase: loss increase ``[V, N]`` of them.
        z, delta: the clean output and its changes with the candidates in front, in the loss's form; no changes where they are
            not kept.
    """

    rows: slice
    increase: Tensor
    z: Any
    delta: Any


def singles(
    runner: Runner,
    variants: Variants,
    batch: Any,
    loss: Loss,
    tick: Tick,
    share: Share = ALONE,
    layers: range | None = None,
    z: Any = None,
    keep: bool = True,
) -> Singles:
    """One clean pass whose prefixes all candidates share.

    Args:
        layers: those that are perturbed, one behind the other; None: all.
        z: the clean output in the loss's form, where it is known; else the pass goes on to the end.
        keep: whether the changes are handed out, on every member of the share.
    """
    state, outputs = runner.start(batch), None
    layers = range(runner.num_layers) if layers is None else layers
    places, counts = blocks(variants), [len(variants[k]) for k in layers]
    own = share.own(len(layers), lambda: single_work(runner.suffix_share[layers.start : layers.stop], counts))
    rows = slice(places[layers[0]].start, places[layers[-1]].stop)
    mine = [v - rows.start for place in own for v in range(rows.stop)[places[layers[place]]]]
    done = 0
    for k in (layers[place] for place in own):
        state = runner.advance(state, k)
        for part in stacks(runner, variants[k]):
            found = loss.taken(runner.finish(runner.fork(state, k, part)), 1)
            outputs = placed(outputs, found, done, len(part), len(mine))
            done += len(part)
        tick()
    if z is None:
        z = loss.taken(runner.clean(state))
    delta = nothing_of(z) if outputs is None else runner.changes(outputs, z)
    increase = share.gathered(increases(loss, z, delta), mine, sum(counts))
    if keep:
        delta = pytree.tree_map(lambda changes: share.gathered(changes, mine, sum(counts)), delta)
    return Singles(rows, increase, z, delta if keep else None)


def placed(whole: Any, part: Any, first: int, count: int, total: int) -> Any:
    """A nest ``[total, …]`` with another, ``[count, …]``, in the rows from ``first`` on; what is no tensor stays as it was."""
    if count == total:
        return part
    if whole is None:
        whole = pytree.tree_map(lambda x: x.new_empty(total, *x.shape[1:]) if isinstance(x, Tensor) else x, part)
    for mine, new in zip(pytree.tree_leaves(whole), pytree.tree_leaves(part), strict=True):
        if isinstance(mine, Tensor):
            mine[first : first + count] = new
    return whole


def increases(loss: Loss, z: Any, delta: Any) -> Tensor:
    """Loss increase ``[V, N]``, of few candidates at a time where outputs are large: losses make float64 of them."""
    leaves = [leaf for leaf in pytree.tree_leaves(delta) if isinstance(leaf, Tensor)]
    count, size = len(leaves[0]), sum(leaf.nbytes for leaf in leaves)
    step = max(1, count * _INCREASE_BYTES // max(1, size))
    if step >= count:
        return loss.increase(z, delta)
    parts = (pytree.tree_map(partial(rows_of, slice(a, a + step)), delta) for a in range(0, count, step))
    return torch.cat([loss.increase(z, part) for part in parts])


_INCREASE_BYTES = 64 << 20


def rows_of(rows: slice, leaf: Any) -> Any:
    return leaf[rows] if isinstance(leaf, Tensor) else leaf


def joined(parts: Sequence[Any]) -> Any:
    """Nests ``[S, …]`` one behind the other."""
    if len(parts) == 1:
        return parts[0]
    return pytree.tree_map(lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *parts)


def nothing_of(z: Any) -> Any:
    """Changes of no perturbation."""
    return pytree.tree_map(lambda leaf: leaf.new_zeros(0, *leaf.shape), z)


def groups(counts: Sequence[int], held: int | None) -> list[range]:
    """Layers one behind the other, in as many groups as it takes for none to have more than ``held`` candidates, where it has
    more than one layer; None: one group."""
    found: list[range] = []
    count = 0
    for k, own in enumerate(counts):
        count += own
        if found and (held is None or count <= held):
            found[-1] = range(found[-1].start, k + 1)
        else:
            found.append(range(k, k + 1))
            count = own
    return found


def stacks(runner: Runner, variants: Sequence[Variant]) -> Iterator[Sequence[Variant]]:
    """As many variants of a layer at a time as the runner may stack."""
    size = runner.stack or len(variants)
    return (variants[k : k + size] for k in range(0, len(variants), size))


def single_sums(increase: Tensor, share: Share = ALONE) -> Sums:
    sums = Sums.zeros(increase.shape[0], increase.device)
    sums.samples = increase.shape[1]
    if share.leads:
        sums.loss, sums.loss_squared = increase.sum(-1), increase.square().sum(-1)
    return sums


def single_work(suffix: Sequence[float], counts: Sequence[int]) -> list[float]:
    """Forward-equivalents of each layer's perturbations."""
    return [count * share for count, share in zip(counts, suffix, strict=True)]


def work_of_singles(passes: Passes) -> float:
    """One clean pass, and every perturbation from its layer on."""
    return passes.whole + passes.longest(single_work(passes.suffix, passes.counts))
