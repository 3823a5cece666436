"""Input formats: every element's code against dull twins and other packages' casts; gradients, exports, places of channels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clado import CladoError
from clado.quant import INPUTS, InputRounding, Scheme
from clado.quant.inputs import E2M1, E4M3, E5M2, Element, Pair
from tests.quant.test_candidates import LABELS

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CASTS = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}


def fp4(value: float) -> float:
    """The nearest of the sixteen values, ties to the even code."""
    code = min(range(8), key=lambda k: (abs(abs(value) - FP4[k]), k % 2))
    return math.copysign(FP4[code], value)


def fp8(value: float, element: str) -> float:
    dtype, largest = CASTS[element]
    return torch.tensor(max(-largest, min(largest, value))).to(dtype).float().item()


def dull_row(row: list[float], name: str, pair: Pair) -> list[float]:
    """A token, or all that shares scales, in a format."""
    largest = max(map(abs, row))
    seen = max(-pair[0], pair[1])
    if name.endswith("_dynamic") and name.startswith("int"):
        bits = int(name.removeprefix("int").removesuffix("_dynamic"))
        scale = f32(largest / f32((2**bits - 1) / 2)) or 1.0
        return [f32(max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, round(f32(x / scale)))) * scale) for x in row]
    if name.startswith("fp8"):
        element = name.split("_")[1]
        top = largest if name.endswith("_dynamic") else seen
        scale = f32(top / CASTS[element][1]) or 1.0
        return [f32(fp8(f32(x / scale), element) * scale) for x in row]
    size = 16 if name == "nvfp4" else 32
    out: list[float] = []
    for block in (row[k : k + size] for k in range(0, len(row), size)):
        largest = max(map(abs, block))
        if name == "nvfp4":
            whole = seen / (6 * 448)
            scale = f32(fp8(f32(largest / f32(6 * whole)), "e4m3") * f32(whole)) or f32(whole)
        else:
            scale = 2.0 ** (math.floor(math.log2(largest)) - (8 if name == "mxfp8" else 2)) if largest else 1.0
        code = (lambda v: fp8(v, "e4m3")) if name == "mxfp8" else lambda v: fp4(max(-6.0, min(6.0, v)))
        out += [f32(code(f32(x / scale)) * scale) for x in block]
    return out


def f32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).float().item()


DULL = [name for name in INPUTS if name not in {f"int{bits}" for bits in range(1, 16)}]


@pytest.mark.parametrize("name", DULL)
@given(st.integers(1, 70), st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 300.0]))
@settings(max_examples=12, deadline=None)
def test_every_element_is_that_of_a_dull_twin(name: str, columns: int, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, columns, generator=generator) * spread
    x[1] = 0.0
    x[2, 0] *= 40
    pair = (min(0.0, x[0].min().item()), max(0.0, x[0].max().item()))  # beyond what was seen values are clipped
    if pair == (0.0, 0.0):
        pair = (0.0, 1.0)
    got = InputRounding(name, pair, "linear")(x)
    wanted = torch.tensor([dull_row(row, name, pair) for row in x.tolist()])
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("element", [E4M3, E5M2], ids=lambda element: element.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_elements_are_those_of_torchs_casts(element: Element, dtype: torch.dtype) -> None:
    """Every value of 16 bits, ties, subnormal numbers, infinity and NaN among them; float32 between them, too."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    x = every.view(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16).to(dtype)
    x = torch.cat([x, x * (1 + 2**-12), x * (1 - 2**-12)]) if dtype == torch.float32 else x
    cast = CASTS[element.name][0]
    wanted = x.float().clamp(-element.largest, element.largest).to(cast).to(dtype)
    assert torch.equal(element.nearest(x).nan_to_num(1e4), wanted.nan_to_num(1e4))


def test_float64_is_rounded_once() -> None:
    x = torch.tensor([0.25 + 1e-10, 0.75 - 1e-10, 2.5 + 1e-9, 5 - 1e-9, 4 - 1e-15, 2 - 1e-12], dtype=torch.float64)
    assert E2M1.nearest(x).tolist() == [0.5, 0.5, 3, 4, 4, 2]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, in jvp
