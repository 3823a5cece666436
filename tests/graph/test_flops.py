"""Work is counted whatever enters a module: views of parameters too."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import clado
from clado.graph.flops import FlopCounter
from tests.models import tiny_vit

VIEWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "expand": lambda query, x: query.expand(len(x), -1, -1),
    "index": lambda query, x: query[0],
    "view": lambda query, x: query.view(4, 32),
    "transpose": lambda query, x: query.transpose(0, 1),
}


class Queries(nn.Module):
    """A module is called with a view of a parameter."""

    def __init__(self, view: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.view = VIEWS[view]
        self.embed, self.query = nn.Linear(12, 32), nn.Parameter(torch.randn(1, 4, 32))
        self.norm, self.mix, self.head = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.view(self.query, x)).reshape(-1, 4, 32)
        return self.head((self.mix(self.embed(x)).unsqueeze(1) * tokens).mean(1).relu())


def test_it_counts_what_torch_counts() -> None:
    model, shape = tiny_vit()
    x = torch.randn(3, *shape)
    with FlopCounter() as ours:
        model(x)
    with FlopCounterMode(display=False) as torchs:
        model.requires_grad_(False)(x)
    assert ours.get_total_flops() == torchs.get_total_flops() > 0


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_of_a_parameter_may_enter_a_module(view: str) -> None:
    """What is measured, and the work that is counted, are those of the same net without gradients."""
    x = torch.randn(8, 12)
    for estimator in ("diagonal", "corrected", "gradient"):
        sens, frozen = (
            clado.profile(net, [x], estimator=estimator, num_samples=8, quantize_ends=True, verbose=False)
            for net in (Queries(view).eval(), Queries(view).eval().requires_grad_(False))
        )
        assert [layer.name for layer in sens.layers] == ["embed", "mix", "head"]
        np.testing.assert_array_equal(sens.matrix, frozen.matrix)
        assert sens.info["forward_equivalents"] == frozen.info["forward_equivalents"] > 0


def test_every_stage_takes_a_view_of_a_parameter() -> None:
    net, x = Queries("expand").eval(), torch.randn(8, 12)
    options = {"num_samples": 8, "quantize_ends": True}
    assert clado.plan_run(net, [x], **options).forward_equivalents > 0
    sens = clado.profile(net, [x], **options, verbose=False)
    _, plan = clado.correct(net, [x], sens, num_samples=8, rounds=1, avg_bits=4.0, verbose=False)
    assert clado.refine(net, [x], sens, plan, rounds=1, avg_bits=4.0, verbose=False).bits
    assert clado.rerank(net, [x], [plan]).bits == plan.bits
