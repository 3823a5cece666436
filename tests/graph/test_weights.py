"""Weights wherever they are applied: both runners find the same layers, name all others, and give what the model gives."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import std_conv
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import clado
from clado.graph import Runner, Use, open_runner
from clado.graph.whole_forwards import WholeForwards
from clado.quant import Call, Calls, Layer, Variant, folded, in_rows


class Attention(nn.Module):
    """Self- or cross-attention of torch's, rows in time-major order inside."""

    def __init__(self, cross: bool, weights: bool, batch_first: bool = True) -> None:
        super().__init__()
        self.cross, self.weights, self.batch_first = cross, weights, batch_first
        self.embed, self.attn = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        turned = x if self.batch_first else x.transpose(0, 1)
        keys = (turned[:, :2] if self.batch_first else turned[:2]) if self.cross else turned
        y = self.attn(turned, keys, keys, need_weights=self.weights)[0]
        return self.head(self.fc(x + (y if self.batch_first else y.transpose(0, 1))).mean(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
        self.embed, self.body = nn.Linear(5, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)).mean(1))


class Operators(nn.Module):
    """Every kind of layer, a weight used in two ways, and what is not searched."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Linear(5, 8), nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.up, self.turned = nn.ConvTranspose1d(8, 4, 2, stride=2, groups=2), nn.Parameter(torch.randn(4, 8) / 3)
        self.both, self.table = nn.Parameter(torch.randn(8, 8) / 3), nn.Embedding(10, 8)
        self.rnn, self.unused = nn.GRU(8, 8, batch_first=True), nn.Linear(2, 2)
        self.cube, self.wide = nn.Conv3d(1, 2, 2), nn.ConvTranspose2d(1, 2, 2)
        self.left, self.head = nn.Parameter(torch.randn(6, 10) / 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x) + self.table(torch.arange(5, device=x.device)).mean(0)
        y = self.up(self.mix(y.transpose(1, 2)).relu()).transpose(1, 2) @ self.turned  # [N, 10, 8]
        y = self.rnn(nn.functional.linear(y, self.both) + y @ self.both)[0]
        maps = self.wide(y[:, None])  # [N, 2, 11, 9]
        rest = self.cube(maps[:, :1, None].expand(-1, -1, 2, -1, -1)).mean((1, 2, 3))  # [N, 8]
        return self.head((self.left @ y).relu().mean(1) + rest)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "self-attention": (lambda: Attention(False, False), (5, 5)),
    "self-attention with its map": (lambda: Attention(False, True), (5, 5)),
    "cross-attention": (lambda: Attention(True, False), (5, 5)),
    "time-major attention": (lambda: Attention(False, False, batch_first=False), (5, 5)),
    "encoder": (Encoder, (4, 5)),
    "operators": (Operators, (5, 5)),
}


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = NETS[request.param]
    return make().eval().double(), torch.randn(4, *shape, dtype=torch.float64)


def other(runner: Runner, model: nn.Module, layer: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Another weight of a layer in rows, and as the model's parameters have it."""
    own = runner.layers[layer]
    rows = own.rows(model.get_parameter(own.names[0]).detach()) * 1.1 + 0.01
    return rows, {name: own.parameter(rows, model.get_parameter(name).shape) for name in own.names}


