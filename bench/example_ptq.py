"""``python -m bench.example_ptq``: weights of a model quantized by a plain PyTorch loop and by one call per layer."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

import clado_ext

BITS = (2, 4, 8)


def plain(weight: Tensor, steps: int) -> Tensor:
    """What scripts do: per width, try the scales, then round. Values ``[B, N, …]``."""
    flat, values = weight.flatten(1), []
    for bits in BITS:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        first = flat.abs().amax(1, keepdim=True) / high
        best, scale = torch.full_like(first, torch.inf), first
        for k in range(steps):
            tried = first * ((100 - k) / 100)
            error = ((flat / tried).round().clamp(low, high) * tried - flat).square().sum(1, keepdim=True)
            scale = torch.where(error < best, tried, scale)
            best = torch.minimum(error, best)
        values.append(((flat / scale).round().clamp(low, high) * scale).view(weight.shape))
    return torch.stack(values)


def layers(model: nn.Module) -> dict[str, Tensor]:
    """Weights of every Linear and Conv2d by name."""
    return {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def compare(model: nn.Module, steps: int = 95) -> list[tuple[str, float, float, float]]:
    """Per layer: name, seconds of the loop, seconds of the call, squared error of the call over that of the loop (about 1)."""
    rows = []
    for name, weight in layers(model).items():
        clado_ext.quantize_weight(weight, BITS, steps=steps)  # both are timed warm
        start = time.perf_counter()
        theirs = plain(weight, steps)
        middle = time.perf_counter()
        ours = clado_ext.quantize_weight(weight, BITS, steps=steps)
        end = time.perf_counter()
        error = (theirs - weight).double().square().sum()
        rows.append((name, middle - start, end - middle, float(ours.sqerr.sum() / error)))
    return rows


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 7), nn.Flatten(), nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))
    for name, loop, call, error in compare(model):
        print(
            f"{name:4} loop {loop:7.3f} s   quantize_weight {call:7.4f} s   {loop / call:6.0f} x   error ratio {error:.6f}"
        )


if __name__ == "__main__":
    main()
