"""What the compressed-tensors package makes of our files: its own reader is the judge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import clado
from clado.artifacts import Plan
from clado.deploy import predicted_bytes, verify
from clado.deploy.formats import Request
from clado.deploy.formats import compressed_tensors as ct
from clado.quant import ActivationRanges, Candidates, InputRounding, Quantizer, Scheme, calibrate_inputs
from tests.models import random_plan, small_cnn, tiny_vit

package = pytest.importorskip("compressed_tensors")
NAME = "compressed-tensors"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 0, 5, 32, 128])
@pytest.mark.parametrize("odd_widths", [None, "dense"])
def test_the_package_decompresses_bit_for_bit(
    odd_widths: str | None, group_size: int, symmetric: bool, tmp_path: Path
) -> None:
    """Rows of 16, 32 and 128 columns: groups of 5 divide none of them."""
    model, shape = tiny_vit()
    bits = (2, 4, 8) if odd_widths is None else range(2, 9)
    plan = random_plan(model, Quantizer(group_size, 2, symmetric), bits)
    written = clado.export(model, plan, tmp_path / "out", NAME, odd_widths=odd_widths)
    assert (written.quantized, written.leftovers) == predicted_bytes(model, plan, NAME, odd_widths=odd_widths)
    tensors = load_file(tmp_path / "out" / ct.MODEL_FILE)
    parts = (ct.PACKED, ct.SCALE, ct.ZERO_POINT, "weight_shape")
    assert written.quantized == sum(t.nbytes for n, t in tensors.items() if n.endswith(parts))
    assert written.leftovers == sum(t.nbytes for n, t in tensors.items() if not n.endswith(parts))
    read, wanted = ct.decompressed(tmp_path / "out", model), clado.apply(model, plan)
    for layer in plan.layers:
        source = model if layer.kind == "conv2d" else wanted
        assert torch.equal(read.get_parameter(layer.names[0]), source.get_parameter(layer.names[0])), layer.name
    assert written.kept == ("patch_embed.proj",)
    if (group_size, odd_widths) == (-1, None):
        x = torch.randn(2, *shape)
        wanted.patch_embed = model.patch_embed
        with torch.no_grad():
            assert torch.equal(read(x), wanted(x))
        said = verify(model, plan, tmp_path / "out", NAME)
        assert said == "compressed-tensors decompresses 9 layers bit for bit; 1 stay float"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 0, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision_decompress_bit_for_bit(
    dtype: torch.dtype, group_size: int, symmetric: bool, tmp_path: Path
) -> None:
    """The reader keeps scales in the model's dtype; weights so small that float16 has no scale for them are held too."""
    model, shape = tiny_vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[:3] *= 1e-6
    model = model.to(dtype)
    plan = random_plan(model, Quantizer(group_size, 10, symmetric), (2, 4, 8))
    written = clado.export(model, plan, tmp_path / "out", NAME)
    assert (written.quantized, written.leftovers) == predicted_bytes(model, plan, NAME)
    tensors = load_file(tmp_path / "out" / ct.MODEL_FILE)
    parts = (ct.PACKED, ct.SCALE, ct.ZERO_POINT, "weight_shape")
    assert written.quantized == sum(t.nbytes for n, t in tensors.items() if n.endswith(parts))
    assert {t.dtype for n, t in tensors.items() if n.endswith(ct.SCALE)} == {dtype}
    read, wanted = ct.decompressed(tmp_path / "out", model), clado.apply(model, plan)
    assert not wanted.blocks[0].mlp.fc1.weight.isnan().any()
    assert "9 layers bit for bit" in verify(model, plan, tmp_path / "out", NAME)
    wanted.patch_embed = model.patch_embed
    x = torch.randn(2, *shape, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(read(x), wanted(x))


def test_layers_of_several_dtypes_and_what_the_reader_would_change(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(16, 8).bfloat16(), nn.Linear(8, 8).half(), nn.Linear(8, 4)).eval()
    plan = random_plan(net, Quantizer(), (4,))
    clado.export(net, plan, tmp_path / "out", NAME)
    assert "3 layers bit for bit" in verify(net, plan, tmp_path / "out", NAME)
    double = nn.Sequential(nn.Linear(16, 8)).double().eval()
    with pytest.raises(clado.CladoError, match=r"layer 0 must be float32, float16 or bfloat16 .*, got torch.float64"):
        clado.export(double, random_plan(double, Quantizer(), (4,)), tmp_path / "double", NAME)
    assert not (tmp_path / "double").exists()


def test_convolutions_stay_float_and_it_is_said(tmp_path: Path) -> None:
    model, _ = small_cnn()
    plan = random_plan(model, Quantizer(), (2, 4, 8))
    written = clado.export(model, plan, tmp_path / "out", NAME)
    convolutions = ("stem", "body.0", "body.1", "depthwise")
    assert written.kept == convolutions
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert set(config["ignore"]) == set(convolutions)
    targets = [t for group in config["config_groups"].values() for t in group["targets"]]
    assert sorted(targets) == ["first", "head", "second"]  # tied weights are written under both names
    noted = Plan.load(tmp_path / "out").info["export"]
    assert noted["float_layers"] == list(convolutions)
    assert noted["quantized_bytes"] == written.quantized != plan.size_bytes
    read, wanted = ct.decompressed(tmp_path / "out", model), clado.apply(model, plan)
    assert torch.equal(read.first.weight, wanted.first.weight)
    assert torch.equal(read.second.weight, wanted.second.weight)
    assert torch.equal(read.stem.weight, model.stem.weight)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()).eval()
    with pytest.raises(clado.CladoError, match="hold Linear layers for compressed-tensors, got a plan of convolutions"):
        clado.export(net, random_plan(net, Quantizer(), (2,)), tmp_path / "none", NAME)
    assert not (tmp_path / "none").exists()