@pytest.mark.filterwarnings("ignore:.*assigned during export")
def test_both_runners_find_the_same_and_give_what_the_model_gives(net: tuple[nn.Module, Tensor]) -> None:
    model, x = net
    graph = open_runner(model, x, quantize_ends=True)
    whole = WholeForwards(model, x, quantize_ends=True)
    assert graph.note is None  # streams do not mix
    assert graph.layers == whole.layers
    assert graph.skipped == whole.skipped
    known = {name for layer in graph.layers for name in layer.names}
    silent = {n for n, p in model.named_parameters() if p.dim() > 1} - known
    assert {name.removesuffix(".weight") for name in silent} == set(graph.skipped)
    for k, layer in enumerate(graph.layers):
        rows, parameters = other(graph, model, k)
        assert rows.shape == layer.shape
        wanted = torch.func.functional_call(model, parameters, (x,))
        for runner in (graph, whole):
            state = runner.advance(runner.start(x), k)
            clean = runner.layers[k].rows(model.get_parameter(layer.names[0]).detach())
            found = runner.finish(runner.fork(state, k, [rows, clean]))
            torch.testing.assert_close(found, torch.stack([wanted, model(x)]).detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*assigned during export")
def test_both_runners_have_the_same_derivatives(net: tuple[nn.Module, Tensor]) -> None:
    """Against autograd by the parameter, sample by sample."""
    model, x = net
    runners = (open_runner(model, x, quantize_ends=True), WholeForwards(model, x, quantize_ends=True))
    for runner in runners:
        pairs = [other(runner, model, k) for k in range(runner.num_layers)]

        def objective(state: Any, runner: Runner = runner) -> Tensor:
            return runner.finish(state).square().sum()

        found = runner.products(runner.advance(runner.start(x), 0), [[Variant(rows)] for rows, _ in pairs], objective)[
            :, 0
        ]
        for k, (_, changed) in enumerate(pairs):
            for n in range(len(x)):
                own = {name: model.get_parameter(name).detach().requires_grad_() for name in list(changed)[:1]}
                tied = dict.fromkeys(changed, next(iter(own.values())))
                value = torch.func.functional_call(model, tied, (x[n : n + 1],)).square().sum()
                (slope,) = torch.autograd.grad(value, list(own.values()))
                (name,) = own
                wanted = (slope * (changed[name] - model.get_parameter(name).detach())).sum().item()
                assert found[k, n].item() == pytest.approx(wanted, rel=1e-8, abs=1e-10), runner.layers[k].name


def test_macs_count_every_position_of_a_sample() -> None:
    model, x = Attention(False, False).eval(), torch.randn(4, 5, 5)
    found = {layer.name: layer.macs for layer in open_runner(model, x, quantize_ends=True).layers}
    assert found == {"embed": 200, "attn.in_proj_weight": 960, "attn.out_proj": 320, "fc": 320, "head": 24}
    turned = nn.Sequential(nn.ConvTranspose2d(2, 4, 3, 2), nn.Flatten(), nn.Linear(4 * 7 * 7, 3)).eval()
    layer = open_runner(turned, torch.randn(2, 2, 3, 3), quantize_ends=True).layers[0]
    assert (layer.kind, layer.shape, layer.macs) == ("conv_transpose2d", (4, 2, 3, 3), 9 * 2 * 4 * 9)


def test_reasons_name_what_reads_a_weight() -> None:
    found = open_runner(Operators().eval(), torch.randn(4, 5, 5)).skipped
    assert found["table"] == "read by embedding, which is not searched"
    assert found["rnn.weight_ih_l0"] == "read by gru, which is not searched"
    assert found["unused"] == "the output does not depend on it"
    assert found["left"] == "read by matmul, which is not searched"
    assert found["head"] == "classifier"


def pruned() -> nn.Module:
    layer = nn.Linear(6, 6)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


class LowRank(nn.Module):
    """A weight plus a product of two small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 6)
        self.a, self.b = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.base.weight + self.a @ self.b)


@pytest.mark.parametrize(
    "make", [lambda: weight_norm(nn.Linear(6, 6)), lambda: spectral_norm(nn.Linear(6, 6)), pruned, LowRank]
)
def test_a_computed_weight_is_named_by_its_module(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), make(), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3)).eval()
    x = torch.randn(4, 4)
    graph, whole = open_runner(model, x), WholeForwards(model, x)
    for runner in (graph, whole):
        assert [layer.name for layer in runner.layers] == ["0", "4"]
        assert set(runner.skipped) == {"2", "5"}
        assert runner.skipped["2"].startswith("its weight is computed (")


@given(
    dimensions=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    turned=st.booleans(),
)
def test_moments_of_any_convolution_are_those_of_its_output(
    dimensions: int, kernel: int, stride: int, padding: int, dilation: int, groups: int, turned: bool
) -> None:
    """Σ y² over samples and positions is w H wᵀ, for whatever y = conv(x, w) is."""
    kinds: dict[bool, tuple[Any, ...]] = {
        False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    }
    more = {"output_padding": stride - 1} if turned and dilation >= stride else {}
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": False, **more}
    layer = kinds[turned][dimensions - 1](4, 6, kernel, **options).double()
    size = 5 if dimensions < 3 else 4
    if not turned and size + 2 * padding < dilation * (kernel - 1) + 1:
        return
    if turned and (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + more.get("output_padding", 0) < 0:
        return
    x = torch.randn(2, 4, *[size] * dimensions, dtype=torch.float64)
    seen: list[tuple[Call, Tensor]] = []

    def look(call: Call) -> Tensor:
        seen.append((call, call.of(call.x)))
        return seen[-1][1]

    with torch.no_grad(), Calls({"weight": layer.weight}, look):
        layer(x)
    (call, output), rows = seen[0], in_rows(seen[0][0].applied, layer.weight.detach(), groups)
    assert rows.shape == (6, 4 // groups, *[kernel] * dimensions)
    assert torch.equal(Layer("", call.kind, tuple(rows.shape), 0).parameter(rows, layer.weight.shape), layer.weight)
    if math.prod(output.shape[2:]) > 256:  # of more positions some are taken
        return
    use = Use.of_call(call.kind, tuple(rows.shape), call.args, call.kwargs)
    moments = x.new_zeros(groups, *[rows[0].numel()] * 2)
    use.add_moments(call.x, moments)
    own = rows.reshape(groups, 6 // groups, -1)
    wanted = output.transpose(0, 1).reshape(groups, 6 // groups, -1).square().sum(-1)
    torch.testing.assert_close((own @ moments * own).sum(-1), wanted, rtol=1e-12, atol=1e-12)


def test_every_computed_weight_is_named_where_one_function_computes_several() -> None:
    model = nn.Sequential(nn.Linear(6, 6), LowRank(), nn.ReLU(), LowRank(), nn.Linear(6, 6), nn.Linear(6, 3)).eval()
    for runner in (open_runner(model, torch.randn(4, 6)), WholeForwards(model, torch.randn(4, 6))):
        assert set(runner.skipped) == {"1", "3", "5"}


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(6, 6))


@pytest.mark.parametrize(
    "make",
    [
        lambda: weight_norm(nn.Linear(6, 6)),
        lambda: spectral_norm(nn.Linear(6, 6)),
        pruned,
        old_weight_norm,
        lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
    ],
)
def test_what_torch_computes_is_folded_and_goes_the_whole_way(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), make(), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3)).eval()
    x, before = torch.randn(16, 4), dict(model.named_parameters())
    wanted = model(x)
    again = folded(model)
    assert again is not model
    assert {n for n, _ in again.named_parameters()} == {
        f"{k}.{name}" for k in (0, 2, 4, 5) for name in ("weight", "bias")
    }
    assert torch.equal(again(x), wanted)
    assert folded(again) is again
    sens = clado.profile(model, [x], num_samples=16, verbose=False)
    assert [layer.name for layer in sens.layers] == ["0", "2", "4"]
    sens, plan = clado.correct(model, [x], sens, avg_bits=4, verbose=False)
    small = clado.apply(model, plan)
    clado.export(model, plan, tmp_path / "out")
    assert torch.equal(clado.load(tmp_path / "out", model)(x), small(x))
    assert clado.verify(model, plan, tmp_path / "out")
    clado.rerank(model, [x], [plan])
    clado.refine(model, [x], sens, plan, avg_bits=4, verbose=False)
    clado.finish(model, plan, [x], "compensated", num_samples=16, batch_size=4, verbose=False)
    assert dict(model.named_parameters()).keys() == before.keys()  # the model itself is not changed
    assert all(value is before[name] for name, value in model.named_parameters())
    if make is pruned:
        zeros = again.get_parameter("2.weight") == 0
        nearest = clado.profile(model, [x], num_samples=16, rounding="nearest", verbose=False)
        kept = clado.apply(model, clado.solve(nearest, avg_bits=4)).get_parameter("2.weight")[zeros]
        assert len(kept) > 0
        assert (kept == 0).all()  # zero is a code; compensated rounding makes use of such weights


@pytest.mark.parametrize("name", ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"])
@pytest.mark.parametrize("stride", [1, 2])
def test_standardized_convolutions_of_timm_are_folded(name: str, stride: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind = getattr(std_conv, name)
    inner = [kind(4, 6, 3, stride=stride), nn.ReLU(), kind(6, 6, 3, groups=2, dilation=stride, bias=True)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *inner, nn.Flatten(), nn.LazyLinear(3)).eval()
    x = torch.randn(8, 3, 9, 9)
    wanted, before = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    plain = folded(model)
    assert torch.equal(plain(x), wanted)
    assert {name for name, _ in plain.named_parameters()} == {name for name in before if not name.endswith("gain")}
    assert folded(plain) is plain
    sens = clado.profile(model, [x], num_samples=8, verbose=False)
    assert [layer.name for layer in sens.layers] == ["1", "3"]
    assert set(sens.provenance.float_layers) == {"0", "5"}  # first and last
    plan = clado.solve(sens, avg_bits=4)
    clado.export(model, plan, tmp_path / "out")
    assert torch.equal(clado.load(tmp_path / "out", model)(x), clado.apply(model, plan)(x))
    assert type(model[1]).__name__ == name
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*assigned during export")
def test_every_stage_takes_every_kind_of_layer(tmp_path: Path) -> None:
    """Functional, turned and transposed weights: rounded by moments, finished, exported, packed, under rounded inputs."""
    torch.manual_seed(0)
    model, x = Operators().eval(), torch.randn(16, 5, 5)
    options: dict[str, Any] = {"bits": (2, 4, 8), "rounding": "compensated", "act_bits": 8, "verbose": False}
    sens = clado.profile(model, [x], num_samples=16, output_dir=tmp_path / "run", **options)
    assert 0 < sens.searched_share < 1
    plan = clado.finish(
        model, clado.solve(sens, avg_bits=3), [x], "learned", num_samples=16, batch_size=4, verbose=False
    )
    assert f"over {100 * sens.searched_share:.3g} % of the weights" in clado.solve(sens, avg_bits=3).average_in_words
    small = clado.apply(model, plan)
    for layer in plan.layers:
        values = layer.rows(small.get_parameter(layer.names[0]).detach()).reshape(layer.shape[0], -1)
        assert all(len(row.unique()) <= 2 ** plan.bits[layer.name] for row in values)
    with torch.no_grad():
        wanted = small(x)
        clado.export(model, plan, tmp_path / "own")
        assert torch.equal(clado.load(tmp_path / "own", model)(x), wanted)
        assert torch.equal(clado.load(tmp_path / "own", model, packed=True)(x), wanted)
    written = clado.export(model, plan, tmp_path / "pack", "compressed-tensors", odd_widths="dense")
    assert set(written.kept) == {layer.name for layer in plan.layers} - {"stem"}
    if find_spec("onnxscript") and find_spec("onnxruntime"):
        promised, _ = clado.predicted_bytes(
            model, plan, "onnx", example=x
        )  # what nothing reads has no place in the graph
        assert clado.export(model, plan, tmp_path / "onnx", "onnx", example=x).quantized == promised
        assert "within" in clado.verify(model, plan, tmp_path / "onnx", "onnx", example=x)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("groups", "symmetric"), [(1, True), (2, False)])
def test_turned_weights_in_onnx(bits: int, groups: int, symmetric: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.w = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=groups), nn.Parameter(torch.randn(6, 5))
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.up(x).flatten(2).transpose(1, 2) @ self.w).relu().mean(1))

    torch.manual_seed(0)
    model, x = Turned().eval(), torch.randn(3, 4, 4, 4)
    sens = clado.profile(
        model,
        [x],
        bits=(bits,),
        symmetric=symmetric,
        quantize_ends=True,
        num_samples=3,
        rounding="nearest",
        verbose=False,
    )
    assert [layer.kind for layer in sens.layers] == ["conv_transpose2d", "matmul", "linear"]
    plan = clado.given_plan(sens, dict.fromkeys(["up", "w", "head"], bits))
    clado.export(model, plan, tmp_path / "onnx", "onnx", example=x)
    assert "within" in clado.verify(model, plan, tmp_path / "onnx", "onnx", example=x)


def test_shares_are_said_where_they_were_counted(tmp_path: Path) -> None:
    """A matrix from before others were counted does not pretend to hold all weights."""
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval(), torch.randn(8, 4)
    sens = clado.profile(model, [x], num_samples=8, verbose=False)
    assert sens.searched_share == pytest.approx(24 / 42)
    assert sens.provenance.in_float(24) == "2 (42.9%, classifier)"
    older = replace(sens, provenance=replace(sens.provenance, float_weights={}))
    assert older.searched_share is None
    assert older.provenance.in_float(24) == "2 (classifier)"
    assert "over" not in clado.solve(older, avg_bits=4).average_in_words
