"""The command that says what a run directory holds."""

from __future__ import annotations

from pathlib import Path

import click

from .base import main


@main.command()
@click.argument("run")
def inspect(run: str) -> None:
    """What a run directory holds: matrix, plan, frontier, exports, or the running sums of an unfinished run."""
    from .tables import show_run

    show_run(Path(run))
