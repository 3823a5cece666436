"""Two JSON files of ``python -m bench``: which rows are faster, slower, or within the noise."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LEAST = 0.03  # a smaller change is no change, however quiet the machine
Rows = dict[tuple[str, str, str, int], dict[str, Any]]


def read(path: str | Path) -> tuple[str, Rows]:
    """Device of a file and its rows by (op, shape, dtype, threads); ``ValueError`` for a file that holds something else."""
    try:
        found = json.loads(Path(path).read_text())
        return found["machine"]["device"], {(r["op"], r["shape"], r["dtype"], r["threads"]): r for r in found["rows"]}
    except OSError as error:
        why = error.strerror
    except (ValueError, TypeError, KeyError):
        why = "it holds something else"
    raise ValueError(f"file must be one that python -m bench --json wrote, got {path}: {why}")


def rows_of(path: str | Path) -> Rows:
    return read(path)[1]


def verdict(old: dict[str, Any], new: dict[str, Any]) -> str:
    """ "faster" or "slower" where the middle halves of the two samples do not meet and the medians differ by 3 %."""
    if new["high_s"] < old["low_s"] and new["median_s"] < old["median_s"] * (1 - LEAST):
        return "faster"
    if new["low_s"] > old["high_s"] and new["median_s"] > old["median_s"] * (1 + LEAST):
        return "slower"
    return "same"


def _times_ours(row: dict[str, Any], rival: str) -> float:
    return float(row["rivals_s"][rival] / row["median_s"])


def main(arguments: list[str]) -> int:
    """Print the table; 1 when a row is slower."""
    parser = argparse.ArgumentParser("python -m bench compare", description=__doc__)
    parser.add_argument("old")
    parser.add_argument("new")
    options = parser.parse_args(arguments)
    try:
        (old_device, old), (new_device, new) = read(options.old), read(options.new)
    except ValueError as error:
        parser.error(str(error))
    if old_device != new_device:
        print(
            f"warning: measured on {old_device} and on {new_device}: compare shares of the ceiling and rivals, not times"
        )
    table = Table(box=None, header_style="bold")
    for name in (
        "op",
        "shape",
        "dtype",
        "threads",
        "old ms",
        "new ms",
        "old / new",
        "of ceiling",
        "verdict",
        "rivals, times ours",
    ):
        table.add_column(name)
    verdicts = []
    for key in (k for k in new if k in old):
        a, b = old[key], new[key]
        verdicts.append(verdict(a, b))
        times = (f"{a['median_s'] * 1e3:.3f}", f"{b['median_s'] * 1e3:.3f}", f"{a['median_s'] / b['median_s']:.2f}")
        shares = f"{a['share_of_ceiling']:.0%} to {b['share_of_ceiling']:.0%}"
        both = [name for name in a.get("rivals_s", {}) if name in b.get("rivals_s", {})]
        rivals = ", ".join(f"{n} {_times_ours(a, n):.1f} to {_times_ours(b, n):.1f}" for n in both)
        table.add_row(*key[:3], str(key[3]), *times, shares, verdicts[-1], rivals)
    Console(width=150, highlight=False).print(table)
    only = len(old.keys() ^ new.keys())
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("faster", "slower", "same"))
    print(f"{counts}; {only} in one file only")
    return int("slower" in verdicts)
