"""A plan's weights, rounded once more for the net that ships: in the order of the forward, then learned."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..artifacts import Plan
from ..common import (
    code_digest,
    data_digest,
    digest,
    heap,
    progress_bar,
    require,
    sample_count,
    some,
    users_code,
    weights_digest,
)
from ..deploy import adapted, check_fit
from ..graph import Blocks, ForwardStep, Live, Runner, common_dtype, converted, full_precision, open_runner
from ..profiling import IGNORED, LossChoice, LossFunc, Reader, SampleStream, all_finite, alone, sample_digests
from ..quant import Integer, Rounded, codes, folded, with_rounded_inputs
from .compensation import Finished, dtype_of
from .finish_progress import Kept, Progress
from .learning import Pace, gaps, learn_net, outputs_of
from .true_loss import surely_less
from .walk import walk

METHODS = ("compensated", "learned")
BEFORE = "before"  # the plan as it came, among its stages
# Of a block, and of the whole net: what served EfficientNet-Lite0 (docs/numerics.md).
BLOCK = Pace(steps=120, offset=1e-2, scale=2e-3, bias=2e-3)
NET = Pace(steps=300, offset=5e-4, scale=1e-4, bias=2e-4)
APART = 5  # one sample in so many judges, where no others are given
MOST_JUDGES, BLOCK_JUDGES = 1024, 128  # samples that judge stages; those of them that judge every block on the way
LEAD = 1  # standard errors by which a stage must be better to be taken: it is one, and not the best of several
Done = Callable[[int, Finished], None]
Stage = Callable[[Finished, int, Done], Finished]


def finish(
    model: nn.Module,
    plan: Plan,
    data_loader: Iterable[Any],
    method: str = "learned",
    *,
    heldout: Iterable[Any] | None = None,
    num_samples: int = 640,
    batch_size: int = 16,
    loss: Any = None,
    loss_dim: int | None = None,
    loss_against: str | None = None,
    ignore_index: int = IGNORED,
    class_weights: Sequence[float] | None = None,
    forward_step: ForwardStep | None = None,
    loss_func: LossFunc | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    output_dir: str | os.PathLike[str] | None = None,
    verbose: bool = True,
) -> Plan:
    """The plan with weights that were rounded for the whole net that ships.

    "compensated": layer after layer in the order of the forward, each on inputs that come through the layers already rounded
    and towards the float net's outputs; biases, or running means of batch norms, take up the mean error. "learned": the same
    walk once more, where every block is learned as soon as it is compensated and the next ones see what came out: codes,
    scales, biases, norm weights and what else of parameters it reads, by gradients of the squared error of its values, the last
    block's by the KL; then all of them together, in small steps, by the KL of the whole net. Buffers stay.

    Args:
        model: the float model the plan was made for, in eval mode; it is not changed.
        plan: whose schemes stay as they are.
        data_loader: batches of inputs or (inputs, …): the sensitivity set will do, and one that shows more, by crops and mirror
            images say, does better. No labels are needed.
        method: "compensated" or "learned".
        heldout: batches that judge and are not learned from, up to 1,024 samples; they should show other things. A few hundred
            tell small gains from luck. None: one in five of the samples.
        num_samples: how many samples of the loader to use.
        batch_size: samples that run together.
        loss, loss_dim, loss_against, ignore_index, class_weights: as for :func:`clado.profile`; the loss judges, and
            is not what weights are learned by. None: the KL divergence of logits ``[N, C]``, of others the squared error
            relative to their squares.
        forward_step, loss_func: as for :func:`clado.profile`.
        device: where to run; None: where the model is.
        seed: of the order of samples.
        output_dir: folder that keeps block after block what is done: the same call goes on after an interruption.
        verbose: show a progress bar.

    Returns:
        The plan with the new weights, and what was adapted with them, in ``plan.rounded``; ``info["finish"]`` has the KL to the
        float net (the increase of ``loss_func``) on the samples that judge, of the plan as it came ("before") and after every
        stage, None where it is not finite. A stage is taken where its loss is below that of the one taken before by more than one
        standard error of the paired difference; ``info["finish"]["taken"]`` names the last, "before" where the plan keeps its
        weights.

    Raises:
        CladoError: a plan for other weights, float formats under "learned", a model that is no graph, data with NaN or fewer than
            three samples (two where others judge), fewer than two that judge.
    """
    require(method in METHODS, "finish", "method", f"be one of {', '.join(METHODS)}", repr(method))
    model = folded(model)
    check_fit(model, plan, "finish")
    if method == "learned":
        floats = [f"{own.label} of {name}" for name, own in plan.chosen.items() if not isinstance(own.number, Integer)]
        require(not floats, "finish", "plan", "hold integer weights for method 'learned'", some(floats))
    for name, number, least in (("num_samples", num_samples, 2), ("batch_size", batch_size, 1)):
        whole = isinstance(number, int) and number >= least
        require(whole, "finish", name, f"be a whole number from {least} up", repr(number))
    folder = None if output_dir is None else Path(output_dir)
    require(
        folder is None or os.path.isdir(folder) or not os.path.exists(folder),
        "finish",
        "output_dir",
        "be a folder",
        folder,
    )
    held = SampleStream(data_loader, num_samples, seed).peek(num_samples)
    digests = sample_digests(held)
    least, must = (2, "yield two samples at least") if heldout is not None else (3, "yield three samples at least")
    require(len(digests) >= least, "finish", "data_loader", must, len(digests))
    place = torch.device(device) if device is not None else next(model.parameters()).device
    judges = _judges(held, len(digests), heldout, seed)
    if heldout is None:
        held = pytree.tree_map(lambda t: t[: -sample_count(judges)], held)
    named = any(given is not None for given in (loss, loss_func, loss_dim, loss_against))
    chosen = LossChoice(
        "kl" if loss is None else loss, loss_func, loss_dim, loss_against, ignore_index, class_weights, op="finish"
    )
    reader = Reader(place, common_dtype(model), chosen, forward_step, "finish")
    (learn, _), (judge, targets) = (reader.parts(batch) for batch in (held, judges))
    weights = weights_digest(model)
    with alone(folder, "finish"), heap(), torch.no_grad(), full_precision():
        ground = _Ground(model, plan, (learn, judge), targets, reader, batch_size, named)
        settings = digest(
            {
                "model": weights,
                "plan": [plan.schemes, plan.quantizer.to_json(), plan.rounding and plan.rounding.digest],
                "data": [data_digest(d.numpy()) for d in (digests, sample_digests(judges))],
                "how": [
                    method,
                    batch_size,
                    seed,
                    place.type,
                    *(asdict(pace) for pace in (BLOCK, NET)),
                    *(code_digest(own) for own in (forward_step, loss_func) if own is not None),
                    *([chosen.name, chosen.settings()] if named and loss_func is None else []),
                ],
            }
        )
        progress = Progress(folder, settings, plan, place)
        found, losses, taken = ground.finished(method, seed, progress, verbose)
        progress.end()
    shown = {name: value if math.isfinite(value) else None for name, value in losses.items()}
    note = {
        "method": method,
        "samples": sample_count(held),
        "judged_by": ground.judges,
        "loss_increase": shown,
        "taken": taken,
    }
    if taken == BEFORE:
        return replace(plan, info={**plan.info, "finish": note})
    rounded = Rounded(
        method,
        weights,
        plan.quantizer,
        {layer.name: layer.shape for layer in plan.layers},
        found.packed(),
        digests,
        {name: value.detach().cpu() for name, value in found.others.items()},
    )
    return replace(plan, rounding=rounded.by, held=rounded, info={**plan.info, "finish": note})


def _judges(held: Any, count: int, heldout: Iterable[Any] | None, seed: int) -> Any:
    """The samples that judge: those that are given, or the last of ``held``."""
    if heldout is None:
        return pytree.tree_map(lambda t: t[-max(2, count // APART) :], held)
    found = SampleStream(heldout, MOST_JUDGES, seed, "heldout").peek(MOST_JUDGES)
    require(sample_count(found) >= 2, "finish", "heldout", "yield two samples at least", sample_count(found))
    return found


def _opened(model: nn.Module, inputs: Any, forward_step: ForwardStep | None) -> Runner:
    with users_code("finish: model must run on the samples of data_loader"):
        return open_runner(model, inputs, quantize_ends=True, forward_step=forward_step, stacked=False, op="finish")


def _channels_last(x: Tensor) -> Tensor:
    """Images in the layout that convolutions and their gradients are fastest in: a quarter off on EfficientNet-Lite0."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


