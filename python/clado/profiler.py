"""Measure the sensitivity matrix of a model: samples in, :class:`Sensitivity` out."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .capture import ForwardStep, NotCapturable, capture
from .carried import LOW_PRECISIONS, CarriedExecutor
from .checkpoint import Chunks, refuse_other_run
from .errors import CladoError, require
from .estimators import CLOSED_FORM, ESTIMATORS, Sums, expected_work
from .executor import Executor, Runner
from .fingerprint import code_digest, digest, tensor_digest, weights_digest
from .losses import LogitLoss, Loss, LossFunc, UserLoss
from .probe import SAMPLES, probe
from .progress import progress_bar
from .quantizer import Quantizer
from .sensitivity import FILE_NAME, Layer, Sensitivity, check_bits, same_layer
from .whole import WholeExecutor

LOSSES = ("kl", "cross_entropy")
PRECISIONS = {"float32": torch.float32, "float64": torch.float64} | dict.fromkeys(LOW_PRECISIONS, torch.float32)
# Bytes of the largest stacked activation: beyond it a CPU leaves its caches, a GPU gains nothing more.
_STACK_BYTES = {"cpu": 4 << 20, "cuda": 1 << 30}


@dataclass(frozen=True)
class Samples:
    """The sensitivity set: inputs ``[N, …]`` and, where the loader gives them, targets int64 ``[N]``; on the CPU.

    For a user's ``forward_step`` or ``loss_func`` the inputs are whole batches: a nest of tensors ``[N, …]``.
    """

    inputs: Any
    targets: Tensor | None

    def __len__(self) -> int:
        return len(pytree.tree_leaves(self.inputs)[0])

    def digest(self) -> str:
        inputs = {f"inputs{k or ''}": leaf for k, leaf in enumerate(pytree.tree_leaves(self.inputs))}
        return tensor_digest(inputs | ({} if self.targets is None else {"targets": self.targets}))


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
            (DESIGN §3.3) "tf32" or "bfloat16" matrix products. The latter are probed against float64 on a few layers and
            samples; the errors are in ``info["probe"]``, and where they exceed the sampling noise the run is float32, with a
            warning. Losses and sums are float64 always.
        num_samples: how many samples of the loader to use; fewer are taken, with a warning, when it ends early.
        exact_samples: for "corrected": samples (rounded up to whole chunks) on which every pair is evaluated; None: an eighth.
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

    require(
        estimator != "gradient" or precision not in LOW_PRECISIONS,
        "profile",
        "precision",
        "be float32 or float64 for the gradient estimator (a backward carries no differences)",
        repr(precision),
    )
    if loss_func is not None:
        loss = "user"
        usable = [name for name in ESTIMATORS if name not in CLOSED_FORM]
        require(estimator in usable, "profile", "estimator", f"be one of {', '.join(usable)} with loss_func", estimator)

    start = time.perf_counter()
    samples = collect(data_loader, num_samples, seed, whole=loss_func is not None or forward_step is not None)
    require(
        loss != "cross_entropy" or samples.targets is not None,
        "profile",
        "data_loader",
        "yield (inputs, targets) for cross_entropy",
        "inputs alone",
    )
    if forward_step is None and loss_func is not None:
        forward_step = first_of_batch
    place = torch.device(device) if device is not None else next(model.parameters()).device
    dtype = PRECISIONS[precision]
    with full_precision(), torch.no_grad():
        moved = converted(model, place, dtype)
        example = moved_to(two_samples(samples.inputs), place, dtype)
        executor: Runner
        notes: list[str] = []
        try:
            executor = Executor(capture(moved, example, ignore, quantize_ends, forward_step))
            output = executor.self_test(example)
        except NotCapturable as error:
            executor = WholeExecutor(moved, example, ignore, quantize_ends, forward_step)
            output = executor.self_test(example)
            notes.append(f"whole forwards for every perturbation, since the model has no usable graph ({error})")
        check_output(output, samples.targets, loss)
        chunk = batch_size or _default_batch(executor, len(bits), estimator, place)
        settings = {
            "bits": bits,
            "estimator": estimator,
            "loss": loss if loss_func is None else code_digest(loss_func),
            "forward_step": code_digest(forward_step),
            "exact_samples": exact_samples,
            "precision": precision,
            "batch_size": chunk,
            "layers": [asdict(layer) for layer in executor.layers],
            "quantizer": quantizer.to_json(),
        }
        fingerprint = {"weights": weights_digest(model), "data": samples.digest(), "settings": digest(settings)}
        known = _earlier(output_dir, fingerprint)
        if known is not None:
            return known
        variants = quantized_variants(model, executor.layers, bits, quantizer, place, dtype)
        chunks = Chunks(output_dir, fingerprint)
        make_loss = _loss_maker(loss, loss_func, samples.targets, place)
        probed: dict[str, Any] = {}
        if precision in LOW_PRECISIONS:
            executor, probed = _lower(executor, variants, samples, make_loss, estimator, precision, notes)
        sums = _measure(executor, estimator, variants, samples, make_loss, chunk, exact_samples, chunks, verbose)

    if sums.samples < num_samples:
        notes.append(f"the data ended after {sums.samples} of {num_samples} samples")
    result = _assemble(sums, executor.layers, bits, quantizer, fingerprint)
    result.info.update(
        estimator=estimator,
        loss=loss,
        precision=executor.precision.name
        if isinstance(executor, CarriedExecutor)
        else str(dtype).removeprefix("torch."),
        **probed,
        batch_size=chunk,
        device=place.type,
        forward_equivalents=executor.work / sums.samples,
        expected_forward_equivalents=expected_work(estimator, executor.suffix_share, len(bits)),
        seconds=time.perf_counter() - start,
        float_layers=executor.skipped,
        warnings=notes,
    )
    if output_dir is not None:
        result.save(Path(output_dir) / FILE_NAME)
        chunks.clear()
    return result


def check_output(output: Any, targets: Tensor | None, loss: str) -> None:
    """Raise when the model's output does not suit the loss, or holds NaN or infinity."""
    leaves = pytree.tree_leaves(output)
    if loss != "user":
        fits = isinstance(output, Tensor) and output.dim() == 2
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        require(fits, "profile", "model", "return logits [N, C] (other outputs need loss_func)", f"shape {shape}")
        check_targets(targets, output.shape[1])
        finite = all(bool(torch.isfinite(leaf).all()) for leaf in leaves)
        require(finite, "profile", "model", "return finite logits", "NaN or infinity")


