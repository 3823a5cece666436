"""The convex form of the program: a block-diagonal shift found by a semidefinite program.

On one-hot x the products inside a layer are known (x_m x_n = 0, x_m² = x_m), so multiples of them change nothing. The
shift that makes the objective convex and its relaxation tightest is the dual solution of

    min ⟨C, Y⟩   over  Y = [[1, yᵀ], [y, ·]] ⪰ 0,  Y_jj = y_j,  Y_jk = 0 within a layer,  budgets in y,

where y holds every candidate but the last one of each layer (quadratic convex reformulation: Billionnet, Elloumi,
Plateau 2009). It is solved by a primal-dual interior point method that is dual feasible at every step (Helmberg,
Rendl, Vanderbei, Wolkowicz 1996), so it may stop at any time with a valid bound.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg
from numpy.typing import NDArray

from .program import Program

Array = NDArray[np.float64]
_STRIP = 32  # rows of the Schur complement's gather at a time
_LOOSE, _DENSE = 1e9, 1e10  # operations a second that a core does entry by entry, and in matrix products


@dataclass(frozen=True)
class ConvexForm:
    """½ xᵀQx + cᵀx + constant: convex, and at most ½ xᵀGx on every one-hot x within the budgets (equal on any, unless
    products were taken off).

    Attributes:
        quadratic: Q, ``[V, V]``, positive semidefinite up to ``slack``.
        linear: c, ``[V]``.
        constant: a number.
        slack: what rounding may have cost: every bound from this form is lowered by it.
        bound: lower bound of the semidefinite relaxation, slack subtracted.
        multipliers: ``[rows]``, non-negative, one per budget, in units of objective per unit of the budget row.
        moments: ``[1 + W, 1 + W]``, W the free candidates: (1, y)(1, y)ᵀ on average at the relaxation's solution, nearly;
            None where no semidefinite program was solved.
        removed: ``[V, V]`` non-negative R: the form is at most ½ xᵀ(G − R)x on one-hot x within the budgets; None for zero.
    """

    quadratic: Array
    linear: Array
    constant: float
    slack: float
    bound: float
    multipliers: Array
    moments: Array | None = None
    removed: Array | None = None

    def point(self, program: Program) -> Array:
        """``[V]``: a minimizer of the form within the budgets, nearly; zero where it is unknown."""
        if self.moments is None:
            return np.zeros(program.size)
        found: Array = np.maximum(0.0, one_hot_map(program) @ self.moments[0])
        return found

    def scaled(self, factor: float) -> ConvexForm:
        """The form of the same program with its objective multiplied by ``factor``."""
        return ConvexForm(
            self.quadratic * factor,
            self.linear * factor,
            self.constant * factor,
            self.slack * factor,
            self.bound * factor,
            self.multipliers * factor,
            self.moments,
            None if self.removed is None else self.removed * factor,
        )

    def restricted(self, keep: NDArray[np.int64], multipliers: Array) -> ConvexForm:
        """The form over the candidates ``keep`` for other budgets, whose bound is then unknown; not of one that is for its
        own budgets alone (``Products(spare=True)``)."""
        quadratic = self.quadratic[np.ix_(keep, keep)]
        removed = None if self.removed is None else self.removed[np.ix_(keep, keep)]
        linear = self.linear[keep]
        return ConvexForm(quadratic, linear, self.constant, self.slack, -np.inf, multipliers, None, removed)


@dataclass(frozen=True)
class _Step:
    primal: Array
    slack: Array
    dual: Array
    change: scipy.sparse.csr_matrix  # of the barrier
    barrier: Array  # the same, dense


class _Semidefinite:
    """min ⟨C, Y⟩ with A(Y) = b for the first rows, A(Y) ≤ b for the last ``slacks`` rows, Y ⪰ 0.

    Row k of A is Σ_e R[k, e] Y[p_e, q_e] with R sparse.
    """

    def __init__(
        self,
        cost: Array,
        p: NDArray[np.int64],
        q: NDArray[np.int64],
        rows: scipy.sparse.csr_matrix,
        right: Array,
        slacks: int,
    ):
        self.cost, self.p, self.q, self.rows, self.right, self.slacks = cost, p, q, rows, right, slacks
        self.equal = len(right) - slacks

    def apply(self, matrix: Array) -> Array:
        found: Array = self.rows @ ((matrix[self.p, self.q] + matrix[self.q, self.p]) / 2)
        return found

    def adjoint(self, dual: Array) -> scipy.sparse.csr_matrix:
        """Aᵀ(dual), symmetric."""
        weight = self.rows.T @ dual / 2
        both = (np.r_[weight, weight], (np.r_[self.p, self.q], np.r_[self.q, self.p]))
        return scipy.sparse.csr_matrix(both, shape=self.cost.shape)

    def barrier(self, dual: Array) -> Array:
        """C − Aᵀ(dual), dense."""
        found: Array = self.cost - self.adjoint(dual).toarray()
        return found

    def schur(self, primal: Array, inverse: Array, deadline: float) -> Array | None:
        """M[k, l] = ⟨A_k, primal · A_l · inverse⟩, built in strips so that large programs stay in the cache."""
        p, q = self.p, self.q
        columns = self.rows.T.tocsc()
        strips = []
        for low in range(0, len(p), _STRIP):
            if time.monotonic() > deadline:
                return None
            a, b = p[low : low + _STRIP], q[low : low + _STRIP]
            xa, xb, za, zb = primal[a], primal[b], inverse[a], inverse[b]
            part = _take(xb, p) * _take(za, q)
            part += _take(xb, q) * _take(za, p)
            part += _take(xa, p) * _take(zb, q)
            part += _take(xa, q) * _take(zb, p)
            strips.append(part @ columns / 4)
        out = self.rows @ np.concatenate(strips)
        found: Array | None = (out + out.T) / 2
        return found

    def solve(
        self, primal: Array, dual: Array, tolerance: float, deadline: float, target: float
    ) -> tuple[Array, Array]:
        """Best dual vector with C − Aᵀ(dual) ≻ 0 and dual ≤ 0 on inequality rows, and Y.

        The ``dual`` given must be such a vector.
        """
        right, equal = self.right, self.equal
        slack = np.maximum(right[equal:] - self.apply(primal)[equal:], 0.1)
        barrier = self.barrier(dual)
        best, size, took = dual, len(self.cost) + self.slacks, 0.0
        for _ in range(60):
            began = time.monotonic()
            if began + took > deadline:
                break
            inverse = _inverse(barrier)
            if inverse is None:
                break
            reduced = -dual[equal:]
            complementarity = float(np.vdot(primal, barrier) + slack @ reduced) / size
            value = float(right @ dual)
            if complementarity * size <= tolerance * max(1.0, abs(value)) or value >= target:
                break
            schur = self.schur(primal, inverse, deadline)
            if schur is None:
                break
            schur[np.arange(equal, len(right)), np.arange(equal, len(right))] += slack / reduced
            try:
                solver = scipy.linalg.cho_factor(schur, check_finite=False)
            except np.linalg.LinAlgError:
                break
            state = (primal, slack, dual, barrier, inverse)
            affine = self._step(state, solver, 0.0, None)
            a, b = self._lengths(state, affine)
            gap = np.vdot(primal + a * affine.primal, barrier + b * affine.barrier)
            gap += (slack + a * affine.slack) @ (reduced - b * affine.dual[equal:])
            ratio = float(gap) / size / complementarity
            centre = complementarity * min(0.8, max(1e-8, ratio * ratio))
            step = self._step(state, solver, centre, affine)
            a, b = self._lengths(state, step)
            if max(a, b) < 1e-4:
                break
            primal = primal + 0.95 * a * step.primal
            slack = slack + 0.95 * a * step.slack
            dual = dual + 0.95 * b * step.dual
            barrier = self.barrier(dual)
            if right @ dual >= right @ best:
                best = dual
            took = time.monotonic() - began
        return best, primal

    def _step(self, state: tuple[Array, ...], solver: tuple[Any, ...], centre: float, affine: _Step | None) -> _Step:
        """Newton step towards complementarity ``centre``; with the second-order term of ``affine`` if given."""
        primal, slack, dual, _, inverse = state
        reduced = -dual[self.equal :]
        aim = self.right - centre * self.apply(inverse)
        aim[self.equal :] -= centre / reduced
        if affine is not None:
            second = _product(affine.primal, affine.change, inverse)
            second_slack = -affine.slack * affine.dual[self.equal :] / reduced
            aim += self.apply(second)
            aim[self.equal :] += second_slack
        change = scipy.linalg.cho_solve(solver, aim, check_finite=False)
        adjoint = -self.adjoint(change)
        d_primal = centre * inverse - primal - _symmetric(_product(primal, adjoint, inverse))
        d_slack = centre / reduced - slack + slack / reduced * change[self.equal :]
        if affine is not None:
            d_primal -= _symmetric(second)
            d_slack -= second_slack
        return _Step(d_primal, d_slack, change, adjoint, adjoint.toarray())

    def _lengths(self, state: tuple[Array, ...], step: _Step) -> tuple[float, float]:
        primal, slack, dual, barrier, _ = state
        return (
            _longest(primal, step.primal, slack, step.slack),
            _longest(barrier, step.barrier, -dual[self.equal :], -step.dual[self.equal :]),
        )


def _inverse(matrix: Array) -> Array | None:
    """Inverse of a positive definite matrix; None where rounding makes it look indefinite."""
    factor, info = scipy.linalg.lapack.dpotrf(matrix, lower=1)
    if info != 0:
        return None
    inverse, info = scipy.linalg.lapack.dpotri(factor, lower=1)
    return None if info != 0 else np.tril(inverse) + np.tril(inverse, -1).T


def _take(matrix: Array, columns: NDArray[np.int64]) -> Array:
    return np.take(matrix, columns, axis=1, mode="clip")


def _product(left: Array, middle: scipy.sparse.csr_matrix, right: Array) -> Array:
    """left · middle · right for symmetric ``left`` and ``middle``."""
    found: Array = (middle @ left).T @ right
    return found


def _symmetric(matrix: Array) -> Array:
    found: Array = (matrix + matrix.T) / 2
    return found


def _definite(matrix: Array) -> bool:
    found: bool = scipy.linalg.lapack.dpotrf(matrix, lower=1, clean=0)[1] == 0
    return found


def _longest(matrix: Array, direction: Array, vector: Array, change: Array) -> float:
    """A step in (0, 1] that keeps matrix + step·direction positive definite and vector + step·change positive."""
    shrinking = change < 0
    step = min(1.0, float((vector[shrinking] / -change[shrinking]).min(initial=np.inf)))
    for _ in range(40):
        if _definite(matrix + step * direction):
            return step
        step *= 0.8
    return 0.0


def convex_form(
    program: Program, tolerance: float = 1e-7, deadline: float = np.inf, target: float = np.inf
) -> ConvexForm:
    """Shift ``program`` so that its relaxation is as tight as a block-diagonal shift can make it.

    Args:
        program: validated, scaled, with at least one point that meets the budgets.
        tolerance: relative duality gap at which the semidefinite program counts as solved.
        deadline: ``time.monotonic()`` value at which to stop with the best shift so far.
        target: stop once the bound exceeds this value.
    """
    basis, base = _reduced_basis(program)
    half = program.matrix / 2
    cost = np.empty((basis.shape[1] + 1,) * 2)
    cost[0, 0] = half[np.ix_(base, base)].sum()
    cost[1:, 0] = cost[0, 1:] = basis.T @ half[:, base].sum(axis=1)
    cost[1:, 1:] = basis.T @ (basis.T @ half).T
    problem, shift_rows = _build(program, basis, base, cost)
    start = _feasible_dual(problem, shift_rows)
    dual, moments = problem.solve(_interior(program), start, tolerance, deadline, target)
    return _form(program, problem, dual, shift_rows, moments)


def _reduced_basis(program: Program) -> tuple[scipy.sparse.csc_matrix, NDArray[np.int64]]:
    """Sparse B and the last candidate of each layer, with x = one_hot(base) + B y."""
    base = program.last
    free = program.free
    columns = np.arange(len(free))
    entries = (
        np.r_[np.ones(len(free)), -np.ones(len(free))],
        (np.r_[free, base[program.layer[free]]], np.r_[columns, columns]),
    )
    return scipy.sparse.csc_matrix(entries, shape=(program.size, len(free))), base


def one_hot_map(program: Program) -> Array:
    """``[V, 1 + W]``: x of (1, y), y the free candidates."""
    basis, base = _reduced_basis(program)
    constant = np.zeros((program.size, 1))
    constant[base] = 1
    return np.hstack([constant, basis.toarray()])


def _build(
    program: Program, basis: scipy.sparse.csc_matrix, base: NDArray[np.int64], cost: Array
) -> tuple[_Semidefinite, int]:
    """The semidefinite program; its first rows (count returned) are the in-layer ones, then Y_00 = 1, then budgets."""
    count = basis.shape[1]
    layer = program.layer[program.free]
    j, k = np.nonzero((layer[:, None] == layer[None, :]) & np.tri(count, dtype=bool).T)
    inside = len(j)
    # Elements: (0, 0), then (0, y), then pairs of one layer.
    p = np.r_[0, np.zeros(count, np.int64), j + 1]
    q = np.r_[0, np.arange(1, count + 1), k + 1]
    same = np.flatnonzero(j == k)
    row = np.r_[np.arange(inside), same, inside]
    column = np.r_[1 + count + np.arange(inside), 1 + j[same], 0]
    value = np.r_[np.ones(inside), -np.ones(len(same)), 1.0]
    shifts = scipy.sparse.csr_matrix((value, (row, column)), shape=(inside + 1, len(p)))
    scaled = program.rows / program.row_scale[:, None]
    budget = np.zeros((len(scaled), len(p)))
    budget[:, 0] = scaled[:, base].sum(axis=1)
    budget[:, 1 : count + 1] = scaled @ basis
    right = np.r_[np.zeros(inside), 1.0, program.limits / program.row_scale]
    rows = scipy.sparse.vstack([shifts, scipy.sparse.csr_matrix(budget)]).tocsr()
    return _Semidefinite(cost, p, q, rows, right, len(scaled)), inside


def _interior(program: Program) -> Array:
    """The moment matrix of independent uniform layers: positive definite, right in every equality."""
    layer = program.layer[program.free]
    mean = 1.0 / np.bincount(program.layer)[layer]
    moments = np.outer(np.r_[1.0, mean], np.r_[1.0, mean])
    inside = layer[:, None] == layer[None, :]
    moments[1:, 1:][inside] = 0
    moments[np.arange(1, len(mean) + 1), np.arange(1, len(mean) + 1)] = mean
    return moments


def _feasible_dual(problem: _Semidefinite, inside: int) -> Array:
    """A dual vector with C − Aᵀ(dual) clearly positive definite: a large multiple of the diagonal."""
    cost = problem.cost
    size = len(cost) - 1
    shift = 1.0 + np.abs(cost[1:, 1:]).sum(axis=1)
    dual = np.zeros(len(problem.right))
    diagonal = np.flatnonzero(problem.p[1 + size :] == problem.q[1 + size :])
    dual[diagonal] = -shift
    dual[inside + 1 :] = -1.0
    rest = problem.barrier(dual)
    schur = rest[0, 0] - rest[0, 1:] @ scipy.linalg.solve(rest[1:, 1:], rest[1:, 0], assume_a="pos")
    dual[inside] = schur - 1.0 - abs(schur)
    return dual


def _rounding(matrix: Array) -> float:
    """How far below zero the smallest eigenvalue of a matrix that should be positive semidefinite can be."""
    epsilon = 8 * len(matrix) * np.finfo(float).eps * float(np.abs(np.diag(matrix)).max())
    return epsilon if _definite(matrix) else epsilon + max(0.0, -float(np.linalg.eigvalsh(matrix)[0]))


def _form(program: Program, problem: _Semidefinite, dual: Array, inside: int, moments: Array) -> ConvexForm:
    barrier = problem.barrier(dual)
    slack = _rounding(barrier) * (1 + 2 * program.num_layers)
    only_shift = dual.copy()
    only_shift[inside:] = 0
    form = problem.barrier(only_shift)
    quadratic, linear = np.zeros((program.size,) * 2), np.zeros(program.size)
    quadratic[np.ix_(program.free, program.free)] = 2 * form[1:, 1:]
    linear[program.free] = 2 * form[0, 1:]
    multipliers = -dual[inside + 1 :] / program.row_scale
    bound = float(problem.right @ dual) - slack
    return ConvexForm(quadratic, linear, float(form[0, 0]), slack, bound, multipliers, moments)


def iteration_seconds(program: Program) -> float:
    """What one iteration of :func:`convex_form` may take at worst, on a slow core."""
    count = len(program.free)
    inside = np.bincount(program.layer[program.free], minlength=program.num_layers)
    pairs = float((inside * (inside + 1) // 2).sum())
    return 8 * (1 + count + pairs) ** 2 / _LOOSE + (pairs**3 / 3 + 12.0 * count**3) / _DENSE


def spectral_form(program: Program, deadline: float) -> ConvexForm:
    """A convex form at the price of one eigenvalue, where the semidefinite program takes too long; its bound is not known.

    Every diagonal entry is raised by the same share of the candidate's own increase; by its row's sum of magnitudes
    (Gershgorin) where there is no time for the eigenvalue.
    """
    own = np.diag(program.matrix)
    weight = np.maximum(np.abs(own), 1e-6 * float(np.abs(own).max()) or 1.0)
    across = program.matrix - np.diag(own)
    root = np.sqrt(weight)
    scaled = across / root[:, None] / root[None, :]
    raised = np.abs(scaled).sum(axis=1)
    if time.monotonic() + 200.0 * program.size**2 / _LOOSE + program.size**3 / _DENSE < deadline:
        start = np.cos(np.arange(program.size))
        least = scipy.sparse.linalg.eigsh(scaled, 1, which="SA", tol=1e-3, v0=start, return_eigenvectors=False)[0]
        share = 1.002 * max(0.0, -float(least)) + 1e-9
        while not _definite(scaled + share * np.eye(program.size)):
            share *= 1.05
        raised = np.full(program.size, share)
    quadratic = across + np.diag(raised * weight)
    slack = 8 * program.size * np.finfo(float).eps * float((raised * weight).max()) * (1 + 2 * program.num_layers)
    linear = (own - raised * weight) / 2
    return ConvexForm(quadratic, linear, 0.0, slack, -np.inf, np.zeros(len(program.limits)))


def linear_form(program: Program) -> ConvexForm:
    """The form of a program without interactions; its bound is the sum of the smallest entries of the layers."""
    linear = np.diag(program.matrix) / 2
    bound = float(np.minimum.reduceat(linear, program.starts[:-1]).sum())
    slack = 1e-14 * float(np.abs(linear).sum())
    return ConvexForm(np.zeros_like(program.matrix), linear, 0.0, slack, bound - slack, np.zeros(len(program.limits)))
