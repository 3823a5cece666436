"""Plans of every method on one trained net, one sensitivity set and one kind of scales: their held-out loss and their cost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import clado
from clado.artifacts import Plan, Sensitivity
from clado.common import atomic_file
from clado.improve import standing
from clado.solver import least_alone

from . import modelopt
from .nets import Digits, load_split, trained

BITS = (2, 3, 4, 8)
BUDGETS = (2.25, 2.5, 3.0, 3.5, 4.0)
SCALES = {"tensor": 0, "channel": -1}
REFINED_TO = 3.5  # bits: the aim of the study
SAMPLES, FEW = 512, 64  # of the sensitivity set; where every pair is evaluated
PROFILES: dict[str, dict[str, Any]] = {
    "logit": {"estimator": "logit", "num_samples": SAMPLES},
    "logit, cross-entropy": {"estimator": "logit", "loss": "cross_entropy", "num_samples": SAMPLES},
    "gradient": {"estimator": "gradient", "num_samples": SAMPLES},
    "corrected": {"estimator": "corrected", "num_samples": SAMPLES, "exact_samples": FEW},
    f"exact, {FEW} samples": {"estimator": "exact", "num_samples": FEW},
    f"logit, {FEW} samples": {"estimator": "logit", "num_samples": FEW},
    f"gradient, {FEW} samples": {"estimator": "gradient", "num_samples": FEW},
}
COSTLY = ("gradient", "corrected", f"exact, {FEW} samples", f"logit, {FEW} samples", f"gradient, {FEW} samples")
OBJECTIVES = ("original", "clipped", "shrunk")


def solved(sens: Sensitivity, plans: Sequence[Plan], losses: NDArray[np.float64]) -> Plan:
    """What ``clado solve`` takes of the plans that it measures: the one of least loss, or that of the layers alone where it is
    not surely behind; losses are ``[plans, N]``."""
    order = losses.mean(1).argsort(kind="stable").tolist()
    return plans[standing(order, least_alone(sens, plans), torch.from_numpy(losses))[0]]


@dataclass(frozen=True)
class Unit:
    """One cell of the study."""

    net: str
    seed: int
    samples: str  # "a" or "b": which sensitivity set
    scales: str

    @property
    def name(self) -> str:
        return f"{self.net}-{self.seed}-{self.samples}-{self.scales}"

    @property
    def thorough(self) -> bool:
        """Whether the costly estimators are measured too: not everywhere, so that the study takes under an hour."""
        return self.samples == "a" and (self.seed == 0 or self.net == "resnet")


class Bench:
    """The net with its weights at every width; plans are scored by swapping weights in."""

    def __init__(self, model: nn.Module, sens: Sensitivity) -> None:
        self.model, self.heldout, self.choice = model, load_split("heldout"), load_split("choice")
        self.weights = {layer.name: model.get_parameter(layer.names[0]) for layer in sens.layers}
        self.clean = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.quantized = {
            n: dict(zip(BITS, sens.quantizer.fake_quant(w, BITS), strict=True)) for n, w in self.clean.items()
        }
        self.float = self.logits({}, self.heldout)
        self.float_choice = self.logits({}, self.choice)
        self.scored: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}
        self.chosen: dict[tuple[int, ...], float] = {}

    @torch.no_grad()
    def logits(self, bits: dict[str, int], data: Digits) -> Tensor:
        for name, weight in self.weights.items():
            weight.copy_(self.quantized[name][bits[name]] if name in bits else self.clean[name])
        outputs = torch.cat([self.model(part) for part in data.images.split(128)]).double()
        for name, weight in self.weights.items():
            weight.copy_(self.clean[name])
        return outputs

    def score(self, bits: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Per held-out sample: cross-entropy, whether right, KL to the float net."""
        key = tuple(bits.values())
        if key not in self.scored:
            logits, labels = self.logits(bits, self.heldout), self.heldout.labels
            losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            self.scored[key] = losses, logits.argmax(1) == labels, divergence(self.float, logits)
        return self.scored[key]

    def best(self, plans: Sequence[Plan]) -> dict[str, int]:
        """What :func:`clado.rerank` picks on the samples set apart for it; a net this small needs no shared prefixes."""
        for plan in plans:
            key = tuple(plan.bits.values())
            if key not in self.chosen:
                self.chosen[key] = divergence(self.float_choice, self.logits(plan.bits, self.choice)).mean().item()
        return min(plans, key=lambda plan: (self.chosen[tuple(plan.bits.values())], plan.size_bytes)).bits


