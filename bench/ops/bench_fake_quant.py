"""fake_quant into given outputs: bytes are one read of the weight and one write per format; the ceiling does that by copy_."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import clado_ext
from bench import rivals
from bench.harness import Case, Grid, name_of
from clado_ext.reference import fake_quant as oracle

BITS = (2, 4, 8)
FORMATS = ("fp8_e4m3", "mxfp4", "nvfp4")
CHECKED = 64  # rows: the twin compares every weight with every value


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


def close(got: Any, wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Values, or values and squared errors: the values bit for bit."""
    values, *errors = got if isinstance(got, tuple) else (got,)
    torch.testing.assert_close(values, wanted[0], rtol=0, atol=0)
    for error in errors:
        # Lanes add up to 32 squares in float32 before they meet float64: relative error below 40 roundings.
        torch.testing.assert_close(error, wanted[1], rtol=40 * 2**-24, atol=0)


def cases(grid: Grid) -> Iterator[Case]:
    large = ((4096, 16384),) if grid.device == "cuda" else ()
    compiled = torch.compile(plain, dynamic=False)
    for rows, columns in grid.shapes_or((256, 768), (768, 3072), (4096, 4096), *large):
        for dtype in grid.dtypes_or(torch.float32, torch.bfloat16, torch.float16):
            weight = torch.randn(rows, columns, device=grid.device).to(dtype)
            scale = clado_ext.scale_search(weight, BITS, steps=1)
            values, sqerr = clado_ext.fake_quant(weight, scale, BITS)
            moved = torch.empty_like(values)

            given = (weight, scale, BITS)

            def judge(got: Any, given: tuple[Any, ...] = given) -> None:
                close(got, oracle.fake_quant(*given))

            others = {}
            if dtype == torch.float32:
                others = {
                    "fake_quantize x3": lambda w=weight, s=scale: per_channel(w, s),
                    "eager": lambda w=weight, s=scale: plain(w, s),
                    "compiled": lambda w=weight, s=scale: compiled(w, s),
                    **rivals.fake_quant(weight, scale, BITS),
                }
            yield Case(
                "fake_quant",
                f"{rows}x{columns} 2,4,8 bit",
                name_of(dtype),
                partial(clado_ext.fake_quant, *given, out=(values, sqerr)),
                judge,
                weight.nbytes * (1 + len(BITS)),
                0,
                others,
                copy=lambda w=weight, v=moved: v.copy_(w),  # one read, three writes
                given=given,
            )
            if columns % 32 == 0:
                yield formats_case(weight, moved)


def formats_case(weight: torch.Tensor, moved: torch.Tensor) -> Case:
    """Floats of few bits at the scales of their standards; torchao's casts find their own and give codes alone."""
    scales = clado_ext.format_search(weight, FORMATS, steps=1)
    values, sqerr = clado_ext.fake_quant_formats(weight, scales)

    def judge(got: Any) -> None:
        few = [to._replace(scale=to.scale[:CHECKED]) for to in scales]
        part = tuple(x[:, :CHECKED] for x in got) if isinstance(got, tuple) else got[:, :CHECKED]
        close(part, oracle.fake_quant_formats(weight[:CHECKED], few))

    rows, columns = weight.shape
    return Case(
        "fake_quant_formats",
        f"{rows}x{columns} {', '.join(FORMATS)}",
        name_of(weight.dtype),
        partial(clado_ext.fake_quant_formats, weight, scales, out=(values, sqerr)),
        judge,
        weight.nbytes * (1 + len(FORMATS)),
        0,
        rivals.casts(weight, scales) if weight.dtype == torch.float32 else {},
        copy=lambda: moved.copy_(weight),
        given=(weight, scales),
    )
