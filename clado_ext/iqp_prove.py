"""Branch and bound for the integer quadratic program that chooses a candidate for every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ._program import check_program, check_values, numbers
from ._registry import Empty, call, checked, define, require


@checked
def iqp_prove(
    matrix: Tensor,
    starts: Tensor,
    rows: Tensor,
    limits: Tensor,
    quadratic: Tensor,
    linear: Tensor,
    multipliers: Tensor,
    start: Tensor | None = None,
    point: Tensor | None = None,
    removed: Tensor | None = None,
    *,
    constant: float = 0.0,
    slack: float = 0.0,
    tolerance: float = 0.0,
    nodes: int = 10_000_000,
    seconds: float = 60.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Prove how good the best choice is, with a convex form ½ xᵀQx + cᵀx + constant that is at most ½ xᵀGx on feasible choices.

    Long proofs run on torch's threads; the result is the same at any number of them unless ``seconds`` ends it.

    Args:
        matrix, starts, rows, limits: as in :func:`clado_ext.iqp_search`.
        quadratic: Q, float64 ``[V, V]``, symmetric, positive semidefinite up to what ``slack`` covers.
        linear: c, float64 ``[V]``.
        multipliers: float64 ``[P]``, non-negative, objective per unit of a row; where the dual ascent starts.
        start: int64 ``[L]``, an incumbent.
        point: float64 ``[V]``, non-negative; where the descent starts, best a minimizer of the form within the budgets.
        removed: R, float64 ``[V, V]``, symmetric, non-negative, zero within layers: where given, the form is at most
            ½ xᵀ(G − R)x on feasible choices, and what R holds of candidates that a node has fixed is put back there.
        constant: a number.
        slack: taken off every bound.
        tolerance: nodes that cannot beat the incumbent by more than this are closed.
        nodes: limit on nodes.
        seconds: limit on wall time.

    Returns:
        choice, int64 ``[L]``: the best feasible one (-1 throughout where none is known); alive, uint8 ``[V]``: 0 for
        candidates that the root proved to be in no better choice; outcome, float64 ``[3]``: the proven bound (infinity:
        nothing is feasible), nodes, and 1 when every node was closed.

    Raises:
        ValueError: tensors that are not on the CPU or of another dtype or shape, a matrix that is not finite.
    """
    given = starts.new_full((starts.numel() - 1,), -1) if start is None else start
    origin = torch.zeros_like(linear) if point is None else point
    taken = linear.new_empty(0) if removed is None else removed
    form = (quadratic, linear, multipliers, given, origin, taken, constant, slack)
    return _iqp_prove(matrix, starts, rows, limits, *form, tolerance, nodes, seconds)


def _allocate(
    empty: Empty,
    matrix: Tensor,
    starts: Tensor,
    rows: Tensor,
    limits: Tensor,
    quadratic: Tensor,
    linear: Tensor,
    multipliers: Tensor,
    start: Tensor,
    point: Tensor,
    removed: Tensor,
    constant: float,
    slack: float,
    tolerance: float,
    nodes: int,
    seconds: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check_program("iqp_prove", matrix, starts, rows, limits)
    size, layers = matrix.shape[0], starts.numel() - 1
    for name, tensor, shape in (
        ("quadratic", quadratic, (size, size)),
        ("linear", linear, (size,)),
        ("multipliers", multipliers, (limits.shape[0],)),
        ("point", point, (size,)),
        ("removed", removed, (size, size) if removed.numel() else removed.shape),
    ):
        require(tensor.dtype == torch.float64, "iqp_prove", name, "be float64", tensor.dtype)
        require(tensor.shape == shape, "iqp_prove", name, f"have shape {shape}", tuple(tensor.shape))
    require(start.dtype == torch.int64, "iqp_prove", "start", "be int64", start.dtype)
    require(start.shape == (layers,), "iqp_prove", "start", f"have shape {(layers,)}", tuple(start.shape))
    require(slack >= 0 and tolerance >= 0, "iqp_prove", "slack and tolerance", "not be negative", (slack, tolerance))
    require(seconds >= 0, "iqp_prove", "seconds", "not be negative", seconds)
    choice = empty(start, (layers,), torch.int64)
    return choice, empty(start, (size,), torch.uint8), empty(matrix, (3,), torch.float64)


def _launch(
    matrix: Tensor,
    starts: Tensor,
    rows: Tensor,
    limits: Tensor,
    quadratic: Tensor,
    linear: Tensor,
    multipliers: Tensor,
    start: Tensor,
    point: Tensor,
    removed: Tensor,
    constant: float,
    slack: float,
    tolerance: float,
    nodes: int,
    seconds: float,
    choice: Tensor,
    alive: Tensor,
    outcome: Tensor,
) -> None:
    matrix, starts, rows, limits = (tensor.contiguous() for tensor in (matrix, starts, rows, limits))
    quadratic, linear, multipliers = (tensor.contiguous() for tensor in (quadratic, linear, multipliers))
    point, removed = point.contiguous(), removed.contiguous()
    check_values("iqp_prove", matrix, starts, start)
    finite = all(bool(t.isfinite().all()) for t in (quadratic, linear, multipliers, point, removed))
    require(finite, "iqp_prove", "quadratic, linear, multipliers, point and removed", "be finite", "NaN or infinity")
    choice.copy_(start)
    taken = removed.data_ptr() if removed.numel() else 0
    program = numbers(matrix, starts, rows, limits)
    addresses = (quadratic.data_ptr(), linear.data_ptr(), multipliers.data_ptr(), taken, point.data_ptr())
    out = (choice.data_ptr(), alive.data_ptr(), outcome.data_ptr())
    call("iqp_prove", matrix.device, program, (*addresses, constant, slack), *out, tolerance, nodes, seconds)
    if int(choice[0]) < 0:
        choice.fill_(-1)


_iqp_prove = define(
    "iqp_prove(Tensor matrix, Tensor starts, Tensor rows, Tensor limits, Tensor quadratic, Tensor linear, "
    "Tensor multipliers, Tensor start, Tensor point, Tensor removed, float constant, float slack, "
    "float tolerance, int nodes, float seconds) -> (Tensor, Tensor, Tensor)",
    _allocate,
    _launch,
)
