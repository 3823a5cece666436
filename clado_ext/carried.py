"""What a nonlinear op makes of a small difference of its input, f(x + d) − f(x), without cancellation, for many streams at once.

Differences are carried through a network so that matrix products may run in TF32 or bfloat16 (see ``clado``'s ``precision``):
their rounding is then relative to the difference, not to the activation. These ops fuse the memory-bound part between products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._registry import Empty, call, checked, define, refusal, run

_HALF = (torch.float32, torch.bfloat16)


@checked
def carried_gelu(clean: Tensor, delta: Tensor, bfloat16: bool = False, out: Tensor | None = None) -> Tensor:
    """gelu(x + d) − gelu(x), the exact GELU x·Φ(x), as d·Φ(x + d) + x·(Φ(x + d) − Φ(x)).

    Args:
        clean: x, float32 ``[N, …]``.
        delta: d, ``[S·N, …]`` of S streams, float32 or bfloat16.
        bfloat16: give bfloat16, what the next product takes, instead of float32.
        out: to write into instead of new memory: contiguous, as returned.

    Returns:
        ``[S·N, …]``; relative error near 1e-5 of the difference in float32 (Φ: Abramowitz and Stegun 7.1.26).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    return run(_carried_gelu, (clean, delta, bfloat16), out)


