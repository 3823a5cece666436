"""The bound on what a plan chosen by a noisy matrix may lose: against brute force, and against the truth over many draws."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest

from clado import Layer
from clado.quant import Candidates, Scheme
from clado.solver import regret_bounds
from clado.solver.program import Program
from clado.solver.regret import ERRORS, _best, halves

LAYERS = 4
WIDTHS = (2, 4, 8)
BUDGETS = (2.75, 3.5, 5.0)


@dataclass(frozen=True)
class World:
    """A true matrix (ΔL on the diagonal, Ω above it) and noisy means of it over groups of samples."""

    candidates: Candidates
    truth: np.ndarray
    spread: np.ndarray

    def parts(self, random: np.random.Generator, groups: int, noise: float) -> np.ndarray:
        """``[G, V, V]``: rows of a group move together, as the loss of a hard image does, and each entry by itself."""
        size = len(self.truth)
        common = random.normal(size=(groups, 1, 1))
        own = random.standard_t(5, size=(groups, size, size))
        return self.truth * (1 + 0.3 * noise * common) + noise * np.triu(own) * self.spread


def world(seed: int, layers: int = LAYERS) -> World:
    random = np.random.default_rng(seed)
    own = [Layer(f"layer{i}", "linear", (4, int(random.integers(1, 9))), 1) for i in range(layers)]
    candidates = Candidates.uniform(own, list(map(Scheme.of, WIDTHS)))
    width = candidates.weight_bits
    size = np.exp(random.normal(0, 0.7, layers))[candidates.layer_of] * 4.0 ** -(width - 2.0)
    scale = np.sqrt(np.outer(size, size))
    cross = random.normal(0, 0.2, scale.shape) * scale
    cross[candidates.same_layer] = 0
    return World(candidates, np.triu(cross, 1) + np.diag(size), 0.3 * scale)


def choices(candidates: Candidates, limit: float) -> list[np.ndarray]:
    """Every choice within so many average bits."""
    blocks = [range(a, b) for a, b in itertools.pairwise(candidates.starts)]
    every = (np.array(choice) for choice in itertools.product(*blocks))
    return [c for c in every if candidates.code_bits[c].sum() <= limit * candidates.numel]


def loss(matrix: np.ndarray, choice: np.ndarray) -> float:
    return sum(matrix[v, w] for k, v in enumerate(choice) for w in choice[k:])


def by_hand(parts: np.ndarray, candidates: Candidates, limit: float) -> float:
    """The bound with every choice tried."""
    allowed = choices(candidates, limit)
    mean = parts.mean(0)
    best = min(allowed, key=lambda c: loss(mean, c))
    bound = 0.0
    for half in halves(len(parts)):
        other = min(allowed, key=lambda c: loss(parts[half].mean(0), c))
        excess = [loss(part, best) - loss(part, other) for part in parts]
        error = np.std(excess, ddof=1) / math.sqrt(len(excess))
        bound = max(bound, -np.mean(excess), np.mean(excess) + ERRORS * error)
    return bound / max(abs(loss(mean, best)), 0.1 * np.diag(mean)[best].sum())


@pytest.mark.parametrize("groups", [8, 12, 16])
def test_halves_are_balanced(groups: int) -> None:
    found = halves(groups)
    count = groups // 2
    assert len(found) == 16
    taken = np.zeros((16, groups), dtype=int)
    for row, half in zip(taken, found, strict=True):
        assert len(half) == len(set(half)) == count
        row[half] = 1
    assert (taken[:, :count] + taken[:, count:] == 1).all()  # one of every pair, which lie far apart
    together = taken.T @ taken
    for i, j in itertools.product(range(groups), repeat=2):
        assert together[i, j] == (8 if i == j else 0 if abs(i - j) == count else 4)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("groups", [8, 12, 16])
def test_bound_is_that_of_every_choice_tried(seed: int, groups: int) -> None:
    made = world(seed)
    parts = made.parts(np.random.default_rng(seed), groups, 0.5)
    found = regret_bounds(parts, made.candidates, np.arange(len(made.truth)), BUDGETS)
    for limit, bound in zip(BUDGETS, found, strict=True):
        assert bound == pytest.approx(by_hand(parts, made.candidates, limit), rel=1e-9, abs=1e-12)
    assert regret_bounds(1e-9 * parts, made.candidates, np.arange(len(made.truth)), BUDGETS) == pytest.approx(found)


@pytest.mark.parametrize(("groups", "noise"), [(8, 1.0), (12, 2.0), (16, 2.0), (16, 5.0)])
def test_bound_covers_the_true_regret(groups: int, noise: float) -> None:
    """What the chosen plan truly loses against the best one is below the bound in at least 90 % of the draws."""
    covered, lost = [], []
    for seed in range(60):
        made = world(seed)
        parts = made.parts(np.random.default_rng([seed, groups]), groups, noise)
        found = regret_bounds(parts, made.candidates, np.arange(len(made.truth)), BUDGETS)
        mean = parts.mean(0)
        for limit, bound in zip(BUDGETS, found, strict=True):
            allowed = choices(made.candidates, limit)
            chosen = min(allowed, key=lambda c: loss(mean, c))
            regret = loss(made.truth, chosen) - min(loss(made.truth, c) for c in allowed)
            unit = max(abs(loss(mean, chosen)), 0.1 * np.abs(np.diag(mean)[chosen]).sum())
            covered.append(regret <= bound * unit + 1e-12)
            lost.append(regret > 1e-12)
    assert np.mean(lost) > 0.1  # noise does hide the best plan
    assert np.mean(covered) >= 0.9


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_bound_covers_the_true_regret_of_many_layers(noise: float) -> None:
    """Where the best of 3^30 plans is never among the contenders; the truth's is searched for from the chosen one."""
    covered, lost = [], []
    for seed in range(15):
        made = world(seed, 30)
        parts = made.parts(np.random.default_rng(seed), 16, noise)
        found = regret_bounds(parts, made.candidates, np.arange(len(made.truth)), BUDGETS)
        for limit, bound in zip(BUDGETS, found, strict=True):
            noisy, true = (program(made.candidates, matrix, limit) for matrix in (parts.mean(0), made.truth))
            chosen = _best(noisy, None)
            best = _best(true, chosen)
            assert chosen is not None
            assert best is not None
            regret = true.value(chosen) - true.value(best)
            single = np.abs(np.diag(noisy.matrix)[chosen]).sum() / 2
            covered.append(regret <= bound * max(abs(noisy.value(chosen)), 0.1 * single))
            lost.append(regret > 0)
    assert np.mean(lost) > 0.5
    assert np.mean(covered) >= 0.9


