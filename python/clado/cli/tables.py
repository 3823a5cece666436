"""Tables and bars for people, in 80 columns and without colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ..artifacts import MATRIX_FILE, PLAN_FILE, Plan, Sensitivity, minimized_in_words, unit_of
from ..common import require
from ..quant import Scheme, all_plain, scheme_names
from .holdings import holdings

WIDEST_NAME = 34  # columns of a layer's name; longer ones lose their middle
NARROWEST_NAME = 12  # what it keeps where the numbers need room


def console() -> Any:
    return Console(highlight=False, soft_wrap=False)


def show_plan(plan: Any, unit: str = "") -> None:
    """A plan in a few lines; losses in ``unit``, where they have one."""
    if not plan.bits:
        click.echo(f"{plan.status}: {plan.info.get('reason', '')}")
        return
    taken = list(plan.chosen.values())
    layers = ", ".join(f"{taken.count(scheme)} at {name}" for scheme, name in scheme_names(taken, " bits").items())
    status = "refined" if "refine" in plan.info else plan.status
    click.echo(f"{status}: {layers}; {plan.average_in_words}, {plan.size_bytes:,} bytes")
    proven = f", no plan below {plan.bound:.5f}" if math.isfinite(plan.bound) else ""
    losses = f"{plan.objective:.5f} ({plan.objective_name}){proven}"
    click.echo(f"predicted loss increase {losses}{unit and f', in {unit}'}")
    for name, use in plan.usage.items():
        click.echo(f"  {name}: {use['used']:,.6g} of {use['limit']:,.6g}")
    if "minimized" in plan.info:
        click.echo(f"  {minimized_in_words(plan)}")
    if "max_drop" in plan.info:
        show_drop(plan)


def show_measured(best: Plan) -> None:
    """The plans that were measured beside the one that was chosen."""
    table = Table(box=None, header_style="bold")
    for name in ("plan", "true increase", "behind", "± s.e.", "bytes"):
        table.add_column(name, justify="left" if name == "plan" else "right")
    places = decimals(max(abs(row["loss_increase"]) for row in best.info["rerank"]))
    for row in best.info["rerank"]:
        numbers = (f"{row[name]:.{places}f}" for name in ("loss_increase", "behind", "stderr"))
        table.add_row(row["plan"], *numbers, f"{row['size_bytes']:,}")
    console().print(table)
    stood = any(row["behind"] < 0 for row in best.info["rerank"])
    who = "the plan of the layers alone stands, as the lead of others" if stood else "the winner's lead"
    lead, unit = lead_in_words(best.info["rerank_decided"]), unit_of(best.info["rerank_loss"])
    click.echo(f"{best.info['rerank_samples']} images{unit and f', losses in {unit}'}; {who} {lead}")


def decimals(largest: float) -> int:
    """Of losses in a table: five, and more where the largest would not have three digits."""
    return max(5, 2 - math.floor(math.log10(largest))) if 0 < largest < math.inf else 5


def lead_in_words(decided: bool) -> str:
    from ..improve import SURE

    return f"{'exceeds' if decided else 'is within'} {SURE} standard errors"


def show_drop(plan: Plan) -> None:
    """What was measured of a plan that was chosen for its drop."""
    found = plan.info["max_drop"]
    drop, error, limit = (
        f"{found[key]:.2%}" if found["metric"] == "top1" else f"{found[key]:.5f}" for key in ("drop", "stderr", "limit")
    )
    what = "top-1" if found["metric"] == "top1" else f"{found['metric']}, in {unit_of(found['metric'])}"
    click.echo(
        f"  measured drop of {what}: {drop} ± {error} of {limit} on {found['samples']:,} held-out samples, which chose it; "
        f"what is left to the limit {lead_in_words(found['decided'])}"
    )


def show_scores(rows: list[tuple[str, Any]]) -> None:
    """Loss, top-1 and top-5 with standard errors; then the last row less the first on the same samples."""
    table = Table(box=None, header_style="bold")
    ranked = [] if rows[0][1].correct is None else ["top-1", "±", "top-5", "±"]
    for name in ("", "loss", "±", *ranked):
        table.add_column(name, justify="left" if not name else "right")
    for name, score in rows:
        loss = (f"{score.loss:.4f}", f"{score.loss_stderr:.4f}")
        shares = [(score.accuracy, score.accuracy_stderr), (score.accuracy5, score.accuracy5_stderr)]
        table.add_row(name, *loss, *(f"{number:.2%}" for share in shares if share[0] is not None for number in share))
    first, last = rows[0][1], rows[-1][1]
    gap = "{:+.4f} {:.4f}".format(*last.difference(first)).split()
    hits = [pair for pair in ((last.correct, first.correct), (last.correct5, first.correct5)) if pair[0] is not None]
    gaps = ["{:+.2%} {:.2%}".format(*paired(*pair)).split() for pair in hits]
    table.add_row("difference", *gap, *(cell for part in gaps for cell in part))
    console().print(table)
    click.echo(f"{first.num_samples} samples")


def paired(one: Any, other: Any) -> tuple[float, float]:
    """Mean and standard error of the difference of two samples of hits."""
    from ..improve import standard_error

    gap = one.double() - other.double()
    return gap.mean().item(), standard_error(gap)


def show_run(folder: Path) -> None:
    """What a run directory holds, then every layer with its bits and bytes as bars, or its loss increases without a plan.

    Raises:
        CladoError: a directory that holds nothing of clado.
    """
    rows = holdings(folder)
    require(bool(rows), "inspect", "run", "be a run directory that holds one of clado's files", folder)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for name, size, text in rows:
        table.add_row(name, f"{size:,}", text)
    console().print(table)
    if not (folder / MATRIX_FILE).exists():
        return
    sens = Sensitivity.load(folder)
    known, notes = sens.provenance, sens.notes
    work = f", {notes['forward_equivalents']:,.1f} forwards per sample" if "forward_equivalents" in notes else ""
    source = f"{known.estimator} estimator, {known.loss}" if known.known else "scores from elsewhere"
    rounding = "" if known.rounding is None else f", {known.rounding}"
    click.echo(f"\n{source}{rounding}{work}; {sens.num_samples:,} samples at {schemes_in_words(sens)}")
    say_how_corrected(sens)
    if known.stability is not None:
        click.echo(str(known.stability))
    if known.float_layers:
        click.echo(f"left in float: {sens.in_float}")
    plan = Plan.load(folder) if (folder / PLAN_FILE).exists() else None
    if plan is not None and plan.bits:
        console().print(plan_table(sens, plan))
        show_plan(plan, known.unit)
    else:
        console().print(loss_table(sens))
        click.echo(f"next: clado solve {folder} --avg-bits 3")
    if plan is not None:
        say_if_older(folder, sens, plan)


def say_how_corrected(sens: Sensitivity) -> None:
    """By how much losses were too low on the samples that rounded the weights."""
    if "optimism" in sens.notes:
        words = "corrected for the fit of the weights to the samples that rounded them: losses times"
        click.echo(f"{words} {sens.notes['optimism']}")


def schemes_in_words(sens: Sensitivity) -> str:
    """ "2, 4, 8 bits", or the labels of schemes that round inputs; where these are many the first and the last."""
    names = list(scheme_names(sens.candidates.flat).values())
    shown = names if len(names) <= 7 else [*names[:3], "...", names[-1]]
    return ", ".join(shown) + (" bits" if all_plain(sens.candidates.flat) else "")


def say_if_older(folder: Path, sens: Sensitivity, plan: Plan) -> None:
    """A line where the matrix beside a plan is not the one that it was solved on: a run that was prolonged, say."""
    if sens.fingerprint != plan.fingerprint:
        click.echo(
            f"note: the plan in {folder} is older than the matrix beside it; clado solve {folder} chooses anew",
            err=True,
        )


def plan_table(sens: Sensitivity, plan: Plan) -> Table:
    """Every layer's scheme and bytes as bars, and what it costs alone."""
    schemes = plan.chosen
    names = scheme_names(schemes.values())
    rows = []
    largest = max(plan.layer_bytes.values())
    for layer in plan.layers:
        scheme, size = schemes[layer.name], plan.layer_bytes[layer.name]
        alone = loss_alone(sens, layer.name, scheme) if layer in sens.layers else ""
        bars = (f"{names[scheme]} {bar(scheme.bits / 8, 8)}", f"{size:,}", bar(size / largest, 8))
        rows.append((layer.name, f"{layer.numel:,}", *bars, alone))
    head = "bits" if all_plain(schemes.values()) else "scheme"
    return layer_table(("layer", "weights", head, "bytes", "", "ΔL alone"), rows, left=(head, ""))


