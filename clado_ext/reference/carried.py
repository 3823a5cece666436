"""Plain-torch twin of the carried rules of clado_ext, in float64 by the definition f(x + d) − f(x)."""

import torch
from torch import Tensor


def _both(clean: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """x of every stream, and x + d."""
    x = clean.double().repeat(delta.shape[0] // max(1, clean.shape[0]), *[1] * (clean.dim() - 1))
    return x, x + delta.double()


def carried_gelu(clean: Tensor, delta: Tensor) -> Tensor:
    """float64 ``[S·N, …]``; see :func:`clado_ext.carried_gelu`."""
    before, after = _both(clean, delta)
    return torch.nn.functional.gelu(after) - torch.nn.functional.gelu(before)


def carried_layer_norm(clean: Tensor, delta: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """float64 ``[S·N, …, C]``; see :func:`clado_ext.carried_layer_norm`."""
    before, after = _both(clean, delta)
    scale = None if weight is None else weight.double()
    shape = clean.shape[-1:]
    norm = torch.nn.functional.layer_norm
    return norm(after, shape, scale, None, eps) - norm(before, shape, scale, None, eps)


def carried_add_layer_norm(
    clean: Tensor, residual: Tensor, branch: Tensor, weight: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Twice float64 ``[S·N, …, C]``; see :func:`clado_ext.carried_add_layer_norm`."""
    total = residual.double() + branch.double()
    return total, carried_layer_norm(clean, total, weight, eps)


def carried_softmax(scores: Tensor, clean: Tensor, delta: Tensor, scale: float = 1.0) -> Tensor:
    """float64 ``[S·N, …, 2K]``; see :func:`clado_ext.carried_softmax`."""
    before, after = _both(scores, scale * delta.double())
    whole = after.softmax(-1)
    return torch.cat([whole - before.softmax(-1), whole], -1)
