"""Refinement: the matrix around a plan is what moving its layers one at a time does, and the measured loss never rises."""

import copy
import functools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import clado
from clado.improve.refiner import _Ground
from clado.profiling import Reader
from tests.models import small_cnn, tiny_vit

BITS = (2, 3, 8)


@functools.cache
def made(build) -> tuple[nn.Module, Tensor, clado.Sensitivity]:
    model, shape = build()
    x = torch.randn(24, *shape)
    return model, x, clado.profile(model, [x], BITS, num_samples=24, group_size=0, rounding="nearest", verbose=False)


@torch.no_grad()
def divergence(model: nn.Module, sens: clado.Sensitivity, bits: dict[str, int], x: Tensor) -> float:
    """Mean KL to the float model of the model with these widths, by whole forwards."""
    small = copy.deepcopy(model)
    for layer in sens.layers:
        weight = small.get_parameter(layer.names[0])
        weight.copy_(sens.quantizer.fake_quant(weight, (bits[layer.name],))[0])
    clean, now = model(x).double().log_softmax(1), small(x).double().log_softmax(1)
    return (clean.exp() * (clean - now)).sum(1).mean().item()


@pytest.mark.parametrize("build", [tiny_vit, small_cnn])
def test_matrix_around_a_plan_is_what_its_neighbours_lose(build) -> None:
    model, x, sens = made(build)
    bits = {layer.name: BITS[k % 2] for k, layer in enumerate(sens.layers)}
    with torch.inference_mode():
        reader = Reader(torch.device("cpu"), torch.float32)
        around, loss = _Ground(model, sens, x, reader, 10).matrix(bits)
    base = divergence(model, sens, bits, x)
    assert loss == pytest.approx(base, rel=1e-4)  # float32 forwards, batches of another size
    for v, layer in enumerate(np.repeat(sens.layers, len(BITS))):
        moved = {**bits, layer.name: BITS[v % len(BITS)]}
        assert around.delta_loss[v] == pytest.approx(divergence(model, sens, moved, x) - base, abs=1e-4 * base)
        if moved == bits:  # not moved: nothing changes and nothing interacts
            assert np.abs(around.interaction[v]).max() < 1e-5 * base


def test_loss_falls_within_the_budget_and_the_same_call_does_the_same() -> None:
    model, x, sens = made(tiny_vit)
    start = clado.given_plan(sens, {layer.name: 2 for layer in sens.layers})
    plan, again = (clado.refine(model, [x], sens, start, avg_bits=3.0, rounds=n, verbose=False) for n in (2, 1))
    assert again.info["refine"] == plan.info["refine"][:1]
    assert plan.status == "given"
    assert plan.usage["avg_bits"]["used"] <= 3.0
    before, after = (divergence(model, sens, p.bits, x) for p in (start, plan))
    assert after < 0.8 * before  # half of the budget was unused
    assert plan.info["refine_loss"] == pytest.approx(after, rel=1e-4)
    losses = [row["loss_increase"] for row in plan.info["refine"]]
    assert losses == sorted(losses, reverse=True)


def test_wishes_hold() -> None:
    model, x, sens = made(tiny_vit)
    first = sens.layers[0].name
    start = clado.solve(sens, avg_bits=3.0, pin={first: 8}, solver="heuristic")
    worse = clado.given_plan(sens, {layer.name: 8 if layer.name == first else 2 for layer in sens.layers})
    plan = clado.refine(model, [x], sens, [worse, start], avg_bits=3.0, pin={first: 8}, rounds=1, verbose=False)
    assert plan.bits[first] == 8
    measured = [divergence(model, sens, p.bits, x) for p in (worse, start)]
    assert plan.info["refine"][0]["loss_increase"] == pytest.approx(min(measured), rel=1e-4)


def test_cross_entropy() -> None:
    model, x, sens = made(tiny_vit)
    labels = torch.arange(24) % 10
    start = clado.given_plan(sens, {layer.name: 2 for layer in sens.layers})
    plan = clado.refine(model, [(x, labels)], sens, start, avg_bits=3.0, rounds=1, loss="cross_entropy", verbose=False)
    losses = [clado.evaluate(m, [(x, labels)]).loss for m in (model, clado.apply(model, plan))]
    assert plan.info["refine_loss"] == pytest.approx(losses[1] - losses[0], rel=1e-3, abs=1e-5)


def test_bad_arguments() -> None:
    model, x, sens = made(tiny_vit)
    plan = clado.solve(sens, avg_bits=3.0, solver="heuristic")
    for wrong in ({"rounds": 0}, {"loss": "mae"}, {"objective": "clipped"}, {"loss": "cross_entropy"}):
        with pytest.raises(clado.CladoError, match="refine: "):
            clado.refine(model, [x], sens, plan, avg_bits=3.0, verbose=False, **wrong)
    with pytest.raises(clado.CladoError, match="budget must be given"):
        clado.refine(model, [x], sens, plan, verbose=False)
