"""Carried differences against float64, whatever the graph; the probe and its fall back to float32."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import clado
from clado.graph import Runner, carried_rules
from clado.graph.capture import Captured, capture
from clado.graph.carried import CarriedExecutor
from clado.graph.executor import Executor
from clado.profiling import ESTIMATORS, profile
from clado.profiling.estimators.base import singles
from clado.profiling.losses import Categorical
from clado.profiling.probe import auto_precision
from clado.quant import Candidates, Quantizer, Variant
from clado.quant import variants as variants_of
from tests.models import Shape, lively, small_cnn, timm_model, tiny_vit
from tests.profiling.test_estimators import BITS, TwoHeads
from tests.profiling.test_profile import net_and_data, relative


class Mixture(nn.Module):
    """What has a rule of its own, and what has none: masked attention, gates, divisions, pooling, a sort, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 2, stride=2)
        self.qkv = nn.Linear(8, 24)
        self.gate, self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.mix.weight
        self.register_buffer("mask", torch.tril(torch.ones(16, 16, dtype=torch.bool)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(self.embed(x), (0, 0, 0, 0), value=1.0).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        heads = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=self.mask)
        x = x - 0.5 * y.transpose(1, 2).flatten(2)
        x = x * torch.sigmoid(self.gate(x)) + (x @ x.transpose(1, 2) / 16) @ x / (1 + x.mean(1, keepdim=True).square())
        x = torch.nn.functional.silu(self.mix(x)) + x[:, :1]
        x = x.sort(dim=1)[0].roll(1, 1)
        x = torch.nn.functional.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2)
        return self.head(self.again(x).amax(1))


def net(name: str) -> tuple[nn.Module, Shape]:
    if name == "mixture":
        torch.manual_seed(0)
        return lively(Mixture()).eval(), (1, 8, 8)
    return {"vit": tiny_vit, "cnn": small_cnn}.get(name, lambda: timm_model(name))()


def deltas(executor: Runner, variants: Any, x: Tensor) -> Tensor:
    return singles(executor, variants, x, Categorical(), lambda: None).delta


def setting(name: str) -> tuple[Captured, list[list[Variant]], Tensor, Tensor]:
    """Graph, weights, inputs, and δ in float64."""
    model, shape = net(name)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(5))
    captured = some_layers(capture(model, x[:2], quantize_ends=True))
    variants = variants_of(
        model, Candidates.uniform(captured.layers, (2, 4, 8)), Quantizer(-1, 1), x.device, torch.float32
    )
    double = Executor(some_layers(capture(copy.deepcopy(model).double(), x[:2].double(), quantize_ends=True)))
    return captured, variants, x, deltas(double, [[w.to(torch.float64) for w in v] for v in variants], x.double())


def some_layers(captured: Captured) -> Captured:
    """About a dozen layers are enough, of a deep net."""
    step = 1 + len(captured.layers) // 12
    return replace(captured, layers=captured.layers[::step], sources=captured.sources[::step])


