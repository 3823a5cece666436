"""``python -m bench.study.interactions PHOTOGRAPHS``: how far a plan for a net with ImageNet weights should trust interactions.

A matrix is measured on each of several disjoint draws of the sensitivity photographs. Plans are made with a share of every
interaction, 0 (the diagonal) to 1 (all), under the other objectives, and chosen from the shortlist by their loss on
photographs set apart ("measured", what `clado solve` does); each is judged by the KL to the float net on held-out
photographs of other things, beside the diagonal's, paired, with standard errors clustered by what the photographs show. Under
compensated rounding the matrix is corrected for the fit of the weights to the samples that decided them; "same 0" and "same
measured" are the diagonal's and the measured plan of the matrix without that. Scores are kept plan by plan in ``--work``, so a
killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import clado
from clado.artifacts import Plan, Sensitivity, uncorrected
from clado.common import atomic_file, heap

from ..harness import machine
from .measure import divergence, solved
from .numbers import clustered, compact
from .photographs import LESSON, load_photographs, read_photographs
from .real_nets import LITE, load_net
from .real_page import REAL

BITS = (2, 3, 4, 8)
BUDGETS = (2.25, 2.5, 3.0, 3.5, 4.0, 5.0)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
OBJECTIVES = ("clipped", "shrunk")
SAMPLES, DRAWS, HELDOUT, CHOICE = 192, 3, 500, 256
CELL = ("net", "rounding", "samples", "draw", "budget")  # what a row is of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, help="folder that bench.study.photographs wrote")
    parser.add_argument("--work", type=Path, default=Path("build/study/interactions"), help="profiles and scores")
    parser.add_argument("--nets", default=LITE[0], help=f"of {', '.join(LITE)}")
    parser.add_argument("--roundings", default="compensated,nearest")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="photographs of a draw; rows of others stay")
    parser.add_argument("--heldout", type=int, default=HELDOUT)
    parser.add_argument("--json", type=Path, default=REAL)
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    for net in options.nets.split(","):
        bench = Bench.of(net, options.photographs, options.heldout, options.work)
        for rounding in options.roundings.split(","):
            for draw in range(options.draws):
                own = bench.rows(rounding, draw, options.samples)
                cells = {tuple(row[name] for name in CELL) for row in own}
                known = [row for row in known if tuple(row[name] for name in CELL) not in cells] + own
                found = {
                    "benchmark": "interactions",
                    "machine": machine(),
                    "settings": {"bits": BITS, "samples": SAMPLES, "heldout": options.heldout, "choice": CHOICE},
                    "rows": known,
                }
                with atomic_file(options.json) as temporary:
                    Path(temporary).write_text(compact(found) + "\n")


def with_share(sens: Sensitivity, share: float) -> Sensitivity:
    """The matrix with that share of every interaction."""
    return replace(sens, interaction=sens.interaction * share)


@dataclass
class Bench:
    """A net, photographs to measure on and to judge by."""

    name: str
    model: nn.Module
    sensitivity: Tensor
    judges: dict[
        str, tuple[Tensor, Tensor]
    ]  # photographs that judge ("heldout") or choose ("choice"), and the float net's logits
    shown: NDArray[np.int64]  # [held-out photographs]: what each shows
    apart: Tensor  # those that choose, and more of their kind: they judge a finish
    lesson: Tensor  # of yet others, which a finish learns from, too
    work: Path

    @classmethod
    def of(cls, name: str, folder: Path, heldout: int, work: Path) -> Bench:
        model, mean, std = load_net(name)
        held, apart = (load_photographs(folder, split, mean, std) for split in ("heldout", "choice"))
        held, chosen_on = held[:heldout], apart[:CHOICE]
        shown = read_photographs(folder, "heldout").picture[:heldout].numpy()
        images, lesson = (load_photographs(folder, split, mean, std) for split in ("sensitivity", LESSON))
        judges = {"heldout": (held, logits(model, held)), "choice": (chosen_on, logits(model, chosen_on))}
        return cls(name, model, images, judges, shown, apart, lesson, work / name)

    def rows(self, rounding: str, draw: int, samples: int) -> list[dict[str, Any]]:
        """One row per budget."""
        images = self.sensitivity[draw * samples : (draw + 1) * samples]
        if len(images) < samples:
            raise ValueError(f"draw {draw} of {samples} needs more than {len(self.sensitivity)} photographs")
        folder = self.work / f"{rounding}-{samples}-{draw}"
        sens = clado.profile(
            self.model, [images], BITS, rounding=rounding, num_samples=samples, output_dir=folder / "run", verbose=False
        )
        same = uncorrected(sens) if rounding == "compensated" else None
        cell = {"net": self.name, "rounding": rounding, "samples": samples, "draw": draw}
        return [cell | self.row(sens, same, folder, budget) for budget in BUDGETS]

    def row(self, sens: Sensitivity, same: Sensitivity | None, folder: Path, budget: float) -> dict[str, Any]:
        def shared(sens: Sensitivity, share: float) -> Plan:
            return clado.solve(with_share(sens, share), avg_bits=budget, solver="heuristic")

        plans = {f"{share:g}": shared(sens, share) for share in SHARES}
        plans |= {name: clado.solve(sens, objective=name, avg_bits=budget, solver="heuristic") for name in OBJECTIVES}
        plans["measured"] = self.measured(sens, folder, budget)
        if same is not None:
            plans |= {"same 0": shared(same, 0), "same measured": self.measured(same, folder, budget)}
        found = {name: self.losses(sens, plan, folder) for name, plan in plans.items()}
        means = {name: float(losses.mean()) for name, losses in found.items()}
        print(self.name, folder.name, budget, {name: round(mean, 4) for name, mean in means.items()}, flush=True)
        return {
            "budget": budget,
            "kl": means,
            "predicted": {name: plan.objective for name, plan in plans.items()},
            "minus_diagonal": {name: clustered(losses - found["0"], self.shown) for name, losses in found.items()},
            "minus_same": {
                f"{name} - {other}": clustered(found[name] - found[f"same {other}"], self.shown)
                for name, other in (("0", "0"), ("measured", "measured"), ("measured", "0"))
                if f"same {other}" in found
            },
            "same_plan": [name for name, plan in plans.items() if plan.schemes == plans["0"].schemes],
        }

    def measured(self, sens: Sensitivity, folder: Path, budget: float) -> Plan:
        """What ``clado solve`` gives, by photographs that choose."""
        short = clado.shortlist(sens, avg_bits=budget, solver="heuristic")
        return solved(sens, short, np.stack([self.losses(sens, plan, folder, "choice") for plan in short]))

    def losses(self, sens: Sensitivity, plan: Plan, folder: Path, by: str = "heldout") -> NDArray[np.float64]:
        """KL of every photograph of ``judges`` under the plan."""
        name = "".join(str(width) for width in plan.bits.values())
        path = folder / ("scores" if by == "heldout" else by) / f"{name}.npy"
        images, clean = self.judges[by]
        known: NDArray[np.float64] = np.load(path) if path.exists() else np.empty(0)
        if len(known) < len(images):  # some were looked at when fewer were asked for
            left = slice(len(known), None)
            net = clado.apply(self.model, clado.given_plan(sens, plan.schemes))
            known = np.concatenate([known, divergence(clean[left], logits(net, images[left])).numpy()])
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary, open(temporary, "wb") as file:
                np.save(file, known)
        return known[: len(images)]


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    parts = [part.contiguous(memory_format=torch.channels_last) for part in images.split(50)]
    with heap():
        return torch.cat([model(part) for part in parts]).double()


if __name__ == "__main__":
    main()
