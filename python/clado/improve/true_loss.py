"""The true loss of models and plans on samples that did not enter the matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat, tee
from typing import Any

import torch
from torch import Tensor, nn

from ..artifacts import Plan
from ..common import CladoError, heap, progress_bar, require, sample_count
from ..deploy import adapted, apply, check_fit
from ..graph import ForwardStep, Runner, common_dtype, converted, full_precision, open_runner
from ..profiling import IGNORED, Loss, LossChoice, LossFunc, Reader
from ..quant import Candidates, InputRounding, Variant, folded, input_rounding, variants

SURE = 1.96  # standard errors of a difference: one in 20 is larger by chance


@dataclass(frozen=True)
class Score:
    """Loss and accuracy on labelled samples.

    Attributes:
        losses: float64 ``[N]`` per sample: the cross-entropy in nats, or the loss that was asked for.
        correct: bool ``[N]``, None under another loss; correct5: bool ``[N]``, the label among the five best, None with fewer
            than six classes.
    """

    losses: Tensor
    correct: Tensor | None = None
    correct5: Tensor | None = None

    @property
    def num_samples(self) -> int:
        return len(self.losses)

    @property
    def loss(self) -> float:
        return self.losses.mean().item()

    @property
    def loss_stderr(self) -> float:
        return standard_error(self.losses)

    @property
    def accuracy(self) -> float | None:
        return _mean(self.correct)

    @property
    def accuracy_stderr(self) -> float | None:
        return _error(self.correct)

    @property
    def accuracy5(self) -> float | None:
        return _mean(self.correct5)

    @property
    def accuracy5_stderr(self) -> float | None:
        return _error(self.correct5)

    def difference(self, other: Score) -> tuple[float, float]:
        """Mean and standard error of this loss minus another's on the same samples, paired."""
        gap = self.losses - other.losses
        return gap.mean().item(), standard_error(gap)


def _mean(hits: Tensor | None) -> float | None:
    return None if hits is None else hits.double().mean().item()


def _error(hits: Tensor | None) -> float | None:
    return None if hits is None else standard_error(hits.double())


