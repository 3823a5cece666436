"""A run from its first look at the data to the matrix: what is measured, in which pieces, and what that costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..artifacts import MATRIX_FILE, Sensitivity
from ..common import (
    CladoError,
    check_targets,
    code_digest,
    data_digest,
    digest,
    is_out_of_memory,
    moved_to,
    progress_bar,
    require,
    split_batch,
    two_samples,
    weights_digest,
)
from ..graph import (
    LOW_PRECISIONS,
    PRECISIONS,
    CarriedExecutor,
    Executor,
    ForwardStep,
    NotCapturable,
    Runner,
    WholeExecutor,
    check_finite,
    check_forward,
    check_module,
    check_output,
    converted,
    first_of_batch,
    plain_call,
)
from ..graph.capture import capture
from ..quant import ActivationRanges, calibrate, quantize_activations, variants
from .checkpoint import Checkpoint, check_writable, recorded, writing
from .distributed import Ranks
from .estimators import ESTIMATORS, Later, expected_work
from .losses import LogitLoss, Loss, UserLoss
from .memory import chunk_bytes, disk_bytes, run_bytes
from .options import Options
from .probe import SAMPLES, auto_precision, probe
from .run_plan import RunPlan
from .samples import Chunk, SampleStream
from .share import MemberFailed, Share
from .sums import Sums, assemble

# Samples that calibrate activations at most; steps of the moving average over them, and samples of a step at least.
ACT_SAMPLES, ACT_STEPS, ACT_BATCH = 1024, 32, 8
# How much longer a chunk is thought to take where ranks share it: they wait for each other.
_SHARING = 1.05
# Bytes of the largest stacked activation: beyond it a CPU leaves its caches, a GPU gains nothing more.
_STACK_BYTES = {"cpu": 4 << 20, "cuda": 1 << 30}


class Run:
    """A run that is ready to be measured: the captured model, the stream of samples, the settings that decide the result.

    Attributes:
        later: for every layer the layers behind it that it is paired with; None: all of them.
    """

    later: Later | None = None

    def __init__(self, model: nn.Module, data_loader: Iterable[Any], options: Options, verbose: bool = False) -> None:
        self.started = time.perf_counter()
        check_module(model)
        self.model, self.options = model, options
        self.measured = 0  # samples of this rank, in this call or an earlier one
        check_finite(model)
        self.stream = SampleStream(data_loader, options.num_samples, options.seed)
        first = self.stream.peek(SAMPLES)
        plain = options.forward_step is not None or isinstance(first, (Tensor, tuple, list))
        must = "be given for batches that are neither inputs nor (inputs, …)"
        require(plain or not options.whole_batches, "profile", "forward_step", must, type(first).__name__)
        known = recorded(options.output_dir)
        inputs, targets = self._parts(first)
        labelled = options.loss != "cross_entropy" or targets is not None
        require(labelled, "profile", "data_loader", "yield (inputs, targets) for cross_entropy", "inputs alone")
        self.device = options.device or next(model.parameters()).device
        if options.precision == "auto":
            options = self.options = replace(options, precision=auto_precision(self.device, options.estimator))
        self.dtype = PRECISIONS[options.precision]
        self.title = f"profile ({options.estimator})"
        self.notes: list[str] = []
        self.act_samples = options.act_samples or known.get("act_samples") or min(ACT_SAMPLES, self.stream.expected)
        self.activations = self._calibrate(verbose)
        if self.activations:
            self.model = model = quantize_activations(model, self.activations)
        self.executor = self._executor(two_samples(moved_to(inputs, self.device, self.dtype)))
        default = _default_batch(self.executor, self.width, options.estimator, self.device)
        self.size = options.batch_size or known.get("batch_size") or default
        self.example = two_samples(moved_to(inputs, self.device, self.dtype))
        few = options.exact_samples or known.get("exact_samples") or max(2, self.stream.expected // 8)
        self.exact_samples = few if options.estimator == "corrected" else None
        self.probed: dict[str, Any] = {}
        products = options.precision
        if options.precision in LOW_PRECISIONS:
            self._lower(first, known.get("products"))
            products = options.precision if isinstance(self.executor, CarriedExecutor) else "float32"
        self.together = self.size  # samples that advance together
        self._fit(known)
        self.settings = {
            "weights": weights_digest(model),
            "layers": digest([asdict(layer) for layer in self.executor.layers]),
            "bits": options.bits,
            "estimator": options.estimator,
            "exact_samples": self.exact_samples,
            "loss": options.loss if options.loss_func is None else code_digest(options.loss_func),
            "forward_step": code_digest(options.forward_step),
            "precision": options.precision,
            "products": products,
            "batch_size": self.size,
            "quantizer": options.quantizer.to_json(),
            "act_bits": options.act_bits,
            "act_samples": self.act_samples if self.activations else None,
            "act_ranges": digest(self.activations.to_json()) if self.activations else None,
            "device": self.device.type,
        }

    @property
    def _step(self) -> ForwardStep | None:
        """What runs the model on its part of a batch; None: the model itself."""
        whole = self.options.whole_batches
        return first_of_batch if self.options.forward_step is None and whole else self.options.forward_step

    def _calibrate(self, verbose: bool) -> ActivationRanges | None:
        """Ranges of the layers' inputs on the first samples of the set; None for a weight-only run."""
        options = self.options
        if options.act_bits is None:
            return None
        with progress_bar("calibrate", self.act_samples, "samples", verbose) as show:

            def batches() -> Iterator[Any]:
                size, done = max(ACT_BATCH, -(-self.act_samples // ACT_STEPS)), 0
                for part in self.stream.early(self.act_samples, size):
                    yield moved_to(self._parts(part)[0], self.device, self.dtype)
                    done += size
                    show(done)

            moved, forward = converted(self.model, self.device, self.dtype), self._step or plain_call
            return calibrate(moved, batches(), forward, options.act_bits, options.ignore, options.quantize_ends)

    def _executor(self, example: Any) -> Runner:
        """The captured graph, or whole forwards where there is none; tested on the example."""
        options = self.options
        step = self._step
        moved = converted(self.model, self.device, self.dtype)
        executor: Runner
        check_forward(moved, example, step or plain_call)
        try:
            executor = Executor(capture(moved, example, options.ignore, options.quantize_ends, step))
            output = executor.self_test(example, partial(step or plain_call, moved))
        except NotCapturable as error:
            executor = WholeExecutor(moved, example, options.ignore, options.quantize_ends, step)
            output = executor.self_test(example)
            reason = f"since the model has no usable graph ({error})"
            self.notes.append(f"whole forwards for every perturbation, {reason}")
        self.classes = check_output(output, options.loss)
        return executor

    def _lower(self, first: Any, decided: str | None) -> None:
        """Carry differences in a low precision where a probe finds its errors below the sampling noise.

        ``decided``: what an earlier call of this run found; a run keeps to it.
        """
        precision = self.options.precision
        if not isinstance(self.executor, Executor):
            self.notes.append(
                f"float32 instead of {precision}: differences are carried through a graph, and there is none"
            )
            return
        inputs, targets = self._parts(first)
        found = probe(
            self.executor.captured,
            self.variants,
            moved_to(inputs, self.device, torch.float32),
            lambda batch: self._loss(batch, targets, len(pytree.tree_leaves(batch)[0])),
            self.options.estimator,
            precision,
            self.stream.expected,
        )
        self.probed = {"probe": found}
        if found["good"] if decided is None else decided == precision:
            self.executor = CarriedExecutor(self.executor.captured, precision, self.device, self.executor)
            return
        self.notes.append(
            f"float32 instead of {precision}: the probe's error of ΔL is {found['loss_error']:.1e} and of Ω "
            f"{found['pair_error']:.1e}, the sampling noise {found['loss_noise']:.1e} and {found['pair_noise']:.1e}"
        )

    def _fit(self, known: dict[str, Any]) -> None:
        """Let fewer samples, then fewer perturbations advance together until the memory suffices."""
        options, limit = self.options, self.options.max_memory
        if limit is None and self.device.type != "cuda":
            return
        fixed = self.fixed_bytes()
        if limit is None:
            limit = fixed + int(0.9 * torch.cuda.mem_get_info(self.device)[0])
        need = self.chunk_bytes()
        while need is not None and fixed + need > limit:
            if self.together > 1:
                self.together = -(-self.together // 2)
            elif isinstance(self.executor, Executor) and self._stack > 1:
                self.executor.stack = -(-self._stack // 2)
            else:
                shown = f"{(fixed + need) / 2**20:,.0f} MiB for one sample and one perturbation"
                require(False, "profile", "max_memory", "hold the weights, their variants and one sample", shown)
            need = self.chunk_bytes()
        if options.batch_size is None and "batch_size" not in known:
            self.size = self.together

    @property
    def _stack(self) -> int:
        return getattr(self.executor, "stack", None) or self.width

    def _set_pieces(self, together: int, stack: int) -> None:
        self.together = together
        if isinstance(self.executor, Executor):
            self.executor.stack = stack

    def _go_on(self, pieces: Sequence[Sequence[int]]) -> None:
        """Take the pieces of the run's earlier calls, so that the bits stay, or smaller ones where memory is less now."""
        if not pieces:
            return
        now, before = (self.together, self._stack), tuple(pieces[-1])
        self._set_pieces(*map(min, before, now))
        if (self.together, self._stack) != now:
            self.notes.append(
                f"goes on as it began, {self.together} samples and {self._stack} perturbations at a time "
                f"(memory would allow {now[0]} and {now[1]})"
            )

    def fixed_bytes(self) -> int:
        """Bytes of weights, variants and sums."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if isinstance(self.executor, Executor):
            tensors += [t for t in self.executor.captured.constants.values() if isinstance(t, Tensor)]
        here = [t for t in tensors if t.device.type == self.device.type]
        return run_bytes(here, self.variants, self.options.estimator)

    def chunk_bytes(self) -> int | None:
        """Peak bytes of live values while samples advance together; None where it cannot be planned."""
        return chunk_bytes(
            self.executor,
            self.options.estimator,
            self.variants,
            self.example,
            lambda batch, samples: self._loss(batch, self._labels(samples), samples),
            self.together,
            getattr(self.executor, "stack", None),
        )

    def _labels(self, samples: int) -> Tensor | None:
        """Labels that only have a shape, for the cross-entropy."""
        wanted = self.options.loss == "cross_entropy"
        return torch.zeros(samples, dtype=torch.int64) if wanted else None

    @cached_property
    def variants(self) -> list[list[Tensor]]:
        """All layers' weights at every bit-width."""
        layers, options = self.executor.layers, self.options
        return variants(self.model, layers, [options.bits] * len(layers), options.quantizer, self.device, self.dtype)

    @property
    def width(self) -> int:
        """Candidates of a layer."""
        return len(self.options.bits)

    @property
    def candidates(self) -> int:
        """V."""
        return len(self.executor.layers) * self.width

    def estimator(self, first: int) -> str:
        """What the chunk that starts at a sample is measured by."""
        pays = self.exact_samples is None or first < self.exact_samples
        return self.options.estimator if pays else "logit"

    def work(self, first: int, samples: int) -> float:
        """Forward-equivalents of a chunk."""
        return samples * self.cost(self.estimator(first))

    def cost(self, estimator: str, members: int = 1) -> float:
        """Forward-equivalents per sample; of the rank that has most to do where so many share them."""
        executor = self.executor
        slopes = executor.slope_share(self.width) if estimator == "gradient" else ()
        shares = executor.forward_share, executor.suffix_share
        return expected_work(estimator, *shares, self.width, members, self.later, slopes)

    def costs(self, members: int = 1) -> dict[str, float]:
        """:meth:`cost` of every estimator that the run's chunks are measured by."""
        return {name: self.cost(name, members) for name in (self.options.estimator, "logit")}

    def total_work(self, samples: int) -> float:
        """Forward-equivalents of so many samples."""
        costs, starts = self.costs(), range(0, samples, self.size)
        return sum(min(self.size, samples - first) * costs[self.estimator(first)] for first in starts)

    def members(self, world: int, done: int) -> int:
        """How many of the ranks measure a chunk together, so that the run ends soonest; the fewest where it is the same.

        ``done``: samples that are measured.
        """
        divisors = [m for m in range(1, min(world, len(self.executor.layers)) + 1) if world % m == 0]
        return min(divisors, key=lambda m: self._path(world // m, m, done) * (_SHARING if m > 1 else 1.0))

    def _path(self, groups: int, members: int, done: int) -> float:
        """Forward-equivalents of the rank that has most to do in every round, added up."""
        count = self.stream.expected
        costs = self.costs(members)
        left = [(a, min(self.size, count - a)) for a in range(0, count, self.size)]
        work = [samples * costs[self.estimator(a)] if a + samples > done else 0.0 for a, samples in left]
        return sum(max(work[a : a + groups]) for a in range(0, len(work), groups))

    def plan(self) -> RunPlan:
        """What :meth:`measure` would cost; a few layers are run for the time."""
        options, count = self.options, self.stream.expected
        checkpoint = Checkpoint(options.output_dir, self.settings, self.size, self.candidates)
        finished = min(count, checkpoint.total.samples)
        if finished < count:
            self._go_on(checkpoint.pieces)
        world = Ranks(self.device).world
        members = self.members(world, finished)
        work = self._path(world // members, members, finished)
        shared = f"{members} of {world} ranks measure each chunk together" if members > 1 else ""
        width, layers = self.width, len(self.executor.layers)
        pairs = width**2 * layers * (layers - 1) // 2 if options.estimator in ("exact", "corrected") else 0
        return RunPlan(
            estimator=options.estimator,
            layers=layers,
            bits=options.bits,
            candidates=self.candidates,
            samples=count,
            finished=finished,
            evaluations=1 + self.candidates + pairs,
            forward_equivalents=self.total_work(count),
            seconds=work / self._throughput() if work else 0.0,
            batch_size=self.size,
            together=self.together,
            stack=self._stack,
            fixed_bytes=self.fixed_bytes(),
            chunk_bytes=self.chunk_bytes(),
            disk_bytes=disk_bytes(self.candidates, count, options.estimator),
            notes=(*self.notes, shared) if shared else tuple(self.notes),
        )

    def _throughput(self) -> float:
        """Forward-equivalents per second, by stacked forwards from a few cuts; the second of two rounds counts."""
        repeats = -(-self.together // 2)
        batch = pytree.tree_map(lambda t: torch.cat([t] * repeats)[: self.together], self.example)
        runner, count = self.executor, self.executor.num_layers
        speed = 0.0
        for _ in range(2):
            begin, before = time.perf_counter(), runner.work
            for k in sorted({0, count // 2, count - 1}):
                state = runner.advance(runner.start(batch), k)
                output = runner.outputs(runner.fork(state, k, self.variants[k][: self._stack]))
            pytree.tree_map(lambda t: t.cpu(), output)
            speed = (runner.work - before) / (time.perf_counter() - begin)
        runner.work = 0.0
        return speed

    def measure(self, verbose: bool) -> Sensitivity:
        """Measure what is not finished yet; on every rank the same result."""
        ranks = Ranks(self.device)
        if not ranks.writes:
            self.gather(ranks, Checkpoint(None, self.settings, self.size, self.candidates), 0, False)
            return ranks.receive(Sensitivity.load, MATRIX_FILE)
        folder = self.options.output_dir
        if folder is not None:
            check_writable(folder)
        checkpoint = Checkpoint(folder, self.settings, self.size, self.candidates)
        known = earlier_result(folder, self.settings)
        if known is not None and known.num_samples > len(checkpoint.expected):
            checkpoint.expected = torch.from_numpy(known.sample_digests)
        seen = self.gather(ranks, checkpoint, 0 if known is None else known.num_samples, verbose)
        if known is None or seen != known.num_samples:
            checkpoint.check_end(seen)
            known = self._result(checkpoint, ranks)
            if folder is not None:
                with writing(folder):
                    known.save(folder / MATRIX_FILE)
        ranks.send(known.save)
        return known

    def gather(self, ranks: Ranks, checkpoint: Checkpoint, end: int, verbose: bool) -> int:
        """Bring the checkpoint to the end of the stream; returns how many samples that are. Rank 0 keeps the books.

        ``end``: samples of the finished result in the directory, 0 without one; its last, short chunk is not in the checkpoint.
        """
        ranks.check_same(self.settings)
        done = checkpoint.total.samples
        self._go_on(checkpoint.pieces)
        wanted = [done, end, self.members(ranks.world, done), self.together, self._stack]
        done, end, members, *pieces = ranks.agree(wanted)
        ranks.join(members)
        if members == 1:  # who share a chunk take it in the same pieces, others in their own where memory is less
            pieces = [min(own, first) for own, first in zip((self.together, self._stack), pieces, strict=True)]
        self._set_pieces(*pieces)
        seen, settled = 0, 0.0
        total = self.total_work(self.stream.expected)
        with progress_bar(self.title, total, "forwards", verbose) as show:

            def tick() -> None:
                ours = settled + (self.executor.work - settled) * members
                show(min(ours * ranks.groups, total))

            ahead = self.device.type == "cuda"
            for chunk in self.stream.chunks(self.size, ranks.group, ranks.groups, ahead=ahead):
                part = None
                if chunk is not None:
                    checkpoint.check(chunk.first, chunk.digests)
                    self.measured += chunk.samples
                    if chunk.last <= done or (chunk.last == end and chunk.samples < self.size):
                        self.executor.work += self.work(chunk.first, chunk.samples)
                    else:
                        part = self._estimate(chunk, tick, ranks.share)
                    settled = self.executor.work
                for digests, sums in ranks.collect(chunk, part, checkpoint.total, self.size):
                    checkpoint.check(seen, digests)
                    seen += len(digests)
                    if sums is not None:
                        if checkpoint.pieces[-1:] != [[self.together, self._stack]]:
                            checkpoint.pieces.append([self.together, self._stack])
                        checkpoint.add(sums, digests)
                tick()
        return seen

    def _parts(self, batch: Any) -> tuple[Any, Tensor | None]:
        """(what the model is run on, labels or None) of one of the loader's batches."""
        if not self.options.whole_batches:
            return split_batch(batch)
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        labels = batch[1] if pair and isinstance(batch[1], Tensor) and batch[1].dim() == 1 else None
        return batch, None if labels is None or labels.is_floating_point() else labels

    def _loss(self, inputs: Any, targets: Tensor | None, samples: int) -> Loss:
        if self.options.loss_func is not None:
            return UserLoss(self.options.loss_func, inputs, samples)
        check_targets(targets, self.classes)
        labels = targets if self.options.loss == "cross_entropy" else None
        return LogitLoss(None if labels is None else labels.to(self.device, torch.int64))

    def _estimate(self, chunk: Chunk, tick: Callable[[], None], share: Share) -> Sums:
        """Sums of a chunk; samples advance together as memory allows, and halves where it did not on any member."""
        name, done, parts = self.estimator(chunk.first), 0, []
        while done < chunk.samples:
            inputs, targets = self._parts(pytree.tree_map(lambda t, a=done: t[a : a + self.together], chunk.batch))
            count = min(self.together, chunk.samples - done)
            before = self.executor.work
            try:
                moved = moved_to(inputs, self.device, self.dtype)
                loss = self._loss(moved, targets, count)
                parts.append(self._sums(name, moved, loss, tick, share).cpu().added(share))
                work = torch.tensor(self.executor.work - before, dtype=torch.float64)
                self.executor.work = before + share.added(work).item()
                done += count
            except (RuntimeError, MemoryError) as error:
                if not isinstance(error, MemberFailed):
                    if not is_out_of_memory(error):
                        raise
                    share.any_failed(True)
                self._halve(count, error)
        total = parts[0]
        for part in parts[1:]:
            total += part
        if not torch.isfinite(total.loss).any():
            where = f"NaN or infinity among samples {chunk.first}..{chunk.last - 1}; finished chunks are kept"
            argument, must = self._not_finite(chunk.batch)
            require(False, "profile", argument, must, where)
        return total

    def _not_finite(self, batch: Any) -> tuple[str, str]:
        """(argument, what it must do) that is at fault where no candidate's loss is finite."""
        if not all(torch.isfinite(leaf).all() for leaf in pytree.tree_leaves(batch) if leaf.is_floating_point()):
            return "data_loader", "yield finite numbers"
        return (
            ("model", "return finite outputs")
            if self.options.loss_func is None
            else ("loss_func", "return finite losses")
        )

    def _sums(self, name: str, batch: Any, loss: Loss, tick: Callable[[], None], share: Share) -> Sums:
        """This share's sums over samples that advance together."""
        return ESTIMATORS[name](self.executor, self.variants, batch, loss, tick, share)

    def _halve(self, samples: int, error: BaseException) -> None:
        """After an allocation failed: half the samples, or half the perturbations, at a time."""
        if samples > 1:
            self.together = -(-samples // 2)
        elif isinstance(self.executor, Executor) and self._stack > 1:
            self.executor.stack = -(-self._stack // 2)
        else:
            raise CladoError(
                "profile: device must have memory for one sample and one perturbation, got "
                f"{str(error).splitlines()[0]}; finished chunks are kept"
            ) from error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.notes.append(f"out of memory: went on with {self.together} samples, {self._stack} perturbations at a time")

    def _result(self, checkpoint: Checkpoint, ranks: Ranks) -> Sensitivity:
        options, sums = self.options, checkpoint.total
        fingerprint = {
            "weights": str(self.settings["weights"]),
            "data": data_digest(checkpoint.digests.numpy()),
            "settings": digest(self.settings),
        }
        result = assemble(sums, self.executor.layers, options.bits, options.quantizer, fingerprint, checkpoint.digests)
        if sums.samples < options.num_samples:
            self.notes += [f"the data ended after {sums.samples} of {options.num_samples} samples"]
        if len(checkpoint.pieces) > 1:
            shown = ", then ".join(f"{together} and {stack}" for together, stack in checkpoint.pieces)
            self.notes.append(
                f"memory changed: samples and perturbations at a time were {shown}; last digits depend on it"
            )
        result = replace(result, activations=self.activations)
        result.info["warnings"] = self.notes + result.info["warnings"]
        result.info.update(
            estimator=options.estimator,
            loss=options.loss,
            precision=self.settings["products"],
            **self.probed,
            batch_size=self.size,
            device=self.device.type,
            ranks=ranks.world,
            forward_equivalents=self.executor.work / self.measured,
            expected_forward_equivalents=self.total_work(sums.samples) / sums.samples,
            exact_samples=int(sums.residual_samples) or None,
            seconds=time.perf_counter() - self.started,
            float_layers=self.executor.skipped,
        )
        return result


def _default_batch(executor: Runner, width: int, estimator: str, device: torch.device) -> int:
    """Samples per chunk: as many as keep the largest stacked activation within the device's budget."""
    if isinstance(executor, WholeExecutor):
        return 32
    per_sample = 1
    assert isinstance(executor, Executor)
    for node in executor.captured.nodes:
        value = node.meta["val"]
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            fixed = [int(size) for size in tensor.shape if not isinstance(size, torch.SymInt)]
            per_sample = max(per_sample, int(np.prod(fixed, dtype=np.int64)) * tensor.element_size())
    streams = width * width if estimator in ("exact", "corrected") else width
    budget = _STACK_BYTES.get(device.type, _STACK_BYTES["cuda"])
    return int(min(256, max(1, budget // (streams * per_sample))))


def earlier_result(output_dir: Path | None, settings: dict[str, Any]) -> Sensitivity | None:
    """The result that the run directory holds, None where there is none; another run's is refused."""
    if output_dir is None or not (output_dir / MATRIX_FILE).exists():
        return None
    known = Sensitivity.load(output_dir / MATRIX_FILE)
    same = known.fingerprint.get("settings") == digest(settings)
    require(
        same, "profile", "output_dir", "be new or hold the same run", f"{MATRIX_FILE} of another run in {output_dir}"
    )
    return known
