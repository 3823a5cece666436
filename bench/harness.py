"""Timing with a correctness check first, a ceiling measured beside every case, and rivals on the same work."""

from __future__ import annotations

import contextlib
import io
import json
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROUNDS = 5  # of ours, the ceiling and the rivals in turn, so that all see the same machine
SLOW = 2.0  # seconds: on a CPU, of a rival that takes longer the first call counts and is the only one


Works = dict[str, Callable[[], Any]]  # by name
Outside = dict[str, dict[str, Callable[..., Any]]]  # functions by op and name


@dataclass(frozen=True)
class Case:
    """One row of a benchmark.

    Attributes:
        op, shape, dtype: what is run, for the table.
        run: the work; it is called many times.
        judge: raises where what ``run()`` gave is not what the plain-torch twin gives.
        bytes: read and written by the work at least, each input and output once.
        flops: done by the work at least.
        rivals: other ways to the same result, by name.
        compare: takes what the rivals returned, by name, and gives figures of each beside ours; raises where ours falls behind.
        copy: moves the same bytes by ``copy_``, the ceiling; None: a plain copy of as many bytes.
        given: arguments of ``clado_ext.<op>``, which a rival from outside is called with; None: the row takes no such rival.
    """

    op: str
    shape: str
    dtype: str
    run: Callable[[], Any]
    judge: Callable[[Any], None]
    bytes: int = 0
    flops: int = 0
    rivals: Works = field(default_factory=dict)
    compare: Callable[[dict[str, Any]], dict[str, list[float]]] | None = None
    copy: Callable[[], Any] | None = None
    given: tuple[Any, ...] | None = None


class Wrong(ValueError):
    """A rival's result is not what the plain-torch twin gives."""


class Unfit(ValueError):
    """Shapes or dtypes of which an op takes none."""


