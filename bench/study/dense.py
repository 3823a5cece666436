"""``python -m bench.study.dense PHOTOGRAPHS``: plans for a map and for features of a trained vision transformer.

DINOv2 ViT-S/14 with a saliency decoder, once under binary cross-entropy on its map and once under squared error on its tokens,
both against the float net, each on disjoint draws of the sensitivity photographs. Per budget the plan of the diagonal, of all
interactions, the one that ``clado solve`` takes by photographs set apart, the diagonal's of the matrix as it was measured
("same": not corrected for the fit of the weights), and uniform widths; judged on held-out photographs of
other things, paired with the diagonal's, errors clustered by what they show. Then what all interactions cost beside the diagonal
alone and beside a forward for every pair, in turns on the same samples; and single interactions beside `exact` ones on the same
photographs. Profiles and scores are files: a killed run goes on where it stopped, and parts may be run one by one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import clado
from clado.artifacts import Plan, Sensitivity, uncorrected
from clado.common import atomic_file

from ..harness import machine
from .measure import solved
from .numbers import clustered, compact, keep_scores
from .photographs import load_photographs, read_photographs
from .real_page import DENSE
from .saliency import MEAN, STD, load_saliency
from .why import of_pairs

BITS = (2, 3, 4, 8)
BUDGETS = (2.5, 3.0, 3.5, 4.0)
LOSSES = {"map": "bce", "tokens": "mse"}
SAMPLES, DRAWS, HELDOUT, CHOICE = 64, 3, 300, 256
TIMED = 2  # samples per turn
TURNS = 3
EVERY, EXACT = 10, 16  # one layer in so many has its interactions measured exactly, on so many photographs
SETTINGS = {
    "bits": BITS,
    "samples": SAMPLES,
    "heldout": HELDOUT,
    "choice": CHOICE,
    "losses": LOSSES,
    "every": EVERY,
    "exact": EXACT,
}
PICTURE, PICTURED, PICTURED_BITS = Path("docs/images/dense.png"), 4, 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, help="folder that bench.study.photographs wrote")
    parser.add_argument("--work", type=Path, default=Path("build/study/dense"), help="profiles, scores and times")
    parser.add_argument("--outputs", default=",".join(LOSSES), help="whose scores")
    parser.add_argument("--draws", default=",".join(map(str, range(DRAWS))), help="whose scores")
    parser.add_argument("--json", type=Path, default=DENSE, help="what is in it and not measured anew stays")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--only", choices=("rows", "seconds", "pairs", "picture"), help="one part; by default all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.photographs, options.work)
    found = json.loads(options.json.read_text()) if options.json.exists() else {"rows": []}
    found |= {"benchmark": "dense", "machine": machine(), "settings": SETTINGS}

    def score() -> list[dict[str, Any]]:
        for output in options.outputs.split(","):
            for draw in map(int, options.draws.split(",")):
                known = [row for row in found["rows"] if (row["output"], row["draw"]) != (output, draw)]
                found["rows"] = known + bench.rows(output, draw)
        return sorted(found["rows"], key=lambda row: (row["output"], row["draw"], row["budget"]))

    parts: dict[str, Callable[[], object]] = {"rows": score, "seconds": bench.seconds, "pairs": bench.pairs}
    for name, part in parts.items():
        if options.only in (None, name):
            found[name] = part()
    if options.only in (None, "picture"):
        bench.draw(options.picture)
    with atomic_file(options.json) as temporary:
        Path(temporary).write_text(compact(found) + "\n")


class Bench:
    """The net, its photographs, and a folder for what was measured."""

    def __init__(self, photographs: Path, work: Path) -> None:
        self.model, self.work = load_saliency(), work
        self.images = {
            split: load_photographs(photographs, split, MEAN, STD)[:count]
            for split, count in (("sensitivity", DRAWS * SAMPLES), ("choice", CHOICE), ("heldout", HELDOUT))
        }
        self.shown = read_photographs(photographs, "heldout").picture[:HELDOUT].numpy()
        self.clean = {split: outputs(self.model, self.images[split]) for split in ("choice", "heldout")}

    def settings(self, output: str) -> dict[str, Any]:
        return {"loss": {output: LOSSES[output]}, "loss_against": "outputs", "verbose": False}

    def folder(self, output: str, draw: int) -> Path:
        return self.work / output / str(draw)

    def profile(self, output: str, draw: int = 0) -> Sensitivity:
        return clado.profile(
            self.model,
            [self.images["sensitivity"][draw * SAMPLES : (draw + 1) * SAMPLES]],
            BITS,
            num_samples=SAMPLES,
            output_dir=self.folder(output, draw) / "run",
            **self.settings(output),
        )

    def rows(self, output: str, draw: int) -> list[dict[str, Any]]:
        """One per budget."""
        sens = self.profile(output, draw)
        return [self.row(sens, output, draw, budget) for budget in BUDGETS]

    def row(self, sens: Sensitivity, output: str, draw: int, budget: float) -> dict[str, Any]:
        plans = self.plans(sens, output, draw, budget)
        held = {name: self.losses(output, draw, plan, "heldout") for name, plan in plans.items()}
        means = {name: round(1e3 * float(losses.mean()), 3) for name, losses in held.items()}
        print(output, draw, budget, means, flush=True)
        return {
            "output": output,
            "draw": draw,
            "budget": budget,
            "loss": {name: clustered(losses, self.shown) for name, losses in held.items()},
            "minus_diagonal": {name: clustered(losses - held["diagonal"], self.shown) for name, losses in held.items()},
            "predicted": {name: clado.given_plan(sens, plan.schemes).objective for name, plan in plans.items()},
            "alone": plans["diagonal"].objective,
            "measured_minus_same": clustered(held["measured"] - held["same"], self.shown),
        }

    def plans(self, sens: Sensitivity, output: str, draw: int, budget: float) -> dict[str, Plan]:
        short = clado.shortlist(sens, avg_bits=budget, solver="heuristic")
        plans = {
            "diagonal": clado.solve(sens, objective="diagonal", avg_bits=budget, solver="heuristic"),
            "all": clado.solve(sens, objective="original", avg_bits=budget, solver="heuristic"),
            "measured": solved(sens, short, np.stack([self.losses(output, draw, plan, "choice") for plan in short])),
            "same": clado.solve(uncorrected(sens), objective="diagonal", avg_bits=budget, solver="heuristic"),
        }
        if budget in BITS:
            plans["uniform"] = clado.given_plan(sens, {layer.name: int(budget) for layer in sens.layers})
        return plans

    def losses(self, output: str, draw: int, plan: Plan, split: str) -> NDArray[np.float64]:
        """Of every photograph, kept plan by plan."""
        path = self.folder(output, draw) / split / ("".join(map(str, plan.bits.values())) + ".npz")
        if not path.exists():
            found = outputs(clado.apply(self.model, plan), self.images[split])
            keep_scores(path, {"loss": DIVERGENCES[output](self.clean[split][output], found[output])})
        losses: NDArray[np.float64] = np.load(path)["loss"]
        return losses

    def seconds(self) -> dict[str, Any]:
        """CPU seconds of a profile from nearest rounding, whose candidates cost next to nothing, and of a forward, in turns."""
        for output in LOSSES:
            path = self.work / output / "seconds.npz"
            if path.exists():
                continue
            calls = self.calls(output)
            seconds: dict[str, list[float]] = {what: [] for what in calls}
            results = {}
            for what in [*calls, *list(calls) * TURNS]:  # the first of each warms up
                start = time.process_time()
                results[what] = calls[what]()
                seconds[what].append(time.process_time() - start)
                print(output, what, f"{seconds[what][-1]:.2f} s", flush=True)
            pairs = (~results["additive"].candidates.same_layer).sum() / 2
            keep_scores(path, {what: values[1:] for what, values in seconds.items()} | {"pairs": [pairs]})
        kept = {output: np.load(self.work / output / "seconds.npz") for output in LOSSES}
        return {output: {name: values.tolist() for name, values in held.items()} for output, held in kept.items()}

    def calls(self, output: str) -> dict[str, Callable[[], Any]]:
        """What is timed: profiles of some samples by two estimators, and their forward."""
        images = self.images["sensitivity"][:TIMED]
        how: dict[str, Any] = {"rounding": "nearest", "scale_steps": 1, "num_samples": TIMED, **self.settings(output)}
        return {
            "diagonal": lambda: clado.profile(self.model, [images], BITS, estimator="diagonal", **how),
            "additive": lambda: clado.profile(self.model, [images], BITS, estimator="additive", **how),
            "forward": lambda: outputs(self.model, images),
        }

    def pairs(self) -> dict[str, Any]:
        """{output: how single interactions compare with exact ones}; profiles that are there are read."""
        found = {}
        for output in LOSSES:
            layers = [layer.name for layer in self.profile(output).layers]
            ignored = [name for name in layers if name not in layers[::EVERY]]
            both = [
                clado.profile(
                    self.model,
                    [self.images["sensitivity"][:EXACT]],
                    BITS,
                    estimator=estimator,
                    ignore=ignored,
                    num_samples=EXACT,
                    output_dir=self.work / output / estimator,
                    **self.settings(output),
                )
                for estimator in ("additive", "exact")
            ]
            found[output] = of_pairs(*both)
        return found

    def draw(self, path: Path) -> None:
        """Maps of some photographs: of the float net, of uniform widths, of the plan."""
        import matplotlib.pyplot as plt

        sens = self.profile("map")
        plans = self.plans(sens, "map", 0, PICTURED_BITS)
        # spread over the pictures, each another
        chosen = [int(np.flatnonzero(self.shown == s)[0]) for s in np.unique(self.shown)][
            :: len(np.unique(self.shown)) // PICTURED
        ]
        images = self.images["heldout"][chosen[:PICTURED]]
        nets: dict[str, nn.Module] = {"float": self.model}
        nets |= {name: clado.apply(self.model, plans[key]) for name, key in PICTURE_OF.items()}
        figure, axes = plt.subplots(len(nets), len(images), figsize=(1.6 * len(images), 1.6 * len(nets)))
        for row, (name, net) in zip(axes, nets.items(), strict=True):
            for axis, shown in zip(row, outputs(net, images)["map"].sigmoid(), strict=True):
                axis.imshow(shown[0], vmin=0, vmax=1, cmap="magma")
                axis.set(xticks=[], yticks=[])
            row[0].set_ylabel(name)
        figure.tight_layout(pad=0.4)
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            figure.savefig(file, format="png", dpi=110)
        plt.close(figure)


PICTURE_OF = {f"uniform {PICTURED_BITS:g} bits": "uniform", f"plan, {PICTURED_BITS:g} bits": "measured"}


@torch.inference_mode()
def outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    parts = [model(part) for part in images.split(10)]
    return {name: torch.cat([part[name] for part in parts]) for name in LOSSES}


def bce(clean: Tensor, found: Tensor) -> NDArray[np.float64]:
    """KL of yes and no, float net to the other, mean over the map: ``[n]``."""
    z, other = clean.double(), found.double()
    p = z.sigmoid()
    loss = p * (z - other) + nn.functional.softplus(other) - nn.functional.softplus(z)
    return np.asarray(loss.flatten(1).mean(1))


def mse(clean: Tensor, found: Tensor) -> NDArray[np.float64]:
    """``[n]``"""
    return np.asarray((clean.double() - found.double()).square().flatten(1).mean(1))


DIVERGENCES = {"map": bce, "tokens": mse}


if __name__ == "__main__":
    main()
