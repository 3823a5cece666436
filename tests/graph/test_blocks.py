"""A graph as a row of blocks: the model's own outputs, every layer in one block, parameters replaced and learned."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clado.graph import Blocks, open_runner
from clado.graph.blocks import MOST_LAYERS
from tests.models import small_cnn, timm_model, tiny_vit


def opened(model: nn.Module, x: Tensor) -> Blocks:
    found = Blocks.of(open_runner(model, x, quantize_ends=True, stacked=False))
    assert found is not None
    return found


def through(blocks: Blocks, x: Tensor, weights: dict[str, Tensor]) -> Any:
    live = blocks.start(x)
    for block in blocks.blocks:
        live = blocks.run(block, live, weights)
    return blocks.outputs(live)


class Dense(nn.Module):
    """Two values live from the first layer to the last: no place holds a single tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3 * MOST_LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[0](x)
        y = first
        for layer in self.layers[1:]:
            y = torch.relu(layer(y))
        return y + first


@pytest.mark.parametrize("make", [small_cnn, tiny_vit, lambda: timm_model("resnet18"), lambda: (Dense().eval(), (6,))])
def test_blocks_give_the_models_outputs_and_hold_every_layer_once(make: Any) -> None:
    model, shape = make()
    x = torch.randn(3, *shape)
    blocks = opened(model, x)
    with torch.no_grad():
        found, wanted = through(blocks, x, {}), model(x)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())  # float32, fused otherwise
    held = [layer.name for block in blocks.blocks for layer in block.layers]
    assert sorted(held) == sorted(layer.name for layer in blocks.captured.layers)
    assert max(len(block.layers) for block in blocks.blocks) <= 2 * MOST_LAYERS


def test_a_block_ends_where_least_of_a_sample_lives() -> None:
    widths = (6, 24, 12, 24, 9, 24, 24, 24, 24, 24, 24)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths))).eval()
    found = [[layer.name for layer in block.layers] for block in opened(model, torch.randn(2, 6)).blocks]
    assert found == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "9"]]


def test_what_enters_a_layer_is_what_its_module_gets() -> None:
    model, shape = timm_model("resnet18")
    x, seen = torch.randn(2, *shape), {}
    blocks = opened(model, x)
    for layer in blocks.captured.layers:
        module = model.get_submodule(layer.name)
        module.register_forward_pre_hook(lambda m, args, name=layer.name: seen.update({name: args[0]}))
    with torch.no_grad():
        model(x)
        live = blocks.start(x)
        for block in blocks.blocks:
            for layer in block.layers:
                entering = blocks.entering(block, layer, live, {})
                assert entering is not None
                wanted = seen[layer.name]
                assert torch.allclose(entering[1], wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
            live = blocks.run(block, live, {})


def test_parameters_are_replaced_everywhere_and_learned() -> None:
    model, shape = small_cnn()
    x = torch.randn(4, *shape)
    blocks = opened(model, x)
    shared = "first.weight"  # second.weight is the same storage
    other = {shared: torch.randn(8, 8).requires_grad_(), "norm.bias": torch.randn(8).requires_grad_()}
    found = through(blocks, x, other)
    with torch.no_grad():
        model.first.weight.copy_(other[shared])
        model.norm.bias.copy_(other["norm.bias"])
    assert torch.allclose(found, model(x), rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(found.square().sum(), list(other.values()))
    wanted = torch.autograd.grad(model(x).square().sum(), [model.first.weight, model.norm.bias])
    for got, own in zip(gradients, wanted, strict=True):
        assert torch.allclose(got, own, rtol=1e-3, atol=1e-4 * own.abs().max().item())
    assert all(p.grad is None for p in model.parameters())


def test_a_shift_is_absorbed_by_a_bias_or_the_running_mean_behind() -> None:
    model, shape = small_cnn()
    blocks = opened(model, torch.randn(2, *shape))
    found = {layer.name: blocks.absorbs(layer) for layer in blocks.captured.layers}
    assert found["stem"] == ("stem.bias", -1.0)
    assert found["body.0"] == ("norms.0.running_mean", 1.0)
    x = torch.randn(3, *shape)
    shift = torch.arange(8.0)
    with torch.no_grad():
        wanted = model(x)
        model.body[0].register_forward_hook(lambda m, args, out: out + shift[:, None, None])
        model.norms[0].running_mean += shift
        assert torch.allclose(model(x), wanted, rtol=1e-4, atol=1e-4)


def test_models_without_a_graph_have_no_blocks() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum().item() > 0 else -self.layer(x)

    assert Blocks.of(open_runner(Branching().eval(), torch.randn(2, 4), quantize_ends=True, stacked=False)) is None
