"""Measure the sensitivity matrix of a model: samples in, :class:`Sensitivity` out."""

from __future__ import annotations

import copy
import inspect
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .activations import Activations, calibrate, quantize_activations
from .capture import ForwardStep, NotCapturable, capture
from .carried import LOW_PRECISIONS, CarriedExecutor, auto_precision
from .checkpoint import Checkpoint, disk_error, recorded
from .distributed import Ranks
from .errors import CladoError, require
from .estimators import CLOSED_FORM, ESTIMATORS, Sums, expected_work
from .executor import Executor, Runner
from .fingerprint import code_digest, data_digest, digest, weights_digest
from .losses import LogitLoss, Loss, LossFunc, UserLoss
from .memory import chunk_bytes, disk_bytes, is_out_of_memory, run_bytes
from .probe import SAMPLES, probe
from .progress import progress_bar
from .quantizer import Quantizer
from .samples import Chunk, SampleStream, check_targets, moved_to, split_batch, two_samples
from .sensitivity import FILE_NAME, Layer, Sensitivity, check_bits, same_layer
from .whole import WholeExecutor

LOSSES = ("kl", "cross_entropy")
PRECISIONS = {"float32": torch.float32, "float64": torch.float64} | dict.fromkeys(LOW_PRECISIONS, torch.float32)
# Samples that calibrate activations, and how many of them make a step of the moving average.
ACT_SAMPLES, ACT_BATCH = 64, 8
# Bytes of the largest stacked activation: beyond it a CPU leaves its caches, a GPU gains nothing more.
_STACK_BYTES = {"cpu": 4 << 20, "cuda": 1 << 30}


def profile(
    model: nn.Module,
    data_loader: Iterable[Any],
    bits: Sequence[int] = (2, 4, 8),
    *,
    estimator: str = "logit",
    loss: str = "kl",
    loss_func: LossFunc | None = None,
    forward_step: ForwardStep | None = None,
    precision: str = "float32",
    num_samples: int = 1024,
    exact_samples: int | None = None,
    batch_size: int | None = None,
    max_memory: int | None = None,
    group_size: int = -1,
    scale_steps: int = 95,
    symmetric: bool = True,
    act_bits: int | None = None,
    ignore: Sequence[str] = (),
    quantize_ends: bool = False,
    output_dir: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    verbose: bool = True,
) -> Sensitivity:
    """Measure how the loss rises when each layer, and each pair of layers, is quantized.

    Args:
        model: any module that torch.export takes, in eval mode, one tensor in, logits ``[N, C]`` out. It is not changed.
        data_loader: iterable of batches: inputs ``[n, …]`` or (inputs, targets int64 ``[n]``); batch sizes may differ. With
            ``forward_step`` or ``loss_func``: any nest of tensors ``[n, …]``.
        bits: candidate bit-widths, each in 2..8.
        estimator: "logit" (all interactions from single perturbations, closed form), "exact" (every pair by a forward: the
            paper), "diagonal" (no interactions), "gradient" (the upstream layer perturbed, the downstream one linearised: one
            backward per candidate), "corrected" (the closed form on all samples, and the exact residual on
            ``exact_samples`` of them).
        loss: "kl" to the clean logits (needs no targets) or "cross_entropy" (the paper).
        loss_func: instead of ``loss``, ``loss_func(output, batch)``: a loss per sample ``[n]``, or the batch's mean (then
            called sample by sample); for models of any output, under "exact", "gradient" and "diagonal". Differentiable in
            the output for "gradient".
        forward_step: ``forward_step(model, batch)`` runs the model; None: ``model(inputs)``.
        precision: "float32" (TF32 off), "float64", or with the differences to the clean forward carried through the graph
            (DESIGN §3.3) "tf32" or "bfloat16" matrix products. The latter are probed against float64 on a few layers and
            samples; the errors are in ``info["probe"]``, and where they exceed the sampling noise the run is float32, with a
            warning. "auto" takes bfloat16 for "logit" and "diagonal" where the device has matrix units for it (measured: 1.9
            times float32 on a Xeon with AMX), else float32. Losses and sums are float64 always.
        num_samples: how many samples of the loader to use; fewer are taken, with a warning, when it ends early.
        exact_samples: for "corrected": samples (rounded up to whole chunks) on which every pair is evaluated; None: an eighth.
        batch_size: samples of a chunk: they are measured together and kept together; None chooses by the size of the
            activations, or what an interrupted run in ``output_dir`` chose.
        max_memory: bytes of weights, variants and live values on the device that must not be exceeded: fewer samples, and
            then fewer perturbations, advance together. None: what is free on a GPU. A chunk that runs out of memory all the
            same is measured again in halves.
        group_size: -1 one scale per output channel, 0 one per tensor, g > 0 one per g inputs.
        scale_steps: shrink factors tried per scale (95: the paper's code; 1: absmax).
        symmetric: codes are steps around zero; False adds a zero point to every scale.
        act_bits: also round the inputs of the layers to so many bits, on per-tensor asymmetric ranges calibrated on the first
            64 samples; the loss is then measured from the float weights under rounded inputs. None: weights only.
        ignore: layers to keep in float: fnmatch patterns, or regular expressions after ``re:``.
        quantize_ends: also quantize a first convolution and the classifier.
        output_dir: run directory; the result is saved there, chunk by chunk: the same call after an interruption goes on to
            the same bits, after the end it loads the result. A directory of another run is refused.
        device: where to run; None: where the model is.
        seed: fixes torch's generator while ``data_loader`` is read, so that a shuffling loader gives the same samples.
        verbose: show a progress bar.

    Returns:
        The sensitivity matrix with standard errors, work in forward-equivalents and a fingerprint. The same call gives the
        same bits.

    Raises:
        CladoError: any bad input, in one line; nothing is written then.
    """
    arguments = {name: value for name, value in locals().items() if name not in ("model", "data_loader", "verbose")}
    with full_precision(), torch.no_grad():
        return Run(model, data_loader, Options.of(**arguments)).measure(verbose)


