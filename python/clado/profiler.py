"""Measure the sensitivity matrix of a model: samples in, :class:`Sensitivity` out."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .capture import Captured, capture
from .checkpoint import Chunks, refuse_other_run
from .errors import CladoError, require
from .estimators import ESTIMATORS, Sums, expected_work
from .executor import Executor
from .fingerprint import digest, tensor_digest, weights_digest
from .progress import progress_bar
from .quantizer import Quantizer
from .sensitivity import FILE_NAME, Sensitivity, check_bits, same_layer

LOSSES = ("kl", "cross_entropy")
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
# Bytes of the largest stacked activation: beyond it a CPU leaves its caches, a GPU gains nothing more.
_STACK_BYTES = {"cpu": 4 << 20, "cuda": 1 << 30}


@dataclass(frozen=True)
class Samples:
    """The sensitivity set: inputs ``[N, …]`` and, where the loader gives them, targets int64 ``[N]``; on the CPU."""

    inputs: Tensor
    targets: Tensor | None

    def digest(self) -> str:
        return tensor_digest({"inputs": self.inputs} | ({} if self.targets is None else {"targets": self.targets}))


def profile(
    model: nn.Module,
    data_loader: Iterable[Any],
    bits: Sequence[int] = (2, 4, 8),
    *,
    estimator: str = "logit",
    loss: str = "kl",
    precision: str = "float32",
    num_samples: int = 1024,
    batch_size: int | None = None,
    group_size: int = -1,
    scale_steps: int = 95,
    symmetric: bool = True,
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
        data_loader: iterable of batches: inputs ``[n, …]`` or (inputs, targets int64 ``[n]``); batch sizes may differ.
        bits: candidate bit-widths, each in 2..8.
        estimator: "logit" (all interactions from single perturbations, closed form), "exact" (every pair by a forward: the
            paper), "diagonal" (no interactions).
        loss: "kl" to the clean logits (needs no targets) or "cross_entropy" (the paper).
        precision: "float32" (TF32 off) or "float64"; losses and sums are float64 always.
        num_samples: how many samples of the loader to use; fewer are taken, with a warning, when it ends early.
        batch_size: samples that advance together; None chooses by the size of the activations.
        group_size: -1 one scale per output channel, 0 one per tensor, g > 0 one per g inputs.
        scale_steps: shrink factors tried per scale (95: the paper's code; 1: absmax).
        symmetric: codes are steps around zero; False adds a zero point to every scale.
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
    bits = tuple(sorted(bits))
    check_bits(bits)
    require(estimator in ESTIMATORS, "profile", "estimator", f"be one of {', '.join(ESTIMATORS)}", repr(estimator))
    require(loss in LOSSES, "profile", "loss", f"be one of {', '.join(LOSSES)}", repr(loss))
    require(precision in PRECISIONS, "profile", "precision", f"be one of {', '.join(PRECISIONS)}", repr(precision))
    require(num_samples >= 1, "profile", "num_samples", "be at least 1", num_samples)
    require(batch_size is None or batch_size >= 1, "profile", "batch_size", "be at least 1", batch_size)
    quantizer = Quantizer(group_size, scale_steps, symmetric)
    check_finite(model)

    start = time.perf_counter()
    samples = collect(data_loader, num_samples, seed)
    require(
        loss == "kl" or samples.targets is not None,
        "profile",
        "data_loader",
        "yield (inputs, targets) for cross_entropy",
        "inputs alone",
    )
    place = torch.device(device) if device is not None else next(model.parameters()).device
    dtype = PRECISIONS[precision]
    with full_precision(), torch.inference_mode():
        moved = converted(model, place, dtype)
        example = moved_to(two_samples(samples.inputs), place, dtype)
        captured = capture(moved, example, ignore, quantize_ends)
        executor = Executor(captured)
        logits = executor.self_test(example)
        require(logits.dim() == 2, "profile", "model", "return logits [N, C]", f"shape {tuple(logits.shape)}")
        require(bool(torch.isfinite(logits).all()), "profile", "model", "return finite logits", "NaN or infinity")
        check_targets(samples.targets, logits.shape[1])
        chunk = batch_size or _default_batch(captured, len(bits), estimator, place)
        settings = {
            "bits": bits,
            "estimator": estimator,
            "loss": loss,
            "precision": precision,
            "batch_size": chunk,
            "layers": [asdict(layer) for layer in captured.layers],
            "quantizer": quantizer.to_json(),
        }
        fingerprint = {"weights": weights_digest(model), "data": samples.digest(), "settings": digest(settings)}
        known = _earlier(output_dir, fingerprint)
        if known is not None:
            return known
        variants = quantized_variants(model, captured, bits, quantizer, place, dtype)
        chunks = Chunks(output_dir, fingerprint)
        targets = None if loss == "kl" else samples.targets
        sums = _measure(executor, estimator, variants, samples.inputs, targets, chunk, chunks, verbose)

    result = _assemble(sums, captured, bits, quantizer, fingerprint)
    result.info.update(
        estimator=estimator,
        loss=loss,
        precision=precision,
        batch_size=chunk,
        device=place.type,
        forward_equivalents=executor.work / sums.samples,
        expected_forward_equivalents=expected_work(estimator, executor.suffix_share, len(bits)),
        seconds=time.perf_counter() - start,
        float_layers=captured.skipped,
        warnings=[]
        if sums.samples == num_samples
        else [f"the data ended after {sums.samples} of {num_samples} samples"],
    )
    if output_dir is not None:
        result.save(Path(output_dir) / FILE_NAME)
        chunks.clear()
    return result


def check_finite(model: nn.Module) -> None:
    """Raise when a parameter or buffer of ``model`` holds NaN or infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            require(bool(torch.isfinite(tensor).all()), "profile", f"weight {name}", "be finite", "NaN or infinity")


