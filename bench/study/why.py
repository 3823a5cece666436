"""``python -m bench.study.why PHOTOGRAPHS``: where the additive form goes wrong on a net with ImageNet weights.

Everything on the photographs that the matrix was measured on, so that no error is one of sampling. Plans of several budgets: the
predicted loss; the loss if the changes of the logits added up exactly, which leaves out nothing but how layers act on each
other; the measured loss. What lies between the first two is what a sum over pairs misses of the loss (terms of three layers and
more), between the last two what adding changes misses of the net. Then single interactions of a few layers beside `exact`.
"""

from __future__ import annotations

import argparse
import copy
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import clado
from clado.artifacts import Plan, Sensitivity
from clado.common import atomic_file

from ..harness import machine
from .interactions import BITS, BUDGETS, logits
from .measure import divergence
from .numbers import compact
from .photographs import load_photographs
from .real_nets import LITE, load_net
from .real_page import WHY

SAMPLES, EVERY = 96, 7  # photographs; one layer in so many, of all kinds, has its interactions measured exactly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, help="folder that bench.study.photographs wrote")
    parser.add_argument("--work", type=Path, default=Path("build/study/why"), help="profiles")
    parser.add_argument("--net", default=LITE[0], choices=LITE)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--json", type=Path, default=WHY)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, mean, std = load_net(options.net)
    images = load_photographs(options.photographs, "sensitivity", mean, std)[: options.samples]
    found = {
        "benchmark": "why",
        "machine": machine(),
        "settings": {"net": options.net, "bits": BITS, "samples": options.samples, "every": EVERY},
        **measured(model, images, options.work / options.net),
    }
    with atomic_file(options.json) as temporary:
        Path(temporary).write_text(compact(found) + "\n")


def measured(model: nn.Module, images: Tensor, work: Path) -> dict[str, Any]:
    how: dict[str, Any] = {"num_samples": len(images), "verbose": False}
    sens = clado.profile(model, [images], BITS, output_dir=work / "additive", **how)
    plans = []
    for budget in BUDGETS:
        plans.append({"budget": budget, **of_plan(model, images, sens, budget)})
        print(plans[-1], flush=True)
    chosen = {layer.name for layer in sens.layers[::EVERY]}
    others = [layer.name for layer in sens.layers if layer.name not in chosen]
    exact = clado.profile(model, [images], BITS, estimator="exact", ignore=others, output_dir=work / "exact", **how)
    return {"plans": plans, "pairs": of_pairs(sens, exact)}


def of_plan(model: nn.Module, images: Tensor, sens: Sensitivity, budget: float) -> dict[str, float]:
    plan = clado.solve(sens, objective="original", avg_bits=budget, solver="heuristic")
    clean = logits(model, images)
    taken = [sens.index(name, scheme) for name, scheme in plan.schemes.items()]
    alone, pairs = sens.delta_loss[taken].sum(), sens.interaction[np.ix_(taken, taken)].sum() / 2
    return {
        "alone": float(alone),
        "pairs": float(pairs),
        "added": float(divergence(clean, clean + changes(model, plan, images, clean)).mean()),
        "measured": float(divergence(clean, logits(clado.apply(model, plan), images)).mean()),
    }


def changes(model: nn.Module, plan: Plan, images: Tensor, clean: Tensor) -> Tensor:
    """Of the logits, summed over the layers, each rounded alone."""
    rounded, total = clado.apply(model, plan).state_dict(), torch.zeros_like(clean)
    one = copy.deepcopy(model)
    own = one.state_dict()
    for layer in plan.layers:
        kept = {name: own[name].clone() for name in layer.names}
        for name in layer.names:
            own[name].copy_(rounded[name])
        total += logits(one, images) - clean
        for name, value in kept.items():
            own[name].copy_(value)
    return total


def of_pairs(additive: Sensitivity, exact: Sensitivity) -> list[dict[str, Any]]:
    """By pair of widths: the means of both, how far the additive interactions are from the exact ones, relative to their root
    mean square, and the slope of a line through the origin."""
    rows = []
    for a, b in combinations_with_replacement(BITS, 2):
        ours, theirs = [], []
        for i, one in enumerate(exact.layers):
            for j, other in enumerate(exact.layers):
                if i != j and (a != b or i < j):
                    for sens, values in ((additive, ours), (exact, theirs)):
                        values.append(sens.interaction[sens.index(one.name, a), sens.index(other.name, b)])
        x, y = np.array(theirs), np.array(ours)
        rows.append(
            {
                "bits": [a, b],
                "exact": float(x.mean()),
                "additive": float(y.mean()),
                "rms": float(np.sqrt((x**2).mean())),
                "error": float(np.sqrt(((y - x) ** 2).mean() / (x**2).mean())),
                "slope": float(x @ y / (x @ x)),
                "correlation": float(np.corrcoef(x, y)[0, 1]),
            }
        )
    return rows


if __name__ == "__main__":
    main()
