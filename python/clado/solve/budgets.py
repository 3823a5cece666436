"""Budgets as integer rows over the candidates, so that rounding never decides what is feasible."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CladoError, require
from ..sensitivity import Sensitivity

MIB = 2**20


@dataclass(frozen=True, eq=False)
class Budget:
    """use·x ≤ limit in whole units of ``1/units`` of what the user counts in.

    Attributes:
        name: the argument it came from.
        use: ``[V]`` int64, use of each candidate.
        limit: int, largest allowed use.
        units: how many of these whole units make one of the user's (bytes per MiB, weights per average bit).
        given: the limit as the user gave it.
    """

    name: str
    use: NDArray[np.int64]
    limit: int
    units: Fraction
    given: float

    def shown(self, whole: int) -> float:
        """``whole`` units in the user's own; whole numbers stay whole."""
        value = Fraction(int(whole)) / self.units
        return int(value) if value.denominator == 1 and self.units == 1 else float(value)


def make_budgets(
    sens: Sensitivity,
    avg_bits: float | None,
    size_mb: float | None,
    size_bytes: float | None,
    bitops: float | None,
    act_bits: int,
) -> list[Budget]:
    """Rows of the budgets that are given; see :func:`clado.solve` for their units."""
    layers, bits = sens.layers, np.array(sens.bits, dtype=np.int64)
    numel = np.array([layer.numel for layer in layers], dtype=np.int64)
    macs = np.array([layer.macs for layer in layers], dtype=np.int64)
    weight_bits = np.outer(numel, bits).ravel()
    stored = np.array([sens.quantizer.storage_bytes(layer.shape, b) for layer in layers for b in sens.bits], np.int64)
    require(1 <= act_bits <= 32, "solve", "act_bits", "lie in 1..32", act_bits)
    require(bitops is None or bool(macs.any()), "solve", "bitops", "come with layers whose macs are known", "no macs")
    operations = np.outer(macs * int(act_bits), bits).ravel()
    given: list[tuple[str, Any, NDArray[np.int64], Fraction]] = [
        ("avg_bits", avg_bits, weight_bits, Fraction(max(1, int(numel.sum())))),
        ("size_mb", size_mb, stored, Fraction(MIB)),
        ("size_bytes", size_bytes, stored, Fraction(1)),
        ("bitops", bitops, operations, Fraction(1)),
    ]
    budgets = [_budget(name, limit, use, units) for name, limit, use, units in given if limit is not None]
    require(bool(budgets), "solve", "budget", "be given: avg_bits, size_mb, size_bytes or bitops", "none")
    return budgets


def _budget(name: str, limit: Any, use: NDArray[np.int64], units: Fraction) -> Budget:
    number = isinstance(limit, numbers.Real) and not isinstance(limit, bool)
    require(number and math.isfinite(limit) and limit > 0, "solve", name, "be a positive finite number", repr(limit))
    whole = Fraction(limit) * units if isinstance(limit, (int, Fraction)) else Fraction(float(limit)) * units
    nearest = round(whole)
    # A limit that was computed in floating point from a use must allow that use.
    close = abs(whole - nearest) <= whole * Fraction(1, 2**51)
    return Budget(name, use, min(int(nearest if close else math.floor(whole)), 2**62), units, float(limit))


def allowed_candidates(
    sens: Sensitivity, pin: Mapping[str, int] | None, forbid: Mapping[str, int | Sequence[int]] | None
) -> NDArray[np.bool_]:
    """``[V]`` mask of the candidates that pins and bans leave over."""
    allowed = np.ones(sens.num_candidates, dtype=bool)
    names = [layer.name for layer in sens.layers]
    for name, width in dict(pin or {}).items():
        chosen = sens.index(name, width)
        first = names.index(name) * len(sens.bits)
        allowed[first : first + len(sens.bits)] &= np.arange(first, first + len(sens.bits)) == chosen
    for name, widths in dict(forbid or {}).items():
        for width in [widths] if isinstance(widths, int) else widths:
            allowed[sens.index(name, width)] = False
    for i, name in enumerate(names):
        left = bool(allowed[i * len(sens.bits) : (i + 1) * len(sens.bits)].any())
        require(left, "solve", "pin and forbid", f"leave layer {name!r} a width", "none")
    return allowed


def check_minimum(budget: Budget, layer: NDArray[np.int64], keep: NDArray[np.int64]) -> None:
    """Raise when the cheapest of the candidates ``keep`` break ``budget`` by themselves (``layer``: ``[V]``)."""
    cheapest = np.full(layer[-1] + 1, np.iinfo(np.int64).max)
    np.minimum.at(cheapest, layer[keep], budget.use[keep])
    least = int(cheapest.sum())
    if least > budget.limit:
        raise CladoError(
            f"solve: {budget.name} must be at least {budget.shown(least):.10g} (every layer at its cheapest width), "
            f"got {budget.given:.10g}, which is {budget.shown(least) - budget.given:.4g} too low"
        )
