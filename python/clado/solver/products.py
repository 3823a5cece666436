"""A lower objective with a tighter relaxation: products of candidates are never negative.

x_v x_w ≥ 0 holds for every choice, so a multiple N_vw ≥ 0 of each product may be taken off the objective: what is left is
below it on every choice, and any N gives valid bounds. The N whose convex form (:mod:`.shift`) is tightest belongs to the
semidefinite relaxation with non-negative moments,

    min ⟨C, X⟩   over  X = W R Wᵀ, R ⪰ 0,   X ≥ 0,  X_vv = X_0v,  X_vw = 0 within a layer,  budgets in X_0·,

and is found here approximately by alternating directions between the two descriptions of X (Oliveira, Wolkowicz, Xu
2018: ADMM with facial reduction), begun with the moments and the shift of the plain relaxation.
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


def without_products(program: Program, form: ConvexForm, iterations: int, deadline: float) -> Program:
    """``program`` with a lower objective whose convex form has a better bound; the same one when there is no time.

    Args:
        program: validated, scaled.
        form: a convex form of ``program``, or of this function's earlier answer for it.
        iterations: of the alternating directions; about a hundred is most of what there is to gain.
        deadline: ``time.monotonic()`` value at which to stop.
    """
    assert form.moments is not None
    size = program.size
    lift = np.vstack([np.eye(1, len(form.moments)), one_hot_map(program)])
    basis = np.linalg.qr(lift)[0]
    use = program.rows / program.row_scale[:, None]
    limits = program.limits / program.row_scale
    least_price = -form.multipliers * program.row_scale
    cost = np.zeros((size + 1, size + 1))
    cost[1:, 1:] = program.matrix / 2
    cost[0, 1:] = cost[1:, 0] = -least_price @ use / 2
    inside = np.zeros((size + 1, size + 1), dtype=bool)
    inside[1:, 1:] = program.layer[:, None] == program.layer[None, :]
    each = np.arange(1, size + 1)
    first = lift @ form.moments @ lift.T
    dual = _dual(program, form, lift, cost)
    penalty = _PENALTY * float(np.linalg.norm(cost[1:, 1:])) / program.num_layers
    stride = penalty / np.maximum(1e-9, (use * use).sum(axis=1))
    price = np.zeros(len(limits))
    took = 0.0
    for _ in range(iterations):
        began = time.monotonic()
        if began + took > deadline:
            break
        factor = _positive_factor(basis.T @ (first + dual / penalty) @ basis)
        factor = basis @ factor
        second = factor @ factor.T
        centre = second - (cost + dual) / penalty
        first = np.maximum(centre, 0)
        first[inside] = 0
        mean = (centre[each, each] + 2 * centre[0, 1:] - price @ use / penalty) / 3
        first[each, each] = first[0, 1:] = first[1:, 0] = mean = np.clip(mean, 0, 1)
        first[0, 0] = 1
        dual += _STRIDE * penalty * (first - second)
        price = np.maximum(least_price, price + stride * (use @ mean - limits))
        took = time.monotonic() - began
    products = np.maximum(0, cost + dual)[1:, 1:]
    products[inside[1:, 1:]] = 0
    return Program(program.matrix - (products + products.T), program.layer, program.rows, program.limits)


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
