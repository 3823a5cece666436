"""Commands that choose: solve, pareto, latency."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from ..common import CladoError, require
from ..solver import AXES, INVERSE, SIZE, SolveOptions
from . import fields
from .base import COUNT, command_line, main

MEASURED = 256  # held-out images that choose among plans where nothing else is asked
JUDGES = 512  # further ones that judge what --finish made, and nothing afterwards; half of what there is at most
wishes = fields.options(SolveOptions, but=(*AXES, *INVERSE))  # what solve and pareto share


@main.command()
@click.argument("run")
@fields.options(SolveOptions, only=(*AXES, *INVERSE))
@click.option(
    "--max-drop",
    help="The inverse question, measured: least --minimize that loses at most 0.5% of top-1 (points), or 0.01nats of the loss, "
    "on --drop-samples held-out images.",
)
@click.option(
    "--drop-samples",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="Held-out images for --max-drop; they judge nothing afterwards.",
)
@click.option(
    "--rerank",
    type=click.IntRange(min=2),
    help="Measure the best plans of every objective on so many other images; keep one.  [default: "
    f"{MEASURED}, where the run knows model and images and nothing else is asked]",
)
@click.option("--no-measure", is_flag=True, help="Choose by the matrix alone.")
@click.option(
    "--data",
    help="Image folder for --max-drop, --rerank and the judges of --finish; the one that was profiled when left out.",
)
@click.option(
    "--refine",
    type=COUNT,
    help="Measure again around the plan, at most so many times, while its loss falls.",
)
@click.option(
    "--correct",
    type=COUNT,
    help="Measure the plan's pairs exactly on so many images of the sensitivity set, and solve again, until it stands.",
)
@click.option(
    "--finish",
    type=click.Choice(["compensated", "learned"]),
    help="Round the plan's weights for the net that ships, on images of the sensitivity set: in the order of the forward "
    "(minutes), or learned from there (longer, better).",
)
@click.option(
    "--finish-samples", type=click.IntRange(min=2), default=640, show_default=True, help="Images for --finish."
)
@click.option("--device", help="Where --max-drop, --rerank, --refine, --correct and --finish run: cpu or cuda.")
@wishes
def solve(
    run: str,
    max_drop: str | None,
    drop_samples: int,
    rerank: int | None,
    no_measure: bool,
    data: str | None,
    refine: int | None,
    correct: int | None,
    finish: str | None,
    finish_samples: int,
    device: str | None,
    **options: Any,
) -> None:
    """Choose bits per layer within one or more budgets, with a bound; or the smallest plan for a loss.

    \b
    clado solve run --avg-bits 3 --pin blocks.0.attn.qkv=8   # the true loss decides among the best plans
    clado solve run --max-loss-increase 0.01 --minimize size_bytes   # the smallest plan for a predicted loss
    clado solve run --max-drop 0.5%              # the smallest plan for a drop of top-1, measured on other images
    clado solve run --avg-bits 3 --correct 128   # exact pairs where the closed form led; RUN keeps them
    clado solve run --avg-bits 3 --no-measure    # in seconds, by the matrix alone
    clado solve run --avg-bits 2.25 --refine 4   # few bits: the matrix again, around the plan
    clado solve run --avg-bits 3 --finish learned   # the plan's weights, rounded once more for the net that ships
    """
    from ..artifacts import PLAN_FILE, Sensitivity
    from .tables import show_plan

    sens, wishes = Sensitivity.load(run), fields.values(SolveOptions, options)
    ways = {"max-drop": max_drop, "rerank": rerank, "refine": refine, "correct": correct}
    asked = [f"--{name}" for name, value in ways.items() if value]
    own = sens.provenance.loss in ("kl", "cross_entropy", None) or not max_drop
    require(own, "solve", "loss of the run", "be kl or cross_entropy for --max-drop", sens.provenance.loss)
    inverse = ["--max-loss-increase"] if "max_loss_increase" in wishes else []
    alone = len(inverse + asked) <= 1 or not (inverse or max_drop)
    must = "come without the other, --rerank, --refine and --correct"
    require(alone, "solve", "max-loss-increase or max-drop", must, ", ".join(inverse + asked))
    if correct is not None:
        sens, plan = _correct(run, sens, correct, wishes, device)
    if max_drop is not None:
        plan = _within_drop(run, sens, max_drop, drop_samples, wishes, data, device)
    elif rerank is not None or refine is not None:
        plan = _measured(run, sens, rerank, refine, wishes, data, device)
    elif correct is None:
        measure = not (no_measure or set(INVERSE) & set(wishes)) and wishes["objective"] == "original"
        plan = _chosen(run, sens, measure, wishes, data, device)
    if inverse and not plan.bits:
        raise CladoError(f"solve: {plan.info['reason']}")
    require(bool(plan.bits), "solve", "budgets", "fit together", plan.info.get("reason"))
    if finish is not None:
        plan = _finish(run, sens, plan, finish, finish_samples, data, device)
    replace(plan, info={**plan.info, "command": command_line()}).save(Path(run) / PLAN_FILE)
    show_plan(plan, sens.provenance.unit)
    click.echo(f"next: clado export {run}   clado report {run}")


@main.command()
@click.argument("run")
@click.option("--avg-bits", required=True, help="Budgets: first:last:step, or numbers separated by commas.")
@click.option("--plot", help="Also draw it: a .png, .svg or .pdf file.")
@wishes
def pareto(run: str, avg_bits: str, plot: str | None, **options: Any) -> None:
    """Solve for many budgets; writes RUN/pareto.json.

    \b
    clado pareto run --avg-bits 2.2:8:0.2 --plot run/pareto.png
    """
    from rich.table import Table

    from ..artifacts import Sensitivity
    from ..common import write_json
    from ..report import check_path, frontier_figure, save_figure
    from ..solver import pareto as frontier
    from .tables import console

    if plot is not None:
        check_path(plot)
    plans = frontier(Sensitivity.load(run), avg_bits=_points(avg_bits), **fields.values(SolveOptions, options))
    write_json(Path(run) / "pareto.json", [json.loads(plan.to_json()) for plan in plans])
    table = Table(box=None, header_style="bold")
    for name in ("budget", "bits", "bytes", "loss increase", "no plan below", "status"):
        table.add_column(name, justify="left" if name == "status" else "right")
    for plan in plans:
        limit = f"{plan.usage['avg_bits']['limit']:g}" if plan.usage else ""
        numbers = (
            [f"{plan.avg_bits:.3f}", f"{plan.size_bytes:,}", f"{plan.objective:.5f}", f"{plan.bound:.5f}"]
            if plan.bits
            else [""] * 4
        )
        table.add_row(limit, *numbers, plan.status)
    console().print(table)
    if plot is not None:
        click.echo(f"-> {save_figure(frontier_figure(plans), plot)}")


@main.command()
@click.argument("run")
@click.option("--batch-size", type=COUNT, default=1, show_default=True, help="Samples of one forward.")
@click.option(
    "--repeats",
    type=COUNT,
    default=20,
    show_default=True,
    help="Timings per layer and width; the median counts.",
)
@click.option("--device", help="cpu or cuda.")
@click.option("--out", help="CSV file to write; RUN/latency.csv when left out.")
def latency(run: str, batch_size: int, repeats: int, device: str | None, out: str | None) -> None:
    """Time every layer under every scheme on this device, as packed layers run it: in float, rounding of inputs included.

    \b
    clado latency run --batch-size 8
    clado solve run --latency run/latency.csv --latency-ms 20
    """
    from ..artifacts import Sensitivity
    from ..deploy import time_layers, write_latency
    from ..runs import example, functions, load_run

    model, spec, note = load_run(run)
    step = functions(note).get("forward_step")
    batch = example(model, spec, note, batch_size)
    table = time_layers(model.to(device or "cpu"), Sensitivity.load(run), batch, repeats, forward_step=step)
    path = write_latency(table, out or Path(run) / "latency.csv")
    shared = [key for key in next(iter(table.values())) if all(key in row for row in table.values())]
    names = {key: f"at {key} bits" if isinstance(key, int) else f"under {key} (simulated)" for key in shared}
    sums = [f"{sum(row[key] for row in table.values()):.3f} ms {name}" for key, name in names.items()]
    click.echo(f"{len(table)} layers, batch {batch_size}{': ' if sums else ''}{', '.join(sums)} -> {path}")
    click.echo(f"next: clado solve {run} --latency {path} --latency-ms MS")


def _profiled(run: str, sens: Any) -> tuple[Any, Any, dict[str, Any], Any]:
    """As ``load_run``: model, how it was built, what was noted; and the images of the sensitivity set."""
    from ..runs import build_data, load_run

    model, spec, note = load_run(run)
    skipped = note["num_samples"] - sens.num_samples
    return model, spec, note, build_data(note["data"], model, spec, 32, note["seed"], skipped)


def _chosen(run: str, sens: Any, measure: bool, wishes: dict[str, Any], data: str | None, device: str | None) -> Any:
    """The best plan; by the true loss, where ``measure`` and the run knows a model and images that were not profiled."""
    from ..solver import least_alone, shortlist
    from ..solver import solve as choose

    if not measure:
        return choose(sens, **wishes)
    try:
        images = _Heldout.of(run, data, 2 * MEASURED).half()
    except CladoError as error:
        click.echo(f"chosen by the matrix alone, as nothing can be measured: {error}", err=True)
        return choose(sens, **wishes)
    plans = shortlist(sens, **{key: value for key, value in wishes.items() if key != "objective"})
    return images.best(plans, device, plans[least_alone(sens, plans)]) if plans[0].bits else plans[0]


def _measured(
    run: str,
    sens: Any,
    rerank: int | None,
    refine: int | None,
    wishes: dict[str, Any],
    data: str | None,
    device: str | None,
) -> Any:
    """The best of a shortlist, improved by refinement, or by its loss on other images, or both."""
    from ..solver import least_alone, shortlist

    must = "be left out with --rerank or --refine"
    require(wishes.pop("objective") == "original", "solve", "objective", must, "another")
    plans = shortlist(sens, **wishes)
    if not plans[0].bits:
        return plans[0]
    stands = plans[least_alone(sens, plans)] if refine is None else None  # refinement has measured more than this would
    if refine is not None:
        plans = [_refine(run, sens, plans, refine, wishes, device), *plans]
    return plans[0] if rerank is None else _Heldout.of(run, data, rerank).best(plans, device, stands)


def _correct(run: str, sens: Any, count: int, wishes: dict[str, Any], device: str | None) -> tuple[Any, Any]:
    """The matrix with exact pairs where plans went, and the plan that stands."""
    from ..improve import correct
    from ..runs import functions

    model, _, note, images = _profiled(run, sens)
    options = {**wishes, **functions(note), "seed": note["seed"], "device": device}
    sens, plan = correct(model, images, sens, num_samples=count, output_dir=run, **options)
    rows = plan.info["correct"]
    stands = "the plan stands" if plan.info["stands"] else "the plan does not stand yet: run the same again to go on"
    click.echo(
        f"{sum(row['pairs'] for row in rows[:-1]):,} exact pairs on {count} images in {len(rows) - 1} rounds; {stands}"
    )
    return sens, plan


def _refine(run: str, sens: Any, plans: list[Any], rounds: int, wishes: dict[str, Any], device: str | None) -> Any:
    """The best of the plans, improved on the images of the sensitivity set."""
    from ..improve import refine
    from ..runs import functions

    model, _, note, images = _profiled(run, sens)
    options = {**wishes, **functions(note), "seed": note["seed"], "device": device}
    best = refine(model, images, sens, plans, rounds=rounds, **options)
    losses = [row["loss_increase"] for row in best.info["refine"]]
    click.echo(f"refined on {sens.num_samples} images: loss increase {losses[0]:.4f} -> {best.info['refine_loss']:.4f}")
    return best


def _finish(run: str, sens: Any, plan: Any, method: str, count: int, data: str | None, device: str | None) -> Any:
    """The plan with weights rounded once more, on images of the sensitivity set."""
    from ..artifacts import ChosenOn
    from ..common import sample_count
    from ..improve import finish
    from ..runs import heldout_data, measured_by, that_chose

    model, spec, known, images = _profiled(run, sens)
    seen = that_chose(known, plan, data)
    try:
        judges = _Heldout.past(seen, model, spec, known, data, 2 * JUDGES).half().images
    except CladoError as error:
        if data is not None:
            raise
        click.echo(f"no images beside those that were profiled judge ({error}): one in five of these does", err=True)
        judges = []
    options = {"num_samples": min(count, sens.num_samples), "device": device, "seed": known["seed"], "output_dir": run}
    found = finish(model, plan, images, method, heldout=judges or None, **measured_by(known), **options)
    if judges:
        taken = seen + sum(map(sample_count, judges))
        found = replace(found, chosen_on=ChosenOn(heldout_data(known, data), taken))
    note = found.info["finish"]
    stages = ", ".join(
        f"{'not finite' if value is None else format(value, '.4f')} {name}"
        for name, value in note["loss_increase"].items()
    )
    click.echo(f"finished on {note['samples']} images; loss increase on {note['judged_by']} others: {stages}")
    last = list(note["loss_increase"])[-1]
    if note["taken"] == "before":
        click.echo("no stage is better by more than its error: weights stay as they were measured")
    elif note["taken"] != last:
        click.echo(f"weights are those of '{note['taken']}': '{last}' is not better by more than its error")
    return found


def _within_drop(
    run: str, sens: Any, text: str, count: int, wishes: dict[str, Any], data: str | None, device: str | None
) -> Any:
    """The smallest plan within a measured drop, and a table of those that were measured."""
    from rich.table import Table

    from ..artifacts import ChosenOn
    from ..improve import smallest_within
    from ..runs import functions, heldout, heldout_data, load_run
    from .tables import console

    limit, metric = _drop(text)
    model, spec, note = load_run(run)
    images = heldout(model, spec, note, data, count, 32)
    wishes = {"minimize": SIZE, "forward_step": functions(note).get("forward_step"), **wishes}
    plan = smallest_within(model, images, sens, max_drop=limit, metric=metric, device=device, **wishes)
    found = plan.info["max_drop"]
    form = "{:.2%}".format if metric == "top1" else "{:.5f}".format
    table = Table(box=None, header_style="bold")
    for name in (found["minimize"], "drop", "± s.e.", "within"):
        table.add_column(name, justify="right")
    for row in found["evaluations"]:
        within = "yes" if row["drop"] <= limit else "no"
        table.add_row(f"{row['used']:,.6g}", form(row["drop"]), form(row["stderr"]), within)
    console().print(table)
    return replace(plan, chosen_on=ChosenOn(heldout_data(note, data), found["samples"]))


def _drop(text: str) -> tuple[float, str]:
    """Limit and metric of "0.5%" or "0.01nats"."""
    for unit, scale, metric in (("%", 0.01, "top1"), ("nats", 1.0, "kl")):
        if text.endswith(unit):
            with suppress(ValueError):
                return float(text.removesuffix(unit)) * scale, metric
    raise CladoError(f"solve: max-drop must read 0.5% (points of top-1) or 0.01nats (of the loss), got {text!r}")


@dataclass
class _Heldout:
    """The run's model and images that it was not profiled on."""

    model: Any
    note: dict[str, Any]
    data: str | None
    images: list[Any]

    @classmethod
    def of(cls, run: str, data: str | None, count: int) -> _Heldout:
        from ..runs import load_run

        return cls.past(0, *load_run(run), data, count)

    @classmethod
    def past(cls, seen: int, model: Any, spec: Any, note: dict[str, Any], data: str | None, count: int) -> _Heldout:
        """Of the run's model, without the first ones, which have chosen."""
        from ..common import sample_count
        from ..runs import heldout

        images = heldout(model, spec, note, data, count, 32, seen)
        found = sum(map(sample_count, images))
        require(found >= 2, "solve", "data", "hold two images at least beside those that were profiled", found)
        return cls(model, note, data, images)

    def half(self) -> _Heldout:
        """The first half of the images: the others may still judge."""
        from ..common import sample_count
        from ..runs import first

        return replace(self, images=first(max(2, sum(map(sample_count, self.images)) // 2), self.images))

    def best(self, plans: list[Any], device: str | None, stands: Any) -> Any:
        """The plan of least true loss, or ``stands`` where none is surely better, and a table of all."""
        from ..artifacts import ChosenOn
        from ..improve import rerank
        from ..runs import heldout_data, measured_by
        from .tables import show_measured

        best = rerank(self.model, self.images, plans, device=device, stands=stands, **measured_by(self.note))
        show_measured(best)
        chosen_on = ChosenOn(heldout_data(self.note, self.data), best.info["rerank_samples"])
        return replace(best, chosen_on=chosen_on)


def _points(text: str) -> list[float]:
    """Numbers of "2,2.5,3" or "first:last:step", last included."""
    from fractions import Fraction

    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        first, last, step = (Fraction(part) for part in text.split(":"))
        require(step > 0 and last >= first, "pareto", "avg-bits", "rise from first to last", repr(text))
        return [float(first + k * step) for k in range(int((last - first) / step) + 1)]
    except ValueError:
        raise CladoError(f"pareto: avg-bits must be first:last:step or numbers, got {text!r}") from None
