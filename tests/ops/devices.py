"""Devices an op test runs on (the CPU always, CUDA where there is one, by force under CLADO_REQUIRE_GPU=1), and CPU settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import clado_ext

if os.environ.get("CLADO_REQUIRE_GPU") == "1" and not (torch.cuda.is_available() and clado_ext.has_cuda):
    raise RuntimeError("CLADO_REQUIRE_GPU=1, but torch sees no GPU or clado_ext was built without CUDA kernels")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and clado_ext.has_cuda else [])]


def at_every_cpu_setting(run: Callable[[], Any]) -> list[Any]:
    """Results of ``run`` at every SIMD level of this machine, each with 1, 2 and 5 threads."""
    threads, level = torch.get_num_threads(), clado_ext.simd_level()
    results = []
    try:
        for simd in range(level + 1):
            clado_ext.set_simd(simd)
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(run())
    finally:
        torch.set_num_threads(threads)
        clado_ext.set_simd(level)
    return results


def same_bits(a: Tensor | tuple[Tensor, ...], b: Tensor | tuple[Tensor, ...]) -> bool:
    """Equal bit for bit, NaN included."""
    if isinstance(a, tuple):
        return all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    assert isinstance(b, Tensor)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def raw(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)
