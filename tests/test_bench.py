"""The benchmark's own behaviour: it checks before it times, judges by noise, and plots."""

import json
from pathlib import Path

import pytest
import torch

from bench import compare
from bench.__main__ import OPS, main
from bench.harness import Case, Grid, measure

SMALL = ["--shape", "16x96", "3x4x10", "--seconds", "0.001", "--threads", "1"]


def test_runs_checks_writes_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    ops = ["batched_ce", "bitpack", "carried", "pairwise_ce", "scale_search"]
    assert main([*ops, *SMALL, "--json", str(path)]) == 0
    rows = compare.rows_of(path)
    assert {op for op, *_ in rows} == {"batched_ce", "pack", "unpack", "pairwise_ce", "scale_search", "quantize_weight"}
    assert all(row["median_s"] > 0 and row["share_of_ceiling"] > 0 for row in rows.values())
    assert main(["plot", str(path), "--out", str(tmp_path / "share.svg")]) == 0
    assert (tmp_path / "share.svg").read_text().count("<svg") == 1
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "fake_quant into given outputs" in out
    assert all(op in out for op in OPS if op != "bitpack")


def test_a_rival_that_raises_is_named_and_left_out() -> None:
    def broken() -> None:
        raise RuntimeError("not on this machine\nmore")

    case = Case("x", "1", "float32", lambda: None, lambda: None, 8, rivals={"theirs": broken, "other": lambda: None})
    [row] = measure([case], "cpu", 0.001)
    assert list(row["rivals_s"]) == ["other"]
    assert row["rivals_failed"] == {"theirs": "RuntimeError: not on this machine"}


def test_nothing_is_timed_before_it_is_right() -> None:
    def wrong() -> None:
        raise AssertionError("differs")

    timed = []
    with pytest.raises(AssertionError, match="differs"):
        measure([Case("x", "1", "float32", lambda: timed.append(1), wrong, 8)], "cpu")
    assert not timed


def test_grid_keeps_shapes_of_the_right_rank_and_known_dtypes() -> None:
    grid = Grid(shapes=((2, 3), (4, 5, 6)), dtypes=("bfloat16", "int8"))
    assert grid.shapes_or((1, 1)) == ((2, 3),)
    assert grid.dtypes_or(torch.float32, torch.bfloat16) == (torch.bfloat16,)
    assert Grid().shapes_or((1, 1)) == ((1, 1),)


@pytest.mark.parametrize(
    ("factor", "spread", "verdict", "code"),
    [
        (1.0, 0.1, "same", 0),
        (0.5, 0.1, "faster", 0),
        (1.5, 0.1, "slower", 1),
        (1.5, 0.9, "same", 0),
        (1.02, 0.0, "same", 0),
    ],
)
def test_verdicts(tmp_path: Path, factor: float, spread: float, verdict: str, code: int) -> None:
    paths = []
    for name, median in (("old", 1.0), ("new", factor)):
        row = {"op": "pack", "shape": "1", "dtype": "int8", "threads": 1, "share_of_ceiling": 0.5, "median_s": median}
        row |= {"low_s": median * (1 - spread / 2), "high_s": median * (1 + spread / 2)}
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({"machine": {"device": "x"}, "rows": [row]}))
    assert [compare.verdict(*(next(iter(compare.rows_of(p).values())) for p in paths))] == [verdict]
    assert main(["compare", *map(str, paths)]) == code


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["nonsense"], "ops must be"),
        (["pack", "--shape", "3by4"], "shape must be sizes joined by x"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
