"""What a low precision costs: a few layers and samples against float64, before the run that would use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..common import moved_to
from ..graph import PRECISIONS, Runner, Variants, in_precision
from .estimators import ESTIMATORS
from .estimators.base import blocks, singles
from .losses import Loss


def auto_precision(device: torch.device, estimator: str) -> str:
    """bfloat16 where the device multiplies it faster and the estimator bears it (docs/numerics.md), else float32."""
    if device.type == "cuda":
        units = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        units = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return "bfloat16" if units and ESTIMATORS[estimator].carries and not ESTIMATORS[estimator].pairs else "float32"


LAYERS, SAMPLES = 6, 4


def probe(
    runner: Runner,
    variants: Variants,
    batch: Any,
    make_loss: Callable[[Any], Loss],
    estimator: str,
    precision: str,
    num_samples: int,
) -> dict[str, Any]:
    """Errors of a carried precision against a float64 run of the same estimator.

    Args:
        runner: the float32 graph; ``variants``: its quantized weights.
        batch: a few samples.
        make_loss: the loss on a batch of either precision.
        estimator: which one; some are probed by another (:class:`Estimator`).
        precision: "tf32" or "bfloat16".
        num_samples: samples of the run to come: its sampling noise is what an error must stay below.

    Returns:
        ``loss_error``, ``pair_error``: relative errors (Frobenius) of ΔL and Ω; ``loss_noise``, ``pair_noise``: expected
        standard errors of the run over the same norm; ``delta_error``: relative error of δ of the worst candidate, by its
        place in its layer's list; ``good``: whether both errors are below the noise.
    """
    count = runner.num_layers
    chosen = sorted({round(k * (count - 1) / max(1, LAYERS - 1)) for k in range(min(LAYERS, count))})
    few, device = runner.only(chosen), variants[0][0].weight.device
    name = ESTIMATORS[estimator].probed_by or estimator
    runs = []
    for tried in (precision, "float64"):
        dtype, twin = PRECISIONS[tried], in_precision(few, tried)
        assert twin is not None  # there is a graph
        mine = [[variant.to(dtype) for variant in variants[k]] for k in chosen]
        inputs = moved_to(batch, device, dtype)
        loss = make_loss(inputs)
        delta = singles(twin, mine, inputs, loss, nothing).delta
        runs.append((ESTIMATORS[name].run(twin, mine, inputs, loss, nothing), delta))
    (low, low_delta), (high, high_delta) = runs
    result: dict[str, Any] = {"precision": precision, "layers": len(chosen), "samples": high.samples}
    for item, got, wanted, squares in (
        ("loss", low.loss, high.loss, high.loss_squared),
        ("pair", low.pair, high.pair, high.pair_squared),
    ):
        upper = torch.ones_like(wanted) if wanted.dim() == 1 else torch.triu(torch.ones_like(wanted), 1)
        norm = (wanted * upper).norm().item() or 1.0
        variance = (squares / high.samples - (wanted / high.samples).square()).clamp(min=0) * upper
        noise = (
            (variance * high.samples / max(1, high.samples - 1) / num_samples).sum().sqrt().item() * high.samples / norm
        )
        result[f"{item}_error"] = ((got - wanted) * upper).norm().item() / norm
        result[f"{item}_noise"] = noise if high.samples > 1 else float("inf")
    got, wanted = (_values(delta) for delta in (low_delta, high_delta))
    errors = (got - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-300)
    own = [errors[block] for block in blocks([variants[k] for k in chosen])]
    widest = max(map(len, own))
    result["delta_error"] = [max(e[m].item() for e in own if len(e) > m) for m in range(widest)]
    result["good"] = all(result[f"{item}_error"] <= result[f"{item}_noise"] for item in ("loss", "pair"))
    if result["loss_noise"] == float("inf"):  # a single sample says nothing about noise
        result["loss_noise"] = result["pair_noise"] = None
    return result


def _values(delta: Any) -> Tensor:
    """``[V, …]`` float64 of all changes."""
    leaves = [leaf for leaf in pytree.tree_leaves(delta) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.cat([leaf.double().flatten(1) for leaf in leaves], 1)


def nothing() -> None:
    """Of a pass that shows no progress."""
