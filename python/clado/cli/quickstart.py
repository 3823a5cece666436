"""What ``clado quickstart`` does: the whole pipeline on the embedded net, and a table that says what it bought."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from .. import apply, evaluate, export, given_plan, load, profile, rerank, shortlist, solve
from ..artifacts import ChosenOn, Plan, Sensitivity
from ..common import CladoError, progress_bar
from ..improve import Score
from ..report import write_report
from ..runs import ModelSpec, load_data, load_model, write_note

BITS = (2, 3, 4, 8)
PER_TENSOR = 0  # scales as in the paper; per channel 3 bits cost this net little
HELDOUT = "digits:heldout"
CHOOSING = 200  # held-out digits that choose among the candidate plans; the others are reported
SECONDS = 30.0  # at most, for all plans


def run(folder: Path, avg_bits: float) -> None:
    """Profile, solve, choose, export, load back and report."""
    model = load_model()
    sens = profile(
        model, [load_data("sensitivity")], bits=BITS, num_samples=512, group_size=PER_TENSOR, output_dir=folder
    )
    command = shlex.join(["clado", *sys.argv[1:]])
    write_note(folder, ModelSpec("digits"), "digits:sensitivity", sens.num_samples, 0, command, heldout=HELDOUT)

    images, labels = load_data(HELDOUT.partition(":")[2])
    choosing, reported = [(images[:CHOOSING], labels[:CHOOSING])], [(images[CHOOSING:], labels[CHOOSING:])]
    with progress_bar("solve", 2, "steps") as show:
        diagonal = solve(sens, avg_bits=avg_bits, objective="diagonal", time_limit=SECONDS)
        show(1)
        plans = shortlist(sens, avg_bits=avg_bits, time_limit=SECONDS)
        show(2)
    plan = rerank(model, choosing, plans)
    plan = replace(plan, chosen_on=ChosenOn(HELDOUT, CHOOSING), info={**plan.info, "command": command})
    plan.save(folder)
    written = export(model, plan, folder / "out")
    if not same(load(folder / "out", model), apply(model, plan)):
        raise CladoError("quickstart: loaded weights must equal the applied ones bit for bit, got others")

    console = Console(highlight=False)
    console.print(table(model, sens, diagonal, plan, reported))
    console.print(
        f"chosen by KL on {CHOOSING} other held-out digits among {len(plan.info['rerank'])} distinct plans: "
        f"{plan.objective_name} objective, {plan.status}, predicted increase {plan.objective:.4f} nats, "
        f"no plan below {plan.bound:.4f}"
    )
    console.print(f"loaded back bit for bit; {written.quantized:,} bytes of codes and scales as predicted")
    page = write_report(folder, num_samples=len(reported[0][0]))
    console.print(f"\n[bold]{page}[/]  open it in a browser: what was measured, chosen and proven")
    console.print(f"next: clado inspect {folder}   clado solve {folder} --avg-bits 3   clado --help")


def table(model: nn.Module, sens: Sensitivity, diagonal: Plan, plan: Plan, data: list[Any]) -> Table:
    """Size, held-out loss and accuracy of the float net, uniform widths, the diagonal plan and ours, all rounded alike."""
    count = len(data[0][1])
    title = f"{count} held-out digits that chose nothing; {sens.provenance.rounding}"
    out = Table(title=title, title_justify="left", box=None, header_style="bold")
    for name in ("weights", "bits", "bytes", "loss", "± s.e.", "vs float", "± s.e.", "accuracy", "± s.e."):
        out.add_column(name, justify="left" if name == "weights" else "right", no_wrap=True)
    base = evaluate(model, data)
    float_bytes = sum(4 * layer.numel for layer in sens.layers)
    _row(out, "float32", "32", float_bytes, base, base)
    for bits in BITS:
        uniform = given_plan(sens, {layer.name: bits for layer in sens.layers})
        _row(out, f"uniform {bits}", f"{bits}", uniform.size_bytes, evaluate(apply(model, uniform), data), base)
    _row(
        out,
        "diagonal",
        f"{diagonal.avg_bits:.2f}",
        diagonal.size_bytes,
        evaluate(apply(model, diagonal), data),
        base,
    )
    _row(out, "[bold]clado[/]", f"{plan.avg_bits:.2f}", plan.size_bytes, evaluate(apply(model, plan), data), base)
    return out


def _row(out: Table, name: str, bits: str, size: int, score: Score, base: Score) -> None:
    gap, error = score.difference(base)
    cells = [f"{score.loss:.3f}", f"{score.loss_stderr:.3f}", f"{gap:+.3f}", f"{error:.3f}"]
    out.add_row(name, bits, f"{size:,}", *cells, f"{score.accuracy:.1%}", f"{score.accuracy_stderr:.1%}")


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold the same bits."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
