"""Candidates that round their layer's input: against dull oracles on every executor, in whatever order, through every budget."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import clado
from clado.artifacts import Sensitivity
from clado.cli import fields
from clado.nn import pack_model
from clado.quant import ActivationRanges, Calls, InputRounding, Scheme
from tests.models import lively
from tests.record.nets import Unexportable

SCHEMES = ("W4A16", "W4A8", "W8A4", "W8A8_DYNAMIC")
HOW: dict[str, Any] = {
    "rounding": "nearest",
    "num_samples": 6,
    "quantize_ends": True,
    "verbose": False,
    "scale_steps": 1,
}


class Branches(nn.Module):
    """A value with two readers that are layers and one that is none, a convolution, and a weight that is applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.left, self.right = nn.Linear(6, 8), nn.Linear(6, 8, bias=False)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2).relu()
        y = self.left(x) * self.right(x).sigmoid() + x.sum(-1, keepdim=True)
        y = self.twice(self.twice(y).tanh() + y)
        return self.head(y.mean(1))


NAMES = ["conv", "left", "right", "twice", "head"]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(3)
    return lively(Branches()).eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(4))


def dull(x: Tensor, input: str, pair: tuple[float, float] | None, conv: bool) -> Tensor:
    """An input in a format, in as many words as it takes."""
    if input == "":
        return x
    if input in ("int4", "int8"):
        assert pair is not None
        levels = 2 ** int(input[3:]) - 1
        scale = (pair[1] - pair[0]) / levels
        zero = round(-pair[0] / scale)
        return ((x / scale).round() + zero).clamp(0, levels).sub(zero) * scale
    rows = x.reshape(len(x), -1) if conv else x.reshape(-1, x.shape[-1])
    made = []
    for row in rows:
        largest = row.abs().max().item() or 1.0
        if input == "int8_dynamic":
            scale = largest / 127.5
            made.append((row / scale).round().clamp(-128, 127) * scale)
        else:
            scale = largest / 448
            made.append((row / scale).float().to(torch.float8_e4m3fn).to(x.dtype) * scale)
    return torch.stack(made).view(x.shape)


@contextmanager
def under(
    net: nn.Module, sens: Sensitivity, choice: dict[str, Scheme], dtype: torch.dtype = torch.float64
) -> Iterator[nn.Module]:
    """A net whose layers of a choice have quantized weights and round what they are given, by hand."""
    made = copy.deepcopy(net).to(dtype)
    for name, scheme in choice.items():
        layer = made.get_submodule(name)
        weight = net.get_submodule(name).weight
        layer.weight.data = sens.quantizer.fake_quant(weight, (scheme.bits,))[0].to(dtype)
        pair = None if sens.activations is None else sens.activations.of(name, scheme.input)

        def before(module: nn.Module, args: Any, scheme: Scheme = scheme, pair: Any = pair) -> Any:
            return dull(args[0], scheme.input, pair, isinstance(module, nn.Conv2d))

        layer.register_forward_pre_hook(before)
    yield made


