"""What a run directory notes beside its artifacts: the model, its data, and which images nobody has seen yet."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..artifacts import Plan
from ..common import CladoError, require, write_json
from .data import build_data
from .models import ModelSpec, build_model

RUN_FILE = "model.json"


def load_run(run: str) -> tuple[Any, Any, dict[str, Any]]:
    """The model of a run directory, how it was built, and what was noted with it."""
    spec, note = read_note(run)
    return build_model(spec), spec, note


def read_note(run: str) -> tuple[ModelSpec, dict[str, Any]]:
    """How the model of a run directory was built, and what was noted with it."""
    path = Path(run) / RUN_FILE
    require(os.path.isfile(path), "run", "directory", f"hold {RUN_FILE} as clado profile writes it", run)
    try:
        note = json.loads(path.read_text())
        spec = ModelSpec(**note["spec"])
        note["data"], note["num_samples"], note["seed"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError, OSError) as error:
        raise CladoError(f"run: {RUN_FILE} must be whole, got {path} ({error})") from None
    return spec, note


def write_note(
    folder: Path,
    spec: ModelSpec,
    data: str,
    num_samples: int,
    seed: int,
    command: str,
    heldout: str | None = None,
    loss_func: str | None = None,
) -> None:
    """Note how the model was built, what was measured on which data, by which command and with which versions.

    Args:
        heldout: data that later stages take where none is named; None: what ``data`` has left.
        loss_func: the user's loss as it was named; None: one of clado's.
    """
    note = {
        "spec": spec.to_json(),
        "data": data,
        "num_samples": num_samples,
        "seed": seed,
        "command": command,
        "versions": versions(),
    }
    more = {"heldout": heldout, "loss_func": loss_func}
    write_json(folder / RUN_FILE, {**note, **{name: value for name, value in more.items() if value is not None}})


def versions() -> dict[str, str]:
    """Versions of everything whose change may change a result."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    known = {"python": platform.python_version()}
    for package in ("clado", "torch", "numpy", "timm", "pyscipopt"):
        with suppress(PackageNotFoundError):
            known[package] = version(package)
    return {**known, "platform": f"{platform.system()} {platform.machine()}"}


def heldout_data(note: dict[str, Any], data: str | None) -> str:
    """Where held-out images come from: what was asked for, else what the run notes, else the data that was profiled."""
    return data or note.get("heldout") or note["data"]


def heldout(
    model: Any, spec: Any, note: dict[str, Any], data: str | None, count: int | None, batch_size: int, skip: int = 0
) -> list[Any]:
    """Up to ``count`` images, none of those the matrix was made of, nor the ``skip`` next ones."""
    source = heldout_data(note, data)
    profiled = note["num_samples"] if source == note["data"] else 0
    batches: list[Any] = []
    left = sys.maxsize if count is None else count
    for item in build_data(source, model, spec, batch_size, note["seed"], profiled + skip):
        known = isinstance(item, (tuple, list)) and 1 <= len(item) <= 2
        require(known, "data", source, "yield (inputs, targets) for this", type(item).__name__)
        batches.append(tuple(part[:left] for part in item))
        left -= len(item[0])
        if left <= 0:
            break
    return batches


def that_chose(note: dict[str, Any], plan: Plan | None, data: str | None) -> int:
    """How many of the first held-out images chose the plan, and so may not judge it."""
    chosen = None if plan is None else plan.chosen_on
    return chosen.samples if chosen is not None and chosen.data == heldout_data(note, data) else 0


def merge_notes(runs: list[Path], target: Path) -> None:
    """The note of merged runs: the first one's, with the images of all taken as seen; none where a run has none."""
    paths = [run / RUN_FILE for run in runs]
    if all(os.path.isfile(path) for path in paths):
        notes = [json.loads(path.read_text()) for path in paths]
        write_json(target / RUN_FILE, {**notes[0], "num_samples": max(note["num_samples"] for note in notes)})
