"""Losses of single values: squared error, its smooth absolute kin, and the binary cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

import clado_ext

from .base import Loss, averaged
from .place import Place

V = TypeVar("V", bound="Values")


@dataclass(frozen=True)
class Values(Loss):
    """A loss of values ``[N, M]``, averaged over those of a sample.

    Attributes:
        target: float64 ``[N, M]``; None: the float model's own output.
        chosen: int64 ``[N, P]``, the values that are looked at; None: all.
        weight: float64 ``[N, M]``; None: all alike.
    """

    target: Tensor | None = None
    chosen: Tensor | None = None
    weight: Tensor | None = None

    @property
    def rests(self) -> bool:
        return self.target is None

    @classmethod
    def against_outputs(cls: type[V], place: Place, targets: Any) -> V:
        return cls(chosen=place.chosen)

    @classmethod
    def against_targets(cls: type[V], place: Place, targets: Tensor) -> V:
        return cls(place.of_positions(targets.reshape(len(targets), -1)).double(), place.chosen)

    def taken(self, output: Tensor, lead: int = 0) -> Tensor:
        values = output.flatten(lead + 1) if output.dim() > lead + 1 else output.unsqueeze(-1)
        return values if self.chosen is None else values.take_along_dim(self.chosen[(None,) * lead], -1)

    def anchored(self, output: Any) -> Loss:
        return replace(self, target=self._wanted(self.taken(output).double())) if self.target is None else self

    def _wanted(self, z: Tensor) -> Tensor:
        """The target that the float model's own output is."""
        return z

    def mean(self, values: Tensor) -> Tensor:
        if self.weight is not None:
            return torch.where(self.weight == 0, 0.0, values * self.weight).sum(-1)
        return values.mean(-1)

    def weights(self, like: Tensor) -> Tensor:
        """Of all values ``[N, M]``, as a kernel takes them."""
        if self.weight is not None:
            return self.weight.to(like.dtype)
        return like.new_full(like.shape, 1 / like.shape[-1])

    def _off(self, z: Tensor) -> Tensor:
        """z − y; zero where the output is compared with itself."""
        return torch.zeros_like(z, dtype=torch.float64) if self.target is None else z.double() - self.target


