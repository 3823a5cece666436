"""``python -m bench.study.shipped PHOTOGRAPHS``: plans of a net with ImageNet weights, finished by learning, beside others.

At each budget the plan that ``clado solve`` gives (measured, from a profile under compensated rounding), the plan of a profile
under nearest rounding, the plan of a profile with zero points, the plan with zero points and 5 and 6 bits too, and uniform
widths, with zero points too, where there are such; all finished on the same photographs, those of the sensitivity set and the
lesson's, and crops of them. Then what two other tools make of the same widths and bytes: ModelOpt's plans with weights by least
squared error, MCT's plans with its own weights. At uniform widths, where nothing is searched, MCT's and Brevitas' rounding
beside ours: each with its correction of biases, and with its learning in about the time that ours takes. Photographs of other
things choose, a third set judges: KL to the float net, agreement of the first class, paired, with errors clustered by what a
photograph shows. Every score is a file, so a killed run goes on where it stopped; what stands in ``--json`` and has no file in
``--work`` stays.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import clado
from clado.artifacts import Plan, Sensitivity
from clado.common import atomic_file

from ..harness import machine
from . import brevitas, mct, modelopt
from .interactions import BITS, CHOICE, Bench, logits
from .measure import divergence
from .numbers import clustered, compact, keep_scores
from .real_nets import LITE
from .real_page import SHIPPED

BUDGETS = (2.5, 3.0, 3.5, 4.0)
# Photographs of a profile; photographs and crops of a finish; photographs that judge.
SAMPLES, LESSON, HELDOUT = 192, 1024, 500
STAGES = ("planned", "compensated", "learned")
PROFILES: dict[str, dict[str, Any]] = {
    "compensated": {"bits": BITS},
    "nearest": {"bits": BITS, "rounding": "nearest"},
    "zero points": {"bits": BITS, "symmetric": False},
    "more widths": {"bits": (2, 3, 4, 5, 6, 8), "symmetric": False},
}
OURS = ("measured", "zero points", "more widths", "nearest", "uniform", "uniform zero points")
MODELOPT = {f"modelopt {method}": method for method in modelopt.METHODS}
ROUNDED = {"uniform mct": ("planned", "learned"), "uniform brevitas": STAGES}  # by other tools, beside our "uniform"
MCT_EPOCHS, BREVITAS_STEPS = 8, 500  # of their learning: over the sensitivity photographs; in each layer, of 16
KINDS = (*OURS, *MODELOPT, "mct", *ROUNDED)
BESIDE = {"uniform zero points": "zero points"} | dict.fromkeys(ROUNDED, "uniform")  # which of ours; others: "measured"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, help="folder that bench.study.photographs wrote")
    parser.add_argument("--work", type=Path, default=Path("build/study/shipped"), help="profiles, plans and scores")
    parser.add_argument("--net", default=LITE[0], choices=LITE)
    parser.add_argument("--budgets", default=",".join(f"{budget:g}" for budget in BUDGETS))
    parser.add_argument("--plans", default=",".join(OURS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--stages", default=",".join(STAGES), help="of ours")
    parser.add_argument("--json", type=Path, default=SHIPPED, help="what is in it and not measured anew stays")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shipped = Shipped(Bench.of(options.net, options.photographs, HELDOUT, options.work))
    for budget in map(float, options.budgets.split(",")):
        for kind in options.plans.split(","):
            shipped.score(kind, budget, options.stages.split(","))
    known = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    found = shipped.collected()
    found["rows"] = with_known(found["rows"], known)
    with atomic_file(options.json) as temporary:
        Path(temporary).write_text(compact(found) + "\n")


def with_known(rows: list[dict[str, Any]], known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as :meth:`Shipped.row` makes them, and of others those scores and differences that none of them replaces.

    A difference is of the last stages, so it is replaced where every known stage of both plans was scored anew.
    """
    new, old = ({row["budget"]: row for row in every} for every in (rows, known))
    none: dict[str, Any] = {"scores": {}, "minus": {}}
    joined = []
    for budget in sorted(new.keys() | old.keys()):
        own, other = new.get(budget, none), old.get(budget, none)
        missing = {name.rsplit(" ", 1)[0] for name in other["scores"].keys() - own["scores"].keys()}
        minus = {
            kind: gap
            for kind, gap in own["minus"].items()
            if kind not in other["minus"] or missing.isdisjoint((kind, BESIDE.get(kind, "measured")))
        }
        scores = other["scores"] | own["scores"]
        ordered = [name for kind in KINDS for stage in STAGES if (name := f"{kind} {stage}") in scores]
        joined.append(
            {"budget": budget, "scores": {name: scores[name] for name in ordered}, "minus": other["minus"] | minus}
        )
    return joined


