"""Budgets as integer rows over the candidates, so that rounding never decides what is feasible."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifacts import Sensitivity
from ..common import CladoError, require
from .constraints import LinearConstraint, number_of, read_latency
from .options import SolveOptions

MIB = 2**20


@dataclass(frozen=True, eq=False)
class Budget:
    """use·x ≤ limit in whole units, ``units`` of which make one of what the user counts in.

    Attributes:
        name: the argument it came from.
        use: ``[V]`` int64, use of each candidate.
        limit: int, largest allowed use.
        units: bytes per MiB, weights per average bit, and the like.
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


def make_budgets(sens: Sensitivity, asked: SolveOptions) -> list[Budget]:
    """Rows of the budgets that are given, and of what is minimized; see :func:`clado.solve` for their units."""
    candidates = sens.candidates
    stored = candidates.stored_bytes(sens.quantizer)
    macs = any(layer.macs for layer in sens.layers)
    require(
        (asked.bitops is None and asked.minimized != "bitops") or macs,
        "solve",
        "bitops",
        "come with layers whose macs are known",
        "no macs",
    )
    rows: list[tuple[str, Any, NDArray[np.int64], Fraction]] = [
        ("avg_bits", asked.avg_bits, candidates.code_bits, Fraction(max(1, candidates.numel))),
        ("size_mb", asked.size_mb, stored, Fraction(MIB)),
        ("size_bytes", asked.size_bytes, stored, Fraction(1)),
        ("bitops", asked.bitops, candidates.bitops(asked.act_bits), Fraction(1)),
    ]
    least = asked.minimized
    budgets = [
        _unlimited(sens, whole_budget(name, 0, use, units)) if limit is None else whole_budget(name, limit, use, units)
        for name, limit, use, units in rows
        if limit is not None or name == least
    ]
    if asked.latency_ms is not None or least == "latency_ms":
        latency = asked.latency
        assert latency is not None
        table = latency if isinstance(latency, Mapping) else read_latency(latency)
        pairs = [(layer.name, scheme) for layer, scheme in candidates.pairs]
        missing = [f"{s.label} of {name}" for name, s in pairs if number_of(table.get(name, {}), s) is None]
        must = "give every layer a time at every width or scheme"
        require(not missing, "solve", "latency", must, f"none for {', '.join(missing[:3])}")
        known = {layer.name: table[layer.name] for layer in sens.layers}
        timed = _real_budget(sens, LinearConstraint("latency_ms", known, asked.latency_ms or 0.0))
        budgets.append(_unlimited(sens, timed) if asked.latency_ms is None else timed)
    budgets += [_real_budget(sens, constraint) for constraint in asked.constraints]
    need = "be given: avg_bits, size_mb, size_bytes, bitops, latency_ms, constraints or max_loss_increase"
    require(bool(budgets), "solve", "budget", need, "none")
    names = [budget.name for budget in budgets]
    require(len(set(names)) == len(names), "solve", "constraints", "have names of their own", names)
    return budgets


def _unlimited(sens: Sensitivity, budget: Budget) -> Budget:
    """The budget with a limit that every plan meets."""
    most = int(np.maximum.reduceat(budget.use, sens.candidates.starts[:-1]).sum())
    return replace(budget, limit=most, given=budget.shown(most))


def whole_budget(name: str, limit: Any, use: NDArray[np.int64], units: Fraction) -> Budget:
    """A budget whose use is whole already."""
    whole = Fraction(limit if isinstance(limit, (int, Fraction)) else float(limit)) * units
    nearest = round(whole)
    # A limit that was computed in floating point from a use must allow that use.
    close = abs(whole - nearest) <= whole * Fraction(1, 2**51)
    return Budget(name, use, min(int(nearest if close else math.floor(whole)), 2**62), units, limit)