def check_targets(targets: Tensor | None, classes: int) -> None:
    """Raise when a label is not a class of the model."""
    if targets is not None:
        low, high = int(targets.min()), int(targets.max())
        require(low >= 0 and high < classes, "profile", "targets", f"lie in 0..{classes - 1}", f"{low}..{high}")


def collect(data_loader: Iterable[Any], num_samples: int, seed: int = 0) -> Samples:
    """Read up to ``num_samples`` samples in the loader's order.

    Raises:
        CladoError: no data, a batch of another shape, or items that are neither tensors nor (inputs, targets).
    """
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    count = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for item in data_loader:
            x, y = split_batch(item)
            require(
                not inputs or x.shape[1:] == inputs[0].shape[1:],
                "profile",
                "data_loader",
                f"yield inputs of one shape {tuple(inputs[0].shape[1:]) if inputs else ''}",
                tuple(x.shape[1:]),
            )
            require(
                not inputs or (y is None) == (not targets),
                "profile",
                "data_loader",
                "yield targets always or never",
                "both",
            )
            inputs.append(x[: num_samples - count].cpu())
            if y is not None:
                require(
                    y.shape == x.shape[:1] and not y.is_floating_point(),
                    "profile",
                    "targets",
                    "be integers, one per sample",
                    f"{y.dtype} {tuple(y.shape)}",
                )
                targets.append(y[: num_samples - count].cpu().long())
            count += inputs[-1].shape[0]
            if count >= num_samples:
                break
    require(count > 0, "profile", "data_loader", "yield at least one sample", "none")
    return Samples(torch.cat(inputs), torch.cat(targets) if targets else None)


def split_batch(item: Any) -> tuple[Tensor, Tensor | None]:
    """(inputs, targets or None) of one batch of a data loader."""
    if isinstance(item, Tensor) and item.dim() >= 1:
        return item, None
    if isinstance(item, (tuple, list)) and 1 <= len(item) <= 2 and all(isinstance(part, Tensor) for part in item):
        return item[0], item[1] if len(item) == 2 else None
    raise CladoError(f"profile: data_loader must yield tensors or (inputs, targets), got {type(item).__name__}")


def quantized_variants(
    model: nn.Module,
    captured: Captured,
    bits: Sequence[int],
    quantizer: Quantizer,
    device: torch.device,
    dtype: torch.dtype,
) -> list[list[Tensor]]:
    """For every layer its weight at every bit-width, quantized in the weight's own dtype, then converted."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = (parameters[layer.names[0]].detach() for layer in captured.layers)
    return [list(quantizer.fake_quant(weight, bits).to(device, dtype)) for weight in weights]


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32: TF32 and bfloat16 shortcuts off."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def converted(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model itself, or a copy where device or dtype differ."""
    tensors = [*model.parameters(), *model.buffers()]
    fits = all(t.device == device and (t.dtype == dtype or not t.is_floating_point()) for t in tensors)
    return model if fits else copy.deepcopy(model).to(device, dtype)