def first_of_batch(model: nn.Module, batch: Any) -> Any:
    """The forward step of a batch that is the input, or (input, …)."""
    return model(batch if isinstance(batch, Tensor) else batch[0])


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


def collect(data_loader: Iterable[Any], num_samples: int, seed: int = 0, whole: bool = False) -> Samples:
    """Read up to ``num_samples`` samples in the loader's order; ``whole``: nests of tensors, kept as they are.

    Raises:
        CladoError: no data, a batch of another shape, or items that are neither tensors nor (inputs, targets).
    """
    batches: list[Any] = []
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    count = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for item in data_loader:
            if whole:
                batches.append(_first_rows(item, num_samples - count))
                count += len(pytree.tree_leaves(batches[-1])[0])
                if count >= num_samples:
                    break
                continue
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
    if whole:
        require(
            len({str(pytree.tree_structure(batch)) for batch in batches}) == 1,
            "profile",
            "data_loader",
            "yield batches of one structure",
            "several",
        )
        # The labels of (inputs, targets) also serve the cross-entropy.
        labels = [batch[1] for batch in batches if isinstance(batch, (tuple, list)) and len(batch) == 2]
        usable = len(labels) == len(batches) and all(
            isinstance(y, Tensor) and y.dim() == 1 and not y.is_floating_point() for y in labels
        )
        joined = pytree.tree_map(lambda *leaves: torch.cat(leaves), batches[0], *batches[1:])
        return Samples(joined, torch.cat(labels).long() if usable else None)
    return Samples(torch.cat(inputs), torch.cat(targets) if targets else None)


