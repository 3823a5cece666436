"""What a call costs beside its kernel: tiny inputs through the public function and straight into the native module."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import clado_ext
from clado_ext import _native

CALLS = 1000


def microseconds(work: Callable[[], Any], device: str) -> float:
    """Median over batches of calls; of this thread's own time on a CPU, so that other processes do not count."""
    clock = time.thread_time if device == "cpu" else time.perf_counter
    rounds = []
    for _ in range(9):
        start = clock()
        for _ in range(CALLS):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        rounds.append((clock() - start) / CALLS * 1e6)
    return statistics.median(rounds[1:])


def measure(device: str = "cpu") -> list[dict[str, Any]]:
    """Rows of op, call, kernel (0 on a GPU, where it runs beside the host) and overhead in microseconds, on one thread."""
    bits = (2, 4, 8)
    weight = torch.randn(4, 32, device=device)
    scale = clado_ext.scale_search(weight, bits)
    values, sqerr = clado_ext.fake_quant(weight, scale, bits)
    codes = clado_ext.quantize(weight, scale, bits)
    words = clado_ext.pack(codes, 8)
    logits, delta = torch.randn(2, 10, device=device), torch.randn(3, 2, 10, device=device)
    total, squares = clado_ext.pairwise_ce(logits, delta)
    w, s, v, e, c, p = (x.data_ptr() for x in (weight, scale, values, sqerr, codes, words))
    formats = [(b, 32, s + 16 * k, 0) for k, b in enumerate(bits)]
    targets = [(b, 32, _native.ANY_SCALE, 0, s + 16 * k, 0) for k, b in enumerate(bits)]
    z, d, t, q = (x.data_ptr() for x in (logits, delta, total, squares))
    works: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "fake_quant": (
            lambda: clado_ext.fake_quant(weight, scale, bits),
            lambda: _native.fake_quant_cpu((w, _native.FLOAT32, 4, 32, 32, 32), formats, v, e, 1),
        ),
        "fake_quant out=": (
            lambda: clado_ext.fake_quant(weight, scale, bits, out=(values, sqerr)),
            lambda: _native.fake_quant_cpu((w, _native.FLOAT32, 4, 32, 32, 32), formats, v, e, 1),
        ),
        "scale_search": (
            lambda: clado_ext.scale_search(weight, bits),
            lambda: _native.scale_search_cpu((w, _native.FLOAT32, 4, 32, 32, 32), targets, 95, (0, 1), 1),
        ),
        "pack": (lambda: clado_ext.pack(codes, 8), lambda: _native.pack_cpu(c, p, 12, 32, 8, 1)),
        "batched_ce": (
            lambda: clado_ext.batched_ce(logits, delta),
            lambda: _native.batched_ce_cpu((z, d, 3, 2, 10, False), 0, t, 1),
        ),
        "pairwise_ce": (
            lambda: clado_ext.pairwise_ce(logits, delta),
            lambda: _native.pairwise_ce_cpu((d, 0, 3, 3, 2, 10, False), (z, 0, 1), t, q, 1),
        ),
    }
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    with torch.inference_mode():
        for op, (call, kernel) in works.items():
            whole = microseconds(call, device)
            inside = microseconds(kernel, device) if device == "cpu" else 0.0
            rows.append({"op": op, "call": whole, "kernel": inside, "overhead": whole - inside})
    torch.set_num_threads(before)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(
            f"{row['op']:16} call {row['call']:6.1f} us, kernel {row['kernel']:5.1f} us, overhead {row['overhead']:5.1f} us"
        )
