"""Heuristics for the integer quadratic program of bit-width selection."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _native
from ._registry import checked, define, require

MOST_BITS = 7  # candidates of a layer: the widths 2..8


@checked
def iqp_search(
    matrix: Tensor,
    starts: Tensor,
    rows: Tensor,
    limits: Tensor,
    start: Tensor | None = None,
    *,
    seed: int = 0,
    work: int = 1_000_000,
    seconds: float = 60.0,
    target: float = -math.inf,
) -> tuple[Tensor, Tensor]:
    """Search for the least ½ xᵀGx over x with one candidate per layer and ``rows @ x <= limits``.

    A portfolio of priced descents, iterated local search and annealing on one-layer moves and pair exchanges. The
    result depends on the arguments alone unless ``seconds`` end the search.

    Args:
        matrix: G, float64 ``[V, V]``, finite, symmetric, zero between different candidates of one layer.
        starts: int64 ``[L + 1]``, ascending from 0 to V: layer i holds the candidates ``starts[i]:starts[i + 1]``.
        rows: int64 ``[P, V]``, use of each budget by each candidate.
        limits: int64 ``[P]``.
        start: int64 ``[L]``, a choice to begin with.
        seed: of everything random.
        work: limit on the rows of ``matrix`` that are read.
        seconds: limit on wall time.
        target: stop at an objective this low.

    Returns:
        choice, int64 ``[L]`` (one candidate per layer; the least violating one where none was feasible), and feasible,
        bool ``[1]``. Both on the CPU.

    Raises:
        ValueError: tensors that are not on the CPU or of another dtype or shape; seconds or target that are NaN.
    """
    given = starts.new_full((starts.numel() - 1,), -1) if start is None else start
    return torch.ops.clado.iqp_search(matrix, starts, rows, limits, given, seed, work, seconds, target)


def check_program(op: str, matrix: Tensor, starts: Tensor, rows: Tensor, limits: Tensor) -> None:
    """Shapes, dtypes and device that iqp_search and iqp_prove share."""
    for name, tensor, dtype, rank in (
        ("matrix", matrix, torch.float64, 2),
        ("starts", starts, torch.int64, 1),
        ("rows", rows, torch.int64, 2),
        ("limits", limits, torch.int64, 1),
    ):
        require(tensor.device.type == "cpu", op, name, "be on the CPU", tensor.device)
        require(tensor.dtype == dtype, op, name, f"be {dtype}", tensor.dtype)
        require(tensor.dim() == rank, op, name, f"have {rank} dimensions", tensor.dim())
    size = matrix.shape[0]
    require(matrix.shape == (size, size), op, "matrix", "be square", tuple(matrix.shape))
    require(starts.numel() >= 2, op, "starts", "hold at least one layer", starts.numel())
    require(rows.shape[1] == size, op, "rows", f"have {size} columns", rows.shape[1])
    require(rows.shape[0] == limits.shape[0], op, "limits", f"have {rows.shape[0]} entries", limits.shape[0])


def check_values(op: str, matrix: Tensor, starts: Tensor, choice: Tensor) -> None:
    """What only real tensors can be asked: layers that partition the candidates, a choice within them, finite G."""
    counts = starts[1:] - starts[:-1]
    whole = int(starts[0]) == 0 and int(starts[-1]) == matrix.shape[0]
    require(whole, op, "starts", f"run from 0 to {matrix.shape[0]}", starts.tolist())
    sound = bool(((counts >= 1) & (counts <= MOST_BITS)).all())
    require(sound, op, "starts", f"give every layer 1 to {MOST_BITS} candidates", counts.tolist())
    given = int(choice[0]) >= 0
    inside = not given or bool(((choice >= starts[:-1]) & (choice < starts[1:])).all())
    require(inside, op, "start", "hold a candidate of each layer", choice.tolist())
    require(bool(matrix.isfinite().all()), op, "matrix", "be finite", "NaN or infinity")


def program_addresses(
    matrix: Tensor, starts: Tensor, rows: Tensor, limits: Tensor
) -> tuple[int, int, int, int, int, int]:
    """First arguments of the native functions, for contiguous tensors."""
    layers, budgets = starts.numel() - 1, rows.shape[0]
    return matrix.data_ptr(), starts.data_ptr(), rows.data_ptr(), limits.data_ptr(), layers, budgets


def _allocate(
    matrix: Tensor,
    starts: Tensor,
    rows: Tensor,
    limits: Tensor,
    start: Tensor,
    seed: int,
    work: int,
    seconds: float,
    target: float,
) -> tuple[Tensor, Tensor]:
    check_program("iqp_search", matrix, starts, rows, limits)
    layers = starts.numel() - 1
    require(start.dtype == torch.int64, "iqp_search", "start", "be int64", start.dtype)
    require(start.shape == (layers,), "iqp_search", "start", f"have shape {(layers,)}", tuple(start.shape))
    require(seconds >= 0, "iqp_search", "seconds", "not be negative", seconds)
    require(not math.isnan(target), "iqp_search", "target", "be a number", target)
    return start.new_empty(layers), start.new_empty(1, dtype=torch.bool)


def _launch(
    matrix: Tensor,
    starts: Tensor,
    rows: Tensor,
    limits: Tensor,
    start: Tensor,
    seed: int,
    work: int,
    seconds: float,
    target: float,
    choice: Tensor,
    feasible: Tensor,
) -> None:
    matrix, starts, rows, limits = (tensor.contiguous() for tensor in (matrix, starts, rows, limits))
    check_values("iqp_search", matrix, starts, start)
    choice.copy_(start)
    feasible[0] = _native.iqp_search_cpu(
        *program_addresses(matrix, starts, rows, limits), choice.data_ptr(), seed, work, seconds, target
    )


define(
    "iqp_search(Tensor matrix, Tensor starts, Tensor rows, Tensor limits, Tensor start, int seed, int work, "
    "float seconds, float target) -> (Tensor, Tensor)",
    _allocate,
    _launch,
)
