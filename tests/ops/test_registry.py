"""CUDA tensors in a build without CUDA kernels: by way of the CPU, the same bits, one warning."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clado_ext import _registry


def doubled(x: Tensor, by: float, out: Tensor, total: Tensor) -> None:
    assert x.device.type == out.device.type == total.device.type == "cpu"
    out.copy_(x * by)
    total.copy_(out.sum())


class Elsewhere:
    """As much of a tensor on a GPU as is asked for."""

    is_cuda = True

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def copy_(self, other: Tensor) -> None:
        self.held.copy_(other)


def listed(x: list[Tensor], nothing: list[None], out: list[Tensor]) -> None:
    for one, other in zip(x, out, strict=True):
        other.copy_(one + 1)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "_native", SimpleNamespace(has_cuda=False))
    monkeypatch.setattr(torch, "empty_like", lambda like, device: torch.empty(like.held.shape))
    _registry._warn_slow.cache_clear()


@pytest.mark.usefixtures("without_kernels")
def test_results_come_by_way_of_the_cpu_and_once_with_a_warning() -> None:
    outputs: Any = Elsewhere(torch.zeros(3)), Elsewhere(torch.zeros(()))
    x = torch.arange(3.0).expand(2, 3)[0]  # an input is not written to: it may overlap itself
    with pytest.warns(UserWarning, match="built without CUDA kernels.*clado doctor"):
        _registry.by_host(doubled, (x, 2.0), outputs)
    assert outputs[0].held.tolist() == [0.0, 2.0, 4.0]
    assert outputs[1].held.item() == 6.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _registry.by_host(doubled, (x, 3.0), outputs)
    assert outputs[1].held.item() == 9.0


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.filterwarnings("ignore:clado_ext")
def test_lists_of_tensors_go_the_same_way() -> None:
    outputs: Any = [Elsewhere(torch.zeros(2)), Elsewhere(torch.zeros(()))]
    _registry.by_host(listed, ([torch.ones(2), torch.tensor(4.0)], [None]), (outputs,))
    assert [output.held.tolist() for output in outputs] == [[2.0, 2.0], 5.0]