def standard_error(values: Tensor) -> float:
    """Of the mean; NaN for a single value."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else float("nan")


@heap()
def evaluate(
    model: nn.Module,
    data_loader: Iterable[Any],
    device: str | torch.device | None = None,
    *,
    loss: Any = None,
    loss_dim: int | None = None,
    loss_against: str | None = None,
    ignore_index: int = IGNORED,
    class_weights: Sequence[float] | None = None,
    reference: nn.Module | None = None,
    forward_step: ForwardStep | None = None,
    loss_func: LossFunc | None = None,
) -> Score:
    """Cross-entropy and accuracy of a model in eval mode on batches of (inputs, targets), or another loss.

    Args:
        loss, loss_dim, loss_against, ignore_index, class_weights: as for :func:`clado.profile`; None: the
            cross-entropy. That of logits ``[n, C]`` comes with accuracies, any other loss alone.
        reference: the float model, for losses that compare with its outputs: those over its own.
        forward_step, loss_func: as for :func:`clado.profile`. Under ``loss_func`` the score has losses alone.

    Raises:
        CladoError: no data, no targets, labels that are no classes, or outputs that do not suit the loss.
    """
    chosen = LossChoice(
        "cross_entropy" if loss is None else loss,
        loss_func,
        loss_dim,
        loss_against,
        ignore_index,
        class_weights,
        op="evaluate",
    )
    reader = reader_of(model, chosen, device, forward_step, "evaluate")
    losses, hits, hits5 = [], [], []
    batches = data_loader
    beside: Iterator[Batch | None] = repeat(None)
    if reference is not None:
        batches, again = tee(data_loader)  # both models look at a batch before the next is read
        beside = ran(reference, again, reader)
    for batch, clean in zip(ran(model, batches, reader), beside, strict=reference is not None):
        if clean is not None and (batch.choice.compares_outputs or not batch.choice.has_values):
            losses.append(batch.loss.increase_over(clean.loss.reference(clean.output), batch.output))
            continue
        must = "be given for a loss that compares with the float model's outputs"
        require(not batch.choice.compares_outputs, "evaluate", "reference", must, "none")
        losses.append(batch.loss.value(batch.output).cpu())
        if loss_func is None and loss in (None, "cross_entropy") and batch.output.dim() == 2:
            logits, labels = batch.output.double().cpu(), batch.targets.cpu().long()
            hits.append(logits.argmax(1) == labels)
            hits5 += [(logits.topk(5).indices == labels[:, None]).any(1)] if logits.shape[1] > 5 else []
    return Score(torch.cat(losses), torch.cat(hits) if hits else None, torch.cat(hits5) if hits5 else None)


def rerank(
    model: nn.Module,
    heldout: Iterable[Any],
    plans: Sequence[Plan],
    loss: Any = "kl",
    device: str | torch.device | None = None,
    *,
    stands: Plan | None = None,
    loss_dim: int | None = None,
    loss_against: str | None = None,
    ignore_index: int = IGNORED,
    class_weights: Sequence[float] | None = None,
    forward_step: ForwardStep | None = None,
    loss_func: LossFunc | None = None,
) -> Plan:
    """The plan of least true loss increase on held-out samples; equals go to the smaller one.

    The least of several noisy losses is often a lucky one. Where one plan is to be trusted before the others, as the one that
    needs no interactions, let it stand.

    Args:
        model: the float model.
        heldout: batches of inputs or (inputs, targets) that did not enter the matrix; read once.
        plans: at least one plan with bits; equal ones are evaluated once.
        loss: "kl" to the float model's outputs (no labels, and far less noise between plans), or another one as for
            :func:`clado.profile`, with ``loss_dim``, ``loss_against``, ``ignore_index`` and ``class_weights``.
        device: where to run; None: where the model is.
        stands: one of ``plans``, the winner unless the least loss is below its own by more than 1.96 standard errors of the
            paired difference: among several plans that are no better, one is often ahead by an error. None: the least wins.
        forward_step, loss_func: as for :func:`clado.profile`.

    Returns:
        The winner, its ``info["rerank"]`` listing what every plan is, its loss increase, and how far it is behind the winner
        with the standard error of that paired difference, the winner first; ``info["rerank_decided"]`` says whether the
        runner-up is more than 1.96 standard errors behind.

    Raises:
        CladoError: no plans, one that stands and is not among them, no data, no targets for the cross-entropy, or outputs that
            do not suit the loss.
    """
    require(len(plans) > 0, "rerank", "plans", "not be empty", "none")
    distinct = list({tuple(plan.schemes.items()): plan for plan in reversed(plans)}.values())[::-1]
    known = [plan.schemes for plan in distinct]
    require(stands is None or isinstance(stands, Plan), "rerank", "stands", "be one of plans", repr(stands))
    require(stands is None or stands.schemes in known, "rerank", "stands", "be one of plans", "another")
    chosen = LossChoice(loss, loss_func, loss_dim, loss_against, ignore_index, class_weights, op="rerank")
    increases = loss_increases(model, heldout, distinct, chosen, device, forward_step=forward_step)
    order = sorted(range(len(distinct)), key=lambda k: (increases[k].mean().item(), distinct[k].size_bytes))
    if stands is not None:
        order = standing(order, known.index(stands.schemes), increases)
    best = order[0]
    compared = [
        {
            "plan": distinct[k].info.get("contender", distinct[k].objective_name),
            "objective": distinct[k].objective_name,
            "loss_increase": increases[k].mean().item(),
            "behind": (increases[k] - increases[best]).mean().item(),
            "stderr": standard_error(increases[k] - increases[best]),
            "size_bytes": distinct[k].size_bytes,
        }
        for k in order
    ]
    decided = all(surely_less(increases[best], increases[k], SURE) for k in order[1:2])
    record = {
        "rerank": compared,
        "rerank_loss": chosen.name,
        "rerank_samples": increases.shape[1],
        "rerank_decided": decided,
    }
    return replace(distinct[best], info={**distinct[best].info, **record})


def standing(order: list[int], stands: int, increases: Tensor) -> list[int]:
    """``order`` with ``stands`` in front, unless its first is surely better.

    Args:
        order: places of plans, of least loss first.
        stands: one of these places.
        increases: ``[plans, N]`` loss increases per sample.
    """
    beaten = surely_less(increases[order[0]], increases[stands], SURE)
    return order if beaten else [stands, *(k for k in order if k != stands)]


def surely_less(losses: Tensor, known: Tensor, errors: float) -> bool:
    """Whether the mean of ``[N]`` losses is below that of others on the same samples by more than so many standard errors of the
    paired difference; one sample is sure of nothing."""
    gap = known - losses
    return gap.mean().item() > errors * standard_error(gap)


def loss_increases(
    model: nn.Module,
    heldout: Iterable[Any],
    plans: Sequence[Plan],
    loss: LossChoice | None = None,
    device: str | torch.device | None = None,
    verbose: bool = False,
    *,
    forward_step: ForwardStep | None = None,
) -> Tensor:
    """True loss increase of every plan on every sample: float64 ``[plans, N]``; arguments as :func:`rerank`.

    Args:
        loss: which; None: the KL divergence to the float model's outputs.
        verbose: show a progress bar.

    Raises:
        CladoError: as :func:`rerank`.
    """
    reader = reader_of(model, loss or LossChoice(op="rerank"), device, forward_step, "rerank")
    batches, model = list(heldout), folded(model)
    for plan in plans:
        check_fit(model, plan, "rerank")
    with heap(), torch.inference_mode(), full_precision():
        clean = []
        for batch in ran(model, batches, reader):
            clean.append(batch.loss.reference(batch.output))
            fitted = replace(reader, loss=batch.choice)
        parts: list[list[Tensor]] = [[] for _ in plans]
        runner = _runner(model, batches[0], plans, reader)
        if runner is None:
            for plan, own in zip(plans, parts, strict=True):
                under_plan = zip(ran(apply(model, plan), batches, reader), clean, strict=True)
                own += [batch.loss.increase_over(known, batch.output) for batch, known in under_plan]
            return torch.stack([torch.cat(own) for own in parts])
        under = _Planned(model, runner, plans, reader)
        with progress_bar(f"evaluate {len(plans)} plans", len(batches), "batches", verbose) as show:
            for k, (item, known) in enumerate(zip(batches, clean, strict=True)):
                inputs, targets = reader.parts(item)
                moved = reader.moved(inputs)
                measured = fitted.of_batch(moved, targets, sample_count(moved))
                for plan_number, output in under.outputs(moved):
                    parts[plan_number].append(measured.increase_over(known, output))
                show(k + 1)
    return torch.stack([torch.cat(own) for own in parts])


def reader_of(
    model: nn.Module, loss: LossChoice, device: str | torch.device | None, forward_step: ForwardStep | None, op: str
) -> Reader:
    require(not model.training, op, "model", "be in eval mode (model.eval())", "train mode")
    first = next(model.parameters())
    place = torch.device(device) if device is not None else first.device
    return Reader(place, common_dtype(model), loss, forward_step, op)


@dataclass(frozen=True)
class Batch:
    """What a model made of one of the loader's batches, and the loss of that, as a run has it and as this batch does."""

    output: Any
    targets: Any
    choice: LossChoice
    loss: Loss