def _real_budget(sens: Sensitivity, constraint: LinearConstraint) -> Budget:
    """Real coefficients in units of a power of two so small that rounding stays below 1e-14 of the largest sum."""
    name, limit = constraint.name, constraint.limit
    number = isinstance(limit, numbers.Real) and not isinstance(limit, bool) and math.isfinite(limit)
    require(number, "solve", name, "have a finite limit", repr(limit))
    real = np.zeros(sens.num_candidates)
    for layer, row in constraint.coefficients.items():
        k = sens.candidates.position(layer)
        for v, scheme in enumerate(sens.candidates.schemes[k], int(sens.candidates.starts[k])):
            real[v] = number_of(row, scheme) or 0.0
    require(bool(np.isfinite(real).all()), "solve", name, "have finite coefficients", "NaN or infinity")
    largest = np.maximum.reduceat(np.abs(real), sens.candidates.starts[:-1]).sum()
    exponent = 50 - math.frexp(max(largest, 1e-300))[1]
    use = np.array([round(Fraction(value) * Fraction(2) ** exponent) for value in real], dtype=np.int64)
    # Half a unit of rounding per layer; a limit beyond every sum is cut to stay within int64.
    whole = math.floor(Fraction(float(limit)) * Fraction(2) ** exponent) + (len(sens.layers) + 2) // 2
    return Budget(name, use, max(-(2**60), min(whole, 2**60)), Fraction(2) ** exponent, limit)


def allowed_candidates(sens: Sensitivity, asked: SolveOptions) -> NDArray[np.bool_]:
    """``[V]`` mask of the candidates that pins, bans and limits per layer leave over."""
    names = [layer.name for layer in sens.layers]
    width = sens.candidates.weight_bits
    allowed = np.ones(sens.num_candidates, dtype=bool)
    for name, chosen in (asked.pin or {}).items():
        block = _block(sens, name)
        allowed[block] &= np.arange(block.start, block.stop) == sens.index(name, chosen)
    for name, widths in (asked.forbid or {}).items():
        banned: list[Any] = list(widths) if isinstance(widths, Iterable) and not isinstance(widths, str) else [widths]
        for scheme in banned:
            allowed[sens.index(name, scheme)] = False
    for sign, limit in ((1, asked.min_bits), (-1, asked.max_bits)):
        per_layer = limit if isinstance(limit, Mapping) else {} if limit is None else dict.fromkeys(names, limit)
        for name, bits in per_layer.items():
            allowed[_block(sens, name)] &= sign * width[_block(sens, name)] >= sign * bits
    for name in names:
        left = bool(allowed[_block(sens, name)].any())
        require(left, "solve", "pin, forbid, min_bits and max_bits", f"leave layer {name!r} a width", "none")
    return allowed


def _block(sens: Sensitivity, name: str) -> slice:
    return sens.candidates.block(sens.candidates.position(name))


def layer_groups(sens: Sensitivity, shared_layers: Sequence[Sequence[str]]) -> NDArray[np.int64]:
    """``[L]``: group of each layer, numbered by first member; layers of one of ``shared_layers`` are one group."""
    names = [layer.name for layer in sens.layers]
    leader = list(range(len(names)))
    for group in shared_layers:
        members = sorted(sens.candidates.position(name) for name in group)
        heads = {leader[i] for i in members}
        leader = [min(heads) if head in heads else head for head in leader]
    return np.unique(leader, return_inverse=True)[1].astype(np.int64)


def check_minimum(budget: Budget, layer: NDArray[np.int64], keep: NDArray[np.int64]) -> None:
    """Raise when the cheapest of the candidates ``keep`` break ``budget`` by themselves (``layer``: ``[V]``)."""
    cheapest = np.full(layer[-1] + 1, np.iinfo(np.int64).max)
    np.minimum.at(cheapest, layer[keep], budget.use[keep])
    least = int(cheapest.sum())
    if least > budget.limit:
        raise CladoError(
            f"solve: {budget.name} must be at least {budget.shown(least):.10g}, "
            f"got {float(budget.given):.10g} ({budget.shown(least) - budget.given:.4g} too low)"
        )
