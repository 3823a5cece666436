"""The benchmark's own behaviour: it checks before it times, judges by noise, and plots."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import clado_ext
from bench import compare
from bench.__main__ import OPS, SIGNATURES, main
from bench.harness import Case, Grid, measure
from bench.ops import bench_compensate

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

    case = Case("x", "1", "float32", lambda: None, lambda _: None, 8, rivals={"theirs": broken, "other": lambda: None})
    [row] = measure([case], "cpu", 0.001)
    assert list(row["rivals_s"]) == ["other"]
    assert row["rivals_failed"] == {"theirs": "RuntimeError: not on this machine"}


def test_rivals_results_are_compared_and_a_slow_one_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("bench.harness.SLOW", -1.0)
    case = Case(
        "x", "1", "float32", lambda: None, lambda _: None, 8,
        rivals={"theirs": lambda: calls.append(1) or 3.0},
        compare=lambda results: {f"half of {name}": [result / 2] for name, result in results.items()},
    )  # fmt: skip
    [row] = measure([case], "cpu", 0.001)
    assert row["rivals_figures"] == {"half of theirs": [1.5]}
    assert list(row["rivals_s"]) == ["theirs"]
    assert calls == [1]


@pytest.mark.filterwarnings("ignore")  # of other packages, when they are imported
def test_gptq_of_others_is_the_same_rounding() -> None:
    """Of the plain loops and of those packages that are here."""
    torch.manual_seed(0)
    with torch.inference_mode():
        [case] = bench_compensate.cases(Grid(shapes=((5, 130),)))
        results = {name: work() for name, work in case.rivals.items()}
        assert {"column loop", "lazy blocks"} <= results.keys()
        assert case.compare is not None
        figures = case.compare(results)
        assert min(figures.pop("loss of nearest")) > 1
        for name, ratios in figures.items():
            assert ratios == pytest.approx([1, 1, 1], rel=1e-3), name
        better = {"theirs": results["column loop"] * 0 + results["lazy blocks"][2]}  # 8 bits everywhere
        with pytest.raises(AssertionError, match="theirs"):
            case.compare(better)


def test_nothing_is_timed_before_it_is_right() -> None:
    def wrong(_: Any) -> None:
        raise AssertionError("differs")

    called: list[int] = []
    with pytest.raises(AssertionError, match="differs"):
        measure([Case("x", "1", "float32", lambda: called.append(1), wrong, 8)], "cpu")
    assert called == [1]  # to be judged


def right(weight: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """scale_errors in plain torch."""
    values = (weight / scale).round().clamp(low, high) * scale
    return (values - weight).double().square().sum(-1, keepdim=True)


def coarse(weight: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return right(weight, scale * 1.01, low, high)


def careless(weight: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return right(weight.add_(1), scale, low, high)


def other(weight: torch.Tensor) -> None: ...


def test_a_rival_from_outside_is_judged_then_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    names = [f"{__name__}:{function.__name__}" for function in (right, careless, coarse, other)]
    given = [word for name in names for word in ("--rival", name)]
    assert main(["scale_errors", *SMALL, "--json", str(path), *given]) == 0
    [row] = compare.rows_of(path).values()
    assert {"torch loop", names[0]} == row["rivals_s"].keys()
    failed = row["rivals_failed"]
    assert failed[names[1]] == "wrong: it writes to its arguments"
    assert failed[names[2]].startswith(
        "wrong on 16x96 4 bit, 39 candidates float32: Tensor-likes are not close! Mismatched"
    )
    assert failed[names[3]].startswith("TypeError: other() takes 1 positional argument")
    lines = capsys.readouterr().out
    assert f"{names[2]} is left out: wrong on" in lines
    table = "".join(lines.split())
    assert f"{names[2]}wrong" in table
    assert f"{names[3]}fails" in table
    assert main(["compare", str(path), str(path)]) == 0
    assert names[0] in "".join(capsys.readouterr().out.split())


@pytest.mark.filterwarnings("ignore")  # of other packages, when they are imported
@pytest.mark.parametrize("name", OPS)
def test_what_a_rival_is_given_is_what_our_op_takes(name: str) -> None:
    grid = Grid() if name.startswith(("carried", "iqp")) else Grid(shapes=((8, 64), (3, 4, 10)))
    with torch.inference_mode():
        for case in importlib.import_module(f"bench.ops.bench_{name}").cases(grid):
            assert (case.op in SIGNATURES) == (case.given is not None)
            if case.given is not None:
                case.judge(getattr(clado_ext, case.op)(*case.given))
            if name.startswith("iqp"):
                break


def test_a_rival_is_needed_by_name_and_by_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["bitpack", "--rival", "a:b"], "rival must be OP=a:b with OP among batched_ce, carried_add_layer_norm"),
        (["fake_quant", "--rival", "nowhere"], "rival must be MODULE:FUNCTION, got nowhere"),
        (["fake_quant", "--rival", "no.where:f"], "got no.where:f: ModuleNotFoundError: No module named 'no'"),
        (
            ["fake_quant", "--rival", f"{__name__}:SMALL"],
            f"rival must be a function, got {__name__}:SMALL, of type list",
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert main(["batched_ce", *SMALL, "--rival", f"pack={__name__}:right"]) == 2
    assert f"{__name__}:right is left out: no row of pack was timed" in capsys.readouterr().err


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
        (["bitpack", "--shape", "3by4"], "shape must be sizes joined by x"),
        (["bitpack", "--shape", "0x5"], "shape must be sizes joined by x, each at least 1, got 0x5"),
        (["bitpack", "--threads", "0"], "threads must be a number of at least 1, got 0"),
        (
            ["bitpack", "--json", "/proc/x/y.json"],
            "json must be a file that can be written, got /proc/x/y.json: No such",
        ),
        (
            ["compare", "missing", "gone"],
            "file must be one that python -m bench --json wrote, got missing: No such file",
        ),
        (["compare", __file__, __file__], "got " + __file__ + ": it holds something else"),
        (["plot", "missing"], "file must be one that python -m bench --json wrote, got missing: No such file"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["fake_quant", "--dtype", "int8", "--shape", "8x8"],
            "dtype must be among float32, bfloat16, float16, got int8",
        ),
        (["pairwise_ce", "--shape", "8x8"], "shape must have 3 sizes, e.g. 50x64x1000, got 8x8"),
        (["carried", "--shape", "8x8"], "device, shape and dtype must be its own, got others"),
    ],
)
def test_an_op_without_a_case_says_why(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == f"{arguments[0]} is left out: {message}\n"
    assert not captured.out


def test_a_plot_without_matplotlib_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        main(["plot", "any.json"])
    assert "pip install clado[bench]" in capsys.readouterr().err.splitlines()[-1]