def ran(model: nn.Module, data_loader: Iterable[Any], reader: Reader) -> Iterator[Batch]:
    """Every batch, run by a model; raises where there is none, or the output does not suit the loss."""
    model, samples = converted(model, reader.device, reader.dtype), 0
    for item in data_loader:
        inputs, targets = reader.parts(item)
        moved = reader.moved(inputs)
        with torch.inference_mode(), full_precision():
            output = reader.outputs(model, moved)
        known = reader.fitted(output, moved, targets)
        samples += sample_count(moved)
        yield Batch(output, targets, known.loss, known.of_batch(moved, targets, sample_count(moved)))
    require(samples > 0, reader.op, "data_loader", "yield at least one sample", "none")


def _runner(model: nn.Module, batch: Any, plans: Sequence[Plan], reader: Reader) -> Runner | None:
    """What runs the model under one plan after the other; None where it does not know every weight of the plans."""
    if any(plan.base_rounds_inputs or adapted(plan) for plan in plans):  # the graph of the float model knows neither
        return None
    try:
        runner = open_runner(
            model,
            reader.parts(batch)[0],
            quantize_ends=True,
            forward_step=reader.step,
            device=reader.device,
            dtype=reader.dtype,
            stacked=False,
            op=reader.op,
        )
    except CladoError:  # none of the layers that a runner knows
        return None
    known = {layer.name for layer in runner.layers}
    return runner if all(known.issuperset(plan.schemes) for plan in plans) else None


class _Planned:
    """A runner under several plans: those that agree on the first layers share that part of the forward."""

    def __init__(self, model: nn.Module, runner: Runner, plans: Sequence[Plan], reader: Reader) -> None:
        self.model, self.runner, self.plans, self.reader = model, runner, plans, reader
        self._variants: dict[Any, Variant] = {}  # by layer and what makes them

    def outputs(self, inputs: Any) -> Iterator[tuple[int, Any]]:
        """(plan, what the model gives under it), every plan once."""
        yield from self._walk(self.runner.start(inputs), 0, list(range(len(self.plans))))

    def _walk(self, state: Any, k: int, members: list[int]) -> Iterator[tuple[int, Any]]:
        state = self.runner.advance(state, k)
        if k == self.runner.num_layers:
            output = self.runner.outputs(state)[0]
            yield from ((m, output) for m in members)
            return
        groups: dict[Any, list[int]] = {}
        for m in members:
            plan = self.plans[m]
            scheme = plan.schemes.get(self.runner.layers[k].name)
            rounds = None if scheme is None else self._rounds(k, plan)
            groups.setdefault((k, plan.quantizer, plan.rounding, rounds, scheme), []).append(m)
        for made_by, group in groups.items():
            planned = state
            if made_by[-1] is not None:
                planned = self.runner.fork(state, k, [self._variant(made_by, self.plans[group[0]])])
            yield from self._walk(planned, k + 1, group)

    def _rounds(self, k: int, plan: Plan) -> InputRounding | None:
        layer = self.runner.layers[k]
        return input_rounding(layer, plan.chosen[layer.name], plan.activations)

    def _variant(self, made_by: Any, plan: Plan) -> Variant:
        """Of a layer under one of the plans that have the same."""
        if made_by not in self._variants:
            layer, reader = self.runner.layers[made_by[0]], self.reader
            one = Candidates.uniform((layer,), (plan.schemes[layer.name],))
            how = plan.quantizer, reader.device, reader.dtype, plan.rounded, plan.activations
            self._variants[made_by] = variants(self.model, one, *how)[0][0]
        return self._variants[made_by]
