"""Other tools on our kernels: the real packages, as they are and inside ``clado.backend``, with the same outcome bit for bit."""

from __future__ import annotations

import copy
import math
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clado
from bench.harness import quiet
from bench.study.modelopt import integers, searched
from clado import CladoError
from clado.interop import BACKENDS
from clado.interop.backends import grid, prefixes
from clado.interop.backends.patches import Part, Used, put_in

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    mtq = pytest.importorskip("modelopt.torch.quantization", reason="NVIDIA ModelOpt is not installed")


class Small(nn.Module):
    """A grouped convolution, a block that is called twice, linear layers, a row of zeros and a ReLU in place."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.ReLU(inplace)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace)) for _ in range(4)))
        self.head = nn.Linear(8 * 64, 10)
        with torch.no_grad():
            self.conv.weight[3] = 0
            self.head.weight[0] *= 1e-9

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        x = self.body(self.grouped(x).flatten(2))
        return self.head(self.body(x).flatten(1))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(3, 3, 8, 8), torch.randint(0, 10, (3,))) for _ in range(count)]


def scales(model: nn.Module) -> dict[str, Tensor]:
    return {name: x for name, x in model.state_dict().items() if name.endswith("_amax")}


def auto_quantize(model: nn.Module, method: str, loader: Any, formats: list[dict[str, Any]]) -> dict[str, Any]:
    with quiet():
        found, state = searched(model, 4.0, formats, loader, method, num_score_steps=2, verbose=False)
    recipe = {name: str(chosen) for name, chosen in state["best"]["recipe"].items()}
    scores = {name: stats["scores"] for name, stats in state["candidate_stats"].items()}
    return {"recipe": recipe, "scores": scores, "scales": scales(found)}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("method", ["gradient", "kl_div"])
def test_auto_quantize_finds_the_same_recipe(method: str, model: nn.Module) -> None:
    """A loader that deals each batch once: calibration takes its share of them, though its forwards are left out."""
    formats = [integers(bits) for bits in (2, 4, 8)]
    wanted = auto_quantize(model, method, iter(batches(5)), formats)
    with clado.backend("modelopt") as used:
        got = auto_quantize(model, method, iter(batches(5)), formats)
    assert same(got, wanted)
    assert len(set(wanted["recipe"].values())) > 1
    assert used.ours["scale calibration"] == 3 * len(wanted["recipe"])
    assert used.ours["calibration forwards left out"] == 3
    assert (used.ours["parts of forwards skipped"] > 0) == (method == "kl_div")
    assert not used.left


def test_activations_that_are_quantized_or_changed_in_place() -> None:
    """Their quantizers are calibrated as before, and a part that is skipped gives what it gave before it was changed."""
    torch.manual_seed(0)
    model, formats = Small(inplace=True).eval(), [integers(2), integers(8)]
    formats[0]["quant_cfg"].append({"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}})
    wanted = auto_quantize(model, "kl_div", batches(), formats)
    with clado.backend("modelopt") as used:
        assert same(auto_quantize(model, "kl_div", batches(), formats), wanted)
    assert any("input_quantizer" in name for name in wanted["scales"])
    assert used.ours["calibration forwards left out"] == 1  # of the format that has none
    assert used.ours["parts of forwards skipped"] > 0


@pytest.mark.parametrize(
    ("config", "left"),
    [
        (integers(4), ""),
        (integers(3, narrow_range=True), ""),
        (integers(8, axis=None), ""),
        (integers(4, axis=None, block_sizes={-1: 16, "type": "static"}), ""),
        (integers(4, axis=1), "scales along another axis"),
        (integers(8, num_bits=(4, 3), axis=None), "no plain signed integers"),
        (integers(4) | {"algorithm": {"method": "mse", "step_size": 0.03, "stop_multiplier": 1.5}}, ""),
    ],
)
def test_quantize_finds_the_same_scales(config: dict[str, Any], left: str, model: nn.Module) -> None:
    own = model.bfloat16() if config["quant_cfg"][1]["cfg"]["num_bits"] == 4 else model
    with quiet():
        wanted = scales(mtq.quantize(copy.deepcopy(own), config))
        with clado.backend("modelopt") as used:
            got = scales(mtq.quantize(copy.deepcopy(own), config))
    assert wanted
    assert same(got, wanted)
    assert list(used.left) == ([f"scale calibration ({left})"] if left else [])
    assert bool(used.ours) != bool(left)


def test_near_ties_are_decided_by_the_tool(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors that are off by up to half the margin change nothing."""
    with quiet():
        wanted = scales(mtq.quantize(copy.deepcopy(model), integers(8)))
    exact = grid.scale_errors

    def off(*arguments: Any) -> Tensor:
        errors = exact(*arguments)
        return errors * (1 + grid.NEAR * (torch.rand(errors.shape) - 0.5) / 2)

    monkeypatch.setattr(grid, "scale_errors", off)
    with quiet(), clado.backend("modelopt"):
        assert same(scales(mtq.quantize(copy.deepcopy(model), integers(8))), wanted)


