"""Plain-torch twin of clado_ext.pairwise_mse, in float64: a product per sample."""

import torch
from torch import Tensor

from .pairwise_ce import sums


def interactions(delta: Tensor, weight: Tensor | None = None, other: Tensor | None = None) -> Tensor:
    """a_vw of every sample, float64 ``[V, W, N]``: 2 Σ_m weight_m δ_v[m] δ_w[m], elements of weight 0 left out."""
    d = delta.double()
    o = d if other is None else other.double()
    if weight is not None:
        d, o = torch.where(weight == 0, 0, d * weight.double()), torch.where(weight == 0, 0, o)
    return 2 * torch.einsum("vnm,wnm->vwn", d, o)


def pairwise_mse(delta: Tensor, weight: Tensor | None = None, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float64 ``[V, W]`` sums of a and a² over samples; see :func:`clado_ext.pairwise_mse`."""
    return sums(interactions(delta, weight, other))
