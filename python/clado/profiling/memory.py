"""How much memory a chunk takes, before the run: the estimator is run on tensors without data, and what would live is summed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..graph import CarriedExecutor, Executor, Runner
from .estimators import ESTIMATORS
from .losses import Loss
from .sums import Sums


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make, and when they die.

    Attributes:
        peak: most bytes alive at once on ``device`` since the mode began, tensors from before not counted.
    """

    def __init__(self, device: torch.device, before: Any = ()) -> None:
        super().__init__()
        self.peak = 0
        self._device = device.type
        self._before = {t.untyped_storage()._cdata for t in pytree.tree_leaves(before) if isinstance(t, Tensor)}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._live = {key: item for key, item in self._live.items() if not item[0].expired()}
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == self._device:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._before and storage._cdata not in self._live:
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def chunk_bytes(
    executor: Runner,
    estimator: str,
    variants: list[list[Tensor]],
    example: Any,
    make_loss: Callable[[Any, int], Loss],
    samples: int,
    stack: int | None = None,
) -> int | None:
    """Peak bytes of live values while ``estimator`` measures a chunk; weights and their variants are not counted.

    Args:
        example: two samples, on the device.
        make_loss: the loss of a batch of so many samples.
        samples: of the chunk.
        stack: perturbations that advance together; None: all bit-widths of a layer.

    Returns:
        None for a model without a graph, or with operators that do not run without data.
    """
    if not isinstance(executor, Executor):
        return None
    captured, count = executor.captured, executor.num_layers
    pairs = estimator in ("exact", "corrected")
    chosen = _telling(executor) if pairs else list(range(count))
    device = variants[0][0].device
    # No node of the graph is changed, and no value without data may stay behind in the executor that will run.
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        known = {n: fake.from_tensor(v) if isinstance(v, Tensor) else v for n, v in captured.constants.items()}
        weights = [[fake.from_tensor(v) for v in variants[k]] for k in chosen]
        few = replace(
            captured,
            constants=known,
            layers=tuple(captured.layers[k] for k in chosen),
            sources=tuple(captured.sources[k] for k in chosen),
        )
        carried = isinstance(executor, CarriedExecutor)
        runner = CarriedExecutor(few, executor.precision.name, device) if carried else Executor(few)  # type: ignore[attr-defined]
        runner.stack = stack
        runner._flops, runner._forward_flops = [1.0] * len(runner._flops), 1.0
        batch = pytree.tree_map(lambda t: t.new_empty((samples, *t.shape[1:])), example)
        try:
            with warnings.catch_warnings(), LiveBytes(device, (known, weights, batch)) as live:
                warnings.simplefilter("ignore")  # addresses of tensors without data
                ESTIMATORS[estimator](runner, weights, batch, make_loss(batch, samples), lambda: None)
        except Exception:  # whatever an operator says to tensors without data
            return None
    inputs = sum(t.nbytes for t in pytree.tree_leaves(batch))
    missing = (count - len(chosen)) * len(variants[0])
    every, some = (_sums_bytes(v, estimator) for v in (count * len(variants[0]), len(chosen) * len(variants[0])))
    classes = captured.outputs[0].meta["val"].shape[-1] if pairs else 0
    logits = missing * samples * int(classes) * 2 * variants[0][0].element_size()
    return live.peak + inputs + (every - some) + logits


def run_bytes(model_tensors: Any, variants: list[list[Tensor]], estimator: str) -> int:
    """Bytes that are there from the first chunk to the last: weights, their variants and, on a CPU, the sums."""
    tensors = [t for t in pytree.tree_leaves((list(model_tensors), variants)) if isinstance(t, Tensor)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    sums = _sums_bytes(sum(map(len, variants)), estimator) if variants[0][0].device.type == "cpu" else 0
    return sum(storages.values()) + sums


def disk_bytes(candidates: int, samples: int, estimator: str) -> int:
    """Bytes that a run directory takes: running sums and the matrix, and once more while one of them is replaced."""
    matrix = 8 * (2 * candidates**2 + candidates + samples)
    return 2 * (_sums_bytes(candidates, estimator) + 8 * samples) + matrix


def _telling(executor: Executor) -> list[int]:
    """Layers whose pairs show the largest live sets: the first and the last of every shape."""
    shapes = [layer.shape for layer in executor.layers]
    first = {shape: k for k, shape in reversed(list(enumerate(shapes)))}
    return sorted({*first.values(), *{shape: k for k, shape in enumerate(shapes)}.values()})


def _sums_bytes(candidates: int, estimator: str) -> int:
    sums = Sums.zeros(1)
    parts = sum(1 for value in vars(sums).values() if isinstance(value, Tensor) and value.dim() == 2 and value.numel())
    parts += 4 if estimator == "corrected" else 0
    return 8 * (parts * candidates**2 + 2 * candidates)
