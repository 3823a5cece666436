"""A profile on every device present against float64 on the CPU; needs torch and what clado.profile needs, no timm."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clado.artifacts import Sensitivity
from clado.profiling import Options, open_run, profile
from tests.ops.devices import DEVICES

BITS, SAMPLES = (2, 4, 8), 12


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A convolution with batch norm, two blocks and a head on one token."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 2, 2), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.norm(self.stem(x)).flatten(2).transpose(1, 2))
        return self.head(x[:, 0])


class Uncapturable(Transformer):
    """Its forward asks for a value, so that no graph can be captured."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.detach().abs().max()) > 0 else super().forward(x + 1)


@cache
def setting(kind: type[nn.Module] = Transformer) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = kind().eval()
    return model, torch.randn(SAMPLES, 1, 8, 8), torch.arange(SAMPLES) % 10


def run(device: str, kind: type[nn.Module] = Transformer, **arguments: Any) -> Sensitivity:
    model, x, y = setting(kind)
    defaults = {"num_samples": SAMPLES, "batch_size": 5, "quantize_ends": True, "verbose": False}
    defaults["rounding"] = "nearest"  # whose weights do not depend on sums of another order
    return profile(model, [(x, y)], BITS, **{**defaults, "device": device, **arguments})


@cache
def wanted(estimator: str, **arguments: Any) -> Sensitivity:
    return run("cpu", estimator=estimator, precision="float64", **arguments)


def error(got: Sensitivity, known: Sensitivity) -> float:
    pairs = ((got.delta_loss, known.delta_loss), (got.interaction, known.interaction))
    return max(float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0)) for a, b in pairs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
@pytest.mark.parametrize("estimator", ["diagonal", "logit", "gradient", "corrected", "exact"])
def test_every_estimator_agrees_with_float64(estimator: str, loss: str, device: str) -> None:
    sens = run(device, estimator=estimator, loss=loss)
    assert sens.info["device"] == device
    # Measured on a CPU: at most 3e-5. Losses as small as 1e-4 come from differences of logits of order one, good to 1e-7.
    assert error(sens, wanted(estimator, loss=loss)) < 2e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("precision", "limit"), [("tf32", 6e-3), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("estimator", ["logit", "exact"])
def test_carried_differences_agree_with_float64(estimator: str, precision: str, limit: float, device: str) -> None:
    sens = run(device, estimator=estimator, precision=precision)
    assert sens.info["precision"] == precision  # the probe found no reason for float32
    assert (
        error(sens, wanted(estimator)) < limit
    )  # losses are quadratic in δ, whose errors are to be below half of this


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_in_two_calls_gives_the_bits_of_one(precision: str, device: str, tmp_path: Path) -> None:
    whole = run(device, precision=precision)
    run(device, precision=precision, num_samples=5, output_dir=tmp_path)
    resumed = run(device, precision=precision, output_dir=tmp_path)
    for name in ("delta_loss", "interaction", "stderr"):
        assert np.array_equal(getattr(resumed, name), getattr(whole, name)), name


@pytest.mark.parametrize("device", DEVICES)
def test_quantized_activations_agree_with_float64(device: str) -> None:
    known = wanted("logit", act_bits=8)
    sens = run(device, act_bits=8)
    assert sens.activations.ranges.keys() == known.activations.ranges.keys()
    assert (
        error(sens, known) < 2e-2
    )  # an activation beside the border of two codes falls on the other side now and then


@pytest.mark.parametrize("device", DEVICES)
def test_whole_forwards_agree_with_float64(device: str, capfd: pytest.CaptureFixture[str]) -> None:
    sens = run(device, Uncapturable, estimator="exact")
    assert capfd.readouterr() == ("", "")  # torch's dump of a graph that cannot be exported
    assert any("whole forwards" in note for note in sens.info["warnings"])
    assert error(sens, wanted("exact")) < 2e-4


@pytest.mark.parametrize("device", DEVICES)
def test_a_users_loss_agrees_with_the_built_in_one(device: str) -> None:
    def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(output, batch[1].to(output.device), reduction="none")

    sens = run(device, estimator="exact", loss_func=loss)
    assert error(sens, wanted("exact", loss="cross_entropy")) < 5e-4  # a user's loss is subtracted in float32


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU and CUDA kernels")
@pytest.mark.parametrize("estimator", ["logit", "gradient", "exact"])
def test_a_chunk_takes_the_memory_that_is_planned(estimator: str) -> None:
    torch.manual_seed(0)
    model, x = Transformer(64).eval().cuda(), torch.randn(256, 1, 64, 64)
    with torch.no_grad():
        ready = open_run(model, [x], Options(estimator=estimator, batch_size=256, num_samples=256, scale_steps=1))
        planned = ready.pieces.chunk_bytes()
        assert planned is not None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ready.measure(False)
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(planned, rel=0.05)
