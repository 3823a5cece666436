"""Ranges of activations against a plain search; profiles under rounded inputs against a plain loop; plans that carry them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import clado
from clado.graph import open_runner
from clado.profiling import profile, sample_digests
from clado.quant import Call, Calls, Layer, calibrate, quantize_activations
from clado.quant.inputs import best_range, rounded
from tests.models import tiny_vit
from tests.record.nets import Unexportable


def plain_rounding(x: Tensor, low: float, high: float, bits: int) -> Tensor:
    """Codes 0 … 2^bits − 1, in float64."""
    scale = (high - low) / (2**bits - 1)
    zero = round(-low / scale)
    return (((x.double() / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_best_range_has_the_least_squared_error(bits: int, shift: float) -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)) + shift
    low, high = best_range(x, bits)
    assert low <= 0 <= high

    def error(pair: tuple[float, float]) -> float:
        return (plain_rounding(x, *pair, bits) - x).square().sum().item()

    ends = min(0.0, x.min().item()), max(0.0, x.max().item())
    tried = [(ends[0] * (1 - k / 100), ends[1] * (1 - k / 100)) for k in range(95)]
    # float32 rounding of x / scale may move a value that lies between two levels.
    assert error((low, high)) <= min(map(error, tried)) * (1 + 1e-4)


@pytest.mark.parametrize("value", [0.0, 2.0, -1.5])
def test_constant_tensors_stay_as_they_are(value: float) -> None:
    x = torch.full((7,), value)
    torch.testing.assert_close(rounded(x, *best_range(x, 8), 8), x, rtol=1e-6, atol=0)


def test_gradient_passes_where_nothing_is_clamped() -> None:
    x = torch.linspace(-1.97, 2, 41, requires_grad=True)
    y = rounded(x, -1.0, 1.0, 4)
    torch.testing.assert_close(y.double(), plain_rounding(x.detach(), -1.0, 1.0, 4), rtol=1e-6, atol=0)
    y.sum().backward()
    codes = x.detach().double() / (2 / 15)  # 16 levels: -8 … 7 with zero at code 8
    assert x.grad is not None
    assert torch.equal(x.grad > 0.5, (codes >= -8) & (codes <= 7))


@pytest.mark.parametrize("estimator", ["gradient", "logit"])
def test_other_estimators_and_carried_differences_take_rounded_inputs(estimator: str) -> None:
    model, shape = tiny_vit()
    x = torch.randn(6, *shape, generator=torch.Generator().manual_seed(1))
    options = {"bits": (2, 4), "act_bits": 8, "estimator": estimator, "num_samples": 6, "verbose": False}
    sens = profile(model, [x], **options)  # type: ignore[arg-type]
    assert not any("whole forwards" in text for text in sens.info["warnings"])
    assert np.abs(sens.interaction).max() > 0
    if estimator == "logit":
        carried = profile(model, [x], precision="tf32", **options)  # type: ignore[arg-type]
        # A value at the edge of two levels may fall to the other one: a step of 8 bits in a few places.
        np.testing.assert_allclose(carried.delta_loss, sens.delta_loss, rtol=0.2, atol=1e-3 * sens.delta_loss.max())


def test_profile_apply_and_rerank_under_rounded_inputs(tmp_path: Path) -> None:
    model, shape = tiny_vit()
    x = torch.randn(12, *shape, generator=torch.Generator().manual_seed(1))
    how: dict[str, Any] = {"estimator": "diagonal", "rounding": "nearest", "output_dir": tmp_path, "verbose": False}
    sens = profile(model, [x], bits=(2, 8), act_bits=4, **how)
    names = {layer.name for layer in sens.layers}
    assert set(sens.activations.ranges) == names
    assert not any("whole forwards" in text for text in sens.info["warnings"])  # the rounding is in the graph
    again = clado.Sensitivity.load(tmp_path)
    assert again.activations == sens.activations

    plan = clado.Plan.from_json(clado.solve(sens, avg_bits=8).to_json())
    assert plan.activations == sens.activations
    small = clado.apply(model, plan)
    inner = entered(small, x, {name: layer.name for layer in sens.layers for name in layer.names})
    assert set(inner) == names
    assert all(values.unique().numel() <= 16 for calls in inner.values() for values in calls)
    with torch.no_grad():
        out = small(x)
        # ΔL by the definition: one weight of a model with rounded inputs.
        base = quantize_activations(model, sens.activations, sens.layers)
        reference = base(x).double().log_softmax(-1)
        layer = sens.layers[3]
        weight = base.get_parameter(layer.names[0])
        weight.copy_(sens.quantizer.fake_quant(weight, (2,))[0])
        changed = base(x).double().log_softmax(-1)
    loss = (reference.exp() * (reference - changed)).sum(-1).mean().item()
    assert sens.delta_loss[3 * 2] == pytest.approx(loss, rel=1e-4)
    clado.export(model, plan, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(clado.load(tmp_path / "out", model)(x), out)
    best = clado.rerank(model, [x], [plan])
    gap = model(x).double().log_softmax(-1)
    measured = (gap.exp() * (gap - out.double().log_softmax(-1))).sum(-1).mean().item()
    assert best.info["rerank"][0]["loss_increase"] == pytest.approx(measured, rel=1e-4)
    with pytest.raises(clado.CladoError, match=r"act_bits must be None or lie in 2\.\.8, got 9"):
        profile(model, [x], act_bits=9, verbose=False)


def layers_of(model: nn.Module, x: Any) -> tuple[Layer, ...]:
    return open_runner(model, x).layers


def test_one_range_for_all_that_enters_a_layer_in_whatever_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2), nn.Linear(2, 2)).eval()
    batches = [(k + 1) * torch.rand(4, 3) - 0.5 for k in range(3)]
    layers = layers_of(model, batches[0])
    found = calibrate(model, batches, lambda m, x: m(x), layers)
    assert list(found.ranges) == ["0", "2"]  # the classifier's input stays float
    assert found == calibrate(model, batches[::-1], lambda m, x: m(x), layers)
    assert found.ranges["0"] == best_range(torch.cat(batches).flatten().sort().values, 8)


class Levels(nn.Module):
    """One layer on two levels of a pyramid, as a keyword, as a function, and through a part of a packed weight."""

    def __init__(self, large_first: bool) -> None:
        super().__init__()
        self.large_first = large_first
        self.head, self.packed, self.out = nn.Linear(6, 6), nn.Parameter(torch.randn(12, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        levels = [x, 40 * x][:: -1 if self.large_first else 1]
        y = self.head(input=levels[0]) + nn.functional.linear(levels[1], self.head.weight)
        first, second = self.packed.chunk(2)
        return self.out(nn.functional.linear(y, first) + y @ second.T)


def entered(model: nn.Module, x: Tensor, names: dict[str, str]) -> dict[str, list[Tensor]]:
    """What weights are applied to, by layer."""
    seen: dict[str, list[Tensor]] = {}

    def look(call: Call) -> Tensor:
        seen.setdefault(names[call.part.name], []).append(call.x)
        return call.of(call.x)

    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad(), Calls({name: parameters[name] for name in names}, look):
        model(x)
    return seen


@pytest.mark.parametrize("exportable", [True, False])
def test_inputs_are_rounded_wherever_a_weight_is_applied(exportable: bool) -> None:
    torch.manual_seed(0)
    x, found = torch.randn(16, 6), {}
    for large_first in (False, True):
        torch.manual_seed(1)
        model = Levels(large_first).eval() if exportable else Unexportable(Levels(large_first)).eval()
        sens = profile(model, [x], estimator="diagonal", bits=(8,), act_bits=4, num_samples=16, verbose=False)
        assert any("whole forwards" in text for text in sens.info["warnings"]) != exportable
        names = {name: layer.name for layer in sens.layers for name in layer.names}
        assert {name.removeprefix("inner.") for name in sens.activations.ranges} == {"head", "packed"}
        seen = entered(quantize_activations(model, sens.activations, sens.layers), x, names)
        assert {name: len(values) for name, values in seen.items()} == {n: 2 for n in sens.activations.ranges}
        assert all(value.unique().numel() <= 16 for values in seen.values() for value in values)
        found[large_first] = sens.activations.ranges
    assert found[False] == found[True]
    assert max(found[False].values())[1] > 20  # the larger level's values are not cut off


def test_a_part_that_is_called_by_itself_rounds_what_its_modules_are_given() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval(), torch.randn(9, 4)
    layers = layers_of(model, x)
    ranges = calibrate(model, [x], lambda m, part: m(part), layers, 3)
    rounding = quantize_activations(model, ranges, layers)
    wanted = model[0](rounded(x, *ranges.ranges["0"], 3))
    assert torch.equal(rounding[0](x), wanted)
    assert torch.equal(rounding[0](input=x), wanted)
    assert torch.equal(rounding(x), model[2](model[1](wanted)))


def test_what_rounding_inputs_costs_is_measured_and_said() -> None:
    model, shape = tiny_vit()
    x = torch.randn(12, *shape, generator=torch.Generator().manual_seed(1))
    sens = profile(model, [x], estimator="diagonal", bits=(8,), act_bits=3, num_samples=12, verbose=False)
    with torch.no_grad():
        p, q = (
            m(x).double().log_softmax(-1) for m in (model, quantize_activations(model, sens.activations, sens.layers))
        )
    lost = (p.exp() * (p - q)).sum(-1)
    noted = sens.info["activation_loss"]
    assert noted["mean"] == pytest.approx(lost.mean().item(), rel=1e-4)
    assert noted["stderr"] == pytest.approx(lost.std().item() / 12**0.5, rel=1e-3)
    assert any(
        f"rounding inputs to 3 bits raises the loss by {lost.mean():.3g}" in text for text in sens.info["warnings"]
    )


class Ends(torch.utils.data.IterableDataset[Tensor]):
    """A stream: it cannot be asked for a sample again."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.x)