def loss_table(sens: Sensitivity) -> Table:
    """Every layer's loss increase alone; schemes beyond what 80 columns hold are left out from the middle."""
    distinct, names = sens.candidates.distinct, scheme_names(sens.candidates.flat)
    shown = distinct if len(distinct) <= 4 else (*distinct[:3], distinct[-1])
    rows = [
        (layer.name, f"{layer.numel:,}", *(loss_alone(sens, layer.name, scheme) for scheme in shown))
        for layer in sens.layers
    ]
    return layer_table(("layer", "weights", *(f"ΔL at {names[scheme]}" for scheme in shown)), rows)


def layer_table(heads: Sequence[str], rows: Sequence[tuple[str, ...]], left: Sequence[str] = ()) -> Table:
    """A table of layers, numbers right; where it is too wide the names give way, not the numbers."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for k, head in enumerate(heads):
        table.add_column(head, justify="left" if k == 0 or head in left else "right", no_wrap=True)
    others = [max(map(len, column)) + 2 for column in list(zip(heads, *rows, strict=True))[1:]]
    widest = min(WIDEST_NAME, max(NARROWEST_NAME, console().width - sum(others)))
    for name, *cells in rows:
        table.add_row(shortened(name, widest), *cells)
    return table


def loss_alone(sens: Sensitivity, layer: str, scheme: Scheme) -> str:
    """Loss increase of a candidate; empty where the layer does not have the scheme."""
    known = sens.candidates.has(layer, scheme)
    return f"{sens.delta_loss[sens.index(layer, scheme)]:.1e}" if known else ""


def bar(share: float, width: int) -> str:
    """A bar of ``share`` of ``width`` columns, at least a sliver; blocks where the terminal has them."""
    share = min(1.0, max(0.0, share))
    if console().options.ascii_only:
        return "#" * max(1, round(share * width))
    eighths = max(1, round(share * width * 8))
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def shortened(name: str, widest: int = WIDEST_NAME) -> str:
    """A name that fits: its beginning and its end."""
    if len(name) <= widest:
        return name
    left = widest // 3
    return f"{name[:left]}…{name[len(name) - (widest - left - 1) :]}"
