"""Integer weights on disk and back, in the formats of :mod:`clado.deploy.formats`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from ..artifacts import PLAN_FILE, Plan
from ..common import atomic_folder, require
from .applied import check_fit
from .formats import FORMATS, Request, compressed_tensors, onnx, safetensors

_WEIGHTS = {safetensors.MODEL_FILE, onnx.MODEL_FILE}
_FILES = {PLAN_FILE, compressed_tensors.CONFIG_FILE, onnx.MODEL_FILE + ".data", *_WEIGHTS}  # all that an export writes


@dataclass(frozen=True)
class Exported:
    """What an export wrote, in bytes.

    Attributes:
        quantized: packed codes and scales; what :func:`predicted_bytes` promised.
        leftovers: what stays float.
        header: names, graph and metadata: the rest of the files, without the plan beside them.
        kept: layers of the plan that have no place in the format: they stay float and count as leftovers.
    """

    folder: Path
    quantized: int
    leftovers: int
    header: int
    kept: tuple[str, ...] = ()


def export(
    model: nn.Module,
    plan: Plan,
    path: str | os.PathLike[str],
    format: str = "safetensors",
    *,
    example: Tensor | None = None,
    odd_widths: str | None = None,
    activations: Mapping[str, tuple[float, float]] | None = None,
) -> Exported:
    """Write the integer weights of a plan to folder ``path``; the folder appears whole or not at all.

    Args:
        model: the model the plan was made for.
        plan: bits per layer.
        path: folder to write; an earlier export there, and nothing else, is replaced once the new one is complete.
        format: "safetensors" (every width, read by :func:`load`), "compressed-tensors" (Linear layers alone, read by vLLM and
            transformers) or "onnx" (the whole graph, run by onnxruntime).
        example: inputs ``[n, …]`` for "onnx": what the graph takes; the batch size stays free.
        activations: for "onnx": {layer: (least, largest value of its input)}; those inputs are quantized to 8 bits, asymmetric,
            one scale each.
        odd_widths: for "compressed-tensors" and 3, 5, 6, 7 bits: "dense" for its readers from 0.18.0 on, "padded" to 0.17.1.

    Raises:
        CladoError: an unknown format, a plan for other weights or one that does not go into the format, or a path that holds
            something else.
    """
    require(activations is None or format == "onnx", "export", "activations", "be left out unless for onnx", format)
    request = replace(_request(model, plan, format, example, odd_widths), activations=activations)
    target = Path(path)
    _check_replaceable(target)
    with atomic_folder(target) as folder:
        quantized, leftovers = FORMATS[format].write(request, folder)
        files = sum(file.stat().st_size for file in folder.iterdir())
        kept = tuple(layer.name for layer in FORMATS[format].kept(request))
        note = {"format": format, "quantized_bytes": quantized, "leftover_bytes": leftovers, "float_layers": kept}
        replace(plan, info={**plan.info, "export": note}).save(folder / PLAN_FILE)
    return Exported(target, quantized, leftovers, files - quantized - leftovers, kept)


def predicted_bytes(
    model: nn.Module, plan: Plan, format: str = "safetensors", *, odd_widths: str | None = None
) -> tuple[int, int]:
    """Bytes of (packed codes and scales, what stays float) that an export will take, from shapes alone.

    Args and errors as :func:`export`.
    """
    return FORMATS[format].predict(_request(model, plan, format, None, odd_widths))


def verify(
    model: nn.Module,
    plan: Plan,
    path: str | os.PathLike[str],
    format: str = "safetensors",
    *,
    example: Tensor | None = None,
    odd_widths: str | None = None,
) -> str:
    """Read an export with a consumer of its format and compare with :func:`apply`.

    Args:
        model, plan, format, example, odd_widths: as given to :func:`export`.
        path: the folder it wrote.

    Returns:
        What held, in one line.

    Raises:
        CladoError: a difference, or a consumer that is not installed.
    """
    return FORMATS[format].verify(_request(model, plan, format, example, odd_widths), Path(path))


def load(path: str | os.PathLike[str], model: nn.Module, packed: bool = False) -> nn.Module:
    """A copy of ``model`` with the weights of an export: bit for bit what :func:`apply` gives.

    Args:
        path: folder written by :func:`export` in format "safetensors".
        model: a module of the same architecture; its weights do not matter and are not changed.
        packed: keep the weights of Linear and Conv2d layers packed in memory (:mod:`clado.nn`); the outputs are the same.

    Raises:
        CladoError: a missing, truncated, damaged or foreign file, or one that does not fit the model.
    """
    return safetensors.load(Path(path), model, packed)


def _check_replaceable(target: Path) -> None:
    """Raise unless nothing but an earlier export would be lost."""
    must = "be new, empty or an earlier export without other files"
    require(target.is_dir() or not target.exists(), "export", "path", must, f"a file {target}")
    held = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    lost = held - _FILES or (set() if held & _WEIGHTS else held)
    require(not lost, "export", "path", must, f"{target}, which holds {', '.join(sorted(lost)[:3])}")


def _request(model: nn.Module, plan: Plan, format: str, example: Tensor | None, odd_widths: str | None) -> Request:
    require(format in FORMATS, "export", "format", f"be one of {', '.join(FORMATS)}", repr(format))
    check_fit(model, plan, "export")
    return Request(model, plan, example, odd_widths)
