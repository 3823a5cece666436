"""A finish on the way: what is done lies in a folder, so that the same call goes on after an interruption, to the same bits."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..artifacts import Plan
from ..common import atomic_file, read_safetensors
from ..quant import NUMBERS, Quantized, joined, parted
from .compensation import Finished

FINISH_FILE = "finish.safetensors"
SECONDS = 20.0  # between two writes at least: what is lost is no more than that
_HEADER = "clado.finish"


@dataclass(frozen=True)
class Kept:
    """Where a finish stood.

    Attributes:
        stage, blocks: which stage, and how many of its blocks are done.
        losses: of the stages before; taken: which of them has the best weights.
        best: the best weights of the stages before; None: the plan's own.
        now: the weights of this stage so far.
    """

    stage: int
    blocks: int
    losses: dict[str, float]
    taken: str
    best: Finished | None
    now: Finished


class Progress:
    """What a folder keeps of a finish; with ``folder=None`` nothing.

    Args:
        folder: the run directory.
        settings: digest of all that decides the result: what another finish left is not gone on with.
        plan: whose weights.
        device: where they are wanted.
    """

    def __init__(self, folder: Path | None, settings: str, plan: Plan, device: torch.device) -> None:
        self.path = None if folder is None else folder / FINISH_FILE
        self.settings, self.plan, self.device = settings, plan, device
        self._written = time.monotonic()

    def read(self) -> Kept | None:
        """Where the same finish stood; None where there is none, or a damaged file."""
        from safetensors import SafetensorError

        if self.path is None or not self.path.exists():
            return None
        try:
            metadata, held = read_safetensors(self.path)
            header = json.loads(metadata.get(_HEADER, "{}"))
            if header.get("settings") != self.settings:
                return None
            tensors = {name: value.to(self.device) for name, value in held.items()}
            best = self._finished(tensors, "best") if header["best"] else None
            now = self._finished(tensors, "now")
            return Kept(header["stage"], header["blocks"], header["losses"], header["taken"], best, now)
        except (SafetensorError, OSError, ValueError, KeyError):
            return None

    def keep(self, kept: Kept) -> None:
        """Write where it stands, unless that was done a moment ago."""
        from safetensors.torch import save_file

        if self.path is None or time.monotonic() - self._written < SECONDS:
            return
        tensors = _named("now", kept.now) | ({} if kept.best is None else _named("best", kept.best))
        header = {
            "settings": self.settings,
            "stage": kept.stage,
            "blocks": kept.blocks,
            "losses": kept.losses,
            "taken": kept.taken,
            "best": kept.best is not None,
        }
        with atomic_file(self.path) as temporary:
            save_file(tensors, temporary, {_HEADER: json.dumps(header)})
        self._written = time.monotonic()

    def end(self) -> None:
        """Nothing is on the way any more."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _finished(self, tensors: Mapping[str, Tensor], which: str) -> Finished:
        start = f"{which}/"
        packed, others = parted({n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)})
        shapes, quantizer = {layer.name: layer.shape for layer in self.plan.layers}, self.plan.quantizer
        weights = {}
        for (layer, name), parts in packed.items():
            weights[layer] = Quantized.unpacked(NUMBERS[name], shapes[layer], parts, quantizer)
        return Finished(weights, others)


def _named(which: str, finished: Finished) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, each of its own storage."""
    tensors = joined(finished.packed(), finished.others)
    return {f"{which}/{name}": value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
