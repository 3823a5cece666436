"""Good plans fast: Lagrangian multistart, one-layer moves and pair exchanges, all with incremental gradients."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from .program import Program

Choice = NDArray[np.int64]


def search(program: Program, seed: int = 0, starts: int = 24, deadline: float = np.inf) -> Choice | None:
    """The best choice found, ``[L]`` candidates that meet every budget, or None; the same for the same seed."""
    random = np.random.default_rng(seed)
    best, best_value = None, np.inf
    cheapest = _cheapest(program)
    if cheapest is not None:
        best, best_value = cheapest, program.value(cheapest)
    price_unit = np.abs(np.diag(program.matrix)).sum() / program.num_layers
    for _ in range(starts):
        if time.monotonic() > deadline:
            break
        first = np.array(
            [random.integers(low, high) for low, high in zip(program.starts, program.starts[1:], strict=False)]
        )
        for price in (0.0, 0.3, 1.0, 3.0, 10.0):
            weights = price * random.uniform(0.5, 1.5, len(program.limits)) * price_unit / program.row_scale
            choice = _repair(program, _descend(program, first.copy(), weights))
            if choice is None:
                continue
            choice = _improve(program, choice)
            value = program.value(choice)
            if value < best_value:
                best, best_value = choice, value
    return best


def _cheapest(program: Program) -> Choice | None:
    """The choice of least summed relative use; None when even that one breaks a budget."""
    use = (program.rows / program.row_scale[:, None]).sum(axis=0)
    choice = np.array([a + use[a:b].argmin() for a, b in zip(program.starts, program.starts[1:], strict=False)])
    return choice if program.feasible(choice) else _repair(program, choice)


def _gradient(program: Program, choice: Choice) -> NDArray[np.float64]:
    """``[V]``: what each candidate would add to the objective beside the chosen ones of the other layers."""
    return program.matrix[:, choice].sum(axis=1) - _own(program, choice) + np.diag(program.matrix) / 2


def _own(program: Program, choice: Choice) -> NDArray[np.float64]:
    own = np.zeros(program.size)
    own[choice] = program.matrix[choice, choice]
    return own


def _descend(program: Program, choice: Choice, weights: NDArray[np.float64]) -> Choice:
    """Layer by layer the best candidate under priced budgets, until nothing changes."""
    price = weights @ program.rows
    gradient = _gradient(program, choice)
    for _ in range(50):
        changed = False
        for i, (low, high) in enumerate(zip(program.starts, program.starts[1:], strict=False)):
            best = low + int((gradient[low:high] + price[low:high]).argmin())
            if best != choice[i]:
                _move(program, gradient, choice, i, best)
                changed = True
        if not changed:
            break
    return choice


def _move(program: Program, gradient: NDArray[np.float64], choice: Choice, i: int, new: int) -> None:
    inside = slice(program.starts[i], program.starts[i + 1])
    own = gradient[inside].copy()
    gradient += program.matrix[new] - program.matrix[choice[i]]
    gradient[inside] = own
    choice[i] = new


def _repair(program: Program, choice: Choice) -> Choice | None:
    """One-layer moves with the best loss per violation removed until every budget holds; None when stuck."""
    gradient = _gradient(program, choice)
    use = program.rows[:, choice].sum(axis=1)
    while (use > program.limits).any():
        owner = choice[program.layer]
        after = np.maximum(0, use[:, None] + program.rows - program.rows[:, owner] - program.limits[:, None])
        now = np.maximum(0, use - program.limits)
        removed = ((now[:, None] - after) / program.row_scale[:, None]).sum(axis=0)
        change = gradient - gradient[owner]
        useful = removed > 0
        if not useful.any():
            return None
        rate = np.where(change > 0, change / np.where(useful, removed, 1), change * np.where(useful, removed, 1))
        pick = int(np.where(useful, rate, np.inf).argmin())
        i = int(program.layer[pick])
        use = use + program.rows[:, pick] - program.rows[:, choice[i]]
        _move(program, gradient, choice, i, pick)
    return choice


def _improve(program: Program, choice: Choice) -> Choice:
    """Best feasible one-layer move or pair exchange, until none helps."""
    gradient = _gradient(program, choice)
    use = program.rows[:, choice].sum(axis=1)
    tolerance = 1e-12 * np.abs(np.diag(program.matrix)).sum()
    different = program.layer[:, None] != program.layer[None, :]
    while True:
        owner = choice[program.layer]
        one = gradient - gradient[owner]
        extra = program.rows - program.rows[:, owner]
        spare = program.limits - use
        change = np.where((extra <= spare[:, None]).all(axis=0), one, np.inf)
        pick = int(change.argmin())
        if change[pick] < -tolerance:
            moves = [pick]
        else:
            rows = program.matrix[:, owner]
            pair = one[:, None] + one[None, :] + program.matrix - rows - rows.T + program.matrix[np.ix_(owner, owner)]
            allowed = different.copy()
            for row, left in zip(extra, spare, strict=False):
                allowed &= row[:, None] + row[None, :] <= left
            pair = np.where(allowed, pair, np.inf)
            flat = int(pair.argmin())
            if pair.flat[flat] >= -tolerance:
                return choice
            moves = list(divmod(flat, program.size))
        for new in moves:
            i = int(program.layer[new])
            use = use + program.rows[:, new] - program.rows[:, choice[i]]
            _move(program, gradient, choice, i, new)
