"""pack and unpack into given outputs, as the copy beside them writes: bytes are the codes and the words, once each.

"new output" is the same work as `pack` and `unpack` do it, into memory newly allocated, which other calls' outputs have pushed
out of the cache; "copy, new output" is the copy of as many bytes into such memory.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import clado_ext
from bench import rivals
from bench.harness import Case, Grid
from clado_ext.reference import bitpack as oracle


def cases(grid: Grid) -> Iterator[Case]:
    large = ((4096, 16384),) if grid.device == "cuda" else ()
    for rows, columns in grid.shapes_or((768, 3072), (4096, 4096), *large):
        for bits in range(2, 9):
            half = 2 ** (bits - 1)
            codes = torch.randint(-half, half, (rows, columns), dtype=torch.int8, device=grid.device)
            packed = clado_ext.pack(codes, bits)
            words, back = torch.empty_like(packed), torch.empty_like(codes)

            def packs(got: torch.Tensor, c: torch.Tensor = codes, bits: int = bits) -> None:
                torch.testing.assert_close(got[:8], oracle.pack(c[:8], bits), rtol=0, atol=0)
                unpacks(clado_ext.unpack(got, bits, c.shape[1]), c)

            def unpacks(got: torch.Tensor, c: torch.Tensor = codes) -> None:
                torch.testing.assert_close(got, c, rtol=0, atol=0)

            size, shape = codes.nbytes + packed.nbytes, f"{rows}x{columns} {bits} bit"
            half_of_them = torch.ones(size // 2, dtype=torch.uint8, device=grid.device)
            others: dict[str, dict[str, Callable[[], Any]]] = {
                "pack": {"new output": lambda c=codes, b=bits: clado_ext.pack(c, b), **rivals.pack(codes, bits)},
                "unpack": {
                    "new output": lambda p=packed, b=bits, k=columns: clado_ext.unpack(p, b, k),
                    **rivals.unpack(codes, bits),
                },
            }
            ours: dict[str, tuple[Callable[..., Any], tuple[Any, ...], torch.Tensor, Callable[..., None]]] = {
                "pack": (clado_ext.pack, (codes, bits), words, packs),
                "unpack": (clado_ext.unpack, (packed, bits, columns), back, unpacks),
            }
            for op, (call, given, out, judge) in ours.items():
                theirs = {"copy, new output": half_of_them.clone, **others[op]}
                run = partial(call, *given, out=out)
                yield Case(op, shape, "int8", run, judge, size, 0, theirs, given=given)
