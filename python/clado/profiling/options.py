"""The arguments of a profile, checked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common import USABLE, require, usable
from ..graph import LOW_PRECISIONS, PRECISIONS, ForwardStep
from ..quant import Quantizer, check_bits
from .estimators import ESTIMATORS
from .losses import LossFunc

LOSSES = ("kl", "cross_entropy")


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`profile`, checked."""

    bits: tuple[int, ...]
    estimator: str
    loss: str
    loss_func: LossFunc | None
    forward_step: ForwardStep | None
    precision: str
    num_samples: int
    exact_samples: int | None
    batch_size: int | None
    max_memory: int | None
    quantizer: Quantizer
    act_bits: int | None
    act_samples: int | None
    ignore: tuple[str, ...]
    quantize_ends: bool
    output_dir: Path | None
    device: torch.device | None
    seed: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        losses = LOSSES if self.loss_func is None else ("user",)
        for name, known in (("estimator", tuple(ESTIMATORS)), ("loss", losses), ("precision", (*PRECISIONS, "auto"))):
            value = getattr(self, name)
            require(value in known, "profile", name, f"be one of {', '.join(known)}", repr(value))
        if self.loss_func is not None:
            usable = [name for name, known in ESTIMATORS.items() if not known.needs_logits]
            must = f"be one of {', '.join(usable)} with loss_func"
            require(self.estimator in usable, "profile", "estimator", must, self.estimator)
        must = "be float32 or float64 for the gradient estimator (a backward carries no differences)"
        carries = ESTIMATORS[self.estimator].carries or self.precision not in LOW_PRECISIONS
        require(carries, "profile", "precision", must, repr(self.precision))
        for name in ("num_samples", "exact_samples", "batch_size", "max_memory", "act_samples"):
            value = getattr(self, name)
            fits = value is None or (isinstance(value, (int, np.integer)) and int(value) >= 1)
            require(fits, "profile", name, "be a whole number from 1 up", value)
        seeds = isinstance(self.seed, (int, np.integer)) and -(2**63) <= int(self.seed) < 2**64
        require(seeds, "profile", "seed", "be a whole number of 64 bits", self.seed)

    @staticmethod
    def of(
        *,
        bits: Sequence[int],
        loss: str,
        loss_func: LossFunc | None,
        group_size: int,
        scale_steps: int,
        symmetric: bool,
        ignore: Sequence[str],
        output_dir: str | os.PathLike[str] | None,
        device: str | torch.device | None,
        **rest: Any,
    ) -> Options:
        """From the arguments of :func:`profile`."""
        require(isinstance(bits, Iterable), "profile", "bits", "be a sequence of widths", bits)
        place = output_dir is None or (isinstance(output_dir, (str, os.PathLike)) and str(output_dir) != "")
        require(place, "profile", "output_dir", "be a folder", repr(output_dir))
        require(device is None or usable(device), "profile", "device", USABLE, device)
        return Options(
            bits=tuple(sorted(bits)),
            loss=loss if loss_func is None else "user",
            loss_func=loss_func,
            quantizer=Quantizer(group_size, scale_steps, symmetric),
            ignore=tuple(ignore),
            output_dir=None if output_dir is None else Path(output_dir),
            device=None if device is None else torch.device(device),
            **rest,
        )

    @property
    def whole_batches(self) -> bool:
        """Whether the user's own functions get the loader's batches as they are."""
        return self.loss_func is not None or self.forward_step is not None
