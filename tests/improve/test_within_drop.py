"""The smallest plan within a measured drop: by hand along the frontier, and on the digits."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import clado
from clado import CladoError
from clado.improve import within_drop


@pytest.fixture(scope="module")
def digits() -> tuple[torch.nn.Module, clado.Sensitivity, list[Any]]:
    """The embedded net, a rough matrix, and 100 held-out digits."""
    model = clado.digits.load_model()
    images, labels = clado.digits.load_data("sensitivity")
    sens = clado.profile(
        model,
        [images[:16]],
        bits=(2, 3, 4, 8),
        group_size=0,
        estimator="diagonal",
        num_samples=16,
        rounding="nearest",
        verbose=False,
    )
    images, labels = clado.digits.load_data("heldout")
    return model, sens, [(images[:60], labels[:60]), (images[60:100], labels[60:100])]


def drops(model: torch.nn.Module, plan: clado.Plan, data: list[Any], metric: str) -> torch.Tensor:
    """The drop of every sample, from the definition."""
    x, y = (torch.cat([part[k] for part in data]) for k in (0, 1))
    with torch.no_grad():
        clean, other = (net(x).double().log_softmax(1) for net in (model, clado.apply(model, plan)))
    if metric == "top1":
        return (clean.argmax(1) == y).double() - (other.argmax(1) == y).double()
    if metric == "kl":
        return (clean.exp() * (clean - other)).sum(1)
    return (clean - other).gather(1, y[:, None])[:, 0]


@pytest.mark.parametrize(
    ("metric", "limit", "minimize"),
    [("top1", 0.02, "size_bytes"), ("kl", 0.05, "avg_bits"), ("cross_entropy", 0.1, "bitops")],
)
def test_the_plan_is_within_and_the_next_smaller_one_is_not(
    digits: tuple, metric: str, limit: float, minimize: str
) -> None:
    model, sens, data = digits
    plan = clado.smallest_within(
        model, iter(data), sens, max_drop=limit, metric=metric, minimize=minimize, evaluations=7, verbose=False
    )
    found = plan.info["max_drop"]
    own = drops(model, plan, data, metric)
    assert found["drop"] == pytest.approx(own.mean().item(), rel=1e-3, abs=1e-6)
    assert found["stderr"] == pytest.approx(own.std().item() / 10, rel=1e-3, abs=1e-6)
    assert found["samples"] == 100
    assert found["decided"] == (found["drop"] + 1.96 * found["stderr"] <= limit)
    rows = found["evaluations"]
    assert 2 <= len(rows) <= 7
    within = [row["used"] for row in rows if row["drop"] <= limit]
    beyond = [row["used"] for row in rows if row["drop"] > limit]
    assert plan.usage[minimize]["used"] == min(within) < max(within)
    assert max(beyond, default=0) < min(within)
    # It answers a budget, with its status and bound.
    again = clado.solve(sens, **{minimize: plan.usage[minimize]["limit"]})
    assert (again.schemes, again.status) == (plan.schemes, plan.status)
    assert clado.Plan.from_json(plan.to_json()).info["max_drop"] == found


def test_budgets_pins_and_bans_hold(digits: tuple) -> None:
    model, sens, data = digits
    first, last = sens.layers[0].name, sens.layers[-1].name
    wishes: dict[str, Any] = {"avg_bits": 5, "pin": {first: 8}, "forbid": {last: 2}}
    plan = clado.smallest_within(model, data, sens, max_drop=0.5, evaluations=4, verbose=False, **wishes)
    assert plan.avg_bits <= 5
    assert plan.bits[first] == 8
    assert plan.bits[last] > 2


def test_a_drop_that_rises_with_the_size_is_still_within(digits: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: noise may make a smaller plan look better; what is returned was measured to be within."""
    model, sens, data = digits
    told = iter([0.0, 0.3, 0.1, 0.4, 0.05])
    monkeypatch.setattr(within_drop, "_drops", lambda *given: lambda plan: torch.full((9,), next(told)).double())
    plan = clado.smallest_within(model, data, sens, max_drop=0.2, evaluations=5, verbose=False)
    rows = plan.info["max_drop"]["evaluations"]
    assert [round(row["drop"], 3) for row in rows] == [0.0, 0.3, 0.1, 0.4, 0.05]
    assert plan.usage["size_bytes"]["used"] == rows[4]["used"]
    sizes = [row["used"] for row in rows]
    assert sizes[1] < sizes[3] < sizes[4] < sizes[2] < sizes[0]


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"max_drop": -1.0}, r"max_drop must be at least \S+, which the plan of least predicted loss drops, got -1"),
        ({"max_drop": float("nan")}, "max_drop must be a finite number, got nan"),
        ({"max_drop": 0.1, "metric": "top5"}, "metric must be one of top1, kl, cross_entropy, got 'top5'"),
        ({"max_drop": 0.1, "minimize": "energy"}, "minimize must be one of avg_bits, size_mb, .*, got 'energy'"),
        ({"max_drop": 0.1, "evaluations": 0}, "evaluations must be at least 1, got 0"),
        ({"max_drop": 0.1, "max_loss_increase": 1}, "arguments must leave max_loss_increase and minimize to solve"),
        ({"max_drop": 0.1, "avg_bit": 1}, r"arguments must be among .*, got avg_bit \(meant: avg_bits"),
    ],
)
def test_bad_input_is_one_line(digits: tuple, wishes: dict[str, Any], message: str) -> None:
    model, sens, data = digits
    with pytest.raises(CladoError, match=f"^smallest_within: {message}") as error:
        clado.smallest_within(model, data, sens, verbose=False, **wishes)
    assert "\n" not in str(error.value)


def test_data_that_cannot_judge(digits: tuple) -> None:
    model, sens, data = digits
    labelled = re.escape("heldout must yield (inputs, targets) for top1")
    with pytest.raises(CladoError, match=labelled):
        clado.smallest_within(model, [data[0][0]], sens, max_drop=0.1, verbose=False)
    with pytest.raises(CladoError, match="heldout must yield at least 2 samples, got 1"):
        clado.smallest_within(model, [(data[0][0][:1], data[0][1][:1])], sens, max_drop=0.1, verbose=False)
    one = clado.smallest_within(model, [data[0][0]], sens, max_drop=9, metric="kl", evaluations=1, verbose=False)
    assert one.info["max_drop"]["evaluations"][0]["drop"] == one.info["max_drop"]["drop"]


def test_drops_are_measured_as_the_matrix_was(digits: tuple) -> None:
    """A step that turns images around: given, or as the matrix knows it from its profile in this process."""
    model, sens, data = digits

    def step(net: torch.nn.Module, batch: Any) -> torch.Tensor:
        return net(-batch[0])

    turned = [(-x, y) for x, y in data]
    options: dict[str, Any] = {"max_drop": 0.05, "metric": "kl", "evaluations": 3, "verbose": False}
    wanted = clado.smallest_within(model, data, sens, **options).info["max_drop"]
    assert clado.smallest_within(model, turned, sens, forward_step=step, **options).info["max_drop"] == wanted
    known = replace(sens, functions={"forward_step": step})
    assert clado.smallest_within(model, turned, known, **options).info["max_drop"] == wanted