@checked
def carried_layer_norm(
    clean: Tensor,
    delta: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    bfloat16: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Layer norm over the last dimension: LN(x + d) − LN(x), from the change of the variance; a bias would drop out.

    Args:
        clean: x, float32 ``[N, …, C]``.
        delta: d, ``[S·N, …, C]``, float32 or bfloat16.
        weight: float32 ``[C]`` or None.
        eps: added to the variance.
        bfloat16: give bfloat16 instead of float32.
        out: to write into instead of new memory: contiguous, as returned.

    Returns:
        ``[S·N, …, C]``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    return run(_carried_layer_norm, (clean, delta, weight, eps, bfloat16), out)


@checked
def carried_add_layer_norm(
    clean: Tensor,
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    bfloat16: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of two differences, and :func:`carried_layer_norm` of it, in one pass: a residual connection and its norm.

    Args:
        clean: x, float32 ``[N, …, C]``, the clean sum.
        residual: float32 ``[S·N, …, C]``.
        branch: as ``residual``, or bfloat16.
        weight: float32 ``[C]`` or None.
        eps: added to the variance.
        bfloat16: give the second result in bfloat16 instead of float32.
        out: to write into instead of new memory: contiguous, as returned.

    Returns:
        d = residual + branch, float32, and layer_norm(x + d) − layer_norm(x), both ``[S·N, …, C]``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    return run(_carried_add_layer_norm, (clean, residual, branch, weight, eps, bfloat16), out)


@checked
def carried_softmax(
    scores: Tensor,
    clean: Tensor,
    delta: Tensor,
    scale: float = 1.0,
    bfloat16: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Softmax over the last dimension of s + scale·d: its change against p = softmax(s), and itself.

    Args:
        scores: s, float32 ``[N, …, K]``; read only where scale·d reaches beyond 30.
        clean: p, as ``scores``.
        delta: d, ``[S·N, …, K]``, float32 or bfloat16.
        scale: factor on d alone.
        bfloat16: give bfloat16 instead of float32.
        out: to write into instead of new memory: contiguous, as returned.

    Returns:
        ``[S·N, …, 2K]``: softmax(s + scale·d) − p, then softmax(s + scale·d), side by side as attention multiplies them by v
        and dv.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    return run(_carried_softmax, (scores, clean, delta, scale, bfloat16), out)


def _check(op: str, clean: Tensor, delta: Tensor, name: str = "delta") -> None:
    if clean.dtype != torch.float32 or clean.dim() < 1:
        raise refusal(op, "clean", "be float32 [N, …]", f"{clean.dtype} {tuple(clean.shape)}")
    if delta.dtype not in _HALF:
        raise refusal(op, name, "be float32 or bfloat16", delta.dtype)
    rows = clean.shape[0]
    if delta.shape[1:] != clean.shape[1:] or (delta.shape[0] % rows if rows else delta.shape[0]) != 0:
        must = f"have shape [S·{rows}, {', '.join(map(str, clean.shape[1:]))}]"
        raise refusal(op, name, must, tuple(delta.shape))
    if delta.device != clean.device:
        raise refusal(op, name, f"be on {clean.device}", delta.device)


def _check_weight(op: str, clean: Tensor, weight: Tensor | None) -> None:
    if weight is not None and (weight.dtype != torch.float32 or weight.shape != clean.shape[-1:]):
        raise refusal(op, "weight", f"be float32 [{clean.shape[-1]}]", f"{weight.dtype} {tuple(weight.shape)}")


def _dtype(bfloat16: bool) -> torch.dtype:
    return torch.bfloat16 if bfloat16 else torch.float32


def _streams(clean: Tensor, delta: Tensor, bfloat16: bool) -> _native.Streams:
    columns = clean.shape[-1]
    rows = clean.numel() // columns if columns else 0
    return delta.shape[0] // max(1, clean.shape[0]), rows, columns, delta.dtype == torch.bfloat16, bfloat16


def _allocate_gelu(empty: Empty, clean: Tensor, delta: Tensor, bfloat16: bool) -> Tensor:
    _check("carried_gelu", clean, delta)
    return empty(delta, delta.shape, _dtype(bfloat16))


def _launch_gelu(clean: Tensor, delta: Tensor, bfloat16: bool, out: Tensor) -> None:
    x, d = clean.contiguous(), delta.contiguous()
    addresses = (x.data_ptr(), d.data_ptr(), out.data_ptr())
    call("carried_gelu", x.device, *addresses, _streams(clean, delta, bfloat16))


def _allocate_layer_norm(
    empty: Empty, clean: Tensor, delta: Tensor, weight: Tensor | None, eps: float, bfloat16: bool
) -> Tensor:
    _check("carried_layer_norm", clean, delta)
    _check_weight("carried_layer_norm", clean, weight)
    return empty(delta, delta.shape, _dtype(bfloat16))


def _launch_layer_norm(
    clean: Tensor, delta: Tensor, weight: Tensor | None, eps: float, bfloat16: bool, out: Tensor
) -> None:
    x, d, w = clean.contiguous(), delta.contiguous(), None if weight is None else weight.contiguous()
    addresses = (x.data_ptr(), d.data_ptr(), 0 if w is None else w.data_ptr(), out.data_ptr())
    call("carried_layer_norm", x.device, *addresses, _streams(clean, delta, bfloat16), eps)


def _allocate_add_layer_norm(
    empty: Empty,
    clean: Tensor,
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    eps: float,
    bfloat16: bool,
) -> tuple[Tensor, Tensor]:
    op = "carried_add_layer_norm"
    _check(op, clean, branch, "branch")
    _check_weight(op, clean, weight)
    if residual.dtype != torch.float32 or residual.shape != branch.shape or residual.device != branch.device:
        raise refusal(op, "residual", f"be float32 {tuple(branch.shape)}", f"{residual.dtype} {tuple(residual.shape)}")
    return empty(residual, residual.shape, torch.float32), empty(residual, residual.shape, _dtype(bfloat16))


def _launch_add_layer_norm(
    clean: Tensor,
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    eps: float,
    bfloat16: bool,
    total: Tensor,
    out: Tensor,
) -> None:
    x, r, b = clean.contiguous(), residual.contiguous(), branch.contiguous()
    w = None if weight is None else weight.contiguous()
    addresses = [0 if t is None else t.data_ptr() for t in (x, r, b, w, total, out)]
    call("carried_add_layer_norm", x.device, *addresses, _streams(clean, branch, bfloat16), eps)


def _allocate_softmax(
    empty: Empty, scores: Tensor, clean: Tensor, delta: Tensor, scale: float, bfloat16: bool
) -> Tensor:
    _check("carried_softmax", clean, delta)
    if scores.dtype != torch.float32 or scores.shape != clean.shape or scores.device != clean.device:
        raise refusal("carried_softmax", "scores", "be as clean", f"{scores.dtype} {tuple(scores.shape)}")
    return empty(delta, (*delta.shape[:-1], 2 * delta.shape[-1]), _dtype(bfloat16))


def _launch_softmax(scores: Tensor, clean: Tensor, delta: Tensor, scale: float, bfloat16: bool, out: Tensor) -> None:
    s, p, d = scores.contiguous(), clean.contiguous(), delta.contiguous()
    addresses = (s.data_ptr(), p.data_ptr(), d.data_ptr(), out.data_ptr())
    call("carried_softmax", p.device, *addresses, _streams(clean, delta, bfloat16), scale)


_carried_gelu = define(
    "carried_gelu(Tensor clean, Tensor delta, bool bfloat16) -> Tensor", _allocate_gelu, _launch_gelu
)
_carried_layer_norm = define(
    "carried_layer_norm(Tensor clean, Tensor delta, Tensor? weight, float eps, bool bfloat16) -> Tensor",
    _allocate_layer_norm,
    _launch_layer_norm,
)
_carried_add_layer_norm = define(
    "carried_add_layer_norm(Tensor clean, Tensor residual, Tensor branch, Tensor? weight, float eps, bool bfloat16)"
    " -> (Tensor, Tensor)",
    _allocate_add_layer_norm,
    _launch_add_layer_norm,
)
_carried_softmax = define(
    "carried_softmax(Tensor scores, Tensor clean, Tensor delta, float scale, bool bfloat16) -> Tensor",
    _allocate_softmax,
    _launch_softmax,
)
