"""What a run will cost, before it runs: forward-equivalents of every estimator, shared by ranks, and the plan that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from ..graph import Runner
from .estimators import ESTIMATORS, Later, Passes

# How much longer a chunk is thought to take where ranks share it: they wait for each other.
_SHARING = 1.05


@dataclass(frozen=True)
class Work:
    """What each chunk of a run is measured by, and what that costs in forward-equivalents.

    Attributes:
        runner: whose shares of a forward are counted.
        counts: candidates of each layer.
        main, exact_samples: the estimator, and how many samples pay for it; None: all.
        size: samples of a chunk.
        later: for every layer the layers behind it that it is paired with; None: all of them.
    """

    runner: Runner
    counts: Sequence[int]
    main: str
    exact_samples: int | None
    size: int
    later: Later | None = None

    def estimator(self, first: int) -> str:
        """What the chunk that starts at a sample is measured by."""
        pays = self.exact_samples is None or first < self.exact_samples
        return self.main if pays else ESTIMATORS[self.main].otherwise or self.main

    def of_chunk(self, first: int, samples: int) -> float:
        return samples * self._cost(self.estimator(first), 1)

    def total(self, samples: int) -> float:
        """Of so many samples."""
        costs, starts = self._costs(1), range(0, samples, self.size)
        return sum(min(self.size, samples - first) * costs[self.estimator(first)] for first in starts)

    def members(self, world: int, samples: int, done: int) -> int:
        """How many of the ranks measure a chunk together, so that the run ends soonest; the fewest where it is the same.

        ``done``: how many of the samples are measured.
        """
        divisors = [m for m in range(1, min(world, len(self.counts)) + 1) if world % m == 0]
        return min(divisors, key=lambda m: self.path(world // m, m, samples, done) * (_SHARING if m > 1 else 1.0))

    def path(self, groups: int, members: int, samples: int, done: int) -> float:
        """Of the rank that has most to do in every round, added up."""
        costs = self._costs(members)
        left = [(a, min(self.size, samples - a)) for a in range(0, samples, self.size)]
        work = [count * costs[self.estimator(a)] if a + count > done else 0.0 for a, count in left]
        return sum(max(work[a : a + groups]) for a in range(0, len(work), groups))

    def _costs(self, members: int) -> dict[str, float]:
        names = {self.main, ESTIMATORS[self.main].otherwise or self.main}
        return {name: self._cost(name, members) for name in names}

    def _cost(self, estimator: str, members: int) -> float:
        """Per sample, of the rank that has most to do where so many share them."""
        runner = self.runner
        shares = runner.forward_share, runner.suffix_share
        slopes = partial(runner.slope_share, self.counts)
        passes = Passes(*shares, self.counts, members, self.later, slopes, runner.held)
        return ESTIMATORS[estimator].work(passes)


@dataclass(frozen=True)
class RunPlan:
    """What a run will cost.

    Attributes:
        layers, candidates: L and V; bits: candidate widths; schemes: what people read for the schemes, as in a sentence.
        samples: at most; finished: of them, in an interrupted run.
        evaluations: losses per sample by the definition.
        forward_equivalents: of all samples.
        seconds: about, from a short probe of this machine.
        batch_size: samples of a chunk; together: how many of them advance at a time, with ``stack`` perturbations.
        fixed_bytes: weights, variants, sums; chunk_bytes: live values at most, None where they cannot be planned.
        moment_bytes: of the second moments that decide the rounding, before the run; 0 where it needs none.
        group_bytes: of the sums over groups of chunks that ``until_stable`` needs, in memory and on disk; 0 without it.
        disk_bytes: of the run directory.
        held: candidates whose outputs are there at once; None: all.
        loss: the loss, in words.
    """

    estimator: str
    layers: int
    bits: tuple[int, ...]
    candidates: int
    samples: int
    finished: int
    evaluations: int
    forward_equivalents: float
    seconds: float
    batch_size: int
    together: int
    stack: int
    fixed_bytes: int
    chunk_bytes: int | None
    disk_bytes: int
    moment_bytes: int = 0
    group_bytes: int = 0
    held: int | None = None
    loss: str = ""
    notes: tuple[str, ...] = ()
    schemes: str = ""

    def __str__(self) -> str:
        live = "unknown" if self.chunk_bytes is None else _size(self.chunk_bytes)
        total = "" if self.chunk_bytes is None else f", {_size(self.fixed_bytes + self.chunk_bytes)} in all"
        lines = (
            ("layers", f"{self.layers} {self.schemes}, {self.candidates} candidates"),
            ("samples", f"{self.samples:,}" + (f", {self.finished:,} of them finished" if self.finished else "")),
            *([("loss", self.loss)] if self.loss else []),
            ("evaluations", f"{self.evaluations:,} per sample ({self.estimator})"),
            (
                "forwards",
                f"{self.forward_equivalents / self.samples:,.1f} per sample, {self.forward_equivalents:,.0f} in all",
            ),
            ("time", f"about {timedelta(seconds=round(self.seconds))}" if self.seconds >= 1 else "about a second"),
            ("at a time", f"{self.together} samples, {self.stack} perturbations; chunks of {self.batch_size} samples"),
            *([("outputs", f"{self.held:,} candidates' at a time, later ones run again")] if self.held else []),
            ("memory", f"{_size(self.fixed_bytes)} weights and variants, {live} live values{total}"),
            *([("moments", f"{_size(self.moment_bytes)} before the run")] if self.moment_bytes else []),
            *([("groups", f"{_size(self.group_bytes)} of memory and on disk")] if self.group_bytes else []),
            ("disk", _size(self.disk_bytes)),
            *(("note", note) for note in self.notes),
        )
        return "\n".join(f"{name:12} {text}" for name, text in lines)


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
