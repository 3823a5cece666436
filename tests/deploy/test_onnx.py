"""Exported graphs in onnxruntime on the CPU: the logits of clado.apply, the bytes that were promised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import clado
from clado.deploy import predicted_bytes, verify
from clado.deploy.formats import onnx as writer
from clado.quant import Candidates, Quantizer, Scheme, calibrate, calibrate_inputs
from tests.models import lively, random_plan, small_cnn, tiny_vit

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
# Both sides sum float32 products, in another order.
TOLERANCE = 1e-5


def initializers(folder: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in onnx.load(folder / writer.MODEL_FILE).graph.initializer}


def check(model: nn.Module, plan: clado.Plan, x: torch.Tensor, folder: Path) -> None:
    written = clado.export(model, plan, folder, "onnx", example=x)
    assert (written.quantized, written.leftovers) == predicted_bytes(model, plan, "onnx")
    parts = ("weight_codes", "weight_scale", "weight_zero_point", "weight_global_scale")
    stored = sum(len(t.raw_data) for name, t in initializers(folder).items() if name.endswith(parts))
    assert written.quantized == stored
    assert sum(f.stat().st_size for f in folder.glob("model.onnx*")) == sum(
        (written.quantized, written.leftovers, written.header)
    )
    assert written.header < 40_000  # of graph, for nets of about a hundred nodes
    wanted = clado.apply(model, plan)
    for batch in (x, x[:1], torch.cat([x, x])):  # the batch size is free
        with torch.no_grad():
            logits = wanted(batch).numpy()
        assert np.abs(writer.run(folder, batch) - logits).max() <= TOLERANCE * np.abs(logits).max()


@pytest.mark.parametrize(
    ("name", "group_size", "symmetric"),
    [("vit", -1, True), ("vit", 5, False), ("vit", 0, False), ("cnn", -1, False), ("cnn", 32, True)],
)
def test_onnxruntime_gives_the_logits_of_apply(name: str, group_size: int, symmetric: bool, tmp_path: Path) -> None:
    model, shape = tiny_vit() if name == "vit" else small_cnn()
    x = torch.randn(3, *shape)
    check(model, random_plan(model, Quantizer(group_size, 2, symmetric)), x, tmp_path / "out")


def schemed(model: nn.Module, quantizer: Quantizer, *labels: str, x: torch.Tensor | None = None) -> clado.Plan:
    """Schemes in turn; ``x``: what ranges of inputs are calibrated on."""
    plan = random_plan(model, quantizer, (8,))
    schemes = {layer.name: labels[k % len(labels)] for k, layer in enumerate(plan.layers)}
    if x is None:
        return replace(plan, schemes=schemes)
    candidates = Candidates(plan.layers, tuple((Scheme.of(label),) for label in schemes.values()))
    ranges = calibrate_inputs(model, [x], lambda net, batch: net(batch), candidates)
    return replace(plan, schemes=schemes, activations=ranges)


def of_two_ranks() -> tuple[nn.Module, tuple[int, int]]:
    """Rows are whole blocks of every format; inputs of rank 3, then of rank 2; with and without bias."""
    torch.manual_seed(0)
    behind = [nn.Linear(32, 32), nn.Flatten(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10)]
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32, bias=False), nn.ReLU(), *behind)
    return lively(net).eval(), (3, 32)


@pytest.mark.parametrize(("name", "group_size"), [("ranks", -1), ("ranks", 0), ("ranks", 16), ("cnn", -1)])
def test_floats_of_8_and_16_bits_have_types_of_their_own(name: str, group_size: int, tmp_path: Path) -> None:
    model, shape = of_two_ranks() if name == "ranks" else small_cnn()
    labels = ("FP8A16", "BF16", "MXFP8A16" if name == "ranks" else "FP16", "W4A16", "FP8_E5M2A16")
    plan = schemed(model, Quantizer(group_size, 2, group_size != 16), *labels)
    check(model, plan, torch.randn(3, *shape), tmp_path / "out")
    made, held = onnx.load(tmp_path / "out" / writer.MODEL_FILE), initializers(tmp_path / "out")
    assert made.opset_import[0].version == 21
    types = {"fp8_e4m3": "FLOAT8E4M3FN", "fp8_e5m2": "FLOAT8E5M2", "mxfp8": "FLOAT8E4M3FN", "int4": "INT4"}
    types |= {"bf16": "BFLOAT16", "fp16": "FLOAT16"}
    for layer, scheme in plan.chosen.items():
        kind = getattr(onnx.TensorProto, types[scheme.weight])
        assert held[f"{layer}.weight_codes"].data_type == kind
        assert (f"{layer}.weight_scale" in held) == (scheme.bits < 16)


def test_floats_of_4_bits_are_read_by_the_reference(tmp_path: Path) -> None:
    """onnxruntime has no fp4 on the CPU. Scales of nvfp4 are float8 and have a DequantizeLinear of their own."""
    model, shape = of_two_ranks()
    x = torch.randn(2, *shape)
    for labels, opset in ((("NVFP4A16", "MXFP4A16", "FP8A16"), 23), (("NVFP4A16", "W2A16"), 25)):
        plan = schemed(model, Quantizer(16 if opset == 23 else 0, 2), *labels)
        check(model, plan, x, tmp_path / "out")
        made, held = onnx.load(tmp_path / "out" / writer.MODEL_FILE), initializers(tmp_path / "out")
        assert made.opset_import[0].version == opset
        fours = [name for name, scheme in plan.chosen.items() if scheme.weight in ("nvfp4", "mxfp4")]
        assert {held[f"{name}.weight_codes"].data_type for name in fours} == {onnx.TensorProto.FLOAT4E2M1}
        double = [n for n in made.graph.node if n.op_type == "DequantizeLinear" and "global" in n.input[1]]
        assert len(double) == sum(scheme.weight == "nvfp4" for scheme in plan.chosen.values())
    assert "onnx's reference gives the logits" in verify(model, plan, tmp_path / "out", "onnx", example=x)


class Awkward(nn.Module):
    """Rows and columns of odd numbers, two inputs' ranks, a weight used with both, one without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(37, 45), nn.Linear(45, 45)
        self.third, self.head = nn.Linear(45, 39, bias=False), nn.Linear(39, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu())  # [N, 3, 45]
        return self.head(self.third(x.mean(1) + self.second(x.mean(1)))) + self.third(x).mean((1, 2))[:, None]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_awkward_shapes_at_every_container(bits: int, tmp_path: Path) -> None:
    """onnxruntime reads 2-bit weights [in, out] wrong where ``out`` is no multiple of 4: those lie the other way round."""
    torch.manual_seed(0)
    model = Awkward().eval()
    plan = random_plan(model, Quantizer(16, 2, symmetric=bits == 4), (bits,))
    check(model, plan, torch.randn(2, 3, 37), tmp_path / "out")
    made = onnx.load(tmp_path / "out" / writer.MODEL_FILE)
    assert made.opset_import[0].version == (25 if bits == 2 else 21)
    kinds = {t.data_type for name, t in initializers(tmp_path / "out").items() if name.endswith("weight_codes")}
    assert kinds == {{2: onnx.TensorProto.INT2, 3: onnx.TensorProto.INT8, 4: onnx.TensorProto.INT4}[bits]}


