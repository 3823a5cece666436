"""The command line as a person meets it: the stages on an image folder, and every bad input in one line with exit code 2."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file

from clado import Plan, Sensitivity, solve
from clado.artifacts import ChosenOn
from clado.cli import main
from clado.cli.tables import decimals, show_measured, show_plan
from clado.profiling import Checkpoint, Sums
from tests.models import timm_model

MODEL = ["--model", "mobilenetv3_small_100", "--num-classes", "10"]


def own_model() -> torch.nn.Module:
    return timm_model("mobilenetv3_small_100")[0]


def margin(output: torch.Tensor, batch: object) -> torch.Tensor:
    """A user's loss: the range of the logits, per sample."""
    return output.amax(-1) - output.amin(-1)


def doubled(model: torch.nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    """A user's forward step."""
    return 2 * model(batch[0])


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result: Result, message: str) -> None:
    said = ("warning: the weights of", "loss: ")  # before the run is compared with what the folder holds
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith(said)]
    assert result.exit_code == 2, result.output
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of five noise images, and weights of a timm model."""
    root = tmp_path_factory.mktemp("cli")
    random = np.random.default_rng(0)
    for label in "abcd":
        (root / "images" / label).mkdir(parents=True)
        for k in range(5):
            Image.fromarray(random.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(
                root / "images" / label / f"{k}.png"
            )
    save_file(own_model().state_dict(), root / "weights.safetensors")
    return root


def test_every_stage_on_an_image_folder(folder: Path) -> None:
    run = folder / "run"
    result = call(
        "profile",
        *MODEL,
        "--img-size",
        64,
        "--checkpoint",
        folder / "weights.safetensors",
        "--data",
        folder / "images",
        "--nsamples",
        8,
        "--bits",
        "2,4,8",
        "--output-dir",
        run,
    )
    assert result.exit_code == 0, result.output
    assert "52 layers, 156 candidates, 8 samples" in result.output
    result = call("solve", run, "--avg-bits", 3, "--time-limit", 5)
    assert result.exit_code == 0, result.output
    plan = json.loads((run / "plan.json").read_text())
    assert plan["usage"]["avg_bits"]["used"] <= 3
    result = call("export", run)
    assert result.exit_code == 0, result.output
    assert f"{sum(plan['layer_bytes'].values()):,} bytes of codes" in result.output
    result = call("evaluate", run)
    assert result.exit_code == 0, result.output
    assert "6 samples" in result.output  # twenty less the eight that were profiled and the six that chose the plan
    result = call("solve", run, "--avg-bits", 3, "--time-limit", 5, "--no-measure")
    assert result.exit_code == 0, result.output
    assert re.search(r" images(, losses in nats)?; ", result.output) is None
    assert "12 samples" in call("evaluate", run).output
    result = call("solve", run, "--avg-bits", 3, "--time-limit", 8, "--refine", 1, "--rerank", 5)
    assert result.exit_code == 0, result.output
    assert "refined on 8 images: loss increase" in result.output
    assert "5 images, losses in nats; the " in result.output
    assert json.loads((run / "plan.json").read_text())["info"]["rerank_samples"] == 5
    assert "7 samples" in call("evaluate", run).output  # nor those that chose the plan
    result = call("inspect", run)
    assert result.exit_code == 0, result.output
    assert "blocks.1.0.conv_dw" in result.output
    result = call("pareto", run, "--avg-bits", "2.5:4:0.5", "--time-limit", 8, "--max-bits", 4, "--plot", run / "f.svg")
    assert result.exit_code == 0, result.output
    assert "</svg>" in (run / "f.svg").read_text()
    front = json.loads((run / "pareto.json").read_text())
    assert [plan["usage"]["avg_bits"]["limit"] for plan in front] == [2.5, 3, 3.5, 4]
    losses = [plan["objective"] for plan in front]
    assert losses == sorted(losses, reverse=True)
    assert max(front[-1]["bits"].values()) == 4
    before = sorted(p.name for p in run.iterdir())
    refused(call("pareto", run, "--avg-bits", 3, "--plot", run / "f.gif"), "path must end in .png, .svg, .pdf")
    refused(call("pareto", run, "--avg-bits", "3:2"), "avg-bits must be first:last:step or numbers")
    refused(
        call("profile", *MODEL, "--img-size", 64, "--data", folder / "images", "--nsamples", 8, "--output-dir", run),
        "be new or hold the same run, got",
    )
    refused(call("solve", run, "--avg-bits", 1), "avg_bits must be at least 2, got 1")
    refused(call("solve", run, "--avg-bits", 3, "--pin", "blocks"), "pin must read LAYER=BITS")
    refused(call("solve", run), "budget must be given")
    assert "'--rerank': 1 is not in the range x>=2" in call("solve", run, "--avg-bits", 3, "--rerank", 1).stderr
    refused(call("export", run, "--format", "gguf"), "format must be one of safetensors")
    assert sorted(p.name for p in run.iterdir()) == before


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_inspect_fits_80_columns_without_colour(tmp_path: Path, encoding: str) -> None:
    """Imported scores with a long name, then a plan, then junk: whole lines, bars by width, damage named."""
    names = ["features.denseblock3.denselayer12.conv_depthwise.0", "head"]
    sens = Sensitivity.from_matrix(np.diag([2.0, 1, 0.5] * 2), [(name, 64) for name in names])
    sens.save(tmp_path)

    def inspect() -> list[str]:
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "NO_COLOR": "1", "COLUMNS": "80"}
        command = [sys.executable, "-m", "clado", "inspect", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, env=environment, check=True)
        lines = done.stdout.decode(encoding).splitlines()
        assert all(len(line) <= 80 or line.startswith("next: ") for line in lines)  # a path is never broken
        assert "\x1b" not in "".join(lines)
        return lines

    assert any("2.5e-01" in line and line.startswith("features.de") for line in inspect())
    solve(sens, avg_bits=6).save(tmp_path)
    block = "█" if encoding == "utf-8" else "#"
    plan = json.loads((tmp_path / "plan.json").read_text())
    rows = [line for line in inspect() if line.startswith(("features", "head"))]
    assert [line.count(block * 2) > 0 for line in rows] == [True, True]
    assert [f" {bits} {block * bits} " in line for line, bits in zip(rows, plan["bits"].values(), strict=True)] == [
        True,
        True,
    ]
    (tmp_path / "pareto.json").write_text("[")
    assert any("pareto.json" in line and "damaged" in line for line in inspect())


def test_inspect_shows_layers_of_different_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits where inputs are kept, labels where they are rounded; nothing where a layer does not have a scheme."""
    monkeypatch.setenv("COLUMNS", "80")
    sens = Sensitivity.from_matrix(np.diag([4.0, 1, 2, 0.5]), [("a", 64), ("b", 64)], schemes=[[2, 4, 8], [4]])
    sens.save(tmp_path)
    lines = call("inspect", tmp_path).output.splitlines()
    assert any(line.endswith("0 samples at 2, 4, 8 bits") for line in lines)
    assert [line.split() for line in lines if line[:2] in ("a ", "b ")] == [
        ["a", "64", "2.0e+00", "5.0e-01", "1.0e+00"],
        ["b", "64", "2.5e-01"],
    ]
    solve(sens, avg_bits=4).save(tmp_path)
    output = call("inspect", tmp_path).output
    assert "optimal: 2 at 4 bits" in output
    assert output.count("4 ████ ") == 2

    every = [f"W{bits}A{inputs}" for bits in range(2, 9) for inputs in (4, 8, 16)]
    names = ["features.denseblock3.denselayer12.conv_depthwise.0", "head"]
    matrix = np.diag(np.arange(18.0, 0, -1))
    sens = Sensitivity.from_matrix(matrix, [(name, 10**6) for name in names], schemes=[every[:16], ["W2A4", "W8A16"]])
    (tmp_path / "plan.json").unlink()
    sens.save(tmp_path)
    lines = call("inspect", tmp_path).output.splitlines()
    assert all(len(line) <= 80 or line.startswith("next: ") for line in lines)
    assert any(line.endswith("samples at W2A4, W2A8, W2A16, ..., W8A16") for line in lines)
    assert any("ΔL at W2A4" in line for line in lines)
    Plan(sens.layers, {names[0]: "W4A8", names[1]: "W8A16"}, "given").save(tmp_path)
    lines = call("inspect", tmp_path).output.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert any("W4A8 ████ " in line for line in lines)
    assert any("given: 1 at W4A8, 1 at W8A16" in line for line in lines)


