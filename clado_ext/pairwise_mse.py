"""All pairwise interactions of a set of perturbations under squared error and additive outputs, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._losses import DTYPES, check_changes, computed
from ._pairs import address, check_weight, empty_sums, given, nothing_to_do, numbers
from ._registry import Empty, call, checked, define, refusal, run


@checked
def pairwise_mse(
    delta: Tensor,
    weight: Tensor | None = None,
    other: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Interactions of every pair of perturbations under squared error if their changes of the output add, summed over samples.

    With L(y) = Σ_m weight_m (y_m - t_m)² the second difference of the loss is, whatever the output y and the target t,

        a_vw = L(y + δ_v + δ_w) - L(y + δ_v) - L(y + δ_w) + L(y) = 2 Σ_m weight_m δ_v[m] δ_w[m]

    one symmetric product per sample. float32 products meet in float32 for 128 elements and then in float64, in a fixed order.
    No ``[N, V, V]`` tensor is made; extra memory is a few MiB and O(V²).

    Args:
        delta: changes of the output ``[V, N, M]``, float32 or float64 (float16 and bfloat16 are computed as float32).
        weight: of each element, ``[N, M]``, floating-point, at least 0: 1/M for a mean. None: 1. An element of weight 0
            counts nothing whatever it holds.
        other: changes ``[W, N, M]`` of a second set of perturbations; None: ``delta`` again.
        out: to write into instead of new memory: contiguous, as returned.

    Returns:
        (Σ_n a, Σ_n a²), float64 ``[V, W]`` each, in units of the loss and their square. Without ``other`` ``[V, V]``, symmetric;
        the diagonal is the formula for w = v. NaN or infinity in δ spoils its perturbation's rows and columns, nothing else.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    return run(_pairwise_mse, (delta, weight, other), out)


def _allocate(empty: Empty, delta: Tensor, weight: Tensor | None, other: Tensor | None) -> tuple[Tensor, Tensor]:
    if delta.dim() != 3:
        raise refusal("pairwise_mse", "delta", "have shape [V, N, M]", tuple(delta.shape))
    if delta.dtype not in DTYPES:
        raise refusal("pairwise_mse", "delta", "be a floating-point tensor", delta.dtype)
    if delta.shape[2] < 1:
        raise refusal("pairwise_mse", "delta", "have at least one element per sample", tuple(delta.shape))
    if other is not None:
        like = delta[0] if len(delta) else delta.new_empty(delta.shape[1:])
        check_changes("pairwise_mse", "other", other, "W", like, "delta")
    check_weight("pairwise_mse", weight, delta.shape[1:], delta.device)
    return empty_sums(empty, delta, other)


def _launch(delta: Tensor, weight: Tensor | None, other: Tensor | None, total: Tensor, squares: Tensor) -> None:
    if nothing_to_do(delta.shape[1], (total, squares)):
        return
    d, o = computed(delta), given(other)
    w = None if weight is None else weight.to(d.dtype).contiguous()
    pairs = numbers(d, o, *delta.shape[1:])
    extra: tuple[int, ...] = ()
    if d.is_cuda:
        workspace = d.new_empty(_native.pairwise_mse_workspace(pairs), dtype=torch.uint8)
        extra = (workspace.data_ptr(),)
    call("pairwise_mse", d.device, pairs, address(w), total.data_ptr(), squares.data_ptr(), *extra)


_pairwise_mse = define(
    "pairwise_mse(Tensor delta, Tensor? weight, Tensor? other) -> (Tensor, Tensor)", _allocate, _launch
)
