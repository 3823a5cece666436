"""Round trips bit for bit, bytes as predicted, nothing half-written, broken files refused in one line."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import clado
from clado.artifacts import Plan
from clado.deploy import MODEL_FILE, exporter, predicted_bytes
from clado.deploy.formats.safetensors import SCHEMA
from clado.quant import Quantizer
from tests.models import random_plan, small_cnn, timm_model, tiny_vit


def net(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    return tiny_vit() if name == "vit" else small_cnn() if name == "cnn" else timm_model(name)


def planned(name: str, group_size: int = -1, symmetric: bool = True) -> tuple[nn.Module, torch.Tensor, Plan]:
    """A net, a batch and a random plan over widths 2…8."""
    model, shape = net(name)
    return model, torch.randn(3, *shape), random_plan(model, Quantizer(group_size, 2, symmetric))


def same_state(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 0, 32, 128])
@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_loads_back_bit_for_bit(name: str, group_size: int, symmetric: bool, tmp_path: Path) -> None:
    check_round_trip(name, group_size, symmetric, tmp_path)


@pytest.mark.parametrize(
    ("name", "group_size", "symmetric"), [("mobilenetv3_small_100", -1, False), ("convnext_atto", 32, True)]
)
def test_timm_models_load_back_bit_for_bit(name: str, group_size: int, symmetric: bool, tmp_path: Path) -> None:
    """`python -m bench.export.roundtrips` takes more nets through every setting and format."""
    check_round_trip(name, group_size, symmetric, tmp_path)


@torch.no_grad()
def check_round_trip(name: str, group_size: int, symmetric: bool, tmp_path: Path) -> None:
    model, x, plan = planned(name, group_size, symmetric)
    wanted = clado.apply(model, plan)
    assert not same_state(wanted, model)
    predicted = predicted_bytes(model, plan)
    written = clado.export(model, plan, tmp_path / "out")
    assert (written.quantized, written.leftovers) == predicted
    assert written.quantized == plan.size_bytes == sum(plan.layer_bytes.values())
    assert written.quantized + written.leftovers + written.header == (tmp_path / "out" / MODEL_FILE).stat().st_size
    fresh = net(name)[0]
    for tensor in fresh.state_dict().values():
        tensor.zero_()  # nothing of the weights may come from the module
    loaded = clado.load(tmp_path / "out", fresh)
    assert same_state(loaded, wanted)
    outputs = wanted(x)
    assert torch.equal(loaded(x), outputs)
    packed = clado.load(tmp_path / "out", fresh, packed=True)
    assert torch.equal(packed(x), outputs)
    held = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in packed.state_dict().values()}
    assert sum(held.values()) == sum(predicted)  # the memory of the weights is that of the file
    assert Plan.load(tmp_path / "out").bits == plan.bits
    assert "loaded back bit for bit" in exporter.verify(model, plan, tmp_path / "out")


def test_plan_and_certificate_lie_in_the_header(tmp_path: Path) -> None:
    model, shape = tiny_vit()
    sens = clado.profile(model, [torch.randn(3, *shape)], bits=(2, 4), estimator="diagonal", verbose=False)
    plan = clado.solve(sens, avg_bits=3)
    clado.export(model, plan, tmp_path / "out")
    with safe_open(tmp_path / "out" / MODEL_FILE, framework="pt") as file:
        header = json.loads(file.metadata()["clado.model"])
    held = Plan.from_json(json.dumps(header["plan"]))
    assert held == plan
    assert (held.status, held.bound, held.objective) == (plan.status, plan.bound, plan.objective)


def test_asymmetric_sensitivities_lead_to_asymmetric_weights() -> None:
    """The matrix is measured with the zero points the export writes."""
    model, shape = tiny_vit()
    x = torch.randn(3, *shape)
    sens = clado.profile(model, [x], bits=(2,), estimator="diagonal", symmetric=False, verbose=False)
    assert not sens.quantizer.symmetric
    plan = clado.given_plan(sens, {layer.name: 2 for layer in sens.layers})
    assert not plan.quantizer.symmetric
    assert Plan.from_json(plan.to_json()).quantizer == plan.quantizer
    symmetric = clado.profile(model, [x], bits=(2,), estimator="diagonal", verbose=False)
    assert sens.fingerprint["settings"] != symmetric.fingerprint["settings"]
    assert (sens.delta_loss != symmetric.delta_loss).all()


@pytest.mark.parametrize("group_size", [-1, 0, 7])
@pytest.mark.parametrize("bits", range(2, 9))
def test_bytes_of_zero_points_count_their_padding(bits: int, group_size: int) -> None:
    """[13, 20] weights: words per row, a float per scale, zero points packed down each column of groups."""
    quantizer = Quantizer(group_size, 2, symmetric=False)
    weight = torch.randn(13, 20) + 0.5
    packed = quantizer.pack(weight, bits)
    rows, columns, groups = (1, 260, 1) if group_size == 0 else (13, 20, 3 if group_size == 7 else 1)
    counted = 4 * (rows * -(-columns * bits // 32) + rows * groups + groups * -(-rows * bits // 32))
    assert sum(part.nbytes for part in packed.values()) == quantizer.storage_bytes(weight.shape, bits) == counted
    again = quantizer.dequantize(quantizer.unpack(packed, bits, weight.shape), weight.shape, torch.float32)
    assert torch.equal(again, quantizer.fake_quant(weight, (bits,))[0])


def test_bfloat16_weights_round_trip(tmp_path: Path) -> None:
    model = tiny_vit()[0].bfloat16()
    plan = random_plan(model, Quantizer(symmetric=False))
    clado.export(model, plan, tmp_path / "out")
    assert same_state(clado.load(tmp_path / "out", tiny_vit()[0].bfloat16()), clado.apply(model, plan))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model, _, plan = planned("cnn")
    small = clado.apply(model, plan)
    assert small.first.weight is small.second.weight
    clado.export(model, plan, tmp_path / "out")
    packed = clado.load(tmp_path / "out", model, packed=True)
    assert packed.first.weight_packed is packed.second.weight_packed


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


KILLED = """
import os, signal, sys
from pathlib import Path
sys.modules["torch"] = None  # not needed here
from clado.common import atomic_folder
step, calls = int(sys.argv[2]), 0

