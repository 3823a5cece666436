"""Plans as other tools take them: what those tools then did to each layer, read off their own modules."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    with pytest.raises(clado.CladoError, match=r"keep to 2, 4 and 8 bits, fp8 and .* for quanto, got 3 bits of blocks"):
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


def schemed(model: nn.Module, *labels: str, group_size: int = -1) -> clado.Plan:
    """Schemes in turn on the layers of :func:`some`."""
    plan = some(model, Quantizer(group_size))
    return replace(plan, schemes={layer.name: labels[k % len(labels)] for k, layer in enumerate(plan.layers)})


@pytest.mark.parametrize("group_size", [-1, 0, 8])
def test_torchao_has_a_config_for_schemes(model: nn.Module, group_size: int) -> None:
    """What runs on CPUs is run; what wants a GPU is read off its config."""
    torchao = pytest.importorskip("torchao.quantization")
    from torchao.core.config import config_from_dict

    labels = ("W8A8_DYNAMIC", "W4A8_DYNAMIC", "FP8A16", "FP8_E5M2A16", "BF16", "NVFP4A16", "W4A16")
    plan = schemed(model, *labels, group_size=group_size)
    config = recipes.torchao(plan)
    written = json.loads(json.dumps(recipes.torchao_json(plan)))
    assert config_from_dict(written).fqn_to_config == config.fqn_to_config
    quantized = copy.deepcopy(model).bfloat16()
    torchao.quantize_(quantized, config, filter_fn=None)
    found = {name: quantized.get_submodule(name).weight for name in plan.schemes}
    kinds = {plan.schemes[name]: type(weight).__name__ for name, weight in found.items()}
    per_channel = "Int8Tensor" if group_size <= 0 else "IntxUnpackedToInt8Tensor"
    assert kinds == {
        "W8A8_DYNAMIC": per_channel,
        "W4A8_DYNAMIC": "IntxUnpackedToInt8Tensor",
        "FP8A16": "Float8Tensor",
        "FP8_E5M2A16": "Float8Tensor",
        "BF16": "Parameter",
        "NVFP4A16": "NVFP4Tensor",
        "W4A16": "IntxUnpackedToInt8Tensor",
    }
    inputs = {plan.schemes[name]: getattr(weight, "activation_quantization", None) for name, weight in found.items()}
    assert (inputs["W4A8_DYNAMIC"], inputs["W4A16"]) == ("int8_asym_per_token", None)
    with torch.no_grad():
        assert quantized(torch.randn(2, 1, 8, 8).bfloat16()).isfinite().all()
    plan = schemed(model, "FP8_DYNAMIC", "MXFP8", "MXFP4", "NVFP4")
    configs = recipes.torchao(plan).fqn_to_config
    made = {plan.schemes[name]: config for name, config in configs.items()}
    assert {label: type(config).__name__.split("Dynamic")[0] for label, config in made.items()} == {
        "FP8_DYNAMIC": "Float8",
        "MXFP8": "MX",
        "MXFP4": "MX",
        "NVFP4": "NVFP4",
    }
    assert (made["MXFP8"].weight_dtype, made["MXFP4"].activation_dtype) == (
        torch.float8_e4m3fn,
        torch.float4_e2m1fn_x2,
    )
    assert config_from_dict(json.loads(json.dumps(recipes.torchao_json(plan)))).fqn_to_config == configs


def test_modelopt_has_a_quantizer_for_weights_and_inputs_of_schemes(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modelopt = pytest.importorskip("modelopt.torch.quantization")
    x = torch.randn(2, 1, 8, 8)
    # Blocks want CUDA when they run: no forward here.
    plan = schemed(model, "W8A8", "W4A8_DYNAMIC", "FP8", "FP8_DYNAMIC", "BF16", "W4AFP8", "BF16A8", "W3A4")
    quantized = modelopt.quantize(copy.deepcopy(model), recipes.modelopt(plan), forward_loop=lambda net: net(x))
    static, token = {"axis": None, "_dynamic": False}, {"axis": None, "_dynamic": True}
    wanted: dict[str, tuple[Any, Any]] = {
        "W8A8": (8, {"num_bits": 8, **static}),
        "W4A8_DYNAMIC": (4, {"num_bits": 8, **token}),
        "FP8": ((4, 3), {"num_bits": (4, 3), **static}),
        "FP8_DYNAMIC": ((4, 3), {"num_bits": (4, 3), **token}),
        "BF16": (None, None),
        "W4AFP8": (4, {"num_bits": (4, 3), **token}),
        "BF16A8": (None, {"num_bits": 8, **static}),
        "W3A4": (3, {"num_bits": 4, **static}),
    }
    for name, label in plan.schemes.items():
        module, (bits, input) = quantized.get_submodule(name), wanted[label]
        assert (module.weight_quantizer.num_bits if module.weight_quantizer.is_enabled else None) == bits, label
        assert module.input_quantizer.is_enabled == (input is not None), label
        if input is not None:
            assert module.input_quantizer.num_bits == input["num_bits"], label
            assert module.input_quantizer._dynamic == input["_dynamic"], label
            assert input["_dynamic"] or module.input_quantizer.amax.numel() == 1, label
    with torch.no_grad():
        assert quantized(x).isfinite().all()
    presets = {"MXFP8": "MXFP8_DEFAULT_CFG", "MXFP4": "MXFP4_DEFAULT_CFG", "NVFP4": "NVFP4_DEFAULT_CFG"}
    presets |= {"FP8_DYNAMIC": "FP8_PER_CHANNEL_PER_TOKEN_CFG"}
    plan = schemed(model, *presets)
    for label, preset in presets.items():
        name = next(name for name, own in plan.schemes.items() if own == label)
        ours = {e["quantizer_name"].split(".")[-1]: e for e in recipes.modelopt(plan)["quant_cfg"] if name in str(e)}
        held = {e["quantizer_name"]: e for e in getattr(modelopt, preset)["quant_cfg"]}
        for part in ("weight_quantizer", "input_quantizer"):
            own = {k: v for k, v in held[f"*{part}"]["cfg"].items() if k != "effective_bits"}
            assert {"axis": own.get("axis"), **ours[part]["cfg"]} == {"axis": None, **own}


def test_quanto_takes_floats_and_static_inputs(model: nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    plan = schemed(model, "W8A8", "FP8", "W4A16", "BF16", "FP8_E5M2A16")
    quantized = copy.deepcopy(model)
    for call in recipes.quanto(plan):
        quanto.quantize(quantized, **call)
    kinds = {"W8A8": ("qint8", "qint8"), "FP8": ("qfloat8_e4m3fn", "qfloat8_e4m3fn"), "W4A16": ("qint4", None)}
    kinds |= {"FP8_E5M2A16": ("qfloat8_e5m2", None)}
    for name, label in plan.schemes.items():
        module = quantized.get_submodule(name)
        if label == "BF16":
            assert type(module) is nn.Linear
            continue
        got = module.weight_qtype.name, None if module.activation_qtype is None else module.activation_qtype.name
        assert got == kinds[label]


def test_what_a_tool_has_no_word_for_is_refused_by_name(model: nn.Module) -> None:
    first = "blocks.0.attn.qkv"
    for tool, labels in {
        "torchao": ("W8A8", "FP8", "W4AFP8", "MXFP4A16", "BF16A8", "W4A4_DYNAMIC", "FP8_E5M2"),
        "modelopt": ("FP8_E5M2A16", "W8AFP8_E5M2", "W8A12"),
        "quanto": ("W3A16", "NVFP4A16", "W8A8_DYNAMIC", "BF16A8"),
    }.items():
        for label in labels:
            shown = "3 bits" if label == "W3A16" else label
            with pytest.raises(
                clado.CladoError, match=f"recipe: plan must keep to .* for {tool}.*, got {shown} of {first}"
            ):
                recipes.RECIPES[tool](schemed(model, label))
    plan = random_plan(model, Quantizer(), (8,))
    every = {layer.name: "MXFP8" if layer.kind == "conv2d" else "W8A16" for layer in plan.layers}
    for tool in ("torchao", "modelopt"):
        with pytest.raises(clado.CladoError, match=r"on Linear layers.*, got MXFP8 of patch_embed.proj$"):
            recipes.RECIPES[tool](replace(plan, schemes=every))
    head = replace(plan, layers=plan.layers[-1:], schemes={"head": "FP8_DYNAMIC"})
    with pytest.raises(clado.CladoError, match=r"of sizes that 16 divides\), got FP8_DYNAMIC of head$"):
        recipes.torchao(head)
    told = recipes.plain(schemed(model, "FP8", "W4A16"))
    assert (told["bits"][first], told["schemes"][first]) == (8, "FP8")


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
