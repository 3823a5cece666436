"""How much memory something takes, before it runs: it is run on tensors without data, and what would live is summed."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .streams import tensors


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make, and when they die.

    Attributes:
        peak: most bytes alive at once on ``device`` since the mode began, tensors from before not counted.
    """

    def __init__(self, device: torch.device, before: Any = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._device = device.type
        self._before = {t.untyped_storage()._cdata for t in tensors(before)}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._live = {key: item for key, item in self._live.items() if not item[0].expired()}
        for tensor in tensors(out):
            if tensor.device.type == self._device:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._before and storage._cdata not in self._live:
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out
