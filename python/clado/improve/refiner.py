"""Plans improved by their measured loss: the matrix again, but around the plan instead of around the float model.

Few bits make large perturbations, and what was measured around the float model no longer holds near the plan. So the loss is
expanded where it is needed: every layer of the *quantized* model is moved to its other widths, the program is solved with that
matrix, and the best answer is measured, until no measured plan is better. This is sequential quadratic programming over
one-hot choices (Nocedal and Wright 2006, ch. 18) whose steps the measured loss accepts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..artifacts import Plan, Sensitivity
from ..common import heap, progress_bar, require, sample_count
from ..deploy import check_fit
from ..graph import ForwardStep, common_dtype, converted, full_precision, open_runner
from ..profiling import IGNORED, Loss, LossChoice, LossFunc, Reader, SampleStream, Sums, entries, joined, loss_arguments
from ..quant import folded, quantize_activations, variants
from ..solver import BUDGETS, LinearConstraint, SolveOptions, Solver, given_plan, least_loss_only

RADII = (4, 2, 1)  # layers that may change at once, beside no limit


def refine(
    model: nn.Module,
    data_loader: Iterable[Any],
    sens: Sensitivity,
    plans: Plan | Sequence[Plan],
    *,
    rounds: int = 4,
    loss: Any = None,
    loss_dim: int | None = None,
    loss_against: str | None = None,
    ignore_index: int = IGNORED,
    class_weights: Sequence[float] | None = None,
    num_samples: int | None = None,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    seed: int = 0,
    time_limit: float = 60.0,
    forward_step: ForwardStep | None = None,
    loss_func: LossFunc | None = None,
    verbose: bool = True,
    **arguments: Any,
) -> Plan:
    """A plan whose measured loss increase is at most that of ``plans``, within the same budgets.

    Each round measures the matrix around the present plan (as many forwards as the ``additive`` estimator), solves for a few
    plans near and far, and keeps the one of least measured loss. It ends when none is better.

    Args:
        model: the float model, in eval mode; it is not changed.
        data_loader: batches of inputs or (inputs, targets); the sensitivity set will do.
        sens: the matrix the plans were solved from: its widths and its quantizer.
        plans: where to begin: one plan, or several (see :func:`clado.shortlist`) of which the best measured one is taken.
        rounds: how many matrices to measure at most.
        loss: as for :func:`clado.profile`, with ``loss_dim``, ``loss_against``, ``ignore_index`` and ``class_weights``; None:
            the KL divergence to the float model's logits ``[N, C]``, of other outputs or with class weights the loss of
            ``sens``.
        num_samples: how many samples of the loader to use; None: as many as ``sens``.
        batch_size: samples that advance together.
        device: where to run; None: where the model is.
        seed: fixes torch's generator while ``data_loader`` is read.
        time_limit: seconds of solving per round.
        forward_step, loss_func: as for :func:`clado.profile`; None: those that ``sens`` was measured with, where it knows them.
        verbose: show a progress bar.
        **arguments: budgets and wishes of :func:`clado.solve` that hold for the result, ``objective`` and ``start`` aside.

    Returns:
        The best plan measured, priced under ``sens`` and with status "given": a bound under ``sens`` says nothing about a
        measured loss. ``info["refine"]`` lists the rounds: loss increase, plans measured, layers
        changed; ``info["refine_forward_equivalents"]`` is their cost, ``info["refine_note"]`` says where there was no graph.

    Raises:
        CladoError: no budget, a plan without bits or of other layers, bad data, as :func:`clado.profile` and
            :func:`clado.solve`.
    """
    plans = [plans] if isinstance(plans, Plan) else list(plans)
    require(len(plans) > 0, "refine", "plans", "not be empty", "none")
    model = folded(model)
    for plan in plans:
        require(bool(plan.bits), "refine", "plans", "have bits", plan.status)
        check_fit(model, plan, "refine")
    require(rounds >= 1, "refine", "rounds", "be at least 1", rounds)
    least_loss_only("refine", arguments)
    named = {"objective", "start"} & set(arguments)
    require(not named, "refine", "arguments", "leave objective and start out", sorted(named))
    forward_step = forward_step or sens.functions.get("forward_step")
    given = {
        "loss_dim": loss_dim,
        "loss_against": loss_against,
        "ignore_index": ignore_index,
        "class_weights": class_weights,
        "loss_func": loss_func,
    }
    chosen = _loss(sens, loss, **given)
    count = num_samples or sens.num_samples
    first = next(model.parameters())
    place = torch.device(device) if device is not None else first.device
    reader = Reader(place, common_dtype(model), chosen, forward_step, "refine")
    held = SampleStream(data_loader, count, seed).peek(count)
    with heap(), torch.no_grad(), full_precision():
        ground = _Ground(model, sens, held, reader, batch_size)
        starts = [{layer.name: plan.schemes[layer.name] for layer in sens.layers} for plan in plans]
        known = {tuple(schemes.values()): ground.loss(schemes) for schemes in starts} if len(starts) > 1 else {}
        best, history = min(starts, key=lambda schemes: known.get(tuple(schemes.values()), 0.0)), []
        with progress_bar("refine", rounds, "rounds", verbose) as show:
            for done in range(1, rounds + 1):
                around, value = ground.matrix(best)
                known[tuple(best.values())] = value
                found = [p for p in _proposals(around, best, time_limit, arguments) if tuple(p.values()) not in known]
                known |= {tuple(schemes.values()): ground.loss(schemes) for schemes in found}
                winner = min(found, key=lambda schemes: known[tuple(schemes.values())], default=best)
                better = known[tuple(winner.values())] < value
                changed = sum(winner[name] != best[name] for name in best) if better else 0
                history.append({"loss_increase": value, "measured": len(found), "changed": changed})
                show(done)
                if not better:
                    break
                best = winner
    budgets = {k: v for k, v in arguments.items() if k in BUDGETS}
    result = given_plan(sens, best, **budgets)
    note = {
        "contender": "refined",
        "refine": history,
        "refine_loss": known[tuple(best.values())],
        "refine_samples": ground.samples,
    }
    # In clean passes of the runner: what nobody reads is no part of them.
    note["refine_forward_equivalents"] = ground.runner.work / ground.runner.forward_share / ground.samples
    if ground.runner.note is not None:
        note["refine_note"] = ground.runner.note
    return replace(result, info={**result.info, **note})


def _loss(sens: Sensitivity, loss: Any, **given: Any) -> LossChoice:
    """What is asked for; where that is nothing, the loss of the matrix unless that is one of plain logits."""
    said = {name: value for name, value in given.items() if value is not None}
    given = {name: value for name, value in said.items() if name != "ignore_index" or value != IGNORED}
    if loss is None and "loss_func" not in given:
        known = loss_arguments(sens)
        plain = known.get("loss", "kl") in ("kl", "cross_entropy") and len(known) <= 1
        given = {"loss": "kl"} | ({} if plain and "loss_func" not in known else known) | given
        mine = sens.provenance.loss != "user" or "loss_func" in given or "loss" in known
        require(mine, "refine", "loss_func", "be given for a matrix that was measured under one", "none")
    elif loss is not None:
        given["loss"] = loss
    return LossChoice.of("refine", **given)


def _proposals(
    around: Sensitivity, best: dict[str, str], seconds: float, arguments: dict[str, Any]
) -> list[dict[str, str]]:
    """Distinct solutions near and far: without a limit on the layers that change, and within each of ``RADII``."""
    solver = Solver(around)
    start = given_plan(around, best)
    own = SolveOptions(constraints=arguments.get("constraints", ())).constraints  # a file's, too
    moves: dict[str, dict[int | str, float]] = {
        layer.name: {scheme.label: 1 for scheme in own if scheme.label != best[layer.name]}
        for layer, own in zip(around.layers, around.candidates.schemes, strict=True)
    }
    asked = [("original", None), ("shrunk", None), *(("original", radius) for radius in RADII)]
    found = []
    for objective, radius in asked:
        if objective == "shrunk" and not np.isfinite(around.stderr).all():
            continue
        limit = () if radius is None else (LinearConstraint("changed layers", moves, radius),)
        wishes = {"solver": "heuristic", **arguments, "constraints": own + limit, "start": start}
        plan = solver.solve(objective=objective, time_limit=seconds / len(asked), **wishes)
        found.append(plan.schemes)
    return list({tuple(schemes.values()): schemes for schemes in found if schemes and schemes != best}.values())


@dataclass(frozen=True)
class _Part:
    """Samples that run together.

    Attributes:
        inputs: on the device.
        choice: the loss as it was asked for.
        loss: of these samples, the float model's outputs fixed where it compares with them.
        clean: what the loss keeps of the float model's outputs.
    """

    inputs: Any
    choice: LossChoice
    loss: Loss
    clean: Any


class _Ground:
    """The model under any schemes: its loss, and the matrix around it.

    Attributes:
        parts: of the samples.
    """

    def __init__(self, model: nn.Module, sens: Sensitivity, held: Any, reader: Reader, together: int) -> None:
        self.sens, self.samples = sens, sample_count(held)
        inputs = reader.parts(held)[0]
        base = sens.activations is not None and sens.activations.base
        used = quantize_activations(model, sens.activations, sens.layers) if base and sens.activations else model
        self.runner = open_runner(
            converted(used, reader.device, reader.dtype),
            inputs,
            quantize_ends=True,
            forward_step=reader.step,
            device=reader.device,
            dtype=reader.dtype,
            op="refine",
        )
        position = {layer.name: k for k, layer in enumerate(self.runner.layers)}
        missing = [layer.name for layer in sens.layers if layer.name not in position]
        require(not missing, "refine", "sens", "be of this model", f"unknown layers {missing[:3]}")
        self.position = [position[layer.name] for layer in sens.layers]
        how = sens.quantizer, reader.device, reader.dtype, sens.rounded, sens.activations
        self.variants = variants(model, sens.candidates, *how)
        self.parts: list[_Part] = []
        for a in range(0, self.samples, together):
            self.parts.append(self._part(held, a, a + together, reader))

    def _part(self, held: Any, first: int, last: int, reader: Reader) -> _Part:
        inputs, targets = reader.parts(pytree.tree_map(lambda t: t[first:last], held))
        moved = reader.moved(inputs)
        output = self.runner.outputs(self.runner.start(moved))[0]
        known = reader.fitted(output, moved, targets)
        if len(self.parts) == 0:
            count = self.sens.num_candidates
            known = replace(known, loss=known.loss.priced(output, moved, count, count * self.runner.forward_flops))
        else:
            known = replace(known, loss=replace(known.loss, hessian=self.parts[0].choice.hessian))
        loss = known.of_batch(moved, targets, sample_count(moved))
        return _Part(moved, known.loss, loss.anchored(output), loss.reference(output))

    def loss(self, schemes: dict[str, str]) -> float:
        """Mean loss increase over the float model."""
        self._stand_on(schemes)
        ran = ((part, self.runner.outputs(self.runner.start(part.inputs))[0]) for part in self.parts)
        return torch.cat([part.loss.increase_over(part.clean, output) for part, output in ran]).mean().item()

    def matrix(self, schemes: dict[str, str]) -> tuple[Sensitivity, float]:
        """The matrix around ``schemes``, and the loss there."""
        self._stand_on(schemes)
        sums, total = Sums.zeros(self.sens.num_candidates), 0.0
        for part in self.parts:
            total += self._add(sums, part)
            sums.samples += sample_count(part.inputs)
        delta_loss, interaction, stderr = entries(sums, self.sens.candidates)
        around = replace(self.sens, delta_loss=delta_loss, interaction=interaction, stderr=stderr)
        return around, total / sums.samples

    def _add(self, sums: Sums, part: _Part) -> float:
        """Add what moves from the plan cost, changes of the plan's own outputs taken to add; the loss there, summed."""
        state, found, loss = self.runner.start(part.inputs), [], part.loss
        for k, own in zip(self.position, self.variants, strict=True):
            state = self.runner.advance(state, k)
            found.append(loss.taken(self.runner.finish(self.runner.fork(state, k, own)), 1))
        clean = self.runner.clean(state)
        z = loss.taken(clean)
        delta = self.runner.changes(joined(found), z)
        increase, pairs = loss.increase(z, delta), loss.pairs(z, delta)
        sums.loss += increase.sum(1).cpu()
        sums.loss_squared += increase.square().sum(1).cpu()
        sums.pair += pairs[0].cpu()
        sums.pair_squared += pairs[1].cpu()
        return loss.increase_over(part.clean, clean).sum().item()

    def _stand_on(self, schemes: dict[str, str]) -> None:
        candidates = self.sens.candidates
        places = candidates.indices(schemes) - candidates.starts[:-1]
        chosen = zip(self.position, self.variants, places, strict=True)
        self.runner.rebase({k: own[place] for k, own, place in chosen})
