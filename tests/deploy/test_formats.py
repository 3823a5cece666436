"""The registry of file formats: options are checked against the format, and one more is one file and one line."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
import torch

import clado
from clado.deploy import FORMATS, predicted_bytes, verify
from clado.deploy.formats import Format, Request
from clado.quant import Quantizer
from tests.models import random_plan, small_cnn


@dataclass(frozen=True)
class Options:
    mark: str = field(default="none", metadata={"help": "what the file begins with"})


def write(request: Request[Options], folder: Path) -> tuple[int, int]:
    held = b"".join(found.codes.numpy().tobytes() for found in request.codes.values())
    (folder / "codes.bin").write_bytes(request.options.mark.encode() + held)
    return len(held), 0


def check(request: Request[Options], folder: Path) -> str:
    return f"{(folder / 'codes.bin').stat().st_size} bytes with {request.options.mark}"


TOY = Format(write, lambda request: (sum(x.numel for x in request.plan.layers), 0), check, ("codes.bin",), Options)


def test_another_format_is_one_file_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "toy", TOY)
    model, _ = small_cnn()
    plan = random_plan(model, Quantizer())
    written = clado.export(model, plan, tmp_path / "out", "toy", mark="mine")
    assert (written.quantized, written.leftovers, written.header) == (*predicted_bytes(model, plan, "toy"), 4)
    assert verify(model, plan, tmp_path / "out", "toy", mark="mine") == f"{written.quantized + 4} bytes with mine"
    clado.export(model, plan, tmp_path / "out")  # an export takes the place of another
    clado.export(model, plan, tmp_path / "out", "toy")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"codes.bin", "plan.json"}
    with pytest.raises(clado.CladoError, match="export: mark must be left out unless for toy, got onnx"):
        clado.export(model, plan, tmp_path / "none", "onnx", mark="mine")


@pytest.mark.parametrize("call", [clado.export, verify])
def test_options_of_other_formats_are_refused_in_one_line(call: object, tmp_path: Path) -> None:
    model, _ = small_cnn()
    plan = random_plan(model, Quantizer())
    known = "odd_widths, example, activations"
    with pytest.raises(clado.CladoError, match=f"export: options must be among {known}, got 'odd_width'"):
        call(model, plan, tmp_path / "none", odd_width=None)  # type: ignore[operator]
    with pytest.raises(clado.CladoError, match="example must be left out unless for onnx, got compressed-tensors"):
        call(model, plan, tmp_path / "none", "compressed-tensors", example=torch.zeros(2))  # type: ignore[operator]
    with pytest.raises(clado.CladoError, match="odd_widths must be left out unless for compressed-tensors, got safe"):
        call(model, plan, tmp_path / "none", odd_widths="dense")  # type: ignore[operator]
    assert not (tmp_path / "none").exists()


def test_every_option_has_a_default_and_a_word_of_help() -> None:
    for format in FORMATS.values():
        format.options()
        assert all(option.metadata["help"] for option in fields(format.options))
        assert set(format.takes) == {option.name for option in fields(format.options)}
    model, _ = small_cnn()
    plan = random_plan(model, Quantizer())
    assert predicted_bytes(model, plan, "safetensors", odd_widths=None, example=None) == predicted_bytes(model, plan)
