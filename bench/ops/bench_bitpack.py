"""pack and unpack: bytes are the codes and the words, once each."""

from collections.abc import Iterator

import torch

import clado_ext
from bench.harness import Case
from clado_ext.reference import bitpack as oracle


def cases(device: str) -> Iterator[Case]:
    rows, columns = 1024, 4096
    for bits in range(2, 9):
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), dtype=torch.int8, device=device)
        packed = clado_ext.pack(codes, bits)

        def check(codes: torch.Tensor = codes, packed: torch.Tensor = packed, bits: int = bits) -> None:
            torch.testing.assert_close(packed[:8], oracle.pack(codes[:8], bits), rtol=0, atol=0)
            torch.testing.assert_close(clado_ext.unpack(packed, bits, columns), codes, rtol=0, atol=0)

        size = codes.nbytes + packed.nbytes
        shape = f"{rows}x{columns} {bits} bit"
        yield Case("pack", shape, "int8", lambda c=codes, b=bits: clado_ext.pack(c, b), check, size)
        yield Case("unpack", shape, "int8", lambda p=packed, b=bits: clado_ext.unpack(p, b, columns), check, size)