def test_a_plan_older_than_its_matrix_is_said(tmp_path: Path) -> None:
    matrix = np.diag([0.3, 0.1])
    sens = replace(Sensitivity.from_matrix(matrix, [("fc", 24)], (2, 4)), fingerprint={"data": "eight samples"})
    sens.save(tmp_path)
    solve(sens, avg_bits=4).save(tmp_path)
    for command in ("inspect", "recipe"):
        assert "older than the matrix" not in call(command, tmp_path).output
    replace(sens, fingerprint={"data": "twelve samples"}).save(tmp_path)
    for command in ("inspect", "recipe"):
        result = call(command, tmp_path)
        assert result.exit_code == 0, result.output
        assert "note: the plan in" in result.output
        assert "is older than the matrix beside it; clado solve" in result.output


def test_inspect_an_unfinished_run(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path, {}, 32, 2)
    for _ in range(2):
        part = Sums.zeros(2)
        part.samples = 32
        kept.add(part, torch.arange(32))
    result = call("inspect", tmp_path)
    assert result.exit_code == 0, result.output
    assert "running sums: 64 samples done" in result.output
    refused(call("inspect", tmp_path / "nowhere"), "run must be a run directory that holds one of clado's files")


def test_a_run_that_ends_when_its_plans_stand(tmp_path: Path) -> None:
    """Said at its end, by inspect and by the report; and how near an unfinished one was at its last check."""
    run = tmp_path / "run"
    how = ["--model", "digits", "--data", "digits:sensitivity", "--estimator", "diagonal", "--rounding", "nearest"]
    how += ["--nsamples", 192, "--batch-size", 8, "--output-dir", run]
    ended = call("profile", *how, "--avg-bits", "2.5,4", "--until-stable", 0.9)
    assert ended.exit_code == 0, ended.output
    (line,) = [line for line in ended.output.splitlines() if line.startswith("stable after")]
    sens = Sensitivity.load(run)
    assert line == str(sens.provenance.stability)
    assert line.startswith(f"stable after {sens.num_samples} of 192 samples: the plans of 2.5, 4 bits are within ")
    inspected = call("inspect", run)
    assert line in inspected.output.splitlines()
    assert "plans within " in " ".join(inspected.output.split())
    assert call("solve", run, "--avg-bits", 3, "--solver", "heuristic").exit_code == 0
    assert call("report", run, "--nsamples", 0).exit_code == 0
    assert line in (run / "report.html").read_text()
    strict = call("profile", *how, "--until-stable", "--avg-bits", "2.5,4")
    assert strict.exit_code == 0, strict.output
    assert Sensitivity.load(run).provenance.stability.tolerance == 0.1
    planned = call("profile", *how[:-1], tmp_path / "new", "--until-stable", "--dry-run")
    assert "MiB of memory and on disk" in planned.output


