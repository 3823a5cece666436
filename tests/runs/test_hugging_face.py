"""Models of transformers by folder: what transformers itself computes is the oracle."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import clado
from clado.graph import open_runner
from clado.runs import ModelSpec, build_data, build_model
from clado.runs.hugging_face import _opening, load_processor
from tests.hugging_face import CLASSES, CLASSIFIERS, SIZE, images, reference, save


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder for every net."""
    root = tmp_path_factory.mktemp("nets")
    for name in (*CLASSIFIERS, "siglip"):
        save(root, name)
    return root


def build(folder: Path, **options: Any) -> Any:
    return build_model(ModelSpec(f"hf:{folder}", **options))


def unseen(runner: Any, model: nn.Module) -> list[str]:
    """Weights that are neither searched nor named."""
    searched = {name for layer in runner.layers for name in layer.names}
    weights = [name for name, value in model.named_parameters() if value.dim() > 1 and name not in searched]
    return [name for name in weights if not any(name == s or name.startswith(f"{s}.") for s in runner.skipped)]


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_gives_the_logits_under_its_own_names_and_runs_as_a_graph(name: str, nets: Path) -> None:
    model, own = build(nets / name), reference(nets / name)
    x = torch.randn(3, 3, SIZE, SIZE)
    assert torch.equal(model(x), own(x).logits)
    assert model(x).std(0).min() > 1e-3  # the images decide
    assert not model.training
    assert list(model.state_dict()) == list(own.state_dict())
    runner = open_runner(model, x)
    assert runner.note is None
    assert unseen(runner, model) == []


@pytest.mark.parametrize("name", [*CLASSIFIERS, "siglip"])
def test_the_image_processor_makes_the_inputs(name: str, nets: Path, tmp_path: Path) -> None:
    own = transformers.AutoImageProcessor.from_pretrained(nets / name)
    for k, image in enumerate(images()):
        (tmp_path / "a").mkdir(exist_ok=True)
        image.save(tmp_path / "a" / f"{k}.png")
    spec = ModelSpec(f"hf:{nets / name}")
    found = [x for x, _ in build_data(str(tmp_path), nn.Module(), spec, 1, seed=0)]
    wanted = [own(images=image, return_tensors="pt")["pixel_values"] for image in images()]
    assert len(found) == 3
    assert all(any(torch.equal(x, y) for x in found) for y in wanted)


@torch.no_grad()
def test_another_image_size(nets: Path) -> None:
    x = torch.randn(2, 3, 48, 48)
    for name in ("vit", "dinov2", "swin"):
        model = build(nets / name, img_size=48)
        assert torch.equal(model(x), reference(nets / name)(x, interpolate_pos_encoding=True).logits)
        assert load_processor(f"hf:{nets / name}", 48)(images()[0]).shape == (3, 48, 48)
    assert load_processor(f"hf:{nets / 'dinov2'}", 48).sizes["size"] == {"shortest_edge": 60}  # 40 before a crop to 32
    assert torch.equal(build(nets / "resnet", img_size=48)(x), reference(nets / "resnet")(x).logits)


def test_a_head_of_other_classes_is_drawn_and_said(nets: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build(nets / "vit", num_classes=3)
    assert "classifier.bias, classifier.weight are random" in caplog.text
    assert model.classifier.out_features == 3
    stored, again = reference(nets / "vit").state_dict(), build(nets / "vit", num_classes=3).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, stored[name]) == (not name.startswith("classifier"))
    caplog.clear()
    assert build(nets / "vit", num_classes=CLASSES).state_dict().keys() == stored.keys()
    assert caplog.text == ""


