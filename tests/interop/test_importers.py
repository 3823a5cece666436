"""Scores of other tools, and files that must not be trusted."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pickle
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import clado
from clado import CladoError
from clado.cli import main
from clado.interop import read_clado, read_matrix, read_modelopt, read_scores
from tests.solver import instances

MODELOPT = Path(__file__).parent / "data" / "modelopt_search.pth"  # ModelOpt 0.47, auto_quantize of three Linears


def test_additive_scores_from_csv_and_json(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("layer,numel,bits,delta_loss\na,10,2,0.5\na,10,4,0.1\nb,20,2,0.3\nb,20,4,0.2\n")
    rows = {
        "a": {"numel": 10, "delta_loss": {"2": 0.5, "4": 0.1}},
        "b": {"numel": 20, "delta_loss": {"4": 0.2, "2": 0.3}},
    }
    (tmp_path / "s.json").write_text(json.dumps(rows))
    for name in ("s.csv", "s.json"):
        sens = read_scores(tmp_path / name)
        assert sens.bits == (2, 4)
        assert [layer.numel for layer in sens.layers] == [10, 20]
        assert sens.delta_loss == pytest.approx([0.5, 0.1, 0.3, 0.2])
        assert not sens.interaction.any()
        assert clado.solve(sens, avg_bits=3).bits == {"a": 4, "b": 2}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,10,2,0.5\na,10,2,0.4\n", "import: layer a must have one score a width, got 2"),
        ("a,10,2,0.5\nb,10,2,nan\n", "import: layer b must have finite scores, got {2: nan}"),
    ],
)
def test_scores_that_cannot_be_meant(rows: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("layer,numel,bits,delta_loss\n" + rows)
    with pytest.raises(CladoError) as error:
        read_scores(tmp_path / "s.csv")
    assert str(error.value) == message


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".pt"])
def test_matrices(suffix: str, tmp_path: Path) -> None:
    sens = instances.sensitivity(1, 3, (2, 4, 8))
    matrix, path = sens.matrix, tmp_path / f"g{suffix}"
    if suffix == ".npy":
        np.save(path, matrix)
    elif suffix == ".npz":
        np.savez(path, G=matrix, stderr=np.ones_like(matrix))
    elif suffix == ".safetensors":
        save_file({"G": matrix}, path)
    else:
        torch.save(torch.from_numpy(matrix), path)
    order = {"layers": [[layer.name, layer.numel] for layer in sens.layers], "bits": [2, 4, 8]}
    (tmp_path / "layers.json").write_text(json.dumps(order))
    again = read_matrix(path, tmp_path / "layers.json")
    assert np.array_equal(again.matrix, matrix)
    assert bool(np.isnan(again.stderr).all()) == (suffix != ".npz")
    (tmp_path / "layers.json").write_text(json.dumps({"layers": [["a", 1]], "bits": [2, 4]}))
    with pytest.raises(CladoError, match="matrix must have shape"):
        read_matrix(path, tmp_path / "layers.json")


def ltilde(sens: clado.Sensitivity) -> dict[str, object]:
    """What CLADO's notebooks would have saved, its rows shuffled."""
    single = sens.delta_loss
    joint = sens.interaction + single[:, None] + single[None, :]
    layer = np.repeat(np.arange(len(sens.layers)), len(sens.bits))
    joint[layer[:, None] == layer[None, :]] = 0
    np.fill_diagonal(joint, single)
    order = np.random.default_rng(0).permutation(len(single))
    names = [f"{item.name}(8, {b})bits" for item in sens.layers for b in sens.bits]
    return {"Ltilde": joint[np.ix_(order, order)], "layer_index": {names[v]: row for row, v in enumerate(order)}}


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_the_public_code(protocol: int, tmp_path: Path) -> None:
    sens = instances.sensitivity(2, 4, (2, 4, 8))
    path = tmp_path / "Ltilde.pkl"
    path.write_bytes(pickle.dumps(ltilde(sens), protocol=protocol))
    sizes = {layer.name: layer.numel for layer in sens.layers}
    again = read_clado(path, sizes)
    # The rows are shuffled, so layers come in another order.
    index = [sens.index(layer.name, b) for layer in again.layers for b in again.bits]
    assert again.matrix == pytest.approx(sens.matrix[np.ix_(index, index)], abs=1e-12)
    with pytest.raises(
        CladoError, match=r"layers must give every layer its number of weights, got none for \['layer2'\]"
    ):
        read_clado(path, {name: n for name, n in sizes.items() if name != "layer2"})


@pytest.mark.parametrize("tensor", [False, True])
def test_torch_files_of_the_public_code(tensor: bool, tmp_path: Path) -> None:
    sens = instances.sensitivity(2, 4, (2, 4, 8))
    held, path = ltilde(sens), tmp_path / "Ltilde.pt"
    sizes = {layer.name: layer.numel for layer in sens.layers}
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(held))
    wanted = read_clado(tmp_path / "plain.pkl", sizes)
    if tensor:  # strided
        held["Ltilde"] = torch.from_numpy(ltilde(sens)["Ltilde"].T.copy()).T
    torch.save(held, path)
    again = read_clado(path, sizes)
    assert np.array_equal(again.matrix, wanted.matrix)
    assert [layer.name for layer in again.layers] == [layer.name for layer in wanted.layers]


