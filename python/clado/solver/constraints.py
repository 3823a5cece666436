"""Latency tables and linear constraints of the user's own, given or read from files.

A number belongs to a scheme by its label, or to all schemes of a layer of so many weight bits.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..common import CladoError, require
from ..quant import Scheme

Table = Mapping[str, Mapping[int | str, float]]


@dataclass(frozen=True)
class LinearConstraint:
    """A constraint of the user's own: Σ coefficients[layer][scheme] over the chosen schemes is at most ``limit``.

    Attributes:
        name: what usage and messages call it.
        coefficients: {layer: {bits, or label of a scheme: number}}; a label goes before bits, what is left out counts as zero.
        limit: a number.
    """

    name: str
    coefficients: Table
    limit: float


def number_of(row: Mapping[int | str, float], scheme: Scheme) -> float | None:
    """What a row has for a scheme: by its label, else by its bits; None: nothing."""
    return row.get(scheme.label, row.get(scheme.bits))


def _key(text: str) -> int | str:
    """Bits, or a scheme's label."""
    if text.strip().isdigit():
        return int(text)
    try:
        return Scheme.of(text.strip()).label
    except CladoError as error:
        raise ValueError(error) from None


def read_latency(path: str | os.PathLike[str]) -> dict[str, dict[int | str, float]]:
    """A latency table: JSON ``{layer: {bits or label: ms}}``, or CSV with the columns ``layer,bits,ms`` or ``layer,scheme,ms``.

    Raises:
        CladoError: no such file, or other content.
    """
    source = Path(path)
    require(os.path.isfile(source), "latency", "path", "be a CSV or JSON file", source)
    table: dict[str, dict[int | str, float]] = {}
    try:
        text = source.read_text(encoding="utf-8")
        if source.suffix.lower() == ".json":
            return {name: {_key(b): float(ms) for b, ms in row.items()} for name, row in json.loads(text).items()}
        for row in csv.DictReader(text.splitlines()):
            table.setdefault(row["layer"], {})[_key(row.get("scheme") or row["bits"])] = float(row["ms"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        message = f"latency: path must be JSON {{layer: {{scheme: ms}}}} or CSV layer,scheme,ms, got {source} ({error})"
        raise CladoError(message) from None
    return table


def read_constraints(path: str | os.PathLike[str]) -> list[LinearConstraint]:
    """Linear constraints from JSON ``{name: {"limit": number, "coefficients": {layer: {bits or label: number}}}}``.

    Raises:
        CladoError: no such file, or other content.
    """
    source = Path(path)
    require(os.path.isfile(source), "solve", "constraints", "be a JSON file", source)
    try:
        return [
            LinearConstraint(
                name,
                {layer: {_key(b): float(x) for b, x in row.items()} for layer, row in item["coefficients"].items()},
                float(item["limit"]),
            )
            for name, item in json.loads(source.read_text(encoding="utf-8")).items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CladoError(
            f"solve: constraints must be JSON {{name: {{limit, coefficients: {{layer: {{bits: number}}}}}}}}, "
            f"got {source} ({type(error).__name__}: {error})"
        ) from None
