"""Whether more samples would have changed the plans, as far as the noise in the matrix tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..common import CladoError


@dataclass(frozen=True)
class Stability:
    """What a run that was to end as soon as its plans stand found of them.

    Attributes:
        tolerance: the share that was asked for.
        avg_bits: budgets of the plans.
        regrets: for each of them, how far its plan may be from the best at two standard errors, as a share of its predicted loss
            increase (:func:`clado.solver.regret_bounds`); empty before the first check.
        samples: that the last check was made of.
        limit: how many there were to be at most.
        reached: whether the run ended there because the plans stood.
    """

    tolerance: float
    avg_bits: tuple[float, ...]
    regrets: tuple[float, ...]
    samples: int
    limit: int
    reached: bool

    @property
    def regret(self) -> float:
        """The largest of them; infinity before the first check."""
        return max(self.regrets, default=float("inf"))

    def __str__(self) -> str:
        plans = f"the plans of {', '.join(f'{bits:g}' for bits in self.avg_bits)} bits"
        if self.reached:
            many = f"{self.samples:,} of {self.limit:,} samples"
            return f"stable after {many}: {plans} are within {percent(self.regret)} of the best (2 s.e.)"
        if not self.regrets:
            return f"not stable: too few samples to compare {plans}"
        asked = f"{percent(self.tolerance)} twice in a row was asked for"
        return f"not stable after {self.samples:,} samples: {plans} may be {percent(self.regret)} off (2 s.e.), {asked}"

    @staticmethod
    def from_json(data: Any) -> Stability | None:
        """From ``asdict``; None for None.

        Raises:
            CladoError: anything else.
        """
        if data is None:
            return None
        try:
            lists = {name: tuple(map(float, data[name])) for name in ("avg_bits", "regrets")}
            return Stability(**{**data, **lists})
        except (TypeError, KeyError, ValueError):
            raise CladoError(f"stability: file must say what was found of the plans, got {data!r:.60}") from None


def percent(share: float) -> str:
    """0.0437 → "4.4 %"."""
    return f"{100 * share:.2g} %"
