"""Anything goes in: a Python exception with a readable line comes out, or the right answer; never a crash, never silence."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import clado_ext
from clado_ext import _native, _registry
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
    if logits.dim() == 2 and pairs is not None:
        rows, flat, changes = logits.shape[1], logits.reshape(-1), delta.reshape(len(delta), -1)
        assert outcome(lambda: clado_ext.pairwise_bce(flat, changes, None, rows)) is not None
        assert outcome(lambda: clado_ext.pairwise_mse(delta, logits.abs(), delta)) is not None
    if increase is not None:
        assert increase.shape == delta.shape[:2]
        assert (increase.isnan() | (increase >= -1e-5)).all()
        finite = logits.isfinite().all(-1) & delta.isfinite().all(-1)
        assert not increase[finite & (logits.abs().amax(-1) < 1e30 if logits.numel() else finite)].isnan().any()


@settings(max_examples=100)
@given(
    rows=st.integers(-2, 3),
    columns=st.integers(-2, 40),
    stride=st.integers(-2, 40),
    group=st.integers(-2, 5),
    bits=WIDTHS,
    steps=st.integers(-1, 101),
    dtype=st.integers(-1, 4),
    factors=st.integers(-1, 3),
    null=st.booleans(),
)
def test_bindings_refuse_numbers_that_make_no_sense(
    rows: int, columns: int, stride: int, group: int, bits: list[int], steps: int, dtype: int, factors: int, null: bool
) -> None:
    space = np.zeros(8 * 4 * 40 * 8, np.int8)
    a = 0 if null else space.ctypes.data
    whole = min(rows, columns, stride) >= 0 and group >= 1 and dtype in (0, 1, 2)
    whole &= not null or rows * columns == 0
    sound = whole and len(bits) >= 1 and all(2 <= b <= 8 for b in bits)
    given = ((a, dtype, rows, columns, stride, group), bits)
    targets = [(b, group, 0, 0, a, 0) for b in bits]
    formats = [(b, group, a, 0) for b in bits]
    calls = {
        "scale_search_cpu": (
            (given[0], targets, steps, (0, factors), 1),
            sound and 1 <= steps <= 99 and factors > 0 and rows % factors == 0,
        ),
        "scale_errors_cpu": (
            (given[0], (a, factors, -steps, steps), a, 1),
            whole and factors >= 0 and steps >= 0,
        ),
        "quantize_weight_cpu": ((*given, steps, a, 0, a, a, 1), sound and 1 <= steps <= 99),
        "fake_quant_cpu": ((given[0], formats, a, a, 1), sound),
        "quantize_cpu": ((given[0], formats, a, 1), sound),
        "compensate_cpu": (
            (*given, (a, 0, factors, stride, stride, 1), a, 0, a, a, 1),
            sound and factors > 0 and rows % factors == 0,
        ),
    }
    for name, (arguments, fine) in calls.items():
        if fine:  # in place would not be safe to run: only what is refused is tried
            continue
        with pytest.raises(ValueError, match=f"^{name}: .* must "):
            getattr(_native, name)(*arguments)


def test_bindings_of_pairs_refuse_numbers_that_make_no_sense() -> None:
    space = np.zeros(4096)
    a = space.ctypes.data
    for sides, rows, text in (
        ((a, 0, -1, -1, 4, 3), (a, 0, 1), "sizes must not be negative"),
        ((a, 0, 2, 3, 4, 3), (a, 0, 1), "others must be as many as the perturbations"),
        ((a, 0, 2, 2, 4, 0), (a, 0, 1), "the width must be positive"),
        ((0, 0, 2, 2, 4, 3), (a, 0, 1), "addresses must not be null"),
        ((a, 0, 2, 2, 4, 3), (0, 0, 1), "addresses must not be null"),
        ((a, 0, 2, 2, 4, 3), (a, 0, 3), "rows per sample must divide the rows"),
        ((a, 0, 2, 2, 4, 3), (a, 0, 0), "rows per sample must divide the rows"),
    ):
        with pytest.raises(ValueError, match=f"^pairwise_ce_cpu: {text}"):
            _native.pairwise_ce_cpu((*sides, False), rows, a, a, 1)
    with pytest.raises(ValueError, match=r"^pairwise_bce_cpu: the width must be 1"):
        _native.pairwise_bce_cpu((a, 0, 2, 2, 4, 3, False), (a, 0, 1), a, a, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"element": 9}, r"bits must lie in 2\.\.8"),
        ({"element": 19}, r"element must lie in 16\.\.18"),
        ({"zeros": 1}, "zeros and rule must be those of the element"),
        ({"element": 4}, "zeros and rule must be those of the element"),
        ({"rule": 3}, r"rule must lie in 0\.\.2"),
        ({"below": 0}, "a tensor's scale must come with the rule e4m3 alone"),
        ({"rule": 1}, "a tensor's scale must come with the rule e4m3 alone"),
        ({"group": 0}, "group_size must be positive"),
        ({"scales": 0}, "addresses must not be null"),
    ],
)
def test_bindings_refuse_formats_that_make_no_sense(change: dict[str, int], message: str) -> None:
    space = np.ones(64, np.float32)
    a = space.ctypes.data
    target = {"element": 16, "group": 16, "rule": 2, "below": a, "scales": a, "zeros": 0} | change
    with pytest.raises(ValueError, match=f"^scale_search_cpu: {message}"):
        _native.scale_search_cpu((a, 0, 1, 16, 16, 16), [tuple(target.values())], 5, (0, 1), 1)
    for name, weight in (("fake_quant_cpu", (a, a)), ("quantize_cpu", (a,))):
        with pytest.raises(ValueError, match=f"^{name}: zeros must be those of an integer"):
            getattr(_native, name)((a, 0, 1, 16, 16, 16), [(16, 16, a, a)], *weight, 1)
        with pytest.raises(ValueError, match=rf"^{name}: the number of formats must lie in 1\.\.16"):
            getattr(_native, name)((a, 0, 1, 16, 16, 16), [(16, 16, a, 0)] * 17, *weight, 1)


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


WEIGHT, SCALE, CODES = torch.ones(2, 4), torch.ones(2, 2, 1), torch.zeros(2, 4, dtype=torch.int8)
VALUES, SQERR, WORDS = torch.zeros(2, 2, 4), torch.zeros(2, 2, dtype=torch.float64), clado_ext.pack(CODES, 4)
GOOD: dict[str, dict[str, Any]] = {
    "fake_quant": {"weight": WEIGHT, "scale": SCALE, "bits": (2, 4)},
    "quantize": {"weight": WEIGHT, "scale": SCALE, "bits": (2, 4)},
    "compensate": {"weight": WEIGHT, "factor": torch.eye(4)[None], "scale": SCALE, "bits": (2, 4)},
    "quantize_weight": {"weight": WEIGHT, "bits": (2, 4)},
    "scale_errors": {"weight": WEIGHT, "scale": SCALE, "low": -8, "high": 7},
    "scale_search": {"weight": WEIGHT, "bits": (2, 4)},
    "range_search": {"weight": WEIGHT, "bits": (2, 4)},
    "straight_through": {"weight": WEIGHT, "scale": SCALE, "bits": (2, 4)},
    "dequantize": {"codes": CODES[None], "scale": SCALE[:1]},
    "pack": {"codes": CODES, "bits": 4},
    "unpack": {"packed": WORDS, "bits": 4, "columns": 4},
    "batched_ce": {"logits": WEIGHT, "delta": VALUES},
    "pairwise_bce": {"logits": WEIGHT[0], "delta": WEIGHT, "weight": WEIGHT[0], "rows_per_sample": 2, "other": WEIGHT},
    "pairwise_ce": {"logits": WEIGHT, "delta": VALUES, "rows_per_sample": 2, "other": VALUES},
    "pairwise_mse": {"delta": VALUES, "weight": WEIGHT, "other": VALUES},
    "carried_gelu": {"clean": WEIGHT, "delta": WEIGHT},
}
WRONG: dict[str, tuple[Any, ...]] = {
    "bits": (4.0, (4.0,), "4", torch.tensor([2.0, 4.0]), None),
    "group_size": (2.5, "4", None),
    "columns": (4.0,),
    "low": (-8.0, "x", None),
    "dim": (0.5,),
    **{name: (np.ones((2, 4), np.float32), None, [1.0], WEIGHT.to_sparse()) for name in ("weight", "codes", "packed")},
    **{name: (np.ones((2, 2, 1), np.float32), None) for name in ("scale", "values", "logits", "delta", "clean")},
    "zero_point": ([0],),
    "factor": (np.ones((1, 4, 4), np.float32), None),
    "order": ([[0, 1, 2, 3]],),
    "target": ([0, 1],),
    "importance": ([1.0] * 4, np.ones(4, np.float32), WEIGHT.to_sparse()),
    "bfloat16": ("yes",),
    "rows_per_sample": (0, 3, 1.5, None),
    "out": ([1.0], np.ones((2, 2, 4), np.float32), WEIGHT.to_sparse(), (WEIGHT, [1.0])),
    "other": (np.ones((2, 2, 4), np.float32), torch.ones(2, 2, 4, dtype=torch.float64), [1.0], WEIGHT.to_sparse()),
}


@pytest.mark.parametrize("op", list(GOOD))
def test_arguments_of_a_wrong_type_are_refused_in_one_line(op: str) -> None:
    call = getattr(clado_ext, op)
    call(**GOOD[op])
    for name, parameter in inspect.signature(call).parameters.items():
        optional = parameter.annotation.endswith(" | None")
        for value in (x for x in WRONG.get(name, ()) if x is not None or not optional):
            assert outcome(lambda name=name, value=value: call(**GOOD[op] | {name: value})) is None, (name, value)


def test_the_refusal_of_a_type_says_what_was_given() -> None:
    for change, text in (
        ({"bits": 4}, "bits must be a sequence of integers, got 4"),
        ({"bits": (4.0,)}, "bits must be a sequence of integers, got (4.0,)"),
        ({"group_size": 2.5}, "group_size must be an integer, got 2.5"),
        ({"weight": None}, "weight must be a dense tensor on cpu or cuda, got None"),
        ({"weight": WEIGHT.to_sparse()}, "weight must be a dense tensor on cpu or cuda, got a torch.sparse_coo tensor"),
    ):
        with pytest.raises(ValueError, match=f"^fake_quant: {re.escape(text)}"):
            clado_ext.fake_quant(**GOOD["fake_quant"] | change)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'bits'"):
        clado_ext.fake_quant(WEIGHT, SCALE)


def test_every_annotation_of_a_public_function_has_its_check() -> None:
    for name in clado_ext.__all__:
        function = getattr(clado_ext, name)
        if hasattr(function, "__wrapped__"):
            kinds = {p.annotation.removesuffix(" | None") for p in inspect.signature(function).parameters.values()}
            assert kinds <= _registry._TYPES.keys(), name
