"""Second moments of what enters a layer, against float64 loops over positions, and through both kinds of runner."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from clado.graph import Runner, Use, moments, open_runner
from clado.quant import Call, Calls, Layer, calibrate, in_rows, quantize_activations
from tests.models import small_cnn, tiny_vit
from tests.record.nets import Unexportable


@torch.enable_grad()
def dull(module: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """Σ x xᵀ in float64, ``[G, K, K]``: over every row of a matrix, or every position of a convolution's output.

    The derivative of one output of a convolution by the weight is the patch that this output is made of, position by position.
    """
    if isinstance(module, nn.Linear):
        total = torch.zeros(1, module.in_features, module.in_features, dtype=torch.float64)
        for row in x.double().reshape(-1, module.in_features):
            total[0] += torch.outer(row, row)
        return total
    x = x.double() if x.dim() == 4 else x.double()[None]
    weight = torch.zeros(module.weight.shape, dtype=torch.float64, requires_grad=True)
    groups, inputs = module.groups, weight[0].numel()
    total = torch.zeros(groups, inputs, inputs, dtype=torch.float64)
    own = weight.shape[0] // groups
    for sample in x:
        out = F.conv2d(sample[None], weight, None, module.stride, module.padding, module.dilation, module.groups)
        for group, i, j in itertools.product(range(groups), range(out.shape[2]), range(out.shape[3])):
            (patches,) = torch.autograd.grad(out[0, group * own, i, j], weight, retain_graph=True)
            patch = patches[group * own].reshape(-1)
            total[group] += torch.outer(patch, patch)
    return total


def found(module: nn.Module, x: Tensor) -> Tensor:
    total = torch.zeros(())

    def look(call: Call) -> Tensor:
        nonlocal total
        use = Use.of_call(call.kind, Layer("", call.kind, rows(call, module), 0).shape, call.args, call.kwargs)
        groups, inputs = use.sides
        total = x.new_zeros(groups, inputs, inputs)
        use.add_moments(call.x, total)
        return call.of(call.x)

    with Calls({"weight": module.get_parameter("weight")}, look), torch.no_grad():
        module(x)
    return total


def rows(call: Call, module: nn.Module) -> tuple[int, ...]:
    """The shape of a module's weight with its output channels first."""
    return tuple(in_rows(call.applied, module.get_parameter("weight"), call.groups).shape)


def check(got: Tensor, wanted: Tensor) -> None:
    """Float32 sums of a few hundred products in another order: 1e-5 of the largest."""
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("lead", [(1,), (7,), (3, 5), (2, 3, 2), (2, 1, 2, 3)])
@pytest.mark.parametrize("inputs", [1, 5])
def test_linear_of_any_rank(lead: tuple[int, ...], inputs: int) -> None:
    layer, x = nn.Linear(inputs, 3), torch.randn(*lead, inputs)
    check(found(layer, x), dull(layer, x))


CONVOLUTIONS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((3, 4, 3), {}),
    ((3, 4, 3), {"padding": 1}),
    ((3, 4, 3), {"padding": (2, 1), "stride": (1, 2)}),
    ((3, 4, (2, 3)), {"stride": 2, "padding": (0, 1), "dilation": (2, 1)}),
    ((3, 4, 3), {"padding": "same"}),
    ((3, 4, (2, 4)), {"padding": "same"}),  # even: one more zero at the end than at the beginning
    ((3, 4, (4, 2)), {"padding": "same", "dilation": (1, 3)}),
    ((3, 4, (2, 3)), {"padding": "valid"}),
    ((4, 6, 3), {"groups": 2, "padding": 1}),
    ((4, 8, (3, 2)), {"groups": 4, "stride": 2, "padding": 1}),
    ((4, 4, 3), {"groups": 4, "padding": "same"}),
    ((4, 6, 1), {}),
    ((4, 6, 1), {"stride": (2, 3)}),
    ((4, 6, 1), {"stride": 2, "padding": 1, "groups": 2}),
    ((2, 3, (5, 7)), {}),  # one position
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("sizes", "options"), CONVOLUTIONS)
def test_convolutions(sizes: tuple[Any, ...], options: dict[str, Any]) -> None:
    layer = nn.Conv2d(*sizes, **options)
    x = torch.randn(2, sizes[0], 5, 7)
    check(found(layer, x), dull(layer, x))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_a_convolution_of_one_sample_without_its_dimension() -> None:
    layer, x = nn.Conv2d(2, 3, 2, padding="same"), torch.randn(2, 4, 3)
    check(found(layer, x), dull(layer, x))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(1, 2), "same"])
def test_padding_that_is_not_zeros(mode: str, padding: Any) -> None:
    layer = nn.Conv2d(2, 3, (2, 3), padding=padding, padding_mode=mode)
    x = torch.randn(2, 2, 5, 4)
    bare = nn.Conv2d(2, 3, (2, 3))
    check(found(layer, x), dull(bare, F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)))


