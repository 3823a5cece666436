"""Pack integer codes of 2 to 8 bits into int32 words, and back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._native import LEAST_BITS, MOST_BITS
from ._registry import call, check_output, checked, define, fill, refusal, require


@checked
def pack(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Pack signed codes into dense int32 words along one dimension.

    Stored is ``code + 2**(bits-1)``, least significant bit first, without gaps; every row ends on a whole word. For 2,
    4 and 8 bits this is the ``pack-quantized`` layout of compressed-tensors, which packs codes along the last dimension and zero
    points ``[out, groups]`` along ``dim=0``.

    Args:
        codes: int8 ``[..., K]`` (K at ``dim``), each in ``[-2**(bits-1), 2**(bits-1) - 1]``.
        bits: width, 2 to 8.
        dim: the dimension that is packed.

    Returns:
        contiguous int32 ``[..., ceil(K * bits / 32)]`` on the same device, the words at ``dim``.

    Raises:
        ValueError: wrong dtype, rank or width; on the CPU also a code outside its range (CUDA keeps its low bits).
    """
    return _along(codes, dim, "pack", "codes", lambda c: _pack(c, bits))


@checked
def unpack(packed: Tensor, bits: int, columns: int, dim: int = -1) -> Tensor:
    """Inverse of :func:`pack`.

    Args:
        packed: int32 ``[..., ceil(columns * bits / 32)]`` (the words at ``dim``).
        bits: width, 2 to 8.
        columns: number of codes per row, K.
        dim: the dimension that was packed.

    Returns:
        contiguous int8 ``[..., columns]`` on the same device, the codes at ``dim``.

    Raises:
        ValueError: wrong dtype, rank, width, or a last dimension that does not fit ``columns``.
    """
    return _along(packed, dim, "unpack", "packed", lambda p: _unpack(p, bits, columns))


@checked
def pack_into(codes: Tensor, bits: int, packed: Tensor) -> None:
    """:func:`pack` along the last dimension into words the caller owns, of the shape given there and contiguous.

    Raises:
        ValueError: as :func:`pack` (``packed`` is then unspecified), or an output of another shape, dtype, device or layout.
    """
    check_output("pack_into", "packed", packed, codes, _packed_shape("pack_into", codes, bits), torch.int32)
    fill(_launch_pack, (codes, bits), (packed,))


@checked
def unpack_into(packed: Tensor, bits: int, codes: Tensor) -> None:
    """:func:`unpack` along the last dimension into codes the caller owns: contiguous int8 ``[..., columns]``.

    Raises:
        ValueError: as :func:`unpack`, or an output of another shape, dtype, device or layout.
    """
    columns = codes.shape[-1] if codes.dim() else 0
    check_output("unpack_into", "codes", codes, packed, _codes_shape("unpack_into", packed, bits, columns), torch.int8)
    fill(_launch_unpack, (packed, bits, columns), (codes,))


def packed_columns(columns: int, bits: int) -> int:
    """Number of int32 words that hold ``columns`` codes of ``bits`` bits."""
    return (columns * bits + 31) // 32


def _along(x: Tensor, dim: int, op: str, name: str, run: Callable[[Tensor], Tensor]) -> Tensor:
    """``run`` on ``x`` with ``dim`` moved to the end, and back."""
    if dim == -1:
        return run(x)
    require(x.dim() >= 1, op, name, "have at least one dimension", "0")
    require(-x.dim() <= dim < x.dim(), op, "dim", f"lie in {-x.dim()}..{x.dim() - 1}", dim)
    return run(x.movedim(dim, -1)).movedim(-1, dim).contiguous()


def _check_bits(op: str, bits: int) -> None:
    if not LEAST_BITS <= bits <= MOST_BITS:
        raise refusal(op, "bits", f"lie in {LEAST_BITS}..{MOST_BITS}", bits)


def _packed_shape(op: str, codes: Tensor, bits: int) -> tuple[int, ...]:
    require(codes.dtype == torch.int8, op, "codes", "be int8", codes.dtype)
    require(codes.dim() >= 1, op, "codes", "have at least one dimension", "0")
    _check_bits(op, bits)
    return (*codes.shape[:-1], packed_columns(codes.shape[-1], bits))


def _allocate_pack(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty(_packed_shape("pack", codes, bits), dtype=torch.int32)


def _launch_pack(codes: Tensor, bits: int, out: Tensor) -> None:
    columns = codes.shape[-1]
    rows = codes.numel() // columns if columns else 0
    source = codes.contiguous()
    inside = call("pack", codes.device, source.data_ptr(), out.data_ptr(), rows, columns, bits)
    if inside is False:
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        raise refusal("pack", "codes", f"lie in [{low}, {high}]", "a code outside")


def _codes_shape(op: str, packed: Tensor, bits: int, columns: int) -> tuple[int, ...]:
    require(packed.dtype == torch.int32, op, "packed", "be int32", packed.dtype)
    require(packed.dim() >= 1, op, "packed", "have at least one dimension", "0")
    _check_bits(op, bits)
    require(columns >= 0, op, "columns", "not be negative", columns)
    words = packed_columns(columns, bits)
    if packed.shape[-1] != words:
        raise refusal(op, "packed", f"have {words} words per row", packed.shape[-1])
    return (*packed.shape[:-1], columns)


def _allocate_unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    return packed.new_empty(_codes_shape("unpack", packed, bits, columns), dtype=torch.int8)


def _launch_unpack(packed: Tensor, bits: int, columns: int, out: Tensor) -> None:
    rows = out.numel() // columns if columns else 0
    source = packed.contiguous()
    call("unpack", packed.device, source.data_ptr(), out.data_ptr(), rows, columns, bits)


_pack = define("pack(Tensor codes, int bits) -> Tensor", _allocate_pack, _launch_pack)
_unpack = define("unpack(Tensor packed, int bits, int columns) -> Tensor", _allocate_unpack, _launch_unpack)
