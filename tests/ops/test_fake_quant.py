"""fake_quant, quantize and dequantize against the plain-torch twin: codes and values are exact."""

import io
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import clado_ext
from clado_ext._weights import given as given_as
from clado_ext.reference import fake_quant as oracle
from tests.ops.devices import DEVICES, at_every_cpu_setting, same_bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = (2, 3, 4, 5, 6, 7, 8)


def weight_of(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 1, 7, 32, 1024])
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (5, 33), (2, 1024), (3, 1025), (4, 8, 3, 3), (1, 5000), (6,)])
def test_matches_oracle(
    shape: tuple[int, ...], group_size: int, symmetric: bool, dtype: torch.dtype, device: str
) -> None:
    weight = weight_of(shape, dtype, device)
    values, sqerr, scale, zero = clado_ext.quantize_weight(weight, BITS, group_size, 9, symmetric)
    assert (zero is None) == symmetric
    codes = clado_ext.quantize(weight, scale, BITS, group_size, zero)
    wanted, errors = oracle.fake_quant(weight, scale, BITS, group_size, zero)
    assert same_bits(codes, oracle.quantize(weight, scale, BITS, group_size, zero))
    assert torch.equal(values, wanted)
    assert torch.equal(clado_ext.dequantize(codes, scale, group_size, dtype, zero), values)
    # Lanes add up to 32 squares in float32 before they meet float64: relative error below 40 roundings.
    torch.testing.assert_close(sqerr, errors, rtol=40 * 2**-24, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [slice(0, 40), slice(8, 48), slice(3, 36), slice(0, 1100)])
def test_rows_that_lie_apart_are_read_in_place(part: slice, dtype: torch.dtype, device: str) -> None:
    weight = weight_of((5, 1200), dtype, device)[:, part]
    kept, _ = given_as(weight, 16)
    assert kept is weight
    for view in (weight, weight[:1].expand(4, -1), weight.t(), weight[::2]):
        for symmetric in (True, False):
            found = clado_ext.quantize_weight(view, (2, 4, 8), 16, 9, symmetric)
            wanted = clado_ext.quantize_weight(view.contiguous(), (2, 4, 8), 16, 9, symmetric)
            assert all(same_bits(x, y) for x, y in zip(found, wanted, strict=True) if x is not None)
            codes = clado_ext.quantize(view, found.scale, (2, 4, 8), 16, found.zero_point)
            assert same_bits(codes, clado_ext.quantize(view.contiguous(), found.scale, (2, 4, 8), 16, found.zero_point))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [-1, 7, 128])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2050), (64, 100), (1, 70_000), (9, 2, 3, 3), (0, 5), (5, 0)])
def test_search_and_quantization_in_one_are_the_two_calls(
    shape: tuple[int, ...], group_size: int, dtype: torch.dtype, device: str
) -> None:
    weight = weight_of(shape, dtype, device)
    if weight.numel() > 100:
        weight[0].view(-1)[3], weight[-1] = torch.nan, 0.0
    for symmetric in (True, False):
        scale, zero = clado_ext.scale_search(weight, (2, 4, 8), group_size, 20), None
        if not symmetric:
            scale, zero = clado_ext.range_search(weight, (2, 4, 8), group_size, 20)
        values, sqerr = clado_ext.fake_quant(weight, scale, (2, 4, 8), group_size, zero)
        wanted = (values, sqerr, scale, *(() if zero is None else (zero,)))

        def run(symmetric: bool = symmetric) -> tuple[torch.Tensor, ...]:
            got = clado_ext.quantize_weight(weight, (2, 4, 8), group_size, 20, symmetric)
            assert (got.zero_point is None) == symmetric
            return tuple(x for x in got if x is not None)

        results = at_every_cpu_setting(run) if device == "cpu" else [run()]
        assert all(same_bits(r, wanted) for r in results)


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 70),
    group=st.integers(-1, 40).filter(bool),
    exponent=st.integers(-130, 120),
    seed=st.integers(0, 2**31),
)
def test_codes_are_those_of_the_definition_at_any_magnitude(
    rows: int, columns: int, group: int, exponent: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * 2.0**exponent
    scale = clado_ext.scale_search(weight, (2, 5, 8), group, steps=3)
    assert same_bits(
        clado_ext.quantize(weight, scale, (2, 5, 8), group), oracle.quantize(weight, scale, (2, 5, 8), group)
    )


def test_ties_round_to_even() -> None:
    weight = torch.arange(-8, 8).float().unsqueeze(0) + 0.5
    codes = clado_ext.quantize(weight, torch.ones(1, 1, 1), (4,))
    assert codes[0, 0].tolist() == [-8, -6, -6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6, 7]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 31, 33, 1030])
