"""A run: samples are measured chunk by chunk, gathered over ranks, kept on the way, and put together to a matrix."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..artifacts import MATRIX_FILE, Provenance, Sensitivity, Stability, save_held, without_optimism
from ..common import CladoError, data_digest, digest, is_out_of_memory, progress_bar, require
from ..graph import Runner
from ..quant import ActivationRanges, Candidates, Rounded, Variant, all_plain, scheme_names
from .checkpoint import Checkpoint, writing
from .distributed import Ranks
from .estimators import ESTIMATORS, Later
from .groups import group_bytes
from .losses import Loss
from .options import NEAREST, Options
from .pieces import Pieces, disk_bytes
from .reader import Reader, all_finite
from .rounded_weights import MomentWork, kept_bytes, needs_moments
from .samples import Chunk, SampleStream
from .share import MemberFailed, Share
from .stable import Rule
from .sums import Sums, assemble
from .work import RunPlan, Work


@dataclass(frozen=True)
class PairTask:
    """One candidate of every layer, and some of the pairs of layers, instead of all.

    Attributes:
        candidates: what they are chosen from.
        ranges: of the layers' inputs, as the candidates or the base round them; none are calibrated.
        rounded: the candidates' weights; None: nearest rounding.
        rows: the candidate of every layer; None: not chosen yet.
        later: for every layer the layers behind it that it is paired with.
        title: of the progress bar.
    """

    candidates: Candidates
    ranges: ActivationRanges | None
    rounded: Rounded | None = None
    rows: Sequence[int] | None = None
    later: Later | None = None
    title: str = "pairs"

    def of(self, every: Sequence[Sequence[Variant]]) -> list[list[Variant]]:
        """The chosen ones of all layers' variants; before a choice the first of each, which are as large."""
        if self.rows is None:
            return [[own[0]] for own in every]
        flat = [variant for own in every for variant in own]
        return [[flat[v]] for v in self.rows]

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result beside the run's own settings."""
        if self.rows is None or self.later is None:
            return {}
        return {"candidates": list(self.rows), "pairs": [list(behind) for behind in self.later]}


