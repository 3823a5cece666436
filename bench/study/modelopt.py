"""The rival: plans of NVIDIA ModelOpt's ``auto_quantize``, weights only, of the same widths on the same layers and samples.

Its weight quantizers are calibrated by squared error, as ours are (its default, the largest magnitude, is worse at 2 bits).
Layers that are not searched stay float and count 16 bits per weight in its budget, so the budget is raised by that much.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clado.artifacts import Sensitivity

from ..harness import quiet

METHODS = ("gradient", "kl_div")
BATCH = 32


def plans(
    model: nn.Module,
    sens: Sensitivity,
    images: Tensor,
    labels: Tensor,
    method: str,
    budgets: Sequence[float],
    checkpoint: Path,
    names: Mapping[str, str] | None = None,
) -> Iterator[dict[str, int]]:
    """{layer: bits} for each budget of average bits; the scores are measured once and kept in ``checkpoint``.

    ``names``: {layer: module}, where the model's modules are called otherwise.
    """
    axis = None if sens.quantizer.group_size == 0 else 0
    formats = [integers(bits, axis=axis) for bits in sens.bits]
    for _, chosen in nets(model, sens, formats, images, labels, method, budgets, checkpoint, names):
        yield {layer: sens.bits[k] for layer, k in chosen.items()}


def nets(
    model: nn.Module,
    sens: Sensitivity,
    formats: list[dict[str, Any]],
    images: Tensor,
    labels: Tensor,
    method: str,
    budgets: Sequence[float],
    checkpoint: Path,
    names: Mapping[str, str] | None = None,
    **settings: Any,
) -> Iterator[tuple[nn.Module, dict[str, int]]]:
    """(its quantized net, {layer: place of its format; -1: none}) for each budget, as :func:`plans`."""
    searched_weights = sens.candidates.numel
    modules = {layer.name: (names or {}).get(layer.name, layer.name) for layer in sens.layers}
    float_layers = unsearched(model, modules.values())
    extra = sum(float_layers.values())
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    state_file = checkpoint
    if not checkpoint.exists():  # a state it was killed in cannot be resumed
        state_file = checkpoint.with_suffix(".partial")
        state_file.unlink(missing_ok=True)
    for budget in budgets:
        with quiet():
            net, state = searched(
                model,
                (budget * searched_weights + 16 * extra) / (searched_weights + extra),
                formats,
                batches,
                method,
                disabled_layers=list(float_layers),
                num_score_steps=len(batches),
                checkpoint=str(state_file),
                **settings,
            )
        recipe = {
            name.removesuffix(".quant_recipe"): _place(str(chosen)) for name, chosen in state["best"]["recipe"].items()
        }
        yield net, {layer: recipe[module] for layer, module in modules.items()}
    state_file.replace(checkpoint)


def unsearched(model: nn.Module, names: Collection[str]) -> dict[str, int]:
    """{module: weights} of the layers that are not among ``names``."""
    return {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name not in names
    }


def _place(recipe: str) -> int:
    """Of CUSTOM_MODULE_0_2(effective-bits: 8.0) 2; of NONE -1."""
    found = re.match(r"CUSTOM\w*_(\d+)\(", recipe)
    if not found and not recipe.startswith("NONE"):
        raise ValueError(f"ModelOpt names a recipe {recipe!r}")
    return int(found[1]) if found else -1


def integers(bits: int, **cfg: Any) -> dict[str, Any]:
    """ModelOpt's configuration of integer weights of so many bits, scales by squared error; ``cfg``: of the quantizer."""
    return rounded(bits, **cfg)


def rounded(weight: Any, inputs: Any = None, **cfg: Any) -> dict[str, Any]:
    """ModelOpt's configuration of weights, scales by squared error, and of inputs with a range per tensor; None: as they are.

    Numbers are bits, or (exponent, mantissa); ``cfg``: of the weights' quantizer.
    """
    quantizers = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": weight, "axis": 0} | cfg, "enable": True},
    ]
    if inputs is not None:
        own = {"num_bits": inputs, "axis": None}
        quantizers.append({"quantizer_name": "*input_quantizer", "cfg": own, "enable": True})
    return {"quant_cfg": quantizers, "algorithm": "mse"}


def searched(
    model: nn.Module,
    effective_bits: float,
    formats: list[dict[str, Any]],
    batches: Iterable[tuple[Tensor, Tensor]],
    method: str,
    allow_none: bool = False,
    **settings: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """``auto_quantize`` of a copy of a classifier over all of its layers: the net, and what it measured.

    One calibration step unless said. ``allow_none``: a layer may be left as it is.
    """
    import modelopt.torch.quantization as mtq

    found: tuple[nn.Module, dict[str, Any]] = mtq.auto_quantize(
        copy.deepcopy(model),
        {"effective_bits": effective_bits},
        quantization_formats=formats,
        module_search_spaces=[
            {"module_name_patterns": ["*"], "quantization_formats": formats, "allow_no_quant": allow_none}
        ],
        data_loader=batches,
        forward_step=lambda module, batch: module(batch[0]),
        loss_func=lambda output, batch: cross_entropy(output, batch[1]),
        method=method,
        **{"num_calib_steps": 1, **settings},
    )
    return found
