"""Models by name, with weights from where a person keeps them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import clado
from clado.runs import ModelSpec, build_model

NAME = "mobilenetv3_small_050"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a net with seven classes, as a hub holds them."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("hub")
    model = timm.create_model(NAME, num_classes=7)
    save_file(model.state_dict(), root / "model.safetensors")
    config = {"architecture": NAME, "num_classes": 7, "pretrained_cfg": {"num_classes": 7, "classifier": "classifier"}}
    (root / "config.json").write_text(json.dumps(config))
    return root


def test_pretrained_weights_from_a_folder_as_a_hub_holds_it(folder: Path) -> None:
    model = build_model(ModelSpec(NAME, pretrained=str(folder)))
    assert not model.training
    assert torch.equal(
        model.state_dict()["conv_stem.weight"],
        timm.models.load_state_dict(str(folder / "model.safetensors"))["conv_stem.weight"],
    )
    assert model.classifier.out_features == 7
    other = build_model(ModelSpec(NAME, pretrained=str(folder), num_classes=3))
    assert other.classifier.out_features == 3  # a head of its own, the rest from the folder
    assert torch.equal(other.conv_stem.weight, model.conv_stem.weight)
    with pytest.raises(clado.CladoError, match=f"model: pretrained must hold weights of resnet18, got {NAME}"):
        build_model(ModelSpec("resnet18", pretrained=str(folder)))


def test_pretrained_weights_from_a_file_or_a_bare_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for source in (tmp_path, tmp_path / "model.safetensors"):
        model = build_model(ModelSpec(NAME, pretrained=str(source), num_classes=7))
        assert torch.equal(
            model.conv_stem.weight, build_model(ModelSpec(NAME, pretrained=str(folder))).conv_stem.weight
        )


def test_what_cannot_be_loaded_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    (tmp_path / "pickle").mkdir()
    torch.save({"w": print}, tmp_path / "pickle" / "pytorch_model.bin")
    cases = {
        tmp_path / "nowhere": "pretrained must be a file, or a folder with",
        tmp_path / "broken": "pretrained must hold a timm config.json",
        tmp_path / "short": "must be a file of tensors alone",
        tmp_path / "pickle": "must be a file of tensors alone",
    }
    for path, message in cases.items():
        with pytest.raises(clado.CladoError, match=message) as caught:
            build_model(ModelSpec(NAME, pretrained=str(path)))
        assert "\n" not in str(caught.value)
    with pytest.raises(clado.CladoError, match="model: timm must be able to build resnet18") as caught:
        build_model(ModelSpec("resnet18", pretrained=str(folder / "model.safetensors")))
    assert "\n" not in str(caught.value)
