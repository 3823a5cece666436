"""Plain-torch twin of clado_ext.scale_errors: every candidate of every group in float64."""

import torch
from torch import Tensor


def scale_errors(weight: Tensor, scale: Tensor, low: int, high: int, group_size: int = -1) -> Tensor:
    """float64 ``[S, N, groups]``; see :func:`clado_ext.scale_errors`."""
    flat = weight.double().reshape(weight.shape[0], -1)
    size = flat.shape[1] if group_size == -1 else group_size
    errors = torch.zeros(scale.shape, dtype=torch.float64, device=scale.device)
    for g, part in enumerate(flat.split(max(size, 1), 1)):
        for c, s in enumerate(scale[:, :, g].double().unsqueeze(2)):
            steps = torch.where(s == 0, 0, torch.round(part / s).clamp(low, high))
            errors[c, :, g] = (steps * s - part).square().sum(1)
    return errors