def test_digits_and_a_model_of_ones_own(tmp_path: Path) -> None:
    result = call(
        "profile",
        "--model",
        "digits",
        "--data",
        "digits:sensitivity",
        "--nsamples",
        20,
        "--estimator",
        "diagonal",
        "--output-dir",
        tmp_path / "a",
    )
    assert result.exit_code == 0, result.output
    result = call(
        "profile",
        "--model",
        "clado.digits:load_model",
        "--data",
        "digits:heldout",
        "--nsamples",
        20,
        "--estimator",
        "diagonal",
        "--output-dir",
        tmp_path / "b",
    )
    assert result.exit_code == 0, result.output


def test_a_users_loss_and_forward_step_are_taken_by_name(tmp_path: Path) -> None:
    base = ["profile", "--model", "digits", "--data", "digits:sensitivity", "--nsamples", 6, "--estimator", "diagonal"]
    found = {}
    for name, step in (("one", ()), ("two", ("--forward-step", "tests.cli.test_cli:doubled"))):
        result = call(*base, "--loss-func", "tests.cli.test_cli:margin", *step, "--output-dir", tmp_path / name)
        assert result.exit_code == 0, result.output
        found[name] = Sensitivity.load(tmp_path / name / "sensitivity.safetensors").delta_loss
    np.testing.assert_allclose(found["two"], 2 * found["one"], rtol=1e-3, atol=1e-5)  # float32 losses
    where = ("--output-dir", tmp_path / "none")
    refused(
        call(*base, *where, "--loss-func", "tests.cli.test_cli:nothing"), "loss-func must be package.module:function"
    )
    refused(call(*base, *where, "--loss-func", "margin"), "loss-func must be package.module:function")
    refused(
        call(*base, *where, "--forward-step", "tests.cli.test_cli:MODEL"),
        "forward-step must be package.module:function",
    )
    assert not (tmp_path / "none").exists()


