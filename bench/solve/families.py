"""Synthetic sensitivity matrices shaped like real networks, from seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from clado import Layer, LinearConstraint, Sensitivity
from clado.solver.native import blas_threads
from clado.solver.program import Program
from clado.solver.shift import convex_form


def vit_shapes(depth: int, width: int, hidden: int) -> list[tuple[int, int]]:
    """Weight shapes of a ViT: patch embedding, four linears a block, classifier."""
    block = [(3 * width, width), (width, width), (hidden, width), (width, hidden)]
    return [(width, 768), *block * depth, (1000, width)]


def resnet50_shapes() -> list[tuple[int, int]]:
    """Weight shapes of ResNet-50's 53 convolutions (as [out, in·k·k]) and classifier."""
    shapes = [(64, 147)]
    width_in = 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(count):
            shapes += [(width, width_in), (width, 9 * width), (4 * width, width)]
            shapes += [(4 * width, width_in)] if block == 0 else []
            width_in = 4 * width
    return [*shapes, (1000, 2048)]


SHAPES = {
    "digits": vit_shapes(6, 96, 384),  # 26 layers
    "vit_b": vit_shapes(12, 768, 3072),  # 50
    "resnet50": resnet50_shapes(),  # 54
    "vit_l": vit_shapes(24, 1024, 4096),  # 98
    "vit_g": vit_shapes(40, 1408, 6144),  # 162
    "deep300": (vit_shapes(75, 1024, 4096))[:300],
    "deep1000": (vit_shapes(250, 1024, 4096))[:1000],
}
NOISE = {"small": 0.1, "middle": 0.3, "large": 0.7}


def family(name: str, bits: tuple[int, ...] = (2, 4, 8), noise: float = 0.1, seed: int = 0) -> Sensitivity:
    """A sensitivity matrix of the shapes ``SHAPES[name]``.

    Single increases fall as 4^-bits with log-normal spread over layers and candidates. Interactions are
    √(G_vv G_ww) times a correlation: a positive semidefinite part of rank 20, in which the candidates of a layer point
    in similar directions, plus independent Gaussians of deviation ``noise``/10: noise 0.7 makes the matrix indefinite.
    """
    random = np.random.default_rng([seed, len(SHAPES[name]), len(bits)])
    shapes, count = SHAPES[name], len(bits)
    layers = [Layer(f"layer{i}", "linear", shape, 197 * shape[0] * shape[1]) for i, shape in enumerate(shapes)]
    size = len(layers) * count
    spread = np.repeat(random.normal(0, 1.0, len(layers)), count) + random.normal(0, 0.2, size)
    diagonal = np.exp(spread) * 4.0 ** -np.tile(bits, len(layers)).astype(float)
    direction = np.repeat(random.normal(size=(len(layers), 20)), count, axis=0) + random.normal(0, 0.5, (size, 20))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    jitter = random.normal(size=(size, size))
    correlation = 0.3 * direction @ direction.T + 0.1 * noise * (jitter + jitter.T) / np.sqrt(2)
    matrix = correlation * np.sqrt(np.outer(diagonal, diagonal))
    layer = np.repeat(np.arange(len(layers)), count)
    matrix[layer[:, None] == layer[None, :]] = 0
    matrix[np.diag_indices(size)] = diagonal
    return Sensitivity.from_matrix(matrix, layers, bits)


def second_budget(sens: Sensitivity, bits: dict[str, int]) -> LinearConstraint:
    """A latency table that does not follow the sizes, with a limit at 97 % of what the plan ``bits`` uses."""
    random = np.random.default_rng(len(sens.layers))
    speed = np.exp(random.normal(0, 0.7, len(sens.layers)))
    table = {
        layer.name: {b: float(layer.numel * s * (2 + b) * 1e-9) for b in sens.bits}
        for layer, s in zip(sens.layers, speed, strict=True)
    }
    return LinearConstraint("latency", table, 0.97 * sum(table[name][b] for name, b in bits.items()))


def program(name: str, bits: tuple[int, ...], avg_bits: float, noise: float = 0.1, seed: int = 0) -> dict[str, Tensor]:
    """The arguments of ``clado_ext.iqp_search``, the matrix scaled so that its trace is 1000."""
    sens = family(name, bits, noise, seed)
    numel = np.array([layer.numel for layer in sens.layers])
    return {
        "matrix": torch.from_numpy(sens.matrix * (1000 / np.trace(sens.matrix))),
        "starts": torch.arange(len(numel) + 1) * len(bits),
        "rows": torch.from_numpy(np.outer(numel, bits).reshape(1, -1)),
        "limits": torch.tensor([int(avg_bits * numel.sum())]),
    }


def convex(program: dict[str, Tensor]) -> dict[str, Any]:
    """What ``clado_ext.iqp_prove`` takes besides: the convex form of a program."""
    starts = program["starts"].numpy()
    layer = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    with blas_threads(1):
        form = convex_form(
            Program(program["matrix"].numpy(), layer, program["rows"].numpy(), program["limits"].numpy())
        )
    parts = {name: torch.from_numpy(getattr(form, name)) for name in ("quadratic", "linear", "multipliers")}
    return {**parts, "constant": form.constant, "slack": form.slack}
