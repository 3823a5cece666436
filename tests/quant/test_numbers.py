"""Number formats: what they give is what they store, byte for byte, and one more is one class and one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import clado
from clado.deploy import pack_model, predicted_bytes, verify
from clado.quant import NUMBERS, Layer, Quantized, Quantizer, Scheme, candidates_of, stored_bytes
from clado.quant.integers import Integer
from clado.quant.numbers import all_nearest, all_scales, integer
from clado.quant.scaling import Scales, Stored
from tests.models import random_plan, small_cnn


def weight(dtype: torch.dtype, inner: int = 4) -> Tensor:
    """Awkward sizes, a row of zeros, values that round to zero from below."""
    found = torch.randn(13, 5, inner, generator=torch.Generator().manual_seed(0))
    found[3] = 0
    found[4, 1:] = -1e-6
    return found.to(dtype)


@pytest.mark.parametrize("name", list(NUMBERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantizer", [Quantizer(), Quantizer(0, 3), Quantizer(7, 3, False), Quantizer(64, 1, False)])
def test_codes_stand_for_the_nearest_values_and_are_stored_as_told(
    name: str, dtype: torch.dtype, quantizer: Quantizer
) -> None:
    number = NUMBERS[name]
    w = weight(dtype, number.block or 4)
    matrix = quantizer.matrix(w)
    scales = number.scales(matrix, quantizer)
    codes, nearest = number.encode(matrix, scales), number.nearest(matrix, scales)
    decoded = number.decode(codes, scales, dtype)
    assert decoded.dtype == nearest.dtype == dtype
    assert torch.equal(decoded.view(torch.uint8), nearest.view(torch.uint8))  # the sign of zero too
    found = Quantized(number, tuple(w.shape), codes, scales)
    packed = found.packed()
    told = number.stored(tuple(w.shape), quantizer)
    assert {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in packed.items()} == told
    layer = Layer("layer", "linear", tuple(w.shape), 0)
    assert sum(tensor.nbytes for tensor in packed.values()) == stored_bytes(layer, Scheme(name), quantizer)
    again, scales_again = number.unpack(packed, tuple(w.shape), quantizer)
    assert torch.equal(again, codes)
    assert torch.equal(scales_again.scale, scales.scale)
    assert scales_again.group_size == scales.group_size
    assert torch.equal(found.values(dtype), nearest.view(w.shape))
    assert torch.equal(Quantized.unpacked(number, tuple(w.shape), packed, quantizer).values(dtype), found.values(dtype))


def test_names_and_unknown_widths() -> None:
    bits = {"mxfp4": 4, "nvfp4": 4, "fp8_e4m3": 8, "fp8_e5m2": 8, "mxfp8": 8, "bf16": 16, "fp16": 16}
    wanted = {f"int{b}": b for b in range(2, 9)} | bits
    assert {name: number.bits for name, number in NUMBERS.items()} == wanted
    assert all(number.name == name for name, number in NUMBERS.items())
    for wrong in (1, 9, 2.5):
        with pytest.raises(clado.CladoError, match=r"quantizer: bits must lie in 2\.\.8, got"):
            integer(wrong)  # type: ignore[arg-type]
    assert integer(5) == Integer(5)


@pytest.mark.parametrize("quantizer", [Quantizer(), Quantizer(0, 3), Quantizer(7, 9, False)])
def test_together_they_give_what_each_gives_alone(quantizer: Quantizer) -> None:
    matrix, numbers = quantizer.matrix(weight(torch.float32, 32)), list(NUMBERS.values())
    found = all_scales(numbers, matrix, quantizer)
    values = all_nearest(numbers, matrix, found)
    for number, scales, value in zip(numbers, found, values, strict=True):
        alone = number.scales(matrix, quantizer)
        assert torch.equal(scales.scale, alone.scale)
        assert torch.equal(value, number.nearest(matrix, alone))


def test_blocks_that_do_not_divide_a_row_are_refused() -> None:
    layers = [Layer("fine", "linear", (4, 64), 0), Layer("odd", "conv2d", (4, 3, 3, 3), 0)]
    with pytest.raises(
        clado.CladoError,
        match=r"candidates: layer odd must have a number of inputs that blocks of 16 divide for NVFP4, got 27$",
    ):
        candidates_of(layers, ("W4A16", "NVFP4"))
    assert len(candidates_of(layers, {"odd": ("W4A16", "FP8_E4M3"), "*": ("NVFP4", "MXFP8", "BF16")})) == 5
    with pytest.raises(
        clado.CladoError, match="quantize: weight must have rows that blocks of 32 divide for mxfp4, got 27"
    ):
        NUMBERS["mxfp4"].scales(torch.ones(2, 27), Quantizer())


def test_granularity_is_the_formats_own() -> None:
    w = torch.randn(6, 64)
    shapes = {
        name: [
            tuple(NUMBERS[name].scales(q.matrix(w), q).scale.shape) for q in (Quantizer(0), Quantizer(), Quantizer(8))
        ]
        for name in ("int4", "fp8_e4m3", "mxfp4", "nvfp4", "bf16")
    }
    assert shapes == {
        "int4": [(1, 1), (6, 1), (6, 8)],
        "fp8_e4m3": [(1, 1), (6, 1), (6, 1)],
        "mxfp4": [(1, 12), (6, 2), (6, 2)],
        "nvfp4": [(1, 24), (6, 4), (6, 4)],
        "bf16": [(1, 0), (6, 0), (6, 0)],
    }


def test_kept_weights_saturate_and_keep_nan() -> None:
    w = torch.tensor([[1e5, -1e39, 3.4e38, 1 / 3, torch.nan]])
    half, brain = (NUMBERS[name].nearest(w, NUMBERS[name].scales(w, Quantizer())) for name in ("fp16", "bf16"))
    assert half[0, :3].tolist() == [65504.0, -65504.0, 65504.0]
    assert brain[0, 1:3].tolist() == [-torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).max]
    assert torch.equal(half[0, 3:4], w[0, 3:4].half().float())
    assert half[0, 4].isnan()


class Bytes:
    """A toy: steps of the largest value's 127th part, one byte each, and no zero point."""

    name, bits, block = "bytes", 8, 0

    def scales(self, matrix: Tensor, quantizer: Quantizer) -> Scales:
        return Scales((matrix.float().abs().amax(1, keepdim=True) / 127).clamp_min(1e-9), None, -1)

    def encode(self, matrix: Tensor, scales: Scales) -> Tensor:
        return (matrix.float() / scales.scale).round().to(torch.int8)

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
        return (codes * scales.scale).to(dtype)

    def nearest(self, matrix: Tensor, scales: Scales) -> Tensor:
        return self.decode(self.encode(matrix, scales), scales, matrix.dtype)

    def stored(self, shape: tuple[int, ...], quantizer: Quantizer) -> Stored:
        return {"weight_bytes": ((shape[0], math.prod(shape[1:])), torch.int8), "steps": ((shape[0], 1), torch.float32)}

    def pack(self, codes: Tensor, scales: Scales) -> dict[str, Tensor]:
        return {"weight_bytes": codes, "steps": scales.scale}

    def unpack(
        self, packed: Mapping[str, Tensor], shape: tuple[int, ...], quantizer: Quantizer
    ) -> tuple[Tensor, Scales]:
        return packed["weight_bytes"], Scales(packed["steps"], None, -1)


