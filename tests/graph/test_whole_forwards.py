"""Models that cannot be exported: the same results as from the graph, by whole forwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import clado
from clado.profiling import profile
from tests.profiling.test_estimators import BITS
from tests.profiling.test_profile import net_and_data, relative
from tests.record.nets import Unexportable


@pytest.mark.parametrize("estimator", ["diagonal", "logit", "gradient", "exact"])
@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_whole_forwards_give_what_the_graph_gives(name: str, estimator: str) -> None:
    model, x, y = net_and_data(name, 4)
    options: dict[str, Any] = {"estimator": estimator, "loss": "cross_entropy", "quantize_ends": True, "verbose": False}
    # Compensation goes by the rows that are read, which whole forwards do not know.
    options |= {"precision": "float64", "batch_size": 3, "rounding": "nearest"}
    graph = profile(model, [(x, y)], BITS, **options)
    whole = profile(Unexportable(model).eval(), [(x, y)], BITS, **options)
    assert [f"inner.{layer.name}" for layer in graph.layers] == [layer.name for layer in whole.layers]
    assert [layer.macs for layer in graph.layers] == [layer.macs for layer in whole.layers]
    assert relative(whole.delta_loss, graph.delta_loss) < 1e-9
    np.testing.assert_allclose(
        whole.interaction, graph.interaction, rtol=0, atol=1e-9 * np.abs(graph.interaction).max()
    )
    np.testing.assert_allclose(whole.stderr, graph.stderr, rtol=0, atol=1e-7 * np.abs(graph.stderr).max())
    assert "whole forwards for every perturbation" in whole.info["warnings"][0]
    assert "must be exportable" in whole.info["warnings"][0]


def test_a_low_precision_needs_a_graph() -> None:
    model, x, _ = net_and_data("vit", 2)
    sens = profile(Unexportable(model).eval(), [x], BITS, precision="bfloat16", verbose=False)
    assert sens.info["precision"] == "float32"
    assert any("float32 instead of bfloat16" in note for note in sens.info["warnings"])


class Drawing(nn.Module):
    """Dropout left on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.nn.functional.dropout(self.fc(x), 0.5, training=True))


def test_chance_is_refused() -> None:
    with pytest.raises(clado.CladoError, match=r"draw nothing at random .* got bernoulli_ at test_whole_forwards\.py"):
        profile(Drawing().eval(), [torch.randn(4, 4)], BITS, verbose=False)
