"""Plans as other tools take them: what those tools then did to each layer, read off their own modules."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import clado
from clado.cli import main
from clado.interop import recipes
from clado.quant import Quantizer
from tests.models import random_plan, tiny_vit


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_vit()[0]


def some(model: nn.Module, quantizer: Quantizer, bits: tuple[int, ...] = (2, 4, 8)) -> clado.Plan:
    """A plan that leaves the classifier and the patch embedding in float."""
    plan = random_plan(model, quantizer, bits)
    layers = tuple(layer for layer in plan.layers if layer.name.startswith("blocks"))
    return replace(plan, layers=layers, schemes={layer.name: plan.bits[layer.name] for layer in layers})


@pytest.mark.parametrize(("group_size", "symmetric"), [(-1, True), (8, False), (20, True)])
def test_torchao_quantizes_every_layer_at_its_width(model: nn.Module, group_size: int, symmetric: bool) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    from torchao.core.config import config_from_dict

    plan = some(model, Quantizer(group_size, symmetric=symmetric), tuple(range(2, 9)))
    config = recipes.torchao(plan)
    written = json.loads(json.dumps(recipes.torchao_json(plan)))
    assert config_from_dict(written).fqn_to_config == config.fqn_to_config
    quantized = copy.deepcopy(model)
    torchao.quantize_(quantized, config, filter_fn=None)
    for layer in plan.layers:
        weight = quantized.get_submodule(layer.name).weight
        assert weight.target_dtype == getattr(torch, f"int{plan.bits[layer.name]}")
        columns = layer.shape[1]
        wanted = columns if group_size == -1 else {8: 8, 20: 4}[group_size]
        assert weight.block_size == (1, wanted)
        assert symmetric == (not weight.zero_point.any())
    assert type(quantized.head.weight) is nn.Parameter
    with torch.no_grad():
        assert quantized(torch.randn(2, 1, 8, 8)).isfinite().all()


def test_quanto_quantizes_every_layer_at_its_width(model: nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    plan = some(model, Quantizer())
    quantized = copy.deepcopy(model)
    for call in recipes.quanto(plan):
        quanto.quantize(quantized, **call)
    for layer in plan.layers:
        assert quantized.get_submodule(layer.name).weight_qtype.bits == plan.bits[layer.name]
    assert type(quantized.head) is nn.Linear
    with pytest.raises(clado.CladoError, match="plan must keep to 2, 4 and 8 bits for quanto, got 3 bits"):
        recipes.quanto(some(model, Quantizer(), (3, 4)))


@pytest.mark.parametrize("group_size", [-1, 8])
def test_modelopt_quantizes_every_layer_at_its_width(model: nn.Module, group_size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modelopt = pytest.importorskip("modelopt.torch.quantization")
    plan = some(model, Quantizer(group_size), tuple(range(2, 9)))
    quantized = modelopt.quantize(copy.deepcopy(model), recipes.modelopt(plan))
    for layer in plan.layers:
        quantizer = quantized.get_submodule(layer.name).weight_quantizer
        assert quantizer.is_enabled
        assert quantizer.num_bits == plan.bits[layer.name]
        assert (quantizer.block_sizes or {}).get(-1) == (None if group_size == -1 else 8)
        assert not quantized.get_submodule(layer.name).input_quantizer.is_enabled
    assert not quantized.head.weight_quantizer.is_enabled


def test_plain_json_and_the_command_line(model: nn.Module, tmp_path: Path) -> None:
    plan = some(model, Quantizer(8))
    plan.save(tmp_path)
    shown = CliRunner().invoke(main, ["recipe", str(tmp_path)])
    assert json.loads(shown.stdout) == {"bits": plan.bits, "group_size": 8, "symmetric": True}
    out = tmp_path / "quanto.json"
    assert CliRunner().invoke(main, ["recipe", str(tmp_path), "--tool", "quanto", "--out", str(out)]).exit_code == 0
    assert json.loads(out.read_text()) == recipes.quanto(plan)
    plan = replace(plan, schemes={}, status="infeasible")
    with pytest.raises(clado.CladoError, match="hold bits for every layer, got a plan that is infeasible"):
        recipes.plain(plan)
