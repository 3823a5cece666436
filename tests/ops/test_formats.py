"""Number formats of the quantizing ops: codes against packages that have nothing of ours, scales against the standards."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import clado_ext
from clado_ext import FormatScale
from clado_ext.reference import fake_quant as oracle
from clado_ext.reference import scale_search as search_oracle
from tests.ops.devices import DEVICES, at_every_cpu_setting, same_bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOATS = tuple(oracle.FLOATS)
MIXED = ("int4", *FLOATS, "int8", "int2")
TORCH = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, "mxfp8": torch.float8_e4m3fn}
LARGEST = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "mxfp8": 448.0, "mxfp4": 6.0, "nvfp4": 6.0}


def every_pattern() -> Tensor:
    """Every finite float16 and bfloat16, and float32 at and one unit beside the values and the ties of every element."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    halves = torch.cat([patterns.view(dtype).float() for dtype in DTYPES[1:]])
    edges = []
    for name in FLOATS:
        known = oracle.magnitudes(name).float()
        edges.append(torch.cat([known, (known[1:] + known[:-1]) / 2]).view(torch.int32))
    beside = torch.cat([(torch.cat(edges) + ulps).view(torch.float32) for ulps in (-1, 0, 1)])
    found = torch.cat([halves, beside, -beside])
    return found[found.isfinite()].unsqueeze(0)


def theirs(x: Tensor, name: str) -> Tensor:
    """Codes by torch, of fp4 by ml_dtypes. Whether a cast of theirs saturates depends on its version."""
    clamped = x.clamp(-LARGEST[name], LARGEST[name])
    if name in TORCH:
        return clamped.to(TORCH[name]).view(torch.int8)
    ml_dtypes = pytest.importorskip("ml_dtypes")
    return torch.from_numpy(clamped.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.int8))


@pytest.mark.parametrize("name", FLOATS)
def test_codes_of_every_pattern_are_those_of_other_packages(name: str) -> None:
    x = every_pattern()
    scale = [FormatScale(name, torch.ones(1, 1))]
    wanted = theirs(x, name)
    for codes in at_every_cpu_setting(lambda: clado_ext.quantize_formats(x, scale)[0]):
        assert same_bits(codes, wanted)
    values, _ = clado_ext.fake_quant_formats(x, scale)
    known = oracle.magnitudes(name).float()
    read = wanted.view(TORCH[name]).float() if name in TORCH else known[wanted.long() % 8].copysign(x)
    assert same_bits(values[0], read)
    assert values.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 1056), (4, 8, 3, 3), (6,)])
