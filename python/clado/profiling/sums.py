"""From sums over samples to the sensitivity matrix: means, standard errors, and what is dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..artifacts import Provenance, Sensitivity
from ..quant import Candidates, Quantizer
from .share import Share


@dataclass
class Sums:
    """Sums over samples, float64.

    Attributes:
        loss, loss_squared: of ΔL and its square, ``[V]``.
        pair, pair_squared: of Ω and its square, ``[V, V]``, the upper triangle.
        residual, residual_squared, residual_pair, residual_closed: of what the exact Ω adds to the closed form, its square,
            its product with the closed form, and the closed form, over ``residual_samples`` (int64 scalar) of the samples;
            ``[0, 0]`` where none paid for it.
        samples: over how many.
    """

    loss: Tensor
    loss_squared: Tensor
    pair: Tensor
    pair_squared: Tensor
    residual: Tensor
    residual_squared: Tensor
    residual_pair: Tensor
    residual_closed: Tensor
    residual_samples: Tensor
    samples: int = 0

    @staticmethod
    def zeros(candidates: int, device: torch.device | str = "cpu") -> Sums:
        vector = torch.zeros(candidates, dtype=torch.float64, device=device)
        matrix = torch.zeros(candidates, candidates, dtype=torch.float64, device=device)
        none = torch.zeros(0, 0, dtype=torch.float64, device=device)
        zero = torch.zeros((), dtype=torch.int64, device=device)
        return Sums(vector, vector.clone(), matrix, matrix.clone(), none, none, none, none, zero)

    def __iadd__(self, other: Sums) -> Sums:
        self.loss += other.loss
        self.loss_squared += other.loss_squared
        self.pair += other.pair
        self.pair_squared += other.pair_squared
        if len(other.residual):
            empty = not len(self.residual)
            for name in ("residual", "residual_squared", "residual_pair", "residual_closed"):
                added = getattr(other, name)
                setattr(self, name, added.clone() if empty else getattr(self, name) + added)
        self.residual_samples = self.residual_samples + other.residual_samples
        self.samples += other.samples
        return self

    def added(self, share: Share) -> Sums:
        """The sums of all members of a share over the same samples, on each of them."""
        return self._with(share.added)

    def cpu(self) -> Sums:
        """The sums on the CPU."""
        return self._with(Tensor.cpu)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Sums:
        tensors: dict[str, Any] = {name: change(getattr(self, name)) for name in TENSORS}
        return replace(self, **tensors)


TENSORS = tuple(f.name for f in fields(Sums) if f.name != "samples")  # in the order in which they are kept and sent


def assemble(
    sums: Sums,
    candidates: Candidates,
    quantizer: Quantizer,
    provenance: Provenance,
    fingerprint: dict[str, str],
    digests: Tensor,
) -> Sensitivity:
    """The matrix of sums over samples; candidates whose loss is not finite are dropped by name."""
    delta_loss, interaction, stderr = entries(sums, candidates)
    dropped = _drop(delta_loss, interaction, stderr)
    pairs = tuple((candidates.layers[candidates.layer_of[v]].name, candidates.flat[v].label) for v in dropped)
    return Sensitivity(
        candidates,
        delta_loss,
        interaction,
        stderr,
        num_samples=sums.samples,
        quantizer=quantizer,
        provenance=replace(provenance, dropped=pairs),
        notes={"warnings": [f"dropped {candidates.label(v)}: its loss is NaN or infinite" for v in dropped]},
        fingerprint=fingerprint,
        sample_digests=digests.numpy(),
    )


def entries(sums: Sums, candidates: Candidates) -> tuple[Any, Any, Any]:
    """(ΔL ``[V]``, Ω ``[V, V]``, standard errors ``[V, V]`` as in :class:`Sensitivity`)."""
    interaction, stderr = mean_and_error(_symmetric(sums.pair), _symmetric(sums.pair_squared), sums.samples)
    if int(sums.residual_samples):
        interaction, stderr = corrected_entries(sums, interaction, stderr, sums.samples)
    delta_loss, loss_error = mean_and_error(sums.loss.numpy(), sums.loss_squared.numpy(), sums.samples)
    interaction[candidates.same_layer] = 0.0
    stderr[candidates.same_layer] = 0.0
    np.fill_diagonal(stderr, loss_error)
    return delta_loss, interaction, stderr


def finite_candidates(sums: Sums, candidates: Candidates) -> Any:
    """The candidates that :func:`assemble` would not drop, ascending int64."""
    dropped = _drop(*entries(sums, candidates))
    return np.setdiff1d(np.arange(len(candidates)), np.array(dropped, np.int64))


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
