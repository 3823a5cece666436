"""``python -m bench.study.formats``: integers alone and integers with fp8 and kept layers, inputs rounded too, beside ModelOpt's.

Two nets trained on digits (bench/study/nets.py). A candidate is a weight in 2, 4 or 8 bits or fp8 together with its layer's input
in 8 bits (fp8 with fp8), or the layer kept in 16 bits. At each budget of bits per weight: the plan of `clado solve` over all
of them (measured: of the shortlist the least KL on digits set apart), the same without fp8 and kept layers, the same of a
profile under nearest rounding, which is ModelOpt's, and ModelOpt's `auto_quantize` over the same formats by both of its scorings,
its own net with its own ranges and scales (by squared error), on the same images. Judged by the KL to the float net on held-out
digits, paired, clustered by digit. On a CPU ModelOpt has no blocks (nvfp4, mx), so there are none here.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import clado
from clado.artifacts import Plan, Sensitivity
from clado.common import atomic_file

from ..harness import machine
from . import modelopt
from .interactions import logits
from .measure import divergence
from .nets import load_split, trained
from .numbers import clustered, compact
from .real_page import FORMATS

SCHEMES = ("W2A8", "W4A8", "W8A8", "FP8", "BF16")
FLOATS = ("FP8", "BF16")
BUDGETS = (3.0, 3.5, 4.0, 5.0)
SAMPLES = 256
NETS = ("vit", "resnet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/study"), help="trained nets, profiles and scores")
    parser.add_argument("--json", type=Path, default=FORMATS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in NETS for row in Bench(name, options.work).rows()]
    settings = {"schemes": SCHEMES, "samples": SAMPLES}
    found = {"benchmark": "formats", "machine": machine(), "settings": settings, "rows": rows}
    with atomic_file(options.json) as temporary:
        Path(temporary).write_text(compact(found) + "\n")


class Bench:
    """A trained net, the digits that it is measured on and those that choose and judge."""

    def __init__(self, name: str, work: Path) -> None:
        self.name, self.model, self.work = name, trained(name, 0, work / "nets"), work / "formats" / name
        data = load_split("sensitivity a")
        self.images, self.labels = data.images[:SAMPLES], data.labels[:SAMPLES]
        self.judges = {split: load_split(split) for split in ("choice", "heldout")}
        self.clean = {split: logits(self.model, data.images) for split, data in self.judges.items()}

    def profile(self, rounding: str) -> Sensitivity:
        how: dict[str, Any] = {"num_samples": SAMPLES, "output_dir": self.work / rounding, "verbose": False}
        return clado.profile(self.model, [self.images], schemes=SCHEMES, rounding=rounding, **how)

    def rows(self) -> list[dict[str, Any]]:
        sens, nearest = self.profile("compensated"), self.profile("nearest")
        found = {budget: self.ours(sens, nearest, budget) for budget in BUDGETS}
        for method in modelopt.METHODS:
            for budget, losses in zip(BUDGETS, self.theirs(sens, method), strict=True):
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
        return min(short, key=lambda plan: self.judged(clado.apply(self.model, plan), "choice").mean())

    def theirs(self, sens: Sensitivity, method: str) -> list[NDArray[np.float64]]:
        integers = [modelopt.rounded(bits, 8) for bits in (2, 4, 8)]
        formats = [*integers, modelopt.rounded((4, 3), (4, 3), axis=None)]
        calibrated = {"allow_none": True, "num_calib_steps": SAMPLES // modelopt.BATCH}
        data = (self.images, self.labels)
        nets = modelopt.nets(
            self.model, sens, formats, *data, method, BUDGETS, self.work / f"{method}.pt", **calibrated
        )
        return [self.judged(net, "heldout") for net, _ in nets]

    def judged(self, net: nn.Module, split: str) -> NDArray[np.float64]:
        return divergence(self.clean[split], logits(net, self.judges[split].images)).numpy()

    def row(self, budget: float, losses: dict[str, NDArray[np.float64]]) -> dict[str, Any]:
        digit = self.judges["heldout"].digit.numpy()
        row = {
            "net": self.name,
            "budget": budget,
            "kl": {name: clustered(own, digit) for name, own in losses.items()},
            "minus": {name: clustered(losses["all"] - own, digit) for name, own in losses.items() if name != "all"},
        }
        print(self.name, budget, {name: round(float(own.mean()), 5) for name, own in losses.items()}, flush=True)
        return row


if __name__ == "__main__":
    main()
