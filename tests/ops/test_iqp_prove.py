"""iqp_prove against trying every choice: closed bounds meet the optimum, open ones stay below it."""

import math
import time

import pytest
import torch
from torch import Tensor

import clado_ext
from clado_ext.reference import iqp_prove as oracle
from tests.ops.devices import at_every_cpu_setting, same_bits
from tests.ops.test_iqp_search import feasible, program_of, random_program, value


def convex(program: dict[str, Tensor]) -> dict[str, Tensor]:
    """The crudest convex form: a multiple of the identity on Q, taken back from c."""
    shift = torch.linalg.eigvalsh(program["matrix"])[0].clamp(max=0).neg() + 1e-9
    size = len(program["matrix"])
    return {
        "quadratic": program["matrix"] + shift * torch.eye(size, dtype=torch.float64),
        "linear": torch.full((size,), -float(shift) / 2, dtype=torch.float64),
        "multipliers": torch.zeros(len(program["limits"]), dtype=torch.float64),
    }


def proves_the_optimum(program: dict[str, Tensor]) -> None:
    choice, alive, outcome = clado_ext.iqp_prove(**program, **convex(program), tolerance=1e-7)
    best, optimum = oracle.iqp_prove(**program)
    bound, _, finished = outcome.tolist()
    if not math.isfinite(optimum):
        assert choice.eq(-1).all()
        assert not finished or bound == math.inf
        return
    assert finished
    assert feasible(program, choice)
    assert value(program, choice) == pytest.approx(float(optimum), abs=2e-7)
    assert optimum - 2e-7 <= bound <= optimum
    # What the root dropped is in no choice that is better than the answer.
    assert value(program, choice) <= optimum + 1e-12 or bool(alive[best].all())


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_optimum(seed: int) -> None:
    proves_the_optimum(random_program(seed, budgets=1 + seed % 3, tightness=(0.1, 0.5, 1.0)[seed % 3]))


@pytest.mark.parametrize("seed", range(300))
def test_equals_the_optimum_of_ragged_programs(seed: int) -> None:
    proves_the_optimum(random_program(seed, 2 + seed % 3, 1 + seed % 2, (0.2, 0.5, 1.0)[seed % 3], most=16))


@pytest.mark.parametrize("counts", [(40,), (40, 1, 3), (2, 40, 16), (100, 9)])
def test_layers_of_many_candidates(counts: tuple[int, ...]) -> None:
    for seed in range(5):
        proves_the_optimum(program_of(torch.tensor(counts), 1, 0.5, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("seed", range(20))
def test_what_the_form_leaves_out_is_put_back(seed: int) -> None:
    """A form of G − R: the proof still closes on G, and no bound on the way exceeds the optimum."""
    program = random_program(seed, layers=6, budgets=1 + seed % 3, tightness=(0.2, 0.5, 1.0)[seed % 3])
    generator = torch.Generator().manual_seed(seed)
    removed = torch.rand(program["matrix"].shape, dtype=torch.float64, generator=generator)
    layer = torch.repeat_interleave(torch.arange(6), program["starts"].diff())
    removed = (removed + removed.T) * (layer[:, None] != layer[None, :])
    form = {**convex({**program, "matrix": program["matrix"] - removed}), "removed": removed}
    _, optimum = oracle.iqp_prove(**program)
    for nodes in (1, 2, 5, 10, 10_000):
        choice, _, outcome = clado_ext.iqp_prove(**program, **form, nodes=nodes, tolerance=1e-7)
        assert outcome[0] <= optimum + 1e-9
    assert outcome[2] == 1
    assert value(program, choice) == pytest.approx(float(optimum), abs=2e-7)


@pytest.mark.parametrize("nodes", [1, 2, 5, 20])
@pytest.mark.parametrize("seed", range(6))
def test_bound_of_an_open_tree_is_never_above_the_optimum(seed: int, nodes: int) -> None:
    program = random_program(seed, layers=6, tightness=0.4)
    _, _, outcome = clado_ext.iqp_prove(**program, **convex(program), nodes=nodes, tolerance=1e-9)
    _, optimum = oracle.iqp_prove(**program)
    assert outcome[0] <= optimum + 1e-9


def test_same_tree_at_every_cpu_setting() -> None:
    """Of a program so large that its later nodes are shared out."""
    program = random_program(1, layers=60, tightness=0.4)
    form, nodes = convex(program), 300 + 2**25 // len(program["matrix"]) ** 2
    results = at_every_cpu_setting(lambda: clado_ext.iqp_prove(**program, **form, nodes=nodes))
    assert results[0][2][1] == nodes
    assert all(same_bits(result, results[0]) for result in results)


def test_time_limit() -> None:
    program = random_program(2, layers=60)
    form = convex(program)
    started = time.monotonic()
    _, _, outcome = clado_ext.iqp_prove(**program, **form, seconds=0.2)
    assert time.monotonic() - started < 0.7
    assert outcome[2] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quadratic": torch.zeros(2, 2, dtype=torch.float64)}, "quadratic must have shape"),
        ({"linear": torch.zeros(3)}, "linear must be float64"),
        (
            {"linear": torch.full((3,), math.nan, dtype=torch.float64)},
            "quadratic, linear, multipliers, point and removed must be finite",
        ),
        ({"multipliers": torch.zeros(2, dtype=torch.float64)}, "multipliers must have shape"),
        (
            {"multipliers": torch.full((1,), math.nan, dtype=torch.float64)},
            "quadratic, linear, multipliers, point and removed must be finite",
        ),
        ({"point": torch.zeros(2, dtype=torch.float64)}, "point must have shape"),
        ({"removed": torch.zeros(2, 2, dtype=torch.float64)}, "removed must have shape"),
        ({"tolerance": -1.0}, "slack and tolerance must not be negative"),
        ({"seconds": -1.0}, "seconds must not be negative"),
        ({"start": torch.tensor([0, 0])}, "start must hold"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    program = {
        "matrix": torch.eye(3, dtype=torch.float64),
        "starts": torch.tensor([0, 2, 3]),
        "rows": torch.zeros(1, 3, dtype=torch.int64),
        "limits": torch.zeros(1, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=f"iqp_prove: {message}"):
        clado_ext.iqp_prove(**{**program, **convex(program), **change})


def test_opcheck() -> None:
    program = random_program(4)
    start = torch.full((5,), -1)
    point = torch.zeros_like(program["matrix"][0])
    arguments = (*program.values(), *convex(program).values(), start, point, point[:0], 0.0, 0.0, 0.0, 100, 60.0)
    torch.library.opcheck(torch.ops.clado.iqp_prove, arguments)
