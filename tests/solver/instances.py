"""Random small instances and their optimum by trying every choice."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from clado import Layer, Sensitivity


@dataclass(frozen=True)
class Instance:
    """A sensitivity matrix and the keyword arguments of ``solve`` that go with it."""

    sens: Sensitivity
    budgets: dict[str, float]


def sensitivity(
    seed: int, num_layers: int, bits: tuple[int, ...], kind: str = "gauss", scale: float = 1.0
) -> Sensitivity:
    """Random G; ``kind`` is "gauss" (indefinite, negative entries), "ties" (few values), "zero" or "sparse"."""
    random = np.random.default_rng(seed)
    size = num_layers * len(bits)
    diagonal = np.exp(random.normal(size=size)) * 4.0 ** -np.tile(bits, num_layers) * 16
    cross = random.normal(size=(size, size)) * np.sqrt(np.outer(diagonal, diagonal)) * 0.4
    matrix = (cross + cross.T) / 2 + np.diag(diagonal)
    if kind == "ties":
        matrix = np.round((random.integers(-1, 2, (size, size)) + np.eye(size) * 2) / 2)
        matrix = matrix + matrix.T
    elif kind == "zero":
        matrix = np.zeros((size, size))
    elif kind == "sparse":
        matrix = matrix * (np.abs(cross + cross.T) > np.median(np.abs(cross))) + np.diag(random.normal(size=size))
    layer = np.repeat(np.arange(num_layers), len(bits))
    matrix[(layer[:, None] == layer[None, :]) & ~np.eye(size, dtype=bool)] = 0
    layers = [
        Layer(
            f"layer{i}",
            "linear",
            (int(random.integers(1, 9)), int(random.integers(1, 40))),
            int(random.integers(1, 999)),
        )
        for i in range(num_layers)
    ]
    return Sensitivity.from_matrix(matrix * scale, layers, bits)


def instance(seed: int) -> Instance:
    """The seed chooses everything: size, widths, kind of matrix, scale over 28 decades, one to three budgets."""
    random = np.random.default_rng([seed, 7])
    bits = [(2, 4, 8), (2, 3, 4, 8), (2, 8), (2, 3, 4, 6, 8)][random.integers(4)]
    num_layers = int(random.integers(1, 7 if len(bits) < 4 else 6))
    kind = str(random.choice(["gauss", "gauss", "gauss", "ties", "zero", "sparse"]))
    scale = 10.0 ** int(random.choice([0, 0, -14, 14, -5]))
    sens = sensitivity(seed, num_layers, bits, kind, scale)
    least, most = uses(sens).min(axis=1), uses(sens).max(axis=1)
    share = random.choice([0.0, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5], size=3)
    limits = least + share * (most - least)
    which = random.permutation(3)[: random.integers(1, 4)]
    names = ("avg_bits", "size_bytes", "bitops")
    return Instance(sens, {names[k]: float(limits[k]) for k in which})


def uses(sens: Sensitivity) -> np.ndarray:
    """``[3, choices]``: average bits, bytes and bitops of every choice, in the order of :func:`choices`."""
    numel = np.array([layer.numel for layer in sens.layers])
    macs = np.array([layer.macs for layer in sens.layers])
    table = np.array([[sens.quantizer.storage_bytes(layer.shape, b) for b in sens.bits] for layer in sens.layers])
    picks = choices(sens)
    width = np.array(sens.bits)[picks]
    stored = table[np.arange(len(numel)), picks].sum(axis=1)
    return np.stack([width @ numel / numel.sum(), stored, width @ macs * 32])


def choices(sens: Sensitivity) -> np.ndarray:
    """``[choices, L]`` indices into ``sens.bits``."""
    return np.array(list(itertools.product(range(len(sens.bits)), repeat=len(sens.layers))))


def values(sens: Sensitivity, matrix: np.ndarray) -> np.ndarray:
    """½ xᵀGx of every choice."""
    picks = choices(sens) + np.arange(len(sens.layers)) * len(sens.bits)
    return np.array([matrix[np.ix_(pick, pick)].sum() / 2 for pick in picks])


def within(sens: Sensitivity, budgets: dict[str, float]) -> np.ndarray:
    """Mask of the choices that meet every budget."""
    table = dict(zip(("avg_bits", "size_bytes", "bitops"), uses(sens), strict=True))
    mask = np.ones(len(choices(sens)), dtype=bool)
    for name, limit in budgets.items():
        mask &= table[name] <= limit * (1 + 1e-12)
    return mask