def test_odd_widths_need_a_word(tmp_path: Path) -> None:
    model, _ = tiny_vit()
    plan = random_plan(model, Quantizer(), (3, 5))
    with pytest.raises(clado.CladoError, match=r"plan must keep to 2, 4 and 8 bits, .* got 3, 5 bits"):
        clado.export(model, plan, tmp_path / "out", NAME)
    with pytest.raises(clado.CladoError, match="odd_widths must be one of dense, padded, got 'loose'"):
        clado.export(model, plan, tmp_path / "out", NAME, odd_widths="loose")
    for choice, version in (("dense", "0.18.0"), ("padded", "0.17.1")):
        written = clado.export(model, plan, tmp_path / "out", NAME, odd_widths=choice)
        assert (written.quantized, written.leftovers) == predicted_bytes(model, plan, NAME, odd_widths=choice)
        config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
        assert config["version"] == version


@given(bits=st.integers(2, 8), rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 99))
def test_padded_words_hold_whole_codes(bits: int, rows: int, columns: int, seed: int) -> None:
    """The layout to 0.17.1: 32 // bits codes a word, the first one lowest, the rest of the word zero."""
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    request = Request(nn.Identity(), Plan((), {}, "infeasible"), ct.Options("padded"))
    packed = ct._pack(request, codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, ct._words(request, columns, bits))
    fit = 32 // bits
    for row in range(rows):
        for column in range(columns):
            word = int(packed[row, column // fit]) & 0xFFFFFFFF
            assert (word >> (bits * (column % fit)) & ((1 << bits) - 1)) + low == codes[row, column]
        filled = (columns - 1) % fit + 1
        last = int(packed[row, -1]) & 0xFFFFFFFF
        assert last >> (bits * filled) == 0


MIXED = ("W4A16", "FP8A16", "MXFP8A16", "MXFP4A16", "NVFP4A16", "BF16", "W8A16", "FP16", "FP8A16")


def linears(dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(9))).eval().to(dtype)


@torch.no_grad()
def mixed_plan(model: nn.Module, schemes: tuple[str, ...], quantizer: Quantizer) -> Plan:
    """Ranges of inputs are those of a batch that every run draws alike."""
    layers = tuple(
        clado.Layer(f"{k}", "linear", tuple(module.weight.shape), 0, (f"{k}.weight",)) for k, module in enumerate(model)
    )
    chosen = dict(zip((layer.name for layer in layers), schemes, strict=True))
    candidates = Candidates(layers, tuple((Scheme.of(scheme),) for scheme in schemes))
    x = torch.randn(4, 5, layers[0].shape[1], generator=torch.Generator().manual_seed(3)).to(model[0].weight.dtype)
    ranges = calibrate_inputs(model, [x], lambda net, batch: net(batch), candidates).chosen(
        {name: Scheme.of(label) for name, label in chosen.items()}
    )
    return Plan(layers, chosen, "given", quantizer=quantizer, activations=ranges)


@torch.no_grad()
@pytest.mark.parametrize("quantizer", [Quantizer(-1, 9), Quantizer(0, 1), Quantizer(16, 9, False)])
def test_mixed_layouts_in_one_file_decompress_bit_for_bit(quantizer: Quantizer, tmp_path: Path) -> None:
    model = linears(torch.bfloat16)
    plan = mixed_plan(model, MIXED, quantizer)
    written = clado.export(model, plan, tmp_path / "out", NAME)
    assert (written.quantized, written.leftovers) == predicted_bytes(model, plan, NAME)
    said = verify(model, plan, tmp_path / "out", NAME)
    assert said == "compressed-tensors decompresses 9 layers bit for bit; 0 stay float"
    held = json.loads((tmp_path / "out" / ct.CONFIG_FILE).read_text())["quantization_config"]
    assert held["format"] == "mixed-precision"
    groups = {target: group for group in held["config_groups"].values() for target in group["targets"]}
    assert {target: group["format"] for target, group in groups.items()} == {
        "0": "pack-quantized",
        "1": "naive-quantized",
        "2": "mxfp8-quantized",
        "3": "mxfp4-pack-quantized",
        "4": "nvfp4-pack-quantized",
        "6": "pack-quantized",
        "8": "naive-quantized",
    }
    assert held["ignore"] == ["5", "7"]
    tensors = load_file(tmp_path / "out" / ct.MODEL_FILE)
    wanted = {
        "2.weight": "float8_e4m3fn",
        "3.weight_packed": "uint8",
        "4.weight_scale": "float8_e4m3fn",
        "7.weight": "float16",
    }
    assert {name: str(tensors[name].dtype).removeprefix("torch.") for name in wanted} == wanted
    quantization = pytest.importorskip("compressed_tensors.quantization")
    for name, preset in (("2", "MXFP8A16"), ("3", "MXFP4A16"), ("4", "NVFP4A16")):
        ours = quantization.QuantizationScheme.model_validate(groups[name]).weights
        assert ours.model_dump() == quantization.preset_name_to_scheme(preset, ["Linear"]).weights.model_dump()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fp8_and_kept_weights_of_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = linears(dtype)
    plan = mixed_plan(model, ("FP8A16", "BF16", "W8A16") * 3, Quantizer(-1, 5))
    clado.export(model, plan, tmp_path / "out", NAME)
    assert verify(model, plan, tmp_path / "out", NAME).endswith("9 layers bit for bit; 0 stay float")
    alone = mixed_plan(model, ("BF16",) * 9, Quantizer())
    clado.export(model, alone, tmp_path / "kept", NAME)
    assert verify(model, alone, tmp_path / "kept", NAME).endswith("9 layers bit for bit; 0 stay float")


def test_what_the_reader_cannot_hold_is_said_before_anything_is_written(tmp_path: Path) -> None:
    model, folder = linears(torch.float32), tmp_path / "out"
    for schemes, message in (
        (
            ("FP8_E5M2A16",) * 9,
            "export: plan must hold integers, fp8_e4m3, .* for compressed-tensors, got 0 as fp8_e5m2",
        ),
        (
            ("W4A16",) * 8 + ("NVFP4A16",),
            "export: layer 8 must be bfloat16 for nvfp4 in compressed-tensors, .*, got float32",
        ),
    ):
        plan = mixed_plan(model, schemes, Quantizer(-1, 1))
        for call in (predicted_bytes, clado.export):
            with pytest.raises(clado.CladoError, match=message):
                call(model, plan, *((folder,) if call is clado.export else ()), NAME)
    assert not folder.exists()


# In float32 the package computes the same; in bfloat16 blocks alone are written.
ROUNDED = ("W8A8", "W8A8_DYNAMIC", "W4A8", "W4A8_DYNAMIC", "FP8", "FP8_DYNAMIC", "W4AFP8", "W4AFP8_STATIC", "BF16A8")
LAYOUTS = ["int-quantized"] * 4 + ["float-quantized"] * 2 + ["pack-quantized"] * 2 + ["dense"]


def theirs(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """An input as the package rounds it in its own forward."""
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    found: torch.Tensor = forward_quantize(module, x, "input", module.quantization_scheme.input_activations)
    return found


def rounding_of(plan: Plan, layer: str) -> InputRounding:
    scheme = plan.chosen[layer]
    pair = None if plan.activations is None else plan.activations.of(layer, scheme.input)
    return InputRounding(scheme.input, pair, "linear")


@torch.no_grad()
@pytest.mark.parametrize("quantizer", [Quantizer(-1, 9), Quantizer(0, 1), Quantizer(16, 9, False)])
def test_inputs_are_rounded_by_the_package_as_by_the_plan(quantizer: Quantizer, tmp_path: Path) -> None:
    model = linears(torch.float32)
    plan = mixed_plan(model, ROUNDED, quantizer)
    written = clado.export(model, plan, tmp_path / "out", NAME)
    assert (written.quantized, written.leftovers) == predicted_bytes(model, plan, NAME)
    assert written.notes == ("codes take a byte each where integers multiply integers: those of 2, 3",)
    said = verify(model, plan, tmp_path / "out", NAME)
    assert said == "compressed-tensors decompresses 9 layers bit for bit, with the inputs of 9; 0 stay float"
    held = json.loads((tmp_path / "out" / ct.CONFIG_FILE).read_text())["quantization_config"]
    groups = {target: group for group in held["config_groups"].values() for target in group["targets"]}
    assert [groups[layer.name]["format"] for layer in plan.layers] == LAYOUTS
    assert (held["format"], held["ignore"]) == ("mixed-precision", [])
    read, wanted = ct.decompressed(tmp_path / "out", model), clado.apply(model, plan)
    x = 2 * torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(0))  # beyond the ranges too
    for layer, module in zip(plan.layers, read, strict=True):
        # The package adds the code of zero before it rounds, by which a tie may fall to the other side: there is none here.
        assert torch.equal(theirs(module, x), rounding_of(plan, layer.name)(x)), layer.name
    torch.testing.assert_close(read(x), wanted(x), rtol=0, atol=1e-5)


def test_groups_of_presets_are_the_packages_own() -> None:
    """What a group says of weights and inputs is the preset of that name, and the layout the one that the package infers."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors.format import infer_module_format

    presets = {"W8A8_DYNAMIC": "W8A8", "FP8": "FP8", "FP8_DYNAMIC": "FP8_DYNAMIC", "MXFP8": "MXFP8", "MXFP4": "MXFP4"}
    presets |= {"NVFP4": "NVFP4"}
    model = linears(torch.bfloat16)[: len(presets)]
    for quantizer in (Quantizer(-1, 1), Quantizer(0, 1)):
        plan = mixed_plan(model, tuple(presets), quantizer)
        for layer in plan.layers:
            request = Request(model, plan, ct.Options())
            name = presets[plan.schemes[layer.name]]
            if (quantizer.group_size == 0) != (name == "FP8") and not name.startswith(("MX", "NV")):
                continue  # the preset has a scale per tensor, or per channel
            group = ct._group(ct._layout(request, layer), ct._scheme(request, layer), ct._input_scheme(request, layer))
            ours = quantization.QuantizationScheme.model_validate(group | {"targets": ["Linear"]})
            preset = quantization.preset_name_to_scheme(name, ["Linear"])
            skip = {"observer", "observer_kwargs"}  # how calibration, which is over, finds scales
            for part in ("weights", "input_activations"):
                assert getattr(ours, part).model_dump(exclude=skip) == getattr(preset, part).model_dump(exclude=skip)
            assert ours.format == infer_module_format(nn.Linear, preset).value


@torch.no_grad()
def test_blocks_of_inputs_and_scales_in_half_precision(tmp_path: Path) -> None:
    model = linears(torch.bfloat16)[:6]
    plan = mixed_plan(model, ("MXFP8", "MXFP4", "NVFP4", "W8A8_DYNAMIC", "FP8_DYNAMIC", "FP8"), Quantizer(-1, 1))
    written = clado.export(model, plan, tmp_path / "out", NAME)
    assert (written.quantized, written.leftovers) == predicted_bytes(model, plan, NAME)
    assert written.notes == ("scales of inputs are rounded to bfloat16, as its readers hold them",)
    assert "6 layers bit for bit, with the inputs of 6;" in verify(model, plan, tmp_path / "out", NAME)
    tensors = load_file(tmp_path / "out" / ct.MODEL_FILE)
    assert sorted(name for name in tensors if "input" in name) == ["2.input_global_scale", "5.input_scale"]
    assert plan.activations is not None
    (low, high), (scale,) = plan.activations.formats["nvfp4"]["2"], tensors["2.input_global_scale"].tolist()
    assert scale == pytest.approx(448 * 6 / max(-low, high), rel=1e-6)
    (low, high), (scale,) = plan.activations.formats["fp8_e4m3"]["5"], tensors["5.input_scale"].tolist()
    assert scale == pytest.approx(max(-low, high) / 448, rel=2**-8)  # a bfloat16
    read = ct.decompressed(tmp_path / "out", model)
    x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for k in (3, 4):
        assert torch.equal(theirs(read[k], x), rounding_of(plan, f"{k}")(x))
    # The standard's scale of a block is the power of two below its largest; the package takes the next one from 1¾ of it on.
    blocks = x.unflatten(-1, (-1, 32))
    mantissa, _ = blocks.abs().amax(-1, keepdim=True).float().frexp()
    same = (mantissa < 1.75 / 2).expand(blocks.shape).flatten(-2)
    assert 0 < same.float().mean() < 1
    for k in (0, 1):
        got, wanted = theirs(read[k], x), rounding_of(plan, f"{k}")(x)
        assert torch.equal(got[same], wanted[same])
        assert not torch.equal(got, wanted)
    # The package divides by the reciprocal of what clado multiplies by: what lies beside a tie may fall to the other side.
    assert (theirs(read[2], x) != rounding_of(plan, "2")(x)).float().mean() < 0.02


@torch.no_grad()
def test_inputs_of_a_base_that_rounds_all(tmp_path: Path) -> None:
    model = linears(torch.float32)
    plan = mixed_plan(model, ("W4A16",) * 9, Quantizer(-1, 1))
    ranges = {**{f"{k}": (-1.0 - k, 2.0) for k in range(8)}, "8": (0.0, 0.0)}
    plan = replace(plan, activations=ActivationRanges.of_width(7, ranges))
    written = clado.export(model, plan, tmp_path / "out", NAME)
    assert (written.quantized, written.leftovers) == predicted_bytes(model, plan, NAME)
    assert "9 layers bit for bit, with the inputs of 8;" in verify(model, plan, tmp_path / "out", NAME)
    read, wanted = ct.decompressed(tmp_path / "out", model), clado.apply(model, plan)
    x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(read(x), wanted(x), rtol=0, atol=1e-5)
    elsewhere = replace(plan, activations=ActivationRanges.of_width(8, {**ranges, "stem": (-1.0, 1.0)}))
    written = clado.export(model, elsewhere, tmp_path / "out", NAME)
    assert written.notes[0] == "inputs stay float, those of stem too, which the plan rounds"


def test_inputs_that_the_package_does_not_know_are_named_before_anything_is_written(tmp_path: Path) -> None:
    narrow = nn.Sequential(*(nn.Linear(48, 48) for _ in range(9))).eval()
    must = "round inputs to integers of 2 to 8 bits, fp8_e4m3, fp8_e4m3_dynamic, mxfp8, mxfp4, nvfp4, or not at all"
    for model, schemes, message in (
        (
            linears(torch.float32),
            ("W4AFP8_E5M2", "W8A12", *("W4A8",) * 5, "FP8AFP8_E5M2_STATIC", "W4A1"),
            f"export: plan must {must}, for compressed-tensors, got W4AFP8_E5M2 of 0, W8A12 of 1, .* of 7 and 1 more",
        ),
        (
            narrow,
            ("W4AMXFP8", "W8ANVFP4", *("W4A16",) * 7),
            "export: plan must round inputs in blocks that divide them for compressed-tensors, got W4AMXFP8 of 0$",
        ),
    ):
        plan = mixed_plan(model, schemes, Quantizer(-1, 1))
        for call in (predicted_bytes, clado.export):
            with pytest.raises(clado.CladoError, match=message):
                call(model, plan, *((tmp_path / "out",) if call is clado.export else ()), NAME)
    assert not (tmp_path / "out").exists()