def plan_run(model: nn.Module, data_loader: Iterable[Any], **options: Any) -> RunPlan:
    """What :func:`profile` would do with these arguments: work, time, memory and disk. Nothing is written.

    Raises:
        CladoError: whatever :func:`profile` would refuse before its first chunk.
    """
    known = {name: p.default for name, p in inspect.signature(profile).parameters.items()}
    unknown = [name for name in options if name not in known]
    require(not unknown, "plan_run", "options", "be arguments of profile", ", ".join(unknown))
    arguments = {**known, **options}
    for name in ("model", "data_loader", "verbose"):
        del arguments[name]
    with full_precision(), torch.no_grad():
        return Run(model, data_loader, Options.of(**arguments)).plan()


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
            usable = [name for name in ESTIMATORS if name not in CLOSED_FORM]
            must = f"be one of {', '.join(usable)} with loss_func"
            require(self.estimator in usable, "profile", "estimator", must, self.estimator)
        must = "be float32 or float64 for the gradient estimator (a backward carries no differences)"
        carries = self.estimator != "gradient" or self.precision not in LOW_PRECISIONS
        require(carries, "profile", "precision", must, repr(self.precision))
        for name in ("num_samples", "exact_samples", "batch_size", "max_memory"):
            value = getattr(self, name)
            require(value is None or value >= 1, "profile", name, "be at least 1", value)

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