def test_bad_input_is_one_line_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    base = ["profile", "--output-dir", run, "--data", folder / "images", "--nsamples", 4]
    refused(call(*base, "--model", "no_such_net"), "name must be a timm model")
    refused(call(*base, "--model", "no.such:thing"), "package.module:function that can be imported")
    refused(call(*base, *MODEL, "--checkpoint", folder / "nothing.safetensors"), "checkpoint must be a file")
    refused(call(*base, *MODEL, "--checkpoint", Path(__file__)), "checkpoint must be a file of tensors alone")
    refused(
        call(*base, "--model", "resnet18", "--num-classes", 10, "--checkpoint", folder / "weights.safetensors"),
        "checkpoint must fit the model",
    )
    refused(call(*base, *MODEL, "--bits", "2,9"), "bits must be distinct ascending widths in 2..8")
    refused(call(*base, *MODEL, "--img-size", 64, "--ignore", "nothing*"), "ignore must match at least one layer")
    refused(call("profile", *MODEL, "--data", tmp_path / "none", "--output-dir", run), "folder must be an image folder")
    (tmp_path / "empty").mkdir()
    refused(call("profile", *MODEL, "--data", tmp_path / "empty", "--output-dir", run), "folder must hold images")
    for stage in ("export", "evaluate"):
        refused(call(stage, tmp_path / "nowhere"), "directory must hold model.json")
    refused(call("solve", tmp_path / "nowhere", "--avg-bits", 3), "run directory that holds one")
    assert not run.exists()


def test_help_is_fast_and_teaches() -> None:
    code = "import sys, clado.cli; print(any(m in sys.modules for m in ('torch', 'timm', 'pyscipopt', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    result = call("--help")
    for command in ("quickstart", "profile", "solve", "pareto", "export", "evaluate", "inspect"):
        assert command in result.output
        assert call(command, "--help").exit_code == 0


def test_profiling_needs_neither_timm_nor_scip() -> None:
    code = """
import sys
sys.modules["timm"] = sys.modules["pyscipopt"] = None
import torch, clado
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
print(len(clado.profile(model, [torch.randn(4, 4)], quantize_ends=True, verbose=False).layers))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "2\n"


def test_kernels_need_torch_alone() -> None:
    code = """
import sys
for name in ("timm", "pyscipopt", "scipy", "rich", "click", "safetensors", "clado"):
    sys.modules[name] = None