@dataclass
class Run:
    """A run that is ready to be measured; :func:`~clado.profiling.open_run` makes it.

    Attributes:
        runner: runs the model, its work counted from nothing.
        reader: what becomes of the loader's batches.
        stream: the samples, in order.
        candidates: what the matrix is over.
        every: gives all layers' weights and input roundings as their candidates have them.
        pieces: what is measured at a time of a chunk of ``size`` samples.
        exact_samples: how many samples pay for exact pairs; None: all.
        own_settings: JSON values by name that decide the result.
        ranges: of the layers' inputs, where the base or a candidate rounds them; None: nothing does.
        rounded: the candidates' weights; None: nearest rounding.
        moments: what it takes to round them; known in a dry run alone, None where nothing is to be done.
        notes: what the user is told with the result; ``probed``: the probe of a low precision.
        started: when the run was asked for.
        float_weights: how many weights each of the runner's skipped layers has.
        rule: where the run may end before the last sample; None: nowhere.
        task: what is measured instead of all candidates and pairs.
        measured: samples of this rank, in this call or an earlier one.
    """

    runner: Runner
    reader: Reader
    options: Options
    stream: SampleStream
    candidates: Candidates
    every: Callable[[], list[list[Variant]]]
    pieces: Pieces
    size: int
    exact_samples: int | None
    own_settings: dict[str, Any]
    ranges: ActivationRanges | None
    rounded: Rounded | None
    moments: MomentWork | None
    float_weights: dict[str, int]
    notes: list[str]
    probed: dict[str, Any]
    started: float
    rule: Rule | None = None
    task: PairTask | None = None
    measured: int = field(default=0, init=False)

    @property
    def device(self) -> torch.device:
        return self.reader.device

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result."""
        return {**self.own_settings, **(self.task.settings if self.task else {})}

    @property
    def variants(self) -> list[list[Variant]]:
        """All layers' weights as their candidates have them."""
        return self.task.of(self.every()) if self.task else self.every()

    @property
    def counts(self) -> list[int]:
        """Candidates of each layer that are measured."""
        return [1] * self.runner.num_layers if self.task else list(self.candidates.counts)

    @property
    def work(self) -> Work:
        later = self.task.later if self.task else None
        return Work(self.runner, self.counts, self.options.estimator, self.exact_samples, self.size, later)

    def take(self, task: PairTask, stream: SampleStream) -> None:
        """Measure another choice of candidates and pairs from now on, from the first sample of ``stream``."""
        self.task, self.stream, every = task, stream, self.every
        self.stream.peek()
        self.pieces.variants = lambda: task.of(every())
        self.runner.work, self.measured = 0.0, 0

    def checkpoint(self, folder: Path | None) -> Checkpoint:
        """What is kept of this run in a folder."""
        return Checkpoint(folder, self.settings, self.size, sum(self.counts), self.rule is not None)

    def plan(self) -> RunPlan:
        """What :meth:`measure` would cost; a few layers are run for the time."""
        options, count, pieces = self.options, self.stream.expected, self.pieces
        checkpoint = self.checkpoint(options.output_dir)
        finished = min(count, checkpoint.total.samples)
        if finished < count:
            self._go_on(checkpoint.pieces)
        world, work = Ranks(self.device).world, self.work
        members = work.members(world, count, finished)
        left = work.path(world // members, members, count, finished)
        shared = f"{members} of {world} ranks measure each chunk together" if members > 1 else ""
        moments = self.moments or MomentWork(0, 0.0, 0)
        left += moments.samples * moments.forwards
        weights = kept_bytes(self.candidates, options.quantizer, moments.samples or count) if self._keeps_weights else 0
        count_v, layers = sum(self.counts), self.runner.num_layers
        pairs = (count_v**2 - sum(c**2 for c in self.counts)) // 2
        groups = 0 if checkpoint.groups is None else group_bytes(count_v)
        return RunPlan(
            estimator=options.estimator,
            layers=layers,
            bits=self.candidates.bits,
            candidates=count_v,
            samples=count,
            finished=finished,
            evaluations=1 + count_v + (pairs if ESTIMATORS[options.estimator].pairs else 0),
            forward_equivalents=work.total(count) + moments.samples * moments.forwards,
            seconds=left / self._throughput() if left else 0.0,
            batch_size=self.size,
            together=pieces.together,
            stack=pieces.stack,
            fixed_bytes=pieces.fixed_bytes(),
            chunk_bytes=pieces.chunk_bytes(),
            moment_bytes=moments.nbytes,
            group_bytes=groups,
            held=pieces.runner.held,
            loss=self.reader.loss.words(),
            disk_bytes=disk_bytes(count_v, count, options.estimator) + 2 * groups + weights,
            notes=(*self.notes, shared) if shared else tuple(self.notes),
            schemes=self._schemes_in_words,
        )

    @property
    def _schemes_in_words(self) -> str:
        names = ", ".join(scheme_names(self.candidates.flat).values())
        return f"at {names} bits" if all_plain(self.candidates.flat) else f"under {names}"

    @property
    def _keeps_weights(self) -> bool:
        """Whether the run directory gets the candidates' weights."""
        return self.rounded is not None or needs_moments(self.options.rounding)

    def _throughput(self) -> float:
        """Forward-equivalents per second, by stacked forwards from a few cuts; the second of two rounds counts."""
        together, runner, count = self.pieces.together, self.runner, self.runner.num_layers
        repeats = -(-together // 2)
        batch = pytree.tree_map(lambda t: torch.cat([t] * repeats)[:together], self.pieces.example)
        speed = 0.0
        for _ in range(2):
            begin, before = time.perf_counter(), runner.work
            for k in sorted({0, count // 2, count - 1}):
                state = runner.advance(runner.start(batch), k)
                output = runner.outputs(runner.fork(state, k, self.variants[k][: self.pieces.stack]))
            pytree.tree_map(lambda t: t.cpu(), output)
            speed = (runner.work - before) / (time.perf_counter() - begin)
        runner.work = 0.0
        return speed

    def measure(self, verbose: bool) -> Sensitivity:
        """Measure what is not finished yet; on every rank the same result."""
        ranks = Ranks(self.device)
        if not ranks.writes:
            self.gather(ranks, self.checkpoint(None), 0, False)
            return replace(ranks.receive(Sensitivity.load, MATRIX_FILE), held=self.rounded)
        folder = self.options.output_dir
        checkpoint = self.checkpoint(folder)
        checkpoint.remove_leftovers()
        known = earlier_result(folder, self.settings)
        if known is not None and known.num_samples > len(checkpoint.expected):
            checkpoint.expected = torch.from_numpy(known.sample_digests)
        if self.rounded is not None:
            self._expect_samples_of(self.rounded, checkpoint)
            checkpoint.held = self.rounded
        seen = self.gather(ranks, checkpoint, 0 if known is None else known.num_samples, verbose)
        stability = self._stability(checkpoint, seen)
        changed = known is None or seen != known.num_samples
        if known is None or changed:
            if stability is None or not stability.reached:
                checkpoint.check_end(seen)
            known = self._result(checkpoint, ranks, stability)
        elif stability not in (None, known.provenance.stability):
            provenance = replace(known.provenance, stability=stability)
            known, changed = replace(known, provenance=provenance, held=self.rounded), True
        if folder is not None:
            with writing(folder):
                if changed:
                    known.save(folder / MATRIX_FILE)
                else:
                    save_held(self.rounded, folder)
        ranks.send(replace(known, held=None).save)
        return known

    def _stability(self, checkpoint: Checkpoint, seen: int) -> Stability | None:
        """What is known of the plans at the end of a run that was to end as soon as they stand."""
        if self.rule is None:
            return None
        return self.rule.found(checkpoint, seen == checkpoint.total.samples and self.rule.stops(checkpoint))

    def _expect_samples_of(self, rounded: Rounded, checkpoint: Checkpoint) -> None:
        """The samples that decided the weights come first, unless these are another run's or of other data."""
        own, seen = rounded.sample_digests, checkpoint.expected
        others = self.options.rounded_as is not None or self.options.moment_data is not None
        if not others and len(own) > len(seen) and torch.equal(own[: len(seen)], seen):
            checkpoint.expected = own

    def gather(self, ranks: Ranks, checkpoint: Checkpoint, end: int, verbose: bool) -> int:
        """Bring the checkpoint to the end of the stream, or to where the rule ends it; returns how many samples that are. Rank 0
        keeps the books.

        ``end``: samples of the finished result in the directory, 0 without one; its last, short chunk is not in the checkpoint.
        """
        rule = self.rule
        ranks.check_same({**self.settings, "until_stable": None if rule is None else [rule.tolerance, *rule.avg_bits]})
        done, expected, work = checkpoint.total.samples, self.stream.expected, self.work
        self._go_on(checkpoint.pieces)
        mine = [*self.pieces.now, 0][:3]  # 0: all candidates' outputs are kept
        done, end, members, *pieces = ranks.agree([done, end, work.members(ranks.world, expected, done), *mine])
        ranks.join(members)
        if members == 1:  # who share a chunk take it in the same pieces, others in their own where memory is less
            pieces = [min(own or first, first or own) for own, first in zip(mine, pieces, strict=True)]
        self.pieces.set(*pieces)
        seen, settled = 0, 0.0
        total = work.total(expected)
        title = self.task.title if self.task else f"profile ({self.options.estimator})"
        with progress_bar(title, total, "forwards", verbose) as show:

            def tick() -> None:
                ours = settled + (self.runner.work - settled) * members
                show(min(ours * ranks.groups, total), "" if rule is None else rule.note(checkpoint))

            ahead = self.device.type == "cuda"
            for chunk in self.stream.chunks(self.size, ranks.group, ranks.groups, ahead=ahead):
                part, stops = None, False
                if chunk is not None:
                    checkpoint.check(chunk.first, chunk.digests)
                    self.measured += chunk.samples
                    if chunk.last <= done or (chunk.last == end and chunk.samples < self.size):
                        self.runner.work += work.of_chunk(chunk.first, chunk.samples)
                    else:
                        part = self._estimate(chunk, tick, ranks.share)
                    settled = self.runner.work
                for digests, sums in ranks.collect(chunk, part, checkpoint.total, self.size):
                    checkpoint.check(seen, digests)
                    seen += len(digests)
                    if sums is not None:
                        if checkpoint.pieces[-1:] != [self.pieces.now]:
                            checkpoint.pieces.append(self.pieces.now)
                        checkpoint.add(sums, digests)
                    if rule is not None and end <= seen == checkpoint.total.samples and rule.stops(checkpoint):
                        stops = True  # what other ranks measured behind it is left: one rank would end here
                        break
                tick()
                if rule is not None and ranks.agree([int(stops)])[0]:
                    break
        return seen

    def _go_on(self, pieces: Sequence[Sequence[int]]) -> None:
        """Take the pieces of the run's earlier calls."""
        note = self.pieces.go_on(pieces[-1]) if pieces else None
        if note is not None:
            self.notes.append(note)

    def _estimate(self, chunk: Chunk, tick: Callable[[], None], share: Share) -> Sums:
        """Sums of a chunk; samples advance together as memory allows, and halves where it did not on any member."""
        name, done, parts = self.work.estimator(chunk.first), 0, []
        while done < chunk.samples:
            together = self.pieces.together
            batch = pytree.tree_map(lambda t, a=done, b=done + together: t[a:b], chunk.batch)
            inputs, targets = self.reader.parts(batch)
            count = min(together, chunk.samples - done)
            before = self.runner.work
            try:
                moved = self.reader.moved(inputs)
                seeds = chunk.digests[done : done + together].tolist()
                loss = self.reader.of_batch(moved, targets, count, seeds)
                parts.append(self._sums(name, moved, loss, tick, share).cpu().added(share))
                work = torch.tensor(self.runner.work - before, dtype=torch.float64)
                self.runner.work = before + share.added(work).item()
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
        if not all_finite(batch):
            return "data_loader", "yield finite numbers"
        if self.reader.loss.named:
            return "model", "return finite outputs"
        return "loss_func", "return finite losses"

    def _sums(self, name: str, batch: Any, loss: Loss, tick: Callable[[], None], share: Share) -> Sums:
        """This share's sums over samples that advance together."""
        later = None if self.task is None else self.task.later
        return ESTIMATORS[name].run(self.runner, self.variants, batch, loss, tick, share, later)

    def _halve(self, samples: int, error: BaseException) -> None:
        """After an allocation failed: half the samples, or half the perturbations, at a time."""
        if not self.pieces.halve(samples):
            raise CladoError(
                "profile: device must have memory for one sample and one perturbation, got "
                f"{str(error).splitlines()[0]}; finished chunks are kept"
            ) from error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        together, stack, *held = self.pieces.now
        some = f", {held[0]} candidates' outputs kept" if held else ""
        self.notes.append(f"out of memory: went on with {together} samples, {stack} perturbations at a time{some}")

    def _result(self, checkpoint: Checkpoint, ranks: Ranks, stability: Stability | None) -> Sensitivity:
        options, sums = self.options, checkpoint.total
        fingerprint = {
            "weights": str(self.settings["weights"]),
            "data": data_digest(checkpoint.digests.numpy()),
            "settings": digest(self.settings),
        }
        rounding = None if self.rounded is None else self.rounded.by
        provenance = Provenance(
            options.estimator,
            self.reader.loss.name,
            self.settings["products"],
            self.runner.skipped,
            self.float_weights,
            rounding=rounding,
            stability=stability,
            loss_options=self.reader.loss.settings(),
            loss_words=self.reader.loss.words(),
        )
        result = assemble(sums, self.candidates, options.quantizer, provenance, fingerprint, checkpoint.digests)
        result = without_optimism(result, self.rounded)
        if sums.samples < options.num_samples and not (stability is not None and stability.reached):
            self.notes += [f"the data ended after {sums.samples} of {options.num_samples} samples"]
        if len(checkpoint.pieces) > 1:
            shown = ", then ".join(" and ".join(map(str, pieces)) for pieces in checkpoint.pieces)
            self.notes.append(
                f"memory changed: samples and perturbations at a time were {shown}; last digits depend on it"
            )
        result = replace(result, activations=self.ranges, held=self.rounded)
        result.notes["warnings"] = self.notes + result.notes["warnings"]
        result.notes.update(
            **self.probed,
            batch_size=self.size,
            device=self.device.type,
            ranks=ranks.world,
            forward_equivalents=self.runner.work / self.measured,
            expected_forward_equivalents=self.work.total(sums.samples) / sums.samples,
            exact_samples=int(sums.residual_samples) or None,
            seconds=time.perf_counter() - self.started,
        )
        if self.rule is not None:
            result.notes["check_seconds"] = self.rule.seconds
        return result


def earlier_result(output_dir: Path | None, settings: dict[str, Any]) -> Sensitivity | None:
    """The result that the run directory holds, None where there is none; another run's is refused."""
    if output_dir is None or not (output_dir / MATRIX_FILE).exists():
        return None
    known = Sensitivity.load(output_dir / MATRIX_FILE)
    same = known.fingerprint.get("settings") == digest(settings)
    by = known.provenance.rounding
    there, here = NEAREST if by is None else by.rounding, settings.get("rounding", NEAREST)
    why = "" if there == here else f", of {there} rounding"
    got = f"{MATRIX_FILE} of another run in {output_dir}{why}"
    require(same, "profile", "output_dir", "be new or hold the same run", got)
    return known
