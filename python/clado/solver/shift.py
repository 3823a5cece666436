"""A convex objective that equals the original on every plan (quadratic convex reformulation, Billionnet and Elloumi 2007).

On one-hot points x_m x_n = 0 inside a layer and x² = x, so any block-diagonal matrix S may be added to G if its diagonal is taken
off the linear term: ½xᵀGx = ½xᵀ(G + S)x - ½ diag(S)ᵀx. S is chosen by a semidefinite program that maximises the bound of the
continuous relaxation with the budgets priced in. Only feasible directions matter: x = x0 + Zy with an orthonormal basis Z of the
changes that keep every layer's sum at one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .problem import Matrix, Problem, Vector


@dataclass(frozen=True)
class Convex:
    """½|Fy|² + qᵀy + constant with y = Zᵀ(x - x0); equals ½xᵀGx on every plan, and is convex.

    Attributes:
        candidates: ``[n]`` the allowed candidates, columns of everything here.
        basis: Z ``[n, d]``.
        centre: x0 ``[n]``.
        factor: F ``[k, d]``.
        linear: q ``[d]``.
        constant: number.
    """

    candidates: np.ndarray
    basis: Matrix
    centre: Vector
    factor: Matrix
    linear: Vector
    constant: float


def convexify(problem: Problem, seconds: float) -> Convex:
    """Shift ``problem`` within about ``seconds``; always convex, the better the longer."""
    candidates = np.concatenate(problem.members)
    sizes = [len(m) for m in problem.members]
    matrix = problem.matrix[np.ix_(candidates, candidates)]
    basis, centre = _directions(sizes)
    blocks = _blocks(sizes)
    shift = _semidefinite(matrix, problem.costs[:, candidates], problem.limits, basis, centre, blocks, seconds)
    shifted = matrix + shift
    reduced = basis.T @ shifted @ basis
    reduced = (reduced + reduced.T) / 2
    lowest = float(np.linalg.eigvalsh(reduced)[0]) if reduced.size else 0.0
    scale = max(float(np.abs(reduced).max(initial=0.0)), 1e-300)
    if lowest < 1e-9 * scale:  # the solver's answer is approximate: lift it to where it is certainly convex
        lift = 2e-9 * scale - lowest
        shift = shift + lift * np.eye(len(candidates))
        shifted = matrix + shift
        reduced = reduced + lift * np.eye(reduced.shape[0])
    values, vectors = np.linalg.eigh(reduced)
    factor = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
    diagonal = np.diag(shift)
    linear = basis.T @ (shifted @ centre - 0.5 * diagonal)
    constant = float(0.5 * centre @ shifted @ centre - 0.5 * diagonal @ centre)
    return Convex(candidates, basis, centre, factor, linear, constant)


def _directions(sizes: list[int]) -> tuple[Matrix, Vector]:
    """Orthonormal basis of changes with zero sum per layer, and the middle of every layer."""
    n, d = sum(sizes), sum(s - 1 for s in sizes)
    basis, centre = np.zeros((n, d)), np.zeros(n)
    row = column = 0
    for size in sizes:
        helmert = np.zeros((size, size - 1))
        for k in range(1, size):
            helmert[:k, k - 1] = 1.0
            helmert[k, k - 1] = -k
        basis[row : row + size, column : column + size - 1] = helmert / np.maximum(
            np.linalg.norm(helmert, axis=0), 1e-300
        )
        centre[row : row + size] = 1 / size
        row, column = row + size, column + size - 1
    return basis, centre


def _blocks(sizes: list[int]) -> list[tuple[int, int]]:
    """Index pairs (i <= j) inside a layer: the free entries of S."""
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return [
        (s + i, s + j)
        for s, size in zip(starts.tolist(), sizes, strict=True)
        for i in range(size)
        for j in range(i, size)
    ]


def _semidefinite(
    matrix: Matrix,
    costs: Matrix,
    limits: Vector,
    basis: Matrix,
    centre: Vector,
    blocks: list[tuple[int, int]],
    seconds: float,
) -> Matrix:
    """S that maximises the relaxation's bound t: with prices λ >= 0 of the budgets,

    Tᵀ [[-2 λᵀlimits - 2t, (λᵀcosts - ½ diag S)ᵀ], [·, matrix + S]] T positive semidefinite, T = [[1, 0], [x0, Z]].
    """
    n, d = basis.shape
    if d == 0:
        return np.zeros((n, n))
    import scs
    from scipy import sparse

    lift = np.zeros((n + 1, d + 1))
    lift[0, 0], lift[1:, 0], lift[1:, 1:] = 1.0, centre, basis
    rows, columns = np.tril_indices(d + 1)
    order = np.lexsort((rows, columns))  # SCS wants the lower triangle by columns, off-diagonals times sqrt 2
    rows, columns = rows[order], columns[order]
    weight = np.where(rows == columns, 1.0, np.sqrt(2.0))

    def pressed(full: Matrix) -> Vector:
        small = lift.T @ full @ lift
        return small[rows, columns] * weight

    def bordered(corner: float, border: Vector, inside: Matrix | None) -> Matrix:
        full = np.zeros((n + 1, n + 1))
        full[0, 0], full[0, 1:], full[1:, 0] = corner, border, border
        if inside is not None:
            full[1:, 1:] = inside
        return full

    price_scale = np.maximum(np.abs(costs).max(1, initial=0.0), 1e-300)
    parts = [pressed(bordered(-2.0, np.zeros(n), None))]  # t
    for cost, limit, scale in zip(costs, limits, price_scale, strict=True):
        parts.append(pressed(bordered(-2.0 * limit / scale, cost / scale, None)))
    for i, j in blocks:
        inside, border = np.zeros((n, n)), np.zeros(n)
        inside[i, j] = inside[j, i] = 1.0
        if i == j:
            border[i] = -0.5
        parts.append(pressed(bordered(0.0, border, inside)))
    variables, prices = len(parts), len(limits)
    positive = sparse.csc_matrix(
        (-np.ones(prices), (np.arange(prices), 1 + np.arange(prices))), shape=(prices, variables)
    )
    cone = sparse.csc_matrix(-np.stack(parts, axis=1))
    data = {
        "A": sparse.vstack([positive, cone], format="csc"),
        "b": np.concatenate([np.zeros(prices), pressed(bordered(0.0, np.zeros(n), matrix))]),
        "c": np.concatenate([[-1.0], np.zeros(variables - 1)]),
    }
    solver = scs.SCS(
        data,
        {"l": prices, "s": [d + 1]},
        verbose=False,
        eps_abs=1e-6,
        eps_rel=1e-6,
        max_iters=20000,
        time_limit_secs=max(0.1, seconds),
    )
    answer = solver.solve()["x"]
    shift = np.zeros((n, n))
    if answer is not None and np.isfinite(answer).all():
        for (i, j), value in zip(blocks, answer[1 + prices :], strict=True):
            shift[i, j] = shift[j, i] = value
    return shift
