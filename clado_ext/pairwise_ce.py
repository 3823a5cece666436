"""All pairwise interactions of a set of perturbations under additive logits, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._losses import check_logits, computed, numbers
from ._registry import call, checked, define


@checked
def pairwise_ce(logits: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Interactions of every pair of perturbations if their logit changes add, summed over samples.

    With z the clean logits, p = softmax(z) and ``u_v = e^{δ_v} / E_p[e^{δ_v}] - 1``, the second difference of the loss has a
    closed form per sample, the same for cross-entropy with any label and for the KL divergence to p:

        a_vw = L(z + δ_v + δ_w) - L(z + δ_v) - L(z + δ_w) + L(z) = log1p(Σ_c p_c u_v[c] u_w[c])

    so nothing is subtracted and nothing cancels. No ``[N, V, V]`` tensor is made; extra memory is a few MiB and O(V²).

    Args:
        logits: clean logits ``[N, C]``, float32 or float64 (float16 and bfloat16 are computed as float32). A class at -inf does
            not count.
        delta: logit changes ``[V, N, C]``, same dtype and device.

    Returns:
        (Σ_n a, Σ_n a²), float64 ``[V, V]`` each, symmetric, in nats and nats²; the diagonal is the formula for w = v. Rows and
        columns of a perturbation whose δ holds NaN or infinity are NaN.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    return _pairwise_ce(logits, delta)


def _allocate(logits: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    check_logits("pairwise_ce", logits, delta)
    shape = (delta.shape[0], delta.shape[0])
    return delta.new_empty(shape, dtype=torch.float64), delta.new_empty(shape, dtype=torch.float64)


def _launch(logits: Tensor, delta: Tensor, total: Tensor, squares: Tensor) -> None:
    z, d = computed(logits), computed(delta)
    changes = numbers(z, d)
    extra: tuple[int, ...] = ()
    if z.is_cuda:
        workspace = d.new_empty(_native.pairwise_ce_workspace(*changes[2:]), dtype=torch.uint8)
        extra = (workspace.data_ptr(),)
    call("pairwise_ce", z.device, changes, total.data_ptr(), squares.data_ptr(), *extra)


_pairwise_ce = define("pairwise_ce(Tensor logits, Tensor delta) -> (Tensor, Tensor)", _allocate, _launch)
