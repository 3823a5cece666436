"""Losses over rows of classes or values: cross-entropy, the KL divergence, the cosine distance, at every position."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import clado_ext

from .base import Loss, averaged
from .place import Place


@dataclass(frozen=True)
class Rows(Loss):
    """A loss of rows ``[N, R, C]``: one for each position of a sample, averaged.

    Attributes:
        dim: of the output, holds the classes.
        target: what is compared with, in the form of the output or as labels ``[N, R]``; None: the float model's own output.
        weight: float64 ``[N, R]``, of each row; None: all alike.
        chosen: int64 ``[N, P]``, the positions that are looked at; None: all.
    """

    dim: int = 1
    target: Tensor | None = None
    weight: Tensor | None = None
    chosen: Tensor | None = None

    @property
    def rests(self) -> bool:
        return self.target is None

    def taken(self, output: Tensor, lead: int = 0) -> Tensor:
        rows = output.movedim(lead + self.dim, -1)
        rows = rows.reshape(*rows.shape[: lead + 1], -1, rows.shape[-1])
        if self.chosen is not None:
            rows = rows.take_along_dim(self.chosen[(None,) * lead + (..., None)], -2)
        return rows

    def mean(self, values: Tensor) -> Tensor:
        """``[…, N]`` of values ``[…, N, R]``: a row of weight zero counts nothing, whatever it holds."""
        if self.weight is not None:
            return torch.where(self.weight == 0, 0.0, values * self.weight).sum(-1)
        return values[..., 0] if values.shape[-1] == 1 else values.mean(-1)

    def weights(self, z: Tensor) -> Tensor:
        """Of every row ``[N, R]``."""
        return z.new_full(z.shape[:2], 1 / z.shape[1]) if self.weight is None else self.weight.to(z.dtype)


@dataclass(frozen=True)
class Categorical(Rows):
    """Cross-entropy of classes, or the KL divergence: known in closed form from logits and their changes.

    ``target``: labels int64 ``[N, R]``, or probabilities ``[N, R, C]``; None: the float model's own, for the KL divergence.
    """

    @staticmethod
    def against_outputs(place: Place, targets: Any) -> Categorical:
        """KL to the float model's probabilities."""
        return Categorical(place.dim, chosen=place.chosen)

    @staticmethod
    def against_targets(place: Place, targets: Tensor) -> Categorical:
        """Cross-entropy with labels; those that are to be ignored weigh nothing."""
        labels = place.of_positions(targets.reshape(len(targets), -1)).to(torch.int64)
        return Categorical(place.dim, *place.counted(labels), place.chosen)

    def anchored(self, output: Any) -> Loss:
        return replace(self, target=self.taken(output).double().softmax(-1)) if self.target is None else self

    def increase(self, z: Tensor, delta: Tensor) -> Tensor:
        return self.mean(self._increase(z, delta))

    def _increase(self, z: Tensor, delta: Tensor) -> Tensor:
        """Of every row, ``[S, N, R]``."""
        shape = delta.shape[:-1]
        flat, changed = z.reshape(-1, z.shape[-1]), delta.reshape(len(delta), -1, z.shape[-1])
        labels = self.target.flatten() if self.target is not None and self.target.dim() == 2 else None
        found = clado_ext.batched_ce(flat, changed, labels).view(shape)
        return found if self.soft is None else found + ((z.double().softmax(-1) - self.soft) * delta.double()).sum(-1)

    @property
    def soft(self) -> Tensor | None:
        """Probabilities that are compared with, where they are not the clean ones."""
        return self.target if self.target is not None and self.target.dim() == 3 else None

    def value(self, output: Any) -> Tensor:
        logs = self.taken(output).double().log_softmax(-1)
        if self.target is None:  # to itself
            return logs.new_zeros(len(logs))
        if self.soft is not None:
            return self.mean(-(self.soft * logs).sum(-1))
        return self.mean(-logs.take_along_dim(self.target[..., None], -1)[..., 0])

    def pairs(self, z: Tensor, delta: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows, weight = z.shape[1], None if self.weight is None else self.weight.flatten()
        others = None if other is None else other.flatten(1, 2)
        found = clado_ext.pairwise_ce(z.flatten(0, 1), delta.flatten(1, 2), weight, rows, others)
        return found if weight is not None else averaged(found, rows)

    def pair(self, z: Tensor, first: Tensor, second: Tensor, joint: Tensor) -> tuple[Tensor, Tensor]:
        """The residual of the true joint change is small and free of cancellation, too: log E_q[e^r] − r[y]."""
        v, w, p = first.double(), second.double(), z.double().softmax(-1)
        closed = torch.einsum("nrc,anrc,bnrc->abnr", p, excess(p, v), excess(p, w)).log1p()
        added = v[:, None] + w[None]
        rest = joint - added
        shape, base = rest.shape[:-1], (z.double() + added).flatten(0, -2)
        rest = rest.reshape(base.shape)
        if self.target is not None and self.target.dim() == 2:
            labels = self.target.expand(shape).reshape(-1)
            residual = clado_ext.batched_ce(base, rest[None], labels).view(shape)
        else:  # log E_q[e^r] − Σ t r = KL(q, q e^r) + Σ (q − t) r
            wanted = p if self.soft is None else self.soft
            residual = clado_ext.batched_ce(base, rest[None]).view(shape)
            residual = residual + ((base.softmax(-1).view(*shape, -1) - wanted) * rest.view(*shape, -1)).sum(-1)
        return self.mean(closed), self.mean(residual)

    def gradient(self, z: Tensor, delta: Tensor) -> Tensor:
        slope = (z + delta).softmax(-1)
        if self.target is None:
            slope = slope - z.softmax(-1)
        elif self.soft is not None:
            slope = slope - self.soft.to(slope.dtype)
        else:
            slope = slope - torch.nn.functional.one_hot(self.target, z.shape[-1])
        weighted: Tensor = slope * self.weights(z)[..., None]
        return weighted


def excess(p: Tensor, delta: Tensor) -> Tensor:
    """u = e^δ / E_p[e^δ] − 1, without cancellation."""
    mean = (p * delta).sum(-1, keepdim=True)
    centred = delta - mean
    return (centred - (p * centred.expm1()).sum(-1, keepdim=True).log1p()).expm1()


@dataclass(frozen=True)
class Cosine(Rows):
    """1 − cos(z, y) of rows, as between features; ``target``: y ``[N, R, C]``, None: the float model's own."""

    @staticmethod
    def against_outputs(place: Place, targets: Any) -> Cosine:
        return Cosine(place.dim, chosen=place.chosen)

    @staticmethod
    def against_targets(place: Place, targets: Tensor) -> Cosine:
        whole = Cosine(place.dim, chosen=place.chosen)
        return replace(whole, target=whole.taken(targets.double()))

    def anchored(self, output: Any) -> Loss:
        return replace(self, target=self.taken(output).double()) if self.target is None else self

    def _wanted(self, z: Tensor) -> Tensor:
        """y / |y| of rows."""
        y: Tensor = z.double() if self.target is None else self.target
        length: Tensor = y.norm(dim=-1, keepdim=True)
        return y / length.clamp(min=_LEAST)

    def increase(self, z: Tensor, delta: Tensor) -> Tensor:
        y, x, d = self._wanted(z), z.double(), delta.double()
        ahead, step = (y * x).sum(-1), (y * d).sum(-1)
        before = x.norm(dim=-1).clamp(min=_LEAST)
        now = (x + d).norm(dim=-1).clamp(min=_LEAST)
        longer = (2 * (x * d).sum(-1) + d.square().sum(-1)) / (now + before)  # now - before, not by subtraction
        return self.mean((ahead * longer - step * before) / (before * now))

    def value(self, output: Any) -> Tensor:
        x = self.taken(output).double()
        return self.mean(1 - (self._wanted(x) * x).sum(-1) / x.norm(dim=-1).clamp(min=_LEAST))

    def interactions(self, z: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """By the products of rows: |z + δ_v + δ_w|² is a sum of them."""
        out = torch.zeros(len(first), len(second), len(z), dtype=torch.float64, device=z.device)
        rows, classes = z.shape[1:]
        step = max(1, _ELEMENTS // (len(first) * len(second) + (len(first) + len(second)) * classes))
        y, scale = self._wanted(z), self.weights(z.double())
        for n in range(len(z)):
            for begin in range(0, rows, step):
                own = slice(begin, begin + step)
                x, u = z[n, own].double(), y[n, own]
                v, w = first[:, n, own].double(), second[:, n, own].double()
                cos = _cosines(u, x, v, w)
                used = scale[n, own, None, None]
                out[..., n] -= torch.where(used == 0, 0.0, cos * used).sum(0)
        return out


def _cosines(y: Tensor, x: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Second difference ``[r, A, B]`` of y·z / |z| at z = x, x + v, x + w, x + v + w."""
    a, b, c = (x * y).sum(-1)[:, None, None], (v * y).sum(-1).T[:, :, None], (w * y).sum(-1).T[:, None]
    square = x.square().sum(-1)[:, None, None]
    longer_v = (2 * (x * v).sum(-1) + v.square().sum(-1)).T[:, :, None]
    longer_w = (2 * (x * w).sum(-1) + w.square().sum(-1)).T[:, None]
    cross = 2 * torch.matmul(v.transpose(0, 1), w.permute(1, 2, 0))

    def over(ahead: Tensor, length: Tensor) -> Tensor:
        return ahead / length.clamp(min=0.0).sqrt().clamp(min=_LEAST)

    both = over(a + b + c, square + longer_v + longer_w + cross)
    return both - over(a + b, square + longer_v) - over(a + c, square + longer_w) + over(a, square)


_LEAST = 1e-8  # a row of zeros has no direction
_ELEMENTS = 1 << 22  # of a float64 temporary
