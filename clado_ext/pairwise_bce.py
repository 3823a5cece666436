"""All pairwise interactions of a set of perturbations under binary cross-entropy and additive logits, in one call."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ._losses import DTYPES, check_changes
from ._pairs import allocate_rows, launch_rows
from ._registry import checked, define, refusal, run


@checked
def pairwise_bce(
    logits: Tensor,
    delta: Tensor,
    weight: Tensor | None = None,
    rows_per_sample: int = 1,
    other: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Interactions of every pair of perturbations of single logits under binary cross-entropy, summed over samples.

    Each logit z stands against a class at 0 that is not carried: what :func:`pairwise_ce` gives for the logits [0, z] and the
    changes [0, δ] is, with p = sigmoid(z) and e = expm1(δ), for any label and for the KL divergence to p,

        a_vw = log1p(p (1 - p) e_v e_w / ((1 + p e_v)(1 + p e_w))) = log1p(s_v s_w),  s = sinh(δ / 2) / cosh((z + δ) / 2)

    A sample is one row, or as many as it has elements (pixels of a mask, labels): its a is then the weighted sum over them.
    Relatively accurate for tiny δ and for z far from 0; no ``[R, V, V]`` tensor is made, extra memory is a few MiB and O(V²).

    Args:
        logits: clean logits ``[R]``, float32 or float64 (float16 and bfloat16 are computed as float32). An infinite one is
            certain and adds nothing.
        delta: logit changes ``[V, R]``, same dtype and device.
        weight: of each row, ``[R]``, floating-point, at least 0; None: 1. A row of weight 0 counts nothing whatever it holds.
        rows_per_sample: rows that are one sample, one after the other; divides R.
        other: changes ``[W, R]`` of a second set of perturbations; None: ``delta`` again.
        out: to write into instead of new memory: contiguous, as returned.

    Returns:
        (Σ_n a, Σ_n a²) over the R / rows_per_sample samples, float64 ``[V, W]`` each, in nats and nats². Without ``other``
        ``[V, V]``, symmetric; the diagonal is the formula for w = v. Rows and columns of a perturbation whose δ holds NaN or
        infinity are NaN.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    return run(_pairwise_bce, (logits, delta, weight, rows_per_sample, other), out)


def _check(op: str, logits: Tensor, delta: Tensor) -> None:
    if logits.dim() != 1:
        raise refusal(op, "logits", "have shape [R]", tuple(logits.shape))
    if logits.dtype not in DTYPES:
        raise refusal(op, "logits", "be a floating-point tensor", logits.dtype)
    check_changes(op, "delta", delta, "V", logits, "the logits")


_pairwise_bce = define(
    "pairwise_bce(Tensor logits, Tensor delta, Tensor? weight, int rows_per_sample, Tensor? other) -> (Tensor, Tensor)",
    partial(allocate_rows, "pairwise_bce", _check),
    partial(launch_rows, "pairwise_bce"),
)
