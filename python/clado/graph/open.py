"""From a model to something that runs it under many perturbations at once: its graph, or whole forwards where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..common import moved_to, two_samples
from .capture import NotCapturable, capture
from .carried import CarriedExecutor
from .executor import Executor
from .forward import ForwardStep, check_forward, plain_call
from .precision import LOW_PRECISIONS, PRECISIONS, common_dtype, converted
from .runner import Runner
from .whole_forwards import WholeForwards


def open_runner(
    model: nn.Module,
    batch: Any,
    *,
    ignore: Sequence[str] = (),
    quantize_ends: bool = False,
    forward_step: ForwardStep | None = None,
    only: Sequence[str] | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    stacked: bool = True,
    op: str = "profile",
) -> Runner:
    """Convert the model, look at one forward, capture its graph and try the cuts; without a graph, whole forwards.

    Args:
        model: in eval mode; it is not changed.
        batch: real inputs, of which two samples are used: a tensor ``[N, …]``, or a nest of them for ``forward_step``.
        ignore, quantize_ends, forward_step: as for :func:`clado.profile`.
        only: names of the layers to take, whatever ``ignore`` and ``quantize_ends`` say; None: all others.
        device, dtype: where and in which it runs; None: as the model is, where its dtypes differ in the one that holds all.
        stacked: whether several perturbations will run as one batch, so that samples must not mix; False: one at a time, and
            nothing is tried.
        op: what is said to need the model.

    Returns:
        A runner with no work done; ``note`` says why where it is no graph.

    Raises:
        CladoError: train mode, a forward that fails or depends on chance or the other samples, no layers, an ``ignore`` pattern
            that matches nothing.
    """
    first = next(model.parameters())
    device, dtype = device or first.device, dtype or common_dtype(model)
    moved = converted(model, device, dtype)
    example = two_samples(moved_to(batch, device, dtype))
    forward = forward_step or plain_call
    if stacked:
        check_forward(moved, example, forward, op)
    try:
        graph = Executor(capture(moved, example, ignore, quantize_ends, forward_step, only))
        if stacked:
            graph.self_test(example, partial(forward, moved))
        return graph
    except NotCapturable as error:
        note = f"whole forwards for every perturbation, since the model has no usable graph ({error})"
    whole = WholeForwards(moved, example, ignore, quantize_ends, forward_step, note, only)
    if stacked:
        whole.self_test(example)
    return whole


def in_precision(runner: Runner, precision: str) -> Runner | None:
    """The same graph in another precision: differences carried in a low one, or constants converted; None: there is no graph.

    The work of its segments is known if that of ``runner`` is.
    """
    if not isinstance(runner, Executor):
        return None
    made: Executor
    if precision in LOW_PRECISIONS:
        made = CarriedExecutor(runner.captured, precision, runner.cuts)
    else:
        dtype = PRECISIONS[precision]
        known = {n: _to(value, dtype) for n, value in runner.captured.constants.items()}
        made = Executor(replace(runner.captured, constants=known), runner.cuts)
    made.take_costs(runner)
    return made


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
