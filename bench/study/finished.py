"""``python -m bench.study.finished``: what ships, beside ModelOpt's best: plans made and finished under better rounding.

Ours: profiled and planned under compensated rounding, then finished by learning. ModelOpt's: the plans of both its scorings, each
rounded by every algorithm it has for integer weights of such nets; the best of them in a row, chosen after the fact, is the
rival. Same nets, images and widths as the study; no labels of held-out images are seen by either. Every score is a file, so a
killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import clado
from clado.artifacts import Plan, Sensitivity
from clado.common import atomic_file

from ..harness import machine, quiet
from . import modelopt
from .measure import BITS, BUDGETS, REFINED_TO, SAMPLES, SCALES, Unit, divergence
from .nets import NETS, load_split, trained
from .numbers import clustered, compact, keep_scores
from .page import FINISHED

ROUNDINGS = (
    "mse",
    "gptq",
)  # ModelOpt's others for integer weights (AWQ, SVDQuant) are for blocks of columns of language models
OURS = ("planned", "compensated", "learned")
ROWS = tuple(budget for budget in BUDGETS if budget <= REFINED_TO)
Scores = dict[str, NDArray[np.float64]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/study"), help="nets, profiles and scores")
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--samples", default="a,b", help="sensitivity sets")
    parser.add_argument("--json", type=Path, default=FINISHED)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for samples, seed, scales, net in itertools.product(
        options.samples.split(","), seeds, SCALES, options.nets.split(",")
    ):
        unit, start = Unit(net, seed, samples, scales), time.perf_counter()
        _Scored(unit, options.work).measure()
        print(f"{unit.name}: {time.perf_counter() - start:.0f} s", flush=True)
        with atomic_file(options.json) as temporary:
            Path(temporary).write_text(compact(collect(options.work)) + "\n")


class _Scored:
    """One net and sensitivity set: every plan's held-out scores, each in a file."""

    def __init__(self, unit: Unit, work: Path) -> None:
        self.unit, self.work, self.folder = unit, work, work / "finished" / unit.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = trained(unit.net, unit.seed, work / "nets")
        data = load_split(f"sensitivity {unit.samples}")
        self.images, self.labels = data.images[:SAMPLES], data.labels[:SAMPLES]
        self.heldout, self.choice = load_split("heldout"), load_split("choice")
        self.float = logits(self.model, self.heldout.images)

    def keep(self, method: str, budget: float | None, make: Callable[[], tuple[nn.Module, float]]) -> None:
        """Score the net that ``make`` returns with its average bits; a score that is there is not made again."""
        path = self.folder / (f"{method}-{budget}.npz" if budget is not None else f"{method}.npz")
        if path.exists():
            return
        start = time.process_time()
        model, bits = make()
        spent = time.process_time() - start
        found = logits(model, self.heldout.images)
        scores = {
            "loss": nn.functional.cross_entropy(found, self.heldout.labels, reduction="none"),
            "right": found.argmax(1) == self.heldout.labels,
            "kl": divergence(self.float, found),
        }
        keep_scores(path, {"bits": bits, "seconds": spent, **{name: s.numpy() for name, s in scores.items()}})

    def measure(self) -> None:
        self.keep("float", None, lambda: (self.model, 32.0))
        settings: dict[str, Any] = {"group_size": SCALES[self.unit.scales], "estimator": "logit", "verbose": False}
        profiles = self.work / "profiles"
        sens = clado.profile(
            self.model,
            [(self.images, self.labels)],
            BITS,
            rounding="compensated",
            num_samples=SAMPLES,
            output_dir=profiles / f"{self.unit.name}-compensated",
            **settings,
        )
        for budget in ROWS:
            self.keep_ours(sens, budget)
        for scoring in modelopt.METHODS:
            self.keep_rival(sens, scoring)

    def keep_ours(self, sens: Sensitivity, budget: float) -> None:
        plan = clado.solve(sens, avg_bits=budget, solver="heuristic")
        self.keep("planned", budget, lambda: self.applied(plan))
        for method in OURS[1:]:
            self.keep(method, budget, lambda method=method: self.applied(self.finished(plan, method)))
        if budget in BITS:
            uniform = clado.given_plan(sens, {layer.name: int(budget) for layer in sens.layers})
            self.keep("uniform learned", budget, lambda: self.applied(self.finished(uniform, "learned")))

    def finished(self, plan: Plan, method: str) -> Plan:
        judges = [(self.choice.images,)]
        return clado.finish(self.model, plan, [(self.images,)], method, heldout=judges, verbose=False)

    def applied(self, plan: Plan) -> tuple[nn.Module, float]:
        return clado.apply(self.model, plan), plan.avg_bits

    def keep_rival(self, sens: Sensitivity, scoring: str) -> None:
        state = self.work / "modelopt" / f"{self.unit.name}-{scoring}.pt"
        state.parent.mkdir(parents=True, exist_ok=True)
        found = modelopt.plans(self.model, sens, self.images, self.labels, scoring, ROWS, state)
        for budget, bits in zip(ROWS, found, strict=True):
            size = clado.given_plan(sens, bits).avg_bits
            for rounding in ROUNDINGS:
                rival = f"modelopt {scoring} {rounding}"
                self.keep(rival, budget, lambda b=bits, r=rounding, s=size: (self.rival(sens, b, r), s))

    def rival(self, sens: Sensitivity, bits: dict[str, int], rounding: str) -> nn.Module:
        """The net as ModelOpt rounds it at these widths."""
        import modelopt.torch.quantization as mtq

        axis = None if sens.quantizer.group_size == 0 else 0
        layers = [
            {"quantizer_name": f"{name}.weight_quantizer", "cfg": {"num_bits": width, "axis": axis}, "enable": True}
            for name, width in bits.items()
        ]
        config = {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *layers], "algorithm": {"method": rounding}}
        with quiet():
            return mtq.quantize(copy.deepcopy(self.model), config, lambda model: logits(model, self.images)).eval()


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(128)]).double()


