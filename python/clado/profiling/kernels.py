"""Interactions over rows and elements: the ops of ``clado_ext`` for dense outputs, by plain float64 products until they are there."""

from __future__ import annotations

import torch
from torch import Tensor

_ELEMENTS = 1 << 22  # of a float64 temporary


def pairwise_ce(
    logits: Tensor,
    delta: Tensor,
    weight: Tensor | None = None,
    rows_per_sample: int = 1,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log1p(Σ_c p_c u_v[c] u_w[c]) of rows ``[R, C]`` and changes ``[V, R, C]``, weighted ``[R]`` and summed by sample."""
    second = delta if other is None else other
    count, rows = len(delta), logits.shape[0]
    total = torch.zeros(count, len(second), dtype=torch.float64, device=delta.device)
    squares = torch.zeros_like(total)
    step = max(1, _ELEMENTS // (count * len(second) + (count + len(second)) * logits.shape[1]))
    for first in range(0, rows, rows_per_sample):
        a = torch.zeros_like(total)
        for begin in range(first, first + rows_per_sample, step):
            own = slice(begin, min(begin + step, first + rows_per_sample))
            p = logits[own].double().softmax(-1)
            u = _excess(p, delta[:, own].double())
            w = u if other is None else _excess(p, second[:, own].double())
            each = torch.matmul((p * u).transpose(0, 1), w.permute(1, 2, 0)).log1p()  # [r, V, W]
            if weight is not None:
                scale = weight[own].double()[:, None, None]
                each = torch.where(scale == 0, 0.0, scale * each)
            a += each.sum(0)
        total += a
        squares += a.square()
    return total, squares


def pairwise_bce(
    logits: Tensor,
    delta: Tensor,
    weight: Tensor | None = None,
    rows_per_sample: int = 1,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`pairwise_ce` over two classes 0 and z: ``[R]`` and ``[V, R]``."""

    def two(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.stack([torch.zeros_like(x), x], -1)

    z, d = two(logits), two(delta)
    assert z is not None and d is not None
    return pairwise_ce(z, d, weight, rows_per_sample, two(other))


def pairwise_mse(delta: Tensor, weight: Tensor | None = None, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """2 Σ_m weight_nm δ_v δ_w of ``[V, N, M]``."""
    second = delta if other is None else other
    total = torch.zeros(len(delta), len(second), dtype=torch.float64, device=delta.device)
    squares = torch.zeros_like(total)
    for n in range(delta.shape[1]):
        mine, theirs = delta[:, n].double(), second[:, n].double()
        if weight is not None:
            mine = torch.where(weight[n] == 0, 0.0, mine * weight[n].double())
            theirs = torch.where(weight[n] == 0, 0.0, theirs)
        a = 2 * mine @ theirs.T
        total += a
        squares += a.square()
    return total, squares


def _excess(p: Tensor, delta: Tensor) -> Tensor:
    """u = e^δ / E_p[e^δ] − 1, without cancellation."""
    mean = (p * delta).sum(-1, keepdim=True)
    centred = delta - mean
    return (centred - (p * centred.expm1()).sum(-1, keepdim=True).log1p()).expm1()
