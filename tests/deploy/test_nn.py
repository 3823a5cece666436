"""Packed layers and latency tables."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import clado
from clado.deploy import time_layers, write_latency
from clado.nn import QuantConv2d, QuantLinear, pack_model, packed_bytes
from clado.solver import read_latency
from tests.models import random_plan, small_cnn, timm_model, tiny_vit


@pytest.mark.parametrize(
    ("name", "group_size", "symmetric"),
    [("vit", -1, True), ("vit", 5, False), ("cnn", 0, True), ("cnn", 5, True), ("mobilenetv3_small_100", 0, False)],
)
def test_packed_models_give_the_outputs_of_apply_from_the_predicted_bytes(
    name: str, group_size: int, symmetric: bool
) -> None:
    model, shape = tiny_vit() if name == "vit" else small_cnn() if name == "cnn" else timm_model(name)
    plan, x = random_plan(model, clado.Quantizer(group_size, 2, symmetric)), torch.randn(3, *shape)
    packed = pack_model(model, plan)
    with torch.no_grad():
        assert torch.equal(packed(x), clado.apply(model, plan)(x))
        assert torch.equal(copy.deepcopy(packed)(x), packed(x))
    assert packed_bytes(packed) == plan.size_bytes
    floats = {n for n, p in model.named_parameters()} - {n for layer in plan.layers for n in layer.names}
    assert {n for n, _ in packed.named_parameters()} == floats


def test_layers_keep_bias_stride_and_dtype() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="reflect").bfloat16()
    quantizer = clado.Quantizer()
    packed = QuantConv2d.from_float(conv, quantizer, 8)
    x = torch.randn(2, 4, 9, 9).bfloat16()
    float_copy = copy.deepcopy(conv)
    float_copy.weight.data = quantizer.fake_quant(conv.weight, (8,))[0]
    assert torch.equal(packed(x), float_copy(x))
    assert packed.weight.dtype == torch.bfloat16
    linear = nn.Linear(5, 7, bias=False)
    assert "weight_bits=4" in repr(QuantLinear.from_float(linear, quantizer, 4))
    with pytest.raises(clado.CladoError, match="source must have a parameter named weight, got ReLU"):
        QuantLinear.from_float(nn.ReLU(), quantizer, 4)


def test_latency_table_has_every_layer_and_width(tmp_path: Path) -> None:
    model, shape = small_cnn()
    x = torch.randn(3, *shape)
    sens = clado.profile(model, [x], bits=(2, 3, 8), estimator="diagonal", num_samples=2, verbose=False)
    before = {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
    table = time_layers(model, sens, x, repeats=2, verbose=False)
    assert before == {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
    assert list(table) == [layer.name for layer in sens.layers]
    assert all(set(row) == {2, 3, 8} and min(row.values()) > 0 for row in table.values())
    path = write_latency(table, tmp_path / "latency.csv")
    again = read_latency(path)
    assert again == {name: {b: pytest.approx(ms, rel=1e-5) for b, ms in row.items()} for name, row in table.items()}
    most = sum(max(row.values()) for row in table.values())
    plan = clado.solve(sens, latency_ms=most, latency=path)
    assert plan.usage["latency_ms"]["used"] <= most


def test_latency_of_a_weight_that_is_applied_by_a_function() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(nn.functional.linear(x, self.inner.weight))

    model = Functional().eval()
    x = torch.randn(2, 4)
    sens = clado.profile(model, [x], estimator="diagonal", num_samples=2, verbose=False)
    assert set(time_layers(model, sens, x, repeats=1, verbose=False)) == {"inner"}
    model.forward = lambda x: model.head(x)  # type: ignore[method-assign]
    with pytest.raises(clado.CladoError, match="model must run every layer, got none of inner"):
        time_layers(model, sens, x, verbose=False)