class Run:
    """A run that is ready to be measured: the captured model, the stream of samples, the settings that decide the result."""

    def __init__(self, model: nn.Module, data_loader: Iterable[Any], options: Options) -> None:
        self.started = time.perf_counter()
        self.model, self.options = model, options
        self.measured = 0  # samples of this rank, in this call or an earlier one
        check_finite(model)
        self.stream = SampleStream(data_loader, options.num_samples, options.seed)
        seen = self.stream.peek(SAMPLES if options.act_bits is None else ACT_SAMPLES)
        first = pytree.tree_map(lambda t: t[:SAMPLES], seen)
        inputs, targets = self._parts(first)
        labelled = options.loss != "cross_entropy" or targets is not None
        require(labelled, "profile", "data_loader", "yield (inputs, targets) for cross_entropy", "inputs alone")
        self.device = options.device or next(model.parameters()).device
        if options.precision == "auto":
            options = self.options = replace(options, precision=auto_precision(self.device, options.estimator))
        self.dtype = PRECISIONS[options.precision]
        self.notes: list[str] = []
        self.activations = self._calibrate(seen)
        if self.activations:
            self.model = model = quantize_activations(model, self.activations)
        self.executor = self._executor(two_samples(moved_to(inputs, self.device, self.dtype)))
        known = recorded(options.output_dir)
        default = _default_batch(self.executor, len(options.bits), options.estimator, self.device)
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
            "act_ranges": digest(self.activations) if self.activations else None,
            "device": self.device.type,
        }

    @property
    def _step(self) -> ForwardStep | None:
        """What runs the model on its part of a batch; None: the model itself."""
        whole = self.options.whole_batches
        return first_of_batch if self.options.forward_step is None and whole else self.options.forward_step

    def _calibrate(self, seen: Any) -> Activations:
        """Ranges of the layers' inputs on the first samples of the set; empty for a weight-only run."""
        options = self.options
        if options.act_bits is None:
            return {}
        inputs = moved_to(self._parts(seen)[0], self.device, self.dtype)
        rows = range(0, len(pytree.tree_leaves(inputs)[0]), ACT_BATCH)
        batches = (pytree.tree_map(lambda t, a=a: t[a : a + ACT_BATCH], inputs) for a in rows)
        moved, forward = converted(self.model, self.device, self.dtype), self._step or _call
        return calibrate(moved, batches, forward, options.act_bits, options.ignore, options.quantize_ends)

    def _executor(self, example: Any) -> Runner:
        """The captured graph, or whole forwards where there is none; tested on the example."""
        options = self.options
        step = self._step
        moved = converted(self.model, self.device, self.dtype)
        executor: Runner
        try:
            executor = Executor(capture(moved, example, options.ignore, options.quantize_ends, step))
            output = executor.self_test(example)
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
        return getattr(self.executor, "stack", None) or len(self.options.bits)

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
        options = self.options
        layers, quantizer = self.executor.layers, options.quantizer
        return quantized_variants(self.model, layers, options.bits, quantizer, self.device, self.dtype)

    @property
    def candidates(self) -> int:
        """V."""
        return len(self.executor.layers) * len(self.options.bits)

    def estimator(self, first: int) -> str:
        """What the chunk that starts at a sample is measured by."""
        pays = self.exact_samples is None or first < self.exact_samples
        return self.options.estimator if pays else "logit"

    def work(self, first: int, samples: int) -> float:
        """Forward-equivalents of a chunk."""
        return samples * expected_work(self.estimator(first), self.executor.suffix_share, len(self.options.bits))

    def total_work(self, samples: int) -> float:
        """Forward-equivalents of so many samples."""
        starts = range(0, samples, self.size)
        return sum(self.work(first, min(self.size, samples - first)) for first in starts)

    def plan(self) -> RunPlan:
        """What :meth:`measure` would cost; a few layers are run for the time."""
        options, count = self.options, self.stream.expected
        checkpoint = Checkpoint(options.output_dir, self.settings, self.size, self.candidates)
        finished = min(count, checkpoint.total.samples)
        work = self.total_work(count) - self.total_work(finished)
        width, layers = len(options.bits), len(self.executor.layers)
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
            notes=tuple(self.notes),
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
            self._measure(ranks, Checkpoint(None, self.settings, self.size, self.candidates), 0, False)
            return ranks.receive(Sensitivity.load)
        folder = self.options.output_dir
        checkpoint = Checkpoint(folder, self.settings, self.size, self.candidates)
        known = earlier_result(folder, self.settings)
        if known is not None and known.num_samples > len(checkpoint.expected):
            checkpoint.expected = torch.from_numpy(known.sample_digests)
        seen = self._measure(ranks, checkpoint, 0 if known is None else known.num_samples, verbose)
        if known is None or seen != known.num_samples:
            checkpoint.check_end(seen)
            known = self._result(checkpoint, ranks)
            if folder is not None:
                try:
                    known.save(folder / FILE_NAME)
                except OSError as error:
                    raise disk_error(error, folder) from None
        ranks.send(known.save)
        return known

    def _measure(self, ranks: Ranks, checkpoint: Checkpoint, end: int, verbose: bool) -> int:
        """Bring the checkpoint to the end of the stream; returns how many samples that are. Rank 0 keeps the books.

        ``end``: samples of the finished result in the directory, 0 without one; its last, short chunk is not in the checkpoint.
        """
        done, end = ranks.agree([checkpoint.total.samples, end])
        seen = 0
        total = self.total_work(self.stream.expected)
        with progress_bar(f"profile ({self.options.estimator})", total, "forwards", verbose) as show:

            def tick() -> None:
                show(min(self.executor.work * ranks.world, total))

            for chunk in self.stream.chunks(self.size, ranks.rank, ranks.world):
                part = None
                if chunk is not None:
                    checkpoint.check(chunk.first, chunk.digests)
                    self.measured += chunk.samples
                    if chunk.last <= done or (chunk.last == end and chunk.samples < self.size):
                        self.executor.work += self.work(chunk.first, chunk.samples)
                    else:
                        part = self._estimate(chunk, tick)
                for digests, sums in ranks.collect(chunk, part, checkpoint.total, self.size):
                    checkpoint.check(seen, digests)
                    seen += len(digests)
                    if sums is not None:
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

    def _estimate(self, chunk: Chunk, tick: Callable[[], None]) -> Sums:
        """Sums of a chunk; samples advance together as memory allows, and halves where it did not."""
        name, done, parts = self.estimator(chunk.first), 0, []
        while done < chunk.samples:
            inputs, targets = self._parts(pytree.tree_map(lambda t, a=done: t[a : a + self.together], chunk.batch))
            count = min(self.together, chunk.samples - done)
            try:
                moved = moved_to(inputs, self.device, self.dtype)
                loss = self._loss(moved, targets, count)
                parts.append(ESTIMATORS[name](self.executor, self.variants, moved, loss, tick))
                done += count
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(count, error)
        total = parts[0]
        for part in parts[1:]:
            total += part
        finite = bool(torch.isfinite(total.loss).any())
        where = f"NaN or infinity among samples {chunk.first}..{chunk.last - 1}; finished work is kept"
        require(finite, "profile", "model", "return finite outputs", where)
        return total

    def _halve(self, samples: int, error: BaseException) -> None:
        """After an allocation failed: half the samples, or half the perturbations, at a time."""
        if samples > 1:
            self.together = -(-samples // 2)
        elif isinstance(self.executor, Executor) and self._stack > 1:
            self.executor.stack = -(-self._stack // 2)
        else:
            raise CladoError(
                "profile: device must have memory for one sample and one perturbation, got "
                f"{str(error).splitlines()[0]}; finished work is kept"
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
        result = _assemble(sums, self.executor.layers, options.bits, options.quantizer, fingerprint, checkpoint.digests)
        if sums.samples < options.num_samples:
            self.notes += [f"the data ended after {sums.samples} of {options.num_samples} samples"]
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


def check_output(output: Any, loss: str) -> int:
    """Raise when the model's output does not suit the loss, or holds NaN or infinity; the number of classes, 0 where unknown."""
    leaves = pytree.tree_leaves(output)
    if loss == "user":
        return 0
    fits = isinstance(output, Tensor) and output.dim() == 2
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    require(fits, "profile", "model", "return logits [N, C] (other outputs need loss_func)", f"shape {shape}")
    finite = all(bool(torch.isfinite(leaf).all()) for leaf in leaves)
    require(finite, "profile", "model", "return finite logits", "NaN or infinity")
    return int(output.shape[1])


def _call(model: nn.Module, batch: Any) -> Any:
    return model(batch)


def first_of_batch(model: nn.Module, batch: Any) -> Any:
    """The forward step of a batch that is the input, or (input, …)."""
    return model(batch if isinstance(batch, Tensor) else batch[0])


def check_finite(model: nn.Module) -> None:
    """Raise when a parameter or buffer of ``model`` holds NaN or infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            require(bool(torch.isfinite(tensor).all()), "profile", f"weight {name}", "be finite", "NaN or infinity")


def quantized_variants(
    model: nn.Module,
    layers: Sequence[Layer],
    bits: Sequence[int],
    quantizer: Quantizer,
    device: torch.device,
    dtype: torch.dtype,
) -> list[list[Tensor]]:
    """For every layer its weight at every bit-width, quantized in the weight's own dtype, then converted."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = (parameters[layer.names[0]].detach() for layer in layers)
    return [list(quantizer.fake_quant(weight, bits).to(device, dtype)) for weight in weights]


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32: TF32 and bfloat16 shortcuts off."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def converted(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model itself, or a copy where device or dtype differ."""
    tensors = [*model.parameters(), *model.buffers()]
    fits = all(t.device == device and (t.dtype == dtype or not t.is_floating_point()) for t in tensors)
    return model if fits else copy.deepcopy(model).to(device, dtype)


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


def _assemble(
    sums: Sums,
    layers: Sequence[Layer],
    bits: tuple[int, ...],
    quantizer: Quantizer,
    fingerprint: dict[str, str],
    digests: Tensor,
) -> Sensitivity:
    count = sums.samples
    pair, pair_squared = (torch.triu(m, 1) + torch.triu(m, 1).T for m in (sums.pair, sums.pair_squared))
    interaction, stderr = _mean_and_error(pair.numpy(), pair_squared.numpy(), count)
    if int(sums.residual_samples):
        interaction, stderr = _corrected(sums, interaction, stderr)
    delta_loss, loss_error = _mean_and_error(sums.loss.numpy(), sums.loss_squared.numpy(), count)
    inside = same_layer(len(layers), len(bits))
    interaction[inside] = 0.0
    stderr[inside] = 0.0
    np.fill_diagonal(stderr, loss_error)
    dropped = _drop(delta_loss, interaction, stderr)
    result = Sensitivity(
        tuple(layers), bits, delta_loss, interaction, stderr, count, quantizer, {}, fingerprint, digests.numpy()
    )
    names = [f"{layers[v // len(bits)].name} at {bits[v % len(bits)]} bits" for v in dropped]
    result.info["dropped"] = [[layers[v // len(bits)].name, bits[v % len(bits)]] for v in dropped]
    result.info["warnings"] = [f"dropped {name}: its loss is NaN or infinite" for name in names]
    return result


def _drop(delta_loss: Any, interaction: Any, stderr: Any) -> list[int]:
    """Candidates that leave the others finite when their rows become NaN, which this does: first those whose own loss is not
    finite, then the one in the most pairs that are not."""
    bad = ~np.isfinite(interaction)
    np.fill_diagonal(bad, ~np.isfinite(delta_loss))
    dropped: list[int] = []
    while bad.any():
        v = int(np.argmax(np.diag(bad) * len(bad) + bad.sum(0)))
        dropped.append(v)
        bad[v, :] = bad[:, v] = False
        delta_loss[v] = np.nan
        for matrix in (interaction, stderr):
            matrix[v, :] = matrix[:, v] = np.nan
    return sorted(dropped)


def _corrected(sums: Sums, closed: Any, closed_error: Any) -> tuple[Any, Any]:
    """Mean of the closed form over all N samples plus mean residual over the n that have one, with its standard error.

    The n samples enter both means: Var = Var(a)/N + Var(r)/n + 2 Cov(a, r)/N. The covariance is taken over the n samples,
    and bounded by what the two variances allow.
    """
    n, count = int(sums.residual_samples), sums.samples
    full = [
        np.triu(m.numpy(), 1) for m in (sums.residual, sums.residual_squared, sums.residual_pair, sums.residual_closed)
    ]
    residual, squared, product, part = (m + m.T for m in full)
    mean, error = _mean_and_error(residual, squared, n)
    covariance = (product - part * mean) / max(n - 1, 1)
    bound = closed_error * error * np.sqrt(count * n)
    variance = closed_error**2 + error**2 + 2 * np.clip(covariance, -bound, bound) / count
    return closed + mean, np.sqrt(np.maximum(variance, 0.0))


def _mean_and_error(total: Any, squares: Any, count: int) -> tuple[Any, Any]:
    mean = total / count
    if count < 2:
        return mean, np.full_like(mean, np.nan)
    variance = np.maximum(squares / count - mean**2, 0.0) * (count / (count - 1))
    return mean, np.sqrt(variance / count)


def earlier_result(output_dir: Path | None, settings: dict[str, Any]) -> Sensitivity | None:
    """The result that the run directory holds, None where there is none; another run's is refused."""
    if output_dir is None or not (output_dir / FILE_NAME).exists():
        return None
    known = Sensitivity.load(output_dir / FILE_NAME)
    same = known.fingerprint.get("settings") == digest(settings)
    require(same, "profile", "output_dir", "be new or hold the same run", f"{FILE_NAME} of another run in {output_dir}")
    return known