def worst(delta: Tensor, wanted: Tensor) -> list[float]:
    """Relative error of the worst candidate at each bit-width."""
    errors = (delta.double() - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    return [errors[m::3].max().item() for m in range(3)]


# Carried products (docs/numerics.md), with room for the worst candidate: rounding is relative to δ, so 8 bits are as right as 2.
LIMITS = {"float32": 3e-4, "tf32": 3e-3, "bfloat16": 2e-2}


@pytest.mark.parametrize("name", ["vit", "cnn", "mixture", "resnet18", "swin_tiny_patch4_window7_224"])
@torch.no_grad()
def test_differences_are_right_at_every_width(name: str) -> None:
    captured, variants, x, wanted = setting(name)
    plain = worst(deltas(Executor(captured), variants, x.clone()), wanted)
    for precision, limit in LIMITS.items():
        errors = worst(deltas(CarriedExecutor(captured, precision), variants, x), wanted)
        # The mixture's sort, maximum and gates have no rule: f(x + d) − f(x) rounds relative to x, as a plain forward does.
        assert max(errors) < (max(2 * limit, 2e-3) if name == "mixture" else limit), (precision, errors)
        if precision == "float32" and name != "mixture":
            assert errors[2] < plain[2]  # carried float32 beats a plain forward where the change is small


@torch.no_grad()
def test_what_nobody_reads_any_more_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    captured, variants, x, _ = setting("vit")
    executor = CarriedExecutor(captured, "tf32").only([0])
    last, seen = executor.cuts.last_uses(), []
    whole = CarriedExecutor._difference

    def watched(self: CarriedExecutor, node: Any, at: Any, overrides: Any) -> Any:
        seen.append(node)
        assert all(last[held] >= captured.nodes.index(node) for held in at.d)
        return whole(self, node, at, overrides)

    monkeypatch.setattr(CarriedExecutor, "_difference", watched)
    deltas(executor, variants, x)
    assert len(seen) > 40  # one segment holds most of the net


@torch.no_grad()
def test_a_residual_sum_with_its_norm_gives_the_bits_of_both_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    captured, variants, x, _ = setting("vit")
    calls, fuse = [], carried_rules.add_and_norm

    def watched(*given: Any) -> Any:
        calls.append(fuse(*given))
        return calls[-1]

    monkeypatch.setattr(carried_rules, "add_and_norm", watched)
    together = deltas(CarriedExecutor(captured, "bfloat16"), variants, x)
    assert sum(found is not None for found in calls) > len(captured.layers)
    monkeypatch.setattr(carried_rules, "add_and_norm", lambda *a: None)
    apart = deltas(CarriedExecutor(captured, "bfloat16"), variants, x)
    assert torch.equal(together, apart)


@pytest.mark.parametrize("name", ["vit", "mixture"])
@torch.no_grad()
def test_pairs_and_tied_weights_carry_too(name: str) -> None:
    captured, variants, x, _ = setting(name)
    wanted = ESTIMATORS["exact"].run(Executor(captured), variants, x, Categorical(), lambda: None)
    for precision, limit in (("float32", 1e-3), ("tf32", 3e-2)):
        got = ESTIMATORS["exact"].run(CarriedExecutor(captured, precision), variants, x, Categorical(), lambda: None)
        assert relative(got.pair.numpy(), wanted.pair.numpy()) < limit


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_a_low_precision_run_reports_its_probe_and_agrees_with_float64(precision: str) -> None:
    model, x, _ = net_and_data("vit")
    sens, again, wanted = (
        profile(model, [x], precision=name, batch_size=5, num_samples=24, rounding="nearest", verbose=False)
        for name in (precision, precision, "float64")
    )
    assert sens.info["precision"] == precision
    assert sens.info["warnings"] == []
    probe = sens.info["probe"]
    assert probe["samples"] == 4
    assert max(probe["delta_error"]) < LIMITS[precision]
    assert probe["loss_error"] <= probe["loss_noise"]
    assert relative(sens.delta_loss, wanted.delta_loss) < 2 * LIMITS[precision]
    assert relative(sens.interaction, wanted.interaction) < 2 * LIMITS[precision]
    assert np.array_equal(sens.interaction, again.interaction)
    assert sens.info["forward_equivalents"] == pytest.approx(wanted.info["forward_equivalents"], rel=0.05)


def test_errors_beyond_the_sampling_noise_give_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = net_and_data("vit", 6)
    plain = profile(model, [x], batch_size=6, verbose=False)
    round_all = lambda self, t: torch.sign(t).bfloat16()  # noqa: E731  a precision worse than the noise of six samples
    monkeypatch.setattr("clado.graph.precision.Precision.operand", round_all)
    sens = profile(model, [x], precision="bfloat16", batch_size=6, verbose=False)
    assert sens.info["precision"] == "float32"
    assert "float32 instead of bfloat16: the probe's error" in sens.info["warnings"][0]
    assert np.array_equal(sens.interaction, plain.interaction)


def test_users_losses_and_several_outputs_carry() -> None:
    torch.manual_seed(0)
    model = lively(TwoHeads()).eval()
    batch = {"image": torch.randn(5, 1, 6, 6), "gain": torch.rand(5) + 0.5, "boxes": torch.randn(5, 4)}

    def run(precision: str) -> clado.Sensitivity:
        return profile(
            model,
            [batch],
            BITS,
            estimator="exact",
            precision=precision,
            loss_func=lambda out, b: (out["boxes"] - b["boxes"]).square().sum(-1),
            forward_step=lambda m, b: m(b["image"], b["gain"]),
            verbose=False,
        )

    low, high = run("tf32"), run("float64")
    assert low.info["precision"] == "tf32"
    assert relative(low.delta_loss, high.delta_loss) < 1e-2


def test_auto_is_bfloat16_where_units_and_estimator_bear_it() -> None:
    model, x, _ = net_and_data("vit")
    cpu = torch.device("cpu")
    assert auto_precision(cpu, "gradient") == auto_precision(cpu, "exact") == "float32"
    chosen, auto = (
        profile(model, [x], BITS, precision=name, num_samples=24, verbose=False)
        for name in (auto_precision(cpu, "additive"), "auto")
    )
    assert np.array_equal(chosen.interaction, auto.interaction)


def test_a_backward_carries_no_differences() -> None:
    model, x, _ = net_and_data("vit", 4)
    with pytest.raises(clado.CladoError, match="precision must be float32 or float64 for the gradient estimator"):
        profile(model, [x], estimator="gradient", precision="bfloat16", verbose=False)