import torch, clado_ext
print(clado_ext.pack(torch.zeros(1, 8, dtype=torch.int8), 4).shape[1])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "1000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None), ({"GOMP_SPINCOUNT": "5"}, "5")]
)
def test_threads_do_not_spin_unless_they_are_told_to(
    given: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that what the command sets is taken back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert call("inspect", "nowhere").exit_code != 0
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_the_command_line_is_there_before_torch_is() -> None:
    """Threads go by what is set before torch is loaded."""
    code = "import sys, clado.cli; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_correct_measures_the_pairs_of_the_plan_and_keeps_them(tmp_path: Path) -> None:
    data = ["--model", "digits", "--data", "digits:sensitivity", "--nsamples", 6, "--skip", 4, "--bits", "2,8"]
    assert call("profile", *data, "--output-dir", tmp_path).exit_code == 0
    result = call("solve", tmp_path, "--avg-bits", 4, "--solver", "heuristic", "--correct", 2)
    assert result.exit_code == 0, result.output
    sens, plan = Sensitivity.load(tmp_path), json.loads((tmp_path / "plan.json").read_text())
    count = len(sens.info["corrected_pairs"])
    assert f"{count} exact pairs on 2 images" in result.output
    assert f"no plan below {plan['bound']:.5f}, in nats\n" in result.output
    assert f"{count} exact pairs" in call("inspect", tmp_path).output
    assert plan["info"]["stands"] == ("the plan stands" in result.output)
    assert plan["objective"] == pytest.approx(sens.predict(plan["bits"]))
    refused(call("solve", tmp_path, "--avg-bits", 4, "--correct", 7), "num_samples must lie in 2..6, got 7")


def test_the_smallest_plan_for_a_loss_predicted_or_measured(tmp_path: Path) -> None:
    data = ["--model", "digits", "--data", "digits:sensitivity", "--nsamples", 8, "--bits", "2,4,8"]
    quick = ["--estimator", "diagonal", "--rounding", "nearest", "--group-size", 0]
    assert call("profile", *data, *quick, "--output-dir", tmp_path).exit_code == 0
    sens = Sensitivity.load(tmp_path)
    limit = solve(sens, avg_bits=4).objective

    result = call("solve", tmp_path, "--max-loss-increase", limit, "--minimize", "avg_bits")
    assert result.exit_code == 0, result.output
    assert f"least avg_bits with a predicted loss increase of at most {limit:.6g}: proven" in result.output
    plan = Plan.load(tmp_path)
    assert plan.avg_bits <= 4
    assert plan.info["minimized"]["bound"] == plan.avg_bits
    assert plan.objective <= limit
    assert ": proven" in call("inspect", tmp_path).output
    refused(call("solve", tmp_path, "--max-loss-increase", 1e-9), "error: solve: max_loss_increase must be at least ")
    refused(call("solve", tmp_path, "--avg-bits", 4, "--minimize", "avg_bits"), "minimize must come with max_loss_inc")

    how = ("--max-drop", "4%", "--data", "digits:heldout", "--drop-samples", 50)
    result = call("solve", tmp_path, *how, "--minimize", "avg_bits", "--min-bits", 4)
    assert result.exit_code == 0, result.output
    assert "on 50 held-out samples, which chose it" in result.output
    plan = Plan.load(tmp_path)
    assert min(plan.bits.values()) >= 4
    assert plan.info["max_drop"]["drop"] <= 0.04
    assert plan.chosen_on == ChosenOn("digits:heldout", 50)
    seen = call("evaluate", tmp_path, "--data", "digits:heldout", "--nsamples", 1000)
    assert "550 samples" in seen.output  # six hundred less those that chose the plan
    assert "held-out samples, which chose it" in call("inspect", tmp_path).output
    for words, message in (
        (("--max-drop", "0.5"), "max-drop must read 0.5% (points of top-1) or 0.01nats (of the loss), got '0.5'"),
        (("--max-drop", "x%"), "max-drop must read 0.5% (points of top-1) or 0.01nats (of the loss), got 'x%'"),
        (("--max-drop", "1%", "--rerank", 4), "must come without the other, --rerank, --refine and --correct, got"),
        (("--max-drop", "1%", "--max-loss-increase", 1), "got --max-loss-increase, --max-drop"),
        (("--max-loss-increase", 1, "--correct", 4), "got --max-loss-increase, --correct"),
        (("--max-drop", "-99nats", "--drop-samples", 4), "smallest_within: max_drop must be at least"),
    ):
        refused(call("solve", tmp_path, *words), message)
    assert Plan.load(tmp_path) == plan


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a user's loss on the digits with a plan."""
    run = tmp_path_factory.mktemp("digits") / "run"
    how = ("--nsamples", 4, "--bits", "2,8", "--estimator", "diagonal", "--loss-func", "tests.cli.test_cli:margin")
    result = call("profile", "--model", "digits", "--data", "digits:sensitivity", *how, "--output-dir", run)
    assert result.exit_code == 0, result.output
    assert json.loads((run / "model.json").read_text())["loss_func"] == "tests.cli.test_cli:margin"
    assert call("solve", run, "--avg-bits", 4, "--solver", "heuristic").exit_code == 0
    return run


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("profile --skip -1", "-1 is not in the range x>=0"),
        ("profile --nsamples 0", "0 is not in the range x>=1"),
        ("profile --workers -1", "-1 is not in the range x>=0"),
        ("profile --until-stable --avg-bits 3,x", "must be numbers separated by commas, got '3,x'"),
        ("profile --batch-size 0", "0 is not in the range x>=1"),
        ("profile --seed 99999999999999999999", "is not in the range 0<=x<=2147483647"),
        ("profile --max-memory nan", "error: profile: max-memory must be a positive number, got nan"),
        ("profile --max-memory inf", "error: profile: max-memory must be a positive number, got inf"),
        ("profile --max-memory -1", "error: profile: max-memory must be a positive number, got -1.0"),
        ("profile --device tpu", "error: profile: device must be cpu or a GPU that torch sees, got 'tpu'"),
        ("evaluate {run} --device meta", "error: evaluate: device must be cpu or a GPU that torch sees, got 'meta'"),
        (
            "latency {run} --device cuda:99",
            "error: latency: device must be cpu or a GPU that torch sees, got 'cuda:99'",
        ),
        ("report {run} --nsamples -1", "-1 is not in the range x>=0"),
        ("evaluate {run} --nsamples 0", "0 is not in the range x>=1"),
        ("evaluate {run} --batch-size 0", "0 is not in the range x>=1"),
        ("latency {run} --batch-size -1", "-1 is not in the range x>=1"),
        ("solve {run} --avg-bits 3 --threads 0", "0 is not in the range x>=1"),
        ("solve {run} --avg-bits 3 --time-limit nan", "error: solve: time-limit must be a positive number, got nan"),
        (
            "solve {run} --avg-bits 4 --rerank 4 --correct 4",
            "error: correct: sens must be measured by the additive estimator, got diagonal",
        ),
        ("merge {run} --output-dir=", "error: merge: output-dir must name a folder, got ''"),
    ],
)
def test_numbers_devices_and_folders_that_cannot_be_meant(digits: Path, command: str, message: str) -> None:
    words = command.format(run=digits).split()
    result = call(*words, *(("--model", "digits", "--data", "x", "--output-dir", "y") if "profile" in words else ()))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["export", "recipe", "report --nsamples 0", "latency --repeats 1"])
