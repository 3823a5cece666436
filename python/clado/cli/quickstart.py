"""What ``clado quickstart`` does: the whole pipeline on the embedded net, and a table that says what it bought."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .. import apply, evaluate, export, finish, given_plan, load, profile, rerank, shortlist, solve
from ..artifacts import ChosenOn, Plan, Sensitivity
from ..common import CladoError, progress_bar
from ..improve import Score
from ..report import write_report
from ..runs import ModelSpec, load_data, load_model, write_note

BITS = (2, 3, 4, 8)
UNIFORM = (2, 3, 4)
HELDOUT = "digits:heldout"
CHOOSING = 200  # held-out digits that choose among the candidate plans and judge the finish; the others are reported
SECONDS = 30.0  # at most, for all plans


def run(folder: Path, avg_bits: float) -> None:
    """Profile, solve, choose, finish, export, load back and report."""
    model = load_model()
    sensitivity = [load_data("sensitivity")]
    sens = profile(model, sensitivity, bits=BITS, num_samples=512, output_dir=folder)
    command = shlex.join(["clado", *sys.argv[1:]])
    write_note(folder, ModelSpec("digits"), "digits:sensitivity", sens.num_samples, 0, command, heldout=HELDOUT)

    images, labels = load_data(HELDOUT.partition(":")[2])
    choosing, reported = [(images[:CHOOSING], labels[:CHOOSING])], images[CHOOSING:]
    with progress_bar("solve", 2, "steps") as show:
        diagonal = solve(sens, avg_bits=avg_bits, objective="diagonal", time_limit=SECONDS)
        show(1)
        plans = shortlist(sens, avg_bits=avg_bits, time_limit=SECONDS)
        show(2)
    planned = rerank(model, choosing, [*plans, diagonal], stands=diagonal)
    plan = finish(model, planned, sensitivity, "compensated", heldout=choosing, output_dir=folder)
    plan = replace(plan, chosen_on=ChosenOn(HELDOUT, CHOOSING), info={**plan.info, "command": command})
    plan.save(folder)
    written = export(model, plan, folder / "out")
    if not same(load(folder / "out", model), apply(model, plan)):
        raise CladoError("quickstart: loaded weights must equal the applied ones bit for bit, got others")

    console = Console(highlight=False)
    made = {f"uniform {bits}": given_plan(sens, {layer.name: bits for layer in sens.layers}) for bits in UNIFORM}
    made |= {"diagonal": diagonal, "clado, planned": planned, "clado, finished": plan}
    with torch.no_grad():
        classes = model(reported).argmax(1)
    rows = {name: measured(model, own, reported, classes) for name, own in made.items()}
    console.print(table(sens, rows))
    console.print(
        f"planned: by KL on {CHOOSING} other held-out digits, of {len(planned.info['rerank'])} distinct plans; "
        f"{planned.objective_name} objective, {planned.status}, predicted {planned.objective:.4f} nats, "
        f"no plan below {planned.bound:.4f}"
    )
    console.print(f"loaded back bit for bit; {written.quantized:,} bytes of codes and scales as predicted")
    page = write_report(folder, num_samples=len(reported))
    console.print(f"\n[bold]{page}[/]  open it in a browser: what was measured, chosen and proven")
    console.print(f"next: clado inspect {folder}   clado solve {folder} --avg-bits 3   clado --help")


@dataclass(frozen=True)
class Row:
    """A plan, and what held-out digits say of it beside the float net."""

    plan: Plan
    kl: Score
    agrees: float  # share of digits that get the float net's class


def measured(model: nn.Module, plan: Plan, images: Tensor, classes: Tensor) -> Row:
    """``classes``: of the images by the float net."""
    rounded = apply(model, plan)
    with torch.no_grad():
        agrees = (rounded(images).argmax(1) == classes).double().mean().item()
    return Row(plan, evaluate(rounded, [images], loss="kl", reference=model), agrees)


def table(sens: Sensitivity, rows: dict[str, Row]) -> Table:
    """Size, KL to the float net, its paired difference to the diagonal plan's, and agreement with the float net."""
    count = rows["diagonal"].kl.num_samples
    title = f"{count} held-out digits that chose nothing; {sens.provenance.rounding}; KL to float32 in 1e-3 nats"
    out = Table(title=title, title_justify="left", box=None, header_style="bold")
    for name in ("weights", "bits", "bytes", "KL", "± s.e.", "− diagonal", "± s.e.", "same class"):
        out.add_column(name, justify="left" if name == "weights" else "right", no_wrap=True)
    out.add_row("float32", "32", f"{sum(4 * layer.numel for layer in sens.layers):,}", "0", "", "", "", "100.0%")
    for name, row in rows.items():
        gap, error = row.kl.difference(rows["diagonal"].kl)
        beside = ("", "") if name == "diagonal" else (f"{1e3 * gap:+.1f}", f"{1e3 * error:.1f}")
        out.add_row(
            f"[bold]{name}[/]" if name.startswith("clado") else name,
            f"{row.plan.avg_bits:.2f}",
            f"{row.plan.size_bytes:,}",
            f"{1e3 * row.kl.loss:.1f}",
            f"{1e3 * row.kl.loss_stderr:.1f}",
            *beside,
            f"{row.agrees:.1%}",
        )
    return out


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold the same bits."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
