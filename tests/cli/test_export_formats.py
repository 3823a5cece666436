"""clado export in every format, and evaluate, on the embedded net."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from clado.cli import main


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with an asymmetric plan for the embedded net."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    small = ("--nsamples", 4, "--estimator", "diagonal", "--asymmetric", "--group-size", 32)
    made = call("profile", "--model", "digits", "--data", "digits:sensitivity", *small, "--output-dir", folder)
    assert made.exit_code == 0, made.output
    assert call("solve", folder, "--avg-bits", 4, "--time-limit", 5).exit_code == 0
    return folder


@pytest.mark.parametrize(
    ("format", "says", "files"),
    [
        ("safetensors", "loaded back bit for bit", {"model.safetensors"}),
        (
            "compressed-tensors",
            "decompresses 32 layers bit for bit; 0 stay float",
            {"model.safetensors", "config.json"},
        ),
        ("onnx", "onnxruntime gives the logits of clado.apply within", {"model.onnx"}),
    ],
)
def test_export_and_verify(run: Path, format: str, says: str, files: set[str]) -> None:
    for package in {"compressed-tensors": ("compressed_tensors",), "onnx": ("onnxruntime", "onnxscript")}.get(
        format, ()
    ):
        pytest.importorskip(package)
    out = run.parent / format
    done = call("export", run, "--format", format, "--out", out, "--verify")
    assert done.exit_code == 0, done.output
    assert says in done.output
    assert {p.name for p in out.iterdir()} == files | {"plan.json"}
    noted = json.loads((out / "plan.json").read_text())["info"]["export"]
    assert noted["format"] == format
    assert f"{noted['quantized_bytes']:,} bytes of codes and scales" in done.output


def test_evaluate_prints_both_accuracies_and_their_difference(run: Path) -> None:
    shown = call("evaluate", run, "--data", "digits:heldout", "--nsamples", 64)
    assert shown.exit_code == 0, shown.output
    header, *rows = [line.split() for line in shown.output.splitlines() if line.strip()]
    assert header == ["loss", "±", "top-1", "±", "top-5", "±"]
    assert [row[0] for row in rows] == ["float", "plan", "difference", "64"]
    number = {row[0]: [float(cell.rstrip("%")) for cell in row[-6:]] for row in rows[:3]}
    for k in (0, 2, 4):
        assert number["difference"][k] == pytest.approx(number["plan"][k] - number["float"][k], abs=0.011)
    top1, error = number["float"][2:4]
    assert error == pytest.approx(100 * ((top1 / 100) * (1 - top1 / 100) / 63) ** 0.5, abs=0.01)  # of a share of 64
