"""Measure the sensitivity matrix of a model: samples in, :class:`Sensitivity` out."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..artifacts import Sensitivity
from ..common import require
from ..graph import ForwardStep, full_precision
from .heap import heap
from .losses import LossFunc
from .open import open_run
from .options import Options
from .work import RunPlan


def profile(
    model: nn.Module,
    data_loader: Iterable[Any],
    bits: Sequence[int] = (2, 4, 8),
    *,
    estimator: str = "logit",
    loss: str = "kl",
    loss_func: LossFunc | None = None,
    forward_step: ForwardStep | None = None,
    precision: str = "float32",
    num_samples: int = 1024,
    exact_samples: int | None = None,
    batch_size: int | None = None,
    max_memory: int | None = None,
    group_size: int = -1,
    scale_steps: int = 95,
    symmetric: bool = True,
    act_bits: int | None = None,
    act_samples: int | None = None,
    ignore: Sequence[str] = (),
    quantize_ends: bool = False,
    output_dir: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    verbose: bool = True,
) -> Sensitivity:
    """Measure how the loss rises when each layer, and each pair of layers, is quantized.

    Args:
        model: any module that torch.export takes, in eval mode, one tensor in, logits ``[N, C]`` out. It is not changed.
        data_loader: iterable of batches: inputs ``[n, …]`` or (inputs, targets int64 ``[n]``); batch sizes may differ. With
            ``forward_step`` or ``loss_func``: any nest of tensors ``[n, …]``.
        bits: candidate bit-widths, each in 2..8.
        estimator: "logit" (all interactions from single perturbations, closed form), "exact" (every pair by a forward: the
            paper), "diagonal" (no interactions), "gradient" (the upstream layer perturbed, the downstream one linearised: one
            backward per candidate), "corrected" (the closed form on all samples, and the exact residual on
            ``exact_samples`` of them).
        loss: "kl" to the clean logits (needs no targets) or "cross_entropy" (the paper).
        loss_func: instead of ``loss``, ``loss_func(output, batch)``: a loss per sample ``[n]``, or the batch's mean (then
            called sample by sample); for models of any output, under "exact", "gradient" and "diagonal". Differentiable in
            the output for "gradient".
        forward_step: ``forward_step(model, batch)`` runs the model; None: ``model(inputs)``.
        precision: "float32" (TF32 off), "float64", or with the differences to the clean forward carried through the graph
            (docs/numerics.md) "tf32" or "bfloat16" matrix products. The latter are probed against float64 on a few layers and
            samples; the errors are in ``info["probe"]``, and where they exceed the sampling noise the run is float32, with a
            warning. "auto" takes bfloat16 for "logit" and "diagonal" where the device has matrix units for it (measured: 1.9
            times float32 on a Xeon with AMX), else float32. Losses and sums are float64 always.
        num_samples: how many samples of the loader to use; fewer are taken, with a warning, when it ends early.
        exact_samples: for "corrected": samples (rounded up to whole chunks) on which every pair is evaluated; None: an eighth.
        batch_size: samples of a chunk: they are measured together and kept together; None chooses by the size of the
            activations, or what an interrupted run in ``output_dir`` chose.
        max_memory: bytes of weights, variants and live values on the device that must not be exceeded: fewer samples, and
            then fewer perturbations, advance together. None: what is free on a GPU. A chunk that runs out of memory all the
            same is measured again in halves. On a CPU freed memory is then returned to the system at once, so that the
            process keeps to it; without a cap it may grow by a few times its live values.
        group_size: -1 one scale per output channel, 0 one per tensor, g > 0 one per g inputs.
        scale_steps: shrink factors tried per scale (95: the paper's code; 1: absmax).
        symmetric: codes are steps around zero; False adds a zero point to every scale.
        act_bits: also round the inputs of the layers to so many bits, on per-tensor asymmetric ranges calibrated on the first
            ``act_samples``; the loss is then measured from the float weights under rounded inputs. None: weights only.
        act_samples: samples that calibrate the ranges, read before the run; None: all, 1,024 at most (the paper's number), or
            as many as an interrupted run in ``output_dir``.
        ignore: layers to keep in float: fnmatch patterns, or regular expressions after ``re:``.
        quantize_ends: also quantize a first convolution and the classifier.
        output_dir: run directory; the result is saved there, chunk by chunk: the same call after an interruption goes on to
            the same bits, after the end it loads the result. A directory of another run is refused.
        device: where to run; None: where the model is.
        seed: fixes torch's generator while ``data_loader`` is read, so that a shuffling loader gives the same samples.
        verbose: show a progress bar.

    Returns:
        The sensitivity matrix with standard errors, work in forward-equivalents and a fingerprint. The same call gives the
        same bits.

    Raises:
        CladoError: any bad input, in one line; nothing is written then.
    """
    arguments = {name: value for name, value in locals().items() if name not in ("model", "data_loader", "verbose")}
    with heap(keep=max_memory is None), full_precision(), torch.no_grad():
        return open_run(model, data_loader, Options.of(**arguments), verbose).measure(verbose)


def plan_run(model: nn.Module, data_loader: Iterable[Any], **options: Any) -> RunPlan:
    """What :func:`profile` would do with these arguments: work, time, memory and disk. Nothing is written.

    Raises:
        CladoError: whatever :func:`profile` would refuse before its first chunk.
    """
    with heap(keep=options.get("max_memory") is None), full_precision(), torch.no_grad():
        return open_run(model, data_loader, with_defaults(**options), options.get("verbose", False)).plan()


def with_defaults(**given: Any) -> Options:
    """Some arguments of :func:`profile`, and its defaults for the others."""
    known = {name: p.default for name, p in inspect.signature(profile).parameters.items()}
    for name in ("model", "data_loader", "verbose"):
        given.pop(name, None)
        del known[name]
    unknown = [name for name in given if name not in known]
    require(not unknown, "plan_run", "options", "be arguments of profile", ", ".join(unknown))
    return Options.of(**{**known, **given})
