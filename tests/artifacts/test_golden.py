"""Files of every past schema are still read, and mean what they meant: :mod:`tests.artifacts.golden.make` made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import clado
from tests.record.nets import cnn, images

GOLDEN = Path(__file__).parent / "golden"
SETS = sorted(str(path.parent.relative_to(GOLDEN)) for path in GOLDEN.glob("*/*/expected.json"))


def expected(name: str) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """A set's folder, its numbers and its tensors."""
    folder = GOLDEN / name
    return folder, json.loads((folder / "expected.json").read_text()), load_file(folder / "expected.safetensors")


def check_layers(layers: tuple[clado.Layer, ...], wanted: list[list[Any]]) -> None:
    found = [[layer.name, layer.kind, list(layer.shape), layer.macs, list(layer.names)] for layer in layers]
    assert found == wanted
    assert layers[4].names == ("first.weight", "second.weight")  # one weight, two names


def check_quantizer(quantizer: clado.Quantizer, wanted: dict[str, Any]) -> None:
    assert {name: getattr(quantizer, name) for name in wanted} == wanted


def check_plan(plan: clado.Plan, values: dict[str, Any]) -> None:
    for name, value in values["plan"].items():
        assert getattr(plan, name) == value, name
    check_layers(plan.layers, values["layers"])
    check_quantizer(plan.quantizer, values["quantizer"])


def test_the_sets_are_there() -> None:
    assert {"schema1/float", "schema1/rounded"} <= set(SETS)


@pytest.mark.parametrize("name", SETS)
def test_matrix(name: str, tmp_path: Path) -> None:
    folder, values, tensors = expected(name)
    sens = clado.Sensitivity.load(folder)
    for _ in range(2):  # as it lies there, and written by the present code
        for field in ("delta_loss", "matrix", "stderr", "sample_digests"):
            np.testing.assert_array_equal(getattr(sens, field), tensors[field].numpy(), field)
        assert list(sens.bits) == values["bits"]
        assert sens.num_samples == values["num_samples"] == 8
        check_layers(sens.layers, values["layers"])
        check_quantizer(sens.quantizer, values["quantizer"])
        sens = clado.Sensitivity.load(sens.save(tmp_path / "again.safetensors"))
    plan = values["plan"]
    assert sens.predict(plan["bits"]) == pytest.approx(plan["objective"], rel=1e-12)
    solved = clado.solve(sens, avg_bits=3.5, size_bytes=1200, seed=1)
    assert solved.bits == plan["bits"]


@pytest.mark.parametrize("name", SETS)
def test_plan(name: str, tmp_path: Path) -> None:
    folder, values, tensors = expected(name)
    plan = clado.Plan.load(folder)
    check_plan(plan, values)
    check_plan(clado.Plan.load(plan.save(tmp_path / "plan.json")), values)
    check_plan(clado.Plan.load(folder / "export"), values)
    check_weights(clado.apply(cnn(), plan), tensors)  # and it still knows the model it was made for


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SETS)
def test_export(name: str, packed: bool) -> None:
    folder, _, tensors = expected(name)
    model = cnn()
    for tensor in model.state_dict().values():
        tensor.zero_()  # nothing may come from the module
    loaded = clado.load(folder / "export", model, packed=packed)
    if not packed:
        check_weights(loaded, tensors)
    assert torch.equal(tensors["inputs"], images(8)[0])
    with torch.no_grad():
        outputs = loaded(tensors["inputs"])
    torch.testing.assert_close(outputs, tensors["outputs"], rtol=0, atol=1e-4 * tensors["outputs"].abs().max().item())


def test_rounded_inputs_are_rounded() -> None:
    """The two variants would give the same outputs for the same weights if the ranges were lost."""
    folder, _, tensors = expected("schema1/rounded")
    plain = cnn()
    plain.load_state_dict(
        {name.removeprefix("weight."): v for name, v in tensors.items() if name.startswith("weight.")}
    )
    with torch.no_grad():
        outputs, rounded = plain(tensors["inputs"]), clado.load(folder / "export", cnn())(tensors["inputs"])
    assert (outputs - rounded).abs().max() > 1e-3 * outputs.abs().max()


def check_weights(model: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Bit for bit, what is not quantized included."""
    state = model.state_dict()
    assert {f"weight.{name}" for name in state} == {name for name in tensors if name.startswith("weight.")}
    for name, value in state.items():
        assert torch.equal(value, tensors[f"weight.{name}"]), name
        assert value.dtype == tensors[f"weight.{name}"].dtype, name