def test_weights_are_found_by_name_and_hold_our_codes(tmp_path: Path) -> None:
    model, shape = tiny_vit()
    plan = random_plan(model, Quantizer(symmetric=False), (4,))
    clado.export(model, plan, tmp_path / "out", "onnx", example=torch.randn(1, *shape))
    held = initializers(tmp_path / "out")
    for layer in plan.layers:
        found = plan.quantizer.quantize(model.get_parameter(layer.names[0]), 4)
        codes = onnx.numpy_helper.to_array(held[f"{layer.name}.weight_codes"]).astype(np.int8)
        turned = layer.name.startswith("blocks")  # inputs of rank 3: a MatMul
        assert codes.shape == (tuple(reversed(layer.shape)) if turned else layer.shape)
        assert np.array_equal((codes.T if turned else codes).reshape(found.codes.shape), found.codes.numpy())
        assert layer.names[0] not in held
        zeros = onnx.numpy_helper.to_array(held[f"{layer.name}.weight_zero_point"]).astype(np.int8)
        assert np.array_equal(zeros, found.zero_point.view(-1).numpy())


def test_the_same_call_writes_the_same_bytes_and_no_paths(tmp_path: Path) -> None:
    model, shape = small_cnn()
    plan, x = random_plan(model, Quantizer(), (4,)), torch.randn(2, *shape)
    for name in "ab":
        clado.export(model, plan, tmp_path / name, "onnx", example=x)
    first, second = ((tmp_path / name / writer.MODEL_FILE).read_bytes() for name in "ab")
    assert first == second
    assert b".py" not in first
    assert "within" in verify(model, plan, tmp_path / "a", "onnx", example=x)


