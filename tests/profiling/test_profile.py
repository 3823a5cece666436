"""The estimators against a plain loop over every pair, their own definition, and each other; bad input in one line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import clado
from clado.artifacts import Sensitivity
from clado.graph import open_runner
from clado.profiling import Run, profile
from clado.quant import Quantizer
from tests.models import small_cnn, timm_model, tiny_vit

TIMM = [
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "resnet18",
    "mobilenetv3_small_100",
    "convnext_atto",
]


def net_and_data(name: str, samples: int = 24) -> tuple[nn.Module, Tensor, Tensor]:
    model, shape = tiny_vit() if name == "vit" else small_cnn()
    generator = torch.Generator().manual_seed(1)
    return (
        model,
        torch.randn(samples, *shape, generator=generator),
        torch.randint(0, 10, (samples,), generator=generator),
    )


def plain_loop(model: nn.Module, sens: Sensitivity, x: Tensor, y: Tensor, loss: str) -> tuple[NDArray, NDArray]:
    """ΔL and Ω by the definition: float64, weights swapped in, one full forward per candidate and per pair."""
    model, x = copy.deepcopy(model).double(), x.double()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = [parameters[layer.names[0]] for layer in sens.layers]
    clean = [w.detach().clone() for w in weights]
    variants = [sens.quantizer.fake_quant(w.float(), sens.bits).double() for w in clean]
    reference = model(x).log_softmax(-1)

    def value(choice: dict[int, int]) -> float:
        for layer, m in choice.items():
            weights[layer].copy_(variants[layer][m])
        logs = model(x).log_softmax(-1)
        for layer in choice:
            weights[layer].copy_(clean[layer])
        if loss == "kl":
            return (reference.exp() * (reference - logs)).sum(-1).mean().item()
        return torch.nn.functional.nll_loss(logs, y).item()

    width, count = len(sens.bits), sens.num_candidates
    base = value({})
    single = np.array([value({v // width: v % width}) for v in range(count)]) - base
    omega = np.zeros((count, count))
    for v in range(count):
        for w in range(v + 1, count):
            if v // width != w // width:
                joint = value({v // width: v % width, w // width: w % width}) - base
                omega[v, w] = omega[w, v] = joint - single[v] - single[w]
    return single, omega


def relative(got: NDArray, wanted: NDArray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
@pytest.mark.parametrize("name", ["vit", "cnn"])
@torch.no_grad()
def test_exact_equals_the_plain_loop(name: str, loss: str) -> None:
    model, x, y = net_and_data(name)
    ends = name == "cnn"
    # float32: the second difference of float32 forwards is right to about 1e-4 of its norm (docs/numerics.md); float64: rounding.
    for precision, tolerance in (("float32", 1e-4), ("float64", 1e-9)):
        sens = profile(
            model,
            [(x, y)],
            estimator="exact",
            loss=loss,
            precision=precision,
            num_samples=24,
            batch_size=7,
            quantize_ends=ends,
            rounding="nearest",
            verbose=False,
        )
        single, omega = plain_loop(model, sens, x, y, loss)
        assert relative(sens.delta_loss, single) < tolerance
        assert relative(sens.interaction, omega) < tolerance


def test_the_cnn_has_a_tied_weight_that_is_one_layer() -> None:
    model, x, _ = net_and_data("cnn")
    sens = profile(model, [x], quantize_ends=True, verbose=False)
    assert any(len(layer.names) == 2 for layer in sens.layers)


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
@torch.no_grad()
def test_logit_equals_its_definition(loss: str) -> None:
    """Losses of z + δ_v + δ_w, in float64 from the float64 logits of each candidate alone."""
    model, x, y = net_and_data("vit")
    how: dict[str, Any] = {"loss": loss, "precision": "float64", "rounding": "nearest", "verbose": False}
    sens = profile(model, [(x, y)], estimator="logit", **how)
    double = copy.deepcopy(model).double()
    weights = dict(double.named_parameters())
    clean = double(x.double())
    outputs = []
    for layer in sens.layers:
        weight = weights[layer.names[0]]
        kept = weight.clone()
        for variant in sens.quantizer.fake_quant(kept.float(), sens.bits):
            weight.copy_(variant)
            outputs.append(double(x.double()) - clean)
        weight.copy_(kept)

    def value(delta: Tensor) -> float:
        logs, reference = (clean + delta).log_softmax(-1), clean.log_softmax(-1)
        if loss == "kl":
            return (reference.exp() * (reference - logs)).sum(-1).mean().item()
        return torch.nn.functional.nll_loss(logs, y).item()

    base = value(torch.zeros_like(clean))
    single = np.array([value(d) - base for d in outputs])
    omega = np.array([[value(v + w) - value(v) - value(w) + base for w in outputs] for v in outputs])
    omega[sens.candidates.same_layer] = 0
    assert relative(sens.delta_loss, single) < 1e-6
    assert relative(sens.interaction, omega) < 1e-6


@pytest.mark.parametrize("estimator", ["diagonal", "logit", "exact"])
def test_same_call_same_bits_and_chunks_add_up(estimator: str) -> None:
    model, x, y = net_and_data("vit")

    def run(size: int) -> Sensitivity:
        return profile(model, [(x[:10], y[:10]), (x[10:], y[10:])], estimator=estimator, batch_size=size, verbose=False)

    first, again, other = run(8), run(8), run(24)
    for name in ("delta_loss", "interaction", "stderr"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        np.testing.assert_allclose(getattr(first, name), getattr(other, name), rtol=1e-3, atol=1e-9)
    assert first.fingerprint == again.fingerprint != other.fingerprint


@torch.no_grad()
def test_standard_errors_are_those_of_the_samples() -> None:
    model, x, y = net_and_data("vit", samples=6)

    def run(inputs: Tensor, labels: Tensor) -> Sensitivity:
        # float64: in float32 the second difference of an 8-bit pair is rounding, other for a batch of 1 than of 6.
        how: dict[str, Any] = {"loss": "cross_entropy", "precision": "float64", "rounding": "nearest", "verbose": False}
        return profile(model, [(inputs, labels)], estimator="exact", **how)

    whole, ones = run(x, y), [run(x[k : k + 1], y[k : k + 1]) for k in range(6)]
    losses = np.stack([one.delta_loss for one in ones])
    pairs = np.stack([one.interaction for one in ones])
    np.testing.assert_allclose(np.diag(whole.stderr), losses.std(0, ddof=1) / 6**0.5, rtol=1e-6)
    off = ~whole.candidates.same_layer
    # A spread of 1e-6 next to second differences that are right to 1e-15.
    np.testing.assert_allclose(whole.stderr[off], (pairs.std(0, ddof=1) / 6**0.5)[off], rtol=1e-6)
    assert np.isnan(np.diag(ones[0].stderr)).all()


def test_work_is_counted_in_forward_equivalents() -> None:
    model, x, _ = net_and_data("vit")
    logit = profile(model, [x], estimator="logit", verbose=False)
    exact = profile(model, [x], estimator="exact", verbose=False)
    with torch.no_grad():
        runner = open_runner(model, x)
    suffix, width = runner.suffix_share, len(exact.bits)
    pairs = width**2 * sum(j * share for j, share in enumerate(suffix))
    assert logit.info["forward_equivalents"] == pytest.approx(runner.forward_share + width * sum(suffix))
    assert exact.info["forward_equivalents"] == pytest.approx(exact.info["expected_forward_equivalents"])
    walks = 2 + 2 * width * sum(suffix)  # of the single perturbations, and of the prefixes that pairs share
    assert pairs < exact.info["forward_equivalents"] < pairs + walks


@pytest.mark.parametrize("name", TIMM)
def test_timm_models_are_captured_and_profiled(name: str) -> None:
    model, shape = timm_model(name)
    x = torch.randn(3, *shape)
    sens = profile(model, [x], bits=(2, 8), num_samples=3, scale_steps=1, verbose=False)
    assert len(sens.layers) > 10
    assert all(layer.macs > 0 for layer in sens.layers)
    assert sens.delta_loss.min() >= 0
    if "vit" in name or "deit" in name:
        assert sens.info["forward_equivalents"] <= 0.60 * sens.num_candidates


def test_bfloat16_weights_are_quantized_as_they_are() -> None:
    model, x, _ = net_and_data("vit")
    half = copy.deepcopy(model).bfloat16()
    sens = profile(half, [x], rounding="nearest", verbose=False)
    single, _ = plain_loop_of_bfloat16(half, sens, x)
    assert relative(sens.delta_loss, single) < 1e-4
    assert next(half.parameters()).dtype == torch.bfloat16


@torch.no_grad()
def plain_loop_of_bfloat16(model: nn.Module, sens: Sensitivity, x: Tensor) -> tuple[NDArray, None]:
    double = copy.deepcopy(model).double()
    reference = double(x.double()).log_softmax(-1)
    single = []
    for layer in sens.layers:
        weight, source = double.get_parameter(layer.names[0]), model.get_parameter(layer.names[0])
        kept = weight.clone()
        for variant in sens.quantizer.fake_quant(source, sens.bits):
            assert variant.dtype == torch.bfloat16
            weight.copy_(variant)
            single.append((reference.exp() * (reference - double(x.double()).log_softmax(-1))).sum(-1).mean().item())
        weight.copy_(kept)
    return np.array(single), None


def test_output_dir_is_reused_for_the_same_run_and_refused_for_another(tmp_path: Path) -> None:
    model, x, _ = net_and_data("vit")
    first = profile(model, [x], output_dir=tmp_path, verbose=False)
    stamp = (tmp_path / "sensitivity.safetensors").stat().st_mtime_ns
    again = profile(model, [x], output_dir=tmp_path, verbose=False)
    assert np.array_equal(first.interaction, again.interaction)
    with pytest.raises(clado.CladoError, match="whose data differ from sample 3 on"):
        profile(model, [torch.cat([x[:3], x[4:]])], output_dir=tmp_path, verbose=False)
    with pytest.raises(clado.CladoError, match=r"whose bits differ \(\[2, 4, 8\] there, \[2, 4\] here\)"):
        profile(model, [x], bits=(2, 4), output_dir=tmp_path, verbose=False)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    with pytest.raises(clado.CladoError, match="whose weights differ"):
        profile(other, [x], output_dir=tmp_path, verbose=False)
    assert (tmp_path / "sensitivity.safetensors").stat().st_mtime_ns == stamp


def test_ignore_patterns() -> None:
    model, x, _ = net_and_data("vit")
    names = [layer.name for layer in profile(model, [x], verbose=False).layers]
    assert not any("patch_embed" in name or name == "head" for name in names)
    fewer = [layer.name for layer in profile(model, [x], ignore=["*.mlp.*", "re:.*1.*qkv"], verbose=False).layers]
    assert fewer == [n for n in names if "mlp" not in n and n != "blocks.1.attn.qkv"]
    every = [layer.name for layer in profile(model, [x], quantize_ends=True, verbose=False).layers]
    assert {"patch_embed.proj", "head"} < set(every)


def test_a_shuffling_loader_is_fixed_by_the_seed() -> None:
    model, x, _ = net_and_data("vit")
    loader = torch.utils.data.DataLoader(x, batch_size=5, shuffle=True)
    runs = [profile(model, loader, num_samples=10, seed=seed, verbose=False) for seed in (0, 0, 1)]
    assert runs[0].fingerprint["data"] == runs[1].fingerprint["data"] != runs[2].fingerprint["data"]


class BatchMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        return self.head(self.out(h - h.mean(0)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_loader": []}, "data_loader must yield at least one sample"),
        (
            {"data_loader": [torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 9)]},
            "data_loader must yield inputs of one shape",
        ),
        ({"data_loader": ["cat.png"]}, "data_loader must yield tensors or"),
        (
            {"data_loader": [(torch.zeros(2, 1, 8, 8), torch.tensor([1, 10]))]},
            r"targets must lie in 0\.\.9, got 1\.\.10",
        ),
        ({"loss": "cross_entropy", "data_loader": [torch.zeros(2, 1, 8, 8)]}, r"must yield \(inputs, targets\)"),
        ({"bits": (2, 9)}, r"bits must be distinct ascending widths in 2\.\.8"),
        ({"bits": ()}, r"bits must be distinct ascending widths in 2\.\.8"),
        ({"ignore": ["nothing"]}, "ignore must match at least one layer"),
        ({"estimator": "hessian"}, "estimator must be one of"),
        ({"model": BatchMean().eval(), "data_loader": [torch.randn(3, 4)]}, "model must treat samples independently"),
        ({"model": BatchMean(), "data_loader": [torch.randn(3, 4)]}, r"be in eval mode"),
        ({"model": lambda x: x}, r"model must be a torch\.nn\.Module, got function"),
        ({"model": nn.Flatten().eval()}, "model must have weights to quantize"),
        ({"model": nn.Linear(4, 4, device="meta").eval()}, "model must have weights with values"),
        ({"device": "tpu"}, "device must be cpu or a GPU that torch sees, got tpu"),
        ({"device": "meta"}, "device must be cpu or a GPU that torch sees, got meta"),
        ({"bits": 4}, "bits must be a sequence of widths, got 4"),
        ({"batch_size": 2.5}, r"batch_size must be a whole number from 1 up, got 2\.5"),
        ({"num_samples": 0}, "num_samples must be a whole number from 1 up, got 0"),
        ({"seed": 2**64}, "seed must be a whole number of 64 bits"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(change: dict[str, object], message: str, tmp_path: Path) -> None:
    model, x, y = net_and_data("vit")
    arguments = {"model": model, "data_loader": [(x, y)], **change}
    with pytest.raises(clado.CladoError, match=message) as caught:
        profile(**arguments, output_dir=tmp_path / "run", verbose=False)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", [3, ""])
def test_a_run_directory_is_a_folder(place: object) -> None:
    model, x, _ = net_and_data("vit")
    with pytest.raises(clado.CladoError, match="output_dir must be a folder"):
        profile(model, [x], output_dir=place, verbose=False)  # type: ignore[arg-type]


def test_a_run_directory_that_cannot_be_made_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, _ = net_and_data("vit")
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(Run, "gather", None)
    with pytest.raises(clado.CladoError, match=r"output_dir must be a folder that can be written, .* is a file"):
        profile(model, [x], output_dir=tmp_path / "file" / "run", verbose=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_is_not_finite_is_named() -> None:
    model, x, _ = net_and_data("vit")
    broken = torch.cat([x[:8], x[8:] * float("nan")])
    for rounding, where in (("nearest", r"8\.\.15"), ("compensated", r"0\.\.15")):
        with pytest.raises(clado.CladoError, match=rf"data_loader must yield finite numbers, .* among samples {where}"):
            profile(model, [broken], batch_size=8, rounding=rounding, verbose=False)
    with pytest.raises(clado.CladoError, match="loss_func must return finite losses"):
        profile(
            model,
            [x],
            estimator="exact",
            loss_func=lambda output, _: output.sum(1).sqrt() * float("nan"),
            verbose=False,
        )


def test_nan_weights_and_logits_are_named() -> None:
    model, x, _ = net_and_data("vit")
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_parameter("blocks.0.attn.qkv.weight")[0, 0] = float("nan")
    with pytest.raises(clado.CladoError, match=r"weight blocks\.0\.attn\.qkv\.weight must be finite"):
        profile(broken, [x], verbose=False)
    with pytest.raises(clado.CladoError, match="model must return finite logits"):
        profile(model, [x * float("inf")], verbose=False)


def test_sensitivity_file_round_trip_and_refusals(tmp_path: Path) -> None:
    model, x, _ = net_and_data("vit")
    sens = profile(model, [x], verbose=False)
    path = sens.save(tmp_path / "run")
    again = Sensitivity.load(tmp_path / "run")
    assert again.layers == sens.layers
    assert (again.bits, again.info, again.fingerprint) == (sens.bits, sens.info, sens.fingerprint)
    assert np.array_equal(again.matrix, sens.matrix)
    assert np.array_equal(again.stderr, sens.stderr)

    data = path.read_bytes()
    for name, broken in {"cut": data[: len(data) // 2], "empty": b"", "text": b"hello", "head": data[:4]}.items():
        (tmp_path / f"{name}.safetensors").write_bytes(broken)
        with pytest.raises(clado.CladoError, match="load: path must be"):
            Sensitivity.load(tmp_path / f"{name}.safetensors")
    (tmp_path / "schema.safetensors").write_bytes(data.replace(b'\\"schema\\": 3', b'\\"schema\\": 9'))
    with pytest.raises(clado.CladoError, match="schema must be 1 to 3, got 9"):
        Sensitivity.load(tmp_path / "schema.safetensors")
    with pytest.raises(clado.CladoError, match="path must be a sensitivity file"):
        Sensitivity.load(tmp_path / "nowhere")


def test_from_matrix_and_prediction() -> None:
    matrix = np.array([[2.0, 0, 0.5, 0], [0, 1.0, 0, 0.25], [0.5, 0, 4.0, 0], [0, 0.25, 0, 2.0]])
    sens = Sensitivity.from_matrix(matrix, [("a", 10), ("b", 20)], bits=(2, 4))
    assert sens.predict({"a": 2, "b": 2}) == pytest.approx(1 + 2 + 0.5)
    with pytest.raises(clado.CladoError, match="be symmetric"):
        Sensitivity.from_matrix(np.triu(matrix), [("a", 10), ("b", 20)], bits=(2, 4))
    with pytest.raises(clado.CladoError, match="be finite"):
        Sensitivity.from_matrix(np.full((4, 4), np.nan), [("a", 10), ("b", 20)], bits=(2, 4))


def test_quantizer_settings_are_checked() -> None:
    with pytest.raises(clado.CladoError, match="group_size must be"):
        Quantizer(group_size=-2)
