"""What a loss is: of some samples, a function of the model's output and of its changes.

A loss sees the output in a form of its own, which :meth:`Loss.taken` makes of it (rows of classes, one row of values for each
sample); ``z`` is the clean output in that form, ``delta`` a change of it with the perturbations in front. Everything that is
returned is float64, one number for each sample. An interaction is Ω_vw = ℓ(z+δ_v+δ_w) − ℓ(z+δ_v) − ℓ(z+δ_w) + ℓ(z): what two
perturbations cost beyond each alone where their changes add.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

L = TypeVar("L", bound="Loss")


class Loss:
    """The loss of a batch; a frozen dataclass derives from it.

    A loss gives :meth:`increase`, and of :meth:`pairs` and :meth:`interactions` one at least: each is made of the other.

    """

    @property
    def rests(self) -> bool:
        """Whether it has no slope at the float model's own output, as a distance from it has none."""
        return False

    def taken(self, output: Any, lead: int = 0) -> Any:
        """The model's output, or changes of it with ``lead`` dimensions in front, in the form that all else takes."""
        return output

    def increase(self, z: Any, delta: Any) -> Tensor:
        """Loss increase ``[S, N]``."""
        raise NotImplementedError

    def interactions(self, z: Any, first: Any, second: Any) -> Tensor:
        """Interactions ``[A, B, N]`` of changes ``[A, …]`` with others ``[B, …]``."""
        count = samples_of(z)
        ones = [
            self.part(n, n + 1).pairs(*(_samples(x, n, k) for x, k in ((z, 0), (first, 1), (second, 1))))[0]
            for n in range(count)
        ]
        return torch.stack(ones, -1)

    def pairs(self, z: Any, delta: Any, other: Any = None) -> tuple[Tensor, Tensor]:
        """(Σ_n a, Σ_n a²) of the interactions ``[V, V]`` of changes with one another, or ``[V, W]`` with those of ``other``."""
        total: Tensor | None = None
        squares: Tensor | None = None
        for n in range(samples_of(z)):
            mine = _samples(delta, n, 1)
            theirs = mine if other is None else _samples(other, n, 1)
            a = self.part(n, n + 1).interactions(_samples(z, n, 0), mine, theirs)[..., 0]
            total = a.clone() if total is None else total.add_(a)
            squares = a.square() if squares is None else squares.add_(a.square())
        assert total is not None
        assert squares is not None
        return total, squares

    def pair(self, z: Any, first: Any, second: Any, joint: Any) -> tuple[Tensor, Tensor]:
        """Interactions of two layers' candidates, split so that as little cancels as the loss allows (docs/numerics.md).

        Args:
            z: clean.
            first, second: changes ``[A, …]`` and ``[B, …]`` of the two layers' candidates alone.
            joint: ``[A, B, …]`` of both together.

        Returns:
            (as if changes added, what the true joint change adds to that), float64 ``[A, B, N]``; their sum is Ω.
        """
        closed = self.interactions(z, first, second)
        flat = pytree.tree_map(lambda x: x.flatten(0, 1) if isinstance(x, Tensor) else x, joint)
        whole = self.increase(z, flat).view(closed.shape)
        alone = self.increase(z, first)[:, None] + self.increase(z, second)[None]
        return closed, whole - alone - closed

    def gradient(self, z: Any, delta: Any) -> Any:
        """Derivative of the losses by the changed output, in the form of ``delta``."""
        with torch.enable_grad():
            leaves = pytree.tree_map(lambda x: x.detach().requires_grad_() if changes(x) else x, delta)
            found = [x for x in pytree.tree_leaves(leaves) if changes(x)]
            slopes = iter(torch.autograd.grad(self.increase(z, leaves).sum(), found, allow_unused=True))

        def slope(x: Any) -> Any:
            if not changes(x):
                return x
            own = next(slopes)
            return torch.zeros_like(x) if own is None else own

        return pytree.tree_map(slope, delta)

    def anchored(self, output: Any) -> Loss:
        """The same loss, where it compares with the float model's output, with that output fixed."""
        return self

    def reference(self, output: Any) -> Any:
        """What :meth:`increase_over` keeps of the float model's output: the output in the loss's form, float64 on the CPU."""
        return pytree.tree_map(_kept, self.taken(output))

    def increase_over(self, reference: Any, output: Any) -> Tensor:
        """Loss increase ``[N]`` float64, on the CPU, of another output."""

        def change(now: Any, before: Any) -> Any:
            if not isinstance(now, Tensor):
                return now
            return (now.double() - before)[None] if changes(now) else now[None]

        now = self.taken(output)
        known = pytree.tree_map(lambda a, b: b.to(a.device) if isinstance(a, Tensor) else b, now, reference)
        return self.increase(known, pytree.tree_map(change, now, known))[0].cpu()

    def value(self, output: Any) -> Tensor:
        """The loss ``[N]`` itself, float64."""
        raise NotImplementedError

    def part(self: L, first: int, last: int) -> L:
        """The loss of samples first..last."""
        return self._each(lambda t: t[first:last])

    def moved(self: L, device: torch.device) -> L:
        """The same loss on a device."""
        return self._each(lambda t: t.to(device, non_blocking=device.type == "cuda"))

    def _each(self: L, change: Any) -> L:
        """With every tensor ``[N, …]`` that it holds changed."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **{k: change(v) for k, v in held.items() if isinstance(v, Tensor)})  # type: ignore[type-var]


def changes(leaf: Any) -> bool:
    """Whether a leaf of an output has a difference."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def averaged(sums: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Σ a and Σ a² of means over so many rows, from those of sums over them."""
    return (sums[0] / count, sums[1] / count**2) if count > 1 else sums


def samples_of(z: Any) -> int:
    return next(len(leaf) for leaf in pytree.tree_leaves(z) if isinstance(leaf, Tensor) and leaf.dim() > 0)


def _samples(nest: Any, n: int, dim: int) -> Any:
    """One sample of a nest."""
    return pytree.tree_map(lambda x: x.narrow(dim, n, 1) if isinstance(x, Tensor) and x.dim() > dim else x, nest)


def _kept(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return (leaf.double() if leaf.is_floating_point() else leaf).cpu()
