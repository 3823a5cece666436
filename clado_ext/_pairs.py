"""What the ops of all pairs share: checks of both sides, of rows and their weights, and how the native module takes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _native
from ._losses import DTYPES, check_changes, computed
from ._registry import Empty, call, refusal


def check_weight(op: str, weight: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless ``weight`` is a floating-point tensor of that shape on that device."""
    if weight is None:
        return
    if weight.shape != shape:
        raise refusal(op, "weight", f"have shape [{', '.join(map(str, shape))}]", tuple(weight.shape))
    if weight.dtype not in DTYPES:
        raise refusal(op, "weight", "be a floating-point tensor", weight.dtype)
    if weight.device != device:
        raise refusal(op, "weight", f"be on {device}", weight.device)


def allocate_rows(
    op: str,
    check: Callable[[str, Tensor, Tensor], None],
    empty: Empty,
    logits: Tensor,
    delta: Tensor,
    weight: Tensor | None,
    rows_per_sample: int,
    other: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs of an op over rows of logits; ``check`` raises unless ``logits`` and ``delta`` are what it takes."""
    check(op, logits, delta)
    rows = logits.shape[0]
    if other is not None:
        check_changes(op, "other", other, "W", logits, "the logits")
    check_weight(op, weight, logits.shape[:1], logits.device)
    if rows_per_sample < 1 or rows % rows_per_sample:
        raise refusal(op, "rows_per_sample", f"be at least 1 and divide the {rows} rows", rows_per_sample)
    return empty_sums(empty, delta, other)


def empty_sums(empty: Empty, delta: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor]:
    """The outputs of an op of all pairs: float64 ``[V, W]``, twice."""
    shape = (delta.shape[0], delta.shape[0] if other is None else other.shape[0])
    return empty(delta, shape, torch.float64), empty(delta, shape, torch.float64)


def launch_rows(
    op: str,
    logits: Tensor,
    delta: Tensor,
    weight: Tensor | None,
    rows_per_sample: int,
    other: Tensor | None,
    total: Tensor,
    squares: Tensor,
) -> None:
    """Run a native op over rows of logits ``[R]`` or ``[R, C]``."""
    if nothing_to_do(len(logits), (total, squares)):
        return
    z, d, o = computed(logits), computed(delta), given(other)
    w = None if weight is None else weight.to(torch.float64).contiguous()
    pairs = numbers(d, o, len(z), z.shape[1] if z.dim() == 2 else 1)
    extra: tuple[int, ...] = ()
    if z.is_cuda:
        workspace = d.new_empty(getattr(_native, f"{op}_workspace")(pairs, rows_per_sample), dtype=torch.uint8)
        extra = (workspace.data_ptr(),)
    rows = (z.data_ptr(), address(w), rows_per_sample)
    call(op, z.device, pairs, rows, total.data_ptr(), squares.data_ptr(), *extra)


def nothing_to_do(rows: int, outputs: tuple[Tensor, Tensor]) -> bool:
    """True where there are no pairs, or no rows: the sums over none are 0."""
    if rows == 0:
        for x in outputs:
            x.zero_()
    return rows == 0 or outputs[0].numel() == 0


def numbers(delta: Tensor, other: Tensor | None, rows: int, width: int) -> _native.Pairs:
    """What :func:`computed` gave as the native functions take it; both have to outlive the call."""
    others = delta if other is None else other
    address = 0 if other is None else other.data_ptr()
    return delta.data_ptr(), address, len(delta), len(others), rows, width, delta.dtype == torch.float64


def given(x: Tensor | None) -> Tensor | None:
    """:func:`computed` of what may be left out."""
    return None if x is None else computed(x)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
