"""Feasible plans fast: Lagrangian starts, one-layer moves and pair exchanges, restarts by kicks. Deterministic for a seed."""

from __future__ import annotations

import numpy as np

from .problem import Choice, Matrix, Problem, Vector

_STARTS = 24


class Search:
    """Local search over choices; ``best`` is the best feasible one seen, None while there is none."""

    def __init__(self, problem: Problem, seed: int = 0) -> None:
        self.problem = problem
        self.random = np.random.default_rng(seed)
        self.layer = np.full(problem.matrix.shape[0], -1)
        for k, members in enumerate(problem.members):
            self.layer[members] = k
        self.allowed = np.flatnonzero(self.layer >= 0)
        self.best: Choice | None = None
        self.best_value = np.inf

    def run(self, kicks: int) -> None:
        """Local optima from every start, then from ``kicks`` random changes of the best one."""
        for start in self.starts():
            self.improve(start)
        if self.best is None:
            return
        for _ in range(kicks):
            choice = self.best.copy()
            layers = self.random.choice(
                len(choice), size=min(len(choice), int(self.random.integers(2, 7))), replace=False
            )
            for k in layers:
                choice[k] = self.random.choice(self.problem.members[k])
            self.improve(choice)

    def starts(self) -> list[Choice]:
        """Minimisers of ½xᵀGx + λ·cost by one-layer moves, over a range of λ, and the cheapest choice."""
        problem = self.problem
        weight = problem.costs / np.maximum(problem.limits, 1)[:, None]
        unit = np.abs(np.diag(problem.matrix)).sum() / max(float(weight.sum()), 1e-30)
        starts = [self._greedy(weight.sum(0) * unit * scale) for scale in np.geomspace(1e-3, 1e3, _STARTS)]
        cheapest = [members[weight[:, members].sum(0).argmin()] for members in problem.members]
        return [*starts, np.array(cheapest)]

    def improve(self, choice: Choice) -> None:
        """Repair the choice, then take the best one-layer move or pair exchange until none helps."""
        repaired = self._repair(choice)
        if repaired is None:
            return
        choice = repaired
        for _ in range(200):
            single, pair = self._moves(choice)
            slack = self.problem.limits - self.problem.costs[:, choice].sum(1)
            extra = self.problem.costs - self.problem.costs[:, choice][:, self.layer]
            single = np.where((extra <= slack[:, None]).all(0), single, np.inf)
            v = int(single[self.allowed].argmin())
            a = self.allowed
            sums = extra[:, a, None] + extra[:, None, a]
            fits = (sums <= slack[:, None, None]).all(0) & (self.layer[a][:, None] != self.layer[a][None, :])
            joint = np.where(fits, pair, np.inf)
            w = np.unravel_index(int(joint.argmin()), joint.shape)
            gain_single, gain_pair = single[a[v]], joint[w]
            tolerance = -1e-12 * max(1e-300, self.problem.diagonal_part(choice))
            if min(gain_single, gain_pair) >= tolerance:
                break
            moved = [a[v]] if gain_single <= gain_pair else [a[w[0]], a[w[1]]]
            for candidate in moved:
                choice[self.layer[candidate]] = candidate
        value = self.problem.value(choice)
        if value < self.best_value:
            self.best, self.best_value = choice, value

    def _moves(self, choice: Choice) -> tuple[Vector, Matrix]:
        """Change of value of every one-layer move ``[V]`` and, over allowed candidates, of every pair of moves."""
        matrix, current = self.problem.matrix, choice[self.layer]
        gradient = matrix[:, choice].sum(1)
        diagonal = np.diag(matrix)
        single = gradient - gradient[current] + 0.5 * (diagonal + diagonal[current])
        single[current == np.arange(len(current))] = 0.0
        a = self.allowed
        c = current[a]
        cross = matrix[np.ix_(a, a)] - matrix[np.ix_(a, c)] - matrix[np.ix_(c, a)] + matrix[np.ix_(c, c)]
        return single, single[a][:, None] + single[a][None, :] + cross

    def _greedy(self, price: Vector) -> Choice:
        problem = self.problem
        cost = 0.5 * np.diag(problem.matrix) + price
        choice = np.array([members[cost[members].argmin()] for members in problem.members])
        for _ in range(10):
            changed = False
            for k, members in enumerate(problem.members):
                others = np.delete(choice, k)
                best = members[(cost[members] + problem.matrix[np.ix_(members, others)].sum(1)).argmin()]
                changed |= bool(best != choice[k])
                choice[k] = best
            if not changed:
                break
        return choice

    def _repair(self, choice: Choice) -> Choice | None:
        """Move to within the budgets at the least loss per unit of violation removed; None where that fails."""
        problem, choice = self.problem, choice.copy()
        scale = np.maximum(problem.limits, 1)[:, None]
        for _ in range(4 * len(choice)):
            over = np.maximum(problem.costs[:, choice].sum(1) - problem.limits, 0)
            if not over.any():
                return choice
            extra = problem.costs - problem.costs[:, choice][:, self.layer]
            after = np.maximum((problem.costs[:, choice].sum(1) - problem.limits)[:, None] + extra, 0)
            removed = ((over[:, None] - after) / scale).sum(0)
            single, _ = self._moves(choice)
            rank = np.where(
                removed > 0, (single - single[self.allowed].min() + 1e-12) / np.maximum(removed, 1e-30), np.inf
            )
            v = self.allowed[int(rank[self.allowed].argmin())]
            if not np.isfinite(rank[v]):
                return None
            choice[self.layer[v]] = v
        return None
