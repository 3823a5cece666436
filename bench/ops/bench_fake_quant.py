"""fake_quant into given outputs: bytes are one read of the weight and one write per width."""

from collections.abc import Iterator

import torch

import clado_ext
from bench.harness import Case
from clado_ext.reference import fake_quant as oracle

BITS = (2, 4, 8)


def per_channel(weight: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
    """What torch offers: one call, and one read of the weight, per width."""
    zero = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
    return [
        torch.fake_quantize_per_channel_affine(weight, s[:, 0], zero, 0, -(2 ** (b - 1)), 2 ** (b - 1) - 1)
        for b, s in zip(BITS, scale, strict=True)
    ]


def plain(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    codes = [
        torch.round(weight / s).clamp(-(2 ** (b - 1)), 2 ** (b - 1) - 1) * s for b, s in zip(BITS, scale, strict=True)
    ]
    return torch.stack(codes)


def cases(device: str) -> Iterator[Case]:
    shapes = [(768, 3072), (4096, 4096)] + ([(4096, 16384)] if device == "cuda" else [])
    compiled = torch.compile(plain, dynamic=False)
    for rows, columns in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.randn(rows, columns, device=device).to(dtype)
            scale = clado_ext.scale_search(weight, BITS, steps=1)
            values, sqerr = clado_ext.fake_quant(weight, scale, BITS)

            def check(weight: torch.Tensor = weight, scale: torch.Tensor = scale) -> None:
                got, wanted = clado_ext.fake_quant(weight, scale, BITS)[0], oracle.fake_quant(weight, scale, BITS)[0]
                torch.testing.assert_close(got, wanted, rtol=0, atol=0)

            rivals = {}
            if dtype == torch.float32:
                rivals = {
                    "fake_quantize x3": lambda w=weight, s=scale: per_channel(w, s),
                    "eager": lambda w=weight, s=scale: plain(w, s),
                    "compiled": lambda w=weight, s=scale: compiled(w, s),
                }
            run = lambda w=weight, s=scale, v=values, e=sqerr: clado_ext.fake_quant_into(w, s, BITS, v, e)  # noqa: E731
            size = weight.nbytes * (1 + len(BITS))
            yield Case(
                "fake_quant",
                f"{rows}x{columns} 2,4,8 bit",
                str(dtype).removeprefix("torch."),
                run,
                check,
                size,
                0,
                rivals,
            )
