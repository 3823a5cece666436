"""Everything a report tells, read from a run directory or made once and kept there."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..artifacts import PLAN_FILE, Plan, Sensitivity
from ..common import CladoError, FileError, require, sample_count, write_json
from ..deploy import MODEL_FILE
from ..graph import ForwardStep
from ..profiling import LossFunc
from ..quant import PACKED, SCALE, ZERO_POINT
from ..runs import RUN_FILE, functions, heldout_data, load_run, that_chose
from ..runs import heldout as heldout_of
from ..solver import pareto
from .measured import Record, load_measured, measure, measured_key, named, random_plans, save_measured, uniform_plans

PARETO_FILE = "pareto.json"
SAMPLES = 256  # images that plans are run on
BATCH = 64  # images that advance together when plans are run
POINTS = 11  # of a frontier that the report makes itself
SECONDS = 30.0  # for all of them


@dataclass(frozen=True)
class Contents:
    """What is known about a run.

    Attributes:
        folder: the run directory.
        sens: the sensitivity matrix.
        plan: the chosen plan, None where there is none.
        front: plans with bits for rising budgets; may be empty.
        measured: plans that were really run, see :func:`clado.report.measure`; may be empty.
        samples: what they were run on, in words.
        note: how the model was built, by which command, with which versions; empty for imported scores.
        exported: bytes on disk of an export in ``out/``: codes, scales, floats, header; empty without one.
        remarks: why something is missing.
    """

    folder: Path
    sens: Sensitivity
    plan: Plan | None
    front: list[Plan]
    measured: list[Record]
    samples: str = ""
    note: dict[str, Any] = field(default_factory=dict)
    exported: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def gather(
    run: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    heldout: Iterable[Any] | None = None,
    data: str | None = None,
    num_samples: int | None = None,
    forward_step: ForwardStep | None = None,
    loss_func: LossFunc | None = None,
    device: str | None = None,
    verbose: bool = True,
) -> Contents:
    """Read a run directory; make the frontier and run the plans where that was not done before.

    Args:
        run: run directory that holds a sensitivity matrix.
        model: the float model; None: as the run directory notes it.
        heldout: batches to run plans on; they must not have made the matrix. None: by ``data``.
        data: image folder for the same; None: what the run's data has left.
        num_samples: images of ``data`` to run plans on; 0: run none; None: as many as the last report of the run, or 256.
        forward_step, loss_func: as for :func:`clado.profile`; None: those that the run directory notes.
        device: where to run plans.
        verbose: show progress.

    Raises:
        CladoError: no matrix there, or a plan of another run.
    """
    folder = Path(run)
    sens = Sensitivity.load(folder)
    plan = Plan.load(folder) if (folder / PLAN_FILE).exists() else None
    if plan is not None:
        ours = plan.fingerprint == sens.fingerprint and plan.layers == sens.layers
        require(ours, "report", PLAN_FILE, "belong to the matrix beside it", "a plan of another run")
    remarks: list[str] = []
    front = _frontier(folder, sens, remarks)
    note = _note(folder)
    plans = {"random": random_plans(sens), "uniform": uniform_plans(sens), "frontier": front}
    if plan is not None and plan.bits:
        plans["chosen"] = [plan]
    records: list[Record] = []
    samples = ""
    try:
        key, batches, model, samples = _samples(folder, sens, plan, note, model, heldout, data, num_samples)
        records = load_measured(folder, key, sens)
        known = [p for members in plans.values() for p in members if np.isfinite(sens.predict(p.schemes))]
        distinct = {tuple(p.schemes.values()): p for p in known}  # a plan with a dropped candidate has no prediction
        done = {tuple(record["schemes"]) for record in records}
        missing = [p for labels, p in distinct.items() if labels not in done]
        if missing and model is not None:
            given = {"forward_step": forward_step, "loss_func": loss_func}
            own = functions(note) | {name: value for name, value in given.items() if value is not None}
            records = records + measure(sens, missing, model, batches(), device, verbose, **own)
            with _kept(folder, remarks):
                save_measured(folder, key, records)
    except CladoError as error:
        if heldout is not None:
            raise
        remarks.append(f"No plan was run to check the prediction ({error}).")
    shown = named(records, plans)
    return Contents(folder, sens, plan, front, shown, samples, note, exported_bytes(folder / "out"), remarks)


def exported_bytes(folder: Path) -> dict[str, int]:
    """Bytes of an export by what they hold, or of its files where it holds no safetensors; empty where there is none."""
    try:
        with (folder / MODEL_FILE).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        return {path.name: path.stat().st_size for path in sorted(folder.glob("*")) if path.name != PLAN_FILE}
    except (OSError, ValueError, MemoryError, OverflowError):
        return {}
    sizes = {"codes": 0, "scales": 0, "floats": 0}
    for name, entry in header.items():
        if name != "__metadata__":
            kind = "codes" if name.endswith(PACKED) else "scales" if name.endswith((SCALE, ZERO_POINT)) else "floats"
            first, last = entry["data_offsets"]
            sizes[kind] += last - first
    return {**sizes, "header": 8 + length}


def _frontier(folder: Path, sens: Sensitivity, remarks: list[str]) -> list[Plan]:
    """The frontier beside the matrix, or a new one over the average bits, kept there."""
    path = folder / PARETO_FILE
    try:
        known = [Plan.from_json(json.dumps(item)) for item in json.loads(path.read_text())]
        if known and all(_made_of(sens, plan) for plan in known):
            return [replace(plan, held=sens.held) for plan in known if plan.bits]
    except (OSError, ValueError, TypeError):
        pass
    weights = np.array([layer.numel for layer in sens.layers], np.float64)
    bits, first = sens.candidates.weight_bits, sens.candidates.starts[:-1]
    most = np.maximum.reduceat(bits, first)
    least = np.minimum.reduceat(np.where(sens.measured, bits, most[sens.candidates.layer_of]), first)
    lowest, highest = (math.ceil(1000 * weights @ ends / weights.sum()) / 1000 for ends in (least, most))
    points = np.unique(np.linspace(lowest, highest, POINTS).round(3))
    try:
        plans = pareto(sens, avg_bits=points.tolist(), time_limit=SECONDS)
    except CladoError as error:
        remarks.append(f"No frontier could be solved for ({error}).")
        return []
    with _kept(folder, remarks):
        write_json(path, [json.loads(plan.to_json()) for plan in plans])
    return [plan for plan in plans if plan.bits]


def _made_of(sens: Sensitivity, plan: Plan) -> bool:
    """Whether a plan is one of this matrix, and of its weights."""
    same = plan.fingerprint == sens.fingerprint and plan.layers == sens.layers
    return same and (not plan.bits or plan.rounding == sens.provenance.rounding)


@contextmanager
def _kept(folder: Path, remarks: list[str]) -> Iterator[None]:
    """A run directory that cannot be written is read all the same: what the report makes is then made again next time."""
    try:
        yield
    except FileError as error:
        remark = f"What this report made could not be kept in {folder} ({error.strerror})."
        remarks += [remark] if remark not in remarks else []


def _note(folder: Path) -> dict[str, Any]:
    try:
        note = json.loads((folder / RUN_FILE).read_text())
        return note if isinstance(note, dict) else {}
    except (OSError, ValueError):
        return {}


def _samples(
    folder: Path,
    sens: Sensitivity,
    plan: Plan | None,
    note: dict[str, Any],
    model: nn.Module | None,
    heldout: Iterable[Any] | None,
    data: str | None,
    num_samples: int | None,
) -> tuple[dict[str, Any], Any, nn.Module | None, str]:
    """What names the samples, a function that reads them, the model, and the samples in words."""
    if heldout is not None:
        require(model is not None, "report", "model", "be given with heldout", "none")
        batches = list(heldout)
        return {"fingerprint": sens.fingerprint, "data": "given"}, lambda: batches, model, "the samples that were given"
    require(num_samples is None or num_samples > 0, "report", "nsamples", "be positive to run plans", num_samples)
    require(bool(note), "report", "run", f"hold {RUN_FILE} so that the model can be built", "none")
    source, skip = heldout_data(note, data), that_chose(note, plan, data)
    key: dict[str, Any] = {"fingerprint": sens.fingerprint, "data": source, "after": skip}
    known = measured_key(folder)
    same = all(known.get(name) == value for name, value in key.items())
    key["at_most"] = num_samples or (known.get("at_most") if same else None) or SAMPLES
    loaded, spec, note = load_run(str(folder))
    batches = heldout_of(loaded, spec, note, data, key["at_most"], BATCH, skip)
    count = sum(map(sample_count, batches))
    return key, lambda: batches, model or loaded, f"{count:,} images of {source} that neither measured nor chose"