def test_weights_of_a_checkpoint_under_stored_names_or_the_module_s(nets: Path, tmp_path: Path) -> None:
    """Folders often keep the names of older versions."""
    stored, own = load_file(nets / "vit" / "model.safetensors"), reference(nets / "vit").state_dict()
    assert stored.keys() != own.keys()
    (tmp_path / "bare").mkdir()
    shutil.copy(nets / "vit" / "config.json", tmp_path / "bare")
    torch.save(stored, tmp_path / "bare" / "pytorch_model.bin")
    save_file(own, tmp_path / "own.safetensors")
    for file in (tmp_path / "bare" / "pytorch_model.bin", tmp_path / "own.safetensors"):
        model = build(tmp_path / "bare", checkpoint=str(file))
        assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    with pytest.raises(clado.CladoError, match=r"hold model.safetensors .*, got config.json, pytorch_model.bin in"):
        build(tmp_path / "bare")
    torch.save({"w": print}, tmp_path / "pickle.bin")
    with pytest.raises(clado.CladoError, match="be a file of tensors alone"):
        build(tmp_path / "bare", checkpoint=str(tmp_path / "pickle.bin"))


def test_missing_and_unused_weights_are_not_silent(
    nets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(nets / "vit", tmp_path / "vit")
    stored = load_file(nets / "vit" / "model.safetensors")
    file = tmp_path / "vit" / "model.safetensors"
    save_file({**stored, "extra": torch.ones(2)}, file, {"format": "pt"})
    build(tmp_path / "vit")
    assert "1 weights of" in caplog.text
    assert "have no place in ViTForImageClassification (extra)" in caplog.text
    save_file({k: v for k, v in stored.items() if k != "vit.layernorm.bias"}, file, {"format": "pt"})
    for classes in (None, 7, 32):  # a row of 32 is no head
        with pytest.raises(clado.CladoError, match=r"fit ViTForImageClassification, got 1 missing .*layernorm.bias"):
            build(tmp_path / "vit", num_classes=classes)


def pooled(model: nn.Module, batch: Any) -> Tensor:
    found: Tensor = model(batch[0]).pooler_output
    return found


def length(output: Tensor, batch: Any) -> Tensor:
    return output.square().mean(1)


def test_features_need_a_loss_of_their_own(nets: Path) -> None:
    tower = build(nets / "siglip")
    batches = [(torch.randn(4, 3, SIZE, SIZE), torch.zeros(4, dtype=torch.int64))]
    must = r"one tensor, .*, or loss_func\), got BaseModelOutputWithPooling of last_hidden"
    with pytest.raises(clado.CladoError, match=must):
        clado.profile(tower, batches, verbose=False)
    sens = clado.profile(
        tower, batches, forward_step=pooled, loss_func=length, estimator="diagonal", bits=(2,), verbose=False
    )
    assert (sens.delta_loss != 0).all()
    runner = open_runner(tower, batches[0], forward_step=pooled)
    assert runner.note is None
    assert unseen(runner, tower) == []
    with pytest.raises(clado.CladoError, match="num_classes must be left out: the model does not classify images"):
        build(nets / "siglip", num_classes=3)


def test_what_cannot_be_opened_is_one_line(nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(name: str, **config: Any) -> Path:
        shutil.copytree(nets / "vit", tmp_path / name)
        own = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**own, **config}))
        return tmp_path / name

    (tmp_path / "empty").mkdir()
    short = changed("short")
    (short / "model.safetensors").write_bytes((short / "model.safetensors").read_bytes()[:5000])
    broken = changed("broken")
    (broken / "config.json").write_text("{")
    transformers.BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "bert")
    clip = transformers.CLIPConfig(architectures=["CLIPModel"])
    with _opening("clip"):
        clip.save_pretrained(tmp_path / "clip")
    cases = {
        tmp_path / "nowhere" / "at" / "all": "be hf:FOLDER of a folder that is there, or hf:owner/name",
        tmp_path / "empty": "folder must hold config.json of transformers",
        short: "must be able to open .*SafetensorError",
        broken: "must be able to open .* not a valid JSON",
        tmp_path / "bert": r"of a model of pixel_values alone .* got BertForMaskedLM of input_ids \(text\)",
        tmp_path / "clip": r"of a model of pixel_values alone .* got CLIPModel of input_ids \(image and text\)",
        changed("unknown", model_type="none", architectures=["NoNet"]): "must be able to open .*none",
        changed("quantized", quantization_config={"quant_method": "compressed-tensors"}): "weights must be float",
        changed(
            "shape", hidden_size=64
        ): "weights must fit ViTForImageClassification, got .* missing or of another shape",
    }
    for folder, message in cases.items():
        with pytest.raises(clado.CladoError, match=message) as caught:
            build(folder)
        assert "\n" not in str(caught.value)
    for name in ("", "vit", "/vit", "a/b/c"):
        with pytest.raises(clado.CladoError, match="be hf:FOLDER of a folder that is there, or hf:owner/name"):
            build_model(ModelSpec(f"hf:{name}"))
    with pytest.raises(clado.CladoError, match="pretrained must be left out: the weights lie with the model"):
        build(nets / "vit", pretrained=True)
    with pytest.raises(clado.CladoError, match="num_classes must be positive"):
        build(nets / "vit", num_classes=0)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        clado.CladoError, match=r"transformers must be installed for hf: models.*pip install clado\[hf\]"
    ):
        build(nets / "vit")


