"""``python -m bench.study.optimism``: whether losses on the samples that rounded the weights are corrected by the right factor.

For every layer and width the mean square of what rounding adds to the layer's output, on samples that decided nothing over that
on the samples that did, beside the factor of the profile (docs/numerics.md, "Optimism"); in plain torch, module by module. The
quickstart's net on digits, and with ``--photographs`` EfficientNet-Lite0 and the trained vision transformer of
bench/study/dense.py, by photographs of the things that decided and of others.
"""

from __future__ import annotations

import argparse
import json
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
from .dense import SAMPLES
from .dense import Bench as Transformer
from .interactions import BITS, Bench
from .numbers import compact
from .real_nets import LITE
from .real_page import OPTIMISM

COUNTS, OTHERS = (64, 128, 256, 512), 600
PHOTOGRAPHS, OTHER_PHOTOGRAPHS = (64, 192), 300
# Of the transformer's sensitivity photographs: those that decide, and others of the same things.
DRAW, OTHER_DRAW = 1, 2
TOGETHER = 32
NETS = ("digits", LITE[0], "dinov2")
Rows = Iterator[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, help="folder that bench.study.photographs wrote")
    parser.add_argument("--nets", help=f"of {', '.join(NETS)}; by default all there is data for; rows of others stay")
    parser.add_argument(
        "--work", type=Path, default=Path("build/study/dense"), help="of bench.study.dense: its profiles"
    )
    parser.add_argument("--json", type=Path, default=OPTIMISM)
    options = parser.parse_args()
    torch.set_num_threads(1)
    every = NETS if options.photographs else NETS[:1]
    nets = options.nets.split(",") if options.nets else every
    known = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    makers = (
        of_digits,
        lambda: of_photographs(options.photographs),
        lambda: of_transformer(options.photographs, options.work),
    )
    rows = []
    with heap():
        for net, make in zip(NETS, makers, strict=True):
            rows += list(make()) if net in nets else [row for row in known if row["net"] == net]
    with atomic_file(options.json) as temporary:
        Path(temporary).write_text(compact({"benchmark": "optimism", "machine": machine(), "rows": rows}) + "\n")


def of_digits() -> Rows:
    deciding, others = load_data("sensitivity")[0], load_data("heldout")[0][:OTHERS]
    model = load_model()
    for count in COUNTS:
        yield row(NETS[0], "others", model, profiled(model, deciding[:count]), deciding[:count], others)


def of_photographs(folder: Path) -> Rows:
    own = Bench.of(LITE[0], folder, OTHER_PHOTOGRAPHS, Path())
    for count in PHOTOGRAPHS:
        images = own.sensitivity[:count]
        yield row(LITE[0], "of other things", own.model, profiled(own.model, images), images, own.judges["heldout"][0])


def of_transformer(folder: Path, work: Path) -> Rows:
    """By a profile of its tokens: which loss was measured decides nothing of the weights."""
    own = Transformer(folder, work)
    sens = own.profile("tokens", DRAW)
    deciding, same = (own.images["sensitivity"][k * SAMPLES : (k + 1) * SAMPLES] for k in (DRAW, OTHER_DRAW))
    for which, others in (("of the same things", same), ("of other things", own.images["heldout"][:SAMPLES])):
        yield row(NETS[2], which, own.model, sens, deciding, others)


def profiled(model: nn.Module, deciding: Tensor) -> Sensitivity:
    how: dict[str, Any] = {"estimator": "diagonal", "num_samples": len(deciding), "verbose": False}
    return clado.profile(model, [deciding], BITS, **how)


def row(net: str, which: str, model: nn.Module, sens: Sensitivity, deciding: Tensor, others: Tensor) -> dict[str, Any]:
    """Quantiles of the true factors, and how far the profile's are from them, in logarithms."""
    own, other = (added(model, sens, images) for images in (deciding, others))
    assert sens.rounded is not None
    known = np.array([sens.rounded.optimism[name][number] for name, number in own])
    true = np.array([other[key] / own[key] for key in own])
    off = np.log(known / true)
    found = {
        "net": net,
        "samples": len(deciding),
        "others": len(others),
        "which": which,
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
        found = model(images)
        parts = [found] if isinstance(found, Tensor) else list(found.values())
        slopes = torch.autograd.grad(sum(part.square().sum() for part in parts), list(outputs.values()))
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
