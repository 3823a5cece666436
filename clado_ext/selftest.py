"""``python -m clado_ext.selftest``: every op against its definition, on every device and SIMD level of this machine.

For people who build or ship the kernels and for tools that call them: it needs torch alone, takes seconds, and exits with 1
where an op does not give what its plain twin (``clado_ext/reference``) gives in float64. Codes must agree exactly, sums to
what float32 can hold, and every SIMD level and thread count must give the same bits.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import clado_ext

from .reference import (
    batched_ce,
    bitpack,
    carried,
    compensate,
    fake_quant,
    iqp_search,
    pairwise_bce,
    pairwise_ce,
    pairwise_mse,
    scale_errors,
    scale_search,
)

Call = Callable[[], Any]
SHAPES = ((1, 1), (3, 33), (17, 129))  # rows and columns of a weight
BITS, GROUP = (2, 3, 8), 32
FORMATS = ("int4", "fp8_e4m3", "mxfp4", "nvfp4")


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _bitpack(device: str) -> Iterator[tuple[Call, Call]]:
    for rows, columns in SHAPES:
        codes = _draw(rows, columns).mul(2).round().clamp(-4, 3).to(device, torch.int8)
        yield partial(clado_ext.pack, codes, 3), partial(bitpack.pack, codes, 3)
        words = bitpack.pack(codes, 3)
        yield partial(clado_ext.unpack, words, 3, columns), partial(bitpack.unpack, words, 3, columns)


def _scale_search(device: str) -> Iterator[tuple[Call, Call]]:
    for shape in SHAPES:
        given = _draw(*shape).to(device), BITS, GROUP, 20
        yield partial(clado_ext.scale_search, *given), partial(scale_search.scale_search, *given)
        yield partial(clado_ext.range_search, *given), partial(scale_search.range_search, *given)


def _fake_quant(device: str) -> Iterator[tuple[Call, Call]]:
    for shape in SHAPES:
        weight = _draw(*shape).to(device)
        given = weight, clado_ext.scale_search(weight, BITS, GROUP, 1), BITS, GROUP
        yield partial(clado_ext.fake_quant, *given), partial(fake_quant.fake_quant, *given)
        yield partial(clado_ext.quantize, *given), partial(fake_quant.quantize, *given)
        scales = clado_ext.format_search(weight, FORMATS, steps=1)
        yield (
            partial(clado_ext.fake_quant_formats, weight, scales),
            partial(fake_quant.fake_quant_formats, weight, scales),
        )
        yield partial(clado_ext.quantize_formats, weight, scales), partial(fake_quant.quantize_formats, weight, scales)


def _scale_errors(device: str) -> Iterator[tuple[Call, Call]]:
    for shape in SHAPES:
        weight = _draw(*shape).to(device)
        given = weight, clado_ext.scale_search(weight, BITS, GROUP, 1), -8, 7, GROUP
        yield partial(clado_ext.scale_errors, *given), partial(scale_errors.scale_errors, *given)


def _compensate(device: str) -> Iterator[tuple[Call, Call]]:
    for rows, columns in SHAPES:
        weight, inputs = _draw(rows, columns).to(device), _draw(2 * columns, columns).double()
        moments = inputs.T @ inputs + torch.eye(columns)
        factor = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True).float()[None].to(device)
        given = weight, factor, clado_ext.scale_search(weight, BITS, -1, 1), BITS
        yield partial(clado_ext.compensate, *given), partial(compensate.compensate, *given)


def _changes(device: str) -> tuple[Tensor, Tensor]:
    """Logits of 5 samples and 37 classes, and 9 changes of them."""
    return 3 * _draw(5, 37).to(device), 0.3 * _draw(9, 5, 37).to(device)


def _batched_ce(device: str) -> Iterator[tuple[Call, Call]]:
    given, labels = _changes(device), torch.arange(5, device=device)
    yield partial(clado_ext.batched_ce, *given), partial(batched_ce.batched_ce, *given)
    yield partial(clado_ext.batched_ce, *given, labels), partial(batched_ce.batched_ce, *given, labels)


def _pairwise_ce(device: str) -> Iterator[tuple[Call, Call]]:
    given = _changes(device)
    yield partial(clado_ext.pairwise_ce, *given), partial(pairwise_ce.pairwise_ce, *given)
    rows, more = (3 * _draw(6, 37).to(device), 0.3 * _draw(9, 6, 37).to(device)), _rows(device)
    yield partial(clado_ext.pairwise_ce, *rows, **more), partial(pairwise_ce.pairwise_ce, *rows, **more)


def _rows(device: str) -> dict[str, Any]:
    """Weights of 6 rows, two a sample, and another block of changes."""
    return {"weight": torch.arange(6.0, device=device), "rows_per_sample": 2}


def _pairwise_bce(device: str) -> Iterator[tuple[Call, Call]]:
    given = 3 * _draw(6).to(device), 0.3 * _draw(9, 6).to(device)
    yield partial(clado_ext.pairwise_bce, *given), partial(pairwise_bce.pairwise_bce, *given)
    more = _rows(device)
    yield partial(clado_ext.pairwise_bce, *given, **more), partial(pairwise_bce.pairwise_bce, *given, **more)


def _pairwise_mse(device: str) -> Iterator[tuple[Call, Call]]:
    delta, other = _draw(9, 3, 129).to(device), _draw(4, 3, 129).to(device)
    yield partial(clado_ext.pairwise_mse, delta), partial(pairwise_mse.pairwise_mse, delta)
    yield partial(clado_ext.pairwise_mse, delta, None, other), partial(pairwise_mse.pairwise_mse, delta, None, other)


def _carried(device: str) -> Iterator[tuple[Call, Call]]:
    x, d = _draw(4, 33).to(device), 0.1 * _draw(8, 33).to(device)
    yield partial(clado_ext.carried_gelu, x, d), partial(carried.carried_gelu, x, d)
    yield partial(clado_ext.carried_layer_norm, x, d), partial(carried.carried_layer_norm, x, d)


def _iqp_search(_: str) -> Iterator[tuple[Call, Call]]:
    half = _draw(9, 9).double()
    own_layer = torch.block_diag(*[torch.ones(3, 3)] * 3).bool() & ~torch.eye(9, dtype=torch.bool)
    matrix = (half + half.T).masked_fill(own_layer, 0.0)
    rows = torch.arange(9).remainder(3)[None]
    given = matrix, torch.tensor([0, 3, 6, 9]), rows, torch.tensor([4])
    yield lambda: clado_ext.iqp_search(*given)[0], lambda: iqp_search.iqp_search(*given)[0]


CHECKS = {
    "batched_ce": _batched_ce,
    "bitpack": _bitpack,
    "carried": _carried,
    "compensate": _compensate,
    "fake_quant": _fake_quant,
    "iqp_search": _iqp_search,
    "pairwise_bce": _pairwise_bce,
    "pairwise_ce": _pairwise_ce,
    "pairwise_mse": _pairwise_mse,
    "scale_errors": _scale_errors,
    "scale_search": _scale_search,
}
ON_HOST = ("iqp_search",)


def failures(device: str) -> dict[str, list[str]]:
    """{op: what is wrong with it, nothing where all is well} on a device."""
    names = [name for name in CHECKS if device == "cpu" or name not in ON_HOST]
    return {name: [said for pair in CHECKS[name](device) for said in _wrong(*pair, device)] for name in names}


def _wrong(op: Call, definition: Call, device: str) -> Iterator[str]:
    found, wanted = _tensors(op()), _tensors(definition())
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if not _agree(a, b):
            yield f"result {number} of shape {tuple(a.shape)} is not what its definition gives"
    others = _at_every_setting(op) if device == "cpu" else [_tensors(op())]
    if not all(a.equal(b) for other in others for a, b in zip(found, other, strict=True)):
        yield "its bits depend on the SIMD level, on the number of threads or on chance"


def _agree(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    if not found.is_floating_point():
        return bool((found.long() == wanted.long()).all())
    # A float32 product of a few hundred terms, relative to the largest result.
    return bool(((found.double() - wanted.double()).abs() <= 1e-5 * wanted.double().abs().max() + 1e-12).all())


def _tensors(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def _at_every_setting(op: Call) -> list[tuple[Tensor, ...]]:
    threads, level = torch.get_num_threads(), clado_ext.simd_level()
    try:
        results = []
        for simd in range(level + 1):
            clado_ext.set_simd(simd)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(_tensors(op()))
        return results
    finally:
        torch.set_num_threads(threads)
        clado_ext.set_simd(level)


def main() -> None:
    started, bad = time.perf_counter(), 0
    devices = ["cpu", *(["cuda"] if clado_ext.has_cuda and torch.cuda.is_available() else [])]
    for device in devices:
        for name, said in failures(device).items():
            print(f"{device:5} {name:14} {'; '.join(said) or 'ok'}")
            bad += bool(said)
    print(f"clado_ext {clado_ext.__version__}, torch {torch.__version__}: {bad or 'none'} of the ops wrong", end=", ")
    print(f"{', '.join(devices)}, {time.perf_counter() - started:.1f} s")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