@torch.no_grad()
def by_definition(net: nn.Module, sens: Sensitivity, x: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """ΔL and Ω under KL: float64, a forward per candidate and per pair."""
    clean = copy.deepcopy(net).double()(x.double()).log_softmax(-1)

    def loss(*chosen: int) -> float:
        flat, names = sens.candidates.flat, [sens.layers[k].name for k in sens.candidates.layer_of]
        with under(net, sens, {names[v]: flat[v] for v in chosen}) as made:
            out = made(x.double()).log_softmax(-1)
        return (clean.exp() * (clean - out)).sum(-1).mean().item()

    count = len(sens.candidates)
    single = np.array([loss(v) for v in range(count)])
    pairs = np.zeros((count, count))
    for v in range(count):
        for w in range(v + 1, count):
            if not sens.candidates.same_layer[v, w]:
                pairs[v, w] = pairs[w, v] = loss(v, w) - single[v] - single[w]
    return single, pairs


def near(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Relative error, in the Frobenius norm."""
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="module")
def exact(net: nn.Module, x: Tensor) -> Sensitivity:
    return clado.profile(net, [x], schemes=SCHEMES, estimator="exact", precision="float64", **HOW)


@pytest.fixture(scope="module")
def wanted(net: nn.Module, x: Tensor, exact: Sensitivity) -> tuple[NDArray[Any], NDArray[Any]]:
    return by_definition(net, exact, x)


def test_every_entry_is_that_of_the_definition(exact: Sensitivity, wanted: tuple[NDArray[Any], NDArray[Any]]) -> None:
    """Other readers of a rounded value are untouched, streams of a stack have roundings of their own, and a weight that is
    applied twice rounds both of its inputs."""
    assert [layer.name for layer in exact.layers] == NAMES
    assert near(exact.delta_loss, wanted[0]) < 1e-9
    assert near(exact.interaction, wanted[1]) < 1e-6  # a difference of losses in the definition alone
    assert exact.activations is not None
    assert not exact.activations.base
    assert set(exact.activations.formats) == {"int4", "int8"}


@pytest.mark.parametrize("how", ["whole", "float32", "carried"])
def test_other_executors_agree(
    net: nn.Module, x: Tensor, exact: Sensitivity, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole forwards of a model without a graph in float64; float32; and carried differences in tf32, where an element beside
    a tie may take the next step, as in float32."""
    model = Unexportable(net).eval() if how == "whole" else net
    precision = {"whole": "float64", "float32": "float32", "carried": "tf32"}[how]
    if how == "carried":
        monkeypatch.setattr("clado.profiling.open.probe", lambda *_: {"good": True})
    sens = clado.profile(model, [x], schemes=SCHEMES, estimator="exact", precision=precision, **HOW)
    assert sens.info["precision"] == precision
    limits = {"whole": (1e-9, 1e-6), "float32": (1e-3, 3e-2), "carried": (1e-2, 3e-2)}[how]
    assert near(sens.delta_loss, exact.delta_loss) < limits[0]
    assert near(sens.interaction, exact.interaction) < limits[1]


@pytest.mark.parametrize("whole", [False, True])
def test_other_estimators_see_inputs(net: nn.Module, x: Tensor, exact: Sensitivity, whole: bool) -> None:
    """All have the single increases of the definition; "corrected" on all samples is exact; the gradient's interactions lie
    nearer to the exact ones than none do."""
    model = Unexportable(net).eval() if whole else net
    for name in ("diagonal", "logit", "corrected", "gradient"):
        more = {"exact_samples": 6} if name == "corrected" else {}
        sens = clado.profile(model, [x], schemes=SCHEMES, estimator=name, precision="float64", **more, **HOW)
        assert near(sens.delta_loss, exact.delta_loss) < 1e-9, name
        error = near(sens.interaction, exact.interaction)
        assert error < {"diagonal": 1.1, "logit": 1.0, "corrected": 1e-9, "gradient": 1.0}[name], (name, error)


def test_integers_alone_give_what_bits_gave(net: nn.Module, x: Tensor) -> None:
    old = clado.profile(net, [x], bits=(4, 8), estimator="exact", **HOW)
    new = clado.profile(net, [x], schemes=("W8A16", "W4A16"), estimator="exact", **HOW)
    for name in ("delta_loss", "interaction", "stderr"):
        assert np.array_equal(getattr(old, name), getattr(new, name))
    assert old.fingerprint == new.fingerprint
    assert new.activations is None
    more = clado.profile(net, [x], schemes=("W4A16", "W4A8", "W8A16"), estimator="diagonal", **HOW)
    kept = [more.index(layer.name, label) for layer in more.layers for label in ("W4A16", "W8A16")]
    np.testing.assert_allclose(more.delta_loss[kept], new.delta_loss, rtol=1e-4, atol=1e-9)  # stacks of another height
    assert more.fingerprint["settings"] != new.fingerprint["settings"]


def test_the_base_of_act_bits_rounds_inputs_and_that_of_schemes_does_not(
    net: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    base = clado.profile(net, [x], bits=(8,), act_bits=4, estimator="diagonal", **HOW)
    own = clado.profile(net, [x], schemes=("W8A4",), estimator="diagonal", **HOW)
    assert base.activations is not None
    assert own.activations is not None
    assert base.activations.base
    assert not own.activations.base
    assert own.activations.formats["int4"] == base.activations.ranges
    assert (
        near(own.delta_loss, base.delta_loss) > 0.5
    )  # one holds the loss of rounding inputs, the other that beyond it
    assert any("raises the loss by" in warning for warning in base.info["warnings"])
    assert own.info["warnings"] == []
    for sens in (base, own):
        assert Sensitivity.load(sens.save(tmp_path)).activations == sens.activations


def test_patterns_have_lists_of_their_own(net: nn.Module, x: Tensor) -> None:
    lists = {"conv": ("W8A16",), "t*": ("W4A8", "W8A8"), "*": ("W4A16", "W8A8_DYNAMIC")}
    sens = clado.profile(net, [x], schemes=lists, estimator="logit", **HOW)
    assert [[s.label for s in own] for own in sens.candidates.schemes] == [
        ["W8A16"],
        ["W4A16", "W8A8_DYNAMIC"],
        ["W4A16", "W8A8_DYNAMIC"],
        ["W4A8", "W8A8"],
        ["W4A16", "W8A8_DYNAMIC"],
    ]
    assert sens.activations is not None
    assert {name: list(own) for name, own in sens.activations.formats.items()} == {"int8": ["twice"]}
    choice = {"conv": 8, "left": "W8A8_DYNAMIC", "right": "W4A16", "twice": "W4A8", "head": 4}
    plan = clado.given_plan(sens, choice)
    assert plan.schemes["twice"] == "W4A8"
    assert plan.activations is not None
    assert {name: list(own) for name, own in plan.activations.formats.items()} == {"int8": ["twice"]}
    none = clado.given_plan(sens, {**choice, "twice": "W8A8"} | {"left": 4})
    assert none.activations is not None
    assert clado.Plan.from_json(plan.to_json()) == plan


def limits(sens: Sensitivity) -> dict[str, float]:
    """Budgets two fifths of the way from the least to the most that plans take."""
    candidates, first = sens.candidates, sens.candidates.starts[:-1]
    use = {
        "size_bytes": candidates.stored_bytes(sens.quantizer),
        "bitops": candidates.bitops(),
        "avg_bits": candidates.code_bits / candidates.numel,
    }
    ends = {name: (np.minimum.reduceat(u, first).sum(), np.maximum.reduceat(u, first).sum()) for name, u in use.items()}
    return {name: float(least + 0.4 * (most - least)) for name, (least, most) in ends.items()}


def every_choice(sens: Sensitivity) -> Iterator[dict[str, str]]:
    names = [layer.name for layer in sens.layers]
    for chosen in itertools.product(*sens.candidates.schemes):
        yield dict(zip(names, (scheme.label for scheme in chosen), strict=True))


@pytest.mark.parametrize("solver", ["bnb", "scip"])
@pytest.mark.parametrize("budget", ["size_bytes", "bitops", "avg_bits", "latency_ms"])
def test_budgets_over_schemes_are_kept_and_proven(exact: Sensitivity, budget: str, solver: str) -> None:
    labels = [scheme.label for scheme in exact.candidates.schemes[0]]
    table = {layer.name: {label: 1.0 + k % 3 for k, label in enumerate(labels)} for layer in exact.layers}
    given: dict[str, Any] = (
        {"latency": table, "latency_ms": 8.0} if budget == "latency_ms" else {budget: limits(exact)[budget]}
    )
    plan = clado.solve(
        exact, solver=solver, time_limit=10, pin={"conv": "W8A8_DYNAMIC"}, forbid={"head": ["W4A8"]}, **given
    )

    def use(choice: dict[str, str]) -> float:
        if budget == "latency_ms":
            return sum(table[name][label] for name, label in choice.items())
        priced = clado.given_plan(exact, choice, **given)
        return priced.usage[budget]["used"]

    assert plan.status == "optimal"
    assert plan.schemes["conv"] == "W8A8_DYNAMIC"
    assert plan.schemes["head"] != "W4A8"
    assert use(plan.schemes) == pytest.approx(plan.usage[budget]["used"])
    allowed = (c for c in every_choice(exact) if c["conv"] == "W8A8_DYNAMIC" and c["head"] != "W4A8")
    G = exact.matrix
    index = {
        (layer.name, s.label): exact.index(layer.name, s) for layer in exact.layers for s in exact.candidates.schemes[0]
    }
    costs = {
        "size_bytes": exact.candidates.stored_bytes(exact.quantizer),
        "bitops": exact.candidates.bitops(),
        "avg_bits": exact.candidates.code_bits / exact.candidates.numel,
    }
    best = np.inf
    for choice in allowed:
        rows = [index[item] for item in choice.items()]
        spent = use(choice) if budget == "latency_ms" else costs[budget][rows].sum()
        if spent <= list(given.values())[-1] * (1 + 1e-12):
            best = min(best, G[np.ix_(rows, rows)].sum() / 2)
    assert plan.objective == pytest.approx(best, abs=1e-12)


def test_operations_count_bits_of_weight_and_input(exact: Sensitivity, net: nn.Module, x: Tensor) -> None:
    macs = sum(layer.macs for layer in exact.layers)
    for label, bits in (("W4A16", 4 * 32), ("W4A8", 4 * 8), ("W8A4", 8 * 4), ("W8A8_DYNAMIC", 8 * 8)):
        plan = clado.given_plan(exact, dict.fromkeys(NAMES, label), bitops=1)
        assert plan.usage["bitops"]["used"] == macs * bits
    base = clado.profile(net, [x], bits=(8,), act_bits=8, estimator="diagonal", **HOW)
    assert clado.solve(base, bitops=macs * 64).usage["bitops"]["used"] == macs * 64


def test_layers_that_share_and_fronts_go_by_schemes(exact: Sensitivity) -> None:
    plans = clado.pareto(
        exact,
        size_bytes=[limits(exact)["size_bytes"] * share for share in (0.95, 1.05)],
        time_limit=5,
        shared_layers=[["left", "right"]],
    )
    for plan in plans:
        assert plan.schemes["left"] == plan.schemes["right"]
    least = clado.solve(exact, max_loss_increase=plans[0].objective, minimize="bitops", time_limit=5)
    assert least.objective <= plans[0].objective + 1e-12


@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_plans_are_applied_and_measured_with_their_inputs(
    net: nn.Module, x: Tensor, exact: Sensitivity, whole: bool, tmp_path: Path
) -> None:
    """What is applied, saved and loaded, and reranked is the net whose inputs are rounded by hand."""
    model = Unexportable(net).eval() if whole else net
    sens = clado.profile(model, [x], schemes=SCHEMES, estimator="logit", **HOW) if whole else exact
    prefix = "inner." if whole else ""
    choices = [
        dict(zip(NAMES, labels, strict=True))
        for labels in (
            ("W4A16", "W4A8", "W8A4", "W8A4", "W8A8_DYNAMIC"),
            ("W8A8_DYNAMIC", "W4A8", "W4A16", "W8A4", "W4A8"),
        )
    ]
    plans = [clado.given_plan(sens, {prefix + name: label for name, label in choice.items()}) for choice in choices]
    clean = net(x).double().log_softmax(-1)
    losses = []
    for plan in plans:
        named = {name.removeprefix(prefix): scheme for name, scheme in plan.chosen.items()}
        bare = replace(sens, activations=None)
        ranges = plan.activations
        assert ranges is not None
        known = ActivationRanges(
            {f: {n.removeprefix(prefix): p for n, p in own.items()} for f, own in ranges.formats.items()}
        )
        with under(net, replace(bare, activations=known), named, torch.float32) as made:
            wanted = made(x)
        losses.append((clean.exp() * (clean - wanted.double().log_softmax(-1))).sum(-1))
        got = clado.apply(model, plan)(x)
        assert torch.allclose(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    best = clado.rerank(model, [x], plans)
    measured = {
        tuple(p.schemes.items()): r["loss_increase"]
        for p, r in zip(
            sorted(plans, key=lambda p: p is not best and p.schemes != best.schemes), best.info["rerank"], strict=True
        )
    }
    for plan, loss in zip(plans, losses, strict=True):
        assert measured[tuple(plan.schemes.items())] == pytest.approx(loss.mean().item(), rel=1e-3)
    plans[0].save(tmp_path)
    again = clado.Plan.load(tmp_path)
    assert torch.equal(clado.apply(model, again)(x), clado.apply(model, plans[0])(x))


def test_refined_plans_are_measured_with_their_inputs(net: nn.Module, x: Tensor, exact: Sensitivity) -> None:
    start = clado.given_plan(exact, dict.fromkeys(NAMES, "W4A8"))
    plan = clado.refine(net, [x], exact, start, rounds=2, bitops=limits(exact)["bitops"], verbose=False)
    wanted = clado.rerank(net, [x], [plan]).info["rerank"][0]["loss_increase"]
    assert plan.info["refine_loss"] == pytest.approx(wanted, rel=1e-3)
    assert plan.info["refine_loss"] <= clado.rerank(net, [x], [start]).info["rerank"][0]["loss_increase"] * (1 + 1e-6)


def test_neither_batches_nor_their_order_decide(net: nn.Module, x: Tensor) -> None:
    one, other = (
        clado.profile(net, list(data.split(2)), schemes=("W4A8",), estimator="diagonal", precision="float64", **HOW)
        for data in (x, x.flip(0))
    )
    assert one.activations == other.activations
    assert near(other.delta_loss, one.delta_loss) < 1e-12


class Hidden(nn.Module):
    """A weight that its forward applies under a mode that no call can be seen in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        with torch._C.DisableTorchFunction():
            y = nn.functional.linear(y, self.inner.weight, self.inner.bias)
        return self.last(y.relu())


def test_an_input_that_cannot_be_intercepted_is_named() -> None:
    torch.manual_seed(0)
    model, x = Hidden().eval(), torch.randn(4, 6)
    found = clado.profile(model, [x], schemes=("W4A16",), estimator="diagonal", **{**HOW, "num_samples": 4})
    assert [layer.name for layer in found.layers] == ["first", "inner", "last"]
    with pytest.raises(clado.CladoError, match="schemes must round inputs of layers that run, got none of inner"):
        clado.profile(model, [x], schemes=("W4A8",), estimator="diagonal", **{**HOW, "num_samples": 4})


def test_exact_pairs_of_a_plan_hold_inputs(net: nn.Module, x: Tensor, exact: Sensitivity) -> None:
    sens = clado.profile(net, [x], schemes=SCHEMES, estimator="logit", precision="float64", **HOW)
    limit = limits(sens)["bitops"]
    better, plan = clado.correct(net, [x], sens, num_samples=6, bitops=limit, verbose=False)
    assert plan.info["stands"]
    rows = exact.candidates.indices(plan.schemes)
    assert near(better.interaction[np.ix_(rows, rows)], exact.interaction[np.ix_(rows, rows)]) < 1e-6


def test_less_memory_gives_the_same_matrix(net: nn.Module, x: Tensor) -> None:
    """Perturbations of a stack have roundings of their own, in whatever pieces they advance."""
    how = {**HOW, "schemes": ("W4A8", "W4A16"), "estimator": "logit", "precision": "float64", "batch_size": 6}
    how["ignore"] = ("left", "right", "conv")
    plain = clado.profile(net, [x], **how)
    plan = clado.plan_run(net, [x], **how)
    assert plan.chunk_bytes is not None
    assert "2 under W4A8, W4A16, 4 candidates" in str(plan)
    small = clado.profile(net, [x], max_memory=plan.fixed_bytes + plan.chunk_bytes // 2, **how)
    assert near(small.interaction, plain.interaction) < 1e-6


def test_what_the_command_line_reads() -> None:
    def read(*given: str) -> Any:
        return fields.KINDS["schemes"].value("profile", "schemes", given)

    assert read() is None
    assert read("W4A16,FP8") == ("W4A16", "FP8")
    assert list(read("*.attn.*=W8A8", "*=W4A8,W8A8")) == ["*.attn.*", "*"]
    with pytest.raises(clado.CladoError, match="profile: schemes must give a pattern once, got '\\*'"):
        read("W4A16", "W8A8")


def test_exports_say_what_becomes_of_inputs(net: nn.Module, exact: Sensitivity, tmp_path: Path) -> None:
    plan = clado.given_plan(exact, dict.fromkeys(NAMES, "W4A8"))
    written = clado.export(net, plan, tmp_path / "ct", format="compressed-tensors")
    assert written.notes == (
        "inputs stay float, those of conv too, which the plan rounds",  # the format has no convolutions
        "codes take a byte each where integers multiply integers: those of left, right, twice and 1 more",
    )
    other = clado.given_plan(exact, dict.fromkeys(NAMES, "W8A8_DYNAMIC"))
    with pytest.raises(clado.CladoError, match="must round inputs to 8 bits with one range per tensor"):
        clado.export(net, other, tmp_path / "onnx", format="onnx", example=torch.zeros(2, 2, 4, 4))
    assert not (tmp_path / "onnx").exists()
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(9))
    for one in (plan, other):
        clado.export(net, one, tmp_path / "own")
        assert torch.equal(clado.load(tmp_path / "own", net)(x), clado.apply(net, one)(x))


FLOATS = ("W4A16", "W8A8", "FP8", "FP8_DYNAMIC", "FP8A16", "MXFP8", "MXFP4", "NVFP4", "NVFP4A16", "BF16")


@pytest.fixture(scope="module")
def floats() -> tuple[nn.Module, Tensor, Sensitivity]:
    torch.manual_seed(5)
    model = lively(
        nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32, bias=False), nn.GELU(), nn.Linear(32, 5))
    ).eval()
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(6))
    return model, x, clado.profile(model, [x], schemes=FLOATS, estimator="exact", precision="float64", **HOW)


@torch.no_grad()
def test_schemes_of_all_formats_are_those_of_the_definition(floats: tuple[nn.Module, Tensor, Sensitivity]) -> None:
    """Weights as their formats make them, inputs by their own functions (tests/quant/test_inputs.py), one forward for each."""
    model, x, sens = floats
    clean = copy.deepcopy(model).double()(x.double()).log_softmax(-1)
    assert [s.label for s in sens.candidates.schemes[0]] == sorted(FLOATS, key=Scheme.of)
    for v, (layer, scheme) in enumerate(sens.candidates.pairs):
        made = copy.deepcopy(model).double()
        own = made.get_submodule(layer.name)
        matrix = sens.quantizer.matrix(own.weight.float())
        number = scheme.number
        own.weight.copy_(number.nearest(matrix, number.scales(matrix, sens.quantizer)).view(own.weight.shape))
        if scheme.input:
            assert sens.activations is not None
            rounds = InputRounding(scheme.input, sens.activations.of(layer.name, scheme.input), "linear")
            own.register_forward_pre_hook(lambda _, args, rounds=rounds: rounds(args[0]))
        out = made(x.double()).log_softmax(-1)
        wanted = (clean.exp() * (clean - out)).sum(-1).mean().item()
        assert sens.delta_loss[v] == pytest.approx(wanted, rel=1e-9), scheme.label
    assert sens.activations is not None
    assert set(sens.activations.formats) == {"int8", "fp8_e4m3", "nvfp4"}


def test_plans_of_all_formats_from_budget_to_file(
    floats: tuple[nn.Module, Tensor, Sensitivity], tmp_path: Path
) -> None:
    model, x, sens = floats
    bytes_of = sens.candidates.stored_bytes(sens.quantizer)
    middle = float(np.median(bytes_of.reshape(3, -1), axis=1).sum())
    plan = clado.solve(sens, size_bytes=middle, pin={"2": "NVFP4"}, forbid={"0": ["BF16", "W8A8"]}, time_limit=10)
    assert plan.status == "optimal"
    assert plan.schemes["2"] == "NVFP4"
    mixed = clado.given_plan(sens, {"0": "FP8_DYNAMIC", "2": "MXFP4", "4": "NVFP4"}, bitops=1)
    macs = [layer.macs for layer in sens.layers]
    assert mixed.usage["bitops"]["used"] == macs[0] * 64 + macs[1] * 16 + macs[2] * 16
    assert mixed.avg_bits == pytest.approx((8 * 1024 + 4 * 1024 + 4 * 160) / 2208)
    for one in (plan, mixed):
        written = clado.export(model, one, tmp_path / "own")
        assert written.quantized == one.size_bytes
        applied = clado.apply(model, one)
        assert torch.equal(clado.load(tmp_path / "own", model)(x), applied(x))
        again = clado.Plan.load(one.save(tmp_path))
        assert again.schemes == one.schemes
        assert torch.equal(clado.apply(model, again)(x), applied(x))
    kept = clado.given_plan(sens, dict.fromkeys(("0", "2", "4"), "BF16"))
    assert torch.equal(clado.apply(model, kept)[2].weight, model[2].weight.bfloat16().float())
    fp8 = clado.given_plan(sens, dict.fromkeys(("0", "2", "4"), "FP8_DYNAMIC"))
    assert clado.export(model, fp8, tmp_path / "ct", format="compressed-tensors").notes == ()  # inputs go with it
    assert torch.equal(pack_model(model, mixed)(x), clado.apply(model, mixed)(x))


def test_a_low_precision_is_probed_with_inputs(floats: tuple[nn.Module, Tensor, Sensitivity]) -> None:
    model, x, exact = floats
    sens = clado.profile(model, [x], schemes=FLOATS, estimator="logit", precision="tf32", **HOW)
    probe = sens.info["probe"]
    assert len(probe["delta_error"]) == len(FLOATS)
    assert sens.info["precision"] == ("tf32" if probe["good"] else "float32")
    assert near(sens.delta_loss, exact.delta_loss) < 2e-2


def test_finished_plans_keep_their_inputs(net: nn.Module, x: Tensor, exact: Sensitivity) -> None:
    plan = clado.given_plan(exact, dict.fromkeys(NAMES, "W4A8"))
    made = clado.finish(net, plan, [x], method="compensated", verbose=False)
    assert made.schemes == plan.schemes
    assert made.activations == plan.activations
    seen: list[Tensor] = []
    applied = clado.apply(net, made)
    with Calls({"left.weight": applied.left.weight}, lambda call: seen.append(call.x) or call.of(call.x)):  # type: ignore[func-returns-value]
        applied(x)
    low, high = made.activations.formats["int8"]["left"]
    steps = seen[0] / ((high - low) / 255)
    assert (steps - steps.round()).abs().max() < 1e-3