def test_an_image_processor_that_is_missing_or_makes_no_batches_is_refused(nets: Path, tmp_path: Path) -> None:
    shutil.copytree(nets / "vit", tmp_path / "vit")
    file = tmp_path / "vit" / "preprocessor_config.json"
    file.unlink()
    with pytest.raises(clado.CladoError, match=r"must hold preprocessor_config.json .*, got none in"):
        load_processor(f"hf:{tmp_path / 'vit'}")
    transformers.BitImageProcessor(size={"shortest_edge": 40}, do_center_crop=False).save_pretrained(tmp_path / "vit")
    with pytest.raises(clado.CladoError, match=r"make tensors \[3, H, W\] of one size"):
        load_processor(f"hf:{tmp_path / 'vit'}")
    transformers.ViTImageProcessor(size={"height": 32, "width": 48}).save_pretrained(tmp_path / "vit")
    with pytest.raises(clado.CladoError, match="be left out unless the image processor makes squares"):
        load_processor(f"hf:{tmp_path / 'vit'}", 64)
    file.write_text("{")
    with pytest.raises(clado.CladoError, match="data: transformers must be able to open"):
        load_processor(f"hf:{tmp_path / 'vit'}")


def test_code_that_lies_with_the_weights_is_not_run(nets: Path, tmp_path: Path) -> None:
    shutil.copytree(nets / "vit", tmp_path / "vit")
    (tmp_path / "vit" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for file, key in (("config.json", "AutoConfig"), ("preprocessor_config.json", "AutoImageProcessor")):
        held = json.loads((tmp_path / "vit" / file).read_text())
        held["auto_map"] = {key: "own.Thing", "AutoModelForImageClassification": "own.Thing"}
        (tmp_path / "vit" / file).write_text(json.dumps(held))
    model = build(tmp_path / "vit")
    assert load_processor(f"hf:{tmp_path / 'vit'}")(images()[0]).shape == (3, SIZE, SIZE)
    assert type(model).__module__.startswith("transformers.")
    assert not (tmp_path / "ran").exists()


def test_a_note_means_the_same_folder_from_anywhere(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(nets)
    assert ModelSpec("hf:vit").to_json()["model"] == f"hf:{nets / 'vit'}"
    assert ModelSpec("hf:owner/name").to_json()["model"] == "hf:owner/name"
    assert not ModelSpec("hf:vit").random


def test_what_transformers_says_is_as_before(nets: Path) -> None:
    theirs = transformers.utils.logging
    theirs.set_verbosity(logging.INFO)
    build(nets / "vit")
    assert theirs.get_verbosity() == logging.INFO
    assert theirs.is_progress_bar_enabled()
    theirs.set_verbosity_warning()
