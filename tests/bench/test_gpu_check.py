"""make gpu-check fails clearly where there is no GPU; whatever a step does, what was found is written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_check
from bench.pipeline import bench_profile


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_missing_gpu_is_a_failure() -> None:
    script = Path(__file__).parent.parent.parent / "bench" / "gpu_check.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "gpu-check: torch" in done.stderr
    assert "sees no GPU" in done.stderr
    assert "Traceback" not in done.stderr


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """As if a GPU were here; the commands of the steps by name."""
    commands: dict[str, list[list[str]]] = {}

    def lines(step: str) -> list[list[str]]:
        if step not in commands:
            raise FileNotFoundError(f"{step}: no such tool")
        return commands[step]

    monkeypatch.setattr(gpu_check, "device", lambda: "stub")
    monkeypatch.setattr(gpu_check, "machine", lambda: {"device": "stub"})
    monkeypatch.setattr(gpu_check, "lines", lines)
    return commands


def test_every_outcome_is_written(stubbed: dict[str, list[list[str]]], tmp_path: Path) -> None:
    stubbed["build"] = [python("print('built')")]
    stubbed["tests"] = [python("print('one is wrong'); raise SystemExit(1)"), python("raise SystemExit(0)")]
    stubbed["memcheck"] = [python("import time; print('slow', flush=True); time.sleep(60)")]
    arguments = ["--only", "build", "tests", "racecheck", "--out", str(tmp_path)]
    assert gpu_check.main(arguments) == 1
    assert gpu_check.main(["--only", "memcheck", "--minutes", "0.02", "--out", str(tmp_path)]) == 1
    steps = json.loads((tmp_path / "gpu_check.json").read_text())["steps"]
    assert [(row["step"], row["result"]) for row in steps] == [
        ("build", "passed"),
        ("tests", "FAILED"),
        ("racecheck", "FAILED"),
        ("memcheck", "TIMED OUT"),
    ]
    assert [row["output"] for row in steps] == [[], ["one is wrong"], ["racecheck: no such tool"], ["slow"]]


def test_nothing_runs_on_a_tree_that_does_not_build(stubbed: dict[str, list[list[str]]], tmp_path: Path) -> None:
    stubbed["build"] = [python("raise SystemExit(2)")]
    stubbed["tests"] = [python(f"open({str(tmp_path / 'ran')!r}, 'w')")]
    assert gpu_check.main(["--only", "build", "tests", "--out", str(tmp_path)]) == 1
    assert not (tmp_path / "ran").exists()


def test_rows_of_other_ops_are_kept(
    stubbed: dict[str, list[list[str]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ops.json").write_text(json.dumps({"rows": [{"op": "pack"}, {"op": "fake_quant", "old": True}]}))
    whole = gpu_check.run

    def run(step: str, commands: list[list[str]], seconds: float) -> gpu_check.Outcome:
        rows = {"machine": {}, "rows": [{"op": "fake_quant"}]}
        return whole(step, [python(f"open({commands[0][-1]!r}, 'w').write({json.dumps(rows)!r})")], seconds)

    monkeypatch.setattr(gpu_check, "run", run)
    assert gpu_check.main(["--only", "bench", "--ops", "fake_quant", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "ops.json").read_text())["rows"] == [{"op": "pack"}, {"op": "fake_quant"}]


def test_profiles_are_timed_one_by_one(
    stubbed: dict[str, list[list[str]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[list[str]] = []

    def run(step: str, commands: list[list[str]], seconds: float) -> gpu_check.Outcome:
        asked.extend(commands)
        return gpu_check.Outcome(step)

    monkeypatch.setattr(gpu_check, "run", run)
    assert gpu_check.main(["--only", "profile", "--out", str(tmp_path)]) == 0
    assert len(asked) == len(gpu_check.PROFILES)
    for command in asked:
        options = bench_profile.parse(command[command.index(bench_profile.__name__) + 1 :])
        assert (options.device, options.samples) == ("cuda", 1024)
    steps = json.loads((tmp_path / "gpu_check.json").read_text())["steps"]
    assert [row["step"] for row in steps] == ["profile " + name for name in gpu_check.PROFILES]
