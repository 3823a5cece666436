"""All pairwise interactions of a set of perturbations under additive logits, in one call."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ._losses import check_logits
from ._pairs import allocate_rows, launch_rows
from ._registry import checked, define, run


@checked
def pairwise_ce(
    logits: Tensor,
    delta: Tensor,
    weight: Tensor | None = None,
    rows_per_sample: int = 1,
    other: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Interactions of every pair of perturbations if their logit changes add, summed over samples.

    With z the clean logits, p = softmax(z) and ``u_v = e^{δ_v} / E_p[e^{δ_v}] - 1``, the second difference of the loss has a
    closed form per row of logits, the same for cross-entropy with any label and for the KL divergence to p:

        a_vw = L(z + δ_v + δ_w) - L(z + δ_v) - L(z + δ_w) + L(z) = log1p(Σ_c p_c u_v[c] u_w[c])

    so nothing is subtracted and nothing cancels. A sample is one row, or as many as it has positions (pixels, tokens): its a is
    then the weighted sum over them. No ``[R, V, V]`` tensor is made; extra memory is a few MiB and O(V²).

    Args:
        logits: clean logits ``[R, C]``, float32 or float64 (float16 and bfloat16 are computed as float32). A class at -inf does
            not count.
        delta: logit changes ``[V, R, C]``, same dtype and device.
        weight: of each row, ``[R]``, floating-point, at least 0; None: 1. A row of weight 0 counts nothing whatever it holds.
        rows_per_sample: rows that are one sample, one after the other; divides R.
        other: changes ``[W, R, C]`` of a second set of perturbations; None: ``delta`` again. So V perturbations may come in
            blocks, each pair of blocks in a call.
        out: to write into instead of new memory: contiguous, as returned.

    Returns:
        (Σ_n a, Σ_n a²) over the R / rows_per_sample samples, float64 ``[V, W]`` each, in nats and nats². Without ``other``
        ``[V, V]``, symmetric; the diagonal is the formula for w = v. Rows and columns of a perturbation whose δ holds NaN or
        infinity are NaN.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    return run(_pairwise_ce, (logits, delta, weight, rows_per_sample, other), out)


_pairwise_ce = define(
    "pairwise_ce(Tensor logits, Tensor delta, Tensor? weight, int rows_per_sample, Tensor? other) -> (Tensor, Tensor)",
    partial(allocate_rows, "pairwise_ce", check_logits),
    partial(launch_rows, "pairwise_ce"),
)
