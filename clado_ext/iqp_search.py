"""Heuristics for the integer quadratic program that chooses a candidate for every layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _native
from ._program import check_program, check_values, numbers
from ._registry import Empty, checked, define, require


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
        starts: int64 ``[L + 1]``, ascending from 0 to V: layer i holds the candidates ``starts[i]:starts[i + 1]``, at
            least one and as many as it likes.
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
    return _iqp_search(matrix, starts, rows, limits, given, seed, work, seconds, target)


def _allocate(
    empty: Empty,
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
    return empty(start, (layers,), torch.int64), empty(start, (1,), torch.bool)


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
    program = numbers(matrix, starts, rows, limits)
    feasible[0] = _native.iqp_search_cpu(program, choice.data_ptr(), seed, work, seconds, target)


_iqp_search = define(
    "iqp_search(Tensor matrix, Tensor starts, Tensor rows, Tensor limits, Tensor start, int seed, int work, "
    "float seconds, float target) -> (Tensor, Tensor)",
    _allocate,
    _launch,
)