def test_brevitas_finds_the_same_scales() -> None:
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, groups=2))
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(6 * 36, 10))
    with torch.no_grad():
        model[0].weight[3] = 0
    with quiet():
        quant = pytest.importorskip("brevitas.quant", reason="Brevitas is not installed")
        from brevitas.graph.quantize import layerwise_quantize
        from brevitas.nn import QuantConv2d, QuantLinear

    def quantized(kind: Any) -> dict[str, Tensor]:
        settings = {"weight_quant": kind, "return_quant_tensor": False}
        layers = {nn.Linear: (QuantLinear, settings), nn.Conv2d: (QuantConv2d, settings)}
        with quiet(), torch.no_grad():
            made = layerwise_quantize(copy.deepcopy(model), layers)
            output = made(batches()[0][0])
        return made.state_dict() | {"output": output}

    for name, bits, ours in (
        ("Int8WeightPerChannelFloatMSE", 2, True),
        ("Int8WeightPerChannelFloatMSE", 8, True),
        ("Int8WeightPerTensorFloatMSE", 4, True),
        ("Int8WeightPerChannelFixedPointMSE", 4, True),
        ("ShiftedUint8WeightPerTensorFloatMSE", 4, False),
    ):
        kind = getattr(quant, name).let(bit_width=bits, narrow_range=bits != 4)
        wanted = quantized(kind)
        with clado.backend("brevitas") as used:
            got = quantized(kind)
        assert same(got, wanted), (name, bits)
        assert bool(used.ours) == ours
        assert bool(used.left) != ours


def replaced() -> list[Any]:
    from clado.interop.backends.modelopt_kernels import PARTS

    found = []
    for part in PARTS:
        owner: Any = sys.modules[part.module]
        for name in part.name.split("."):
            owner = vars(owner)[name]
        found.append(owner)
    return found


def test_everything_is_put_back(model: nn.Module) -> None:
    before = replaced()
    with clado.backend("modelopt") as used:
        with clado.backend("modelopt") as inner:
            assert inner is used
        assert replaced() != before  # the outer block is open
    assert replaced() == before

    own, formats = copy.deepcopy(model), [integers(2), integers(4)]

    def broken(module: nn.Module, batch: Any) -> Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), clado.backend("modelopt"), quiet():  # in the middle of its work
        mtq.auto_quantize(
            own,
            {"effective_bits": 4.0},
            quantization_formats=formats,
            data_loader=batches(),
            forward_step=broken,
            method="kl_div",
            num_calib_steps=1,
            num_score_steps=1,
        )
    assert replaced() == before
    assert not any("forward" in vars(module) for module in own.modules())