def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shape = small_cnn()
    plan, x = random_plan(model, Quantizer(), (4, 8)), torch.randn(2, *shape)
    monkeypatch.setattr(writer, "_LARGEST_FILE", 100)
    written = clado.export(model, plan, tmp_path / "out", "onnx", example=x)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.onnx", "model.onnx.data", "plan.json"}
    assert written.quantized + written.leftovers + written.header == sum(
        p.stat().st_size for p in (tmp_path / "out").glob("model.onnx*")
    )
    assert "within" in verify(model, plan, tmp_path / "out", "onnx", example=x)


def test_verify_tells_other_weights_and_bad_input_is_one_line(tmp_path: Path) -> None:
    model, shape = small_cnn()
    plan, x = random_plan(model, Quantizer(), (2,)), torch.randn(2, *shape)
    clado.export(model, plan, tmp_path / "out", "onnx", example=x)
    other = random_plan(model, Quantizer(), (3,))
    with pytest.raises(clado.CladoError, match=r"verify: logits must equal those of clado.apply within 0.0001, got"):
        verify(model, other, tmp_path / "out", "onnx", example=x)
    with pytest.raises(clado.CladoError, match=r"example must be given for onnx: inputs \[n, …\], got none"):
        clado.export(model, plan, tmp_path / "none", "onnx")
    with pytest.raises(clado.CladoError, match=r"model must run on example, of shapes") as caught:
        clado.export(model, plan, tmp_path / "none", "onnx", example=torch.randn(2, 5, 8, 8))
    assert "\n" not in str(caught.value)
    half = small_cnn()[0].half()
    with pytest.raises(clado.CladoError, match=r"layer stem must be float32 for onnx, got torch.float16"):
        clado.export(half, random_plan(half, Quantizer()), tmp_path / "none", "onnx", example=x)
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_activations_of_8_bits(name: str, tmp_path: Path) -> None:
    """Against the same rounding as hooks in torch; a value next to a tie may take the other code, one step of 255 away."""
    model, shape = tiny_vit() if name == "vit" else small_cnn()
    plan, x = random_plan(model, Quantizer(), (8,)), torch.randn(16, *shape)
    wanted, seen = clado.apply(model, plan), {}

    def note(layer: str) -> Any:
        return lambda _, inputs: seen.setdefault(layer, []).append(inputs[0])

    def rounded(low: float, high: float) -> Any:
        scale = (high - low) / 255
        zero = round(-low / scale)
        return lambda _, inputs: (torch.fake_quantize_per_tensor_affine(inputs[0], scale, zero, 0, 255),)

    owners = {
        layer.name: [wanted.get_submodule(n.removesuffix(".weight")) for n in layer.names] for layer in plan.layers
    }
    handles = [m.register_forward_pre_hook(note(layer)) for layer, modules in owners.items() for m in modules]
    with torch.no_grad():
        plain = wanted(x).numpy()
    for handle in handles:
        handle.remove()
    ranges = {
        n: (min(0.0, *(float(v.min()) for v in held)), max(float(v.max()) for v in held)) for n, held in seen.items()
    }
    for layer, modules in owners.items():
        for module in modules:
            module.register_forward_pre_hook(rounded(*ranges[layer]))
    with torch.no_grad():
        logits = wanted(x).numpy()
    clado.export(model, plan, tmp_path / "out", "onnx", example=x, activations=ranges)
    found = writer.run(tmp_path / "out", x)
    moved = np.abs(logits - plain).mean()
    assert moved > 0
    assert np.abs(found - logits).mean() < 0.1 * moved
    made = [node.op_type for node in onnx.load(tmp_path / "out" / writer.MODEL_FILE).graph.node]
    assert made.count("QuantizeLinear") == sum(map(len, owners.values()))
    with pytest.raises(clado.CladoError, match=r"activations must name layers of the plan, got \['other'\]"):
        clado.export(model, plan, tmp_path / "none", "onnx", example=x, activations={"other": (0.0, 1.0)})
    with pytest.raises(clado.CladoError, match="activations must be left out unless for onnx, got safetensors"):
        clado.export(model, plan, tmp_path / "none", activations=ranges)


