"""The pipeline benchmarks on a small net: what they write, and that a wrong loss is not timed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.pipeline import bench_backends, bench_precision, bench_profile

SMALL = ["--samples", "8", "--layers", "4", "--rounds", "1", "--threads", str(torch.get_num_threads())]


def run(module: object, path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, object]:
    monkeypatch.setattr(sys, "argv", ["bench", *SMALL, *arguments, "--json", str(path)])
    module.main()  # type: ignore[attr-defined]
    return json.loads(path.read_text())


def test_profile_beside_the_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(bench_profile, tmp_path / "out.json", monkeypatch, "--pairs", "6")
    assert result["relative_error"] < 1e-4  # type: ignore[operator]
    assert set(result["ratios"]) == {f"{e} over {r}" for e in ("logit", "exact") for r in ("pre-quantized", "plain")}  # type: ignore[call-overload]
    for name, share in result["share_of_matrix_rate"].items():  # type: ignore[attr-defined]
        forwards, took = result["forward_equivalents"][name], result["median_seconds"][name]  # type: ignore[index]
        rate = 8 * forwards * result["gigaflops_of_one_forward"] / took
        assert share == pytest.approx(rate / result["matrix_gigaflops_per_second"])
    assert all(0 < part < 1 for parts in result["outside_the_model"].values() for part in parts.values())  # type: ignore[attr-defined]


def test_profile_in_a_carried_precision_without_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(
        bench_profile,
        tmp_path / "out.json",
        monkeypatch,
        "--no-loops",
        "--precision",
        "bfloat16",
        "--estimators",
        "logit",
    )
    assert result["precision"] == "bfloat16"
    assert result["ratios"] == {}


def test_wrong_losses_end_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bench_profile.Loop.run
    monkeypatch.setattr(bench_profile.Loop, "run", lambda self, choice: 1.01 * whole(self, choice))
    with pytest.raises(SystemExit, match="losses must agree"):
        run(bench_profile, tmp_path / "out.json", monkeypatch, "--no-loops", "--estimators", "logit")
    assert not (tmp_path / "out.json").exists()


def test_precision_is_held_to_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(bench_precision, tmp_path / "out.json", monkeypatch, "--model", "digits")
    assert set(result["delta_error"]) >= {"tf32, carried", "bfloat16, carried"}  # type: ignore[call-overload]
    monkeypatch.setattr(bench_precision, "LIMITS", {"float32": 0.0})
    with pytest.raises(SystemExit, match="below its limit"):
        run(bench_precision, tmp_path / "other.json", monkeypatch, "--model", "digits")


def test_backends_are_held_against_the_tool_before_they_are_timed() -> None:
    pytest.importorskip("modelopt", reason="NVIDIA ModelOpt is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    row = bench_backends.Row(
        "modelopt", "nvidia-modelopt", "small", partial(bench_backends.quantize, model), bench_backends.SEARCH
    )
    result = bench_backends.measured(row, 1)
    search = result["parts"]["scale search"]
    assert 0 < search["share"] < 1
    assert result["expected"] == pytest.approx(1 / (1 - search["share"] + search["share"] / search["faster"]))
    assert "2 × scale calibration" in result["ran"]
    assert "whole call" in bench_backends.shown(result)
    calls = iter(range(9))
    with pytest.raises(AssertionError, match="small: scales: values"):
        bench_backends.measured(replace(row, call=lambda: {"scales": next(calls)}), 1)
