"""The arguments of solve: written once, shown everywhere, checked; schemes are named by bits or by label."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clado
from clado import CladoError, Sensitivity
from clado.solver import AXES, BUDGETS, SolveOptions
from tests.solver import instances

NAMES = [f.name for f in fields(SolveOptions)]


def test_every_argument_is_in_the_signature_and_in_the_docstring() -> None:
    for function, own in ((clado.solve, ["sens"]), (clado.Solver.solve, ["self"])):
        shown = inspect.signature(function).parameters
        assert list(shown) == own + NAMES
        assert {name: shown[name].default for name in NAMES} == {f.name: f.default for f in fields(SolveOptions)}
    assert [n for n in NAMES if shown[n].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD] == list(AXES)
    text = " ".join((clado.solve.__doc__ or "").split())
    for name, about in SolveOptions.about().items():
        assert f" {name}: {' '.join(about.help.split())}" in text
        assert about.help.endswith(".")
        assert about.line
        assert about.group in ("budget", "inverse", "limit", "aim", "effort")
    assert set(AXES) < set(BUDGETS)


def test_budgets_may_be_given_by_place() -> None:
    sens = instances.sensitivity(0, 4, (2, 4, 8))
    plan = clado.solve(sens, 4, None, 500)
    assert set(plan.usage) == {"avg_bits", "size_bytes"}


@pytest.mark.parametrize("seed", range(5))
def test_a_label_says_what_bits_say(seed: int) -> None:
    sens = instances.sensitivity(seed, 5, (2, 4, 8))
    bits = clado.solve(sens, avg_bits=5, pin={"layer1": 4}, forbid={"layer0": 2, "layer3": (4, 8)})
    labels = clado.solve(sens, avg_bits=5, pin={"layer1": "W4A16"}, forbid={"layer0": "W2A16", "layer3": ("W4A16", 8)})
    assert labels.bits == bits.bits
    assert labels.objective == bits.objective


def test_near_asks_by_budgets_and_limits_alone() -> None:
    sens = instances.sensitivity(1, 5, (2, 4, 8))
    solver, asked = clado.Solver(sens), {"avg_bits": 4.4, "forbid": {"layer2": "W4A16"}}
    plan = solver.solve(**asked)
    steered = solver.near(plan, 4, **asked, seed=3, gap=0.1, solver="heuristic", time_limit=1.0, objective="diagonal")
    assert [p.objective for p in steered] == [p.objective for p in solver.near(plan, 4, **asked)]


def test_constraints_of_a_file_are_read_once(tmp_path: Path) -> None:
    own = {"heat": {"limit": 3.5, "coefficients": {"a": {"4": 1.0}}}}
    (tmp_path / "c.json").write_text(json.dumps(own))
    options = SolveOptions(constraints=tmp_path / "c.json")  # type: ignore[arg-type]
    assert options.constraints == (clado.LinearConstraint("heat", {"a": {4: 1.0}}, 3.5),)
    assert SolveOptions(constraints=options.constraints) == options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"avg_bit": 3}, "solve: arguments must be among those of help(clado.solve), got avg_bit (meant: avg_bits"),
        ({"avg_bits": 4, "objective": "best"}, "solve: objective must be one of ('original', 'clipped', 'shrunk', "),
        ({"avg_bits": 4, "solver": "magic"}, "solve: solver must be one of ('auto', 'bnb', 'scip', 'heuristic'), got"),
        ({"avg_bits": 4, "threads": 0}, "solve: threads must be a whole number from 1 up, got 0"),
        ({"avg_bits": 4, "seed": 0.5}, "solve: seed must be a whole number, got 0.5"),
        ({"avg_bits": 4, "time_limit": "long"}, "solve: time_limit must be positive seconds, got long"),
        ({"avg_bits": 4, "start": 3}, "solve: start must be a Plan, got 3"),
        ({"avg_bits": 4, "min_bits": {"layer0": "4"}}, "solve: min_bits must hold whole widths, got '4'"),
        ({"avg_bits": 4, "pin": ["layer0"]}, "solve: pin must be {layer: bits, or a scheme's label}, got ['layer0']"),
        (
            {"avg_bits": 4, "pin": {"layer0": "W3A16"}},
            "scheme must be one of W2A16, W4A16, W8A16 for layer0, got W3A16",
        ),
        ({"avg_bits": 4, "pin": {"layer0": "four"}}, "scheme: label must be one of W2A16"),
        ({"avg_bits": 4, "shared_layers": "layer0"}, "solve: shared_layers must hold groups of layer names, got 'l'"),
        ({"avg_bits": 4, "constraints": 3}, "solve: constraints must be LinearConstraints or a file, got 3"),
        ({"avg_bits": 4, "act_bits": 33}, "solve: act_bits must lie in 1..32, got 33"),
        ({"latency_ms": float("nan"), "latency": {}}, "solve: latency_ms must have a finite limit, got nan"),
    ],
)
def test_what_cannot_be_meant_is_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(CladoError, match=re.escape(message)) as error:
        clado.solve(instances.sensitivity(0, 4, (2, 4, 8)), **given)
    assert "\n" not in str(error.value)


def test_other_functions_name_what_they_do_not_know() -> None:
    sens = Sensitivity.from_matrix(np.diag([1.0, 0.5, 0.1] * 2), [("a", 100), ("b", 50)], (2, 4, 8))
    with pytest.raises(CladoError, match=r"pareto: arguments must be .*, got time_limits"):
        clado.pareto(sens, avg_bits=[3], time_limits=3)
    with pytest.raises(CladoError, match=r"given_plan: arguments must be .*, got pin"):
        clado.given_plan(sens, {"a": 4, "b": 4}, pin={"a": 4})
    with pytest.raises(CladoError, match=r"solve: arguments must be .*, got sed \(meant: seed\?\)"):
        clado.shortlist(sens, avg_bits=4, sed=3)
