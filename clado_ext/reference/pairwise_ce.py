"""Plain-torch twin of clado_ext.pairwise_ce, in float64 by the definition: a second difference of losses."""

import torch
from torch import Tensor


def interactions(logits: Tensor, delta: Tensor) -> Tensor:
    """a_vw of every sample, float64 ``[V, V, N]``: L(z+δ_v+δ_w) - L(z+δ_v) - L(z+δ_w) + L(z); the label cancels."""
    z, d = logits.double(), delta.double()
    norm = (z + d[:, None] + d[None, :]).logsumexp(-1)
    single = (z + d).logsumexp(-1)
    return norm - single[:, None] - single[None, :] + z.logsumexp(-1)


def pairwise_ce(logits: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """float64 ``[V, V]`` sums of a and a² over samples; see :func:`clado_ext.pairwise_ce`."""
    if logits.shape[0] == 0:
        zeros = torch.zeros(delta.shape[0], delta.shape[0], dtype=torch.float64, device=delta.device)
        return zeros, zeros.clone()
    a = interactions(logits, delta)
    return a.sum(-1), a.square().sum(-1)