def two_samples(inputs: Tensor) -> Tensor:
    """Two samples to export and test with; a single one is repeated."""
    return inputs[:2] if inputs.shape[0] > 1 else inputs.repeat(2, *[1] * (inputs.dim() - 1))


def moved_to(inputs: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return inputs.to(device, dtype) if inputs.is_floating_point() else inputs.to(device)


def _default_batch(captured: Captured, width: int, estimator: str, device: torch.device) -> int:
    """Samples per chunk: as many as keep the largest stacked activation within the device's budget."""
    per_sample = 1
    for node in captured.nodes:
        value = node.meta["val"]
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            fixed = [int(size) for size in tensor.shape if not isinstance(size, torch.SymInt)]
            per_sample = max(per_sample, int(np.prod(fixed, dtype=np.int64)) * tensor.element_size())
    streams = width * width if estimator == "exact" else width
    budget = _STACK_BYTES.get(device.type, _STACK_BYTES["cuda"])
    return int(min(256, max(1, budget // (streams * per_sample))))


def _measure(
    executor: Executor,
    estimator: str,
    variants: list[list[Tensor]],
    inputs: Tensor,
    targets: Tensor | None,
    chunk: int,
    chunks: Chunks,
    verbose: bool,
) -> Sums:
    sums = Sums.zeros(sum(map(len, variants)))
    device, dtype = variants[0][0].device, variants[0][0].dtype
    per_sample = expected_work(estimator, executor.suffix_share, len(variants[0]))
    with progress_bar(f"profile ({estimator})", per_sample * len(inputs), "forwards", verbose) as show:
        while sums.samples < len(inputs):
            first = sums.samples
            part = chunks.load(first)
            if part is None:
                batch = moved_to(inputs[first : first + chunk], device, dtype)
                target = None if targets is None else targets[first : first + chunk].to(device)
                part = ESTIMATORS[estimator](executor, variants, batch, target, lambda: show(executor.work))
                chunks.save(first, part)
            else:
                executor.work += per_sample * part.samples
            sums += part
            show(executor.work)
    return sums


def _assemble(
    sums: Sums, captured: Captured, bits: tuple[int, ...], quantizer: Quantizer, fingerprint: dict[str, str]
) -> Sensitivity:
    count = sums.samples
    pair, pair_squared = (torch.triu(m, 1) + torch.triu(m, 1).T for m in (sums.pair, sums.pair_squared))
    interaction, stderr = _mean_and_error(pair.numpy(), pair_squared.numpy(), count)
    delta_loss, loss_error = _mean_and_error(sums.loss.numpy(), sums.loss_squared.numpy(), count)
    inside = same_layer(len(captured.layers), len(bits))
    interaction[inside] = 0.0
    stderr[inside] = 0.0
    np.fill_diagonal(stderr, loss_error)
    bad = [
        f"{captured.layers[v // len(bits)].name} at {bits[v % len(bits)]} bits"
        for v in range(len(delta_loss))
        if not (np.isfinite(delta_loss[v]) and np.isfinite(interaction[v]).all())
    ]
    require(
        not bad,
        "profile",
        "loss",
        "be finite for every candidate",
        f"NaN or infinity for {', '.join(bad[:3])}" + (f" and {len(bad) - 3} more" if len(bad) > 3 else ""),
    )
    return Sensitivity(captured.layers, bits, delta_loss, interaction, stderr, count, quantizer, {}, fingerprint)


def _mean_and_error(total: Any, squares: Any, count: int) -> tuple[Any, Any]:
    mean = total / count
    if count < 2:
        return mean, np.full_like(mean, np.nan)
    variance = np.maximum(squares / count - mean**2, 0.0) * (count / (count - 1))
    return mean, np.sqrt(variance / count)


def _earlier(output_dir: str | os.PathLike[str] | None, fingerprint: dict[str, str]) -> Sensitivity | None:
    """The result of the very same run, None where there is none; another run's directory is refused."""
    if output_dir is None or not (Path(output_dir) / FILE_NAME).exists():
        return None
    known = Sensitivity.load(Path(output_dir) / FILE_NAME)
    refuse_other_run(known.fingerprint, fingerprint, Path(output_dir))
    return known
