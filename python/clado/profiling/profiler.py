"""Measure the sensitivity matrix of a model: samples in, :class:`Sensitivity` out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..artifacts import Sensitivity
from ..common import heap, takes
from ..graph import full_precision
from .checkpoint import alone
from .distributed import is_writer
from .open import open_run
from .options import Options
from .work import RunPlan


@takes(Options)
def profile(model: nn.Module, data_loader: Iterable[Any], options: Options, *, verbose: bool = True) -> Sensitivity:
    """Measure how the loss rises when each layer, and each pair of layers, is quantized.

    Args:
        model: any module that torch.export takes, in eval mode, one tensor in, logits ``[N, C]`` or what ``loss`` names out.
            It is not changed.
        data_loader: iterable of batches: inputs ``[n, …]`` or (inputs, targets); batch sizes may differ. With
            ``forward_step`` or ``loss_func``: any nest of tensors ``[n, …]``.
        options: the arguments of :class:`Options`.
        verbose: show a progress bar.

    Returns:
        The sensitivity matrix with standard errors, work in forward-equivalents and a fingerprint. The same call gives the
        same bits.

    Raises:
        CladoError: any bad input, in one line; nothing is written then. Another process that writes to ``output_dir``.
    """
    folder = options.output_dir if is_writer() else None
    with alone(folder, "profile"), heap(keep=options.max_memory is None), full_precision(), torch.no_grad():
        sens = open_run(model, data_loader, options, verbose).measure(verbose)
        return replace(sens, functions=options.functions)


@takes(Options)
def plan_run(model: nn.Module, data_loader: Iterable[Any], options: Options, *, verbose: bool = False) -> RunPlan:
    """What :func:`profile` would do with these arguments: work, time, memory and disk. Nothing is written.

    Raises:
        CladoError: whatever :func:`profile` would refuse before its first chunk.
    """
    with heap(keep=options.max_memory is None), full_precision(), torch.no_grad():
        return open_run(model, data_loader, options, verbose, dry=True).plan()
