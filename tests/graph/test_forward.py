"""What would make every figure wrong is refused before the run, by name; the model stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import clado
from clado.profiling import profile
from tests.models import tiny_vit


class Net(nn.Module):
    """A small net; ``spoil`` acts on what leaves its convolution, and may use its batch norm."""

    def __init__(self, spoil: Any) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.spoil = spoil

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.spoil(self, self.conv(x))).mean((2, 3)))


def statistics(net: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, net.norm.running_mean, net.norm.running_var, training=True)


def counted(net: Any, x: Tensor) -> Tensor:
    net.norm.num_batches_tracked.add_(1)
    return x


def sometimes(net: Any, x: Tensor) -> Tensor:
    """Draws on batches that the first look does not have; the condition keeps it out of a graph."""
    return F.dropout(x, 0.5) if len(x) > 2 and x.abs().sum() > 0 else x


CASES = {
    "dropout": (
        lambda net, x: F.dropout(x, 0.5, training=True),
        r"draw nothing at random .*bernoulli_ at test_forward\.py",
    ),
    "noise": (lambda net, x: x + torch.randn_like(x), r"draw nothing at random .*randn_like at test_forward\.py"),
    "sometimes": (sometimes, "draw nothing at random .*got a draw"),
    "statistics": (statistics, r"no statistics over the batch .*batch_norm at test_forward\.py"),
    "buffers": (counted, "leave its buffers unchanged in eval mode, got changes of norm.num_batches_tracked"),
    "batch mean": (lambda net, x: x - x.mean(0), "treat samples independently"),
    "error": (lambda net, x: {}["x"], r"run on batches of data_loader, .* got KeyError: 'x' at test_forward\.py"),
    "part in train mode": (lambda net, x: net.norm.train()(x), "statistics over the batch|eval mode"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_model_that_cannot_be_measured_is_named_and_left_alone(name: str) -> None:
    spoil, message = CASES[name]
    model = Net(spoil).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(clado.CladoError, match=message) as caught:
        profile(model, [torch.randn(8, 1, 6, 6)], estimator="diagonal", quantize_ends=True, verbose=False)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


class Table(nn.Module):
    """Replaces a buffer that is no part of the state dict: once per size of the input, or (``always``) in every forward."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.first, self.last, self.always = nn.Linear(6, 6), nn.Linear(6, 3), always
        self.register_buffer("table", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.always:
            self.table = self.table + 1
        elif len(self.table) != x.shape[1]:
            self.table = torch.arange(x.shape[1], dtype=x.dtype)
        return self.last(self.first(x).relu() + self.table.sum())


def test_a_table_of_the_first_forward_may_stay() -> None:
    torch.manual_seed(0)
    model, x = Table(always=False).eval(), torch.randn(8, 6)
    sens = profile(model, [x], estimator="diagonal", quantize_ends=True, verbose=False)
    assert not any("whole forwards" in note for note in sens.info["warnings"])
    assert torch.equal(model.table, torch.arange(6.0))
    model = Table(always=True).eval()
    with pytest.raises(clado.CladoError, match="leave its buffers unchanged in eval mode, got changes of table"):
        profile(model, [x], estimator="diagonal", quantize_ends=True, verbose=False)
    assert torch.equal(model.table, torch.zeros(1))


def test_what_only_looks_like_it_passes() -> None:
    """Dropout in eval mode, attention that could drop, an instance norm: statistics of a sample are its own."""
    model = Net(lambda net, x: F.instance_norm(F.dropout(net.norm(x), 0.5, training=False))).eval()
    for net, x in ((model, torch.randn(4, 1, 6, 6)), (tiny_vit()[0], torch.randn(4, *tiny_vit()[1]))):
        state = torch.get_rng_state()
        sens = profile(net, [x], estimator="diagonal", quantize_ends=True, verbose=False)
        assert not any("whole forwards" in note for note in sens.info["warnings"])
        assert torch.equal(torch.get_rng_state(), state)


def test_inputs_that_do_not_fit_the_model_are_named_with_their_shape() -> None:
    with pytest.raises(clado.CladoError, match=r"of shapes \[\(2, 3, 8, 8\)\], got "):
        profile(tiny_vit()[0], [torch.randn(4, 3, 8, 8)], verbose=False)


def test_a_users_loss_that_fails_is_one_line() -> None:
    model, shape = tiny_vit()

    def loss(output: Tensor, batch: Any) -> Tensor:
        return {"logits": output}["boxes"]

    with pytest.raises(
        clado.CladoError, match=r"loss_func must take \(output, batch\), got .* at test_forward\.py"
    ) as caught:
        profile(model, [torch.randn(4, *shape)], estimator="diagonal", loss_func=loss, verbose=False)
    assert "\n" not in str(caught.value)
    named = [{"image": torch.randn(4, *shape)}]
    with pytest.raises(clado.CladoError, match=r"forward_step must be given for batches .* got dict"):
        profile(model, named, estimator="diagonal", loss_func=lambda out, batch: out.sum(1), verbose=False)