class _Ground:
    """The float model as blocks, and samples to learn from and to judge by."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        samples: tuple[Any, Any],
        targets: Any,
        reader: Reader,
        batch_size: int,
        named: bool,
    ) -> None:
        self.plan, self.reader = plan, reader
        self.dtypes = {name: value.dtype for name, value in model.state_dict().items()}  # before they are made one
        self.model = converted(
            with_rounded_inputs(model, plan.layers, plan.chosen, plan.activations),
            reader.device,
            reader.dtype,
        )
        learn, judge = (reader.moved(part) for part in samples)
        require(all_finite((learn, judge)), "finish", "data_loader", "yield finite numbers", "NaN or infinity")
        runner = _opened(self.model, learn, reader.step)
        self.blocks = self._blocks(runner)
        self.state = {name: value.detach() for name, value in self.model.state_dict().items()}
        self.judges = sample_count(judge)
        self.parts, self.apart = self._parts(learn, batch_size), self._parts(judge, batch_size)
        self.few = max(1, BLOCK_JUDGES // batch_size)  # batches
        self.judged = _cut(judge, batch_size)
        self.targets = [None] * len(self.judged) if targets is None else _cut(targets, batch_size)
        with torch.no_grad():
            self.clean = [outputs_of(self.blocks, live, {}) for live in self.apart]
        self.judging = reader.fitted(self.clean[0], self.judged[0], self.targets[0]) if named else None

    def _blocks(self, runner: Runner) -> Blocks:
        found = Blocks.of(runner)
        require(found is not None, "finish", "model", "be captured as a graph", runner.note or "none")
        assert found is not None
        return found

    def _parts(self, inputs: Any, size: int) -> list[Live]:
        return [self.blocks.start(pytree.tree_map(_channels_last, part)) for part in _cut(inputs, size)]

    def losses(self, finished: Finished) -> Tensor:
        """float64: loss increase over the float net on every sample that judges."""
        return self._losses(finished.tensors(self.plan, dtype_of(self.plan, self.state)))

    def _losses(self, given: dict[str, Tensor]) -> Tensor:
        beside = zip(self.apart, self.clean, self.judged, self.targets, strict=True)
        return torch.cat([self._gaps(outputs_of(self.blocks, live, given), *others) for live, *others in beside])

    def _gaps(self, found: Any, wanted: Any, batch: Any, targets: Any) -> Tensor:
        """Loss increase of outputs over the float net's, of every sample of a batch."""
        if self.judging is None:
            return gaps(found, wanted).double().cpu()
        loss = self.judging.of_batch(batch, targets, sample_count(batch))
        return loss.increase_over(loss.reference(wanted), found).double().cpu()

    def finished(
        self, method: str, seed: int, progress: Progress, verbose: bool
    ) -> tuple[Finished, dict[str, float], str]:
        """The weights that are taken, the loss after every stage, and the stage they are of."""
        start, kept = self._start(), progress.read()
        least = self.losses(start)
        best, taken, losses = start, BEFORE, {BEFORE: least.mean().item()}
        finite = math.isfinite(losses[BEFORE])
        require(finite, "finish", "plan", "have a finite loss on the samples that judge", losses[BEFORE])
        if kept is not None:
            taken, losses = kept.taken, kept.losses
            if kept.best is not None:
                best, least = kept.best, self.losses(kept.best)
        stages = self._stages(method, seed)
        count = len(self.blocks.blocks)
        with progress_bar(f"finish ({method})", len(stages) * count, "blocks", verbose) as show:
            for number, (name, stage) in enumerate(stages):
                if kept is not None and number < kept.stage:
                    continue
                resumed = kept if kept is not None and number == kept.stage else None
                so_far = Kept(number, 0, dict(losses), taken, None if best is start else best, best)

                def done(blocks: int, now: Finished, so_far: Kept = so_far) -> None:
                    show(so_far.stage * count + blocks)
                    progress.keep(replace(so_far, blocks=blocks, now=now))

                found = stage(resumed.now if resumed else best, resumed.blocks if resumed else 0, done)
                found = found.held_by(self.plan, self.dtypes)
                own = self.losses(found)
                losses[name] = own.mean().item()
                if surely_less(own, least, LEAD):
                    best, least, taken = found, own, name
        return best, losses, taken

    def _start(self) -> Finished:
        """The plan's weights as they came."""
        others = {name: value.to(self.state[name].device) for name, value in adapted(self.plan).items()}
        return Finished(codes(self.model, self.plan), others)

    def _stages(self, method: str, seed: int) -> list[tuple[str, Stage]]:
        def walked(pace: Pace | None) -> Stage:
            samples = self.parts, self.apart[: self.few]
            return lambda start, skip, done: walk(
                self.blocks, self.plan, start, *samples, self.state, pace, seed, skip, done
            )

        def together(start: Finished, skip: int, done: Done) -> Finished:
            """Begins anew after an interruption."""

            def stepped(steps: int) -> None:
                done(steps * len(self.blocks.blocks) // NET.steps, start)

            def judged(given: dict[str, Tensor]) -> float:
                return self._losses(given).mean().item()

            return learn_net(self.blocks, self.plan, start, self.parts, judged, self.state, NET, seed, stepped)

        stages = [("compensated", walked(None)), ("learned", walked(BLOCK)), ("learned together", together)]
        return stages if method == "learned" else stages[:1]


def _cut(inputs: Any, size: int) -> list[Any]:
    """A nest of tensors in batches."""
    return [pytree.tree_map(lambda t, a=a: t[a : a + size], inputs) for a in range(0, sample_count(inputs), size)]
