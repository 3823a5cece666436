"""Exact pairs where they matter: those of the plan that the matrix leads to, until the plan stands.

A plan takes one width of every layer, so of the V²/2 pairs L²/2 decide what it costs. They are measured by their own forwards,
put into the matrix in place of the closed form, and the program is solved again. Where the next plan has no pair that is not
measured, its predicted loss is that of the ``exact`` estimator, and every other plan's is at most as far off as before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..artifacts import MATRIX_FILE, PLAN_FILE, Plan, Sensitivity, optimism_of, pair_factors
from ..common import heap, require
from ..deploy import check_fit
from ..graph import ForwardStep, full_precision
from ..profiling import (
    NEAREST,
    Later,
    LossFunc,
    Options,
    PairTask,
    Ranks,
    Run,
    SampleStream,
    Sums,
    alone,
    corrected_entries,
    is_writer,
    loss_arguments,
    open_run,
    recorded,
    sample_digests,
    writing,
)
from ..quant import all_plain, folded
from ..solver import given_plan, least_loss_only, solve

FOLDER = "pairs"  # in a run directory: the running sums of a round


def correct(
    model: nn.Module,
    data_loader: Iterable[Any],
    sens: Sensitivity,
    *,
    num_samples: int | None = None,
    rounds: int = 10,
    forward_step: ForwardStep | None = None,
    loss_func: LossFunc | None = None,
    batch_size: int | None = None,
    max_memory: int | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    verbose: bool = True,
    **arguments: Any,
) -> tuple[Sensitivity, Plan]:
    """Solve, measure the exact Ω of the plan's pairs, and solve again, until no pair of the plan is new.

    A round costs at most 1/|B|² of the ``exact`` estimator, on as many samples as are asked for: the mean residual of the
    exact value on them is added to the closed form on all samples, with the standard error of both.

    Args:
        model: the float model that was profiled.
        data_loader: its sensitivity set, in the order it was profiled in.
        sens: its matrix by the ``additive`` estimator, or what this function made of it.
        num_samples: how many of the samples the pairs are measured on; None: an eighth of them.
        rounds: at most so many.
        forward_step, loss_func: as for :func:`clado.profile`; None: what ``sens`` was measured with, where it knows it.
            The loss is that of ``sens``.
        batch_size, max_memory, device, seed: as for :func:`clado.profile`.
        output_dir: run directory; the matrix is saved there after every round, and the running sums of a round chunk by
            chunk: after an interruption, the same call with the matrix that lies there goes on.
        verbose: show a progress bar per round.
        **arguments: budgets and wishes of :func:`clado.solve`.

    Returns:
        The matrix, with the pairs that were measured in ``info["corrected_pairs"]``, and the plan: of least objective among
        those whose pairs are all measured. ``plan.info["correct"]`` lists the rounds, ``plan.info["stands"]`` says whether
        the program has no better one, ``plan.info["correct_note"]`` where there was no graph.

    Raises:
        CladoError: no budget, another model or other samples than those of ``sens``, a matrix of another estimator, as
            :func:`clado.profile` and :func:`clado.solve`.
    """
    least_loss_only("correct", arguments)
    require(rounds >= 1, "correct", "rounds", "be at least 1", rounds)
    made = sens.provenance.estimator
    require(made == "additive", "correct", "sens", "be measured by the additive estimator", made)
    loss = {**loss_arguments(sens), **({} if loss_func is None else {"loss_func": loss_func})}
    own = sens.provenance.loss != "user" or "loss" in loss or "loss_func" in loss
    require(own, "correct", "loss_func", "be given for a matrix that was measured under one", "none")
    positions = sens.provenance.loss_options.get("positions")
    count = max(2, sens.num_samples // 8) if num_samples is None else num_samples
    require(2 <= count <= sens.num_samples, "correct", "num_samples", f"lie in 2..{sens.num_samples}", count)
    held = SampleStream(data_loader, count, seed).peek(count)
    digests = sample_digests(held).numpy()
    others = int((~np.isin(digests, sens.sample_digests)).sum())
    short = f"{len(digests)} samples, {others} of them others"
    require(len(digests) == count and not others, "correct", "data_loader", f"yield {count} samples of sens", short)
    by = sens.provenance.rounding
    plain = all_plain(sens.candidates.flat) or (sens.activations is not None and sens.activations.base)
    labels = [scheme.label for scheme in sens.candidates.distinct]
    options = Options.of(
        **({"bits": sens.bits} if plain else {"schemes": labels}),
        estimator="corrected",
        rounding=NEAREST if by is None else by.rounding,
        **loss,
        positions=positions,
        precision=sens.provenance.precision,
        num_samples=count,
        exact_samples=count,
        forward_step=forward_step or sens.functions.get("forward_step"),
        batch_size=batch_size,
        max_memory=max_memory,
        device=device,
        **asdict(sens.quantizer),
    )
    first = sens.candidates.choice(sens.candidates.starts[:-1])
    model = folded(model)
    alike = Plan(sens.layers, first, "given", fingerprint=sens.fingerprint, activations=sens.activations_of(first))
    check_fit(model, alike, "correct")
    folder = None if output_dir is None else Path(output_dir)
    with (
        alone(folder if is_writer() else None, "correct"),
        heap(keep=max_memory is None),
        full_precision(),
        torch.no_grad(),
    ):
        run = open_run(model, [held], options, task=PairTask(sens.candidates, sens.activations, sens.rounded))
        return _correct(run, held, sens, rounds, folder, verbose, arguments)


def _correct(
    run: Run,
    held: Any,
    sens: Sensitivity,
    rounds: int,
    folder: Path | None,
    verbose: bool,
    arguments: dict[str, Any],
) -> tuple[Sensitivity, Plan]:
    """Every rank measures; rank 0 solves, and tells the others what it found."""
    ranks, count = Ranks(run.device), len(sens.layers)
    known = np.zeros((sens.num_candidates,) * 2, dtype=bool)
    for v, w in sens.provenance.corrected_pairs:
        known[v, w] = True
    history: list[dict[str, Any]] = []
    plans: list[Plan] = []
    for left in range(rounds, -1, -1):
        if ranks.writes:
            start = {"start": plans[-1]} if plans else {}
            plans.append(solve(sens, **{**start, **arguments}))
            require(bool(plans[-1].bits), "correct", "budgets", "fit together", plans[-1].info.get("reason"))
        rows = ranks.agree(_rows(sens, plans[-1]) if ranks.writes else [0] * count)
        later = [[j for j in range(i + 1, count) if not known[v, rows[j]]] for i, v in enumerate(rows)]
        missing = sum(map(len, later))
        history.append({"objective": plans[-1].objective if plans else None, "pairs": missing})
        if missing == 0 or left == 0:
            break
        task = PairTask(sens.candidates, sens.activations, sens.rounded, rows, later, f"correct ({missing:,} pairs)")
        run.take(task, SampleStream([held], run.options.num_samples))
        sums = _measured(run, ranks, folder, verbose)
        known[np.ix_(rows, rows)] = True
        if ranks.writes:
            sens = _put(sens, sums, rows, later)
            history[-1]["forward_equivalents"] = run.runner.work / run.measured
            _keep(sens, folder)
    if not ranks.writes:
        parts = ranks.receive(Sensitivity.load, MATRIX_FILE), ranks.receive(Plan.load, PLAN_FILE)
        return replace(parts[0], held=sens.held), replace(parts[1], held=sens.held)
    stands = missing == 0
    plan = plans[-1] if stands else _best(sens, plans)
    notes: dict[str, Any] = {"correct": history, "stands": stands, "correct_samples": run.options.num_samples}
    if run.runner.note is not None:
        notes["correct_note"] = run.runner.note
    plan = replace(plan, info={**plan.info, **notes})
    ranks.send(replace(sens, held=None).save)
    ranks.send(replace(plan, held=None).save)
    return sens, plan


def _rows(sens: Sensitivity, plan: Plan) -> list[int]:
    """The plan's candidate of every layer."""
    found: list[int] = sens.candidates.indices(plan.schemes).tolist()
    return found


