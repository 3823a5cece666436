"""Plans improved by their measured loss: the matrix again, but around the plan instead of around the float model.

Few bits make large perturbations, and what was measured around the float model no longer holds near the plan. So the loss is
expanded where it is needed: every layer of the *quantized* model is moved to its other widths, the program is solved with that
matrix, and the best answer is measured, until no measured plan is better. This is sequential quadratic programming over
one-hot choices (Nocedal and Wright 2006, ch. 18) whose steps the measured loss accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import clado_ext

from ..artifacts import Plan, Sensitivity
from ..common import progress_bar, require, sample_count
from ..deploy import check_fit
from ..graph import ForwardStep, common_dtype, converted, full_precision, open_runner
from ..profiling import LogitLoss, Loss, LossFunc, Reader, SampleStream, Sums, UserLoss, entries
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
    loss: str = "kl",
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

    Each round measures the matrix around the present plan (as many forwards as the ``logit`` estimator), solves for a few
    plans near and far, and keeps the one of least measured loss. It ends when none is better. Under ``loss_func`` a round
    measures what each layer's moves cost; the interactions are those of ``sens``, moved to the plan as its own model has them.

    Args:
        model: the float model, in eval mode; it is not changed.
        data_loader: batches of inputs or (inputs, targets); the sensitivity set will do.
        sens: the matrix the plans were solved from: its widths and its quantizer.
        plans: where to begin: one plan, or several (see :func:`clado.shortlist`) of which the best measured one is taken.
        rounds: how many matrices to measure at most.
        loss: "kl" to the float model's outputs or "cross_entropy".
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
    loss_func = loss_func or sens.functions.get("loss_func")
    own = loss_func is not None or sens.provenance.loss != "user"
    require(own, "refine", "loss_func", "be given for a matrix that was measured under one", "none")
    count = num_samples or sens.num_samples
    first = next(model.parameters())
    place = torch.device(device) if device is not None else first.device
    reader = Reader(place, common_dtype(model), loss, forward_step=forward_step, loss_func=loss_func, op="refine")
    held = SampleStream(data_loader, count, seed).peek(count)
    with torch.no_grad(), full_precision():
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
    note = {"refine": history, "refine_loss": known[tuple(best.values())], "refine_samples": ground.samples}
    # In clean passes of the runner: what nobody reads is no part of them.
    note["refine_forward_equivalents"] = ground.runner.work / ground.runner.forward_share / ground.samples
    if ground.runner.note is not None:
        note["refine_note"] = ground.runner.note
    return replace(result, info=note)


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


class _Ground:
    """The model under any schemes: its loss, and the matrix around it.

    Attributes:
        parts: (inputs on the device, the loss of their outputs, what it keeps of the float model's) of the samples that run
            together.
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
        self.parts = [self._part(held, a, a + together, reader) for a in range(0, self.samples, together)]

    def _part(self, held: Any, first: int, last: int, reader: Reader) -> tuple[Any, Loss, Tensor]:
        inputs, targets = reader.parts(pytree.tree_map(lambda t: t[first:last], held))
        moved = reader.moved(inputs)
        output = self.runner.outputs(self.runner.start(moved))[0]
        known = replace(reader, classes=reader.classes_of(output))
        loss = known.loss(moved, targets, sample_count(moved))
        return moved, loss, loss.reference(output)

    def loss(self, schemes: dict[str, str]) -> float:
        """Mean loss increase over the float model."""
        self._stand_on(schemes)
        ran = ((loss, clean, self.runner.outputs(self.runner.start(part))[0]) for part, loss, clean in self.parts)
        return torch.cat([loss.increase_over(clean, output) for loss, clean, output in ran]).mean().item()

    def matrix(self, schemes: dict[str, str]) -> tuple[Sensitivity, float]:
        """The matrix around ``schemes``, and the loss there."""
        self._stand_on(schemes)
        sums, total = Sums.zeros(self.sens.num_candidates), 0.0
        for part, loss, clean in self.parts:
            if isinstance(loss, UserLoss):
                total += self._add_losses(sums, part, loss, clean)
            else:
                total += self._add_logits(sums, part, loss, clean)
            sums.samples += len(clean)
        delta_loss, interaction, stderr = entries(sums, self.sens.candidates)
        if isinstance(self.parts[0][1], UserLoss):
            interaction, stderr = self._moved_interactions(schemes, stderr)
        around = replace(self.sens, delta_loss=delta_loss, interaction=interaction, stderr=stderr)
        return around, total / sums.samples

    def _add_logits(self, sums: Sums, part: Any, loss: LogitLoss, clean: Tensor) -> float:
        """Add what samples give in closed form (docs/numerics.md) about the plan's own logits; their loss there, summed."""
        finished, state = self._moves(part, self.runner.finish)
        logits = self.runner.clean(state)
        delta = torch.cat(finished).sub_(logits)
        total, squares = clado_ext.pairwise_ce(logits, delta)
        now, change = logits.double().log_softmax(1), delta.double()
        increase = torch.logsumexp(now + change, -1) - (loss.probabilities(clean).to(now.device) * change).sum(-1)
        _add(sums, increase)
        sums.pair += total.cpu()
        sums.pair_squared += squares.cpu()
        return loss.increase_over(clean, logits).sum().item()

    def _add_losses(self, sums: Sums, part: Any, loss: UserLoss, clean: Tensor) -> float:
        """Add what samples lose by a move from the plan; their loss there, summed."""
        moved, state = self._moves(part, lambda branch: loss.values(self.runner.outputs(branch)))
        here = loss.losses(self.runner.outputs(state)[0]).double()
        _add(sums, torch.cat(moved) - here)
        return (here.cpu() - clean).sum().item()

    def _moves(self, part: Any, measured: Callable[[Any], Tensor]) -> tuple[list[Tensor], Any]:
        """What every layer's candidates give, the others as they are; and the state at the end where nothing moved."""
        state, found = self.runner.start(part), []
        for k, own in zip(self.position, self.variants, strict=True):
            state = self.runner.advance(state, k)
            found.append(measured(self.runner.fork(state, k, own)))
        return found, state

    def _moved_interactions(self, schemes: dict[str, str], own: Any) -> tuple[Any, Any]:
        """Of the model that ``sens`` is of the loss, the interactions of moves from these schemes, with standard errors.

        With the loss Σ ΔL_v + Σ Ω_vw, two moves from a to v and from b to w together cost Ω_vw - Ω_vb - Ω_aw + Ω_ab more than
        apart. ``own``: standard errors of moves alone.
        """
        candidates, omega = self.sens.candidates, self.sens.interaction
        base = candidates.indices(schemes)[candidates.layer_of]
        interaction = omega - omega[:, base] - omega[base] + omega[np.ix_(base, base)]
        variance = self.sens.stderr**2
        stderr = np.sqrt(variance + variance[:, base] + variance[base] + variance[np.ix_(base, base)])
        interaction[candidates.same_layer] = stderr[candidates.same_layer] = 0.0
        np.fill_diagonal(stderr, np.diag(own))
        return interaction, stderr

    def _stand_on(self, schemes: dict[str, str]) -> None:
        candidates = self.sens.candidates
        places = candidates.indices(schemes) - candidates.starts[:-1]
        chosen = zip(self.position, self.variants, places, strict=True)
        self.runner.rebase({k: own[place] for k, own, place in chosen})


def _add(sums: Sums, increase: Tensor) -> None:
    """Losses ``[V, N]`` of single moves."""
    sums.loss += increase.sum(1).cpu()
    sums.loss_squared += increase.square().sum(1).cpu()