def wide(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [part for _ in range(4) for part in (nn.Linear(512, 512), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(512, 10)).eval()


@pytest.mark.parametrize("seed", range(2))
def test_values_beside_a_tie_do_not_refuse_an_export(seed: int, tmp_path: Path) -> None:
    """Among a quarter of a million rounded values some are summed to the other side of a tie in another order."""
    net, x = wide(seed), torch.randn(512, 512)
    plan = rounded_plan(net, x, Quantizer(), 8)
    clado.export(net, plan, tmp_path / "out", "onnx", example=x)
    said = verify(net, plan, tmp_path / "out", "onnx", example=x)
    assert "of the largest, and within" in said
    assert plan.activations is not None
    assert said.endswith(f"where the inputs of {len(plan.activations.ranges)} layers are rounded")


def test_verify_tells_other_ranges_and_other_weights_behind_rounded_inputs(tmp_path: Path) -> None:
    net, x = wide(0), torch.randn(8, 512)
    plan = random_plan(net, Quantizer(), (8,))
    ranges = {layer.name: (-3.0, 4.0 + k) for k, layer in enumerate(plan.layers[1:])}
    clado.export(net, plan, tmp_path / "out", "onnx", example=x, activations=ranges)
    given = {"example": x, "activations": ranges}
    assert "inputs of 4 layers are rounded" in verify(net, plan, tmp_path / "out", "onnx", **given)
    for other in (None, {}, ranges | {"2": (-3.0, 4.5)}, ranges | {"0": (-3.0, 4.0)}):
        with pytest.raises(clado.CladoError, match="verify: inputs must be rounded to the ranges of the plan"):
            verify(net, plan, tmp_path / "out", "onnx", example=x, activations=other)
    fewer = random_plan(net, Quantizer(), (7,))
    with pytest.raises(clado.CladoError, match=r"logits must equal those of clado.apply within 0.0001, got"):
        verify(net, fewer, tmp_path / "out", "onnx", **given)
    with pytest.raises(clado.CladoError, match=r"range of 2 must be finite and hold more than 0, got \(0.0, 0.0\)"):
        clado.export(net, plan, tmp_path / "none", "onnx", example=x, activations={"2": (0.0, 0.0)})
    with pytest.raises(clado.CladoError, match="verify: path must hold an export for onnx, got"):
        verify(net, plan, tmp_path / "none", "onnx", **given)


def test_ranges_that_are_given_take_the_place_of_the_plans(tmp_path: Path) -> None:
    net, x = wide(0), torch.randn(8, 512)
    plan = rounded_plan(net, x, Quantizer(), 8)
    given = {"example": x, "activations": {"2": (-1.0, 2.0)}}
    clado.export(net, plan, tmp_path / "out", "onnx", **given)
    assert "inputs of 1 layers are rounded" in verify(net, plan, tmp_path / "out", "onnx", **given)


class Bessel(nn.Module):
    """An operator that ONNX has no word for."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.special.i0e(self.body(x)))


class Branching(Bessel):
    """A forward that looks at its values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return self.head(y + 1 if y.sum() > 0 else y)


@pytest.mark.parametrize(
    ("kind", "reason"), [(Bessel, "bessel_i0e"), (Branching, r"data-dependent .*test_onnx\.py:\d+")]
)
def test_what_torch_refuses_is_told_with_its_reason(kind: type[nn.Module], reason: str, tmp_path: Path) -> None:
    net = kind().eval()
    with pytest.raises(clado.CladoError, match=rf"go through torch.onnx.export, got \w+: .*{reason}") as caught:
        clado.export(net, random_plan(net, Quantizer(), (4,)), tmp_path / "out", "onnx", example=torch.randn(4, 12))
    assert not set("\n\x1b") & set(str(caught.value))


def test_activations_of_the_plan(tmp_path: Path) -> None:
    """Calibrated by profile, rounded by apply, and the same in onnxruntime."""
    model, shape = tiny_vit()
    x = torch.randn(8, *shape)
    sens = clado.profile(model, [x], bits=(8,), estimator="diagonal", act_bits=8, verbose=False)
    plan = clado.given_plan(sens, {layer.name: 8 for layer in sens.layers})
    clado.export(model, plan, tmp_path / "out", "onnx", example=x)
    made = [node.op_type for node in onnx.load(tmp_path / "out" / writer.MODEL_FILE).graph.node]
    assert made.count("QuantizeLinear") == len(plan.activations.ranges) > 0
    assert "within" in verify(model, plan, tmp_path / "out", "onnx", example=x)
    with torch.no_grad():
        wanted, plain = clado.apply(model, plan)(x).numpy(), model(x).numpy()
    found = writer.run(tmp_path / "out", x)
    assert np.abs(found - wanted).mean() < 0.1 * np.abs(wanted - plain).mean()


class Chained(nn.Module):
    """Layers that onnxruntime would fuse with the rounding behind them: convolutions, rank 3 without bias, rank 2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3)
        self.first, self.second = nn.Linear(32, 45, bias=False), nn.Linear(45, 40, bias=False)
        self.third, self.head = nn.Linear(40, 24), nn.Linear(24, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.stem(x).relu()).relu().flatten(2).transpose(1, 2)  # [N, 25, 32]
        return self.head(self.third(self.second(self.first(x)).relu().mean(1)).relu())


def rounded_plan(model: nn.Module, x: torch.Tensor, quantizer: Quantizer, bits: int) -> clado.Plan:
    plan = random_plan(model, quantizer, (bits,))
    activations = calibrate(model, [x], lambda model, batch: model(batch), plan.layers)
    return replace(plan, activations=activations)


def optimized(folder: Path) -> Any:
    """The graph that onnxruntime runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(folder / writer.MODEL_FILE), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx").graph


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(8, -1, True), (8, -1, False), (8, 16, True), (7, 0, False), (2, -1, False)]
)
@pytest.mark.parametrize("kind", [Awkward, Chained])
def test_rounded_inputs_before_every_layout(
    kind: type[nn.Module], bits: int, group_size: int, symmetric: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = lively(kind()).eval()
    x = torch.randn(8, *((3, 37) if kind is Awkward else (3, 9, 9)))
    plan = rounded_plan(model, x, Quantizer(group_size, 2, symmetric), bits)
    written = clado.export(model, plan, tmp_path / "out", "onnx", example=x)
    assert (written.quantized, written.leftovers) == predicted_bytes(model, plan, "onnx")
    with torch.no_grad():
        wanted = clado.apply(model, plan)(x).numpy()
        plain = clado.apply(model, replace(plan, activations=None))(x).numpy()
    found = writer.run(tmp_path / "out", x)
    assert np.abs(found - wanted).mean() < 0.1 * np.abs(wanted - plain).mean()
    integer = {node.op_type for node in optimized(tmp_path / "out").node if node.op_type.startswith(("Q", "MatMulI"))}
    assert integer - {"QuantizeLinear"} <= {"QLinearMatMul", "MatMulIntegerToFloat"}
    assert (len(integer) > 1) == (bits > 4 and group_size <= 0)


def product_without_vnni(x: np.ndarray[Any, Any], w: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """uint8 [n, k] by codes [k, m]: int8 ones by vpmaddubsw, whose sums of two products end at 16 bits; uint8 ones exact."""
    products = x[:, :, None].astype(np.int32) * w.astype(np.int32)
    pairs = products[:, ::2] + products[:, 1::2]
    return (np.clip(pairs, -(2**15), 2**15 - 1) if w.dtype == np.int8 else pairs).sum(1)


@pytest.mark.parametrize("bits", [7, 8])
def test_integer_products_are_exact_on_processors_without_vnni(bits: int, tmp_path: Path) -> None:
    model, shape = tiny_vit()
    x = torch.randn(4, *shape)
    clado.export(model, rounded_plan(model, x, Quantizer(), bits), tmp_path / "out", "onnx", example=x)
    graph = optimized(tmp_path / "out")
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = [held[node.input[1]] for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(weights) == 8  # all of the blocks
    for codes in weights:
        inputs = np.random.default_rng(0).integers(128, 256, (4, codes.shape[0]), np.uint8)
        exact = inputs.astype(np.int32) @ codes.astype(np.int32)
        assert np.array_equal(product_without_vnni(inputs, codes), exact)
        if bits == 8:  # as signed codes they would not be
            signed = (codes.astype(np.int16) - 128).astype(np.int8)
            exact = inputs.astype(np.int32) @ signed.astype(np.int32)
            assert np.abs(product_without_vnni(inputs, signed) - exact).max() > 0.01 * np.abs(exact).max()


@pytest.mark.parametrize(
    "labels", [("W8A8", "W4A8", "W4A16"), ("FP8", "W4AFP8_STATIC", "FP8_E5M2"), ("BF16A8", "FP8A8", "BF16A8")]
)
def test_inputs_of_schemes(labels: tuple[str, ...], tmp_path: Path) -> None:
    """Static integers and fp8, mixed from layer to layer. By itself onnxruntime would take a Relu before float8 codes for part of
    the rounding, and quantize weights that are kept."""
    torch.manual_seed(0)
    model = lively(Chained()).eval()
    x = torch.randn(8, 3, 9, 9)
    plan = schemed(model, Quantizer(-1, 2), *labels, x=x)
    if "BF16A8" in labels:  # the only rows that are whole blocks
        plan = replace(plan, schemes={**plan.schemes, "first": "MXFP8A8"})
    written = clado.export(model, plan, tmp_path / "out", "onnx", example=x)
    assert (written.quantized, written.leftovers) == predicted_bytes(model, plan, "onnx")
    rounded = [name for name, scheme in plan.chosen.items() if scheme.input]
    said = verify(model, plan, tmp_path / "out", "onnx", example=x)
    assert said.endswith(f"where the inputs of {len(rounded)} layers are rounded")
    made = [node.op_type for node in onnx.load(tmp_path / "out" / writer.MODEL_FILE).graph.node]
    assert made.count("QuantizeLinear") == len(rounded)
    with torch.no_grad():
        wanted = clado.apply(model, plan)(x).numpy()
        plain = clado.apply(model, writer._weights_alone(plan))(x).numpy()
    found = writer.run(tmp_path / "out", x)
    assert np.abs(found - wanted).mean() < 0.1 * np.abs(wanted - plain).mean()
    held = initializers(tmp_path / "out")
    kinds = {"int8": onnx.TensorProto.UINT8, "fp8_e4m3": onnx.TensorProto.FLOAT8E4M3FN}
    kinds["fp8_e5m2"] = onnx.TensorProto.FLOAT8E5M2
    assert all(held[f"{n}.input_zero_point"].data_type == kinds[plan.chosen[n].input] for n in rounded)


def test_inputs_that_a_graph_does_not_hold_are_named_before_it_is_made(tmp_path: Path) -> None:
    model, x = lively(Chained()).eval(), torch.randn(8, 3, 9, 9)
    plan = schemed(model, Quantizer(), "W8A8_DYNAMIC", "W8A8", "FP8_DYNAMIC", "W4A4", "W8A16", "W4AMXFP8", x=x)
    base = replace(rounded_plan(model, x, Quantizer(), 8))
    assert base.activations is not None
    base = replace(base, activations=replace(base.activations, formats={"int4": base.activations.ranges}))
    must = r"plan must round inputs to 8 bits with one range per tensor \(A8, fp8\), or not at all, for onnx, got "
    for own, got in (
        (plan, "W8A8_DYNAMIC of stem, FP8_DYNAMIC of first, W4A4 of second and 1 more"),
        (base, "int4 of stem, int4 of conv, int4 of first and 3 more"),
    ):
        for call in (predicted_bytes, clado.export):
            with pytest.raises(clado.CladoError, match=must + got):
                call(model, own, *((tmp_path / "out",) if call is clado.export else ()), "onnx", example=x)
    assert not (tmp_path / "out").exists()
