"""Plain-torch twin of clado_ext.batched_ce, in float64 by the definition of the losses."""

import torch
from torch import Tensor


def batched_ce(logits: Tensor, delta: Tensor, target: Tensor | None = None) -> Tensor:
    """float64 ``[V, N]``; see :func:`clado_ext.batched_ce`. KL cancels below about 1e-16 of its terms."""
    clean = logits.double().log_softmax(-1)
    perturbed = (logits.double() + delta.double()).log_softmax(-1)
    if target is None:
        terms = clean.exp() * (clean - perturbed)
        return torch.where(clean.isinf(), 0.0, terms).sum(-1)
    index = target.expand(delta.shape[0], -1).unsqueeze(-1)
    return (clean.expand_as(delta).gather(-1, index) - perturbed.gather(-1, index)).squeeze(-1)
