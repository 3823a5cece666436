"""Plans improved by their measured loss: the matrix again, but around the plan instead of around the float model.

Few bits make large perturbations, and what was measured around the float model no longer holds near the plan. So the loss is
expanded where it is needed: every layer of the *quantized* model is moved to its other widths, the program is solved with that
matrix, and the best answer is measured, until no measured plan is better. This is sequential quadratic programming over
one-hot choices (Nocedal and Wright 2006, ch. 18) whose steps the measured loss accepts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import clado_ext

from ..artifacts import Plan, Sensitivity
from ..common import check_targets, moved_to, progress_bar, require, split_batch
from ..deploy import check_fit
from ..graph import common_dtype, converted, full_precision, open_runner
from ..profiling import LOSSES, SampleStream, Sums, entries
from ..quant import Scheme, folded, quantize_activations, variants
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
    verbose: bool = True,
    **arguments: Any,
) -> Plan:
    """A plan whose measured loss increase is at most that of ``plans``, within the same budgets.

    Each round measures the matrix around the present plan (as many forwards as the ``logit`` estimator), solves for a few
    plans near and far, and keeps the one of least measured loss. It ends when none is better.

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
    require(loss in LOSSES, "refine", "loss", f"be one of {', '.join(LOSSES)}", repr(loss))
    least_loss_only("refine", arguments)
    named = {"objective", "start"} & set(arguments)
    require(not named, "refine", "arguments", "leave objective and start out", sorted(named))
    count = num_samples or sens.num_samples
    inputs, targets = split_batch(SampleStream(data_loader, count, seed).peek(count), "refine")
    require(loss == "kl" or targets is not None, "refine", "data_loader", "yield targets for cross_entropy", "none")
    place = torch.device(device) if device is not None else next(model.parameters()).device
    with torch.no_grad(), full_precision():
        ground = _Ground(
            model,
            place,
            sens,
            inputs,
            targets if loss != "kl" else None,
            batch_size,
        )
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
    note = {"refine": history, "refine_loss": known[tuple(best.values())], "refine_samples": len(inputs)}
    # In clean passes of the runner: what nobody reads is no part of them.
    note["refine_forward_equivalents"] = ground.runner.work / ground.runner.forward_share / len(inputs)
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
    taken = {name: Scheme.of(scheme).bits for name, scheme in best.items()}
    moves = {name: {b: 1 for b in around.bits if b != bits} for name, bits in taken.items()}
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
        target: probabilities ``[N, C]`` float64 the loss refers to; constant: what they add to it, ``[N]``.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        sens: Sensitivity,
        inputs: Tensor,
        targets: Tensor | None,
        chunk: int,
    ) -> None:
        dtype = common_dtype(model)
        self.sens, self.chunk = sens, chunk
        self.inputs = moved_to(inputs, device, dtype)
        used = quantize_activations(model, sens.activations, sens.layers) if sens.activations else model
        self.runner = open_runner(converted(used, device, dtype), self.inputs, quantize_ends=True, op="refine")
        position = {layer.name: k for k, layer in enumerate(self.runner.layers)}
        missing = [layer.name for layer in sens.layers if layer.name not in position]
        require(not missing, "refine", "sens", "be of this model", f"unknown layers {missing[:3]}")
        self.position = [position[layer.name] for layer in sens.layers]
        self.variants = variants(model, sens.candidates, sens.quantizer, device, dtype, sens.rounded)
        parts = [self.runner.clean(self.runner.start(part)) for part in self.inputs.split(chunk)]
        clean = torch.cat(parts).double().log_softmax(1)
        check_targets(targets, clean.shape[1])
        self.target = clean.exp() if targets is None else nn.functional.one_hot(targets, clean.shape[1]).to(clean)
        self.constant = (self.target * clean).sum(1)

    def loss(self, schemes: dict[str, str]) -> float:
        """Mean loss increase over the float model."""
        self._stand_on(schemes)
        parts = [self.runner.clean(self.runner.start(part)) for part in self.inputs.split(self.chunk)]
        return (self.constant - (self.target * torch.cat(parts).double().log_softmax(1)).sum(1)).mean().item()

    def matrix(self, schemes: dict[str, str]) -> tuple[Sensitivity, float]:
        """The matrix around ``schemes``, in closed form (docs/numerics.md) about the plan's own logits, and the loss there."""
        self._stand_on(schemes)
        sums, loss = Sums.zeros(self.sens.num_candidates), 0.0
        for first in range(0, len(self.inputs), self.chunk):
            part = slice(first, first + self.chunk)
            state, finished = self.runner.start(self.inputs[part]), []
            for k, own in zip(self.position, self.variants, strict=True):
                state = self.runner.advance(state, k)
                finished.append(self.runner.finish(self.runner.fork(state, k, own)))
            logits = self.runner.clean(state)
            delta = torch.cat(finished).sub_(logits)
            total, squares = clado_ext.pairwise_ce(logits, delta)
            now, change = logits.double().log_softmax(1), delta.double()
            increase = torch.logsumexp(now + change, -1) - (self.target[part] * change).sum(-1)
            loss += (self.constant[part] - (self.target[part] * now).sum(1)).sum().item()
            sums.loss += increase.sum(1).cpu()
            sums.loss_squared += increase.square().sum(1).cpu()
            sums.pair += total.cpu()
            sums.pair_squared += squares.cpu()
            sums.samples += len(logits)
        delta_loss, interaction, stderr = entries(sums, self.sens.candidates)
        around = replace(self.sens, delta_loss=delta_loss, interaction=interaction, stderr=stderr)
        return around, loss / sums.samples

    def _stand_on(self, schemes: dict[str, str]) -> None:
        candidates = self.sens.candidates
        places = candidates.indices(schemes) - candidates.starts[:-1]
        chosen = zip(self.position, self.variants, places, strict=True)
        self.runner.rebase({k: own[place] for k, own, place in chosen})