@pytest.mark.parametrize("streamed", [False, True])
def test_so_many_samples_calibrate_and_all_are_measured(streamed: bool, tmp_path: Path) -> None:
    model, shape = tiny_vit()
    x = torch.randn(24, *shape, generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(Ends(x) if streamed else x, batch_size=5)  # type: ignore[arg-type, var-annotated]
    options: dict[str, Any] = {
        "estimator": "diagonal",
        "bits": (2, 8),
        "act_bits": 4,
        "batch_size": 4,
        "verbose": False,
    }
    some, every = (profile(model, loader, num_samples=24, act_samples=n, **options) for n in (17, None))
    for sens, count in ((some, 17), (every, 24)):
        wanted = calibrate(model, x[:count].split(8), lambda m, part: m(part), sens.layers, 4)
        assert sens.activations == wanted
        assert torch.equal(torch.from_numpy(sens.sample_digests), sample_digests(x))
    # A run that is prolonged keeps the ranges it began with.
    short = profile(model, loader, num_samples=16, output_dir=tmp_path, **options)
    long = profile(model, loader, num_samples=24, output_dir=tmp_path, **options)
    assert long.num_samples == 24
    wanted = calibrate(model, x[:16].split(8), lambda m, part: m(part), short.layers, 4)
    assert long.activations == short.activations == wanted
