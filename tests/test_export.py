"""Round trips bit for bit, bytes as predicted, nothing half-written, broken files refused in one line."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import clado
from clado import exporter
from clado.plan import Plan
from clado.quantizer import Quantizer
from tests.models import small_cnn, timm_model, tiny_vit

NETS = ["vit", "cnn", "resnet18", "swin_tiny_patch4_window7_224", "mobilenetv3_small_100", "convnext_atto"]


def planned(name: str, group_size: int = -1) -> tuple[nn.Module, torch.Tensor, Plan]:
    """A net, a batch and a random plan over widths 2…8."""
    model, shape = tiny_vit() if name == "vit" else small_cnn() if name == "cnn" else timm_model(name)
    x = torch.randn(3, *shape)
    sens = clado.profile(
        model,
        [x],
        bits=range(2, 9),
        estimator="diagonal",
        num_samples=2,
        group_size=group_size,
        scale_steps=2,
        quantize_ends=True,
        verbose=False,
    )
    choose = random.Random(0)
    return model, x, clado.given_plan(sens, {layer.name: choose.choice(range(2, 9)) for layer in sens.layers})


def same_state(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("group_size", [-1, 0, 32])
@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_loads_back_bit_for_bit_and_bytes_are_as_predicted(name: str, group_size: int, tmp_path: Path) -> None:
    model, x, plan = planned(name, group_size)
    wanted = clado.apply(model, plan)
    assert not same_state(wanted, model)
    written = clado.export(model, plan, tmp_path / "out")
    assert written.quantized == plan.size_bytes == sum(plan.layer_bytes.values())
    assert written.quantized + written.leftovers + written.header == (tmp_path / "out/model.safetensors").stat().st_size
    fresh = tiny_vit()[0] if name == "vit" else small_cnn()[0] if name == "cnn" else timm_model(name)[0]
    for tensor in fresh.state_dict().values():
        tensor.zero_()  # nothing of the weights may come from the module
    loaded = clado.load(tmp_path / "out", fresh)
    assert same_state(loaded, wanted)
    assert torch.equal(loaded(x), wanted(x))
    assert Plan.load(tmp_path / "out").bits == plan.bits


def test_bfloat16_weights_round_trip(tmp_path: Path) -> None:
    model = tiny_vit()[0].bfloat16()
    sens = clado.profile(model, [torch.randn(3, 1, 8, 8)], estimator="diagonal", verbose=False)
    plan = clado.given_plan(sens, {layer.name: 4 for layer in sens.layers})
    clado.export(model, plan, tmp_path / "out")
    assert same_state(clado.load(tmp_path / "out", tiny_vit()[0].bfloat16()), clado.apply(model, plan))


def test_tied_weights_stay_tied() -> None:
    model, _, plan = planned("cnn")
    small = clado.apply(model, plan)
    assert small.first.weight is small.second.weight


def test_interrupted_export_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, plan = planned("vit")
    clado.export(model, plan, tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").read_bytes()
    monkeypatch.setattr(Plan, "save", lambda self, path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        clado.export(model, plan, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    clado.export(model, plan, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_wrong_model_plan_format_and_path(tmp_path: Path) -> None:
    model, _, plan = planned("vit")
    other = tiny_vit()[0]
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(clado.CladoError, match="apply: model must be the one the plan was made for"):
        clado.apply(other, plan)
    with pytest.raises(clado.CladoError, match=r"export: model must have a weight patch_embed"):
        clado.export(small_cnn()[0], plan, tmp_path / "out")
    with pytest.raises(clado.CladoError, match="export: format must be one of safetensors, got 'onyx'"):
        clado.export(model, plan, tmp_path / "out", format="onyx")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("dear")
    with pytest.raises(clado.CladoError, match="path must be new, empty or an earlier export"):
        clado.export(model, plan, tmp_path / "mine")
    clado.export(model, plan, tmp_path / "out")
    with pytest.raises(clado.CladoError, match="load: model must have the tensors of the export"):
        clado.load(tmp_path / "out", small_cnn()[0])
    with pytest.raises(clado.CladoError, match=r"load: model's .* must be torch.float32"):
        clado.load(tmp_path / "out", tiny_vit()[0].half())


def test_broken_files_are_refused_in_one_line(tmp_path: Path) -> None:
    model, _, plan = planned("vit")
    clado.export(model, plan, tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[-100] ^= 4
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])
    negative, outside = json.loads(json.dumps(header)), json.loads(json.dumps(header))
    first = next(k for k in header if k != "__metadata__")
    negative[first]["shape"][0] = -1
    outside[first]["data_offsets"][1] = 10**12

    def with_header(h: dict) -> bytes:
        text = json.dumps(h).encode()
        return struct.pack("<Q", len(text)) + text + good[8 + length :]

    corpus = {
        "empty": b"",
        "truncated": good[: len(good) // 2],
        "flipped": bytes(flipped),
        "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "zip": b"PK\x03\x04" + good,
        "huge header": struct.pack("<Q", 2**60) + good[8:],
        "negative shape": with_header(negative),
        "offset outside": with_header(outside),
        "no header": with_header({k: v for k, v in header.items() if k != "__metadata__"}),
    }
    for name, data in corpus.items():
        file.write_bytes(data)
        with pytest.raises(clado.CladoError) as caught:
            clado.load(tmp_path / "out", model)
        assert "\n" not in str(caught.value), name
    save_file({"x": torch.zeros(2)}, file)
    with pytest.raises(clado.CladoError, match="file must be a clado export"):
        clado.load(tmp_path / "out", model)
    with pytest.raises(clado.CladoError, match="be a folder written by clado export"):
        clado.load(tmp_path / "nowhere", model)


def test_plan_files(tmp_path: Path) -> None:
    _, _, plan = planned("vit")
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    text = (tmp_path / "plan.json").read_text()
    for broken in (
        "",
        "[]",
        text[:100],
        text.replace('"schema": 1', '"schema": 7'),
        text.replace('"bits"', '"bite"'),
        "\x00\xff",
    ):
        (tmp_path / "plan.json").write_text(broken)
        with pytest.raises(clado.CladoError, match="plan: ") as caught:
            Plan.load(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(clado.CladoError, match="binary data"):
        Plan.load(tmp_path)


def test_float64_model_is_quantized_as_float32() -> None:
    model = tiny_vit()[0]
    quantizer = Quantizer()
    weight = model.get_parameter("blocks.0.attn.qkv.weight")
    assert torch.equal(quantizer.fake_quant(weight.double(), (3,)), quantizer.fake_quant(weight, (3,)).double())
    assert exporter.SCHEMA == 1
