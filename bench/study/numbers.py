"""Means over clustered samples, results as JSON that can be read, tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clado.common import atomic_file


def compact(study: dict[str, Any]) -> str:
    """JSON with six digits and one line per cell and unit."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [rounded(item) for item in value]
        return float(f"{value:.6g}") if isinstance(value, float) else value

    def lines(value: Any) -> str:
        return (
            "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"
            if isinstance(value, list)
            else json.dumps(value)
        )

    return "{\n" + ",\n".join(f"{json.dumps(key)}: {lines(value)}" for key, value in rounded(study).items()) + "\n}"


def keep_scores(path: Path, scores: Mapping[str, Any]) -> None:
    """As one file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **scores)


# ---- scores to results -------------------------------------------------------------------------------------------


def clustered(values: NDArray, digit: NDArray) -> dict[str, float]:
    """Mean and standard error over digits; the draws of one digit are not independent."""
    means = np.array([values[digit == d].mean() for d in np.unique(digit)])
    return {"mean": float(values.mean()), "stderr": float(means.std(ddof=1) / len(means) ** 0.5)}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


MARKS = {"hurts": " ▲", "helps": " ▼", "ties": ""}


def verdict(found: dict[str, Any]) -> str:
    if abs(found["mean"]) <= 2 * found["stderr"] or found["mean"] == 0:
        return "ties"
    return "helps" if found["mean"] < 0 else "hurts"
