"""What a run will cost, before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta


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