@dataclass(frozen=True)
class Squared(Values):
    """(z − y)²: an interaction is twice the product of the changes, whatever the target."""

    def increase(self, z: Tensor, delta: Tensor) -> Tensor:
        d = delta.double()
        return self.mean(d.square() if self.target is None else d * (d + 2 * self._off(z)))

    def pairs(self, z: Tensor, delta: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found = clado_ext.pairwise_mse(delta, self.weight, other)
        return found if self.weight is not None else averaged(found, z.shape[1])

    def pair(self, z: Tensor, first: Tensor, second: Tensor, joint: Tensor) -> tuple[Tensor, Tensor]:
        v, w = first.double(), second.double()
        rest = joint.double() - v[:, None] - w[None]
        around = v[:, None] + w[None] + self._off(z)
        return self.mean(2 * v[:, None] * w[None]), self.mean(rest * (rest + 2 * around))

    def gradient(self, z: Tensor, delta: Tensor) -> Tensor:
        slope: Tensor = 2 * self.weights(z) * (delta + self._off(z)).to(delta.dtype)
        return slope

    def value(self, output: Any) -> Tensor:
        return self.mean(self._off(self.taken(output)).square())


@dataclass(frozen=True)
class SmoothL1(Values):
    """½ e² of errors up to 1, |e| − ½ beyond (Huber)."""

    def increase(self, z: Tensor, delta: Tensor) -> Tensor:
        off = self._off(z)
        return self.mean(_huber(off + delta.double()) - _huber(off))

    def interactions(self, z: Tensor, first: Tensor, second: Tensor) -> Tensor:
        out = torch.zeros(len(first), len(second), len(z), dtype=torch.float64, device=z.device)
        off, weight, base = self._off(z), self.weights(z.double()), _huber(self._off(z))
        for n in range(len(z)):
            step = max(1, _ELEMENTS // max(1, len(second)))
            for begin in range(0, z.shape[1], step):
                own = slice(begin, begin + step)
                others = second[:, n, own].double()
                apart = _huber(off[n, own] + others) - base[n, own]
                for a in range(len(first)):
                    moved = off[n, own] + first[a, n, own].double()
                    each = _huber(moved + others) - _huber(moved) - apart
                    used = weight[n, own]
                    out[a, :, n] += torch.where(used == 0, 0.0, each * used).sum(-1)
        return out

    def gradient(self, z: Tensor, delta: Tensor) -> Tensor:
        slope: Tensor = self.weights(z) * (delta + self._off(z)).clamp(-1, 1).to(delta.dtype)
        return slope

    def value(self, output: Any) -> Tensor:
        return self.mean(_huber(self._off(self.taken(output))))


def _huber(error: Tensor) -> Tensor:
    size = error.abs()
    return torch.where(size <= 1, 0.5 * error.square(), size - 0.5)


@dataclass(frozen=True)
class Binary(Values):
    """Binary cross-entropy of logits: two classes 0 and z. ``target``: probabilities; None: the float model's own."""

    @classmethod
    def against_targets(cls: type[V], place: Place, targets: Tensor) -> V:
        wanted, weight = place.counted(place.of_positions(targets.reshape(len(targets), -1)))
        return cls(wanted.double(), place.chosen, weight)

    def _wanted(self, z: Tensor) -> Tensor:
        return z.sigmoid()

    def increase(self, z: Tensor, delta: Tensor) -> Tensor:
        flat, changed = _two(z.reshape(-1)), _two(delta.reshape(len(delta), -1))
        found = clado_ext.batched_ce(flat, changed).view(delta.shape)
        if self.target is not None:
            found = found + (z.double().sigmoid() - self.target) * delta.double()
        return self.mean(found)

    def pairs(self, z: Tensor, delta: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weight, others = (None if x is None else x.flatten(k) for x, k in ((self.weight, 0), (other, 1)))
        found = clado_ext.pairwise_bce(z.flatten(), delta.flatten(1), weight, z.shape[1], others)
        return found if weight is not None else averaged(found, z.shape[1])

    def pair(self, z: Tensor, first: Tensor, second: Tensor, joint: Tensor) -> tuple[Tensor, Tensor]:
        v, w = first.double(), second.double()
        p = z.double().sigmoid()
        closed = (p * (1 - p) * _excess(p, v)[:, None] * _excess(p, w)[None]).log1p()
        added = v[:, None] + w[None]
        rest = joint.double() - added
        base = z.double() + added
        residual = clado_ext.batched_ce(_two(base.flatten()), _two(rest.flatten()[None])).view(rest.shape)
        wanted = p if self.target is None else self.target
        return self.mean(closed), self.mean(residual + (base.sigmoid() - wanted) * rest)

    def gradient(self, z: Tensor, delta: Tensor) -> Tensor:
        wanted = z.double().sigmoid() if self.target is None else self.target
        slope: Tensor = self.weights(z) * ((z + delta).double().sigmoid() - wanted).to(delta.dtype)
        return slope

    def value(self, output: Any) -> Tensor:
        z = self.taken(output).double()
        return self.mean(torch.nn.functional.softplus(z) - (z.sigmoid() if self.target is None else self.target) * z)


def _excess(p: Tensor, delta: Tensor) -> Tensor:
    """(e^δ − 1) / E_p[e^δ] over two classes of which the second changes by δ."""
    small = delta.abs().neg().expm1()  # of what cannot overflow
    return torch.where(delta > 0, -small / (1 + (1 - p) * small), small / (1 + p * small))


def _two(x: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(x), x], -1)


_ELEMENTS = 1 << 22  # of a float64 temporary
