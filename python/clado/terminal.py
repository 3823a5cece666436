"""Tables and bars for people, in 80 columns and without colour."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console
from rich.table import Table


def console() -> Any:
    return Console(highlight=False, soft_wrap=False)


def show_plan(plan: Any) -> None:
    if not plan.bits:
        click.echo(f"{plan.status}: {plan.info.get('reason', '')}")
        return
    counts = {bits: list(plan.bits.values()).count(bits) for bits in sorted(set(plan.bits.values()))}
    layers = ", ".join(f"{count} at {bits} bits" for bits, count in counts.items())
    click.echo(f"{plan.status}: {layers}; {plan.avg_bits:.3f} bits on average, {plan.size_bytes:,} bytes")
    click.echo(
        f"predicted loss increase {plan.objective:.5f} nats ({plan.objective_name}), no plan below {plan.bound:.5f}"
    )
    for name, use in plan.usage.items():
        click.echo(f"  {name}: {use['used']:,.6g} of {use['limit']:,.6g}")


def show_scores(rows: list[tuple[str, Any]]) -> None:
    table = Table(box=None, header_style="bold")
    for name in ("", "loss", "±", "top-1", "±", "top-5"):
        table.add_column(name, justify="left" if not name else "right")
    for name, score in rows:
        top5 = "" if score.correct5 is None else f"{score.correct5.double().mean().item():.2%}"
        table.add_row(
            name,
            f"{score.loss:.4f}",
            f"{score.loss_stderr:.4f}",
            f"{score.accuracy:.2%}",
            f"{score.accuracy_stderr:.2%}",
            top5,
        )
    console().print(table)
    click.echo(f"{rows[0][1].num_samples} samples")