def test_errors_end_with_the_row_where_zero_has_no_code(columns: int, dtype: torch.dtype, device: str) -> None:
    weight = weight_of((2, columns), dtype, device)
    scale = torch.full((1, 2, 1), 0.1, device=device)
    zeros = torch.full_like(scale, 67, dtype=torch.int8)  # at 4 bits a zero becomes step -60
    values, sqerr = clado_ext.fake_quant(weight, scale, (4,), zero_point=zeros)
    wanted, errors = oracle.fake_quant(weight, scale, (4,), zero_point=zeros)
    assert torch.equal(values, wanted)
    torch.testing.assert_close(sqerr, errors, rtol=40 * 2**-24, atol=0)


def near_ties(scale: torch.Tensor, bits: int, zero: int, dtype: torch.dtype) -> torch.Tensor:
    """For every scale a row of weights at and a few units in the last place around all ties, codes and limits."""
    halves = torch.arange(-(2**bits) - 3, 2**bits + 4) / 2 - zero
    weight = (scale.unsqueeze(1) * halves).to(dtype)
    whole = weight.view(torch.int32 if dtype == torch.float32 else torch.int16)
    return torch.cat([(whole + ulps).view(dtype) for ulps in range(-4, 5)], 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "zero"), [(2, 0), (3, 2), (4, 0), (4, -8), (5, 0), (8, 0), (8, 127), (8, -128)])