@dataclass(frozen=True)
class Grid:
    """Shapes and dtypes asked for; an op's own where nothing is asked."""

    device: str = "cpu"
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()

    def shapes_or(self, *own: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The shapes asked for that have as many sizes as the op's ``own``, which stand where none is asked for."""
        taken = tuple(shape for shape in self.shapes if len(shape) == len(own[0])) if self.shapes else own
        if not taken:
            like, got = ("x".join(map(str, shape)) for shape in (own[0], self.shapes[0]))
            raise Unfit(f"shape must have {len(own[0])} sizes, e.g. {like}, got {got}")
        return taken

    def dtypes_or(self, *own: torch.dtype) -> tuple[torch.dtype, ...]:
        """The dtypes asked for that the op takes."""
        taken = tuple(dtype for dtype in own if name_of(dtype) in self.dtypes) if self.dtypes else own
        if not taken:
            raise Unfit(f"dtype must be among {', '.join(map(name_of, own))}, got {', '.join(self.dtypes)}")
        return taken


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Other tools print, warn and show bars."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def times(work: Callable[[], Any], device: str, seconds: float, least: int) -> list[float]:
    """Seconds of single calls, after a warm-up; with one CPU thread its own time, so that other processes do not count."""
    if device == "cuda":
        return gpu_times(work, seconds, least)
    clock = cpu_clock()
    work()
    out: list[float] = []
    while len(out) < least or sum(out) < seconds:
        start = clock()
        work()
        out.append(clock() - start)
    return out


def cpu_clock() -> Callable[[], float]:
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def gpu_times(work: Callable[[], Any], seconds: float, least: int) -> list[float]:
    """Seconds of a call on the GPU's own clock: means over runs of calls queued one after the other, about 5 ms each, so that a
    kernel shorter than its launch shows what a queue of them takes."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def run(calls: int) -> float:
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    run(1)
    calls = max(1, min(1000, int(5e-3 / max(run(3), 1e-6))))
    out: list[float] = []
    while len(out) < least or sum(out) * calls < seconds:
        out.append(run(calls))
    return out


def copy_of(size: int, device: str) -> Callable[[], Any]:
    """A copy that reads and writes ``size`` bytes in all."""
    source = torch.ones(max(1, size // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def product(device: str) -> tuple[Callable[[], Any], int]:
    """A float32 product of torch, at the rate of its multiply-adds, and its flops (two each)."""
    size = 8192 if device == "cuda" else 1024
    left, right = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    return (lambda: left @ right), 2 * size**3


def measure(
    cases: Iterable[Case], device: str, seconds: float = 0.5, outside: Outside | None = None
) -> list[dict[str, Any]]:
    """Check every case, then time it in rounds with its ceiling and its rivals; a rival that raises is named and left out.

    ``outside`` holds further rivals by op and name; each is called with what the case is ``given`` and judged as ours is.
    """
    multiply, multiply_flops = product(device)
    rows = []
    for case in cases:
        case.judge(case.run())
        copy = case.copy or copy_of(case.bytes, device)
        theirs = case.rivals | guests(case, outside or {})
        tried, failed = running(theirs)
        figures = case.compare({name: tried[name][0] for name in case.rivals if name in tried}) if case.compare else {}
        first = {name: took for name, (_, took) in tried.items()}
        del tried  # what they returned may be large
        slow = {name: [took] for name, took in first.items() if device == "cpu" and took > SLOW}
        rivals = {name: theirs[name] for name in first if name not in slow}
        works = {"ours": case.run, "copy": copy, "product": multiply, **rivals}
        taken: dict[str, list[float]] = {name: [] for name in works} | slow
        for _ in range(ROUNDS):
            for name, work in works.items():
                share = seconds if name in ("ours", "copy") else seconds / 2
                taken[name] += times(work, device, share / ROUNDS, least=3 if name == "ours" else 1)
        median = {name: statistics.median(t) for name, t in taken.items()}
        low, _, high = statistics.quantiles(taken["ours"], n=4)
        ceiling = {"bytes_per_s": case.bytes / median["copy"], "flops_per_s": multiply_flops / median["product"]}
        by_bytes = median["copy"] if case.bytes else 0.0
        by_flops = case.flops / ceiling["flops_per_s"]
        rows.append(
            {
                "op": case.op,
                "shape": case.shape,
                "dtype": case.dtype,
                "threads": torch.get_num_threads() if device == "cpu" else 0,
                "median_s": median["ours"],
                "low_s": low,
                "high_s": high,
                "calls": len(taken["ours"]),
                "bytes": case.bytes,
                "gb_per_s": case.bytes / median["ours"] / 1e9,
                "gflop_per_s": case.flops / median["ours"] / 1e9,
                "ceiling": ceiling,
                "bound": "bytes" if by_bytes >= by_flops else "flops",
                "share_of_ceiling": max(by_bytes, by_flops) / median["ours"],
                "rivals_s": {name: median[name] for name in first},
                **({"rivals_figures": figures} if figures else {}),
                **({"rivals_failed": failed} if failed else {}),
            }
        )
    return rows


def running(rivals: dict[str, Callable[[], Any]]) -> tuple[dict[str, tuple[Any, float]], dict[str, str]]:
    """What a first call of each returned and the seconds it took, and why the others do not run here."""
    fine, failed, clock = {}, {}, cpu_clock()
    for name, work in rivals.items():
        try:
            start = clock()
            fine[name] = (work(), clock() - start)
        except Wrong as error:
            failed[name] = str(error)
        except Exception as error:  # another package's code: anything may come
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if name in failed:
            print(f"{name} is left out: {failed[name]}")
    return fine, failed


def guests(case: Case, outside: Outside) -> Works:
    """Rivals from outside on a case, by name; each is judged by its first call."""
    if case.given is None:
        return {}
    return {name: Guest(case, function) for name, function in outside.get(case.op, {}).items()}


class Guest:
    """A function from outside on what a case is given. The first call raises :class:`Wrong` where its result is not right."""

    def __init__(self, case: Case, function: Callable[..., Any]) -> None:
        self.case, self.function, self.judged = case, function, False
        self.given = case.given or ()

    def __call__(self) -> Any:
        if self.judged:
            return self.function(*self.given)
        before = [value.clone() if isinstance(value, torch.Tensor) else value for value in self.given]
        result = self.function(*self.given)
        self.judged = True
        kept = [a.equal(b) for a, b in zip(before, self.given, strict=True) if isinstance(a, torch.Tensor)]
        if not all(kept):
            for a, b in zip(before, self.given, strict=True):
                if isinstance(a, torch.Tensor):
                    b.copy_(a)  # for those that follow
            raise Wrong("wrong: it writes to its arguments")
        try:
            self.case.judge(result)
        except Exception as error:  # whatever is returned, down to another type
            raise Wrong(
                f"wrong on {self.case.shape} {self.case.dtype}: {' '.join(str(error).split())[:200]}"
            ) from error
        return result


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(box=None, header_style="bold")
    left = ("op", "shape", "dtype", "rivals (times our time)")
    for name in (*left[:3], "threads", "ms", "± %", "GB/s", "GFLOP/s", "of ceiling", left[3]):
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    for row in rows:
        timed = [f"{name} {t / row['median_s']:.1f}" for name, t in row["rivals_s"].items()]
        failed = row.get("rivals_failed", {}).items()
        rivals = ", ".join(
            timed + [f"{name} {'wrong' if why.startswith('wrong') else 'fails'}" for name, why in failed]
        )
        table.add_row(
            row["op"],
            row["shape"],
            row["dtype"],
            str(row["threads"] or ""),
            f"{row['median_s'] * 1e3:.3f}",
            f"{50 * (row['high_s'] - row['low_s']) / row['median_s']:.0f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['gflop_per_s']:.1f}" if row["gflop_per_s"] else "",
            f"{row['share_of_ceiling']:.0%} {row['bound']}",
            rivals,
        )
    console = Console(width=150, highlight=False)
    console.print(table)
    for row in rows:
        for name, figures in row.get("rivals_figures", {}).items():
            console.print(f"{row['op']} {row['shape']}, {name}: " + " ".join(f"{figure:.4f}" for figure in figures))


def prepare(path: str | Path) -> None:
    """Make the folder of a file and the file, if they are not there; ``OSError`` where it cannot be written."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).open("a").close()


def save(path: str | Path, rows: Sequence[dict[str, Any]], device: str, **more: Any) -> None:
    """Write machine and rows as JSON; ``more`` goes beside them."""
    prepare(path)
    Path(path).write_text(json.dumps({"machine": machine(device), **more, "rows": list(rows)}, indent=1) + "\n")


def machine(device: str = "cpu") -> dict[str, Any]:
    """Where figures come from: processor, threads, versions, commit."""
    try:
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git here
        commit = ""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