def _measured(run: Run, ranks: Ranks, folder: Path | None, verbose: bool) -> Sums:
    """Sums of a round; those of an interrupted one, and no other, are gone on with."""
    place = None if folder is None or not ranks.writes else folder / FOLDER
    if place is not None and recorded(place) != json.loads(json.dumps(run.settings)):
        shutil.rmtree(place, ignore_errors=True)
    checkpoint = run.checkpoint(place)
    run.gather(ranks, checkpoint, 0, verbose)
    return checkpoint.total


def _put(sens: Sensitivity, sums: Sums, rows: list[int], later: Later) -> Sensitivity:
    """The matrix with the measured pairs in it; a pair whose loss is not finite stays as it was."""
    block = np.ix_(rows, rows)
    factors = pair_factors(optimism_of(sens.candidates, sens.rounded, sens.sample_digests))[block]
    measured = sens.interaction[block] / factors, sens.stderr[block] / factors
    mean, error = (factors * entry for entry in corrected_entries(sums, *measured, sens.num_samples))
    interaction, stderr = sens.interaction.copy(), sens.stderr.copy()
    pairs = [[i, j] for i, behind in enumerate(later) for j in behind]
    for i, j in pairs:
        if np.isfinite(mean[i, j]):
            for v, w in ((rows[i], rows[j]), (rows[j], rows[i])):
                interaction[v, w], stderr[v, w] = mean[i, j], error[i, j]
    done = (*sens.provenance.corrected_pairs, *((rows[i], rows[j]) for i, j in pairs))
    provenance = replace(sens.provenance, corrected_pairs=done)
    return replace(sens, interaction=interaction, stderr=stderr, provenance=provenance)


def _keep(sens: Sensitivity, folder: Path | None) -> None:
    if folder is None:
        return
    with writing(folder):
        sens.save(folder / MATRIX_FILE)
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def _best(sens: Sensitivity, plans: list[Plan]) -> Plan:
    """Of plans whose pairs are measured, all but the last, the least under the matrix as it is now; the last one's bound."""
    last = plans[-1]
    priced = [(given_plan(sens, plan.schemes, last.objective_name), plan) for plan in plans[:-1]]
    price, plan = min(priced, key=lambda pair: pair[0].objective)
    return replace(plan, status="feasible", objective=price.objective, values=price.values, bound=last.bound)
