"""ONNX of models with any inputs and outputs: every one under its name, and a batch size that a model fixes is said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import clado
from clado.deploy import verify
from clado.deploy.formats import onnx as writer
from clado.quant import Quantizer
from tests.models import random_plan

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


class Two(nn.Module):
    """Two inputs, two outputs in a dictionary, one of them named as a parameter is and one as a value of torch's graph."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(12, 16), nn.Linear(5, 16), nn.Linear(16, 4)
        self.scale = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, image: Tensor, mask: Tensor) -> dict[str, Any]:
        features = (self.left(image) * self.scale + self.right(mask)).relu()
        return {"scale": features, "head": {"linear": self.head(features)}, "nothing": None, "same": features}


class Pair(NamedTuple):
    logits: Tensor
    features: Tensor


@dataclass
class Classes:
    """Within a list: pytrees take it for one leaf without tensors."""

    best: Tensor


class Tuples(Two):
    def forward(self, image: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        found = super().forward(image, mask)
        return Pair(found["head"]["linear"], found["scale"]), [Classes(found["scale"].argmax(1))]


class Fixed(nn.Module):
    """``len`` of a tensor is a number to torch.export: the batch size is baked in."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.query = nn.Linear(12, 16), nn.Linear(16, 4), nn.Parameter(torch.randn(1, 3, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.body(x)[:, None] + self.query.expand(len(x), -1, -1)).relu().mean(1))


def shapes(folder: Path) -> dict[str, list[Any]]:
    """{name: its shape} of what a graph takes and gives."""
    graph = onnx.load(folder / writer.MODEL_FILE).graph
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def close(found: np.ndarray, wanted: Tensor) -> bool:
    return bool(np.abs(found - wanted.detach().numpy()).max() <= 1e-5 * wanted.abs().max())


@pytest.mark.parametrize("given", ["arguments", "names"])
def test_every_input_and_output_has_its_name(given: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, image, mask = Two().eval(), torch.randn(3, 12), torch.randn(3, 5)
    plan = random_plan(net, Quantizer(), (3, 8))
    example = (image, mask) if given == "arguments" else {"mask": mask, "image": image}
    written = clado.export(net, plan, tmp_path / "out", "onnx", example=example)
    names = ["image", "mask"] if given == "arguments" else ["mask", "image"]
    outputs = ["output_scale", "head_linear", "same"]
    assert list(shapes(tmp_path / "out")) == [*names, *outputs]
    assert all(shape[0] == "batch" for shape in shapes(tmp_path / "out").values())
    assert written.notes == (
        f"the graph takes {', '.join(names)} and gives {', '.join(outputs)}, of any number of samples",
    )
    said = verify(net, plan, tmp_path / "out", "onnx", example=example)
    assert said.startswith(f"onnxruntime gives {', '.join(outputs)} of clado.apply within")
    small = clado.apply(net, plan)
    for n in (1, 7):
        x, m = torch.randn(n, 12), torch.randn(n, 5)
        wanted, found = small(x, m), writer.outputs_of(tmp_path / "out", {"image": x, "mask": m})
        assert close(found["head_linear"], wanted["head"]["linear"])
        assert close(found["output_scale"], wanted["scale"])
        assert close(found["same"], wanted["scale"])
    with pytest.raises(clado.CladoError, match="verify: example must hold what the graph takes, got no mask"):
        writer.outputs_of(tmp_path / "out", {"image": image})


def test_tuples_of_outputs_and_whole_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, example = Tuples().eval(), (torch.randn(3, 12), torch.randn(3, 5))
    plan = random_plan(net, Quantizer(), (8,))
    clado.export(net, plan, tmp_path / "out", "onnx", example=example)
    found = writer.outputs_of(tmp_path / "out", {"image": example[0], "mask": example[1]})
    (logits, features), (best,) = clado.apply(net, plan)(*example)
    assert list(found) == ["output_0_logits", "output_0_features", "output_1_0_best"]
    assert close(found["output_0_logits"], logits)
    assert close(found["output_0_features"], features)
    assert (found["output_1_0_best"] == best.best.numpy()).all()
    verify(net, plan, tmp_path / "out", "onnx", example=example)
    other = random_plan(net, Quantizer(), (2,))
    with pytest.raises(
        clado.CladoError, match="verify: output_0_logits, output_0_features, output_1_0_best must equal"
    ):
        verify(net, other, tmp_path / "out", "onnx", example=example)


def test_the_graph_is_that_of_forward_step_and_takes_what_it_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Two().eval()
    plan = random_plan(net, Quantizer(), (4,))
    batch = {"x": torch.rand(4, 12), "m": torch.rand(4, 5), "labels": torch.zeros(4, dtype=torch.int64)}

    def step(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
        return model(given["x"] / 0.1 - 3, given["m"])["head"]["linear"]

    written = clado.export(net, plan, tmp_path / "out", "onnx", example=batch, forward_step=step)
    assert list(shapes(tmp_path / "out")) == ["x", "m", "logits"]
    assert written.notes[1] == "left out, since the outputs do not depend on it: labels"
    found = writer.outputs_of(tmp_path / "out", batch)["logits"]
    assert close(found, step(clado.apply(net, plan), batch))
    said = verify(net, plan, tmp_path / "out", "onnx", example=batch, forward_step=step)
    assert said.startswith("onnxruntime gives the logits of clado.apply within")
    with pytest.raises(clado.CladoError, match="verify: logits must equal"):
        verify(
            net,
            plan,
            tmp_path / "out",
            "onnx",
            example=batch,
            forward_step=lambda model, given: model(given["x"], given["m"])["head"]["linear"],
        )


@pytest.mark.parametrize("samples", [1, 8])
def test_a_batch_size_that_the_model_fixes_is_said(samples: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Fixed().eval(), torch.randn(samples, 12)
    plan = random_plan(net, Quantizer(), (4,))
    written = clado.export(net, plan, tmp_path / "out", "onnx", example=x)
    assert shapes(tmp_path / "out") == {"input": [samples, 12], "logits": [samples, 4]}
    assert written.notes == (
        f"the graph takes input and gives logits, of exactly {samples} sample{'s' * (samples > 1)}, which the model fixes",
    )
    assert close(writer.run(tmp_path / "out", x), clado.apply(net, plan)(x))
    verify(net, plan, tmp_path / "out", "onnx", example=x)
    with pytest.raises(clado.CladoError, match=f"example must hold {samples} samples, as the graph takes, got 3"):
        verify(net, plan, tmp_path / "out", "onnx", example=torch.randn(3, 12))
    with pytest.raises(clado.CladoError, match=r"verify: onnxruntime must run the graph, got \w+: [^\n]*$"):
        writer.run(tmp_path / "out", torch.randn(3, 12))


def test_bad_examples_are_one_line(tmp_path: Path) -> None:
    net, x = Two().eval(), torch.randn(3, 12)
    plan = random_plan(net, Quantizer(), (4,))
    for example, reason in (
        (x, r"model must run on example, of shapes \[\(3, 12\)\], got TypeError: [^\n]*$"),
        ((x, torch.randn(4, 5)), r"example must hold tensors \[n, …\] of one length, got \[\(3, 12\), \(4, 5\)\]"),
        ("images", r"example must hold tensors \[n, …\] of one length, got str"),
    ):
        with pytest.raises(clado.CladoError, match=f"export: {reason}"):
            clado.export(net, plan, tmp_path / "out", "onnx", example=example)
    assert not (tmp_path / "out").exists()

    def nothing(model: nn.Module, batch: Any) -> str:
        return "logits"

    with pytest.raises(clado.CladoError, match="export: model must return tensors, got str"):
        clado.export(net, plan, tmp_path / "out", "onnx", example=x, forward_step=nothing)


def test_labels_do_not_lend_the_graph_their_length(tmp_path: Path) -> None:
    """torch may take the number of samples from any input that has it."""
    torch.manual_seed(0)

    class Tokens(Fixed):
        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.body(x)[:, None] + self.query.expand(x.shape[0], -1, -1)).relu().mean(1))

    net, batch = Tokens().eval(), (torch.randn(3, 12), torch.zeros(3, dtype=torch.int64))
    plan = random_plan(net, Quantizer(), (4,))
    given: dict[str, Any] = {"example": batch, "forward_step": lambda model, batch: model(batch[0])}
    clado.export(net, plan, tmp_path / "out", "onnx", **given)
    assert list(shapes(tmp_path / "out")) == ["input_0", "logits"]
    verify(net, plan, tmp_path / "out", "onnx", **given)
    with pytest.raises(clado.CladoError, match="export: example must be looked at by the model, got none of it is"):
        clado.export(
            net,
            plan,
            tmp_path / "none",
            "onnx",
            example=batch,
            forward_step=lambda model, batch: model(torch.ones(2, 12)),
        )


def test_a_model_in_train_mode_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    model = Fixed().train()
    plan = random_plan(model, Quantizer())
    with pytest.raises(
        clado.CladoError, match=r"export: model must be in eval mode \(model.eval\(\)\), got train mode"
    ):
        clado.export(model, plan, tmp_path / "out", "onnx", example=torch.randn(2, 12))
    assert model.training


class Windows(nn.Module):
    """Attention over one, two and more dimensions in front of the rows, with and without a mask, by position and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(12, 16), nn.Linear(16, 4)
        self.register_buffer("mask", torch.randn(2, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        attention = nn.functional.scaled_dot_product_attention
        tokens = self.embed(x).reshape(-1, 2, 1, 3, 16)  # samples, windows, heads, rows, channels
        windows = attention(tokens, tokens, tokens, self.mask) + attention(query=tokens, key=tokens, value=tokens)
        rows = windows.flatten(1, 3)
        return self.head(attention(rows, rows, rows).mean(1))


def test_attention_over_any_dimensions(tmp_path: Path) -> None:
    """Hiera's windows; torch's exporter knows four dimensions alone."""
    torch.manual_seed(0)
    net, x = Windows().eval(), torch.randn(3, 6, 12)
    plan = random_plan(net, Quantizer(), (8,))
    clado.export(net, plan, tmp_path / "out", "onnx", example=x)
    verify(net, plan, tmp_path / "out", "onnx", example=x)
    assert close(writer.run(tmp_path / "out", torch.cat([x, x])), clado.apply(net, plan)(torch.cat([x, x])))
