"""Anything goes in: a Python exception with a readable line comes out, or the right answer; never a crash, never silence."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import clado_ext
from clado_ext import _native
from clado_ext.reference import bitpack as pack_oracle
from clado_ext.reference import fake_quant as oracle
from tests.ops.devices import same_bits

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
OTHERS = [torch.float64, torch.int8, torch.bool, torch.complex64]
SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, 1e-40, 3.4e38, -3.4e38, 65504.0]


@st.composite
def tensors(draw: st.DrawFn, dtypes: list[torch.dtype], least: int = 0, most: int = 3) -> torch.Tensor:
    """Any rank and sizes (zero too), strides (transposed, sliced, offset) and values (NaN, infinities, subnormals, zeros)."""
    sizes = draw(st.lists(st.integers(0, 9), min_size=least, max_size=most))
    dtype = draw(st.sampled_from(dtypes))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    full = torch.randn([2 * n + 3 for n in sizes]) * 10.0 ** draw(st.sampled_from([-40, -3, 0, 3, 30]))
    if draw(st.booleans()) and full.numel():
        full.view(-1)[:: draw(st.integers(1, 7))] = draw(st.sampled_from(SPECIAL))
    x = full.clamp(-100, 100).to(dtype) if dtype in (torch.int8, torch.bool) else full.to(dtype)
    x = x[tuple(slice(1, 1 + 2 * n, 2) for n in sizes)] if draw(st.booleans()) else x[tuple(slice(n) for n in sizes)]
    return x.transpose(0, -1) if x.dim() > 1 and draw(st.booleans()) else x


WIDTHS = st.lists(st.integers(0, 10), max_size=4)
GROUPS = st.integers(-2, 12)


def outcome(run: Callable[[], Any]) -> Any:
    """The result, or None after an error of one line that reads `op: argument must …, got …`."""
    try:
        return run()
    except ValueError as error:
        text = str(error)
    assert re.fullmatch(r"\w+: \w+ must .+, got .+", text)
    return None


@settings(max_examples=150)
@given(weight=tensors(FLOATS + OTHERS), bits=WIDTHS, group=GROUPS, steps=st.integers(-1, 101), symmetric=st.booleans())
def test_quantize_weight(weight: torch.Tensor, bits: list[int], group: int, steps: int, symmetric: bool) -> None:
    result = outcome(lambda: clado_ext.quantize_weight(weight, bits, group, steps, symmetric))
    sound = weight.dtype in FLOATS and weight.dim() >= 1 and (group == -1 or group > 0) and 1 <= steps <= 99
    sound &= len(bits) > 0 and bits == sorted(set(bits)) and bits[0] >= 2 and bits[-1] <= 8
    assert (result is not None) == sound
    if result is None or weight.numel() == 0:
        return
    values, _, scale, zero = result
    wanted, _ = oracle.fake_quant(weight, scale, bits, group, zero)
    torch.testing.assert_close(values, wanted, rtol=0, atol=0, equal_nan=True)
    codes = clado_ext.quantize(weight, scale, bits, group, zero)
    assert same_bits(codes, oracle.quantize(weight, scale, bits, group, zero))


@settings(max_examples=100)
@given(
    weight=tensors(FLOATS, least=2, most=2),
    scale=tensors([torch.float32, torch.float64], least=3),
    zero=st.none() | tensors([torch.int8, torch.float32], least=3),
)
def test_scales_that_do_not_belong(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> None:
    """Scales of any shape, zero, negative, NaN: refused by shape and dtype, or what the definition says."""
    fits = scale.shape == (1, len(weight), 1 if weight.shape[1] else 0) and scale.dtype == torch.float32
    fits &= zero is None or (zero.shape == scale.shape and zero.dtype == torch.int8)
    result = outcome(lambda: clado_ext.fake_quant(weight, scale, (4,), zero_point=zero))
    assert (result is not None) == fits


@settings(max_examples=100)
@given(codes=tensors([torch.int8, torch.float32, torch.int32]), bits=st.integers(0, 10), dim=st.integers(-4, 4))
def test_pack(codes: torch.Tensor, bits: int, dim: int) -> None:
    packed = outcome(lambda: clado_ext.pack(codes, bits, dim))
    if packed is None:
        return
    moved = codes.movedim(dim, -1)
    assert torch.equal(packed.movedim(dim, -1), pack_oracle.pack(moved, bits))
    assert torch.equal(clado_ext.unpack(packed, bits, codes.shape[dim], dim), codes)
    assert outcome(lambda: clado_ext.unpack(packed, bits, codes.shape[dim] + 33, dim)) is None


@settings(max_examples=100)
@given(
    logits=tensors([torch.float32, torch.float64, torch.int8]),
    delta=tensors([torch.float32, torch.float64]),
    fit=st.booleans(),
)
def test_losses(logits: torch.Tensor, delta: torch.Tensor, fit: bool) -> None:
    """NaN and infinity spoil what they touch, and a KL divergence is otherwise not negative."""
    if fit and logits.dim() == 2:
        size = delta.reshape(-1)[:1].nan_to_num().clamp(-50, 50) if delta.numel() else torch.ones(1)
        delta = size * torch.randn(2, *logits.shape)
        delta = delta.to(logits.dtype)
    increase = outcome(lambda: clado_ext.batched_ce(logits, delta))
    pairs = outcome(lambda: clado_ext.pairwise_ce(logits, delta))
    assert (increase is None) == (pairs is None)
    if increase is not None:
        assert increase.shape == delta.shape[:2]
        assert (increase.isnan() | (increase >= -1e-5)).all()
        finite = logits.isfinite().all(-1) & delta.isfinite().all(-1)
        assert not increase[finite & (logits.abs().amax(-1) < 1e30 if logits.numel() else finite)].isnan().any()


@settings(max_examples=100)
@given(
    rows=st.integers(-2, 3),
    columns=st.integers(-2, 40),
    group=st.integers(-2, 5),
    bits=WIDTHS,
    steps=st.integers(-1, 101),
    dtype=st.integers(-1, 4),
    null=st.booleans(),
)
def test_bindings_refuse_numbers_that_make_no_sense(
    rows: int, columns: int, group: int, bits: list[int], steps: int, dtype: int, null: bool
) -> None:
    space = np.zeros(8 * 4 * 40 * 8, np.int8)
    a = 0 if null else space.ctypes.data
    sound = (
        min(rows, columns) >= 0
        and group >= 1
        and dtype in (0, 1, 2)
        and len(bits) >= 1
        and all(2 <= b <= 8 for b in bits)
    )
    sound &= not null or rows * columns == 0
    calls = {
        "scale_search_cpu": ((a, dtype, a, 0, rows, columns, group, bits, steps, 1), sound and 1 <= steps <= 99),
        "quantize_weight_cpu": (
            (a, dtype, a, 0, a, a, rows, columns, group, bits, steps, 1),
            sound and 1 <= steps <= 99,
        ),
        "quantize_cpu": ((a, dtype, a, 0, a, rows, columns, group, bits, 1), sound),
    }
    for name, (arguments, fine) in calls.items():
        if fine:  # in place would not be safe to run: only what is refused is tried
            continue
        with pytest.raises(ValueError, match=f"^{name}: .* must "):
            getattr(_native, name)(*arguments)


def test_bindings_refuse_what_is_no_number() -> None:
    for arguments in ((), ("x",) * 6, (0, 0, 1, 1, 4), (0, 0, 2**70, 1, 4, 1), (None,) * 6):
        with pytest.raises(TypeError, match="pack_cpu"):
            _native.pack_cpu(*arguments)


def test_numpy_arrays_that_run_backwards_and_storage_that_is_not_aligned() -> None:
    backwards = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::-1]
    with pytest.raises(ValueError, match="negative strides"):
        torch.from_numpy(backwards)  # refused before it could reach an op
    raw = torch.zeros(4 * 50 + 1, dtype=torch.uint8)
    for offset in (1, 2, 3):
        weight = torch.from_numpy(np.frombuffer(raw.numpy().tobytes(), np.float32, 40, offset).reshape(4, 10).copy())
        odd = torch.frombuffer(
            bytearray(b"x" * offset + weight.numpy().tobytes()), dtype=torch.float32, offset=offset, count=40
        )
        assert odd.data_ptr() % 4 == offset % 4 or odd.data_ptr() % 4 == 0
        scale = clado_ext.scale_search(odd.view(4, 10), (4,))
        assert same_bits(clado_ext.fake_quant(odd.view(4, 10), scale, (4,)), clado_ext.fake_quant(weight, scale, (4,)))


def test_devices_must_agree() -> None:
    weight, scale = torch.zeros(2, 3), torch.ones(1, 2, 1)
    with pytest.raises(ValueError, match="fake_quant: scale must be on cpu, got meta"):
        clado_ext.fake_quant(weight, scale.to("meta"), (4,))
    with pytest.raises(ValueError, match="batched_ce: delta must be on cpu, got meta"):
        clado_ext.batched_ce(torch.zeros(2, 3), torch.zeros(1, 2, 3, device="meta"))
