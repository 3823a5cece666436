"""What the tests of the ops of all pairs share: rows in samples, weights with zeros, two sets of perturbations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.ops.devices import same_bits

# V, W (None: the perturbations themselves), samples, rows per sample; panels of 16 on the CPU, tiles of 64 on the GPU.
DENSE = [
    (1, None, 1, 1),
    (1, 1, 3, 1),
    (3, None, 2, 5),
    (5, 3, 4, 3),
    (17, None, 3, 2),
    (20, 70, 2, 4),
    (67, 2, 1, 9),
    (2, None, 2, 300),
    (2, 3, 0, 4),
]
Sums = tuple[Tensor, Tensor]


def drawn_weight(shape: tuple[int, ...], device: str = "cpu") -> Tensor:
    """Some 0, some equal, some not."""
    return torch.rand(shape, device=device).mul(4).round() / 3


def check_blocks(run: Callable[[Tensor, Tensor | None], Sums], delta: Tensor) -> None:
    """Blocks of perturbations against each other are the blocks of the whole, bit for bit; the other way round, the mirror."""
    whole = run(delta, None)
    assert torch.equal(whole[0], whole[0].T)
    assert torch.equal(whole[1], whole[1].T)
    cut = len(delta) // 3
    first, second = delta[:cut], delta[cut:]
    assert same_bits(run(first, second), tuple(x[:cut, cut:].contiguous() for x in whole))
    assert same_bits(run(second, first), tuple(x[cut:, :cut].contiguous() for x in whole))
    assert same_bits(run(delta, delta), whole)
    assert run(first[:0], second)[0].shape == (0, len(second))
    assert run(first, second[:0])[0].shape == (cut, 0)


def check_spoiled(run: Callable[[Tensor, Tensor | None], Sums], delta: Tensor) -> None:
    """NaN and infinity spoil their rows and columns and leave every other bit alone, with another side too."""
    clean = run(delta, None)
    bad = [1, len(delta) - 2]
    spoiled = delta.clone()
    spoiled[bad[0]].view(-1)[-1] = torch.nan
    spoiled[bad[1]].view(-1)[0] = torch.inf
    hit = torch.zeros(len(delta), dtype=torch.bool, device=delta.device)
    hit[bad] = True
    for got, wanted, mask in (
        (run(spoiled, None), clean, hit[:, None] | hit[None, :]),
        (run(delta, spoiled), clean, hit[None, :].expand(len(delta), -1)),
        (run(spoiled, delta), clean, hit[:, None].expand(-1, len(delta))),
    ):
        for x, y in zip(got, wanted, strict=True):
            assert torch.equal(~x.isfinite(), mask)
            assert torch.equal(x[~mask], y[~mask])


def check_order(run: Callable[[Tensor, Tensor | None], Sums], delta: Tensor) -> None:
    """Permuting the perturbations permutes the result exactly."""
    order = torch.randperm(len(delta))
    whole = run(delta, None)
    assert same_bits(run(delta[order], None), tuple(x[order][:, order] for x in whole))


def check_op(op: Any, function: Callable[..., Sums], arguments: tuple[Any, ...]) -> None:
    """opcheck, and a graph without a break."""
    torch.library.opcheck(op, arguments)
    compiled = torch.compile(lambda *a: function(*a)[0] * 2, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(*arguments), function(*arguments)[0] * 2)
