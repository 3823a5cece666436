"""A folder of transformers goes through every command; the files name it, and nothing else is asked for again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import clado
from clado.cli import main
from clado.runs import ModelSpec, build_data, build_model
from tests.hugging_face import reference, save


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder "vit" and 48 images of two classes."""
    root = tmp_path_factory.mktemp("home")
    save(root, "vit")
    random = np.random.default_rng(0)
    for k in range(48):
        (root / "images" / f"c{k % 2}").mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (30 + k, 60, 3), np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"c{k % 2}" / f"{k}.png")
    return root


@torch.no_grad()
def test_every_stage(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    what = ("--model", "hf:vit", "--data", home / "images", "--output-dir", "run", "--bits", "2,4,8")
    said = call("profile", *what, "--nsamples", 8).output
    assert "12 layers" in said
    assert "classifier" in said
    call("profile", *what, "--nsamples", 16)  # goes on
    monkeypatch.chdir(home / "images")  # the note knows the folder
    run = home / "run"
    assert json.loads((run / "model.json").read_text())["spec"]["model"] == f"hf:{home / 'vit'}"
    assert clado.Sensitivity.load(run).num_samples == 16
    assert "vit.layers.0.attention.q_proj" in call("inspect", run).output
    call("solve", run, "--avg-bits", 3, "--rerank", 8, "--time-limit", 5)
    for form in ("safetensors", "compressed-tensors", "onnx"):
        call("export", run, "--format", form, "--out", run / form, "--verify")
    call("latency", run)
    call("report", run, "--nsamples", 4)
    plan, spec = clado.Plan.load(run), ModelSpec(f"hf:{home / 'vit'}")
    model = build_model(spec)
    ((x, y),) = build_data(str(home / "images"), model, spec, 48, 0, 16 + plan.chosen_on.samples)
    said = call("evaluate", run).output
    assert f"{len(x)} samples" in said
    for net in (lambda x: reference(home / "vit")(x).logits, clado.apply(model, plan)):
        assert f"{torch.nn.functional.cross_entropy(net(x), y).item():.4f}" in said
    assert "finished on 16 images" in call("solve", run, "--avg-bits", 3, "--finish", "compensated").output


def test_bad_input_is_one_line_and_writes_nothing(home: Path, tmp_path: Path) -> None:
    what = ("--data", home / "images", "--output-dir", tmp_path / "run")
    for model in (f"hf:{home / 'images'}", "hf:nothing", f"hf:{home / 'vit'}"):
        more = ("--num-classes", 0) if model.endswith("vit") else ()
        result = CliRunner().invoke(main, [str(a) for a in ("profile", "--model", model, *what, *more)])
        assert result.exit_code == 2
        assert result.output.startswith("error: model: ")
        assert result.output.count("\n") == 1
    assert not (tmp_path / "run").exists()
