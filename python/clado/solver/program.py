"""The integer quadratic program by itself: candidates, layers, matrix and budget rows, nothing of networks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..common import require


@dataclass(frozen=True, eq=False)
class Program:
    """min ½ xᵀGx over x with one candidate per layer and rows·x ≤ limits.

    Attributes:
        matrix: G, ``[V, V]`` float64, finite, symmetric, zero between candidates of one layer.
        layer: ``[V]`` int64, layer of each candidate: 0…L−1, ascending, none left out.
        rows: ``[P, V]`` int64, use of each budget by each candidate.
        limits: ``[P]`` int64.
    """

    matrix: NDArray[np.float64]
    layer: NDArray[np.int64]
    rows: NDArray[np.int64]
    limits: NDArray[np.int64]

    @property
    def size(self) -> int:
        """V."""
        return len(self.layer)

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.layer[-1]) + 1

    @property
    def starts(self) -> NDArray[np.int64]:
        """``[L + 1]``: layer i holds candidates starts[i] … starts[i + 1] − 1."""
        return np.searchsorted(self.layer, np.arange(self.num_layers + 1))

    @property
    def last(self) -> NDArray[np.int64]:
        """``[L]``: last candidate of each layer."""
        return self.starts[1:] - 1

    @property
    def free(self) -> NDArray[np.int64]:
        """All candidates but the last one of each layer."""
        return np.setdiff1d(np.arange(self.size), self.last)

    @property
    def row_scale(self) -> NDArray[np.float64]:
        """``[P]``: what to divide a budget row by so that its numbers are near one."""
        largest = np.abs(self.rows).max(axis=1, initial=1).astype(float)
        found: NDArray[np.float64] = np.maximum(np.abs(self.limits).astype(float), largest)
        return found

    def value(self, choice: NDArray[np.int64]) -> float:
        """½ xᵀGx of ``[L]`` chosen candidates."""
        return float(self.matrix[np.ix_(choice, choice)].sum() / 2)

    def feasible(self, choice: NDArray[np.int64]) -> bool:
        """Whether ``[L]`` chosen candidates meet every budget, in exact integer arithmetic."""
        return bool((self.rows[:, choice].sum(axis=1) <= self.limits).all())

    def scaled(self, factor: float) -> Program:
        """The same program with its objective multiplied by ``factor``."""
        return Program(self.matrix * factor, self.layer, self.rows, self.limits)

    def covered(self, keep: NDArray[np.int64]) -> bool:
        """Whether every layer has a candidate among ``keep``."""
        return len(np.unique(self.layer[keep])) == self.num_layers

    def restricted(self, keep: NDArray[np.int64]) -> Program:
        """The program over the candidates ``keep`` (ascending, at least one of every layer)."""
        if len(keep) == self.size:
            return self
        return Program(self.matrix[np.ix_(keep, keep)], self.layer[keep], self.rows[:, keep], self.limits)


def within_reach(program: Program, keep: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of ``keep`` that meet every budget beside the cheapest candidates of the other layers.

    Repeated until nothing changes; a layer may end up without a candidate, which proves that the budgets conflict.
    """
    while True:
        layer, rows = program.layer[keep], program.rows[:, keep]
        cheapest = np.full((len(rows), program.num_layers), np.iinfo(np.int64).max)
        for row, least in zip(rows, cheapest, strict=True):
            np.minimum.at(least, layer, row)
        spare = program.limits - cheapest.sum(axis=1)
        fits = (rows - cheapest[:, layer] <= spare[:, None]).all(axis=0)
        if fits.all():
            return keep
        keep = keep[fits]
        if not program.covered(keep):
            return keep


def worth_keeping(program: Program, upper: float) -> NDArray[np.int64]:
    """Candidates that may be part of a choice with a value of at most ``upper``, budgets aside.

    Candidate v is dropped when its own term, its interaction with the best candidate of each other layer, and half of
    the least interactions among those layers already exceed ``upper``.
    """
    keep = np.arange(program.size)
    margin = 1e-9 * max(abs(upper), float(np.abs(np.diag(program.matrix)).sum()) * 1e-6)
    while True:
        part = program.restricted(keep)
        good = _least_value_with(part) <= upper + margin
        if good.all():
            return keep
        keep = keep[good]


