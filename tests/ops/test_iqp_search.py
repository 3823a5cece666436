"""iqp_search against trying every choice; repeatable, bounded in time, clear about bad input."""

import itertools
import math
import time

import pytest
import torch
from torch import Tensor

import clado_ext
from clado_ext.reference import iqp_search as oracle
from tests.ops.devices import at_every_cpu_setting, same_bits


def random_program(
    seed: int, layers: int = 5, budgets: int = 2, tightness: float = 0.3, most: int = 5
) -> dict[str, Tensor]:
    """Layers of one to ``most`` candidates, an indefinite matrix, budgets at a share of their range."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, most + 1, (layers,), generator=generator)
    return program_of(counts, budgets, tightness, generator)


def program_of(counts: Tensor, budgets: int, tightness: float, generator: torch.Generator) -> dict[str, Tensor]:
    """The same with ``counts[i]`` candidates in layer i."""
    layers = len(counts)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    size = int(starts[-1])
    matrix = torch.randn(size, size, dtype=torch.float64, generator=generator)
    matrix = (matrix + matrix.T) / 2 + 2 * torch.eye(size, dtype=torch.float64)
    layer = torch.repeat_interleave(torch.arange(layers), counts)
    inside = layer[:, None] == layer[None, :]
    matrix[inside & ~torch.eye(size, dtype=torch.bool)] = 0
    rows = torch.randint(0, 100, (budgets, size), generator=generator)
    least = torch.stack([rows[:, a:b].min(dim=1).values for a, b in itertools.pairwise(starts)]).sum(0)
    most = torch.stack([rows[:, a:b].max(dim=1).values for a, b in itertools.pairwise(starts)]).sum(0)
    limits = least + (tightness * (most - least)).long()
    return {"matrix": matrix, "starts": starts, "rows": rows, "limits": limits}


def value(program: dict[str, Tensor], choice: Tensor) -> float:
    return float(program["matrix"][choice][:, choice].sum() / 2)


def feasible(program: dict[str, Tensor], choice: Tensor) -> bool:
    return bool((program["rows"][:, choice].sum(1) <= program["limits"]).all())


@pytest.mark.parametrize("seed", range(40))
def test_finds_the_optimum_of_small_programs(seed: int) -> None:
    program = random_program(seed, budgets=1 + seed % 3, tightness=(0.2, 0.5, 1.0)[seed % 3])
    choice, found = clado_ext.iqp_search(**program, seed=seed)
    _, best = oracle.iqp_search(**program)
    assert bool(found) == math.isfinite(best)
    assert bool(found) == feasible(program, choice)
    if found:
        assert value(program, choice) == pytest.approx(float(best), abs=1e-9)


@pytest.mark.parametrize("seed", range(200))
def test_finds_the_optimum_of_ragged_programs(seed: int) -> None:
    program = random_program(seed, 2 + seed % 3, 1 + seed % 2, (0.2, 0.5, 1.0)[seed % 3], most=16)
    _, best = oracle.iqp_search(**program)
    choice, found = clado_ext.iqp_search(**program, seed=seed, work=20_000)
    assert bool(found) == math.isfinite(best)
    if found:
        assert feasible(program, choice)
        assert value(program, choice) == pytest.approx(float(best), abs=1e-9)


@pytest.mark.parametrize("counts", [(40,), (40, 1, 3), (2, 40, 16), (100, 9)])
def test_layers_of_many_candidates(counts: tuple[int, ...]) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        program = program_of(torch.tensor(counts), 1, 0.5, generator)
        choice, _ = clado_ext.iqp_search(**program, work=20_000)
        _, best = oracle.iqp_search(**program)
        assert value(program, choice) == pytest.approx(float(best), abs=1e-9)


def test_infeasible_gives_the_least_violation() -> None:
    program = random_program(0)
    program["limits"] = torch.full_like(program["limits"], -1)
    choice, found = clado_ext.iqp_search(**program, work=10_000)
    assert not bool(found)
    assert bool(((choice >= program["starts"][:-1]) & (choice < program["starts"][1:])).all())


def test_start_is_never_made_worse_and_target_stops() -> None:
    program = random_program(3, layers=6, tightness=0.6)
    best, _ = oracle.iqp_search(**program)
    choice, _ = clado_ext.iqp_search(**program, start=best, work=0, target=math.inf)
    assert value(program, choice) == pytest.approx(value(program, best))


def test_same_seed_same_choice_at_every_cpu_setting() -> None:
    program = random_program(1, layers=40, tightness=0.4)
    results = at_every_cpu_setting(lambda: clado_ext.iqp_search(**program, seed=5, work=20_000))
    assert all(same_bits(result, results[0]) for result in results)


def test_time_limit() -> None:
    program = random_program(2, layers=100)
    started = time.monotonic()
    clado_ext.iqp_search(**program, work=2**60, seconds=0.2)
    assert time.monotonic() - started < 0.7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix": torch.zeros(3, 4, dtype=torch.float64)}, "matrix must be square"),
        ({"matrix": torch.zeros(3, 3)}, "matrix must be torch.float64"),
        ({"matrix": torch.full((3, 3), math.nan, dtype=torch.float64)}, "matrix must be finite"),
        ({"starts": torch.tensor([0, 4])}, "starts must run from 0 to 3"),
        ({"starts": torch.tensor([0, 0, 3])}, "starts must give every layer"),
        ({"starts": torch.tensor([0])}, "starts must hold at least one layer"),
        ({"rows": torch.zeros(1, 2, dtype=torch.int64)}, "rows must have 3 columns"),
        ({"limits": torch.zeros(2, dtype=torch.int64)}, "limits must have 1 entries"),
        ({"start": torch.tensor([0, 1])}, "start must hold a candidate of each layer"),
        ({"start": torch.tensor([0])}, "start must have shape"),
        ({"seconds": math.nan}, "seconds must not be negative"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    program = {
        "matrix": torch.eye(3, dtype=torch.float64),
        "starts": torch.tensor([0, 2, 3]),
        "rows": torch.zeros(1, 3, dtype=torch.int64),
        "limits": torch.zeros(1, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=f"iqp_search: {message}"):
        clado_ext.iqp_search(**{**program, **change})


def test_opcheck() -> None:
    program = random_program(4)
    start = torch.full((5,), -1)
    torch.library.opcheck(torch.ops.clado.iqp_search, (*program.values(), start, 0, 1000, 60.0, -math.inf))