@torch.no_grad()
def test_another_format_is_one_class_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a profile to a verified export, packed in memory too, without another change."""
    monkeypatch.setitem(NUMBERS, "int8", Bytes())
    model, shape = small_cnn()
    x = torch.randn(6, *shape)
    sens = clado.profile(model, [x], bits=(4, 8), estimator="diagonal", rounding="nearest", verbose=False)
    plan = clado.given_plan(sens, {layer.name: 8 for layer in sens.layers})
    small = clado.apply(model, plan)
    for layer in plan.layers:
        w = model.get_parameter(layer.names[0]).flatten(1)
        step = (w.abs().amax(1, keepdim=True) / 127).clamp_min(1e-9)
        assert torch.equal(small.get_parameter(layer.names[0]).flatten(1), (w / step).round() * step)
    written = clado.export(model, plan, tmp_path / "out")
    assert written.quantized == predicted_bytes(model, plan)[0] == sum(x.numel + 4 * x.shape[0] for x in plan.layers)
    assert verify(model, plan, tmp_path / "out") == "loaded back bit for bit"
    for packed in (clado.load(tmp_path / "out", model, packed=True), pack_model(model, plan)):
        assert torch.equal(packed(x), small(x))
        assert packed.first.weight_bytes.dtype == torch.int8
    other = random_plan(model, Quantizer(), (4,))  # formats live side by side
    assert clado.export(model, other, tmp_path / "other").quantized == predicted_bytes(model, other)[0]


SCHEMES = ("W4A16", "FP8A16", "FP8_E5M2A16", "MXFP8A16", "MXFP4A16", "NVFP4A16", "BF16", "FP16")


@torch.no_grad()
@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
@pytest.mark.parametrize("group_size", [-1, 0])
def test_from_a_profile_to_a_loaded_export(rounding: str, group_size: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32), nn.Linear(32, 5)
    )
    x = torch.randn(16, 32)
    settings = {"group_size": group_size, "scale_steps": 5, "rounding": rounding, "verbose": False}
    sens = clado.profile(model.eval(), [x], schemes=SCHEMES, **settings)
    assert [scheme.label for scheme in sens.candidates.schemes[0]] == sorted(SCHEMES, key=lambda s: Scheme.of(s))
    names = [layer.name for layer in sens.layers]
    for k in range(0, len(SCHEMES), len(names)):
        plan = clado.given_plan(sens, dict(zip(names, (SCHEMES * 2)[k:], strict=False)))
        small, folder = clado.apply(model, plan), tmp_path / str(k)
        written = clado.export(model, plan, folder)
        assert written.quantized == predicted_bytes(model, plan)[0] == plan.size_bytes
        assert verify(model, plan, folder) == "loaded back bit for bit"
        for loaded in (clado.load(folder, model), clado.load(folder, model, packed=True), pack_model(model, plan)):
            assert torch.equal(loaded(x), small(x))
        for layer in plan.layers:
            scheme = plan.chosen[layer.name]
            if rounding == "nearest":
                weight = model.get_parameter(layer.names[0])
                matrix = sens.quantizer.matrix(weight)
                wanted = scheme.number.nearest(matrix, scheme.number.scales(matrix, sens.quantizer))
                assert torch.equal(small.get_parameter(layer.names[0]), wanted.view(weight.shape))
    best = clado.solve(sens, size_bytes=7000, time_limit=5)
    assert best.size_bytes <= 7000
    assert best.objective <= clado.given_plan(sens, dict.fromkeys(names, "W4A16"), "original").objective