def _first_rows(batch: Any, count: int) -> Any:
    """Up to ``count`` samples of a nest of tensors, on the CPU."""
    leaves = pytree.tree_leaves(batch)
    fits = [isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == len(leaves[0]) for leaf in leaves]
    got = "other items" if leaves else "nothing"
    require(bool(leaves) and all(fits), "profile", "data_loader", "yield nests of tensors of one length", got)
    return pytree.tree_map(lambda leaf: leaf[:count].cpu(), batch)


def split_batch(item: Any) -> tuple[Tensor, Tensor | None]:
    """(inputs, targets or None) of one batch of a data loader."""
    if isinstance(item, Tensor) and item.dim() >= 1:
        return item, None
    if isinstance(item, (tuple, list)) and 1 <= len(item) <= 2 and all(isinstance(part, Tensor) for part in item):
        return item[0], item[1] if len(item) == 2 else None
    raise CladoError(f"profile: data_loader must yield tensors or (inputs, targets), got {type(item).__name__}")


def quantized_variants(
    model: nn.Module,
    layers: Sequence[Layer],
    bits: Sequence[int],
    quantizer: Quantizer,
    device: torch.device,
    dtype: torch.dtype,
) -> list[list[Tensor]]:
    """For every layer its weight at every bit-width, quantized in the weight's own dtype, then converted."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = (parameters[layer.names[0]].detach() for layer in layers)
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


def two_samples(inputs: Any) -> Any:
    """Two samples to export and test with; a single one is repeated."""
    return pytree.tree_map(lambda x: x[:2] if len(x) > 1 else x.repeat(2, *[1] * (x.dim() - 1)), inputs)


def moved_to(inputs: Any, device: torch.device, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda x: x.to(device, dtype) if x.is_floating_point() else x.to(device), inputs)


def _loss_maker(
    loss: str, loss_func: LossFunc | None, targets: Tensor | None, device: torch.device
) -> Callable[[Any, slice], Loss]:
    """The loss of a chunk, from its batch and its place in the sensitivity set."""

    def make(batch: Any, rows: slice) -> Loss:
        if loss_func is not None:
            return UserLoss(loss_func, batch, len(pytree.tree_leaves(batch)[0]))
        return LogitLoss(targets[rows].to(device) if loss == "cross_entropy" and targets is not None else None)

    return make


def _default_batch(executor: Runner, width: int, estimator: str, device: torch.device) -> int:
    """Samples per chunk: as many as keep the largest stacked activation within the device's budget."""
    if isinstance(executor, WholeExecutor):
        return 32
    per_sample = 1
    assert isinstance(executor, Executor)
    for node in executor.captured.nodes:
        value = node.meta["val"]
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            fixed = [int(size) for size in tensor.shape if not isinstance(size, torch.SymInt)]
            per_sample = max(per_sample, int(np.prod(fixed, dtype=np.int64)) * tensor.element_size())
    streams = width * width if estimator in ("exact", "corrected") else width
    budget = _STACK_BYTES.get(device.type, _STACK_BYTES["cuda"])
    return int(min(256, max(1, budget // (streams * per_sample))))


def _lower(
    executor: Runner,
    variants: list[list[Tensor]],
    samples: Samples,
    make_loss: Callable[[Any, slice], Loss],
    estimator: str,
    precision: str,
    notes: list[str],
) -> tuple[Runner, dict[str, Any]]:
    """The executor that carries differences in a low precision, where a probe finds its errors below the sampling noise."""
    if not isinstance(executor, Executor):
        notes.append(f"float32 instead of {precision}: differences are carried through a graph, and there is none")
        return executor, {}
    rows = slice(0, min(SAMPLES, len(samples)))
    device = variants[0][0].device
    batch = moved_to(pytree.tree_map(lambda leaf: leaf[rows], samples.inputs), device, torch.float32)
    found = probe(
        executor.captured, variants, batch, lambda inputs: make_loss(inputs, rows), estimator, precision, len(samples)
    )
    if not found["good"]:
        notes.append(
            f"float32 instead of {precision}: the probe's error of ΔL is {found['loss_error']:.1e} and of Ω "
            f"{found['pair_error']:.1e}, the sampling noise {found['loss_noise']:.1e} and {found['pair_noise']:.1e}"
        )
        return executor, {"probe": found}
    return CarriedExecutor(executor.captured, precision, device, executor), {"probe": found}


def _measure(
    executor: Runner,
    estimator: str,
    variants: list[list[Tensor]],
    samples: Samples,
    make_loss: Callable[[Any, slice], Loss],
    chunk: int,
    exact_samples: int | None,
    chunks: Chunks,
    verbose: bool,
) -> Sums:
    sums = Sums.zeros(sum(map(len, variants)))
    device, dtype = variants[0][0].device, variants[0][0].dtype
    width, count = len(variants[0]), len(samples)
    few = count if estimator != "corrected" else exact_samples or max(2, count // 8)

    def work(first: int) -> tuple[str, float]:
        """What is done to the chunk that starts at a sample, and its forward-equivalents per sample."""
        name = estimator if first < few else "logit"
        return name, expected_work(name, executor.suffix_share, width)

    total = sum(work(first)[1] * min(chunk, count - first) for first in range(0, count, chunk))
    with progress_bar(f"profile ({estimator})", total, "forwards", verbose) as show:
        while sums.samples < count:
            rows = slice(sums.samples, min(sums.samples + chunk, count))
            name, per_sample = work(rows.start)
            part = chunks.load(rows.start)
            if part is None:
                batch = moved_to(pytree.tree_map(lambda leaf, rows=rows: leaf[rows], samples.inputs), device, dtype)
                loss = make_loss(batch, rows)
                part = ESTIMATORS[name](executor, variants, batch, loss, lambda: show(executor.work))
                chunks.save(rows.start, part)
            else:
                executor.work += per_sample * part.samples
            sums += part
            show(executor.work)
    return sums


def _assemble(
    sums: Sums, layers: Sequence[Layer], bits: tuple[int, ...], quantizer: Quantizer, fingerprint: dict[str, str]
) -> Sensitivity:
    count = sums.samples
    pair, pair_squared = (torch.triu(m, 1) + torch.triu(m, 1).T for m in (sums.pair, sums.pair_squared))
    interaction, stderr = _mean_and_error(pair.numpy(), pair_squared.numpy(), count)
    if int(sums.residual_samples):
        interaction, stderr = _corrected(sums, interaction, stderr)
    delta_loss, loss_error = _mean_and_error(sums.loss.numpy(), sums.loss_squared.numpy(), count)
    inside = same_layer(len(layers), len(bits))
    interaction[inside] = 0.0
    stderr[inside] = 0.0
    np.fill_diagonal(stderr, loss_error)
    bad = [
        f"{layers[v // len(bits)].name} at {bits[v % len(bits)]} bits"
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
    return Sensitivity(tuple(layers), bits, delta_loss, interaction, stderr, count, quantizer, {}, fingerprint)


def _corrected(sums: Sums, closed: Any, closed_error: Any) -> tuple[Any, Any]:
    """Mean of the closed form over all N samples plus mean residual over the n that have one, with its standard error.

    The n samples enter both means: Var = Var(a)/N + Var(r)/n + 2 Cov(a, r)/N. The covariance is taken over the n samples,
    and bounded by what the two variances allow.
    """
    n, count = int(sums.residual_samples), sums.samples
    full = [
        np.triu(m.numpy(), 1) for m in (sums.residual, sums.residual_squared, sums.residual_pair, sums.residual_closed)
    ]
    residual, squared, product, part = (m + m.T for m in full)
    mean, error = _mean_and_error(residual, squared, n)
    covariance = (product - part * mean) / max(n - 1, 1)
    bound = closed_error * error * np.sqrt(count * n)
    variance = closed_error**2 + error**2 + 2 * np.clip(covariance, -bound, bound) / count
    return closed + mean, np.sqrt(np.maximum(variance, 0.0))


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
