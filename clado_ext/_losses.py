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
    check_changes(op, "delta", delta, "V", logits, "the logits")


def check_changes(op: str, name: str, changes: Tensor, count: str, like: Tensor, of: str) -> None:
    """Raise ``ValueError`` unless ``changes``, the argument ``name``, is ``[count, *like.shape]``, dtype and device those of
    ``like``, the argument ``of``."""
    if changes.dim() != like.dim() + 1 or changes.shape[1:] != like.shape:
        shape = ", ".join(map(str, (count, *like.shape)))
        raise refusal(op, name, f"have shape [{shape}]", tuple(changes.shape))
    if changes.dtype != like.dtype:
        raise refusal(op, name, f"be {like.dtype} as {of}", changes.dtype)
    if changes.device != like.device:
        raise refusal(op, name, f"be on {like.device}", changes.device)


def computed(x: Tensor) -> Tensor:
    """Contiguous, and float32 where the dtype is a half precision."""
    return (x if x.dtype in (torch.float32, torch.float64) else x.float()).contiguous()


def numbers(logits: Tensor, delta: Tensor) -> _native.Changes:
    """What :func:`computed` gave as the native functions take it; both have to outlive the call."""
    perturbations, samples, classes = delta.shape
    return logits.data_ptr(), delta.data_ptr(), perturbations, samples, classes, logits.dtype == torch.float64