def audit(event, arguments):
    global calls
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "ctypes.dlsym"):
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(audit)
with atomic_folder(sys.argv[1]) as folder:
    for name in "ab":
        (folder / name).write_text("new")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two folders in one step")
def test_killed_at_any_step_leaves_the_old_folder_or_the_new(tmp_path: Path) -> None:
    """SIGKILL before each file operation in turn, until a run comes through."""
    seen = set()
    for step in range(1, 100):
        target = tmp_path / str(step) / "out"
        target.mkdir(parents=True)
        for name in "abc":
            (target / name).write_text("old")
        done = subprocess.run([sys.executable, "-c", KILLED, str(target), str(step)], capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        found = {p.name: p.read_text() for p in target.iterdir()}
        assert found in ({"a": "old", "b": "old", "c": "old"}, {"a": "new", "b": "new"})
        seen.add(len(found))
        if done.returncode == 0:
            break
    assert seen == {2, 3}
    assert done.returncode == 0
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_exports_are_as_readable_as_any_file(tmp_path: Path) -> None:
    model, _, plan = planned("vit")
    clado.export(model, plan, tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "file").touch()
    for name in ("plan.json", MODEL_FILE):
        assert (tmp_path / "out" / name).stat().st_mode == (tmp_path / "file").stat().st_mode


def test_wrong_model_plan_format_and_path(tmp_path: Path) -> None:
    model, _, plan = planned("vit")
    other = tiny_vit()[0]
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(clado.CladoError, match="apply: model must be the one the plan was made for"):
        clado.apply(other, plan)
    with pytest.raises(clado.CladoError, match=r"export: model must have a weight patch_embed"):
        clado.export(small_cnn()[0], plan, tmp_path / "out")
    with pytest.raises(clado.CladoError, match=r"export: format must be one of safetensors.* got 'onyx'"):
        clado.export(model, plan, tmp_path / "out", format="onyx")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("dear")
    with pytest.raises(clado.CladoError, match="path must be new, empty or an earlier export"):
        clado.export(model, plan, tmp_path / "mine")
    plan.save(tmp_path / "mine")  # a run directory, say
    with pytest.raises(clado.CladoError, match=r"without other files, got .*mine, which holds thesis\.txt"):
        clado.export(model, plan, tmp_path / "mine")
    (tmp_path / "mine/thesis.txt").unlink()
    with pytest.raises(clado.CladoError, match=r"which holds plan\.json"):
        clado.export(model, plan, tmp_path / "mine")
    assert (tmp_path / "mine/plan.json").exists()
    clado.export(model, plan, tmp_path / "out")
    with pytest.raises(clado.CladoError, match="load: model must have the tensors of the export"):
        clado.load(tmp_path / "out", small_cnn()[0])
    with pytest.raises(clado.CladoError, match=r"load: model's .* must be torch.float32"):
        clado.load(tmp_path / "out", tiny_vit()[0].half())


@pytest.fixture(scope="module")
def small_export(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, bytes]:
    """A model of two layers and the bytes of its export."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    folder = tmp_path_factory.mktemp("small") / "out"
    clado.export(model, random_plan(model, Quantizer(symmetric=False)), folder)
    return model, (folder / MODEL_FILE).read_bytes()


def refused(data: bytes, model: nn.Module, folder: Path) -> str:
    (folder / MODEL_FILE).write_bytes(data)
    with pytest.raises(clado.CladoError) as caught:
        clado.load(folder, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused(small_export: tuple[nn.Module, bytes], place: float, bit: int) -> None:
    import tempfile

    model, good = small_export
    data = bytearray(good)
    data[int(place * len(good))] ^= 1 << bit
    with tempfile.TemporaryDirectory() as folder:
        refused(bytes(data), model, Path(folder))


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(small_export: tuple[nn.Module, bytes], share: float) -> None:
    import tempfile

    model, good = small_export
    with tempfile.TemporaryDirectory() as folder:
        refused(good[: int(share * len(good))], model, Path(folder))


def split(data: bytes) -> tuple[dict, bytes]:
    """The JSON header of a safetensors file and what follows it."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def test_foreign_and_hostile_files_are_refused(small_export: tuple[nn.Module, bytes], tmp_path: Path) -> None:
    model, good = small_export
    header, rest = split(good)
    first = next(k for k in header if k != "__metadata__")

    def changed(change: Callable[[dict], None]) -> bytes:
        copy = json.loads(json.dumps(header))
        change(copy)
        return joined(copy, rest)

    corpus = {
        "empty": b"",
        "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "zip": b"PK\x03\x04" + good,
        "huge header": struct.pack("<Q", 2**60) + good[8:],
        "header of 4 GiB": struct.pack("<Q", 2**32) + good[8:],
        "deep header": struct.pack("<Q", 200_000) + b"[" * 200_000,
        "negative shape": changed(lambda h: h[first]["shape"].__setitem__(0, -1)),
        "shape that overflows": changed(lambda h: h[first].__setitem__("shape", [2**40, 2**40])),
        "offset outside": changed(lambda h: h[first]["data_offsets"].__setitem__(1, 10**12)),
        "offsets that overlap": changed(lambda h: h[first].__setitem__("data_offsets", [0, 4])),
        "no header": changed(lambda h: h.pop("__metadata__")),
        "header that is no JSON": changed(lambda h: h["__metadata__"].__setitem__("clado.model", "{")),
        "header that is too deep": changed(lambda h: h["__metadata__"].__setitem__("clado.model", "[" * 100_000)),
        "header without plan": changed(
            lambda h: h["__metadata__"].__setitem__("clado.model", f'{{"schema": {SCHEMA}}}')
        ),
    }
    for data in corpus.values():
        refused(data, model, tmp_path)
    save_file({"x": torch.zeros(2)}, tmp_path / MODEL_FILE)
    assert "file must be a clado export" in refused((tmp_path / MODEL_FILE).read_bytes(), model, tmp_path)
    with pytest.raises(clado.CladoError, match="be a folder written by clado export"):
        clado.load(tmp_path / "nowhere", model)


LIES: dict[str, Callable[[dict], object]] = {
    "schema": lambda h: h.update(schema=99),
    "layer that is not there": lambda h: h["plan"]["layers"][0].update(name="other"),
    "negative shape": lambda h: h["plan"]["layers"][0].update(shape=[-6, 5]),
    "huge shape": lambda h: h["plan"]["layers"][0].update(shape=[10**12, 10**12]),
    "empty shape": lambda h: h["plan"]["layers"][0].update(shape=[]),
    "shape that is a word": lambda h: h["plan"]["layers"][0].update(shape="65"),
    "no names": lambda h: h["plan"]["layers"][0].update(names=[]),
    "width of 9": lambda h: h["plan"]["bits"].update({"0": 9}),
    "width of half a bit": lambda h: h["plan"]["bits"].update({"0": 0.5}),
    "another width": lambda h: h["plan"]["bits"].update({"0": 9 - h["plan"]["bits"]["0"]}),
    "group of half a weight": lambda h: h["plan"]["quantizer"].update(group_size=0.5),
    "groups": lambda h: h["plan"]["quantizer"].update(group_size=2),
    "symmetric": lambda h: h["plan"]["quantizer"].update(symmetric=True),
    "settings of another quantizer": lambda h: h["plan"]["quantizer"].update(code="x"),
    "dtype that runs": lambda h: h["dtypes"].update({"0": "load"}),
    "scheme that is none": lambda h: h["plan"]["schemes"].update({"0": "W9A16"}),
    "another scheme": lambda h: h["plan"]["schemes"].update({"0": "W2A16" if h["plan"]["bits"]["0"] != 2 else "W3A16"}),
    "infeasible": lambda h: h["plan"].update(bits={}, schemes={}, status="infeasible"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_under_a_right_digest(
    lie: str, small_export: tuple[nn.Module, bytes], tmp_path: Path
) -> None:
    """Whoever forges the digest too meets the checks of every field."""
    from clado.deploy.formats.safetensors import _digest

    model, good = small_export
    (tmp_path / MODEL_FILE).write_bytes(good)
    with safe_open(tmp_path / MODEL_FILE, framework="pt") as file:
        header = json.loads(file.metadata()["clado.model"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    LIES[lie](header)
    header["digest"] = _digest(header, tensors)
    save_file(tensors, tmp_path / MODEL_FILE, metadata={"clado.model": json.dumps(header)})
    message = refused((tmp_path / MODEL_FILE).read_bytes(), model, tmp_path)
    assert "damaged" not in message


def test_plan_files(tmp_path: Path) -> None:
    _, _, plan = planned("vit")
    plan.save(tmp_path)
    assert Plan.load(tmp_path).bits == plan.bits
    assert Plan.load(tmp_path).layers == plan.layers
    text = (tmp_path / "plan.json").read_text()
    for broken in (
        "",
        "[]",
        text[:100],
        text.replace('"schema": 3', '"schema": 7'),
        text.replace('"schemes"', '"schemas"'),
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
