"""pack and unpack: bytes are the codes and the words, once each."""

from collections.abc import Callable, Iterator
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

            def check(c: torch.Tensor = codes, p: torch.Tensor = packed, bits: int = bits, k: int = columns) -> None:
                torch.testing.assert_close(p[:8], oracle.pack(c[:8], bits), rtol=0, atol=0)
                torch.testing.assert_close(clado_ext.unpack(p, bits, k), c, rtol=0, atol=0)

            size, shape = codes.nbytes + packed.nbytes, f"{rows}x{columns} {bits} bit"
            others: dict[str, dict[str, Callable[[], Any]]] = {
                "pack": rivals.pack(codes, bits),
                "unpack": rivals.unpack(codes, bits),
            }
            ours: dict[str, Callable[[], Any]] = {
                "pack": lambda c=codes, b=bits: clado_ext.pack(c, b),
                "unpack": lambda p=packed, b=bits, k=columns: clado_ext.unpack(p, b, k),
            }
            for op, run in ours.items():
                yield Case(op, shape, "int8", run, check, size, 0, others[op])