def collect(work: Path) -> dict[str, Any]:
    """Per row (net, scales, budget): every method's mean excess over float, and ours against the best rival, paired."""
    digit = load_split("heldout").digit.numpy()
    cells = []
    for net, scales, budget in itertools.product(NETS, SCALES, ROWS):
        units = sorted((work / "finished").glob(f"{net}-*-{scales}"))
        found = [read(unit, budget) for unit in units]
        complete = [scores for scores in found if scores]
        if complete:
            cells.append({"net": net, "scales": scales, "budget": budget, **cell(complete, digit)})
    versions = {name: importlib.metadata.version(name) for name in ("nvidia-modelopt", "timm", "scikit-learn")}
    return {"benchmark": "finished", "machine": {**machine(), **versions}, "samples": SAMPLES, "cells": cells}


def read(folder: Path, budget: float) -> dict[str, Scores]:
    """Scores by method of one unit, "float" among them; none where one is missing."""
    rivals = [f"modelopt {scoring} {rounding}" for scoring in modelopt.METHODS for rounding in ROUNDINGS]
    names = [*OURS, *rivals, *(["uniform learned"] if budget in BITS else [])]
    files = {"float": folder / "float.npz", **{name: folder / f"{name}-{budget}.npz" for name in names}}
    if not all(path.exists() for path in files.values()):
        return {}
    return {name: dict(np.load(path)) for name, path in files.items()}


def cell(units: list[dict[str, Scores]], digit: NDArray[np.int64]) -> dict[str, Any]:
    def excess(method: str) -> NDArray[np.float64]:
        return np.mean([unit[method]["loss"] - unit["float"]["loss"] for unit in units], 0)

    methods = {
        name: {
            **clustered(excess(name), digit),
            **{key: float(np.mean([unit[name][key].mean() for unit in units])) for key in ("kl", "right", "bits")},
            "seconds": float(np.mean([unit[name]["seconds"] for unit in units])),
        }
        for name in units[0]
        if name != "float"
    }
    rival = min((name for name in methods if name.startswith("modelopt")), key=lambda name: methods[name]["mean"])
    differences = {name: clustered(excess(name) - excess(rival), digit) for name in methods if name != rival}
    return {"units": len(units), "rival": rival, "methods": methods, "minus_rival": differences}


if __name__ == "__main__":
    main()
