"""Latency tables and linear constraints of the user's own, given or read from files."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..common import CladoError, require

Table = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class LinearConstraint:
    """A constraint of the user's own: Σ coefficients[layer][bits] over the chosen bits is at most ``limit``.

    Attributes:
        name: what usage and messages call it.
        coefficients: {layer: {bits: number}}; what is left out counts as zero.
        limit: a number.
    """

    name: str
    coefficients: Table
    limit: float


def read_latency(path: str | os.PathLike[str]) -> dict[str, dict[int, float]]:
    """A latency table: JSON ``{layer: {bits: ms}}``, or CSV with the columns ``layer,bits,ms``.

    Raises:
        CladoError: no such file, or other content.
    """
    source = Path(path)
    require(os.path.isfile(source), "latency", "path", "be a CSV or JSON file", source)
    table: dict[str, dict[int, float]] = {}
    try:
        text = source.read_text(encoding="utf-8")
        if source.suffix.lower() == ".json":
            return {name: {int(b): float(ms) for b, ms in row.items()} for name, row in json.loads(text).items()}
        for row in csv.DictReader(text.splitlines()):
            table.setdefault(row["layer"], {})[int(row["bits"])] = float(row["ms"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        message = f"latency: path must be JSON {{layer: {{bits: ms}}}} or CSV layer,bits,ms, got {source} ({error})"
        raise CladoError(message) from None
    return table


def read_constraints(path: str | os.PathLike[str]) -> list[LinearConstraint]:
    """Linear constraints from JSON ``{name: {"limit": number, "coefficients": {layer: {bits: number}}}}``.

    Raises:
        CladoError: no such file, or other content.
    """
    source = Path(path)
    require(os.path.isfile(source), "solve", "constraints", "be a JSON file", source)
    try:
        return [
            LinearConstraint(
                name,
                {layer: {int(b): float(x) for b, x in row.items()} for layer, row in item["coefficients"].items()},
                float(item["limit"]),
            )
            for name, item in json.loads(source.read_text(encoding="utf-8")).items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CladoError(
            f"solve: constraints must be JSON {{name: {{limit, coefficients: {{layer: {{bits: number}}}}}}}}, "
            f"got {source} ({type(error).__name__}: {error})"
        ) from None
