"""Compensated rounding on the command line, from a profile of the digits to a report."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from clado import Plan, Sensitivity
from tests.cli.test_cli import call, refused

PROFILE = ("profile", "--model", "digits", "--data", "digits:sensitivity", "--estimator", "diagonal", "--bits", "2,8")
HOW = (*PROFILE, "--rounding", "compensated")


def test_rounding_from_a_profile_to_an_export(tmp_path: Path) -> None:
    run, second, merged = tmp_path / "run", tmp_path / "second", tmp_path / "merged"
    planned = call(*HOW, "--nsamples", 9, "--output-dir", run, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "\nmoments " in planned.output
    assert not run.exists()
    result = call(*HOW, "--nsamples", 9, "--moment-samples", 7, "--output-dir", run)
    assert result.exit_code == 0, result.output
    sens = Sensitivity.load(run)
    assert str(sens.provenance.rounding) == "compensated rounding by 7 samples"
    assert call("solve", run, "--avg-bits", 4).exit_code == 0
    assert Plan.load(run).rounding == sens.provenance.rounding
    shown = " ".join(call("inspect", run).output.split())
    assert "diagonal estimator, kl, compensated rounding by 7 samples" in shown
    assert "rounded weights: compensated rounding by 7 samples" in shown
    assert call("export", run, "--out", tmp_path / "out").exit_code == 0
    assert call("report", run).exit_code == 0
    assert "compensated rounding by 7 samples" in (run / "report.html").read_text()

    more = (*HOW, "--nsamples", 5, "--skip", 9, "--output-dir", second)
    refused(call(*more, "--rounded-as", tmp_path / "nowhere"), "path must be a sensitivity file or a run directory")
    refused(call(*more, "--rounded-as", ""), "rounded-as must name a folder, got ''")
    result = call(*more, "--rounded-as", run)
    assert result.exit_code == 0, result.output
    result = call("merge", run, second, "--output-dir", merged)
    assert result.exit_code == 0, result.output
    assert Sensitivity.load(merged).num_samples == 14
    assert Sensitivity.load(merged).rounded is not None
    shutil.rmtree(second)
    assert call(*more).exit_code == 0
    refused(
        call("merge", run, second, "--output-dir", tmp_path / "no"), "or --rounded-as, of the first), got compensated"
    )

    (damaged,) = run.glob("rounded-*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert "rounded weights: damaged" in " ".join(call("inspect", run).output.split())
    refused(call("export", run, "--out", tmp_path / "bad"), "file must hold whole rounded weights")
    assert not (tmp_path / "bad").exists()


def test_a_plan_is_finished_and_exported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call(*HOW, "--nsamples", 12, "--output-dir", run).exit_code == 0
    result = call("solve", run, "--avg-bits", 3, "--no-measure", "--finish", "compensated", "--finish-samples", 10)
    assert result.exit_code == 0, result.output
    assert "finished on 10 images; loss increase on 250 others: " in " ".join(result.output.split())
    plan = Plan.load(run)
    assert plan.chosen_on is not None
    assert plan.chosen_on.samples == 250  # half of those that were not profiled
    assert set(plan.info["finish"]["loss_increase"]) == {"before", "compensated"}
    assert call("export", run, "--out", tmp_path / "out", "--verify").exit_code == 0
    assert call("evaluate", run, "--nsamples", 8).exit_code == 0


@pytest.mark.parametrize(
    ("taken", "words"),
    [
        ("before", "no stage is better by more than its error: weights stay as they were measured"),
        ("compensated", "weights are those of 'compensated': 'learned together' is not better by more than its error"),
        ("learned together", ""),
    ],
)
def test_it_says_which_stage_was_taken(taken: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"before": 0.5, "compensated": 0.4, "learned": None, "learned together": 0.39}
    note = {"samples": 8, "judged_by": 4, "loss_increase": losses, "taken": taken}

    def finish(model: object, plan: Plan, *given: object, **options: object) -> Plan:
        return replace(plan, info={**plan.info, "finish": note})

    monkeypatch.setattr("clado.improve.finish", finish)
    run = tmp_path / "run"
    assert call(*HOW, "--nsamples", 8, "--output-dir", run).exit_code == 0
    said = " ".join(call("solve", run, "--avg-bits", 3, "--no-measure", "--finish", "learned").output.split())
    stages = "0.5000 before, 0.4000 compensated, not finite learned, 0.3900 learned together"
    assert f"finished on 8 images; loss increase on 4 others: {stages}" in said
    assert words in said
    assert ("by more than its error" in said) == bool(words)


def test_what_does_not_go_with_nearest_rounding(tmp_path: Path) -> None:
    where = ("--nsamples", 4, "--output-dir", tmp_path / "run")
    nearest = (*PROFILE, "--rounding", "nearest", *where)
    refused(call(*nearest, "--moment-samples", 4), "must be left out with nearest rounding, got 4")
    refused(call(*PROFILE, *where, "--rounding", "best"), "rounding must be one of nearest, compensated, got 'best'")
    assert not (tmp_path / "run").exists()