@pytest.mark.parametrize("columns", [moments.BLOCK - 1, moments.BLOCK, moments.BLOCK + 8, 2 * moments.BLOCK + 1])
def test_mirrored_blocks(columns: int) -> None:
    layer, x = nn.Linear(columns, 2), torch.randn(3, columns)
    got = found(layer, x)[0]
    check(got, x.double().T @ x.double())
    below = torch.ones(columns, columns, dtype=torch.bool).tril(-1)
    far = below & ((torch.arange(columns)[:, None] // moments.BLOCK) != (torch.arange(columns) // moments.BLOCK))
    assert torch.equal(got[far], got.T[far])  # copied, not computed


def test_patches_of_many_samples_are_made_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(7, 3, 4, 5)
    wanted = dull(layer, x)
    for elements in (1, 2 * 3 * 9 * 6 * 7 + 1):  # one sample at a time, two
        monkeypatch.setattr(moments, "ELEMENTS", elements)
        check(found(layer, x), wanted)


def test_what_is_there_is_added_to() -> None:
    layer, x = nn.Linear(4, 2), torch.randn(6, 4)
    total = torch.ones(1, 4, 4)
    Use((2, 4)).add_moments(x, total)
    check(total - 1, dull(layer, x))


@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2]),
)
def test_the_moments_are_those_of_the_layers_own_output(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> None:
    """Σ y² over samples and positions is w H wᵀ, for whatever y = conv(x, w) is."""
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    layer = nn.Conv2d(4, 4, kernel, stride, padding, dilation, groups, bias=False).double()
    own = layer.weight.detach().reshape(groups, 4 // groups, -1)
    wanted = layer(x).detach().square().sum((0, 2, 3)).view(groups, -1)
    torch.testing.assert_close((own @ found(layer, x) * own).sum(-1), wanted, rtol=1e-12, atol=1e-12)


def all_moments(runner: Runner, *batches: Tensor) -> list[Tensor]:
    """Of every layer, in its order."""
    totals: dict[int, Tensor] = {}

    def see(layer: int, use: Use, x: Tensor) -> None:
        groups, inputs = use.sides
        use.add_moments(x, totals.setdefault(layer, x.new_zeros(groups, inputs, inputs)))

    with torch.no_grad():
        for batch in batches:
            runner.inputs(batch, see)
    return [totals[k] for k in range(runner.num_layers)]


def by_hooks(model: nn.Module, runner: Runner, x: Tensor, first: frozenset[str] = frozenset()) -> list[Tensor]:
    """The dull moments of every layer, over all modules that share its weight; of some layers the first token's alone."""
    totals = {layer.name: torch.zeros(()) for layer in runner.layers}
    owner = {name.removesuffix(".weight"): layer.name for layer in runner.layers for name in layer.names}

    def hook(name: str) -> Any:
        def run(module: Any, arguments: Any) -> None:
            entered = arguments[0].detach()
            totals[owner[name]] = totals[owner[name]] + dull(module, entered[:, :1] if name in first else entered)

        return run

    modules = dict(model.named_modules(remove_duplicate=False))
    handles = [modules[name].register_forward_pre_hook(hook(name)) for name in owner]
    model(x)
    for handle in handles:
        handle.remove()
    return list(totals.values())


# A ViT's logits are the class token's: behind its last attention the graph runs no other token, so only that one counts.
LAST = frozenset({"blocks.1.attn.proj", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"})


@pytest.mark.parametrize(("net", "narrowed"), [(small_cnn, frozenset()), (tiny_vit, LAST)])
def test_graph_and_whole_forwards_see_what_enters_every_layer(net: Any, narrowed: frozenset[str]) -> None:
    """The CNN's ``first`` and ``second`` share a weight: what enters either adds up."""
    model, shape = net()
    model, x = model.double(), torch.randn(3, *shape, dtype=torch.float64)
    graph = open_runner(model, x, quantize_ends=True)
    whole = open_runner(Unexportable(model).eval(), x, quantize_ends=True)
    assert graph.note is None
    assert whole.note is not None
    # Float64 sums in another order; one sample alone is a batch like any other.
    for runner, first in ((graph, narrowed), (whole, frozenset[str]())):
        for got, own in zip(all_moments(runner, x[:2], x[2:]), by_hooks(model, graph, x, first), strict=True):
            torch.testing.assert_close(got, own, rtol=1e-9, atol=1e-9 * own.abs().max().item())


class Reflecting(nn.Module):
    """A convolution that pads by reflection, called as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 1)
        self.conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", stride=2)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.stem(x)).mean((2, 3)))


def test_reflected_padding_is_part_of_the_input_in_both() -> None:
    torch.manual_seed(0)
    model, x = Reflecting().eval(), torch.randn(3, 1, 5, 6)
    graph = open_runner(model, x, quantize_ends=True)
    whole = open_runner(Unexportable(model).eval(), x, quantize_ends=True)
    position = [layer.name for layer in graph.layers].index("conv")
    wanted = dull(nn.Conv2d(2, 3, 3, stride=2), F.pad(model.stem(x).detach(), (1, 1, 1, 1), mode="reflect"))
    for runner in (graph, whole):
        check(all_moments(runner, x)[position], wanted)


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: Unexportable(model).eval()])
def test_rounded_inputs_are_what_enters(wrap: Any) -> None:
    """Under ``act_bits`` a layer multiplies rounded inputs: the moments are theirs."""
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).eval())
    x = torch.randn(20, 5)
    layers = open_runner(model, x, quantize_ends=True).layers
    ranges = calibrate(model, [x], lambda net, batch: net(batch), layers, 2)
    rounded = quantize_activations(model, ranges, layers)
    runner = open_runner(rounded, x, quantize_ends=True)
    got = all_moments(runner, x)[0]
    check(got, by_hooks_rounded(x, rounded))
    plain = all_moments(open_runner(model, x, quantize_ends=True), x)[0]
    assert (got - plain).abs().max() > 0.01 * plain.abs().max()  # two bits are not nothing


def by_hooks_rounded(x: Tensor, rounded: nn.Module) -> Tensor:
    """The dull moments of the four levels that inputs may have under two bits."""
    seen: list[Tensor] = []
    name, weight = next((n, p) for n, p in rounded.named_parameters() if p.dim() == 2)

    def noting(call: Call) -> Tensor:
        seen.append(call.x)
        return call.of(call.x)

    with Calls({name: weight}, noting):
        rounded(x)
    assert len(seen[0].unique()) <= 4
    return (seen[0].double().T @ seen[0].double())[None].detach()
