"""The integer quadratic program: one candidate per layer, linear budgets, a symmetric matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ..errors import CladoError, require
from ..sensitivity import Sensitivity

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Choice = NDArray[np.intp]  # candidate index per layer

BUDGETS = ("avg_bits", "size_mb", "size_bytes", "bitops")
ACTIVATION_BITS = 32  # activations stay float


@dataclass(frozen=True)
class Problem:
    """min ½xᵀGx over one candidate per layer with ``costs @ x <= limits``.

    Attributes:
        matrix: G ``[V, V]`` float64, zero between candidates of one layer.
        members: for each layer its allowed candidates, indices into V.
        costs: ``[R, V]``, whole numbers in float64.
        limits: ``[R]``, whole numbers.
        names: R budget names.
    """

    matrix: Matrix
    members: tuple[NDArray[np.intp], ...]
    costs: Matrix
    limits: Vector
    names: tuple[str, ...]

    def value(self, choice: Choice) -> float:
        """½xᵀGx."""
        return float(0.5 * self.matrix[np.ix_(choice, choice)].sum())

    def diagonal_part(self, choice: Choice) -> float:
        """Σ|ΔL|: the scale the value is judged on, as Ω may cancel it."""
        return float(0.5 * np.abs(np.diag(self.matrix)[choice]).sum())

    def feasible(self, choice: Choice) -> bool:
        return bool((self.costs[:, choice].sum(1) <= self.limits).all())


def build(
    sens: Sensitivity,
    matrix: Matrix,
    budgets: Mapping[str, float],
    pin: Mapping[str, int],
    forbid: Mapping[str, Sequence[int]],
) -> Problem:
    """Problem of a sensitivity matrix under budgets.

    Raises:
        CladoError: no budget, a budget that is not a positive number, one below its minimum (which is named), an unknown layer or
            width, or a layer left without a candidate.
    """
    require(len(budgets) > 0, "solve", "budget", f"be given, one or more of {', '.join(BUDGETS)}", "none")
    members = _members(sens, pin, forbid)
    costs = np.array([[float(c) for c in cost_row(sens, name)] for name in budgets])
    limits = []
    for row, (name, value) in zip(costs, budgets.items(), strict=True):
        require(
            isinstance(value, (int, float)) and math.isfinite(value) and value > 0,
            "solve",
            name,
            "be a positive number",
            value,
        )
        unit = budget_unit(sens, name)
        wanted = Fraction(repr(float(value)))  # 2.9 means the decimal 2.9
        limit = math.floor(wanted * unit)
        least = int(sum(row[m].min() for m in members))
        if limit < least:
            minimum = Fraction(least) / unit
            shown = math.ceil(minimum * 10**4) / 10**4 if minimum.denominator > 1 else int(minimum)
            missing = float(minimum - wanted)
            raise CladoError(f"solve: {name} must be at least {shown}, got {value:g} ({missing:.4g} too low)")
        limits.append(float(limit))
    return Problem(matrix, members, costs, np.array(limits), tuple(budgets))


def cost_row(sens: Sensitivity, name: str) -> list[int]:
    """What every candidate costs of a budget, in whole units."""
    rows = []
    for layer in sens.layers:
        for bits in sens.bits:
            if name == "avg_bits":
                rows.append(bits * layer.numel)
            elif name == "bitops":
                rows.append(bits * layer.macs * ACTIVATION_BITS)
            else:
                rows.append(sens.quantizer.storage_bytes(layer.shape, bits))
    return rows


def budget_unit(sens: Sensitivity, name: str) -> int:
    """Whole units per unit of the budget: weights for avg_bits, bytes per MiB for size_mb."""
    return {"avg_bits": sum(layer.numel for layer in sens.layers), "size_mb": 2**20}.get(name, 1)


def _members(
    sens: Sensitivity, pin: Mapping[str, int], forbid: Mapping[str, Sequence[int]]
) -> tuple[NDArray[np.intp], ...]:
    allowed = {layer.name: set(sens.bits) for layer in sens.layers}
    for name, bits in pin.items():
        sens.index(name, bits)
        allowed[name] = {bits}
    for name, widths in forbid.items():
        for bits in widths:
            sens.index(name, bits)
            allowed[name].discard(bits)
        require(bool(allowed[name]), "solve", "forbid", "leave every layer a width", f"none for {name}")
    return tuple(np.array([sens.index(layer.name, b) for b in sorted(allowed[layer.name])]) for layer in sens.layers)
