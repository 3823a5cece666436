"""What is opened: a graph where there is one, whole forwards for every stage where there is none, and what both are asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import clado
from clado.graph import Runner, in_precision, open_runner
from clado.quant import Candidates, Quantizer, variants
from tests.graph.test_whole_forwards import Unexportable
from tests.models import small_cnn, tiny_vit

BITS, COUNT = (2, 4, 8), 12


def opened(whole: bool, dtype: torch.dtype = torch.float64) -> tuple[Runner, list[list[Tensor]], Tensor]:
    """Runner, variants and inputs of the CNN, whose one weight is used twice."""
    model, shape = small_cnn()
    x = torch.randn(3, *shape, dtype=dtype)
    used = Unexportable(model).eval() if whole else model
    runner = open_runner(used, x, quantize_ends=True, dtype=dtype)
    assert (runner.note is not None) == whole
    return runner, variants(used, Candidates.uniform(runner.layers, BITS), Quantizer(), x.device, dtype), x


def stages(model: nn.Module, x: Tensor) -> dict[str, Any]:
    # Compensation goes by the rows that are read, which whole forwards do not know.
    sens = clado.profile(model, [x], BITS, num_samples=COUNT, rounding="nearest", verbose=False)
    plans = [clado.solve(sens, avg_bits=bits) for bits in (2.5, 4.0)]
    corrected, plan = clado.correct(model, [x], sens, num_samples=4, rounds=2, avg_bits=3.0, verbose=False)
    refined = clado.refine(model, [x], sens, plans[0], rounds=1, avg_bits=3.0, verbose=False)
    return {
        "matrix": sens.matrix,
        "rows": [row["loss_increase"] for row in clado.rerank(model, [x], plans).info["rerank"]],
        "corrected": corrected.interaction,
        "correct_note": plan.info.get("correct_note"),
        "refined": (list(refined.bits.values()), refined.info["refine_loss"]),
        "refine_note": refined.info.get("refine_note"),
    }


def test_without_a_graph_every_stage_runs_whole_forwards() -> None:
    model, shape = tiny_vit()
    x = torch.randn(COUNT, *shape, generator=torch.Generator().manual_seed(1))
    graph, whole = stages(model, x), stages(Unexportable(model).eval(), x)
    for name in ("matrix", "corrected"):
        np.testing.assert_allclose(whole[name], graph[name], rtol=1e-3, atol=1e-5 * np.abs(graph[name]).max())
    assert whole["rows"] == pytest.approx(graph["rows"], rel=1e-4)
    assert whole["refined"][0] == graph["refined"][0]
    assert whole["refined"][1] == pytest.approx(graph["refined"][1], rel=1e-4)
    for name in ("correct_note", "refine_note"):
        assert graph[name] is None
        assert "whole forwards for every perturbation, since the model has no usable graph" in whole[name]


@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_other_clean_weights_are_those_of_a_stream_that_has_them(whole: bool) -> None:
    runner, variants, x = opened(whole)
    state = runner.start(x)
    for k, own in enumerate(variants):
        state = runner.fork(runner.advance(state, k), k, own[k % 2 : k % 2 + 1])
    wanted = runner.finish(state)[0]
    runner.rebase({k: own[k % 2] for k, own in enumerate(variants)})
    assert torch.allclose(runner.clean(runner.start(x)), wanted, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_carried_differences_forget_the_weights_they_began_with() -> None:
    plain, variants, x = opened(False, torch.float32)
    runner = in_precision(plain, "tf32")
    assert runner is not None
    runner.start(x)
    for one in (plain, runner):
        one.rebase({0: variants[0][0]})
    state = runner.start(x)
    wanted = plain.clean(plain.start(x))
    assert torch.equal(runner.clean(state), wanted)
    moved = runner.finish(runner.fork(runner.advance(state, 1), 1, variants[1][:1]))
    again = plain.finish(plain.fork(plain.advance(plain.start(x), 1), 1, variants[1][:1])) - wanted
    assert torch.allclose(moved, again, rtol=1e-2, atol=2e-3 * again.abs().max().item())


@pytest.mark.parametrize("whole", [False, True])
def test_layers_may_have_any_number_of_variants(whole: bool) -> None:
    with torch.no_grad():
        runner, variants, x = opened(whole)
        some = [own[: 1 + k % 3] for k, own in enumerate(variants)]
        branch = runner.fork(runner.advance(runner.start(x), 1), 1, variants[1][:2])
        state = runner.advance(branch, 2)

        def objective(end: Any) -> Tensor:
            return runner.finish(end).square().sum()

        every, ragged = (runner.products(state, given, objective) for given in (variants, some))
    rows = [3 * k + m for k, own in enumerate(some[2:]) for m in range(len(own))]
    assert ragged.shape == (sum(map(len, some[2:])), 2, 3)
    assert torch.allclose(ragged, every[rows], rtol=1e-9, atol=1e-12)
    shares = runner.slope_share([len(own) for own in some])
    assert len(shares) == runner.num_layers
    assert sorted(shares, reverse=True) == shares


@torch.no_grad()
def test_what_whole_forwards_cannot_tell() -> None:
    whole, variants, x = opened(True)
    assert in_precision(whole, "bfloat16") is None
    assert whole.only([0, 2]).rehearsed(lambda *_: None, [variants[0], variants[2]], x, 4) is None
    assert whole.sample_bytes is None
    assert [layer.name for layer in whole.only([0, 2]).layers] == [whole.layers[k].name for k in (0, 2)]


def test_what_fixes_the_batch_size_is_the_reason_that_is_told() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.query = nn.Linear(4, 4), nn.Parameter(torch.randn(1, 3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return (self.body(x)[:, None] + self.query.expand(len(x), -1, -1)).mean(1)

    note = open_runner(Fixed().eval(), torch.randn(3, 4), quantize_ends=True).note
    assert note is not None
    assert "specialized it to be a constant (2)" in note
    assert "TORCH_LOGS" not in note
