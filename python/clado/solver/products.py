"""A lower objective with a tighter relaxation: what is never negative on a choice is taken off.

x_v x_w ≥ 0 holds for every choice, and s x_w ≥ 0 and s t ≥ 0 for every choice within budgets, s and t what is left of them. So
multiples N ≥ 0 of these products may be taken off the objective: what is left is below it on every choice within the budgets,
and any N gives valid bounds. The N whose convex form (:mod:`.shift`) is tightest belongs to the semidefinite relaxation with
non-negative moments,

    min ⟨C, X⟩   over  X = W R Wᵀ, R ⪰ 0,   X ≥ 0,  X_vv = X_0v,  X_vw = 0 within a layer,  budgets in X_0·,

where X holds the moments of (1, x, s) and W makes x and s of the free candidates. It is found here approximately by
alternating directions between the two descriptions of X (Oliveira, Wolkowicz, Xu 2018: ADMM with facial reduction), begun
with the moments and the shift of the plain relaxation.
"""

from __future__ import annotations

import time

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from .program import Program
from .shift import ConvexForm, one_hot_map

Array = NDArray[np.float64]
_PENALTY = 0.3  # of X − WRWᵀ, relative to |C| / L; a factor of three up or down changes little
_STRIDE = 1.6  # of the multipliers; below the golden ratio it converges
_FLAT = 1e-2  # what is left of a budget is scaled to a mean square of one, or by this where it is less, relative to the limit²


class Products:
    """The search for what to take off, which may go on as long as it pays."""

    def __init__(self, program: Program, form: ConvexForm, spare: bool = True) -> None:
        """
        Args:
            program: validated, scaled.
            form: its plain convex form, with moments.
            spare: take off products with what is left of a budget too; then the answer holds for these limits or lower ones.
        """
        assert form.moments is not None
        self.program, size = program, program.size
        self.use, limits = program.rows / program.row_scale[:, None], program.limits / program.row_scale
        ones = np.vstack([np.eye(1, len(form.moments)), one_hot_map(program)])
        rest = np.hstack([limits[:, None], -self.use])[: len(limits) if spare else 0]
        mean_square = np.einsum("pi,ij,pj->p", rest @ ones, form.moments, rest @ ones)
        self.rest = rest / np.sqrt(np.maximum(_FLAT, mean_square))[:, None]  # times (1, x): what is left of the budgets
        lift = np.vstack([ones, self.rest @ ones])
        self.basis = np.linalg.qr(lift)[0]
        self.least_price = -form.multipliers * program.row_scale
        self.cost = np.zeros((len(lift), len(lift)))
        self.cost[1 : size + 1, 1 : size + 1] = program.matrix / 2
        self.cost[0, 1 : size + 1] = self.cost[1 : size + 1, 0] = -self.least_price @ self.use / 2
        self.inside = np.zeros(self.cost.shape, dtype=bool)
        self.inside[1 : size + 1, 1 : size + 1] = program.layer[:, None] == program.layer[None, :]
        self.first = lift @ form.moments @ lift.T
        self.dual = np.zeros_like(self.cost)
        self.dual[: size + 1, : size + 1] = _dual(program, form, ones, self.cost[: size + 1, : size + 1])
        self.penalty = _PENALTY * float(np.linalg.norm(program.matrix / 2)) / program.num_layers
        self.stride = self.penalty / np.maximum(1e-9, (self.use * self.use).sum(axis=1))
        self.limits, self.price = limits, np.zeros(len(limits))

    def search(self, iterations: int, deadline: float) -> None:
        """So many more alternating directions; fewer where ``time.monotonic()`` comes to ``deadline``."""
        took = 0.0
        for _ in range(iterations):
            began = time.monotonic()
            if began + took > deadline:
                break
            self._iterate()
            took = time.monotonic() - began

    def _iterate(self) -> None:
        each = np.arange(1, self.program.size + 1)
        penalty, price = self.penalty, self.price
        factor = _positive_factor(self.basis.T @ (self.first + self.dual / penalty) @ self.basis)
        factor = self.basis @ factor
        second = factor @ factor.T
        centre = second - (self.cost + self.dual) / penalty
        first = np.maximum(centre, 0)
        first[self.inside] = 0
        mean = (centre[each, each] + 2 * centre[0, each] - price @ self.use / penalty) / 3
        first[each, each] = first[0, each] = first[each, 0] = mean = np.clip(mean, 0, 1)
        first[0, 0] = 1
        self.first = first
        self.dual += _STRIDE * penalty * (first - second)
        self.price = np.maximum(self.least_price, price + self.stride * (self.use @ mean - self.limits))

    def lower(self) -> tuple[Program, Array]:
        """The program with a lower objective, and R ``[V, V]``: what products of candidates were taken off, ½ xᵀRx."""
        program, layer, size = self.program, self.program.layer, self.program.size
        taken = np.maximum(0, self.cost + self.dual)
        taken[0, : size + 1] = taken[: size + 1, 0] = 0
        taken[self.inside] = 0
        removed = 2 * taken[1 : size + 1, 1 : size + 1]
        whole = np.vstack([np.eye(size + 1), self.rest])
        # ½ (1, x)ᵀ form (1, x) was taken off; on one-hot x it is a matrix over x alone
        form = 2 * whole.T @ taken @ whole
        matrix, first = form[1:, 1:], layer == 0
        own = np.diag(matrix) + 2 * form[0, 1:] + first * form[0, 0]
        matrix[self.inside[1 : size + 1, 1 : size + 1]] = 0
        return Program(program.matrix - matrix - np.diag(own), layer, program.rows, program.limits), removed


def _positive_factor(matrix: Array) -> Array:
    """F with FFᵀ the positive semidefinite part of a matrix."""
    values, vectors = scipy.linalg.eigh((matrix + matrix.T) / 2, driver="evd", check_finite=False, overwrite_a=True)
    positive = values > 0
    found: Array = vectors[:, positive] * np.sqrt(values[positive])
    return found


def _dual(program: Program, form: ConvexForm, lift: Array, cost: Array) -> Array:
    """The multipliers of X = WRWᵀ at the plain relaxation's optimum: what the form changed, less the cost."""
    border = cost.copy()
    border[0, 1:] = border[1:, 0] = 0
    plain = lift.T @ border @ lift
    plain[1:, 1:] -= form.quadratic[np.ix_(program.free, program.free)] / 2
    plain[0, 1:] -= form.linear[program.free] / 2
    plain[1:, 0] = plain[0, 1:]
    plain[0, 0] = form.bound + form.multipliers @ program.limits
    out = -cost
    place = np.r_[0, 1 + program.free]
    out[np.ix_(place, place)] += plain
    return out
