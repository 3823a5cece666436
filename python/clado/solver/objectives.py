"""The four matrices a plan may be chosen by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..common import require

NAMES = ("original", "clipped", "shrunk", "diagonal")
Matrix = NDArray[np.float64]


def objective_matrix(matrix: Matrix, stderr: Matrix, inside: NDArray[np.bool_], name: str) -> Matrix:
    """G of an objective: ``[V, V]`` float64, symmetric, zero between candidates of one layer.

    - ``original``: 2ΔL on the diagonal, Ω off it.
    - ``clipped``: negative eigenvalues of that matrix set to zero, as in the CLADO paper; a regulariser for noise.
    - ``shrunk``: Ω·max(0, 1 − se²/Ω²) with se the standard error of Ω: the posterior mean τ²/(τ² + se²)·Ω under a
      zero-mean normal prior whose variance is estimated per entry as τ² = max(0, Ω² − se²); the positive-part
      James–Stein factor (Efron and Morris 1973), taken per entry as in the non-negative garrote (Breiman 1995).
    - ``diagonal``: 2ΔL alone, additive losses.

    Args:
        matrix: original G, ``[V, V]``, finite.
        stderr: ``[V, V]`` standard errors.
        inside: ``[V, V]`` mask of candidate pairs of one layer.
        name: one of ``NAMES``.

    Raises:
        CladoError: an unknown name, or ``shrunk`` where a standard error is unknown.
    """
    require(name in NAMES, "solve", "objective", f"be one of {NAMES}", repr(name))
    out: Matrix = (matrix + matrix.T) / 2
    crossing = inside & ~np.eye(len(matrix), dtype=bool)
    if name == "clipped":
        out[crossing] = 0
        values, vectors = np.linalg.eigh(out)
        out = (vectors * np.maximum(values, 0)) @ vectors.T
        out = (out + out.T) / 2
    elif name == "shrunk":
        require(
            errors_known(stderr, inside), "solve", "objective", "be another where standard errors are unknown", name
        )
        safe = np.where(out == 0, 1.0, out)
        with np.errstate(over="ignore"):
            factor = np.where(out == 0, 0.0, np.maximum(0, 1 - (np.where(inside, 0.0, stderr) / safe) ** 2))
        out = np.where(inside, out, out * factor)
        out = (out + out.T) / 2
    elif name == "diagonal":
        out[~inside] = 0
    out[crossing] = 0
    return out


def errors_known(stderr: Matrix, inside: NDArray[np.bool_]) -> bool:
    """Whether every interaction has a standard error."""
    return bool(np.isfinite(stderr[~inside]).all())


def negative_mass(matrix: Matrix) -> float:
    """Σ|negative eigenvalues| / Σ|eigenvalues|."""
    values = np.linalg.eigvalsh(matrix)
    total = float(np.abs(values).sum())
    return float(-values[values < 0].sum() / total) if total else 0.0
