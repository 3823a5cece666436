"""What the loss ops share: checks of logits and logit changes, and how the native module takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._registry import refusal

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_logits(op: str, logits: Tensor, delta: Tensor) -> None:
    """Raise ``ValueError`` unless ``logits`` is ``[N, C]`` and ``delta`` ``[V, N, C]`` of one dtype and device."""
    if logits.dim() != 2:
        raise refusal(op, "logits", "have shape [N, C]", tuple(logits.shape))
    if logits.dtype not in DTYPES:
        raise refusal(op, "logits", "be a floating-point tensor", logits.dtype)
    if logits.shape[1] < 1:
        raise refusal(op, "logits", "have at least one class", tuple(logits.shape))
    if delta.dim() != 3 or delta.shape[1:] != logits.shape:
        raise refusal(op, "delta", f"have shape [V, {logits.shape[0]}, {logits.shape[1]}]", tuple(delta.shape))
    if delta.dtype != logits.dtype:
        raise refusal(op, "delta", f"be {logits.dtype} as the logits", delta.dtype)
    if delta.device != logits.device:
        raise refusal(op, "delta", f"be on {logits.device}", delta.device)


def computed(x: Tensor) -> Tensor:
    """Contiguous, and float32 where the dtype is a half precision."""
    return (x if x.dtype in (torch.float32, torch.float64) else x.float()).contiguous()


def numbers(logits: Tensor, delta: Tensor) -> _native.Changes:
    """What :func:`computed` gave as the native functions take it; both have to outlive the call."""
    perturbations, samples, classes = delta.shape
    return logits.data_ptr(), delta.data_ptr(), perturbations, samples, classes, logits.dtype == torch.float64
