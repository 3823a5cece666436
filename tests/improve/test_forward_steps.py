"""Every stage behind profile runs a model as profile did: by forward_step, judged by loss_func, against a plain loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import clado
from clado.improve import loss_increases
from clado.improve.refiner import _Ground
from clado.profiling import LossChoice, Reader
from clado.report import measure


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 24), nn.Linear(24, 16), nn.Linear(16, 6)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.second(self.first(x).relu()).relu())


class Features(Body):
    """A dictionary whose first output is not what counts."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.second(self.first(x).relu()).relu()
        return {"features": features, "values": self.head(features)}


class Sides(Body):
    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return super().forward(image * mask)


def rescaled(model: nn.Module, batch: Any) -> Any:
    return model(batch[0] / 255 * 2 - 1)


def sides(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(batch["image"], batch["mask"])


def squared(output: dict[str, Tensor], batch: Any) -> Tensor:
    return (output["values"] - batch[1]).square().mean(1)


def mean_squared(output: dict[str, Tensor], batch: Any) -> Tensor:
    return squared(output, batch).mean()


@functools.cache
def made(kind: str) -> tuple[nn.Module, list[Any], dict[str, Callable[..., Any]]]:
    """(model, batches of 20 and 12 samples, the user's functions)."""
    torch.manual_seed(0)
    model = {"rescaled": Body, "dictionary": Features, "mean": Features, "sides": Sides}[kind]().eval()
    batches: list[Any] = []
    for n in (20, 12):
        if kind == "rescaled":
            batches.append((torch.rand(n, 12) * 255, torch.randint(6, (n,))))
        elif kind == "sides":
            batches.append({"image": torch.randn(n, 12), "mask": torch.rand(n, 12)})
        else:
            batches.append((torch.randn(n, 12), torch.randn(n, 6)))
    own: dict[str, dict[str, Callable[..., Any]]] = {
        "rescaled": {"forward_step": rescaled},
        "dictionary": {"loss_func": squared},
        "mean": {"loss_func": mean_squared},
        "sides": {"forward_step": sides},
    }
    return model, batches, own[kind]


KINDS = ("rescaled", "dictionary", "mean", "sides")


@torch.no_grad()
def outputs(kind: str, model: nn.Module) -> list[Any]:
    _, batches, _ = made(kind)
    run = {"rescaled": rescaled, "sides": sides}.get(kind, lambda model, batch: model(batch[0]))
    return [run(model, batch) for batch in batches]


def of_double(output: Any, batch: Any) -> Tensor:
    """The user's loss without its own rounding."""
    return squared({name: value.double() for name, value in output.items()}, (None, batch[1].double()))


def increases(kind: str, changed: nn.Module) -> Tensor:
    """What each sample loses, by a plain loop."""
    model, batches, _ = made(kind)
    pairs = zip(outputs(kind, model), outputs(kind, changed), batches, strict=True)
    if kind in ("dictionary", "mean"):
        return torch.cat([of_double(now, batch) - of_double(clean, batch) for clean, now, batch in pairs])
    gaps = []
    for clean, now, _ in pairs:
        p, q = clean.double().log_softmax(1), now.double().log_softmax(1)
        gaps.append((p.exp() * (p - q)).sum(1))
    return torch.cat(gaps)


@functools.cache
def matrix(kind: str) -> clado.Sensitivity:
    model, batches, own = made(kind)
    estimator = "exact" if "loss_func" in own else "logit"
    return clado.profile(
        model, batches, (2, 3, 8), num_samples=32, estimator=estimator, quantize_ends=True, verbose=False, **own
    )


def forgotten(sens: clado.Sensitivity) -> clado.Sensitivity:
    """As another process reads it."""
    from dataclasses import replace

    return replace(sens, functions={})


def uniform(kind: str, bits: int) -> clado.Plan:
    sens = matrix(kind)
    return clado.given_plan(sens, {layer.name: bits for layer in sens.layers})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounded", [False, True])
def test_rerank_and_the_report_measure_what_a_plain_loop_does(kind: str, rounded: bool) -> None:
    model, batches, own = made(kind)
    plans = [uniform(kind, bits) for bits in (2, 8, 3)]
    if rounded:  # with weights that were adapted there is no shared graph
        plans[0] = clado.finish(model, plans[0], batches, "compensated", num_samples=32, verbose=False, **own)
    wanted = torch.stack([increases(kind, clado.apply(model, plan)) for plan in plans])
    chosen = LossChoice(function=own.get("loss_func"))
    found = loss_increases(model, iter(batches), plans, chosen, forward_step=own.get("forward_step"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    best = clado.rerank(model, batches, plans, **own)
    means = wanted.mean(1)
    assert best.bits == plans[int(means.argmin())].bits
    assert [row["loss_increase"] for row in best.info["rerank"]] == pytest.approx(sorted(means.tolist()), rel=1e-4)
    records = measure(forgotten(matrix(kind)), plans, model, batches, verbose=False, **own)
    assert [record["increase"] for record in records] == pytest.approx(means.tolist(), rel=1e-4)
    assert measure(matrix(kind), plans, model, batches, verbose=False) == records


@pytest.mark.parametrize("kind", ["rescaled", "dictionary", "mean"])
def test_scores_are_those_of_a_plain_loop(kind: str) -> None:
    model, batches, own = made(kind)
    score = clado.evaluate(model, batches, **own)
    pairs = list(zip(outputs(kind, model), batches, strict=True))
    if kind == "rescaled":
        logits, labels = torch.cat([out for out, _ in pairs]).double(), torch.cat([batch[1] for _, batch in pairs])
        wanted = nn.functional.cross_entropy(logits, labels, reduction="none")
        assert score.accuracy == (logits.argmax(1) == labels).double().mean().item()
        assert score.correct5 is not None
    else:
        wanted = torch.cat([squared(out, batch).double() for out, batch in pairs])
        assert (score.accuracy, score.accuracy_stderr, score.accuracy5) == (None, None, None)
    torch.testing.assert_close(score.losses, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_refine_ends_at_the_loss_that_it_says(kind: str) -> None:
    model, batches, own = made(kind)
    sens, start = matrix(kind), uniform(kind, 2)
    plan = clado.refine(model, batches, forgotten(sens), start, avg_bits=4.0, rounds=2, verbose=False, **own)
    before, after = (increases(kind, clado.apply(model, p)).mean().item() for p in (start, plan))
    assert plan.info["refine_loss"] == pytest.approx(after, rel=1e-4)
    assert plan.info["refine"][0]["loss_increase"] == pytest.approx(before, rel=1e-4)
    assert after < 0.8 * before
    known = clado.refine(model, batches, sens, start, avg_bits=4.0, rounds=2, verbose=False)
    assert known.bits == plan.bits


def test_matrix_around_a_plan_under_a_users_loss() -> None:
    """Moves cost what they do, and together what outputs that add up cost beyond."""
    model, batches, own = made("dictionary")
    sens, names = matrix("dictionary"), [layer.name for layer in matrix("dictionary").layers]
    held = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    reader = Reader(torch.device("cpu"), torch.float32, LossChoice(function=own["loss_func"]))
    base = {name: ("W3A16", "W2A16", "W8A16")[k] for k, name in enumerate(names)}
    with torch.no_grad():
        around, loss = _Ground(model, sens, held, reader, 10).matrix(base)

    def of(schemes: dict[str, str]) -> float:
        return increases("dictionary", clado.apply(model, clado.given_plan(sens, schemes))).mean().item()

    here = of(base)
    assert loss == pytest.approx(here, rel=1e-4)
    labels = [scheme.label for scheme in sens.candidates.flat]
    owners = [names[k] for k in sens.candidates.layer_of]
    for v, (name, label) in enumerate(zip(owners, labels, strict=True)):
        assert around.delta_loss[v] == pytest.approx(of({**base, name: label}) - here, abs=1e-4 * abs(here))
    v, w = labels.index("W8A16"), len(labels) - 3  # two other layers' moves
    moved = [
        outputs("dictionary", clado.apply(model, clado.given_plan(sens, {**base, **move})))
        for move in ({}, {owners[v]: labels[v]}, {owners[w]: labels[w]})
    ]
    none, one, other = (torch.cat([part["values"].double() for part in parts]) for parts in moved)
    wanted = 2 * ((one - none) * (other - none)).mean(1).mean().item()  # of the squared error
    assert around.interaction[v, w] == pytest.approx(wanted, rel=1e-3)
    assert np.allclose(around.interaction, around.interaction.T)
