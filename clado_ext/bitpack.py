"""Pack integer codes of 2 to 8 bits into int32 words, and back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._native import LEAST_BITS, MOST_BITS
from ._registry import Empty, call, checked, define, refusal, require, run


@checked
def pack(codes: Tensor, bits: int, dim: int = -1, out: Tensor | None = None) -> Tensor:
    """Pack signed codes into dense int32 words along one dimension.

    Stored is ``code + 2**(bits-1)``, least significant bit first, without gaps; every row ends on a whole word. For 2,
    4 and 8 bits this is the ``pack-quantized`` layout of compressed-tensors, which packs codes along the last dimension and zero
    points ``[out, groups]`` along ``dim=0``.

    Args:
        codes: int8 ``[..., K]`` (K at ``dim``), each in ``[-2**(bits-1), 2**(bits-1) - 1]``.
        bits: width, 2 to 8.
        dim: the dimension that is packed.
        out: to write into instead of new memory: contiguous, as returned; along the last dimension alone.

    Returns:
        contiguous int32 ``[..., ceil(K * bits / 32)]`` on the same device, the words at ``dim``.

    Raises:
        ValueError: wrong dtype, rank or width; on the CPU also a code outside its range (CUDA keeps its low bits).
    """
    if dim == -1:
        return run(_pack, (codes, bits), out)
    return _along(codes, dim, "pack", "codes", lambda c: _pack(c, bits), out)


@checked
def unpack(packed: Tensor, bits: int, columns: int, dim: int = -1, out: Tensor | None = None) -> Tensor:
    """Inverse of :func:`pack`.

    Args:
        packed: int32 ``[..., ceil(columns * bits / 32)]`` (the words at ``dim``).
        bits: width, 2 to 8.
        columns: number of codes per row, K.
        dim: the dimension that was packed.
        out: to write into instead of new memory: contiguous, as returned; along the last dimension alone.

    Returns:
        contiguous int8 ``[..., columns]`` on the same device, the codes at ``dim``.

    Raises:
        ValueError: wrong dtype, rank, width, or a last dimension that does not fit ``columns``.
    """
    if dim == -1:
        return run(_unpack, (packed, bits, columns), out)
    return _along(packed, dim, "unpack", "packed", lambda p: _unpack(p, bits, columns), out)


def packed_columns(columns: int, bits: int) -> int:
    """Number of int32 words that hold ``columns`` codes of ``bits`` bits."""
    return (columns * bits + 31) // 32


def _along(x: Tensor, dim: int, op: str, name: str, work: Callable[[Tensor], Tensor], out: Tensor | None) -> Tensor:
    """``work`` on ``x`` with ``dim`` moved to the end, and back."""
    require(out is None, op, "out", "be None where dim is not -1, since the kernel writes rows alone", "a tensor")
    require(x.dim() >= 1, op, name, "have at least one dimension", "0")
    require(-x.dim() <= dim < x.dim(), op, "dim", f"lie in {-x.dim()}..{x.dim() - 1}", dim)
    return work(x.movedim(dim, -1)).movedim(-1, dim).contiguous()


def _check_bits(op: str, bits: int) -> None:
    if not LEAST_BITS <= bits <= MOST_BITS:
        raise refusal(op, "bits", f"lie in {LEAST_BITS}..{MOST_BITS}", bits)


def _allocate_pack(empty: Empty, codes: Tensor, bits: int) -> Tensor:
    require(codes.dtype == torch.int8, "pack", "codes", "be int8", codes.dtype)
    require(codes.dim() >= 1, "pack", "codes", "have at least one dimension", "0")
    _check_bits("pack", bits)
    return empty(codes, (*codes.shape[:-1], packed_columns(codes.shape[-1], bits)), torch.int32)


def _launch_pack(codes: Tensor, bits: int, out: Tensor) -> None:
    columns = codes.shape[-1]
    rows = codes.numel() // columns if columns else 0
    source = codes.contiguous()
    inside = call("pack", codes.device, source.data_ptr(), out.data_ptr(), rows, columns, bits)
    if inside is False:
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        raise refusal("pack", "codes", f"lie in [{low}, {high}]", "a code outside")


def _allocate_unpack(empty: Empty, packed: Tensor, bits: int, columns: int) -> Tensor:
    op = "unpack"
    require(packed.dtype == torch.int32, op, "packed", "be int32", packed.dtype)
    require(packed.dim() >= 1, op, "packed", "have at least one dimension", "0")
    _check_bits(op, bits)
    require(columns >= 0, op, "columns", "not be negative", columns)
    words = packed_columns(columns, bits)
    if packed.shape[-1] != words:
        raise refusal(op, "packed", f"have {words} words per row", packed.shape[-1])
    return empty(packed, (*packed.shape[:-1], columns), torch.int8)


def _launch_unpack(packed: Tensor, bits: int, columns: int, out: Tensor) -> None:
    rows = out.numel() // columns if columns else 0
    source = packed.contiguous()
    call("unpack", packed.device, source.data_ptr(), out.data_ptr(), rows, columns, bits)


_pack = define("pack(Tensor codes, int bits) -> Tensor", _allocate_pack, _launch_pack)
_unpack = define("unpack(Tensor packed, int bits, int columns) -> Tensor", _allocate_unpack, _launch_unpack)
