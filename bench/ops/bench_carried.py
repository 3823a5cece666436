"""carried_*: bytes are one read of the clean values and differences and one write; the rival is f(x + d) − f(x) in torch."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import clado_ext
from bench.harness import Case, Grid
from clado_ext.reference import carried as oracle

F = torch.nn.functional


def cases(grid: Grid) -> Iterator[Case]:
    if grid.shapes or grid.dtypes:
        return
    device, streams, n, tokens, width = grid.device, 3, 2, 197, 1536
    x = torch.randn(n, tokens, width, device=device)
    d = (1e-2 * torch.randn(streams * n, tokens, width, device=device)).bfloat16()
    y = x[..., :384].contiguous()
    e = 1e-2 * torch.randn(streams * n, tokens, 384, device=device)
    weight = torch.rand(384, device=device)
    r, b = 1e-2 * torch.randn_like(e), e.bfloat16()
    s = torch.randn(n, 6, tokens, tokens, device=device)
    p = s.softmax(-1)
    g = (1e-2 * torch.randn(streams * n, 6, tokens, tokens, device=device)).bfloat16()

    def whole(clean: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return (delta.view(streams, *clean.shape) + clean).flatten(0, 1)

    def minus(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return after.view(streams, *before.shape).sub_(before).flatten(0, 1).bfloat16()

    gelu_x, norm_y = F.gelu(x), F.layer_norm(y, (384,), weight)

    def torch_softmax() -> torch.Tensor:
        after = whole(s, g).softmax(-1)
        return torch.cat([(after.view(streams, *p.shape) - p).flatten(0, 1), after], -1).bfloat16()

    # given, what is right, the rival, what is moved
    work: dict[str, tuple[tuple[Any, ...], Callable[[], Any], Callable[[], Any], tuple[torch.Tensor, ...]]] = {
        "carried_gelu": (
            (x, d, True),
            lambda: oracle.carried_gelu(x, d),
            lambda: minus(F.gelu(whole(x, d)), gelu_x),
            (x, d, d),
        ),
        "carried_layer_norm": (
            (y, e, weight, 1e-5, True),
            lambda: oracle.carried_layer_norm(y, e, weight),
            lambda: minus(F.layer_norm(whole(y, e), (384,), weight), norm_y),
            (y, e, e.bfloat16()),
        ),
        "carried_add_layer_norm": (
            (y, r, b, weight, 1e-5, True),
            lambda: oracle.carried_add_layer_norm(y, r, b, weight)[1],
            lambda: minus(F.layer_norm(whole(y, r + b), (384,), weight), norm_y),
            (y, r, r, b, b),
        ),
        "carried_softmax": (
            (s, p, g, 1.0, True),
            lambda: oracle.carried_softmax(s, p, g),
            torch_softmax,
            (p, g, g, g),
        ),
    }
    for name, (given, wanted, rival, moved) in work.items():

        def judge(got: Any, wanted: Callable[[], Any] = wanted) -> None:
            right = wanted()
            change = got[1] if isinstance(got, tuple) else got  # after the sum
            if not (change.double() - right).norm() <= 4e-3 * right.norm():
                raise AssertionError("differs from the float64 twin")

        run, shape = partial(getattr(clado_ext, name), *given), f"S={streams} N={n} T={tokens}"
        size = sum(t.nbytes for t in moved)
        yield Case(name, shape, "bfloat16", run, judge, size, 0, {"torch": rival}, given=given)