@given(
    st.integers(0, 5), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=3)
)
def test_damaged_pickles_are_read_or_refused(protocol: int, flips: list[tuple[float, int]]) -> None:
    sens = instances.sensitivity(2, 3, (2, 4))
    data = bytearray(pickle.dumps(ltilde(sens), protocol=protocol))
    for place, bit in flips:
        data[int(place * len(data))] ^= 1 << bit
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pkl"
        path.write_bytes(data)
        with contextlib.suppress(CladoError):  # a flip may hit a number, and then it is another number
            read_clado(path, {layer.name: layer.numel for layer in sens.layers})


class Forged:
    """An array whose dtype claims to hold Python objects, over bytes that would be taken for their addresses."""

    def __reduce__(self) -> tuple:
        return np.array([1.0]).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, (1,), ForgedDtype(), False, b"A" * 8)


class ForgedDtype:
    def __reduce__(self) -> tuple:
        return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 63)


class Outside:
    """A tensor that reaches beyond its storage."""

    def __init__(self, tensor: torch.Tensor, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.parts = (tensor.untyped_storage(), tensor, size, stride)

    def __reduce__(self) -> tuple:
        storage, tensor, size, stride = self.parts
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=tensor.dtype, _internal=True)
        return torch._utils._rebuild_tensor_v2, (typed, 0, size, stride, False, collections.OrderedDict())


def test_arrays_that_lie_about_their_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"Ltilde": Forged(), "layer_index": {"a(8, 2)bits": 0}}))
    with pytest.raises(CladoError, match="array must hold numbers, got 'O8'"):
        read_clado(path, {"a": 1})
    for size, stride in (((3, 3), (3, 1)), ((2, 2), (-1, 1)), ((2, 2), (2**40, 1))):
        torch.save({"Ltilde": Outside(torch.zeros(4), size, stride), "layer_index": {}}, tmp_path / "x.pt")
        with pytest.raises(CladoError, match="tensor must lie inside its storage"):
            read_clado(tmp_path / "x.pt", {})


class Hostile:
    """Runs a command when it is unpickled in the ordinary way."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


class HostileState:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return collections.defaultdict, (os.getcwd,), None, None, iter([("k", Hostile(self.marker))])


@pytest.mark.parametrize("kind", [Hostile, HostileState])
def test_no_pickle_runs(kind: type, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"Ltilde": kind(marker), "layer_index": {}}))
    with pytest.raises(CladoError, match=r"plain containers only, got (posix|nt)\."):
        read_clado(path, {})
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"candidate_stats": {"a": kind(marker)}}))
    with pytest.raises(CladoError, match="path must be a search state saved by ModelOpt"):
        read_modelopt(tmp_path / "x.pth")
    torch.save({"G": kind(marker)}, tmp_path / "g.pt")
    (tmp_path / "layers.json").write_text('{"layers": [["a", 1]], "bits": [2]}')
    with pytest.raises(CladoError, match="path must be a whole"):
        read_matrix(tmp_path / "g.pt", tmp_path / "layers.json")
    np.save(tmp_path / "g.npy", np.array([kind(marker)], dtype=object), allow_pickle=True)
    with pytest.raises(CladoError, match="path must be a whole"):
        read_matrix(tmp_path / "g.npy", tmp_path / "layers.json")
    assert not marker.exists()


def test_modelopt_search_state() -> None:
    sens = read_modelopt(MODELOPT)
    assert [(layer.name, layer.numel) for layer in sens.layers] == [("0", 512), ("2", 1024), ("4", 128)]
    assert sens.bits == (4, 8)
    assert sens.delta_loss[:2] == pytest.approx([3.120194946859556e-07, 7.733152451727676e-10])
    plan = clado.solve(sens, avg_bits=6)
    assert plan.status == "optimal"
    assert plan.bits == {"0": 8, "2": 4, "4": 8}  # what ModelOpt chose for the same budget


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_and_foreign_files_are_one_line(share: float, tmp_path: Path) -> None:
    whole = {
        "a.csv": b"layer,numel,bits,delta_loss\na,10,2,x\n",
        "a.json": b'{"a": {"numel": 1, "delta_loss": {"2": 0.1}}}',
        "a.pkl": pickle.dumps(ltilde(instances.sensitivity(2, 4, (2, 4)))),
        "a.pth": MODELOPT.read_bytes(),
    }
    readers = {".csv": read_scores, ".json": read_scores, ".pkl": lambda p: read_clado(p, {}), ".pth": read_modelopt}
    for name, data in whole.items():
        path = tmp_path / name
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(CladoError) as error:
            readers[path.suffix](path)
        assert "\n" not in str(error.value)
        with pytest.raises(CladoError, match="path must be a file"):
            readers[path.suffix](tmp_path / "absent")


def test_on_the_command_line(tmp_path: Path) -> None:
    def call(*arguments: object) -> object:
        return CliRunner().invoke(main, [str(a) for a in arguments])

    run = tmp_path / "run"
    assert call("import", "modelopt", MODELOPT, "--output-dir", run).exit_code == 0
    result = call("solve", run, "--avg-bits", 6)
    assert result.exit_code == 0, result.output
    assert "optimal: 1 at 4 bits, 2 at 8 bits" in result.output
    again = call("import", "modelopt", MODELOPT, "--output-dir", run)
    assert (again.exit_code, "not hold a matrix yet" in again.output) == (2, True)
    needs = call("import", "clado", MODELOPT, "--output-dir", tmp_path / "new")
    assert (needs.exit_code, "layers must be given for clado" in needs.output) == (2, True)
    assert not (tmp_path / "new").exists()
