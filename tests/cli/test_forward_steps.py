"""The user's functions are named once, to clado profile: the stages behind it find them in the run directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import clado
from clado.cli import main

HERE = "tests.cli.test_forward_steps"


class Sides(nn.Module):
    """Two inputs and a dictionary whose first output is not what counts."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.mask, self.head = nn.Linear(12, 24), nn.Linear(5, 24), nn.Linear(24, 6)

    def forward(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        features = (self.image(image) * self.mask(mask)).relu()
        return {"features": features, "logits": self.head(features)}


def model() -> nn.Module:
    torch.manual_seed(0)
    return Sides().eval()


class Pairs(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(index)
        image, mask = torch.rand(12, generator=random) * 255, torch.randn(5, generator=random)
        return {"image": image, "mask": mask, "wanted": torch.randn(6, generator=random)}


def step(net: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = net(batch["image"] / 255, batch["mask"])
    return found


def logits(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return step(net, batch)["logits"]


def distance(output: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return (output["logits"] - batch["wanted"]).square().mean(1)


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result


KINDS: dict[str, tuple[Any, ...]] = {
    "loss": ("--forward-step", f"{HERE}:step", "--loss-func", f"{HERE}:distance", "--estimator", "exact"),
    "logits": ("--forward-step", f"{HERE}:logits"),
}


@pytest.fixture(scope="module", params=list(KINDS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps") / request.param
    what = ("--model", f"{HERE}:model", "--data", f"{HERE}:Pairs", "--nsamples", 16, "--bits", "2,4,8")
    call("profile", *what, *KINDS[request.param], "--quantize-ends", "--output-dir", folder)
    call("solve", folder, "--avg-bits", 4, "--no-measure", "--time-limit", 5)
    return folder


def increase(run: Path, plan: clado.Plan, count: int = 32) -> float:
    """Mean loss increase of a plan on the first images that were not profiled, by a plain loop."""
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0)).tolist()[16 : 16 + count]
    batch = torch.utils.data.default_collate([Pairs()[k] for k in order])
    clean, now = (step(net, batch) for net in (model(), clado.apply(model(), plan)))
    if run.name == "loss":
        return (distance(now, batch) - distance(clean, batch)).double().mean().item()
    p, q = (out["logits"].double().log_softmax(1) for out in (clean, now))
    return (p.exp() * (p - q)).sum(1).mean().item()


def test_the_run_notes_the_functions(run: Path) -> None:
    note = json.loads((run / "model.json").read_text())
    words = KINDS[run.name]
    assert note["forward_step"] == words[1]
    assert note.get("loss_func") == (words[3] if run.name == "loss" else None)


@torch.no_grad()
def test_solve_reranks_refines_and_finishes_by_them(run: Path, tmp_path: Path) -> None:
    again = shutil.copytree(run, tmp_path / run.name)
    said = call("solve", again, "--avg-bits", 4, "--rerank", 32, "--refine", 2, "--time-limit", 5).output
    plan = clado.Plan.load(again)
    assert plan.info["rerank"][0]["loss_increase"] == pytest.approx(increase(run, plan), rel=1e-3, abs=1e-6)
    unit = "" if run.name == "loss" else ", losses in nats"  # a loss of the user's has a unit of its own
    assert f"32 images{unit}; the " in said
    call("solve", again, "--avg-bits", 2, "--no-measure", "--finish", "compensated", "--time-limit", 5)
    finished = clado.Plan.load(again)
    note = finished.info["finish"]
    assert note["judged_by"] == 16  # half of what there is
    assert note["taken"] == ("before" if run.name == "loss" else "compensated")
    assert increase(run, finished, 16) == pytest.approx(note["loss_increase"][note["taken"]], rel=1e-3, abs=1e-6)


@torch.no_grad()
def test_the_other_commands_take_them_too(run: Path, tmp_path: Path) -> None:
    plan = clado.Plan.load(run)
    if run.name == "loss":
        rows = [line.split() for line in call("evaluate", run).output.splitlines() if line.strip()]
        assert rows[0] == ["loss", "±"]
        assert rows[3][0] == "difference"
        assert float(rows[3][1]) == pytest.approx(increase(run, plan), abs=1e-4)
    call("latency", run, "--batch-size", 4, "--repeats", 1, "--out", tmp_path / "latency.csv")
    assert len((tmp_path / "latency.csv").read_text().splitlines()) == 1 + 3 * 3
    call("report", run, "--nsamples", 32, "--out", tmp_path / "report.html")
    kept = json.loads((run / "measured.json").read_text())["plans"]
    ours = next(record for record in kept if record["schemes"] == list(plan.schemes.values()))
    assert ours["increase"] == pytest.approx(increase(run, plan), rel=1e-3, abs=1e-6)
    assert ours["samples"] == 32


def test_export_has_every_input_and_output(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    said = call("export", run, "--format", "onnx", "--out", tmp_path / "onnx", "--verify").output.splitlines()
    gives = "features, logits" if run.name == "loss" else "logits"
    assert f"the graph takes image, mask and gives {gives}, of any number of samples" in said
    assert "left out, since the outputs do not depend on it: wanted" in said
    shown = "the logits" if run.name == "logits" else gives
    assert said[-1].startswith(f"onnxruntime gives {shown} of clado.apply within")
    assert call("export", run, "--out", tmp_path / "plain", "--verify").output.endswith("loaded back bit for bit\n")


def test_a_function_that_is_gone_is_one_line(run: Path, tmp_path: Path) -> None:
    again = shutil.copytree(run, tmp_path / "run")
    note = json.loads((again / "model.json").read_text())
    (again / "model.json").write_text(json.dumps({**note, "forward_step": f"{HERE}:gone"}))
    for words in (("evaluate",), ("solve", "--avg-bits", "4", "--rerank", "4"), ("latency",)):
        result = CliRunner().invoke(main, [words[0], str(again), *words[1:]])
        assert result.exit_code == 2
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith("error: run: forward_step must be package.module:function that can be imported, got")