def _least_value_with(program: Program) -> NDArray[np.float64]:
    """``[V]``: a lower bound on every choice that holds candidate v."""
    first, each = program.starts[:-1], np.arange(program.size)
    half = np.diag(program.matrix) / 2
    across = program.matrix - np.diag(2 * half)
    least = np.minimum.reduceat(across, first, axis=1)
    least[each, program.layer] = 0
    share = half + least.sum(axis=1) / 2
    others = np.minimum.reduceat(share[None, :] - least.T[program.layer] / 2 + across, first, axis=1)
    others[each, program.layer] = 0
    found: NDArray[np.float64] = half + others.sum(axis=1)
    return found


@dataclass(frozen=True, eq=False)
class Merged:
    """A program over groups of layers that take the same scheme.

    Attributes:
        program: over the groups; what two layers of a group do to each other is on its diagonal.
        keep: its candidates that are left.
        members: ``[V', L]``: the candidate of each layer under a candidate of its group, -1 for layers of other groups; None
            where every layer is a group.
    """

    program: Program
    keep: NDArray[np.int64]
    members: NDArray[np.int64] | None

    def spread(self, choice: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[L]`` candidates of the layers from those of the groups."""
        return choice if self.members is None else self.members[choice].max(axis=0)

    def gather(self, choice: NDArray[np.int64]) -> NDArray[np.int64]:
        """Candidates of the groups from ``[L]`` of the layers: that of a group's first layer, or the group's first one."""
        if self.members is None:
            return choice
        found = []
        for first, last in zip(self.program.starts[:-1], self.program.starts[1:], strict=True):
            leader = int(np.argmax(self.members[first] >= 0))
            same = np.flatnonzero(self.members[first:last, leader] == choice[leader])
            found.append(first + (same[0] if len(same) else 0))
        return np.array(found, np.int64)


def merged(program: Program, keep: NDArray[np.int64], groups: NDArray[np.int64], schemes: NDArray[np.int64]) -> Merged:
    """The program over groups of layers that take the same scheme, and which of its candidates are left.

    Args:
        groups: ``[L]``, numbers the groups from 0 in the order of their first layers.
        schemes: ``[V]``, numbers the candidates' schemes.

    Raises:
        CladoError: layers of one group without a scheme in common.
    """
    if len(groups) == groups[-1] + 1 == program.num_layers:
        return Merged(program, keep, None)
    columns, group = [], []
    for number in range(int(groups.max()) + 1):
        layers = np.flatnonzero(groups == number)
        lists = [
            dict(zip(schemes[program.layer == i], np.flatnonzero(program.layer == i), strict=True)) for i in layers
        ]
        common = [scheme for scheme in lists[0] if all(scheme in own for own in lists)]
        require(bool(common), "solve", "shared_layers", "have a scheme in common", f"none for {len(layers)} of them")
        for scheme in common:
            column = np.full(program.num_layers, -1, np.int64)
            column[layers] = [own[scheme] for own in lists]
            columns.append(column)
            group.append(number)
    members, layer = np.stack(columns), np.array(group, np.int64)
    there, target = members[members >= 0], np.nonzero(members >= 0)[0]
    size = len(members)
    matrix, rows = np.zeros((size, size)), np.zeros((len(program.rows), size), np.int64)
    order = np.argsort(there)
    there, target = there[order], target[order]
    np.add.at(matrix, (target[:, None], target[None, :]), program.matrix[np.ix_(there, there)])
    for row, old in zip(rows, program.rows, strict=True):
        np.add.at(row, target, old[there])
    matrix[(layer[:, None] == layer[None, :]) & ~np.eye(size, dtype=bool)] = 0
    banned = np.ones(program.size, dtype=bool)
    banned[keep] = False
    left = np.ones(size, dtype=bool)
    left[target[banned[there]]] = False
    return Merged(Program(matrix, layer, rows, program.limits), np.flatnonzero(left), members)
