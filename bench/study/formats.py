"""``python -m bench.study.formats``: integers alone and integers with fp8 and kept layers, inputs rounded too, beside ModelOpt's.

Three nets trained on digits (bench/study/nets.py), and with ``--photographs`` EfficientNet-Lite0 with ImageNet weights. A
candidate is a weight in 2, 4 or 8 bits or fp8 together with its layer's input in 8 bits (fp8 with fp8), or the layer kept in 16
bits. At each budget of bits per weight: the plan of `clado solve` over all of them (measured: of the shortlist the least KL on
images set apart), the same without fp8 and kept layers, the same of a profile under nearest rounding, which is ModelOpt's, and
ModelOpt's `auto_quantize` over the same formats by both of its scorings, its own net with its own ranges and scales (by squared
error), on the same images. Judged by the KL to the float net on held-out images, paired, clustered by digit or by what a
photograph shows. On a CPU ModelOpt has no blocks (nvfp4, mx), so there are none here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import clado
from clado.artifacts import Plan, Sensitivity
from clado.common import atomic_file

from ..harness import machine
from . import mct, modelopt
from .interactions import HELDOUT, logits
from .interactions import Bench as Photographs
from .measure import divergence, solved
from .nets import load_split, trained
from .numbers import clustered, compact
from .real_nets import LITE
from .real_page import FORMATS

SCHEMES = ("W2A8", "W4A8", "W8A8", "FP8", "BF16")
FLOATS = ("FP8", "BF16")
BUDGETS = (3.0, 3.5, 4.0, 5.0)
DIGITS, PHOTOGRAPHS = 256, 128  # that are measured on
NETS = ("vit", "resnet", "mobilenet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/study"), help="trained nets, profiles and scores")
    parser.add_argument("--photographs", type=Path, help="folder that bench.study.photographs wrote")
    parser.add_argument("--nets", help=f"of {', '.join((*NETS, *LITE))}; by default all there is data for")
    parser.add_argument("--budgets", default=",".join(f"{budget:g}" for budget in BUDGETS))
    parser.add_argument("--ours", action="store_true", help="leave ModelOpt out")
    parser.add_argument("--json", type=Path, default=FORMATS, help="rows of other nets in it stay")
    options = parser.parse_args()
    torch.set_num_threads(1)
    every = (*NETS, LITE[0]) if options.photographs else NETS
    for name in options.nets.split(",") if options.nets else every:
        bench = of_digits(name, options.work) if name in NETS else of_photographs(name, options)
        found = bench.rows([float(budget) for budget in options.budgets.split(",")], options.ours)
        known = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
        rows = [row for row in known if row["net"] != name] + found
        out = {"benchmark": "formats", "machine": machine(), "settings": {"schemes": SCHEMES}, "rows": rows}
        with atomic_file(options.json) as temporary:
            Path(temporary).write_text(compact(out) + "\n")


def of_digits(name: str, work: Path) -> Bench:
    data = load_split("sensitivity a")
    judges = {split: load_split(split) for split in ("choice", "heldout")}
    images = {split: own.images for split, own in judges.items()}
    model = trained(name, 0, work / "nets")
    shown = judges["heldout"].digit.numpy()
    return Bench(name, model, (data.images[:DIGITS], data.labels[:DIGITS]), images, shown, work / "formats" / name)


def of_photographs(name: str, options: argparse.Namespace) -> Bench:
    """Labels are the float net's classes."""
    own = Photographs.of(name, options.photographs, HELDOUT, options.work)
    images = own.sensitivity[:PHOTOGRAPHS]
    judges = {split: held for split, (held, _) in own.judges.items()}
    data = (images, logits(own.model, images).argmax(1))
    return Bench(name, own.model, data, judges, own.shown, options.work / "formats" / name)


class Bench:
    """A net, the images and labels that it is measured on, images that choose and judge, and what those that judge show."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        data: tuple[Tensor, Tensor],
        judges: dict[str, Tensor],
        shown: NDArray[np.int64],
        work: Path,
    ) -> None:
        self.name, self.model, self.data, self.judges, self.shown, self.work = name, model, data, judges, shown, work
        self.clean = {split: logits(model, images) for split, images in judges.items()}

    def profile(self, rounding: str) -> Sensitivity:
        images = self.data[0]
        how: dict[str, Any] = {"num_samples": len(images), "output_dir": self.work / rounding, "verbose": False}
        return clado.profile(self.model, [images], schemes=SCHEMES, rounding=rounding, **how)

    def rows(self, budgets: list[float], alone: bool) -> list[dict[str, Any]]:
        sens, nearest = self.profile("compensated"), self.profile("nearest")
        found = {budget: self.ours(sens, nearest, budget) for budget in budgets}
        for method in () if alone else modelopt.METHODS:
            for budget, losses in zip(budgets, self.theirs(sens, method, budgets), strict=True):
                found[budget][f"ModelOpt, {method}"] = losses
        return [self.row(budget, losses) for budget, losses in found.items()]

    def ours(self, sens: Sensitivity, nearest: Sensitivity, budget: float) -> dict[str, NDArray[np.float64]]:
        without = {layer.name: FLOATS for layer in sens.layers}
        plans = {
            "all": self.best(sens, avg_bits=budget),
            "integers": self.best(sens, avg_bits=budget, forbid=without),
            "nearest": self.best(nearest, avg_bits=budget),
        }
        return {name: self.judged(clado.apply(self.model, plan), "heldout") for name, plan in plans.items()}

    def best(self, sens: Sensitivity, **limits: Any) -> Plan:
        """What `clado solve` gives."""
        short = clado.shortlist(sens, solver="heuristic", **limits)
        return solved(sens, short, np.stack([self.judged(clado.apply(self.model, plan), "choice") for plan in short]))

    def theirs(self, sens: Sensitivity, method: str, budgets: list[float]) -> list[NDArray[np.float64]]:
        integers = [modelopt.rounded(bits, 8) for bits in (2, 4, 8)]
        formats = [*integers, modelopt.rounded((4, 3), (4, 3), axis=None)]
        images, labels = self.data
        calibrated = {"allow_none": True, "num_calib_steps": len(images) // modelopt.BATCH}
        plain, names = mct.padded(self.model, sens, images[:1])
        nets = modelopt.nets(
            plain, sens, formats, images, labels, method, budgets, self.work / f"{method}.pt", names, **calibrated
        )
        return [self.judged(net, "heldout") for net, _ in nets]

    def judged(self, net: nn.Module, split: str) -> NDArray[np.float64]:
        return divergence(self.clean[split], logits(net, self.judges[split])).numpy()

    def row(self, budget: float, losses: dict[str, NDArray[np.float64]]) -> dict[str, Any]:
        row = {
            "net": self.name,
            "samples": len(self.data[0]),
            "budget": budget,
            "kl": {name: clustered(own, self.shown) for name, own in losses.items()},
            "minus": {
                name: clustered(losses["all"] - own, self.shown) for name, own in losses.items() if name != "all"
            },
        }
        print(self.name, budget, {name: round(float(own.mean()), 5) for name, own in losses.items()}, flush=True)
        return row


if __name__ == "__main__":
    main()
