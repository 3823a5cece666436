"""From a model, data and options to a run that is ready to be measured."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

from torch import nn

from ..common import digest, require, sample_count, two_samples, weights_digest
from ..graph import LOW_PRECISIONS, PRECISIONS, Runner, Variants, check_model, in_precision, open_runner
from ..quant import ActivationRanges, Candidates, Rounded, Variant, folded, layer_name, quantize_activations, variants
from .checkpoint import recorded, refuse_other_run
from .distributed import is_writer
from .estimators import ESTIMATORS
from .groups import group_bytes
from .inputs import ACT_SAMPLES, calibrated, input_loss
from .options import NEAREST, Options
from .pieces import Pieces, default_batch
from .positions import position_noise
from .probe import SAMPLES, auto_precision, probe
from .reader import Reader
from .rounded_weights import (
    MOMENT_SAMPLES,
    MomentWork,
    halved_at,
    held_already,
    made_from,
    moment_stream,
    needs_moments,
)
from .run import PairTask, Run
from .samples import SampleStream
from .stable import CHUNKS, Rule, budgets


def open_run(
    model: nn.Module,
    data_loader: Iterable[Any],
    options: Options,
    verbose: bool = False,
    task: PairTask | None = None,
    dry: bool = False,
) -> Run:
    """Look at the data, calibrate inputs, open a runner, round the weights, probe a low precision, and fit chunks to memory.

    What is not asked for stays as an interrupted run in ``options.output_dir`` had it.

    Args:
        dry: the run will not be measured: nearest rounding gives weights of the same size sooner.

    Raises:
        CladoError: as :func:`clado.profile`; nothing is written.
    """
    started = time.perf_counter()
    check_model(model)
    model = folded(model)
    stream = SampleStream(data_loader, options.num_samples, options.seed)
    first = stream.peek(SAMPLES)
    known = recorded(options.output_dir)
    options = options.of_run(known)
    if known and options.output_dir is not None:  # before any moments are summed
        there, here = known.get("rounding", NEAREST), options.rounding
        refuse_other_run({"rounding": there}, {"rounding": here}, options.output_dir)
    device = options.device or next(model.parameters()).device
    if options.precision == "auto":
        options = replace(options, precision=auto_precision(device, options.estimator))
    reader = Reader(device, PRECISIONS[options.precision], options.loss_choice, options.forward_step)
    inputs, targets = reader.parts(first)

    act_samples = options.act_samples or known.get("act_samples") or min(ACT_SAMPLES, stream.expected)
    only = None if task is None else [layer.name for layer in task.candidates.layers]
    plain, ranges = _opened(model, inputs, reader, options, only), None if task is None else task.ranges
    whole = plain
    candidates = options.candidates(plain.layers) if task is None else _of_task(task, plain)
    if task is None and (options.act_bits is not None or options.rounds_inputs):
        ranges = calibrated(model, candidates, stream, reader, options.act_bits, act_samples, verbose)
    if ranges is not None and ranges.base:
        model = quantize_activations(model, ranges, plain.layers)
        plain = _opened(model, inputs, reader, options, only)
    example = two_samples(reader.moved(inputs))
    output = _output(plain, example)
    reader = reader.fitted(output, example, None if targets is None else two_samples(targets))
    if ESTIMATORS[options.estimator].closed:
        forwards = sum(n * share for n, share in zip(candidates.counts, plain.suffix_share, strict=True))
        priced = reader.loss.priced(output, example, len(candidates), forwards * plain.forward_flops)
        reader = replace(reader, loss=priced)
    if verbose and not dry and is_writer():
        print(f"loss: {reader.loss.words()}", file=sys.stderr)
    looked_at = () if options.until_stable is None else budgets(options.avg_bits, candidates)
    rounded, moments = None if task is None else task.rounded, None
    if task is None and needs_moments(options.rounding):
        rounded = held_already(model, candidates, options, known)
        if rounded is None:
            source = moment_stream(stream, options)
            first_ones = options.moment_samples or known.get("moment_samples") or min(MOMENT_SAMPLES, source.expected)
            there = min(first_ones, source.expected) if dry else source.at_hand(first_ones)
            cut = halved_at(there, options)
            if dry:
                moments = MomentWork.of(plain, example, first_ones, reader.dtype.itemsize, cut > 0)
            else:
                how = reader, options, first_ones, cut, verbose
                rounded = made_from(model, plain, candidates, source, *how)
                plain.work = 0.0

    @cache
    def every() -> list[list[Variant]]:
        return variants(model, candidates, options.quantizer, device, reader.dtype, rounded, ranges)

    notes, runner, probed = [] if plain.note is None else [plain.note], plain, dict[str, Any]()
    if options.act_bits is not None and not dry:
        lost = input_loss(whole, plain, stream, reader, act_samples)
        notes.append(lost.words(options.act_bits))
        probed["activation_loss"] = asdict(lost)
    if options.positions is not None and not dry and task is None:
        notes.append(_said_of_positions(plain, every(), reader, first, stream.expected))
    if options.precision in LOW_PRECISIONS:
        runner, probed = _lowered(plain, every, first, reader, options, stream.expected, known.get("products"), notes)
    kept_plain = options.precision in LOW_PRECISIONS and runner is plain
    products = "float32" if kept_plain else options.precision
    widest = max(candidates.counts) if task is None else 1
    size = (
        options.batch_size
        or known.get("batch_size")
        or default_batch(
            runner, widest, options.estimator, device, len(candidates) * reader.loss.elements * reader.dtype.itemsize
        )
    )
    chosen = options.batch_size is None and "batch_size" not in known
    if options.until_stable is not None and chosen:
        size = min(size, max(1, stream.expected // CHUNKS))
    few = options.exact_samples or known.get("exact_samples") or max(2, stream.expected // 8)
    exact_samples = few if ESTIMATORS[options.estimator].residual else None
    pieces = Pieces(
        runner,
        options.estimator,
        every if task is None else lambda: task.of(every()),
        widest,
        [*model.parameters(), *model.buffers()],
        example,
        reader.blank,
        reader.loss.elements,
        size,
        0 if options.until_stable is None else group_bytes(len(candidates)),
    )
    pieces.fit(options.max_memory, device)
    if chosen:
        size = pieces.together
    settings = {
        "products": products,
        **({"interactions": "Gauss-Newton"} if reader.loss.hessian else {}),
        **_of_model(model, plain, ranges),
        **options.settings(
            exact_samples=exact_samples,
            batch_size=size,
            act_samples=act_samples if ranges else None,
            device=device.type,
            **_of_rounded(rounded, options, known),
        ),
    }
    rule = None
    if options.until_stable is not None:
        rule = Rule(options.until_stable, looked_at, candidates, size, stream.expected)
    return Run(
        runner=runner,
        reader=reader,
        options=options,
        stream=stream,
        candidates=candidates,
        every=every,
        pieces=pieces,
        size=size,
        exact_samples=exact_samples,
        own_settings=settings,
        ranges=ranges,
        rounded=rounded,
        moments=moments,
        float_weights=_float_weights(model, plain),
        notes=notes,
        probed=probed,
        started=started,
        rule=rule,
        task=task,
    )


def _opened(model: nn.Module, inputs: Any, reader: Reader, options: Options, only: Sequence[str] | None) -> Runner:
    return open_runner(
        model,
        inputs,
        only=only,
        ignore=options.ignore,
        quantize_ends=options.quantize_ends,
        forward_step=reader.step,
        device=reader.device,
        dtype=reader.dtype,
    )


def _of_model(model: nn.Module, runner: Runner, ranges: ActivationRanges | None) -> dict[str, Any]:
    """Settings that decide the result and come from the model."""
    return {
        "weights": weights_digest(model),
        "layers": digest([asdict(layer) for layer in runner.layers]),
        "act_ranges": digest(ranges.to_json()) if ranges else None,
    }


def _float_weights(model: nn.Module, runner: Runner) -> dict[str, int]:
    """{skipped layer, module or parameter: how many weights of two or more dimensions it has}, tied ones once."""
    searched = {name for layer in runner.layers for name in layer.names}
    count = dict.fromkeys(runner.skipped, 0)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name in searched:
            continue
        path = layer_name(name)
        while path and path not in count:
            path = path.rpartition(".")[0]
        if path:
            count[path] += parameter.numel()
    return count


def _of_rounded(rounded: Rounded | None, options: Options, known: dict[str, Any]) -> dict[str, Any]:
    """Settings that come from rounded weights; before they are made, those of the run that the directory holds."""
    if rounded is not None:
        optimism = {"optimism": digest(dict(rounded.optimism))} if rounded.optimism else {}
        return {"moment_samples": len(rounded.sample_digests), "rounded": rounded.by.digest, **optimism}
    names = ("moment_samples", "rounded", "optimism")
    of_run: dict[str, Any] = {name: known[name] for name in names if name in known}
    return of_run if needs_moments(options.rounding) else {}


def _of_task(task: PairTask, runner: Runner) -> Candidates:
    """The task's candidates, whose layers must be the runner's."""
    found, wanted = ([layer.name for layer in layers] for layers in (runner.layers, task.candidates.layers))
    require(found == wanted, "correct", "model", "have the layers of sens", f"{len(found)} layers")
    return task.candidates


def _output(runner: Runner, example: Any) -> Any:
    output = runner.outputs(runner.start(example))[0]
    runner.work = 0.0
    return output


def _said_of_positions(runner: Runner, variants: Variants, reader: Reader, first: Any, num_samples: int) -> str:
    """What looking at some positions alone adds to the noise, measured on the first samples."""
    inputs, targets = reader.parts(first)
    moved, count = reader.moved(inputs), sample_count(inputs)
    losses = [replace(reader, loss=replace(reader.loss, positions=p)) for p in (None, reader.loss.positions)]
    every, some = (known.of_batch(moved, targets, count, range(count)) for known in losses)
    noise = position_noise(runner, variants, moved, every, some)
    runner.work = 0.0
    return (
        f"{reader.loss.positions:,} positions of every sample leave its loss increase right to {noise:.1%} (root mean square, "
        f"{count} samples), and the mean over {num_samples:,} to {noise / num_samples**0.5:.2%}; standard errors count it"
    )


def _lowered(
    runner: Runner,
    variants: Any,
    first: Any,
    reader: Reader,
    options: Options,
    num_samples: int,
    decided: str | None,
    notes: list[str],
) -> tuple[Runner, dict[str, Any]]:
    """The runner that carries differences where a probe finds its errors below the sampling noise, and the probe.

    ``decided``: what an earlier call of this run found; a run keeps to it.
    """
    precision = options.precision
    low = in_precision(runner, precision)
    if low is None:
        reason = "differences are carried through a graph, and there is none"
        notes.append(f"float32 instead of {precision}: {reason}")
        return runner, {}
    inputs, targets = reader.parts(first)

    def loss(batch: Any) -> Any:
        count = sample_count(batch)
        return reader.of_batch(batch, targets, count, range(count))

    given: Variants = variants()
    found = probe(runner, given, reader.moved(inputs), loss, options.estimator, precision, num_samples)
    if found["good"] if decided is None else decided == precision:
        return low, {"probe": found}
    notes.append(
        f"float32 instead of {precision}: the probe's error of ΔL is {found['loss_error']:.1e} and of Ω "
        f"{found['pair_error']:.1e}, the sampling noise {found['loss_noise']:.1e} and {found['pair_noise']:.1e}"
    )
    return runner, {"probe": found}
