"""What a run directory notes beside its artifacts: the model, its data, and which images nobody has seen yet."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .data import build_data
from .errors import CladoError, require
from .files import atomic_file
from .models import ModelSpec, build_model

RUN_FILE = "model.json"


def load_model(run: str) -> tuple[Any, Any, dict[str, Any]]:
    """The model of a run directory, how it was built, and what was noted with it."""
    path = Path(run) / RUN_FILE
    require(path.is_file(), "run", "directory", f"hold {RUN_FILE} as clado profile writes it", run)
    try:
        note = json.loads(path.read_text())
        spec = ModelSpec(**note["spec"])
        note["data"], note["num_samples"], note["seed"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CladoError(f"run: {RUN_FILE} must be whole, got {path} ({error})") from None
    return build_model(spec), spec, note


def heldout(
    model: Any, spec: Any, note: dict[str, Any], data: str | None, count: int | None, batch_size: int, skip: int = 0
) -> list[Any]:
    """Up to ``count`` images, none of those the matrix was made of, nor the ``skip`` next ones."""
    profiled = note["num_samples"] if data in (None, note["data"]) else 0
    batches: list[Any] = []
    left = sys.maxsize if count is None else count
    for images, labels in build_data(data or note["data"], model, spec, batch_size, note["seed"], profiled + skip):
        batches.append((images[:left], labels[:left]))
        left -= len(images)
        if left <= 0:
            break
    return batches


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))