def test_codes_beside_ties_are_those_of_the_true_quotient(bits: int, zero: int, dtype: torch.dtype) -> None:
    """A product with the reciprocal would be off by a step here; scales whose reciprocal is no normal number among them."""
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    odd = torch.tensor([1.0, -0.5, tiny, tiny / 8, 1e-45, 2.0**126, 2.0**127, huge, 1 / 3, 0.0])
    scale = torch.cat([odd, torch.rand(60) + 0.5, torch.rand(20) * 2.0**-20])
    weight = near_ties(scale, bits, zero, dtype)
    weight[11, 5], weight[12, 6], weight[13, 7] = torch.nan, torch.inf, -torch.inf
    scale = scale.view(1, -1, 1)
    zeros = torch.full_like(scale, zero, dtype=torch.int8)
    wanted = oracle.fake_quant(weight, scale, (bits,), zero_point=zeros)[0]
    codes = oracle.quantize(weight, scale, (bits,), zero_point=zeros)

    def run() -> tuple[torch.Tensor, ...]:
        values = clado_ext.fake_quant(weight, scale, (bits,), zero_point=zeros)
        return *values, clado_ext.quantize(weight, scale, (bits,), zero_point=zeros)

    results = at_every_cpu_setting(run)
    assert all(same_bits(r, results[0]) for r in results)
    torch.testing.assert_close(results[0][0], wanted, rtol=0, atol=0, equal_nan=True)
    assert same_bits(results[0][2], codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_at_every_simd_level_and_thread_count(dtype: torch.dtype) -> None:
    weight = weight_of((7, 3333), dtype)
    scale, zero = clado_ext.range_search(weight, BITS, 100)
    results = at_every_cpu_setting(lambda: clado_ext.fake_quant(weight, scale, BITS, 100, zero))
    assert all(same_bits(r, results[0]) for r in results)
    codes = at_every_cpu_setting(lambda: clado_ext.quantize(weight, scale, BITS, 100, zero))
    assert all(same_bits(r, codes[0]) for r in codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_every_device(dtype: torch.dtype) -> None:
    weight = weight_of((17, 2500), dtype)
    results = []
    for device in DEVICES:
        w = weight.to(device)
        values, sqerr, scale, zero = clado_ext.quantize_weight(w, BITS, 300, symmetric=False)
        assert zero is not None
        codes = clado_ext.quantize(w, scale, BITS, 300, zero)
        results.append(
            tuple(x.cpu() for x in (clado_ext.scale_search(w, BITS, 300), scale, zero, values, sqerr, codes))
        )
    assert all(same_bits(r, results[0]) for r in results)


def test_half_precision_is_read_and_written_exactly() -> None:
    """Every float16 and bfloat16 bit pattern, with a scale of 2^e so that codes up to 127 come back unrounded."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        weight = patterns.view(dtype).unsqueeze(0)
        scale = torch.full((1, 1, 1), 2.0**-20)
        values, _ = clado_ext.fake_quant(weight, scale, (8,))
        wanted = (torch.round(weight.float() / 2.0**-20).clamp(-128, 127) * 2.0**-20).to(dtype)
        assert torch.equal(values[0].isnan(), weight.isnan())
        assert torch.equal(values[0].nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("symmetric", [True, False])
def test_straight_through_is_one_inside_the_range_and_zero_beyond(symmetric: bool) -> None:
    weight = torch.randn(3, 4, 5, requires_grad=True)
    scale = torch.full((2, 3, 2), 0.3)
    zero = None if symmetric else torch.full((2, 3, 2), -2, dtype=torch.int8)
    values = clado_ext.straight_through(weight, scale, (2, 4), 16, zero)
    assert torch.equal(values, clado_ext.fake_quant(weight, scale, (2, 4), 16, zero)[0])
    slopes = torch.randn_like(values)
    (values * slopes).sum().backward()
    low, shift = (-2, 0) if symmetric else (0, -2)
    steps = weight.detach() / 0.3
    two, four = (steps >= low) & (steps <= low + 3), (steps >= -8 - shift) & (steps <= 7 - shift)
    assert torch.equal(weight.grad, slopes[0] * two + slopes[1] * four)


def test_nan_and_infinity() -> None:
    weight = torch.tensor([[1.0, float("nan"), float("inf"), -float("inf")]])
    scale = torch.ones(1, 1, 1)
    values, sqerr = clado_ext.fake_quant(weight, scale, (4,))
    assert values[0, 0, 1].isnan()
    assert values[0, 0].nan_to_num().tolist() == [1.0, 0.0, 7.0, -8.0]
    assert not sqerr.isfinite().any()
    assert clado_ext.quantize(weight, scale, (4,))[0, 0].tolist() == [1, 0, 7, -8]


@pytest.mark.parametrize("device", DEVICES)
def test_strides_offsets_and_empty_tensors(device: str) -> None:
    base = weight_of((40, 9), torch.float32, device)
    for weight in (base.t(), base[3:, 1::2], base.view(-1)[1:353].view(8, 44)):
        scale = clado_ext.scale_search(weight, (4,))
        assert torch.equal(clado_ext.fake_quant(weight, scale, (4,))[0], oracle.fake_quant(weight, scale, (4,))[0])
    for shape in ((0, 5), (5, 0)):
        weight = base.new_empty(shape)
        values, sqerr = clado_ext.fake_quant(weight, base.new_empty((1, shape[0], 1 if shape[1] else 0)), (4,))
        assert values.shape == (1, *shape)
        assert not sqerr.any()


@pytest.mark.parametrize("device", DEVICES)
def test_ops_are_well_formed_and_compile(device: str) -> None:
    weight = weight_of((5, 40), torch.float32, device)
    scale = clado_ext.scale_search(weight, (2, 8), 16)
    for zero in (None, torch.ones_like(scale, dtype=torch.int8)):
        torch.library.opcheck(torch.ops.clado.fake_quant.default, (weight, scale, zero, [2, 8], 16))
        torch.library.opcheck(torch.ops.clado.quantize.default, (weight, scale, zero, [2, 8], 16))
        torch.library.opcheck(torch.ops.clado.quantize_weight.default, (weight, [2, 8], 16, 5, zero is None))

    def all_of(w: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, ...]:
        codes = clado_ext.quantize(w, s, (2, 8), 16)
        one = clado_ext.quantize_weight(w, (2, 8), 16, 5, symmetric=False)
        return clado_ext.fake_quant(w, s, (2, 8), 16)[0] + 1, clado_ext.dequantize(codes, s, 16), *one

    compiled = torch.compile(all_of, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(weight, scale), all_of(weight, scale))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(2, 4, dtype=torch.float64)}, "fake_quant: weight must be float32, float16, bfloat16"),
        ({"weight": torch.tensor(1.0)}, "weight must have at least one dimension"),
        ({"bits": (4, 2)}, r"bits must be distinct ascending widths in 2\.\.8, got \(4, 2\)"),
        ({"bits": ()}, r"bits must be distinct ascending widths in 2\.\.8"),
        ({"group_size": 0}, "group_size must be -1 or positive, got 0"),
        ({"scale": torch.ones(2, 3, 1)}, r"scale must have shape \(2, 2, 1\), got \(2, 3, 1\)"),
        ({"scale": torch.ones(2, 2, 1).double()}, "scale must be float32, got torch.float64"),
        ({"zero_point": torch.ones(2, 2, 1)}, "zero_point must be int8, got torch.float32"),
        ({"zero_point": torch.ones(2, 1).char()}, r"zero_point must have shape \(2, 2, 1\), got \(2, 1\)"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    arguments = {"weight": torch.zeros(2, 4), "scale": torch.ones(2, 2, 1), "bits": (2, 4), "group_size": -1} | change
    with pytest.raises(ValueError, match=message):
        clado_ext.fake_quant(**arguments)


def test_bad_steps() -> None:
    with pytest.raises(ValueError, match=r"quantize_weight: steps must lie in 1\.\.99, got 0"):
        clado_ext.quantize_weight(torch.zeros(2, 2), (2,), steps=0)


def test_a_backward_pass_names_straight_through() -> None:
    weight, scale = torch.ones(2, 4, requires_grad=True), torch.ones(1, 2, 1)
    outputs = [*clado_ext.fake_quant(weight, scale, (4,)), *clado_ext.quantize_weight(weight, (4,))[:3]]
    for output in outputs:
        with pytest.raises(RuntimeError, match=r"gradients do not pass .* use clado_ext\.straight_through"):
            output.sum().backward()
    assert weight.grad is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(outputs[0], io.BytesIO())  # a hook on the tensor itself would be warned of here
    compiled = torch.compile(lambda w: clado_ext.fake_quant(w, scale, (4,))[0], fullgraph=True, backend="eager")
    assert torch.equal(compiled(weight), outputs[0])
    clado_ext.straight_through(weight, scale, [4]).sum().backward()
    assert torch.equal(weight.grad, torch.ones(2, 4))
