"""Rounded inputs: their ranges, and what rounding them costs before any weight is quantized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common import progress_bar, sample_count
from ..graph import Runner, converted
from ..quant import ActivationRanges, Candidates, calibrate, calibrate_inputs
from .reader import Reader, first_of_batch
from .samples import SampleStream

# Samples that calibrate ranges at most; batches of them at most, and samples of a batch at least.
ACT_SAMPLES, ACT_STEPS, ACT_BATCH = 1024, 64, 8


@dataclass(frozen=True)
class InputLoss:
    """How much the loss rises when the inputs of layers are rounded and no weight is: no entry of the matrix holds it.

    Attributes:
        mean, stderr: over samples.
        samples: how many.
    """

    mean: float
    stderr: float
    samples: int

    def words(self, bits: int) -> str:
        shown = f"{self.mean:.3g} ± {self.stderr:.1g} ({self.samples} samples)"
        return f"rounding inputs to {bits} bits raises the loss by {shown}; the matrix and plans' predictions leave that out"


def calibrated(
    model: nn.Module,
    candidates: Candidates,
    stream: SampleStream,
    reader: Reader,
    bits: int | None,
    samples: int,
    verbose: bool,
) -> ActivationRanges:
    """Ranges of the inputs of layers on the first samples of the set: all of ``bits`` bits; None: as the candidates need them."""
    with progress_bar("calibrate", samples, "samples", verbose) as show:

        def batches() -> Iterator[Any]:
            done = 0
            for part in _early(stream, samples):
                yield reader.moved(reader.parts(part)[0])
                done += sample_count(part)
                show(done)

        moved = converted(model, reader.device, reader.dtype)
        step = reader.step or first_of_batch
        if bits is None:
            return calibrate_inputs(moved, batches(), step, candidates)
        return calibrate(moved, batches(), step, candidates.layers, bits)


def input_loss(plain: Runner, rounded: Runner, stream: SampleStream, reader: Reader, samples: int) -> InputLoss:
    """From a runner of the float model and one whose inputs are rounded."""
    found = torch.cat([_increases(plain, rounded, part, reader) for part in _early(stream, samples)])
    stderr = (found.std() / len(found) ** 0.5).item() if len(found) > 1 else float("nan")
    plain.work = rounded.work = 0.0
    return InputLoss(found.mean().item(), stderr, len(found))


def _increases(plain: Runner, rounded: Runner, part: Any, reader: Reader) -> Tensor:
    inputs, targets = reader.parts(part)
    moved = reader.moved(inputs)
    loss = reader.of_batch(moved, targets, sample_count(moved))
    clean, changed = (runner.outputs(runner.start(moved))[0] for runner in (plain, rounded))
    return loss.increase_over(loss.reference(clean), changed)


def _early(stream: SampleStream, samples: int) -> Iterator[Any]:
    return stream.early(samples, max(ACT_BATCH, -(-samples // ACT_STEPS)))
