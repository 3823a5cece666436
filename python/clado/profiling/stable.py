"""When a run may end: more samples would hardly change its plans."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..artifacts import Stability, percent
from ..common import require
from ..quant import Candidates
from .checkpoint import Checkpoint
from .groups import GROUPS
from .sums import finite_candidates

FIRST_CHECKS = (
    GROUPS // 2,
    GROUPS * 3 // 4,
)  # chunks, and every doubling of them: 8, 12, 16, 24, 32, …; all groups are whole
LEAST_SAMPLES = 64  # of the first check
CHUNKS = 64  # of the samples, where no size is asked for, so that a run may end early
SHARES = (0.125, 0.25, 0.5)  # of the way from least to most average bits: budgets where none are given


def check_points(samples: int, size: int) -> list[int]:
    """At how many samples, up to so many, a run in chunks of ``size`` looks at its plans, ascending."""
    doublings = range((samples // size).bit_length())
    points = sorted((first * size) << k for k in doublings for first in FIRST_CHECKS)
    return [point for point in points if LEAST_SAMPLES <= point <= samples]


def budgets(avg_bits: Sequence[float] | None, candidates: Candidates) -> tuple[float, ...]:
    """Average bits of the plans that are looked at; None: some between the least and the most that the candidates allow.

    Raises:
        CladoError: one that no plan meets.
    """
    first, use = candidates.starts[:-1], candidates.code_bits
    sums = (int(ends.reduceat(use, first).sum()) for ends in (np.minimum, np.maximum))
    least, most = (total / max(1, candidates.numel) for total in sums)
    if avg_bits is None:
        return tuple(least + share * (most - least) for share in SHARES)
    must = f"be at least {least:.10g}, which the layers take"
    require(min(avg_bits) >= least, "profile", "avg_bits", must, f"{min(avg_bits):.10g}")
    return tuple(avg_bits)


class Rule:
    """Ends a run where two checks in a row find that its plans may lose no more than a share of their loss.

    Two, since who looks often enough sees what he hopes for once.

    Args:
        tolerance: that share.
        avg_bits: of :func:`budgets`.
        candidates: what the matrix is over.
        size: samples of a chunk.
        limit: samples at most.

    Attributes:
        seconds: that the checks took.

    Raises:
        CladoError: a limit that allows no two checks.
    """

    def __init__(
        self, tolerance: float, avg_bits: tuple[float, ...], candidates: Candidates, size: int, limit: int
    ) -> None:
        self.tolerance, self.avg_bits, self.candidates = tolerance, avg_bits, candidates
        self.size, self.limit, self.seconds = size, limit, 0.0
        needed = next(count for count in range(1, 2**40) if len(check_points(count * size, size)) > 1) * size
        must = f"be at least {needed:,} with until_stable and chunks of {size:,} (two checks, of 8 chunks or more)"
        require(limit >= needed, "profile", "num_samples", must, f"{limit:,}")

    def stops(self, checkpoint: Checkpoint) -> bool:
        """Whether the run ends with the samples that are in the checkpoint; they are checked where it is time to."""
        samples = checkpoint.total.samples
        points = check_points(samples, self.size)
        if points[-1:] != [samples]:
            return False
        if self._regrets(checkpoint, samples) is None:
            self._check(checkpoint)
        found = [self._regrets(checkpoint, point) for point in points[-2:]]
        return len(found) == 2 and all(regrets is not None and max(regrets) <= self.tolerance for regrets in found)

    def found(self, checkpoint: Checkpoint, reached: bool) -> Stability:
        """What the last check found."""
        own = [check for check in checkpoint.checks if check["avg_bits"] == list(self.avg_bits)]
        last: dict[str, Any] = own[-1] if own else {"regrets": (), "samples": 0}
        return Stability(self.tolerance, self.avg_bits, tuple(last["regrets"]), last["samples"], self.limit, reached)

    def note(self, checkpoint: Checkpoint) -> str:
        """For the progress bar."""
        last = self.found(checkpoint, False)
        return f"plans within {percent(last.regret)}" if last.regrets else ""

    def _regrets(self, checkpoint: Checkpoint, samples: int) -> list[float] | None:
        """Of the check at so many samples; None where there was none of these budgets."""
        same = {"samples": samples, "avg_bits": list(self.avg_bits)}
        found = (check["regrets"] for check in checkpoint.checks if same.items() <= check.items())
        return next(found, None)

    def _check(self, checkpoint: Checkpoint) -> None:
        from ..solver import regret_bounds  # takes a moment, and most runs need no solver

        started = time.perf_counter()
        assert checkpoint.groups is not None
        keep = finite_candidates(checkpoint.total, self.candidates)
        regrets = regret_bounds(checkpoint.groups.begun.numpy(), self.candidates, keep, self.avg_bits)
        samples = checkpoint.total.samples
        checkpoint.checks.append({"samples": samples, "avg_bits": list(self.avg_bits), "regrets": list(regrets)})
        self.seconds += time.perf_counter() - started
