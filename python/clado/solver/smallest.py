"""The inverse question: the least limit of one budget at which a choice of a small enough value exists.

The least value within a limit never rises with the limit, so the limits are bisected: a choice that is found lowers the upper
end to what it uses, a bound above the value that is allowed raises the lower end past the limit it was proven at.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .certify import CLOSED, Answer, meets, reference
from .program import Program

Choice = NDArray[np.int64]


@dataclass(frozen=True)
class Smallest:
    """What was found.

    Attributes:
        choice: one whose value is small enough; None: none was found.
        least: no choice of so small a value uses less of the row; infinity: proven that there is none at all.
        questions: how many limits were tried.
    """

    choice: Choice | None
    least: float
    questions: int


class Bisection:
    """See the module.

    Args:
        program, keep: what is asked about, and the candidates that may be taken.
        row: which of its budgets is made least.
        value: most that a choice may have.
        ask: answers the program with another limit of the row, with ``Effort.enough`` at ``value``.
        deadline: ``time.monotonic()`` value after which nothing more is asked.
    """

    def __init__(
        self,
        program: Program,
        keep: Choice,
        row: int,
        value: float,
        ask: Callable[[int, Choice | None], Answer],
        deadline: float,
    ) -> None:
        self.program, self.row, self.value, self.ask, self.deadline = program, row, value, ask, deadline
        use, layer = program.rows[row, keep], program.layer[keep]
        first = np.flatnonzero(np.diff(layer, prepend=-1))
        self.step = max(1, int(np.gcd.reduce(use - use[first][layer])))  # every use is the least one and some of these
        self.least: float = int(np.minimum.reduceat(use, first).sum())
        self.best: Choice | None = None
        self.high, self.questions = 0, 0

    def run(self) -> Smallest:
        if self._found(int(self.program.limits[self.row])):
            self._lower()
            self._prove()
        return Smallest(self.best, self.least, self.questions)

    def _lower(self) -> None:
        """Bring the upper end down; what stays undecided counts as impossible here."""
        floor, ceiling, hopeful, just_below = self.least, self.high - self.step, True, False
        while floor <= ceiling and self._time():
            # By turns: just below what is known, where a proof settles it all, and in between, where most is to be gained.
            just_below = hopeful and not just_below
            limit = ceiling if just_below else self._middle(floor, ceiling)
            found = self._found(limit)
            if found:
                ceiling, hopeful = self.high - self.step, True
            elif found is False or limit < ceiling:
                floor = limit + self.step
            else:
                ceiling, hopeful = ceiling - self.step, False

    def _prove(self) -> None:
        """Raise the lower end through limits that were left undecided."""
        wall = self.high - self.step
        while self.least <= wall and self._time():
            limit = self._middle(self.least, wall)
            if self._found(limit) is not False:
                wall = limit - self.step

    def _found(self, limit: int) -> bool | None:
        """Whether a choice within ``limit`` has a value that is small enough; None: undecided."""
        answer = self.ask(limit, self.best)
        self.questions += 1
        choice = answer.choice
        if choice is not None and meets(self.program, choice, self.value):
            self.best, self.high = choice, int(self.program.rows[self.row, choice].sum())
            return True
        closed = choice is not None and (
            self.program.value(choice) - answer.bound <= CLOSED * reference(self.program, choice)
        )
        if not closed and answer.bound <= self.value:
            return None
        self.least = math.inf if self.best is None else limit + self.step
        return False

    def _middle(self, low: float, high: int) -> int:
        return int(low) + (high - int(low)) // self.step // 2 * self.step

    def _time(self) -> bool:
        return time.monotonic() < self.deadline
