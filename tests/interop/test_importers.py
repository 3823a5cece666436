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


def test_additive_scores_of_layers_of_different_widths(tmp_path: Path) -> None:
    rows = "a,10,4,0.1\na,10,2,0.5\nb,20,8,0.01\nc,30,3,0.3\nc,30,8,0.2\nc,30,5,0.25\n"
    (tmp_path / "s.csv").write_text("layer,numel,bits,delta_loss\n" + rows)
    held = {
        "a": {"numel": 10, "delta_loss": {"2": 0.5, "4": 0.1}},
        "b": {"numel": 20, "delta_loss": {"8": 0.01}},
        "c": {"numel": 30, "delta_loss": {"8": 0.2, "3": 0.3, "5": 0.25}},
    }
    (tmp_path / "s.json").write_text(json.dumps(held))
    for name in ("s.csv", "s.json"):
        sens = read_scores(tmp_path / name)
        assert widths(sens) == [[2, 4], [8], [3, 5, 8]]
        assert sens.delta_loss == pytest.approx([0.5, 0.1, 0.01, 0.3, 0.25, 0.2])
        assert clado.solve(sens, avg_bits=4.9).bits == {"a": 4, "b": 8, "c": 3}
    held["b"]["delta_loss"] = {}
    (tmp_path / "s.json").write_text(json.dumps(held))
    with pytest.raises(CladoError, match="import: layer b must have at least one score, got none"):
        read_scores(tmp_path / "s.json")


def widths(sens: clado.Sensitivity) -> list[list[int]]:
    return [[scheme.bits for scheme in own] for own in sens.candidates.schemes]


def different(seed: int) -> clado.Sensitivity:
    """Random scores of layers of one, three, two and seven widths."""
    lists = [[4], [2, 4, 8], [3, 8], [2, 3, 4, 5, 6, 7, 8]]
    random = np.random.default_rng(seed)
    owner = np.repeat(np.arange(4), [len(own) for own in lists])
    noise = random.standard_normal((13, 13))
    matrix = np.where(owner[:, None] == owner, 0.0, noise + noise.T) + np.diag(random.uniform(1, 2, 13))
    return clado.Sensitivity.from_matrix(matrix, [(f"layer{k}", 8 + k) for k in range(4)], schemes=lists)


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


def test_matrices_of_layers_of_different_widths(tmp_path: Path) -> None:
    sens = different(0)
    np.save(tmp_path / "g.npy", sens.matrix)
    rows = [[layer.name, layer.numel, own] for layer, own in zip(sens.layers, widths(sens), strict=True)]
    for order in ({"layers": rows}, {"layers": [*rows[:1], rows[1][:2], *rows[2:]], "bits": [2, 4, 8]}):
        (tmp_path / "layers.json").write_text(json.dumps(order))
        again = read_matrix(tmp_path / "g.npy", tmp_path / "layers.json")
        assert again.candidates == sens.candidates
        assert np.array_equal(again.matrix, sens.matrix)
    for bad in ({"layers": [*rows[:3], rows[3][:2]]}, {"layers": [[*row, 1] for row in rows]}):
        (tmp_path / "layers.json").write_text(json.dumps(bad))
        with pytest.raises(CladoError, match="import: layers must be JSON"):
            read_matrix(tmp_path / "g.npy", tmp_path / "layers.json")
    (tmp_path / "layers.json").write_text(json.dumps({"layers": [[*row[:2], row[2][::-1]] for row in rows]}))
    with pytest.raises(CladoError, match="schemes of layer1 must be distinct ones of ascending bits"):
        read_matrix(tmp_path / "g.npy", tmp_path / "layers.json")


def ltilde(sens: clado.Sensitivity) -> dict[str, object]:
    """What CLADO's notebooks would have saved, its rows shuffled."""
    single = sens.delta_loss
    joint = sens.interaction + single[:, None] + single[None, :]
    joint[sens.candidates.same_layer] = 0
    np.fill_diagonal(joint, single)
    order = np.random.default_rng(0).permutation(len(single))
    names = [f"{item.name}(8, {b})bits" for item, own in zip(sens.layers, widths(sens), strict=True) for b in own]
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


def test_pickles_of_layers_of_different_widths(tmp_path: Path) -> None:
    sens, path = different(1), tmp_path / "Ltilde.pkl"
    path.write_bytes(pickle.dumps(ltilde(sens)))
    sizes = {layer.name: layer.numel for layer in sens.layers}
    again = read_clado(path, sizes)
    assert {tuple(own) for own in widths(again)} == {tuple(own) for own in widths(sens)}
    index = [sens.index(layer.name, b) for layer, own in zip(again.layers, widths(again), strict=True) for b in own]
    assert again.matrix == pytest.approx(sens.matrix[np.ix_(index, index)], abs=1e-12)
    held = ltilde(sens)
    held["layer_index"] = {name.replace("(8, 3)", "(8, 04)"): row for name, row in held["layer_index"].items()}
    path.write_bytes(pickle.dumps(held))
    with pytest.raises(CladoError, match="import: layer layer3 must have one row a width, got 4"):
        read_clado(path, sizes)


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


class Recipe:
    """A format of ModelOpt's search: its bits over 16."""

    def __init__(self, bits: float) -> None:
        self.compression = bits / 16


def test_modelopt_groups_of_different_formats(tmp_path: Path) -> None:
    formats = {"a": [4.5, 8, 16], "b": [8, 16], "kept": [16]}
    groups = {
        f"{name}.quant_recipe": {
            "formats": [Recipe(bits) for bits in own],
            "scores": [1 / bits for bits in own],
            "uncompressed_cost": 32.0,
            "cost_weight": 0.5,
        }
        for name, own in formats.items()
    }
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"candidate_stats": groups}))
    sens = read_modelopt(tmp_path / "x.pth")
    assert [(layer.name, layer.numel) for layer in sens.layers] == [("a", 64), ("b", 64)]
    assert widths(sens) == [[4, 8], [8]]
    assert sens.delta_loss == pytest.approx([1 / 4.5, 1 / 8, 1 / 8])


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