def test_unknown_tools_and_versions_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CladoError, match=r"^backend: tool must be one of brevitas, modelopt, got 'tensorrt'$"):
        clado.backend("tensorrt").__enter__()
    monkeypatch.setattr(BACKENDS["brevitas"], "package", "no-such-package")
    with pytest.raises(CladoError, match=r"^backend: no-such-package must be installed, got no such package$"):
        clado.backend("brevitas").__enter__()
    before = replaced()
    mse = sys.modules["modelopt.torch.quantization.calib.mse"]
    must = r"^backend: nvidia-modelopt must have modelopt\.torch\.quantization\.calib\.mse\.MseCalibrator\."

    def collect(self: Any, x: Tensor, weight: Tensor) -> None: ...

    with monkeypatch.context() as patch:
        patch.setattr(mse.MseCalibrator, "collect", collect)
        with pytest.raises(CladoError, match=must + r"collect\(self, x\), got .*, which takes \(self, x, weight\)$"):
            clado.backend("modelopt").__enter__()
        patch.delattr(mse.MseCalibrator, "_generate_candidates")
        patch.undo()
    with monkeypatch.context() as patch:
        patch.delattr(mse.MseCalibrator, "_generate_candidates")
        with pytest.raises(CladoError, match=must + r"_generate_candidates\(self, device\), got .*, which has none$"):
            clado.backend("modelopt").__enter__()
    assert replaced() == before
    with clado.backend("modelopt"):  # nothing is left of the refusals
        pass


def test_what_cannot_be_put_in_is_taken_out() -> None:
    room = types.ModuleType("room")
    room.first, room.second = (lambda x: x), (lambda x: -x)  # type: ignore[attr-defined]
    sys.modules["room"] = room
    first = room.first

    def fails(function: Callable[..., Any], used: Used) -> Callable[..., Any]:
        raise ArithmeticError

    parts = (Part("room", "first", ("x",), lambda f, used: lambda x: 2 * x), Part("room", "second", ("x",), fails))
    try:
        with pytest.raises(ArithmeticError):
            put_in("room", "1", parts, Used())
        assert room.first is first
        with put_in("room", "1", parts[:1], Used()):
            assert room.first(3) == 6
        assert room.first is first
        for part, message in (
            (Part("room", "third", ("x",)), "which has none"),
            (Part("rooms", "first", ("x",)), "which has none"),
            (Part("room", "__name__", ("x",)), "where it is no function"),
        ):
            with pytest.raises(CladoError, match=rf"got room 1, {message}$"):
                put_in("room", "1", (part,), Used())
    finally:
        del sys.modules["room"]


def test_a_tool_that_did_nothing_says_so() -> None:
    used = Used()
    assert str(used) == "on our kernels: nothing; as the tool has it: nothing"
    used.ours["search"] += 2
    used.left["search (dtype)"] += 1
    assert str(used) == "on our kernels: 2 × search; as the tool has it: 1 × search (dtype)"


def test_units_hold_each_layer_at_most_once() -> None:
    model = Small()
    layers = {module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    found = prefixes.units(model, layers)
    assert found == [model.conv, model.grouped, *model.body, model.head]
    deep = nn.Sequential(
        *(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(math.ceil(1 / prefixes.SHARE)))
    )
    layers = {module for module in deep.modules() if isinstance(module, nn.Linear)}
    assert prefixes.units(deep, layers) == list(deep)


def test_a_part_whose_arguments_cannot_be_compared_is_run() -> None:
    class Takes(nn.Module):
        def forward(self, x: Tensor, extra: object) -> Tensor:
            return x + 1

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.other = Takes(), nn.Linear(2, 2)

        def forward(self, x: Tensor, extra: object) -> Tensor:
            return self.other(self.part(x, extra))

    model, used, perturbed = Whole(), Used(), [False]
    parts = {model.part: lambda: True, model.other: lambda: not perturbed[0]}
    x = torch.randn(1, 2)
    with prefixes.shared(model, lambda: not perturbed[0], parts, used), torch.no_grad():
        for extra, skipped in ((object(), 0), (3, 1), (None, 1), ("a", 1)):
            used.ours.clear()
            perturbed[0] = False
            wanted = model(x, extra)
            perturbed[0] = True
            assert torch.equal(model(x, extra), wanted)
            assert used.ours["parts of forwards skipped"] == skipped
            assert torch.equal(model(x + 1, extra), model.other(x + 2))
    assert not any("forward" in vars(module) for module in model.modules())
