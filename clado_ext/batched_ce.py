"""Loss increase of many perturbations at once, accurate however small the change of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ._losses import check_logits, computed, numbers
from ._registry import Empty, call, checked, define, refusal, run


@checked
def batched_ce(logits: Tensor, delta: Tensor, target: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Loss increase of every perturbation on every sample, from clean logits z and logit changes δ.

    With p = softmax(z): without ``target`` the KL divergence to the clean softmax, ``log E_p[e^δ] - E_p[δ]``; with it the
    increase of the cross-entropy, ``log E_p[e^δ] - δ[y]``. No losses are subtracted: the KL divergence is second order in δ, and
    comes out with a relative error near 1e-6 also where δ is 1e-4 (formula: csrc/common/delta_loss.h).

    Args:
        logits: clean logits ``[N, C]``, float32 or float64 (float16 and bfloat16 are computed as float32). A class at -inf does
            not count.
        delta: ``[V, N, C]``, same dtype and device.
        target: int64 ``[N]`` labels, or None for the KL divergence.
        out: to write into instead of new memory: contiguous, as returned.

    Returns:
        float64 ``[V, N]`` in nats; NaN where a row of z or δ holds NaN.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on the CPU also a label outside [0, C) (CUDA: NaN).
    """
    return run(_batched_ce, (logits, delta, target), out)


def _allocate(empty: Empty, logits: Tensor, delta: Tensor, target: Tensor | None) -> Tensor:
    check_logits("batched_ce", logits, delta)
    if target is not None:
        if target.dtype != torch.int64:
            raise refusal("batched_ce", "target", "be int64", target.dtype)
        if target.shape != logits.shape[:1]:
            raise refusal("batched_ce", "target", f"have shape {tuple(logits.shape[:1])}", tuple(target.shape))
        if target.device != logits.device:
            raise refusal("batched_ce", "target", f"be on {logits.device}", target.device)
    return empty(delta, delta.shape[:2], torch.float64)


def _launch(logits: Tensor, delta: Tensor, target: Tensor | None, out: Tensor) -> None:
    z, d = computed(logits), computed(delta)
    y = None if target is None else target.contiguous()
    inside = call("batched_ce", z.device, numbers(z, d), 0 if y is None else y.data_ptr(), out.data_ptr())
    if inside is False:
        raise refusal("batched_ce", "target", f"lie in [0, {z.shape[1]})", "a label outside")


_batched_ce = define("batched_ce(Tensor logits, Tensor delta, Tensor? target) -> Tensor", _allocate, _launch)