def test_mixed_formats_match_the_oracle(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    weight = torch.randn(shape, device=device).to(dtype)
    scales = clado_ext.format_search(weight, MIXED, 7, 3, symmetric=False)
    values, sqerr = clado_ext.fake_quant_formats(weight, scales)
    codes = clado_ext.quantize_formats(weight, scales)
    wanted, errors = oracle.fake_quant_formats(weight, scales)
    assert same_bits(codes, oracle.quantize_formats(weight, scales))
    assert torch.equal(values, wanted)
    assert same_bits(clado_ext.dequantize_formats(codes, scales, dtype), values)
    # Lanes add up to 32 squares in float32 before they meet float64: relative error below 40 roundings.
    torch.testing.assert_close(sqerr, errors, rtol=40 * 2**-24, atol=0)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_weights(shape: tuple[int, ...]) -> None:
    weight = torch.empty(shape)
    scales = clado_ext.format_search(weight, MIXED, 7, 3)
    values, sqerr = clado_ext.fake_quant_formats(weight, scales)
    assert values.shape == clado_ext.quantize_formats(weight, scales).shape == (len(MIXED), *shape)
    assert not sqerr.any()


def test_together_they_give_what_each_gives_alone() -> None:
    weight = torch.randn(5, 200)
    scales = clado_ext.format_search(weight, MIXED, 24, 20, symmetric=False)
    values, sqerr = clado_ext.fake_quant_formats(weight, scales)
    for k, (name, scale) in enumerate(zip(MIXED, scales, strict=True)):
        (alone,) = clado_ext.format_search(weight, (name,), 24, 20, symmetric=False)
        assert same_bits(alone.scale, scale.scale)
        own, error = clado_ext.fake_quant_formats(weight, [alone])
        assert same_bits((own[0], error[0]), (values[k], sqerr[k]))
    bits, zeros = (2, 4, 8), [scales[k].zero_point for k in (7, 0, 6)]
    found = clado_ext.range_search(weight, bits, 24, 20)
    assert all(same_bits(found[1][k], zero) for k, zero in enumerate(zeros) if zero is not None)
    assert same_bits(clado_ext.fake_quant(weight, found[0], bits, 24, found[1])[0], values[[7, 0, 6]])


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 70),
    group=st.integers(-1, 40).filter(bool),
    exponent=st.integers(-130, 120),
    dtype=st.sampled_from(DTYPES),
    turned=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_stride_group_and_magnitude(
    rows: int, columns: int, group: int, exponent: int, dtype: torch.dtype, turned: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = (torch.randn(rows, columns) * 2.0**exponent).to(dtype)
    weight = weight.nan_to_num(posinf=1.0, neginf=-1.0)
    view = weight.t().contiguous().t() if turned else torch.cat([weight, weight], 1)[:, :columns]
    groups = -(-columns // group) if group > 0 else 1
    free = [FormatScale(name, torch.rand(rows, groups) * 2.0**exponent + 1e-30, group) for name in FLOATS]
    found = clado_ext.format_search(view, FLOATS, steps=2)
    for scales in (free, found):
        assert same_bits(clado_ext.quantize_formats(view, scales), oracle.quantize_formats(weight, scales))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_at_every_simd_level_and_thread_count(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 3328).to(dtype)
    weight[2, 5], weight[3, 6], weight[4] = torch.nan, torch.inf, 0.0
    importance = torch.rand(3328)
    below = clado_ext.tensor_scale(torch.randn(10))

    def run() -> tuple[Tensor, ...]:
        scales = clado_ext.format_search(weight, MIXED, 64, 95, tensor_scale=below)
        weighed = clado_ext.format_search(weight, MIXED, 64, 5, importance=importance, tensor_scale=below)
        values = clado_ext.fake_quant_formats(weight, scales)
        found = [s.scale for s in (*scales, *weighed)]
        return (*found, *values, clado_ext.quantize_formats(weight, scales))

    results = at_every_cpu_setting(run)
    assert all(same_bits(r, results[0]) for r in results)


@pytest.mark.parametrize("name", FLOATS)
def test_nan_infinity_zeros_and_tiny_blocks(name: str) -> None:
    x = torch.tensor([[1.0, torch.nan, torch.inf, -torch.inf, 0.0, -0.0]])
    one = [FormatScale(name, torch.ones(1, 1))]
    codes = clado_ext.quantize_formats(x, one)[0, 0]
    values = clado_ext.fake_quant_formats(x, one)[0][0, 0]
    assert codes[1] == 0
    assert codes[4] == 0
    assert codes[5] == torch.tensor(oracle.FLOATS[name][3]).to(torch.int8)
    assert values[1].isnan()
    assert values[[0, 2, 3]].tolist() == [1.0, LARGEST[name], -LARGEST[name]]
    weight = torch.randn(4, 64)
    weight[0, :32], weight[1], weight[2, 40], weight[3, :32] = 0.0, 0.0, torch.inf, weight[3, :32] * 1e-30
    (found,) = clado_ext.format_search(weight, (name,), tensor_scale=torch.ones(1))
    blocks = found.scale.shape[1] > 1
    nothing = 2.0**-9 if name == "nvfp4" else 1.0
    assert (found.scale[1] == nothing).all()
    assert not blocks or (found.scale[0, : found.scale.shape[1] // 2] == nothing).all()
    assert found.scale.isnan().sum() == 1
    assert found.scale[3].isfinite().all()
    assert (found.scale[3] > 0).all()
    assert (
        clado_ext.fake_quant_formats(weight[[0, 1, 3]], [found._replace(scale=found.scale[[0, 1, 3]])])[0]
        .isfinite()
        .all()
    )


def test_what_is_searched_is_of_the_grid_and_none_is_better() -> None:
    """A scale is rated in float32 by w * (1/s): within 1e-4 of the best in float64 is as good."""
    weight = torch.randn(3, 70) * torch.tensor([[1.0], [1e-3], [40.0]])
    weight[0, :40], weight[1, 16:32] = weight[0, :40].round(), 1e-12
    importance = torch.rand(70) * (torch.rand(70) > 0.3)
    t = clado_ext.tensor_scale(weight)
    for steps in (1, 2, 30, 95):
        for by in (None, importance):
            for found in clado_ext.format_search(weight, FLOATS, steps=steps, importance=by):
                name, size = found.format, found.group_size if found.group_size > 0 else 70
                parts = (torch.ones(70) if by is None else by).split(size)
                for n, row in enumerate(weight):
                    for g, group in enumerate(row.split(size)):
                        tried = search_oracle.float_grid(group, name, steps, t.item())
                        errors = search_oracle.float_errors(group, name, tried, None if by is None else parts[g])
                        assert (tried == found.scale[n, g]).any(), (name, steps)
                        assert errors[tried == found.scale[n, g]].min() <= errors.min() * (1 + 1e-4) + 1e-30


def test_one_step_is_the_scale_of_the_standards() -> None:
    """compressed-tensors for fp8 and nvfp4, torchao (OCP MX 1.0, "floor") for the mx formats: scales and codes, bit for bit."""
    weight = torch.randn(8, 128) * torch.randn(8, 1).exp()
    scales = clado_ext.format_search(weight, FLOATS, steps=1)
    codes = clado_ext.quantize_formats(weight, scales)
    found = {to.format: (to, own) for to, own in zip(scales, codes, strict=True)}
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    presets = pytest.importorskip("compressed_tensors.quantization.quant_scheme").PRESET_SCHEMES
    fp8, nvfp4 = presets["FP8_DYNAMIC"]["weights"], presets["NVFP4A16"]["weights"]
    own, _ = helpers.calculate_qparams(*weight.aminmax(dim=1, keepdim=True), fp8)
    assert same_bits(found["fp8_e4m3"][0].scale, own)
    below = helpers.generate_gparam(*weight.aminmax())
    nv = found["nvfp4"][0]
    assert nv.tensor_scale is not None
    assert same_bits(nv.tensor_scale, below)
    own, _ = helpers.calculate_qparams(*weight.unflatten(1, (-1, 16)).aminmax(dim=-1), nvfp4, below)
    assert same_bits(nv.scale, own / below)
    assert same_bits((nv.scale * nv.tensor_scale).to(torch.float8_e4m3fn).float(), own.float())
    pack = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers").quantize_and_pack_fp4
    assert same_bits(pack(weight, own, below), nibbles(found["nvfp4"][1]))
    for name in ("mxfp8", "mxfp4"):
        to, ours = found[name]
        exponents, data = torchaos_mx(weight, name)
        assert same_bits(to.scale, exponents.view(torch.uint8).int().sub(127).float().exp2())
        assert same_bits(data.view(torch.uint8), ours.view(torch.uint8) if name == "mxfp8" else nibbles(ours))


def nibbles(codes: Tensor) -> Tensor:
    """Two codes of four bits in a byte, the first one low."""
    pairs = codes.view(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def torchaos_mx(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
        element = torch.float8_e4m3fn if name == "mxfp8" else torch.float4_e2m1fn_x2
        found: tuple[Tensor, Tensor] = mx.to_mx(weight, element, 32)
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_ops_are_well_formed_and_compile(device: str) -> None:
    weight = torch.randn(5, 64, device=device)
    scales = clado_ext.format_search(weight, ("int4", "fp8_e5m2", "nvfp4"), 16, 3, symmetric=False)
    given = (weight, [s.scale for s in scales], [s.zero_point for s in scales], [4, 18, 16], [16, -1, 16])
    torch.library.opcheck(torch.ops.clado.fake_quant_formats.default, given)
    torch.library.opcheck(torch.ops.clado.quantize_formats.default, given)
    asked = (weight, ["int4", "nvfp4"], 16, 3, False, None, clado_ext.tensor_scale(weight))
    torch.library.opcheck(torch.ops.clado.format_search.default, asked)

    def all_of(w: Tensor) -> tuple[Tensor, ...]:
        found = clado_ext.format_search(w, ("int4", "mxfp8", "nvfp4"), 16, 3)
        codes = clado_ext.quantize_formats(w, found)
        return (*clado_ext.fake_quant_formats(w, found), codes, clado_ext.dequantize_formats(codes, found))

    compiled = torch.compile(all_of, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(weight), all_of(weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "fp4"}, "formats must be among int2, .*nvfp4, got 'fp4'"),
        ({"scale": torch.ones(2, 2)}, r"scale must have shape \(2, 1\), got \(2, 2\)"),
        ({"scale": torch.ones(2, 1).double()}, "scale must be float32, got torch.float64"),
        ({"group_size": 0}, "group_size must be -1 or positive, got 0"),
        ({"zero_point": torch.zeros(2, 1).char()}, "zero_point must be None for a format that is no integer, got one"),
    ],
)
def test_bad_scales(change: dict[str, Any], message: str) -> None:
    to = FormatScale("fp8_e4m3", torch.ones(2, 1))._replace(**change)
    for op in (clado_ext.fake_quant_formats, clado_ext.quantize_formats):
        with pytest.raises(ValueError, match=f"{op.__name__}: {message}"):
            op(torch.zeros(2, 4), [to])


def test_bad_calls() -> None:
    weight = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="fake_quant_formats: formats must be 1 to 16, got 0"):
        clado_ext.fake_quant_formats(weight, [])
    with pytest.raises(ValueError, match="fake_quant_formats: scales must be a sequence of FormatScale, got"):
        clado_ext.fake_quant_formats(weight, [torch.ones(2, 1)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="format_search: formats must be a sequence of names, got 'nvfp4'"):
        clado_ext.format_search(weight, "nvfp4")
    with pytest.raises(ValueError, match=r"format_search: formats must be among int2, .*, got 'int9'"):
        clado_ext.format_search(weight, ("int9",))
    with pytest.raises(ValueError, match=r"format_search: tensor_scale must have shape \(1,\), got \(2,\)"):
        clado_ext.format_search(weight, ("nvfp4",), tensor_scale=torch.ones(2))
    with pytest.raises(ValueError, match=r"dequantize_formats: codes must be int8 \[1, N, …\], got"):
        clado_ext.dequantize_formats(weight, [FormatScale("mxfp4", torch.ones(2, 1))])
    w = torch.ones(2, 4, requires_grad=True)
    values, _ = clado_ext.fake_quant_formats(w, [FormatScale("mxfp4", torch.ones(2, 1))])
    with pytest.raises(RuntimeError, match="gradients do not pass"):
        values.sum().backward()
