"""What the file system refuses is one line; what is read belongs to one file."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import clado
from clado.artifacts import MATRIX_FILE
from clado.common import FileError, atomic_file, atomic_folder, read_safetensors
from clado.deploy import write_latency
from clado.profiling import PROGRESS_FILE, read_progress

LONG = "x" * 300  # longer than a name may be


def parts() -> tuple[nn.Module, clado.Sensitivity, clado.Plan, torch.Tensor]:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval(), torch.randn(8, 4)
    sens = clado.profile(net, [x], num_samples=8, quantize_ends=True, verbose=False)
    return net, sens, clado.solve(sens, avg_bits=4), x


CALLS: dict[str, Callable[[Any, Any, Any, Any, Path], Any]] = {
    "save a matrix": lambda net, sens, plan, x, place: sens.save(place),
    "save a plan": lambda net, sens, plan, x, place: plan.save(place),
    "load a matrix": lambda net, sens, plan, x, place: clado.Sensitivity.load(place),
    "load a plan": lambda net, sens, plan, x, place: clado.Plan.load(place),
    "export": lambda net, sens, plan, x, place: clado.export(net, plan, place),
    "load": lambda net, sens, plan, x, place: clado.load(place, net),
    "verify": lambda net, sens, plan, x, place: clado.verify(net, plan, place, "compressed-tensors"),
    "verify onnx": lambda net, sens, plan, x, place: clado.verify(net, plan, place, "onnx", example=x),
    "profile": lambda net, sens, plan, x, place: clado.profile(
        net, [x], num_samples=8, output_dir=place, verbose=False
    ),
    "correct": lambda net, sens, plan, x, place: clado.correct(
        net, [x], sens, avg_bits=4, output_dir=place, verbose=False
    ),
    "finish": lambda net, sens, plan, x, place: clado.finish(net, plan, [x], output_dir=place, verbose=False),
    "latency": lambda net, sens, plan, x, place: write_latency({"0": {4: 1.0}}, place),
    "solve": lambda net, sens, plan, x, place: clado.solve(sens, latency_ms=1, latency=place),
    "report": lambda net, sens, plan, x, place: clado.write_report(place),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("place", [LONG, f"file/{LONG}", "file/inside"])
def test_every_call_says_in_one_line_what_the_file_system_refuses(call: str, place: str, tmp_path: Path) -> None:
    if call.startswith("verify"):
        pytest.importorskip("onnx_ir" if "onnx" in call else "compressed_tensors")
    if call == "report":
        pytest.importorskip("vl_convert")
    given = parts()
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(clado.CladoError) as caught:
        CALLS[call](*given, tmp_path / place)
    assert "\n" not in str(caught.value)
    assert ": " in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("open_", [atomic_file, atomic_folder])
def test_a_full_disk_is_one_line_and_the_systems_error(open_: Any, tmp_path: Path) -> None:
    line = r"file: .*/there must be writable, got No space left on device$"
    with pytest.raises(FileError, match=line) as caught, open_(tmp_path / "there"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
    assert isinstance(caught.value, OSError)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "somewhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", [MATRIX_FILE, PROGRESS_FILE])
def test_a_reader_of_a_live_run_sees_one_file(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is replaced by the next one, which has more samples, as soon as it was opened."""
    net, x = parts()[0], torch.randn(16, 4)
    for name, count in (("run", 8), ("next", 16)):
        options = {"num_samples": count, "batch_size": 8, "quantize_ends": True, "verbose": False}
        clado.profile(net, [x], output_dir=tmp_path / name, **options)

    def look() -> tuple[dict[str, str], dict[str, torch.Tensor]]:
        return read_safetensors(tmp_path / "run" / file)

    first, second = look(), read_safetensors(tmp_path / "next" / file)
    assert len(first[1]["sample_digests" if file == MATRIX_FILE else "digests"]) == 8
    plain = Path.read_bytes

    def read(self: Path) -> bytes:
        data = plain(self)
        (tmp_path / "next" / file).replace(tmp_path / "run" / file)
        return data

    monkeypatch.setattr(Path, "read_bytes", read)
    if file == MATRIX_FILE:
        assert len(clado.Sensitivity.load(tmp_path / "run").sample_digests) == 8
    else:
        assert read_progress(tmp_path / "run" / file)[1].samples == 8
    monkeypatch.undo()
    metadata, tensors = look()
    assert metadata == second[0]
    assert all(torch.equal(tensors[name], value) for name, value in second[1].items())
