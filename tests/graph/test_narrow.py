"""What nobody reads is not computed, and what is read stays as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clado.graph.capture import capture
from clado.graph.executor import Executor
from clado.graph.whole_forwards import WholeForwards
from clado.profiling import profile

TOKENS, WIDTH, HEADS = 7, 8, 2
Read = Callable[[Tensor], Tensor]
READS: dict[str, Read] = {
    "first": lambda x: x[:, 0],
    "last": lambda x: x[:, -1],
    "two": lambda x: x[:, 1:3].mean(1),
    "two apart": lambda x: x[:, 0] + x[:, 4],
}


class Block(nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = attention
        self.mask = nn.Buffer(torch.randn(1, 1, TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], TOKENS, 3, HEADS, WIDTH // HEADS)
        q, k, v = self.qkv(self.norms[0](x)).view(shape).permute(2, 0, 3, 1, 4).unbind()
        if self.attention == "matmul":
            out = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + self.mask).softmax(-1) @ v
        else:
            mask = self.mask if self.attention == "mask" else None
            out = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=self.attention == "causal")
        x = x + self.proj(out.transpose(1, 2).reshape(x.shape[0], TOKENS, WIDTH))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Vit(nn.Module):
    def __init__(self, attention: str, read: Read) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(4, WIDTH), nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.Sequential(*(Block(attention) for _ in range(2)))
        self.scale, self.head = nn.Parameter(torch.randn(TOKENS, 1)), nn.Linear(WIDTH, 5)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(self.blocks(self.embed(x) + self.position) * self.scale))


def vit(attention: str, read: Read) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Vit(attention, read).eval().double(), torch.randn(4, TOKENS, 4, dtype=torch.float64)


def executor_of(model: nn.Module, x: Tensor) -> Executor:
    with torch.no_grad():
        executor = Executor(capture(model, x[:2]))
        executor.self_test(x[:2], model)
        assert executor.outputs(executor.start(x))[0].allclose(model(x), rtol=1e-12, atol=1e-12)
    return executor


def rows(executor: Executor, layer: str) -> int:
    """Positions at which the layer's product runs."""
    k = [found.name for found in executor.layers].index(layer)
    return executor.captured.nodes[executor.cuts.starts[k]].meta["val"].shape[1]


@pytest.mark.parametrize(
    ("attention", "read"), [*(("sdpa", read) for read in READS), *((a, "first") for a in ("matmul", "mask", "causal"))]
)
def test_last_block_computes_what_is_read(attention: str, read: str) -> None:
    model, x = vit(attention, READS[read])
    executor = executor_of(model, x)
    wanted = {"first": 1, "last": 1, "two": 2, "two apart": 5}[read]
    assert [rows(executor, f"blocks.1.{name}") for name in ("proj", "up", "down")] == [wanted] * 3
    assert rows(executor, "blocks.1.qkv") == rows(executor, "blocks.0.down") == TOKENS
    whole = WholeForwards(model, x[:2])
    assert [layer.macs for layer in executor.layers] == [
        layer.macs for layer in whole.layers
    ]  # the model's, not the graph's
    share = executor.suffix_share
    assert share[0] < 1
    assert sorted(share, reverse=True) == share


def test_what_is_read_twice_stays_whole() -> None:
    model, x = vit("sdpa", lambda x: x[:, 0] + x.mean(1))
    assert rows(executor_of(model, x), "blocks.1.down") == TOKENS


@pytest.mark.parametrize("estimator", ["logit", "gradient", "exact"])
def test_estimators_agree_with_whole_forwards(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = vit("sdpa", READS["first"])
    model, x = model.float(), x.float()
    # Compensation goes by the rows that are read, so that its weights are others where all rows are computed.
    settings: dict[str, Any] = {"estimator": estimator, "num_samples": 4, "rounding": "nearest", "verbose": False}
    narrow = profile(model, [x], bits=(2, 4), **settings)
    monkeypatch.setattr("clado.graph.capture.narrow", lambda *_: None)
    whole = profile(model, [x], bits=(2, 4), **settings)
    assert narrow.info["forward_equivalents"] < 0.95 * whole.info["forward_equivalents"]
    scale = abs(whole.matrix).max()
    assert abs(narrow.matrix - whole.matrix).max() < 1e-4 * scale  # float32 differences of losses


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: x + x.tanh(),
    "residual": lambda x: x + x.transpose(1, 2).softmax(-1).transpose(1, 2),
    "norm": lambda x: nn.functional.layer_norm(x, (6,)),
    "other softmax": lambda x: x.softmax(-1),
    "own softmax": lambda x: x.softmax(1),
    "view": lambda x: x.view(x.shape[0], 5, 2, 3).transpose(2, 3).reshape(x.shape[0], 5, 6),
    "mixed view": lambda x: x.transpose(1, 2).reshape(x.shape[0], 5, 6),
    "product": lambda x: x @ torch.linspace(-1, 1, 36, dtype=x.dtype).view(6, 6),
    "square": lambda x: x @ x.transpose(1, 2) @ x,
    "scale": lambda x: x * torch.linspace(0, 1, 5, dtype=x.dtype).view(5, 1),
    "slice": lambda x: torch.cat([x[:, 1:], x[:, :1]], 1),
    "flip": lambda x: x.flip(1),
}
ENDS: dict[str, Read] = {
    "token": lambda x: x[:, 2],
    "span": lambda x: x[:, 1:4].sum(1),
    "columns": lambda x: x[:, :, 1:],
}


class Chain(nn.Module):
    def __init__(self, ops: list[str], end: str) -> None:
        super().__init__()
        self.first, self.ops, self.end = nn.Linear(6, 6), ops, end

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for name in self.ops:
            x = OPS[name](x)
        return ENDS[self.end](x).flatten(1)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from(sorted(OPS)), max_size=6), st.sampled_from(sorted(ENDS)))
def test_any_chain_gives_what_the_model_gives(ops: list[str], end: str) -> None:
    torch.manual_seed(1)
    executor_of(Chain(ops, end).eval().double(), torch.randn(3, 5, 6, dtype=torch.float64))