@pytest.mark.parametrize("name", ["int8_dynamic", "fp8_e4m3_dynamic", "mxfp8", "mxfp4", "nvfp4"])
def test_graphs_see_the_same_and_gradients_pass(name: str) -> None:
    rounding = InputRounding(name, (-3.0, 3.0), "linear")
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0] = x[1] = 0
    with torch.no_grad():
        wanted = rounding(x)
        exported = torch.export.export(Rounds(rounding), (x,)).module()
    for run in (rounding, exported):
        leaf = x.clone().requires_grad_()
        found = run(leaf)
        assert torch.equal(found, wanted)
        (slope,) = torch.autograd.grad(found.sum(), leaf)
        assert (slope != 0).float().mean() > 0.9
    _, tangent = torch.func.jvp(rounding, (x,), (torch.ones_like(x),))
    assert (tangent != 0).float().mean() > 0.9


class Rounds(nn.Module):
    def __init__(self, rounding: InputRounding) -> None:
        super().__init__()
        self.rounding = rounding

    def forward(self, x: Tensor) -> Tensor:
        return self.rounding(x)


def test_codes_agree_with_other_packages() -> None:
    """compressed-tensors per token, ml_dtypes for fp4 on every tie and in between."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    ties = torch.arange(-64, 65) / 8
    wanted = torch.from_numpy(ties.clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).astype("float32"))
    assert torch.equal(E2M1.nearest(ties), wanted)
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    for name, kind in (("int8_dynamic", "int"), ("fp8_e4m3_dynamic", "float")):
        args = quantization.QuantizationArgs(num_bits=8, type=kind, strategy="token", symmetric=True, dynamic=True)
        theirs = fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, nn.Linear(48, 4)), args)
        assert torch.equal(InputRounding(name, None, "linear")(x), theirs)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize(
    ("kind", "shape"),
    [("linear", (2, 5, 40)), ("conv2d", (3, 40, 4, 5)), ("conv1d", (3, 40, 7)), ("conv2d", (40, 4, 5))],
)
def test_streams_and_samples_do_not_mix_and_channels_have_their_place(
    name: str, kind: str, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    rounding = InputRounding(name, (-3.0, 4.0) if INPUTS[name].ranged else None, kind)
    got = rounding(x)
    assert got.shape == x.shape
    assert (got - x).abs().max() > 0 or name in ("int14", "int15")
    batched = len(shape) == {"linear": 3, "conv2d": 4, "conv1d": 3}[kind]
    if batched:
        assert torch.equal(rounding(torch.cat([2 * x, x]))[len(x) :], got)
        assert torch.equal(rounding(x[1:2]), got[1:2])
    if name in ("mxfp4", "mxfp8", "nvfp4"):  # blocks run along channels
        dim = len(shape) - 1 if kind == "linear" else len(shape) - int(kind[-2]) - 1
        rows = x.movedim(dim, -1).reshape(-1, 40)
        alone = InputRounding(name, rounding.pair, "linear")(rows).view(x.movedim(dim, -1).shape).movedim(-1, dim)
        assert torch.equal(got, alone)


@pytest.mark.parametrize("name", ["int4", *DULL])
def test_gradients_pass_straight_through_and_graphs_take_it(name: str) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return InputRounding(name, (-30.0, 40.0) if INPUTS[name].ranged else None, "linear")(x)

    x = torch.randn(3, 33, generator=torch.Generator().manual_seed(2)).requires_grad_()
    y = Net()(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    small = x.detach().abs() < 0.1 * x.detach().abs().max()  # of what nothing is clamped
    torch.testing.assert_close(slope[small], torch.ones_like(slope[small]), rtol=1e-5, atol=1e-5)
    assert torch.isclose(slope, slope.round(), atol=1e-5).all()
    with torch.no_grad():
        graph = torch.export.export(Net(), (x.detach(),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        assert torch.equal(graph.module()(x.detach()), y.detach())


@given(st.sampled_from(LABELS), st.sampled_from(sorted(INPUTS)))
def test_labels_with_inputs_are_read_back(label: str, input: str) -> None:
    scheme = Scheme(Scheme.of(label).weight, input)
    assert Scheme.of(scheme.label) == scheme
    assert scheme.input_bits == INPUTS[input].bits


def test_labels_say_what_presets_say() -> None:
    for label, input in {
        "W8A8": "int8",
        "W8A8_DYNAMIC": "int8_dynamic",
        "W4AFP8": "fp8_e4m3_dynamic",
        "W4AFP8_STATIC": "fp8_e4m3",
        "W4ANVFP4": "nvfp4",
        "W4A16": "",
    }.items():
        assert Scheme.of(label).input == input
    with pytest.raises(CladoError, match="scheme: input must be one of int1, "):
        Scheme("int4", "int16")
    with pytest.raises(CladoError, match="activations: ranges must be there for inputs of int8, got none"):
        InputRounding("int8", None, "linear")
