"""``python -m bench.study.optimism``: whether losses on the samples that rounded the weights are corrected by the right factor.

For every layer and width the mean square of what rounding adds to the layer's output, on samples that decided nothing over that
on the samples that did, beside the factor of the profile (docs/numerics.md, "Optimism"); in plain torch, module by module. The
quickstart's net on digits, and with ``--photographs`` EfficientNet-Lite0.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import clado
from clado.artifacts import Sensitivity
from clado.common import atomic_file, heap
from clado.runs import load_data, load_model

from ..harness import machine
from .interactions import BITS, Bench
from .numbers import compact
from .real_nets import LITE
from .real_page import OPTIMISM

COUNTS, OTHERS = (64, 128, 256, 512), 600
PHOTOGRAPHS, OTHER_PHOTOGRAPHS = (64, 192), 300
TOGETHER = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, help="folder that bench.study.photographs wrote")
    parser.add_argument("--json", type=Path, default=OPTIMISM)
    options = parser.parse_args()
    torch.set_num_threads(1)
    deciding, others = load_data("sensitivity")[0], load_data("heldout")[0][:OTHERS]
    with heap():
        rows = [row("digits", load_model(), deciding[:count], others) for count in COUNTS]
        if options.photographs is not None:
            own = Bench.of(LITE[0], options.photographs, OTHER_PHOTOGRAPHS, Path())
            held = own.judges["heldout"][0]
            rows += [row(LITE[0], own.model, own.sensitivity[:count], held) for count in PHOTOGRAPHS]
    with atomic_file(options.json) as temporary:
        Path(temporary).write_text(compact({"benchmark": "optimism", "machine": machine(), "rows": rows}) + "\n")


def row(net: str, model: nn.Module, deciding: Tensor, others: Tensor) -> dict[str, Any]:
    """Quantiles of the true factors, and how far the profile's are from them, in logarithms."""
    how: dict[str, Any] = {"estimator": "diagonal", "num_samples": len(deciding), "verbose": False}
    sens = clado.profile(model, [deciding], BITS, **how)
    own, other = (added(model, sens, images) for images in (deciding, others))
    assert sens.rounded is not None
    known = np.array([sens.rounded.optimism[name][number] for name, number in own])
    true = np.array([other[key] / own[key] for key in own])
    off = np.log(known / true)
    found = {
        "net": net,
        "samples": len(deciding),
        "others": len(others),
        "weights": len(own),
        "true": np.quantile(true, (0.1, 0.5, 0.9, 1)).tolist(),
        "known": np.quantile(known, (0.1, 0.5, 0.9, 1)).tolist(),
        "error": float(np.sqrt((off**2).mean())),
        "error_without": float(np.sqrt((np.log(true) ** 2).mean())),
    }
    print(found, flush=True)
    return found


def added(model: nn.Module, sens: Sensitivity, images: Tensor) -> dict[tuple[str, str], float]:
    """{(layer, format): mean square of what its error adds to the layer's output, where the net's own depends on it}."""
    total: dict[tuple[str, str], float] = {}
    reads = read_tokens(model, sens, images[:2])
    errors = {layer.name: dict(errors_of(model, sens, layer.name)) for layer in sens.layers}

    def see(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for number, error in errors[name].items():
                value = error(inputs[0])[:, reads[name]].double().square().sum().item()
                total[name, number] = total.get((name, number), 0.0) + value / len(images)

        return hook

    hooks = [model.get_submodule(layer.name).register_forward_hook(see(layer.name)) for layer in sens.layers]
    with torch.inference_mode():
        for part in images.split(TOGETHER):
            model(part)
    for hook in hooks:
        hook.remove()
    return total


def read_tokens(model: nn.Module, sens: Sensitivity, images: Tensor) -> dict[str, Tensor]:
    """{layer: which tokens of its output, or channels of a convolution's, have a gradient}."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: outputs.update({name: output})

    hooks = [model.get_submodule(layer.name).register_forward_hook(keep(layer.name)) for layer in sens.layers]
    with torch.enable_grad():
        slopes = torch.autograd.grad(model(images).square().sum(), list(outputs.values()))
    for hook in hooks:
        hook.remove()
    return {name: slope.movedim(1, 0).flatten(1).any(1) for name, slope in zip(outputs, slopes, strict=True)}


def errors_of(model: nn.Module, sens: Sensitivity, layer: str) -> Iterator[tuple[str, nn.Module]]:
    """(format, the layer with what rounding adds to its weight for a weight, and no bias) of every candidate of a layer."""
    module, rounded = model.get_submodule(layer), sens.rounded
    assert rounded is not None
    for name, number in {scheme.number.name: scheme.number for scheme in sens.candidates.flat}.items():
        if rounded.has(layer, number):
            own = deepcopy(module)
            own.weight = nn.Parameter(
                rounded.of(layer, number).values(torch.float32).view_as(module.weight) - module.weight
            )
            own.bias = None
            yield name, own


if __name__ == "__main__":
    main()
