"""A latency table for this device: every layer timed under every scheme, its weight dequantized on use, as in ``clado.nn``."""

from __future__ import annotations

import csv
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artifacts import Plan, Sensitivity
from ..common import (
    atomic_file,
    moved_to,
    progress_bar,
    require,
    shown_shapes,
    users_code,
)
from ..quant import Call, Calls, Layer, Quantized, Scheme, codes, folded, input_rounding
from .flat import ForwardStep


def time_layers(
    model: nn.Module,
    sens: Sensitivity,
    batch: Any,
    repeats: int = 20,
    verbose: bool = True,
    *,
    forward_step: ForwardStep | None = None,
) -> dict[str, dict[int | str, float]]:
    """Milliseconds of each layer under each scheme, dequantization included, on the device the model is on.

    A rounded input is rounded and multiplied in float: what a scheme costs in a simulation, not on hardware that multiplies its
    formats.

    A layer that runs more than once in a forward is charged for every run. Widths are timed in turn, so that a slow moment
    of the machine meets all of them; the median counts.

    Args:
        model: the model that was profiled, in eval mode.
        sens: names the layers, the widths and the quantizer.
        batch: inputs ``[n, …]`` of one forward, or a batch for ``forward_step``; they are moved to where the model is,
            floating-point ones to its dtype.
        repeats: timings per layer and width.
        verbose: show a progress bar.
        forward_step: as for :func:`clado.profile`; None: what ``sens`` was measured with, where it knows it.

    Returns:
        {layer: {bits: ms}} for ``clado.solve(latency=…, latency_ms=…)``; a scheme that bits do not tell goes by its label.

    Raises:
        CladoError: a layer that the forward does not reach; a batch that the model does not take.
    """
    require(repeats >= 1, "latency", "repeats", "be at least 1", repeats)
    model = folded(model)
    first = next(model.parameters())
    step = forward_step or sens.functions.get("forward_step")
    calls = _calls(model, sens.layers, moved_to(batch, first.device, first.dtype), step)
    table: dict[str, dict[int | str, float]] = {}
    with torch.inference_mode(), progress_bar("latency", len(sens.layers), "layers", verbose) as show:
        for done, layer in enumerate(sens.layers, 1):
            schemes = sens.candidates.schemes[sens.candidates.position(layer.name)]
            runs = [_run(model, sens, layer, scheme, calls[layer.name]) for scheme in schemes]
            times = [_once(run, first.device) for _ in range(repeats + 1) for run in runs][len(runs) :]
            table[layer.name] = {
                scheme.bits if scheme.plain else scheme.label: statistics.median(times[k :: len(runs)]) * 1e3
                for k, scheme in enumerate(schemes)
            }
            show(done)
    return table


def write_latency(table: dict[str, dict[int | str, float]], path: str | os.PathLike[str]) -> Path:
    """Write a table as CSV, whole or not at all; :func:`clado.solver.read_latency` reads it.

    Its columns are ``layer,bits,ms``, or ``layer,scheme,ms`` where bits do not tell schemes apart.
    """
    target = Path(path)
    with atomic_file(target) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        plain = all(isinstance(key, int) for row in table.values() for key in row)
        writer.writerow(("layer", "bits" if plain else "scheme", "ms"))
        writer.writerows((layer, bits, f"{ms:.6g}") for layer, row in table.items() for bits, ms in row.items())
    return target


def _calls(
    model: nn.Module, layers: Sequence[Layer], batch: Any, forward_step: ForwardStep | None
) -> dict[str, list[Call]]:
    """For each layer the calls that apply its weight in one forward."""
    names = {name: layer.name for layer in layers for name in layer.names}
    seen: dict[str, list[Call]] = {layer.name: [] for layer in layers}

    def note(call: Call) -> Tensor:
        seen[names[call.part.name]].append(call)
        return call.of(call.x)

    parameters = dict(model.named_parameters(remove_duplicate=False))
    calls = Calls({name: parameters[name] for name in names}, note)
    with users_code(f"latency: model must take inputs {shown_shapes(batch)}"), torch.inference_mode(), calls:
        model(batch) if forward_step is None else forward_step(model, batch)
    idle = [name for name, calls in seen.items() if not calls]
    require(not idle, "latency", "model", "run every layer", f"none of {', '.join(idle[:3])}")
    return seen


def _run(
    model: nn.Module, sens: Sensitivity, layer: Layer, scheme: Scheme, calls: Sequence[Call]
) -> Callable[[], None]:
    """All calls of a layer under a scheme, its weight packed."""
    alone = Plan((layer,), {layer.name: scheme.label}, "given", quantizer=sens.quantizer)
    rounds = input_rounding(layer, scheme, sens.activations)
    found, parameter = codes(model, alone)[layer.name], model.get_parameter(layer.names[0])
    packed = found.packed()

    def run() -> None:
        for call in calls:
            rows = Quantized.unpacked(found.number, layer.shape, packed, sens.quantizer).values(parameter.dtype)
            own = call if rounds is None else call.on(rounds(call.x))
            own.with_weight(layer.parameter(rows, parameter.shape))

    return run


def _once(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of one pass through all calls of a layer."""
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
