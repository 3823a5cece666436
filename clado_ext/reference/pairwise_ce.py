"""Plain-torch twin of clado_ext.pairwise_ce, in float64 by the definition: a second difference of losses."""

import torch
from torch import Tensor


def interactions(logits: Tensor, delta: Tensor, other: Tensor | None = None) -> Tensor:
    """a_vw of every row, float64 ``[V, W, R]``: L(z+δ_v+δ_w) - L(z+δ_v) - L(z+δ_w) + L(z); the label cancels."""
    z, d = logits.double(), delta.double()
    o = d if other is None else other.double()
    both = (z + d[:, None] + o[None, :]).logsumexp(-1)
    left, right = (z + d).logsumexp(-1), (z + o).logsumexp(-1)
    return both - left[:, None] - right[None, :] + z.logsumexp(-1)


def sums(a: Tensor, weight: Tensor | None = None, rows_per_sample: int = 1) -> tuple[Tensor, Tensor]:
    """Σ_n a and Σ_n a² of ``[V, W, R]``, where a sample's a is the weighted sum over its rows; those of weight 0 left out."""
    if weight is not None:
        a = torch.where(weight == 0, 0, a * weight.double())
    a = a.reshape(*a.shape[:2], a.shape[2] // rows_per_sample, rows_per_sample).sum(-1)
    return a.sum(-1), a.square().sum(-1)


def pairwise_ce(
    logits: Tensor,
    delta: Tensor,
    weight: Tensor | None = None,
    rows_per_sample: int = 1,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """float64 ``[V, W]`` sums of a and a² over samples; see :func:`clado_ext.pairwise_ce`."""
    return sums(interactions(logits, delta, other), weight, rows_per_sample)
