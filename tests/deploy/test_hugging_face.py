"""Exports of transformers' nets: transformers reads ours back, and torch.onnx takes their attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import clado
from clado.artifacts import Plan
from clado.deploy import verify
from clado.quant import Candidates, Quantizer, Scheme, calibrate_inputs
from clado.runs import ModelSpec, build_model
from clado.runs.hugging_face import _opening
from tests.hugging_face import SIZE, save
from tests.models import random_plan


def planned(model: Any, linear: bool = False) -> Plan:
    """Weights at random widths, three groups to some rows; ``linear``: Linear layers alone."""
    plan = random_plan(model, Quantizer(16, scale_steps=2), (2, 4, 8))
    kept = tuple(layer for layer in plan.layers if not linear or layer.kind == "linear")
    return replace(plan, layers=kept, schemes={layer.name: plan.schemes[layer.name] for layer in kept})


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "deit", "swin", "beit", "convnext", "mobilevit"])
def test_transformers_reads_compressed_tensors(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its outputs are those of ``clado.apply`` up to the order of sums. DINOv2 and SigLIP its version 5.24 reads from nobody."""
    model = build_model(ModelSpec(f"hf:{save(tmp_path, name)}"))
    plan = planned(model, linear=True)
    clado.export(model, plan, tmp_path / "out", "compressed-tensors")
    assert "bit for bit" in verify(model, plan, tmp_path / "out", "compressed-tensors")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    with _opening("out"):
        own = getattr(transformers, config.architectures[0])
        read, told = own.from_pretrained(tmp_path / "out", output_loading_info=True)
        x = torch.randn(4, 3, SIZE, SIZE)
        found, wanted, clean = read.eval()(x).logits, clado.apply(model, plan)(x), model(x)
    capfd.readouterr()  # bars of compressed-tensors
    assert not any(told.values())
    largest = wanted.abs().max()
    assert (found - wanted).abs().max() < 1e-5 * largest
    assert (clean - wanted).abs().max() > 1e-2 * largest


@torch.no_grad()
def test_transformers_rounds_the_inputs_of_schemes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Those of the classifier are static: of two dimensions the package has one scale for the batch, not per token."""
    model = build_model(ModelSpec(f"hf:{save(tmp_path, 'vit')}"))
    plan, x = planned(model, linear=True), torch.randn(4, 3, SIZE, SIZE)
    labels = ["W8A8_DYNAMIC", "FP8", "W4A8", "FP8_DYNAMIC", "W4A16"]
    chosen = {layer.name: Scheme.of(labels[k % len(labels)]) for k, layer in enumerate(plan.layers)}
    chosen[plan.layers[-1].name] = Scheme.of("W8A8")
    candidates = Candidates(plan.layers, tuple((chosen[layer.name],) for layer in plan.layers))
    ranges = calibrate_inputs(model, [x], lambda net, batch: net(batch), candidates)
    schemes = {name: scheme.label for name, scheme in chosen.items()}
    plan = replace(plan, schemes=schemes, activations=ranges, quantizer=Quantizer(scale_steps=2))
    clado.export(model, plan, tmp_path / "out", "compressed-tensors")
    with _opening("out"):
        read, told = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
        found, wanted, clean = read.eval()(x).logits, clado.apply(model, plan)(x), model(x)
    capfd.readouterr()  # bars of compressed-tensors
    assert not any(told.values())
    # Sums in another order move values beside a tie to the next code, which is far less than rounding the inputs at all.
    unrounded = clado.apply(model, replace(plan, schemes={n: replace(s, input="").label for n, s in chosen.items()}))(x)
    assert (found - wanted).abs().max() < 0.1 * (unrounded - wanted).abs().max()
    assert (clean - wanted).abs().max() > 1e-2 * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", ["swin", "beit"])
def test_onnx_of_attention_with_a_bias(name: str, tmp_path: Path) -> None:
    model = build_model(ModelSpec(f"hf:{save(tmp_path, name)}"))
    plan, x = planned(model), torch.randn(2, 3, SIZE, SIZE)
    written = clado.export(model, plan, tmp_path / "out", "onnx", example=x)
    assert "of any number of samples" in written.notes[0]
    assert "onnxruntime gives the logits" in verify(model, plan, tmp_path / "out", "onnx", example=x)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet", "siglip"])
def test_our_own_format(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, name)
    model, x = build_model(ModelSpec(f"hf:{folder}")), torch.randn(2, 3, SIZE, SIZE)
    plan = planned(model)
    clado.export(model, plan, tmp_path / "out")
    again, wanted = clado.load(tmp_path / "out", build_model(ModelSpec(f"hf:{folder}")))(x), clado.apply(model, plan)(x)
    pairs = (
        [(again, wanted)]
        if isinstance(wanted, torch.Tensor)
        else list(zip(again.values(), wanted.values(), strict=True))
    )
    assert pairs
    assert all(torch.equal(a, b) for a, b in pairs)