def program(candidates: Candidates, matrix: np.ndarray, limit: float) -> Program:
    whole = np.where(candidates.same_layer & ~np.eye(len(matrix), dtype=bool), 0.0, matrix + matrix.T)
    most = np.array([int(limit * candidates.numel)])
    return Program(whole, candidates.layer_of, candidates.code_bits[None], most)


def test_a_loss_that_interactions_cancel_is_no_unit() -> None:
    """Two layers of single increases 1, less Ω between them: what is left is the unit, a tenth of 2 at least."""
    own = [Layer(name, "linear", (4, 4), 1) for name in "ab"]
    candidates = Candidates.uniform(own, [Scheme.of(bits) for bits in (2, 4)])
    parts = np.zeros((8, 4, 4))
    parts[:, [0, 1, 2, 3], [0, 1, 2, 3]] = 1.0
    parts[:, 1, 2] = parts[:, 0, 3] = np.linspace(-0.1, 0.1, 8)  # one group against another
    parts[:, 1, 2] *= -1
    parts[:, 0, 2] = 5.0  # both at 2 bits: out of the question
    excess = 2 * ERRORS * np.std(parts[:, 0, 3], ddof=1) / math.sqrt(8)  # of one mixed plan over the other
    for left in (1.0, 0.15, -0.15, 0.0):
        shifted = parts.copy()
        shifted[:, [0, 0, 1, 1], [2, 3, 2, 3]] += left - 2
        (found,) = regret_bounds(shifted, candidates, np.arange(4), (3.0,))
        assert found == pytest.approx(excess / max(abs(left), 0.2))


def test_without_noise_there_is_nothing_to_lose() -> None:
    made = world(0)
    parts = np.stack([made.truth] * 8)
    assert regret_bounds(parts, made.candidates, np.arange(len(made.truth)), BUDGETS) == (0.0, 0.0, 0.0)
    assert regret_bounds(0 * parts, made.candidates, np.arange(len(made.truth)), BUDGETS) == (0.0, 0.0, 0.0)


def test_more_samples_bring_it_down_and_noise_alone_keeps_it_up() -> None:
    def largest(noise: float) -> float:
        found = []
        for seed in range(10):
            made = world(seed)
            parts = made.parts(np.random.default_rng(seed), 16, noise)
            found.append(max(regret_bounds(parts, made.candidates, np.arange(len(made.truth)), BUDGETS)))
        return float(np.median(found))

    bounds = [largest(noise) for noise in (8.0, 2.0, 0.5, 0.02)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > 0.5
    assert bounds[-1] < 0.02


def test_dropped_candidates_are_left_out() -> None:
    made = world(3)
    parts = made.parts(np.random.default_rng(3), 8, 0.5)
    keep = np.delete(np.arange(len(made.truth)), [1, 5])
    wanted = regret_bounds(parts, made.candidates, keep, BUDGETS)
    parts[:, [1, 5], :], parts[:, :, [1, 5]] = np.nan, np.inf
    assert regret_bounds(parts, made.candidates, keep, BUDGETS) == wanted
    assert all(map(math.isfinite, wanted))
    assert regret_bounds(parts, made.candidates, keep[3:], BUDGETS) == (math.inf,) * 3  # a layer without any
    assert regret_bounds(parts, made.candidates, keep, (1.0, 8.0))[0] == math.inf
