"""How much is measured at a time: as many samples, and as many perturbations of a layer, as memory holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..common import require
from ..graph import Runner, Variants
from ..quant import Layer
from .estimators import ESTIMATORS
from .losses import Loss
from .sums import Sums


class Pieces:
    """The samples that advance together, and how many perturbations of a layer do.

    Args:
        runner: in which the number of perturbations is set.
        estimator: what is planned for.
        variants: gives all layers' quantized weights; asked for where memory is planned, and not before.
        widest: candidates of the layer that has most.
        tensors: the model's own, on the device.
        example: two samples, on the device.
        make_loss: the loss of a batch of so many samples.
        elements: values of a sample's output that the loss looks at.
        together: samples, to begin with.
        own_bytes: what the run keeps on the CPU beside its sums.
    """

    def __init__(
        self,
        runner: Runner,
        estimator: str,
        variants: Callable[[], Variants],
        widest: int,
        tensors: Sequence[Tensor],
        example: Any,
        make_loss: Callable[[Any, int], Loss],
        elements: int,
        together: int,
        own_bytes: int = 0,
    ) -> None:
        self.runner, self.estimator, self.variants, self.widest = runner, estimator, variants, widest
        self.tensors, self.example, self.make_loss, self.elements = tensors, example, make_loss, elements
        self.together, self.own_bytes = together, own_bytes

    @property
    def stack(self) -> int:
        return self.runner.stack or self.widest

    @property
    def count(self) -> int:
        """Candidates."""
        return sum(map(len, self.variants()))

    @property
    def held(self) -> int:
        """Candidates whose outputs are there at once."""
        return self.runner.held or self.count

    @property
    def now(self) -> list[int]:
        """[samples, perturbations] at a time, and where not all candidates' outputs are there at once, of how many they are."""
        return [self.together, self.stack, *([] if self.runner.held is None else [self.runner.held])]

    def set(self, together: int, stack: int, held: int | None = None) -> None:
        self.together, self.runner.stack, self.runner.held = together, stack, held or None

    def fit(self, max_memory: int | None, device: torch.device) -> None:
        """Let fewer samples, then fewer perturbations advance together until the memory suffices."""
        if max_memory is None and device.type != "cuda":
            return
        fixed = self.fixed_bytes()
        limit = fixed + int(0.9 * torch.cuda.mem_get_info(device)[0]) if max_memory is None else max_memory
        need = self.chunk_bytes()
        while need is not None and fixed + need > limit:
            shown = f"{(fixed + need) / 2**20:,.0f} MiB for one sample and one perturbation"
            less = self.halve(self.together)
            require(less, "profile", "max_memory", "hold the weights, their variants and one sample", shown)
            need = self.chunk_bytes()

    def halve(self, samples: int) -> bool:
        """Half of so many samples, or else of the perturbations or of the outputs that are kept, whatever takes more memory, at a
        time; False where none can be less."""
        grouped, widest = ESTIMATORS[self.estimator].grouped, self.widest
        stacks, keeps = self.runner.stacks and self.stack > 1, grouped and self.held > widest
        if samples > 1:
            self.together = -(-samples // 2)
        elif keeps and (
            not stacks or self.held * self.elements * self._itemsize > self.stack * (self.runner.sample_bytes or 0)
        ):
            self.runner.held = max(widest, -(-self.held // 2))
        elif stacks:
            self.runner.stack = -(-self.stack // 2)
        else:
            return False
        return True

    @property
    def _itemsize(self) -> int:
        size: int = self.variants()[0][0].weight.element_size()
        return size

    def go_on(self, before: Sequence[int]) -> str | None:
        """Take the pieces of a run's earlier calls, so that the bits stay, or smaller ones where memory is less; what to say."""
        now, every = self.now, self.count
        held = min(before[2] if len(before) > 2 else every, self.held)
        self.set(min(before[0], now[0]), min(before[1], now[1]), held if held < every else None)
        if self.now == now:
            return None
        return (
            f"goes on as it began, {self.together} samples and {self.stack} perturbations at a time "
            f"(memory would allow {now[0]} and {now[1]})"
        )

    def fixed_bytes(self) -> int:
        """Bytes that are there from the first chunk to the last: weights, their variants and, on a CPU, the sums."""
        variants = self.variants()
        device = variants[0][0].weight.device.type
        here = [t for t in (*self.tensors, *self.runner.kept) if t.device.type == device]
        storages = [t.untyped_storage() for t in (*here, *(variant.weight for own in variants for variant in own))]
        sums = sums_bytes(sum(map(len, variants)), self.estimator) + self.own_bytes if device == "cpu" else 0
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values()) + sums

    def chunk_bytes(self) -> int | None:
        """Peak bytes of live values while samples advance together, weights and variants aside; None where nobody knows."""
        variants, samples, name, runner = self.variants(), self.together, self.estimator, self.runner
        pairs = ESTIMATORS[name].pairs
        counts = [len(own) for own in variants]
        chosen = _telling(runner.layers, counts) if pairs else list(range(runner.num_layers))

        def measure(runner: Runner, variants: Variants, batch: Any) -> None:
            ESTIMATORS[name].run(runner, variants, batch, self.make_loss(batch, samples), lambda: None)

        few = runner.only(chosen) if pairs else runner
        peak = few.rehearsed(measure, [variants[k] for k in chosen], self.example, samples)
        if peak is None:
            return None
        inputs = sum(samples * t[:1].nbytes for t in pytree.tree_leaves(self.example))
        count, tried = sum(map(len, variants)), sum(len(variants[k]) for k in chosen)
        outputs = (count - tried) * samples * self.elements * 2 * variants[0][0].weight.element_size()
        found: int | None = peak + inputs + sums_bytes(count, name) - sums_bytes(tried, name) + outputs
        return found


def default_batch(runner: Runner, widest: int, estimator: str, device: torch.device, output_bytes: int = 0) -> int:
    """Samples per chunk: as many as keep the largest stacked activation within the device's budget, and all candidates' outputs
    of them, ``output_bytes`` a sample, within ``_OUTPUT_BYTES``."""
    most = max(1, _OUTPUT_BYTES // max(1, output_bytes))
    if runner.sample_bytes is None:
        return min(32, most)
    streams = widest * widest if ESTIMATORS[estimator].pairs else widest
    budget = _STACK_BYTES.get(device.type, _STACK_BYTES["cuda"])
    return int(min(256, most, max(1, budget // (streams * runner.sample_bytes))))


# Bytes of the largest stacked activation: beyond it a CPU leaves its caches, a GPU gains nothing more.
_STACK_BYTES = {"cpu": 4 << 20, "cuda": 1 << 30}
_OUTPUT_BYTES = 1 << 30


def disk_bytes(candidates: int, samples: int, estimator: str) -> int:
    """Bytes that a run directory takes: running sums and the matrix, and once more while one of them is replaced."""
    matrix = 8 * (2 * candidates**2 + candidates + samples)
    return 2 * (sums_bytes(candidates, estimator) + 8 * samples) + matrix


def sums_bytes(candidates: int, estimator: str) -> int:
    sums = Sums.zeros(1)
    parts = sum(1 for value in vars(sums).values() if isinstance(value, Tensor) and value.dim() == 2 and value.numel())
    parts += 4 if ESTIMATORS[estimator].residual else 0
    return 8 * (parts * candidates**2 + 2 * candidates)


def _telling(layers: Sequence[Layer], counts: Sequence[int]) -> list[int]:
    """Layers whose pairs show the largest live sets: the first and the last of every shape and number of candidates."""
    shapes = [(layer.shape, count) for layer, count in zip(layers, counts, strict=True)]
    first = {shape: k for k, shape in reversed(list(enumerate(shapes)))}
    return sorted({*first.values(), *{shape: k for k, shape in enumerate(shapes)}.values()})
