"""How far a plan that was chosen by a noisy matrix may be from the best one.

The mean over samples differs from the truth by about as much as the mean over half of them differs from that over all. So the
plans that are best on halves are the contenders that noise of this size brings up, and two things are asked of each: what it
loses against the chosen plan on all samples, as the chosen one may have lost in the same way; and what it may gain, the loss
being linear in the matrix, so that every group of samples gives a difference, and the groups its standard error. The larger
counts: where there are many layers the second alone is too small, since the chosen plan was chosen on the same samples. Means
without one group, as in a plain jackknife, lie too near the whole one to bring up the plans that count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ..quant import Candidates
from .budgets import whole_budget
from .native import QUICK, search
from .program import Program

Matrix = NDArray[np.float64]
Choice = NDArray[np.int64]
ERRORS = 2.0  # standard errors
LEAST_LEFT = 0.1  # of the single increases: a predicted loss near zero, or below it, is no unit
MOST_PAIRS = 8
_SIGNS = np.array([[(-1) ** (a & b).bit_count() for b in range(MOST_PAIRS)] for a in range(MOST_PAIRS)])  # Hadamard's


def regret_bounds(parts: Matrix, candidates: Candidates, keep: Choice, avg_bits: Sequence[float]) -> tuple[float, ...]:
    """How far the best plans on all samples may be from the best ones there are.

    Args:
        parts: ``[G, V, V]``, sums over G groups of as many samples each: ΔL on the diagonal, Ω above it, zero below; G is even,
            4 to 16. Neighbours may be alike: every group is paired with one that is far from it.
        candidates: what the matrices are over.
        keep: the candidates that may be taken, ascending.
        avg_bits: budgets.

    Returns:
        For every budget the most that a contender loses, or may gain at two standard errors, as a share of the chosen plan's
        predicted loss increase (of a tenth of its single increases, where the interactions take away more than the rest);
        infinity where no plan is within it.
    """
    layer = candidates.layer_of[keep]
    if len(np.unique(layer)) < len(candidates.layers):
        return (math.inf,) * len(avg_bits)
    if len(keep) < len(candidates):
        parts = parts[np.ix_(np.arange(len(parts)), keep, keep)]
    inside = layer[:, None] == layer[None, :]
    np.fill_diagonal(inside, False)
    units = Fraction(max(1, candidates.numel))
    budgets = [whole_budget("avg_bits", limit, candidates.code_bits[keep], units) for limit in avg_bits]

    def programs(groups: Sequence[int]) -> list[Program]:
        total = sum(parts[group] for group in groups)  # one by one: a copy of all would be as large as they are
        mean = total / len(groups)
        matrix = np.where(inside, 0.0, mean + mean.T)
        return [Program(matrix, layer, b.use[None], np.array([b.limit], np.int64)) for b in budgets]

    whole = programs(range(len(parts)))
    found = [_best(program, None) for program in whole]
    contenders = [[choice] for choice in found]
    for half in halves(len(parts)):
        for program, choice, others in zip(programs(half), found, contenders, strict=True):
            others.append(_best(program, choice))
    return tuple(_bound(program, parts, others) for program, others in zip(whole, contenders, strict=True))


def halves(groups: int) -> list[list[int]]:
    """Halves of an even number of groups, up to 16, in which every group, and every pair of groups of other pairs, comes equally
    often: balanced half-samples (McCarthy 1969), each with its complement. Group i is paired with group i + G/2."""
    count = groups // 2
    picked = [[i if sign > 0 else i + count for i, sign in enumerate(row[:count])] for row in _SIGNS]
    return [half for one in picked for half in (one, [(i + count) % groups for i in one])]


def _best(program: Program, start: Choice | None) -> Choice | None:
    """The best choice found; a limit on the work, none on the time, so that it depends on nothing else."""
    largest = float(np.abs(program.matrix).max(initial=0.0))
    scaled = program.scaled(1 / largest) if largest > 0 else program
    return search(scaled, start, 0, math.inf, work=QUICK * program.size)


def _bound(whole: Program, parts: Matrix, choices: Sequence[Choice | None]) -> float:
    """Of one budget; ``choices``: the chosen plan, which any better one of the others replaces, and its contenders."""
    known = [choice for choice in choices if choice is not None]
    if not known:
        return math.inf
    best = min(known, key=whole.value)
    losses = np.stack([parts[:, c[:, None], c].sum(axis=(1, 2)) for c in (best, *known)])
    gain = losses[0] - losses[1:]
    mean, error = gain.mean(axis=1), gain.std(axis=1, ddof=1) / math.sqrt(len(parts))
    most = max(0.0, float(np.maximum(-mean, mean + ERRORS * error).max()))
    single = float(np.abs(np.diag(whole.matrix)[best]).sum() / 2)
    unit = max(abs(whole.value(best)), LEAST_LEFT * single)
    return most / unit if unit > 0 else math.inf if most > 0 else 0.0
