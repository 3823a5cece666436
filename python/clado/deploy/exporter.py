"""Integer weights on disk and back, in the formats of :mod:`clado.deploy.formats`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..artifacts import PLAN_FILE, Plan
from ..common import atomic_folder, refused, require
from ..quant import folded
from .applied import check_fit, with_adapted
from .flat import ForwardStep
from .formats import FORMATS, Request, safetensors


@dataclass(frozen=True)
class Exported:
    """What an export wrote, in bytes.

    Attributes:
        quantized: packed codes and scales; what :func:`predicted_bytes` promised.
        leftovers: what stays float.
        header: names, graph and metadata: the rest of the files, without the plan beside them.
        kept: layers of the plan that have no place in the format: they stay float and count as leftovers.
        notes: what else is to be known of it, in a line each: what an ONNX graph takes and gives.
    """

    folder: Path
    quantized: int
    leftovers: int
    header: int
    kept: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def export(
    model: nn.Module,
    plan: Plan,
    path: str | os.PathLike[str],
    format: str = "safetensors",
    *,
    forward_step: ForwardStep | None = None,
    **options: Any,
) -> Exported:
    """Write the integer weights of a plan to folder ``path``; the folder appears whole or not at all.

    Args:
        model: the model the plan was made for.
        plan: bits per layer.
        path: folder to write; an earlier export there, and nothing else, is replaced once the new one is complete.
        format: "safetensors" (every width, read by :func:`load`), "compressed-tensors" (Linear layers alone, read by vLLM and
            transformers) or "onnx" (the whole graph, run by onnxruntime).
        forward_step: ``forward_step(model, batch)`` runs the model: what the graph of "onnx" holds; None: the model itself.
        **options: of the format.
            example: for "onnx": a batch for ``forward_step``; without one, inputs ``[n, …]``, or a tuple or dict of the
            forward's arguments. Every input and output has its name; the batch size stays free unless the model fixes it.
            activations: for "onnx": {layer: (least, largest value of its input)}; those inputs are quantized to 8 bits,
            asymmetric, one scale each.
            odd_widths: for "compressed-tensors" and 3, 5, 6, 7 bits: "dense" for its readers from 0.18.0 on, "padded" to 0.17.1.

    Raises:
        CladoError: an unknown format or option, a plan for other weights or one that does not go into the format, or a
            path that holds something else.
    """
    request = _request(model, plan, format, options, forward_step)
    target = Path(path)
    _check_replaceable(target)
    with atomic_folder(target) as folder:
        quantized, leftovers = FORMATS[format].write(request, folder)
        files = sum(file.stat().st_size for file in folder.iterdir())
        kept = tuple(layer.name for layer in FORMATS[format].kept(request))
        notes = FORMATS[format].notes(request, folder)
        note = {"format": format, "quantized_bytes": quantized, "leftover_bytes": leftovers, "float_layers": kept}
        replace(plan, info={**plan.info, "export": note}, held=None).save(folder / PLAN_FILE)  # the codes lie there
    return Exported(target, quantized, leftovers, files - quantized - leftovers, kept, notes)


def predicted_bytes(
    model: nn.Module,
    plan: Plan,
    format: str = "safetensors",
    *,
    forward_step: ForwardStep | None = None,
    **options: Any,
) -> tuple[int, int]:
    """Bytes of (packed codes and scales, what stays float) that an export will take, from shapes alone.

    Args and errors as :func:`export`.
    """
    return FORMATS[format].predict(_request(model, plan, format, options, forward_step))


def verify(
    model: nn.Module,
    plan: Plan,
    path: str | os.PathLike[str],
    format: str = "safetensors",
    *,
    forward_step: ForwardStep | None = None,
    **options: Any,
) -> str:
    """Read an export with a consumer of its format and compare with :func:`apply`.

    Args:
        model, plan, format, forward_step, options: as given to :func:`export`.
        path: the folder it wrote.

    Returns:
        What held, in one line.

    Raises:
        CladoError: a difference, or a consumer that is not installed.
    """
    return FORMATS[format].verify(_request(model, plan, format, options, forward_step), Path(path))


def load(path: str | os.PathLike[str], model: nn.Module, packed: bool = False) -> nn.Module:
    """A copy of ``model`` with the weights of an export: bit for bit what :func:`apply` gives.

    Args:
        path: folder written by :func:`export` in format "safetensors".
        model: a module of the same architecture; its weights do not matter and are not changed.
        packed: keep the weights of Linear and Conv2d layers packed in memory (:mod:`clado.nn`); the outputs are the same.

    Raises:
        CladoError: a missing, truncated, damaged or foreign file, or one that does not fit the model.
    """
    return safetensors.load(Path(path), folded(model), packed)


def _check_replaceable(target: Path) -> None:
    """Raise unless nothing but an earlier export would be lost."""
    must = "be new, empty or an earlier export without other files"
    require(os.path.isdir(target) or not os.path.exists(target), "export", "path", must, f"a file {target}")
    with refused(target):
        held = {entry.name for entry in target.iterdir()} if os.path.isdir(target) else set()
    ours = {PLAN_FILE, *(name for format in FORMATS.values() for name in format.files)}
    exported = any(format.files[0] in held for format in FORMATS.values())
    lost = held - ours or (set() if exported else held)
    require(not lost, "export", "path", must, f"{target}, which holds {', '.join(sorted(lost)[:3])}")


def _request(
    model: nn.Module, plan: Plan, format: str, options: Mapping[str, Any], forward_step: ForwardStep | None
) -> Request[Any]:
    require(format in FORMATS, "export", "format", f"be one of {', '.join(FORMATS)}", repr(format))
    given, model = _given(format, options), folded(model)
    check_fit(model, plan, "export")
    return Request(with_adapted(model, plan), plan, FORMATS[format].options(**given), forward_step)


def _given(format: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not None; each must be one of the format's."""
    owners: dict[str, list[str]] = {}
    for name, known in FORMATS.items():
        for option in known.takes:
            owners.setdefault(option, []).append(name)
    for option, value in options.items():
        require(option in owners, "export", "options", f"be among {', '.join(owners)}", repr(option))
        own = value is None or format in owners[option]
        require(own, "export", option, f"be left out unless for {' or '.join(owners[option])}", format)
    return {option: value for option, value in options.items() if value is not None}
