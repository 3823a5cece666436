"""What the loss ops share: checks of logits and logit changes."""

from __future__ import annotations

import torch
from torch import Tensor

from ._registry import require

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_logits(op: str, logits: Tensor, delta: Tensor) -> None:
    """Raise ``ValueError`` unless ``logits`` is ``[N, C]`` and ``delta`` ``[V, N, C]`` of one dtype and device."""
    require(logits.dim() == 2, op, "logits", "have shape [N, C]", tuple(logits.shape))
    require(logits.dtype in DTYPES, op, "logits", "be a floating-point tensor", logits.dtype)
    require(logits.shape[1] >= 1, op, "logits", "have at least one class", tuple(logits.shape))
    require(
        delta.dim() == 3 and delta.shape[1:] == logits.shape,
        op,
        "delta",
        f"have shape [V, {logits.shape[0]}, {logits.shape[1]}]",
        tuple(delta.shape),
    )
    require(delta.dtype == logits.dtype, op, "delta", f"be {logits.dtype} as the logits", delta.dtype)
    require(delta.device == logits.device, op, "delta", f"be on {logits.device}", delta.device)


def computed(x: Tensor) -> Tensor:
    """Contiguous, and float32 where the dtype is a half precision."""
    return (x if x.dtype in (torch.float32, torch.float64) else x.float()).contiguous()
