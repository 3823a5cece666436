"""A latency table for this device: every layer timed at every width, as the packed modules of ``clado.nn`` run it."""

from __future__ import annotations

import copy
import csv
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artifacts import Plan, Sensitivity
from ..common import CladoError, atomic_file, is_out_of_memory, moved_to, progress_bar, require, said
from ..quant import Layer, Scheme, codes
from .nn import quantized_kind

Calls = list[tuple[nn.Module, Any]]  # modules with the arguments they were called with


def time_layers(
    model: nn.Module, sens: Sensitivity, batch: Tensor, repeats: int = 20, verbose: bool = True
) -> dict[str, dict[int, float]]:
    """Milliseconds of each layer at each width, dequantization included, on the device the model is on.

    A layer that runs more than once in a forward is charged for every run. Widths are timed in turn, so that a slow moment
    of the machine meets all of them; the median counts.

    Args:
        model: the model that was profiled, in eval mode.
        sens: names the layers, the widths and the quantizer.
        batch: inputs ``[n, …]`` of one forward; they are moved to where the model is, floating-point ones to its dtype.
        repeats: timings per layer and width.
        verbose: show a progress bar.

    Returns:
        {layer: {bits: ms}} for ``clado.solve(latency=…, latency_ms=…)``.

    Raises:
        CladoError: a layer whose weight belongs to no Linear or Conv2d, or one that the forward does not reach;
            inputs that the model does not take.
    """
    require(repeats >= 1, "latency", "repeats", "be at least 1", repeats)
    first = next(model.parameters())
    inputs = _inputs(model, sens.layers, moved_to(batch, first.device, first.dtype))
    table: dict[str, dict[int, float]] = {}
    with torch.inference_mode(), progress_bar("latency", len(sens.layers), "layers", verbose) as show:
        for done, layer in enumerate(sens.layers, 1):
            schemes = sens.candidates.schemes[sens.candidates.position(layer.name)]
            runs = [_packed(model, sens, layer, scheme, inputs[layer.name]) for scheme in schemes]
            times = [_once(run, first.device) for _ in range(repeats + 1) for run in runs][len(runs) :]
            table[layer.name] = {
                scheme.bits: statistics.median(times[k :: len(runs)]) * 1e3 for k, scheme in enumerate(schemes)
            }
            show(done)
    return table


def write_latency(table: dict[str, dict[int, float]], path: str | os.PathLike[str]) -> Path:
    """Write a table as CSV ``layer,bits,ms``, whole or not at all; :func:`clado.solver.read_latency` reads it."""
    target = Path(path)
    with atomic_file(target) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("layer", "bits", "ms"))
        writer.writerows((layer, bits, f"{ms:.6g}") for layer, row in table.items() for bits, ms in row.items())
    return target


def _inputs(model: nn.Module, layers: tuple[Layer, ...], batch: Tensor) -> dict[str, Calls]:
    """For each layer the modules that use it, with the arguments of each call in one forward."""
    seen: dict[str, Calls] = {layer.name: [] for layer in layers}
    handles = []
    for layer in layers:
        owners = {id(m): m for m in (model.get_submodule(name.rpartition(".")[0]) for name in layer.names)}
        for module in owners.values():
            require(
                isinstance(module, (nn.Linear, nn.Conv2d)),
                "latency",
                f"layer {layer.name}",
                "belong to a Linear or Conv2d module",
                type(module).__name__,
            )
            handles.append(module.register_forward_pre_hook(_record(seen[layer.name])))
    try:
        with torch.inference_mode():
            model(batch)
    except Exception as error:  # whatever a model makes of inputs it does not take
        if is_out_of_memory(error):
            raise
        raise CladoError(f"latency: model must take inputs {tuple(batch.shape)}, got {said(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    idle = [name for name, calls in seen.items() if not calls]
    require(not idle, "latency", "model", "run every layer as a module", f"none of {idle[:3]}")
    return seen


def _packed(model: nn.Module, sens: Sensitivity, layer: Layer, scheme: Scheme, calls: Calls) -> Calls:
    """The calls of a layer with its weight packed under a scheme."""
    alone = Plan((layer,), {layer.name: scheme.label}, "given", quantizer=sens.quantizer)
    found = codes(model, alone)[layer.name]
    number, packed = found.number, found.packed()
    kinds = ((quantized_kind(type(module)), module, arguments) for module, arguments in calls)
    return [(kind.from_packed(module, sens.quantizer, number, packed), arguments) for kind, module, arguments in kinds]


def _record(calls: Calls) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, arguments: Any) -> None:
        bare = copy.copy(module)
        bare._forward_pre_hooks = type(module._forward_pre_hooks)()
        calls.append((bare, arguments))

    return hook


def _once(run: Calls, device: torch.device) -> float:
    """Seconds of one pass through all calls of a layer."""
    _wait(device)
    started = time.perf_counter()
    for module, arguments in run:
        module(*arguments)
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
