"""Losses of the user's own: a function of output and batch, or an object that knows increases and interactions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...common import CladoError, is_out_of_memory, require, said
from .base import Loss, changes

LossFunc = Callable[[Any, Any], Tensor]
_BYTES = 64 << 20  # of the outputs that are stacked for one call, and of float64 products


class _OfBatch(Loss):
    """A loss that is given the loader's batch as it is."""

    batch: Any
    samples: int

    def part(self: B, first: int, last: int) -> B:
        cut = self._rows(self.batch, first, last)
        return replace(self, batch=cut, samples=last - first)  # type: ignore[type-var]

    def moved(self: B, device: torch.device) -> B:
        return self

    def _rows(self, nest: Any, first: int, last: int) -> Any:
        return pytree.tree_map(lambda leaf: leaf[first:last] if self._has_rows(leaf) else leaf, nest)

    def _has_rows(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == self.samples


B = TypeVar("B", bound=_OfBatch)


@dataclass(frozen=True)
class UserLoss(_OfBatch):
    """``loss_func(output, batch)``: losses ``[N]``, or a mean over the batch, which is then asked sample by sample.

    Interactions are those of the function itself on outputs that are added up, or by Gauss–Newton: δ_vᵀ ∇²ℓ δ_w, from
    Hessian-vector products of the function alone.

    Attributes:
        function: twice differentiable in the output for Gauss–Newton, once for the gradient estimator.
        batch: the chunk's batch.
        samples: N.
        op: what is said to need the loss.
        wide: whether the function is given float64.
        mean: whether it returns the batch's mean.
        hessian: whether interactions are by Gauss–Newton.
    """

    function: LossFunc
    batch: Any
    samples: int
    op: str = "profile"
    wide: bool = False
    mean: bool = False
    hessian: bool = False

    def losses(self, output: Any) -> Tensor:
        """Loss ``[N]`` of every sample."""
        output, batch = self._given(output), self._given(self.batch)
        if self.mean:
            rows = [self._call(self._one(output, n), self._one(batch, n)) for n in range(self.samples)]
            value = torch.stack([self._scalar(row) for row in rows])
        else:
            value = self._call(output, batch)
        require(
            isinstance(value, Tensor) and value.shape == (self.samples,),
            self.op,
            "loss_func",
            f"return a loss per sample [{self.samples}] or their mean",
            tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__,
        )
        found: Tensor = value
        return found

    def returns_mean(self, output: Any) -> bool:
        """Whether the function returns one value for the batch."""
        value = self._call(self._given(output), self._given(self.batch))
        return isinstance(value, Tensor) and value.dim() == 0

    def curved(self, output: Any) -> bool:
        """Whether Gauss–Newton serves: second differences along one direction are what the Hessian says, to a half."""
        draw = torch.Generator().manual_seed(0)

        def step(leaf: Any) -> Any:
            if not changes(leaf):
                return leaf
            noise = torch.randn(leaf.shape, generator=draw, dtype=torch.float64).to(leaf.device, leaf.dtype)
            spread = leaf.std(unbiased=False)
            return (0.1 * torch.where(spread > 0, spread, 1.0) * noise)[None]

        change = pytree.tree_map(step, output)
        try:
            wanted = replace(self, hessian=False).interactions(output, change, change).sum()
            found = replace(self, hessian=True).interactions(output, change, change).sum()
        except RuntimeError as error:  # what has no second derivative
            if is_out_of_memory(error):
                raise
            return False
        return bool((found - wanted).abs() <= 0.5 * wanted.abs()) and bool(found != 0)

    def value(self, output: Any) -> Tensor:
        return self.losses(output).double()

    def reference(self, output: Any) -> Any:
        """What :meth:`increase_over` keeps of the float model's output: its losses, float64 on the CPU."""
        return self.losses(output).double().cpu()

    def increase_over(self, reference: Any, output: Any) -> Tensor:
        found: Tensor = self.reference(output) - reference
        return found

    def increase(self, z: Any, delta: Any) -> Tensor:
        base = self.losses(z).double()
        return torch.stack([self.losses(self._moved(z, one)).double() - base for one in _streams(delta)])

    def interactions(self, z: Any, first: Any, second: Any) -> Tensor:
        return torch.cat(list(self._by_rows(z, first, second)))

    def pairs(self, z: Any, delta: Any, other: Any = None) -> tuple[Tensor, Tensor]:
        """Without ``other`` the lower triangle mirrors the upper one."""
        rows = [(a.sum(-1), a.square().sum(-1)) for a in self._by_rows(z, delta, other)]
        total, squares = (torch.cat(column) for column in zip(*rows, strict=True))
        if other is None:
            total, squares = (x.triu() + x.triu(1).T for x in (total, squares))
        return total, squares

    def _by_rows(self, z: Any, first: Any, second: Any) -> Iterator[Tensor]:
        """Some rows ``[a, B, N]`` after the other of the interactions; without ``second`` of the upper triangle alone."""
        others = first if second is None else second
        if self.hessian:
            theirs = self._flat(others)
            step = max(1, _BYTES // max(1, 8 * theirs[0].numel()))
            for begin in range(0, _count(first), step):
                products = self._products(z, _cut(first, begin, begin + step))
                ours = [products[:, n] @ theirs[:, n].double().T for n in range(self.samples)]
                yield torch.stack(ours, -1)
            return
        base, alone = self.losses(z).double(), self.increase(z, others)
        for k, one in enumerate(_streams(first)):
            moved, behind = self._moved(z, one), k if second is None else 0
            mine = self.losses(moved).double() - base
            row = self._stacked(moved, _cut(others, behind, None)) - base - mine - alone[behind:]
            yield torch.cat([row.new_zeros(behind, self.samples), row])[None]

    def _stacked(self, z: Any, delta: Any) -> Tensor:
        """Losses ``[B, N]`` at z + δ, as many in one call as memory allows, where the function takes any number of samples."""
        ones = list(_streams(delta))
        if self.mean:
            return torch.stack([self.losses(self._moved(z, one)).double() for one in ones])
        size = sum(leaf.nbytes for leaf in pytree.tree_leaves(z) if changes(leaf))
        step = max(1, _BYTES // max(1, 2 * size))
        found = []
        for begin in range(0, len(ones), step):
            some = [self._moved(z, one) for one in ones[begin : begin + step]]
            output, batch = (pytree.tree_map(self._joined, *nests) for nests in (some, [self.batch] * len(some)))
            wider = replace(self, batch=batch, samples=self.samples * len(some))
            found.append(wider.losses(output).double().view(len(some), self.samples))
        return torch.cat(found)

    def _joined(self, *leaves: Any) -> Any:
        return torch.cat(list(leaves)) if self._has_rows(leaves[0]) else leaves[0]

    def _moved(self, z: Any, change: Any) -> Any:
        """z + δ; whole numbers as the perturbation left them."""
        z, change = self._given(z), self._given(change)
        return pytree.tree_map(lambda a, d: a + d if changes(a) else d, z, change)

    def _products(self, z: Any, delta: Any) -> Tensor:
        """∇²ℓ δ, float64 ``[S, N, M]`` over the values of all outputs."""
        with torch.enable_grad():
            point = pytree.tree_map(lambda x: x.detach().double().requires_grad_() if changes(x) else x, z)
            leaves = [x for x in pytree.tree_leaves(point) if changes(x)]
            slopes = torch.autograd.grad(
                self.losses(point).sum(), leaves, create_graph=True, allow_unused=True, materialize_grads=True
            )
            # what is linear has a slope that depends on nothing
            curved = [k for k, slope in enumerate(slopes) if slope.requires_grad]
            found = []
            for one in _streams(delta):
                directions = [x for x in pytree.tree_leaves(one) if changes(x)]
                product = (
                    torch.autograd.grad(
                        [slopes[k] for k in curved],
                        leaves,
                        [directions[k].to(slopes[k].dtype) for k in curved],
                        retain_graph=True,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                    if curved
                    else [torch.zeros_like(leaf) for leaf in leaves]
                )
                found.append(self._row(product))
        return torch.stack(found).detach()

    def _flat(self, delta: Any) -> Tensor:
        """``[S, N, M]`` of changes."""
        return torch.stack([self._row([x for x in pytree.tree_leaves(one) if changes(x)]) for one in _streams(delta)])

    def _row(self, leaves: Any) -> Tensor:
        return torch.cat([leaf.reshape(self.samples, -1) for leaf in leaves if self._has_rows(leaf)], 1)

    def _given(self, nest: Any) -> Any:
        if not self.wide:
            return nest
        return pytree.tree_map(lambda leaf: leaf.double() if changes(leaf) else leaf, nest)

    def _call(self, output: Any, batch: Any) -> Any:
        try:
            return self.function(output, batch)
        except Exception as error:  # whatever the user's code raises
            if is_out_of_memory(error):
                raise
            raise CladoError(f"{self.op}: loss_func must take (output, batch), got {said(error)}") from error

    def _scalar(self, value: Any) -> Tensor:
        one = isinstance(value, Tensor) and value.numel() == 1
        shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        require(one, self.op, "loss_func", "return one number for one sample", shown)
        found: Tensor = value.reshape(())
        return found

    def _one(self, nest: Any, n: int) -> Any:
        return self._rows(nest, n, n + 1)


class ElementCounter(TorchDispatchMode):
    """Counts the values that operators write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements += sum(leaf.numel() for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor))
        return out


@dataclass(frozen=True)
class OwnLoss(_OfBatch):
    """An object of the user's: ``increase(z, delta)`` gives ``[S, N]``, ``pairs(z, delta)`` the sums over samples of
    interactions and of their squares, ``[S, S]`` each.

    Attributes:
        make: gives the object, from the batch where it takes one.
        batch: the chunk's batch.
        samples: N.
        op: what is said to need the loss.
    """

    make: Callable[[Any], Any]
    batch: Any
    samples: int
    op: str = "profile"

    def increase(self, z: Any, delta: Any) -> Tensor:
        found = self.make(self.batch).increase(z, delta)
        self._check("increase", found, (_count(delta), self.samples))
        return found.double()  # type: ignore[no-any-return]

    def pairs(self, z: Any, delta: Any, other: Any = None) -> tuple[Tensor, Tensor]:
        count = _count(delta)
        both = delta if other is None else pytree.tree_map(_behind, delta, other)
        total, squares = self.make(self.batch).pairs(z, both)
        size = count if other is None else count + _count(other)
        for found in (total, squares):
            self._check("pairs", found, (size, size))
        columns = slice(None) if other is None else slice(count, None)
        return total[:count, columns].double(), squares[:count, columns].double()

    def value(self, output: Any) -> Tensor:
        raise CladoError(f"{self.op}: loss must know losses of its own here, got an object that knows increases alone")

    def _check(self, method: str, found: Any, shape: tuple[int, ...]) -> None:
        good = isinstance(found, Tensor) and found.shape == shape
        shown = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        require(good, self.op, "loss", f"return {list(shape)} from {method}(z, delta)", shown)


def _streams(delta: Any) -> Iterator[Any]:
    """Every perturbation's changes."""
    leaves, structure = pytree.tree_flatten(delta)
    for s in range(_count(delta)):
        yield pytree.tree_unflatten([leaf[s] if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


def _count(delta: Any) -> int:
    """How many perturbations there are."""
    return next((len(leaf) for leaf in pytree.tree_leaves(delta) if isinstance(leaf, Tensor)), 0)


def _cut(delta: Any, first: int, last: int | None) -> Any:
    return pytree.tree_map(lambda leaf: leaf[first:last] if isinstance(leaf, Tensor) else leaf, delta)


def _behind(one: Any, other: Any) -> Any:
    return torch.cat([one, other]) if isinstance(one, Tensor) else one