def augmented(images: Tensor, count: int, seed: int) -> Tensor:
    """``[count, C, H, W]``: crops of 35 to 100 % of an image's side, mirrored or not, in other colours, a rectangle of another
    crop pasted on every other one."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=draw)

    order = torch.cat([torch.randperm(len(images), generator=draw) for _ in range(-(-count // len(images)))])[:count]
    side, shift = uniform(0.35, 1, count), uniform(-1, 1, count, 2)
    mirror = torch.where(uniform(0, 1, count) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = side * mirror, side
    theta[:, :, 2] = shift * (1 - side)[:, None]
    grid = nn.functional.affine_grid(theta, [count, *images.shape[1:]], align_corners=False)
    found = nn.functional.grid_sample(images[order], grid, padding_mode="reflection", align_corners=False)
    found = found * uniform(0.8, 1.25, count, 3, 1, 1) + uniform(-0.2, 0.2, count, 3, 1, 1)
    height, width = images.shape[2:]
    for k in range(1, count, 2):
        tall, wide = (int(s * uniform(0.2, 0.6, 1)) for s in (height, width))
        top, left = (int(torch.randint(s, (1,), generator=draw)) for s in (height - tall, width - wide))
        found[k, :, top : top + tall, left : left + wide] = found[k - 1, :, top : top + tall, left : left + wide]
    return found


Shipment = tuple[nn.Module, float]  # a net and the average bits of its searched weights


class Shipped:
    """Plans of one net, finished, and what photographs that no stage saw lose by them."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.sensitivity = bench.sensitivity[:SAMPLES]
        self.photographs = torch.cat([bench.sensitivity, bench.lesson])
        crops = augmented(self.photographs, LESSON - len(self.photographs), seed=0)
        self.lesson = torch.cat([self.photographs, crops])
        self.profiles: dict[str, Sensitivity] = {}

    def folder(self, name: str) -> Path:
        return self.bench.work / name

    def profile(self, name: str) -> Sensitivity:
        """One of ``PROFILES``."""
        if name not in self.profiles:
            self.profiles[name] = clado.profile(
                self.bench.model,
                [self.sensitivity],
                num_samples=SAMPLES,
                output_dir=self.folder(name) / "run",
                verbose=False,
                **PROFILES[name],
            )
        return self.profiles[name]

    def plan(self, kind: str, budget: float) -> Plan | None:
        """None where a uniform width of that many bits is not to be had."""
        name = next((name for name in PROFILES if name in kind), "compensated")
        sens = self.profile(name)
        if kind.startswith("uniform"):
            return (
                clado.given_plan(sens, {layer.name: int(budget) for layer in sens.layers}) if budget in BITS else None
            )
        return self.bench.measured(sens, self.folder(name), budget)

    def score(self, kind: str, budget: float, stages: Sequence[str] = STAGES) -> None:
        if kind == "mct":
            self.keep(kind, budget, "planned", lambda: self.by_mct(budget))
            return
        if kind in ROUNDED:
            for stage in [stage for stage in ROUNDED[kind] if stage in stages and budget in BITS]:
                self.keep(kind, budget, stage, lambda stage=stage: self.rounded(kind, int(budget), stage))
            return
        plan = self.by_modelopt(MODELOPT[kind], budget) if kind in MODELOPT else self.plan(kind, budget)
        if plan is None:
            return
        self.keep(kind, budget, "planned", lambda: self.applied(plan))
        for method in [stage for stage in STAGES[1:] if stage in stages and kind in OURS]:
            self.keep(
                kind, budget, method, lambda method=method: self.applied(self.finished(plan, kind, budget, method))
            )

    def applied(self, plan: Plan) -> Shipment:
        return clado.apply(self.bench.model, plan), plan.avg_bits

    def by_modelopt(self, method: str, budget: float) -> Plan:
        """Labels are the float net's classes. It does not know timm's convolutions with "same" padding, and gets plain ones."""
        sens, images = self.profile("nearest"), self.sensitivity
        classes = logits(self.bench.model, images).argmax(1)
        scores = self.bench.work / f"modelopt-{method}.pt"
        plain, names = mct.padded(self.bench.model, sens, images[:1])
        (bits,) = modelopt.plans(plain, sens, images, classes, method, [budget], scores, names)
        return clado.given_plan(sens, bits)

    def by_mct(self, budget: float) -> Shipment:
        """Its search and its rounding by squared error."""
        sens = self.profile("nearest")
        weights, ends = sens.candidates.numel, self.ends(sens)
        target = budget * weights / 8 + sum(ends.values())
        net, taken = mct.quantized(self.bench.model, self.sensitivity, BITS, dict.fromkeys(ends, 8), target)
        return net, 8 * (taken - sum(ends.values())) / weights

    def rounded(self, kind: str, bits: int, stage: str) -> Shipment:
        """All searched layers at one width, by another tool's rounding."""
        sens, model = self.profile("nearest"), self.bench.model
        if kind == "uniform mct":
            held = dict.fromkeys(self.ends(sens), 8) | {layer.name: bits for layer in sens.layers}
            images, epochs = (self.bench.sensitivity, MCT_EPOCHS) if stage == "learned" else (self.sensitivity, 0)
            net, _ = mct.quantized(model, images, (bits,), held, epochs=epochs)
            weights = mct.weights(net)
        else:
            plain, names = mct.padded(model, sens, self.sensitivity[:1])
            method = brevitas.METHODS[STAGES.index(stage)]
            net = brevitas.quantized(plain, self.sensitivity, list(names.values()), bits, method, BREVITAS_STEPS)
            weights = brevitas.weights(net)
        most = [max(len(row.unique()) for row in weight.flatten(1)) for weight in weights]
        if sum(count <= 2**bits for count in most) != len(sens.layers):
            raise RuntimeError(f"{kind}: layers must have at most {2**bits} weights in a channel, got {most}")
        return net, float(bits)

    def ends(self, sens: Sensitivity) -> dict[str, int]:
        """{module that is not searched: weights}."""
        return modelopt.unsearched(self.bench.model, {layer.name for layer in sens.layers})

    def finished(self, plan: Plan, kind: str, budget: float, method: str) -> Plan:
        """Kept too, for those who want to go on with it."""
        name = f"{kind}-{budget}-{method}"
        folder, judges = self.bench.work / "finish" / name, [self.bench.apart]
        settings: dict[str, Any] = {"num_samples": LESSON, "output_dir": folder, "verbose": False}
        done = clado.finish(self.bench.model, plan, [self.lesson], method, heldout=judges, **settings)
        print(kind, budget, done.info["finish"], flush=True)
        done.save(self.bench.work / "finished" / name / "plan.json")
        return done

    def path(self, kind: str, budget: float, stage: str) -> Path:
        return self.bench.work / "scores" / f"{kind}-{budget}-{stage}.npz"

    def keep(self, kind: str, budget: float, stage: str, make: Callable[[], Shipment]) -> None:
        """Score what was made; a score that is there is not made again."""
        path, start = self.path(kind, budget, stage), time.process_time()
        if path.exists():
            return
        net, bits = make()
        seconds = time.process_time() - start
        images, clean = self.bench.judges["heldout"]
        found = logits(net, images)
        scores = {
            "kl": divergence(clean, found).numpy(),
            "agrees": (found.argmax(1) == clean.argmax(1)).double().numpy(),
            "bits": np.float64(bits),
            "seconds": np.float64(seconds),
        }
        if kind in OURS and stage != "planned":
            scores |= {"judges": np.float64(len(self.bench.apart)), "photographs": np.float64(len(self.photographs))}
        keep_scores(path, scores)
        print(kind, budget, stage, f"KL {scores['kl'].mean():.4f}, agrees {scores['agrees'].mean():.1%}", flush=True)

    def collected(self) -> dict[str, Any]:
        rows = [row for budget in BUDGETS if (row := self.row(budget))]
        settings = {
            "bits": BITS,
            "samples": SAMPLES,
            "lesson": LESSON,
            "heldout": HELDOUT,
            "choice": CHOICE,
            "judges": len(self.bench.apart),
            "net": self.bench.name,
            "photographs": len(self.photographs),
            "sensitivity": len(self.bench.sensitivity),
            "mct_epochs": MCT_EPOCHS,
            "brevitas_steps": BREVITAS_STEPS,
        }
        return {"benchmark": "shipped", "machine": machine(), "settings": settings, "rows": rows}

    def row(self, budget: float) -> dict[str, Any]:
        """Every plan at every stage that was scored, and ours at its last stage against the others at theirs."""
        read = {
            (kind, stage): dict(np.load(path))
            for kind in KINDS
            for stage in STAGES
            if (path := self.path(kind, budget, stage)).exists()
        }
        if ("measured", "planned") not in read:
            return {}
        known = {kind: [s for s in STAGES if (kind, s) in read] for kind in KINDS if (kind, "planned") in read}
        shown = self.bench.shown
        scores = {
            f"{kind} {stage}": {
                **clustered(held["kl"], shown),
                "agrees": float(held["agrees"].mean()),
                "bits": float(held["bits"]),
                "seconds": float(held["seconds"]),
                **{name: int(held[name]) for name in ("judges", "photographs") if name in held},
            }
            for (kind, stage), held in read.items()
        }
        minus = {}
        for kind, stages in known.items():
            own = BESIDE.get(kind, "measured")
            if kind == own or own not in known:
                continue
            # The last stage that both have; other tools' work is not finished by us: its best stage beside our last one.
            if kind in OURS:
                last = mine = [stage for stage in stages if stage in known[own]][-1]
            else:
                last, mine = min(stages, key=lambda stage: read[kind, stage]["kl"].mean()), known[own][-1]
            minus[kind] = clustered(read[own, mine]["kl"] - read[kind, last]["kl"], shown)
        return {"budget": budget, "scores": scores, "minus": minus}


if __name__ == "__main__":
    main()