def divergence(logits: Tensor, other: Tensor) -> Tensor:
    """KL per sample."""
    clean = logits.log_softmax(1)
    return (clean.exp() * (clean - other.log_softmax(1))).sum(1)


def measure(unit: Unit, work: Path) -> Path:
    """Write ``<unit>.json`` and the held-out losses per sample ``<unit>.npz``; profiles that are there are not repeated."""
    target = work / "units" / f"{unit.name}.json"
    if target.exists():
        return target
    torch.set_num_threads(1)
    model = trained(unit.net, unit.seed, work / "nets")
    data = load_split(f"sensitivity {unit.samples}")
    images, labels = data.images[:SAMPLES], data.labels[:SAMPLES]
    cost: dict[str, dict[str, float]] = {}
    sens: dict[str, Sensitivity] = {}
    for name, settings in PROFILES.items():
        if name in COSTLY and not unit.thorough:
            continue
        folder = work / "profiles" / f"{unit.name}-{name.replace(', ', '-').replace(' ', '-')}"
        begun = folder.exists()
        with cpu_seconds() as spent:
            sens[name] = clado.profile(
                model,
                [(images, labels)],
                BITS,
                group_size=SCALES[unit.scales],
                rounding="nearest",  # as the rivals
                output_dir=folder,
                verbose=False,
                **settings,
            )
        spent_file = folder / "seconds.json"
        if not spent_file.exists():
            spent_file.write_text(json.dumps(None if begun else spent()))  # of a resumed profile it is not known
        forwards = sens[name].info["forward_equivalents"] * sens[name].num_samples
        cost[name] = {
            "forwards": forwards,
            "seconds": json.loads(spent_file.read_text()),
            "samples": sens[name].num_samples,
        }

    bench = Bench(model, sens["logit"])
    plans: dict[str, dict[str, dict[str, int]]] = {}

    def keep(method: str, budget: float, bits: dict[str, int]) -> None:
        plans.setdefault(method, {})[str(budget)] = bits

    for rival in modelopt.METHODS:
        state = work / "modelopt" / f"{unit.name}-{rival}.pt"
        state.parent.mkdir(parents=True, exist_ok=True)
        with cpu_seconds() as spent:
            found = list(modelopt.plans(model, sens["logit"], images, labels, rival, BUDGETS, state))
        cost[f"modelopt {rival}"] = {"seconds": spent(), "samples": SAMPLES}
        for budget, bits in zip(BUDGETS, found, strict=True):
            keep(f"modelopt {rival}", budget, bits)
    for name, matrix in sens.items():
        solver = clado.Solver(matrix)
        names = OBJECTIVES if name not in (f"logit, {FEW} samples", f"gradient, {FEW} samples") else ("original",)
        names = (*names, "diagonal") if name in ("logit", "logit, cross-entropy") else names
        for objective in names:
            for budget in BUDGETS:
                keep(
                    f"{name}: {objective}",
                    budget,
                    solver.solve(objective=objective, avg_bits=budget, solver="heuristic").bits,
                )
    refinements = []
    for budget in BUDGETS:
        keep("uniform", budget, dict.fromkeys(bench.weights, int(budget)))
        short = {name: clado.shortlist(matrix, avg_bits=budget, solver="heuristic") for name, matrix in sens.items()}
        for name, plans_of_name in short.items():
            keep(f"{name}: reranked", budget, bench.best(plans_of_name))
        if budget <= REFINED_TO:
            saved = work / "refined" / f"{unit.name}-{budget}.json"
            refined = refine(model, (images, labels), sens["logit"], short["logit"], budget, saved)
            refinements.append(refined.info)
            keep("logit: refined", budget, refined.bits)
            keep("logit: refined, reranked", budget, bench.best([refined, *short["logit"]]))
    cost["refine, per budget"] = {
        "forwards": float(np.mean([i["refine_forward_equivalents"] for i in refinements])) * SAMPLES,
        "seconds": float(np.mean([i["seconds"] for i in refinements])),
        "rounds": float(np.mean([len(i["refine"]) for i in refinements])),
        "samples": SAMPLES,
    }

    rows, arrays = [], {"float": loss_of(bench.float, bench.heldout)}
    for method, by_budget in plans.items():
        for budget, bits in by_budget.items():
            losses, correct, divergence = bench.score(bits)
            plan = clado.given_plan(sens["logit"], bits)
            arrays[f"{method}|{budget}"] = losses.float().numpy()
            rows.append(
                {
                    "method": method,
                    "budget": float(budget),
                    "avg_bits": plan.avg_bits,
                    "size_bytes": plan.size_bytes,
                    "loss": losses.mean().item(),
                    "kl": divergence.mean().item(),
                    "accuracy": correct.double().mean().item(),
                    "bits": list(bits.values()),
                }
            )
    result = {
        "unit": vars(unit),
        "layers": len(bench.weights),
        "weights": sum(w.numel() for w in bench.weights.values()),
        "float": {
            "loss": float(arrays["float"].mean()),
            "accuracy": (bench.float.argmax(1) == bench.heldout.labels).double().mean().item(),
        },
        "cost": cost,
        "entries": entry_errors(sens),
        "noise": {name: noise(matrix) for name, matrix in sens.items()},
        "plans": rows,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(target.with_suffix(".npz"), **arrays)
    with atomic_file(target) as temporary:
        Path(temporary).write_text(json.dumps(result))
    return target


def refine(
    model: nn.Module, batch: tuple[Tensor, Tensor], sens: Sensitivity, plans: Sequence[Plan], budget: float, saved: Path
) -> Plan:
    """:func:`clado.refine`, kept in a file of its own: it is the longest step."""
    if not saved.exists():
        with cpu_seconds() as spent:
            plan = clado.refine(model, [batch], sens, plans, avg_bits=budget, solver="heuristic", verbose=False)
        plan.info["seconds"] = spent()
        saved.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(saved) as temporary:
            Path(temporary).write_text(plan.to_json())
    return Plan.from_json(saved.read_text())


def loss_of(logits: Tensor, data: Digits) -> np.ndarray:
    return nn.functional.cross_entropy(logits, data.labels, reduction="none").float().numpy()


def entry_errors(sens: dict[str, Sensitivity]) -> dict[str, float]:
    """Frobenius norm of the error of all interactions over that of the exact ones, on the same samples."""
    exact = sens.get(f"exact, {FEW} samples")
    if exact is None:
        return {}
    scale = np.linalg.norm(exact.interaction)
    names = [name for name in sens if name != f"exact, {FEW} samples"]
    return {name: float(np.linalg.norm(sens[name].interaction - exact.interaction) / scale) for name in names}


def noise(sens: Sensitivity) -> float:
    """Share of interactions that lie within two standard errors of zero."""
    outside = ~sens.candidates.same_layer
    return float((np.abs(sens.interaction) <= 2 * sens.stderr)[outside].mean())


@contextmanager
def cpu_seconds() -> Iterator[Callable[[], float]]:
    """Seconds of this process's own time: the machine may be shared."""
    start, end = time.process_time(), []
    yield lambda: (end[0] if end else time.process_time()) - start
    end.append(time.process_time())
