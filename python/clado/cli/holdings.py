"""What a run directory holds, artifact by artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ..artifacts import MATRIX_FILE, PLAN_FILE, Plan, Sensitivity, percent, read_rounded, rounded_name
from ..common import CladoError
from ..profiling import PROGRESS_FILE, read_progress
from ..runs import RUN_FILE


def holdings(folder: Path) -> list[tuple[str, int, str]]:
    """Name, bytes and meaning of everything in a run directory that clado wrote; a damaged file says so."""
    out = []
    for pattern, (meaning, describe) in _ARTIFACTS.items():
        for path in sorted(folder.glob(pattern)):
            files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
            try:
                text = describe(path)
            except (CladoError, OSError, ValueError, KeyError, TypeError, IndexError):
                text = "damaged"
            out.append(
                (path.name, sum(file.stat().st_size for file in files), f"{meaning}: {text}" if text else meaning)
            )
    return out


def _plan(path: Path) -> str:
    plan = Plan.load(path)
    return f"{plan.status}, {plan.avg_bits:.3f} bits, {plan.size_bytes:,} bytes" if plan.bits else plan.status


def _matrix(sens: Sensitivity) -> str:
    exact = len(sens.provenance.corrected_pairs)
    return f"{len(sens.layers)} layers" + (f", {exact:,} exact pairs" if exact else "")


def _front(path: Path) -> str:
    plans = json.loads(path.read_text())
    proven = sum(plan["status"] == "optimal" for plan in plans)
    return f"{len(plans)} budgets, {proven} proven"


def _measured(path: Path) -> str:
    plans = json.loads(path.read_text())["plans"]
    return f"{len(plans)} on {plans[0]['samples']:,} held-out samples"


def _progress(path: Path) -> str:
    header, sums, _ = read_progress(path)
    done, checks = sums.samples, header.get("checks", [])
    looked = f"; plans within {percent(max(checks[-1]['regrets']))} at {checks[-1]['samples']:,}" if checks else ""
    finished = (path.parent / MATRIX_FILE).exists()
    more = "kept, so that more can be added" if finished else "done; run the same command to go on"
    return f"{done:,} samples {more}{looked}"


_ARTIFACTS: dict[str, tuple[str, Callable[[Path], str]]] = {
    RUN_FILE: ("model", lambda path: str(json.loads(path.read_text())["spec"]["model"])),
    PROGRESS_FILE: ("running sums", _progress),
    MATRIX_FILE: ("matrix", lambda path: _matrix(Sensitivity.load(path))),
    rounded_name("*"): ("rounded weights", lambda path: str(read_rounded(path).by)),
    "pairs": ("running sums of a correction", lambda path: ""),
    PLAN_FILE: ("plan", _plan),
    "pareto.json": ("frontier", _front),
    "measured.json": ("plans that were run", _measured),
    "latency.csv": ("latency table", lambda path: f"{len(path.read_text().splitlines()) - 1} layers"),
    "out": ("export", lambda path: ", ".join(sorted(file.name for file in path.iterdir() if file.name != PLAN_FILE))),
    "figures": ("figures", lambda path: f"{len(list(path.iterdir()))} files"),
    "report.html": ("report", lambda path: "open it in a browser"),
}
