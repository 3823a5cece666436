"""Progress on the terminal, with an ETA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(label: str, total: float, unit: str, visible: bool = True) -> Iterator[Callable[..., None]]:
    """Yield a function of how much of ``total`` is done, and of a note to show with it; draws on stderr, nothing when not
    ``visible``."""
    if not visible:
        yield lambda done, note="": None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, speed="", note="")

        def advance(done: float, note: str = "") -> None:
            speed = bar.tasks[0].speed
            bar.update(task, completed=done, speed=f"{speed:,.0f} {unit}/s" if speed else "", note=note)

        yield advance
        bar.update(task, completed=total)
