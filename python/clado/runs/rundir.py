"""What a run directory notes beside its artifacts: the model, its data, and which images nobody has seen yet."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from ..artifacts import Plan
from ..common import CladoError, require, sample_count, write_json
from .data import build_data
from .models import ModelSpec, build_model
from .names import named

RUN_FILE = "model.json"
FUNCTIONS = ("forward_step", "loss_func")  # of the user's, as the note names them


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
    forward_step: str | None = None,
    loss_func: str | None = None,
    loss: dict[str, Any] | None = None,
) -> None:
    """Note how the model was built, what was measured on which data, by which command and with which versions.

    Args:
        heldout: data that later stages take where none is named; None: what ``data`` has left.
        forward_step, loss_func: the user's functions as they were named; None: the model itself, one of clado's losses.
        loss: how stages are asked for that loss; None: as they do without being told.
    """
    note = {
        "spec": spec.to_json(),
        "data": data,
        "num_samples": num_samples,
        "seed": seed,
        "command": command,
        "versions": versions(),
    }
    more = {"heldout": heldout, "forward_step": forward_step, "loss_func": loss_func, "loss": loss}
    write_json(folder / RUN_FILE, {**note, **{name: value for name, value in more.items() if value is not None}})


def versions() -> dict[str, str]:
    """Versions of everything whose change may change a result."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    known = {"python": platform.python_version()}
    for package in ("clado", "torch", "numpy", "timm", "transformers", "pyscipopt"):
        with suppress(PackageNotFoundError):
            known[package] = version(package)
    return {**known, "platform": f"{platform.system()} {platform.machine()}"}


def functions(note: dict[str, Any]) -> dict[str, Any]:
    """{"forward_step", "loss_func": the user's own that a run was profiled with}, where it notes any.

    Raises:
        CladoError: one that cannot be imported from here.
    """
    return {name: named("run", name, note[name]) for name in FUNCTIONS if name in note}


def measured_by(note: dict[str, Any]) -> dict[str, Any]:
    """The functions of a run, and how a stage is asked for its loss, where it notes one."""
    return {**functions(note), **note.get("loss", {})}


def example(model: Any, spec: Any, note: dict[str, Any], count: int) -> Any:
    """So many images as one forward takes them: a batch for the run's ``forward_step``, inputs without one."""
    batch = heldout(model, spec, {**note, "num_samples": 0}, None, count, count)[0]
    return batch if "forward_step" in note or isinstance(batch, Tensor) else batch[0]


def heldout_data(note: dict[str, Any], data: str | None) -> str:
    """Where held-out images come from: what was asked for, else what the run notes, else the data that was profiled."""
    return data or note.get("heldout") or note["data"]


def heldout(
    model: Any, spec: Any, note: dict[str, Any], data: str | None, count: int | None, batch_size: int, skip: int = 0
) -> list[Any]:
    """Up to ``count`` images, none of those the matrix was made of, nor the ``skip`` next ones."""
    source = heldout_data(note, data)
    profiled = note["num_samples"] if source == note["data"] else 0
    any_nest = any(name in note for name in FUNCTIONS)
    found = first(count, build_data(source, model, spec, batch_size, note["seed"], profiled + skip))
    for item in found:
        known = any_nest or (isinstance(item, (tuple, list)) and 1 <= len(item) <= 2)
        require(known, "data", source, "yield (inputs, targets) for this", type(item).__name__)
    return found


def first(count: int | None, batches: Iterable[Any]) -> list[Any]:
    """Batches of the first ``count`` samples; of all where it is None."""
    found: list[Any] = []
    left = sys.maxsize if count is None else count
    for item in batches:
        found.append(tree_map(lambda part, most=left: part[:most], item))
        left -= sample_count(item)
        if left <= 0:
            break
    return found


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
