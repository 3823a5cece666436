"""Timing with a correctness check first, ceilings measured in the same run, and rivals on the same work."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Case:
    """One row of a benchmark.

    Attributes:
        op, shape, dtype: what is run, for the table.
        run: the work; it is called many times.
        check: compares ``run()`` with the plain-torch twin and raises when they differ.
        bytes: read and written by the work at least, each input and output once.
        flops: done by the work at least.
        rivals: other ways to the same result, by name.
    """

    op: str
    shape: str
    dtype: str
    run: Callable[[], Any]
    check: Callable[[], None]
    bytes: int = 0
    flops: int = 0
    rivals: dict[str, Callable[[], Any]] = field(default_factory=dict)


def times(work: Callable[[], Any], device: str, seconds: float = 0.4, least: int = 5) -> list[float]:
    """Seconds of single calls, after a warm-up."""
    work()
    synchronize(device)
    out: list[float] = []
    while len(out) < least or sum(out) < seconds:
        start = time.perf_counter()
        work()
        synchronize(device)
        out.append(time.perf_counter() - start)
    return out


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def ceilings(device: str) -> dict[str, float]:
    """Bytes per second of a large copy (read plus written) and float32 multiply-adds (two flops each) of a large product."""
    source = torch.randn(1 << (28 if device == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    size = 8192 if device == "cuda" else 2048
    left, right = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    copy = statistics.median(times(lambda: target.copy_(source), device))
    product = statistics.median(times(lambda: left @ right, device))
    return {"bytes_per_s": 2 * source.nbytes / copy, "flops_per_s": 2 * size**3 / product}


def measure(cases: Iterable[Case], device: str) -> list[dict[str, Any]]:
    """Check and time every case; rivals are interleaved with the work so that both see the same machine."""
    top = ceilings(device)
    rows = []
    for case in cases:
        case.check()
        ours, rivals = [], {name: [] for name in case.rivals}
        for _ in range(3):
            ours += times(case.run, device, seconds=0.15)
            for name, rival in case.rivals.items():
                rivals[name] += times(rival, device, seconds=0.15, least=2)
        median = statistics.median(ours)
        low, high = statistics.quantiles(ours, n=4)[0], statistics.quantiles(ours, n=4)[2]
        share = max(case.bytes / median / top["bytes_per_s"], case.flops / median / top["flops_per_s"])
        rows.append(
            {
                "op": case.op,
                "shape": case.shape,
                "dtype": case.dtype,
                "median_s": median,
                "spread": (high - low) / median,
                "gb_per_s": case.bytes / median / 1e9,
                "gflop_per_s": case.flops / median / 1e9,
                "share_of_ceiling": share,
                "rivals_s": {name: statistics.median(t) for name, t in rivals.items()},
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, header_style="bold")
    for name in ("op", "shape", "dtype", "ms", "± %", "GB/s", "GFLOP/s", "of ceiling", "times faster than"):
        table.add_column(name, justify="left" if name in ("op", "shape", "dtype", "times faster than") else "right")
    for row in rows:
        rivals = ", ".join(f"{name} {t / row['median_s']:.1f}" for name, t in row["rivals_s"].items())
        table.add_row(
            row["op"],
            row["shape"],
            row["dtype"],
            f"{row['median_s'] * 1e3:.3f}",
            f"{50 * row['spread']:.0f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['gflop_per_s']:.1f}" if row["gflop_per_s"] else "",
            f"{row['share_of_ceiling']:.0%}",
            rivals,
        )
    Console(width=150, highlight=False).print(table)


def save(path: str, rows: list[dict[str, Any]], device: str) -> None:
    with open(path, "w") as file:
        json.dump({"machine": machine(device), "ceilings": ceilings(device), "rows": rows}, file, indent=1)


def machine(device: str = "cpu") -> dict[str, Any]:
    """Where figures come from: processor, threads, versions, commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
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
