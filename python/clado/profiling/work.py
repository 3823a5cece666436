"""What a run will cost, before it runs: forward-equivalents of every estimator, shared by ranks, and the plan that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from ..graph import Runner
from .share import longest

Later = Sequence[Sequence[int]]
# How much longer a chunk is thought to take where ranks share it: they wait for each other.
_SHARING = 1.05


@dataclass(frozen=True)
class Work:
    """What each chunk of a run is measured by, and what that costs in forward-equivalents.

    Attributes:
        runner: whose shares of a forward are counted.
        counts: candidates of each layer.
        main, exact_samples: the estimator, and how many samples pay for it; None: all. Others are measured by "logit".
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
        return self.main if self.exact_samples is None or first < self.exact_samples else "logit"

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
        return {name: self._cost(name, members) for name in (self.main, "logit")}

    def _cost(self, estimator: str, members: int) -> float:
        """Per sample, of the rank that has most to do where so many share them."""
        slopes = self.runner.slope_share(self.counts) if estimator == "gradient" else ()
        shares = self.runner.forward_share, self.runner.suffix_share
        return expected_work(estimator, *shares, self.counts, members, self.later, slopes)


def expected_work(
    estimator: str,
    whole: float,
    suffix: Sequence[float],
    counts: Sequence[int],
    members: int = 1,
    later: Later | None = None,
    slopes: Sequence[float] = (),
) -> float:
    """Forward-equivalents per sample.

    Args:
        whole, suffix: the share of the model's own forward that a clean pass takes, and what of it lies behind each layer's cut.
        counts: candidates of each layer.
        members: ranks that share a chunk; the work is that of the one that has most to do.
        later: as for :class:`Work`.
        slopes: :meth:`~clado.graph.Runner.slope_share`, for ``gradient``.
    """
    if estimator == "gradient":  # one clean forward and backward
        return 2 * whole + longest(gradient_work(suffix, slopes or [0.0] * len(suffix), counts), members)
    work = whole + longest(single_work(suffix, counts), members)
    if estimator in ("diagonal", "logit"):
        return work
    later = every_pair(len(suffix)) if later is None else later
    # The pairs walk the prefix once more, up to the cut of the last layer that has one behind it.
    walk = max((whole - share for share, behind in zip(suffix, later, strict=True) if behind), default=0.0)
    return work + walk + longest(pair_work(suffix, counts, later), members)


def every_pair(layers: int) -> Later:
    """For every layer all layers behind it."""
    return [range(i + 1, layers) for i in range(layers)]


def single_work(suffix: Sequence[float], counts: Sequence[int]) -> list[float]:
    """Forward-equivalents of each layer's perturbations."""
    return [count * share for count, share in zip(counts, suffix, strict=True)]


def pair_work(suffix: Sequence[float], counts: Sequence[int], later: Later) -> list[float]:
    """Forward-equivalents of all pairs whose first layer is i, for every i; each walks up to its last layer's cut."""
    walks = (suffix[i] - suffix[max(behind)] if behind else 0.0 for i, behind in enumerate(later))
    pairs = (sum(counts[j] * suffix[j] for j in behind) for behind in later)
    return [count * (walk + rest) for count, walk, rest in zip(counts, walks, pairs, strict=True)]


def gradient_work(suffix: Sequence[float], slopes: Sequence[float], counts: Sequence[int]) -> list[float]:
    """As for pairs, by one backward by the inputs and one by the weights, from the next layer on."""
    behind = [2 * after + more for after, more in zip(suffix[1:], slopes[1:], strict=True)]
    return [count * (share + rest) for count, share, rest in zip(counts, suffix, [*behind, 0.0], strict=True)]


@dataclass(frozen=True)
class RunPlan:
    """What a run will cost.

    Attributes:
        layers, candidates: L and V; bits: candidate widths.
        samples: at most; finished: of them, in an interrupted run.
        evaluations: losses per sample by the definition.
        forward_equivalents: of all samples.
        seconds: about, from a short probe of this machine.
        batch_size: samples of a chunk; together: how many of them advance at a time, with ``stack`` perturbations.
        fixed_bytes: weights, variants, sums; chunk_bytes: live values at most, None where they cannot be planned.
        disk_bytes: of the run directory.
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
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        live = "unknown" if self.chunk_bytes is None else _size(self.chunk_bytes)
        total = "" if self.chunk_bytes is None else f", {_size(self.fixed_bytes + self.chunk_bytes)} in all"
        lines = (
            ("layers", f"{self.layers} at {', '.join(map(str, self.bits))} bits, {self.candidates} candidates"),
            ("samples", f"{self.samples:,}" + (f", {self.finished:,} of them finished" if self.finished else "")),
            ("evaluations", f"{self.evaluations:,} per sample ({self.estimator})"),
            (
                "forwards",
                f"{self.forward_equivalents / self.samples:,.1f} per sample, {self.forward_equivalents:,.0f} in all",
            ),
            ("time", f"about {timedelta(seconds=round(self.seconds))}" if self.seconds >= 1 else "about a second"),
            ("at a time", f"{self.together} samples, {self.stack} perturbations; chunks of {self.batch_size} samples"),
            ("memory", f"{_size(self.fixed_bytes)} weights and variants, {live} live values{total}"),
            ("disk", _size(self.disk_bytes)),
            *(("note", note) for note in self.notes),
        )
        return "\n".join(f"{name:12} {text}" for name, text in lines)


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
