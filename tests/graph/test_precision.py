"""Models of several dtypes run in the one that holds all, whatever their forward casts to."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import clado
from clado.graph import common_dtype, converted


class Mixed(nn.Module):
    """A body in half precision, a norm and a head in float32, casts between."""

    def __init__(self, half: torch.dtype, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16)).to(half)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 10)
        self.half_, self.how = half, how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "weight":
            x = x.to(self.body[0].weight.dtype)
        elif self.how == "to":
            x = x.to(dtype=self.half_)
        elif self.how == "method":
            x = x.half() if self.half_ == torch.float16 else x.bfloat16()
        elif self.how == "made":
            x = x.to(self.half_) + torch.zeros(12, dtype=self.half_)
        return self.head(self.norm(self.body(x).float()).relu())


def test_the_dtype_that_holds_all() -> None:
    assert common_dtype(nn.Linear(2, 2).half()) == torch.float16
    assert common_dtype(nn.Sequential(nn.Linear(2, 2).half(), nn.Linear(2, 2).bfloat16())) == torch.float32
    assert common_dtype(nn.Sequential(nn.Linear(2, 2).half(), nn.Linear(2, 2).double())) == torch.float64


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["weight", "to", "method", "made", "given"])
def test_a_model_of_several_dtypes_goes_through_every_stage(how: str, half: torch.dtype) -> None:
    """The matrix is that of a float32 model with the same weights and quantized weights."""
    net, x = Mixed(half, how).eval(), torch.randn(24, 12).to(half).float()
    given = x.to(half) if how == "given" else x
    plain = copy.deepcopy(net).float()
    plain.how = "given"
    with torch.no_grad():
        assert torch.equal(converted(net, x.device, torch.float32)(given), plain(x))
    options = {"estimator": "exact", "num_samples": 24, "quantize_ends": True, "verbose": False}
    sens = clado.profile(net, [given], **options)
    assert [layer.name for layer in sens.layers] == ["body.0", "body.2", "head"]
    plan = clado.solve(sens, avg_bits=4)
    quantized = clado.apply(net, plan)
    with torch.no_grad():
        logs = plain(x).double().log_softmax(1)
        others = copy.deepcopy(plain)
        others.load_state_dict(quantized.state_dict())
        wanted = (logs.exp() * (logs - others(x).double().log_softmax(1))).sum(1).mean().item()
    assert clado.rerank(net, [given], [plan]).info["rerank"][0]["loss_increase"] == pytest.approx(wanted, rel=1e-3)
    logit = clado.profile(net, [given], **{**options, "estimator": "logit"})
    np.testing.assert_allclose(np.diag(logit.matrix), np.diag(sens.matrix), rtol=0.5)
    refined = clado.refine(net, [given], logit, plan, rounds=1, avg_bits=4.0, verbose=False)
    assert set(refined.bits) == set(plan.bits)
    assert quantized(given).dtype == torch.float32


def test_casts_end_with_the_forward_and_where_it_raises() -> None:
    net, x = converted(Mixed(torch.float16, "method").eval(), torch.device("cpu"), torch.float32), torch.randn(2, 12)
    assert net(x).dtype == x.half().float().dtype
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 5))
    assert x.half().dtype == torch.float16
    assert copy.deepcopy(net)(x).equal(net(x))


def test_latency_of_float_images_on_a_half_model() -> None:
    net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).eval().bfloat16()
    x = torch.randn(4, 12)
    sens = clado.profile(net, [x], estimator="diagonal", num_samples=4, quantize_ends=True, verbose=False)
    table = clado.time_layers(net, sens, x, repeats=1, verbose=False)
    assert list(table) == ["0", "2"]
    with pytest.raises(clado.CladoError, match=r"latency: model must take inputs \(4, 5\), got RuntimeError: "):
        clado.time_layers(net, sens, torch.randn(4, 5), repeats=1, verbose=False)
