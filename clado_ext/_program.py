"""What iqp_search and iqp_prove share: checks of an integer quadratic program and how the native module takes it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._registry import require


def check_program(op: str, matrix: Tensor, starts: Tensor, rows: Tensor, limits: Tensor) -> None:
    """Raise ``ValueError`` unless shapes, dtypes and device are those of a program (see :func:`clado_ext.iqp_search`)."""
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
    require(bool((counts >= 1).all()), op, "starts", "give every layer at least one candidate", counts.tolist())
    given = int(choice[0]) >= 0
    inside = not given or bool(((choice >= starts[:-1]) & (choice < starts[1:])).all())
    require(inside, op, "start", "hold a candidate of each layer", choice.tolist())
    require(bool(matrix.isfinite().all()), op, "matrix", "be finite", "NaN or infinity")


def numbers(matrix: Tensor, starts: Tensor, rows: Tensor, limits: Tensor) -> _native.Program:
    """A program of contiguous tensors, which have to outlive the call, as the native functions take it."""
    layers, budgets = starts.numel() - 1, rows.shape[0]
    return matrix.data_ptr(), starts.data_ptr(), rows.data_ptr(), limits.data_ptr(), layers, budgets
