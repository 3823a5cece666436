"""From sums over samples to the sensitivity matrix: means, standard errors, and what is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .estimators import Sums
from .quantizer import Quantizer
from .sensitivity import Layer, Sensitivity, same_layer


def assemble(
    sums: Sums,
    layers: Sequence[Layer],
    bits: tuple[int, ...],
    quantizer: Quantizer,
    fingerprint: dict[str, str],
    digests: Tensor,
) -> Sensitivity:
    delta_loss, interaction, stderr = entries(sums, len(layers), len(bits))
    dropped = _drop(delta_loss, interaction, stderr)
    result = Sensitivity(
        tuple(layers), bits, delta_loss, interaction, stderr, sums.samples, quantizer, {}, fingerprint, digests.numpy()
    )
    names = [f"{layers[v // len(bits)].name} at {bits[v % len(bits)]} bits" for v in dropped]
    result.info["dropped"] = [[layers[v // len(bits)].name, bits[v % len(bits)]] for v in dropped]
    result.info["warnings"] = [f"dropped {name}: its loss is NaN or infinite" for name in names]
    return result


def entries(sums: Sums, layers: int, widths: int) -> tuple[Any, Any, Any]:
    """(ΔL ``[V]``, Ω ``[V, V]``, standard errors ``[V, V]`` as in :class:`Sensitivity`) of so many layers and widths."""
    interaction, stderr = mean_and_error(_symmetric(sums.pair), _symmetric(sums.pair_squared), sums.samples)
    if int(sums.residual_samples):
        interaction, stderr = corrected_entries(sums, interaction, stderr, sums.samples)
    delta_loss, loss_error = mean_and_error(sums.loss.numpy(), sums.loss_squared.numpy(), sums.samples)
    inside = same_layer(layers, widths)
    interaction[inside] = 0.0
    stderr[inside] = 0.0
    np.fill_diagonal(stderr, loss_error)
    return delta_loss, interaction, stderr


def _symmetric(upper: Tensor) -> Any:
    half = np.triu(upper.numpy(), 1)
    return half + half.T


def _drop(delta_loss: Any, interaction: Any, stderr: Any) -> list[int]:
    """Candidates that leave the others finite when their rows become NaN, which this does: first those whose own loss is not
    finite, then the one in the most pairs that are not."""
    bad = ~np.isfinite(interaction)
    np.fill_diagonal(bad, ~np.isfinite(delta_loss))
    dropped: list[int] = []
    while bad.any():
        v = int(np.argmax(np.diag(bad) * len(bad) + bad.sum(0)))
        dropped.append(v)
        bad[v, :] = bad[:, v] = False
        delta_loss[v] = np.nan
        for matrix in (interaction, stderr):
            matrix[v, :] = matrix[:, v] = np.nan
    return sorted(dropped)


def corrected_entries(sums: Sums, closed: Any, closed_error: Any, count: int) -> tuple[Any, Any]:
    """Mean of the closed form over all N samples plus mean residual over the n that have one, with its standard error.

    The n samples enter both means: Var = Var(a)/N + Var(r)/n + 2 Cov(a, r)/N. The covariance is taken over the n samples,
    and bounded by what the two variances allow.

    Args:
        sums: residuals over ``sums.residual_samples`` samples.
        closed, closed_error: mean and standard error of the closed form over all N = ``count``.
    """
    n = int(sums.residual_samples)
    residual, squared, product, part = (
        _symmetric(m) for m in (sums.residual, sums.residual_squared, sums.residual_pair, sums.residual_closed)
    )
    mean, error = mean_and_error(residual, squared, n)
    covariance = (product - part * mean) / max(n - 1, 1)
    bound = closed_error * error * np.sqrt(count * n)
    variance = closed_error**2 + error**2 + 2 * np.clip(covariance, -bound, bound) / count
    return closed + mean, np.sqrt(np.maximum(variance, 0.0))


def mean_and_error(total: Any, squares: Any, count: int) -> tuple[Any, Any]:
    mean = total / count
    if count < 2:
        return mean, np.full_like(mean, np.nan)
    variance = np.maximum(squares / count - mean**2, 0.0) * (count / (count - 1))
    return mean, np.sqrt(variance / count)