def test_what_the_system_refuses_is_one_line_with_the_path(digits: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "file").touch()
    name, *options = command.split()
    result = call(name, digits, *options, "--out", tmp_path / "file" / "x")
    assert result.exit_code == 1, result.output
    assert result.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'file'}")


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE")
@pytest.mark.parametrize("command", ["export", "solve --avg-bits 5 --solver heuristic"])
def test_a_full_disk_is_one_line(digits: Path, tmp_path: Path, command: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(digits, run)
    name, *options = command.split()
    code = "import resource, clado.cli; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); clado.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, name, run, *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {run / ('out' if name == 'export' else 'plan.json')}: ")
    assert "too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in digits.iterdir())


def test_random_weights_are_said_and_are_the_same_for_later_commands(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = ("--img-size", 32, "--data", folder / "images", "--nsamples", 2, "--bits", "2,8", "--estimator", "diagonal")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    result = call("profile", *MODEL, *how, "--output-dir", tmp_path / "random")
    assert torch.equal(state, torch.get_rng_state())
    assert result.exit_code == 0, result.output
    warning = "warning: the weights of mobilenetv3_small_100 are random; give --pretrained or --checkpoint"
    assert result.stderr.splitlines().count(warning) == 1
    assert call("solve", tmp_path / "random", "--avg-bits", 4, "--solver", "heuristic").exit_code == 0
    result = call("evaluate", tmp_path / "random", "--nsamples", 2)
    assert result.exit_code == 0, result.output
    monkeypatch.chdir(folder)
    where = ("--checkpoint", "weights.safetensors", "--output-dir", tmp_path / "own")
    result = call("profile", *MODEL, *how, *where)
    assert result.exit_code == 0, result.output
    assert "random" not in result.stderr
    note = json.loads((tmp_path / "own" / "model.json").read_text())
    assert note["spec"]["checkpoint"] == str(folder / "weights.safetensors")


@pytest.mark.parametrize(
    ("gaps", "decided", "said"),
    [
        ((0.0, 0.2), True, "the winner's lead exceeds 1.96 standard errors"),
        ((0.0, 0.2), False, "the winner's lead is within 1.96 standard errors"),
        (
            (0.0, -0.1, 0.2),
            False,
            "the plan of the layers alone stands, as the lead of others is within 1.96 standard errors",
        ),
    ],
)
@pytest.mark.parametrize(("loss", "unit"), [("kl", ", losses in nats"), ("mse", "")])
def test_what_was_measured_says_whether_it_decided(
    digits: Path,
    gaps: tuple[float, ...],
    decided: bool,
    said: str,
    loss: str,
    unit: str,
    capsys: pytest.CaptureFixture,
) -> None:
    rows = [
        {"plan": "original", "loss_increase": 1 + gap, "behind": gap, "stderr": 0.3, "size_bytes": 1234} for gap in gaps
    ]
    info = {"rerank": rows, "rerank_loss": loss, "rerank_samples": 9, "rerank_decided": decided}
    show_measured(replace(Plan.load(digits), info=info))
    *table, last = capsys.readouterr().out.splitlines()
    assert last == f"9 images{unit}; {said}"
    assert len(table) == 1 + len(gaps)


def test_losses_of_a_table_keep_three_digits() -> None:
    assert [decimals(largest) for largest in (0.0, 20.0, 0.001, 0.00099, 1.2e-6)] == [5, 5, 5, 6, 8]


def test_a_refined_plan_says_so_and_claims_no_bound(digits: Path, capsys: pytest.CaptureFixture) -> None:
    plan = Plan.load(digits)
    show_plan(replace(plan, status="given", bound=-math.inf, info={**plan.info, "refine": []}), "nats")
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("refined: ")
    assert second == f"predicted loss increase {plan.objective:.5f} ({plan.objective_name}), in nats"


def test_a_folder_without_classes_has_no_labels(folder: Path, tmp_path: Path) -> None:
    for k in range(5):
        shutil.copy(folder / "images" / "a" / f"{k}.png", tmp_path / f"{k}.png")
    run = tmp_path / "run"
    how = ("--img-size", 32, "--data", tmp_path, "--nsamples", 2, "--bits", "2,8", "--estimator", "diagonal")
    weights = ("--checkpoint", folder / "weights.safetensors")
    result = call("profile", *MODEL, *weights, *how, "--output-dir", run)
    assert result.exit_code == 0, result.output
    result = call("solve", run, "--avg-bits", 4, "--solver", "heuristic", "--rerank", 2)
    assert result.exit_code == 0, result.output
    refused(call("evaluate", run, "--data", tmp_path), "(images: in one subfolder per class), got inputs alone")
    refused(
        call("profile", *MODEL, *weights, *how, "--loss", "cross_entropy", "--output-dir", tmp_path / "ce"),
        "yield (inputs, targets) for cross_entropy (images: in one subfolder per class), got inputs alone",
    )


def test_report_says_that_the_note_is_damaged(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(digits, run)
    (run / "model.json").write_text((digits / "model.json").read_text()[:40])
    for stage in ("export", "report"):
        refused(call(stage, run), f"run: model.json must be whole, got {run / 'model.json'}")
    assert call("report", run, "--nsamples", 0).exit_code == 0


@pytest.mark.slow
def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With little time for proofs; what is finished is better than the diagonal's plan beyond two standard errors."""
    from clado.cli import quickstart

    monkeypatch.setattr(quickstart, "SECONDS", 2.0)
    run = call("quickstart", "--output-dir", tmp_path / "run")
    assert (run.exit_code, run.exception) == (0, None), run.output
    rows = [re.split(r"\s{2,}", line.strip()) for line in run.stdout.splitlines() if line.rstrip().endswith("%")]
    kl = {row[0]: float(row[3]) for row in rows}
    gap, error = next((float(row[5]), float(row[6])) for row in rows if row[0] == "clado, finished")
    assert gap < -2 * error
    assert gap == pytest.approx(kl["clado, finished"] - kl["diagonal"], abs=0.11)
    assert kl["clado, finished"] <= kl["clado, planned"] < kl["uniform 2"] / 2
    assert "; compensated rounding by 512 samples" in run.stdout
    profiled, finished = (p.name for p in (tmp_path / "run").glob("rounded-*.safetensors"))
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        profiled,
        finished,
        "sensitivity.safetensors",
        "progress.safetensors",
        "plan.json",
        "model.json",
        "out",
        "pareto.json",
        "measured.json",
        "report.html",
    }
    assert all(len(line) <= 80 for line in run.stdout.splitlines())
