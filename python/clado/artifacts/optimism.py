"""Losses of weights on the samples that they were rounded by, as they would be on others.

Weights fit what decided them better than anything else, some layers more than others: those with many inputs that see few
positions of a sample. In statistics that is optimism (Efron 1986, "How biased is the apparent error rate of a prediction rule?").
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..quant import Candidates, Rounded

if TYPE_CHECKING:
    from .sensitivity import Sensitivity

OPTIMISM = "optimism"  # what a matrix notes of its correction


def optimism_of(candidates: Candidates, rounded: Rounded | None, digests: NDArray[np.int64]) -> NDArray[np.float64]:
    """``[V]``: by how much each candidate's mean loss over some samples is larger where none of them decided its weight.

    The loss is a square of the error at a layer's output to first order, so that it rises as the layer loss does. Of n samples of
    which k decided, the mean is (k / r + n − k) / n of what it should be, with r the factor of those that decided.

    Args:
        rounded: the candidates' weights; None: of nearest rounding, which no samples decide.
        digests: ``[n]``, of the samples.
    """
    if rounded is None or not rounded.optimism or len(digests) == 0:
        return np.ones(len(candidates))
    share = float(np.isin(digests, rounded.sample_digests.numpy()).mean())
    known = [rounded.optimism[layer.name].get(scheme.number.name, 1.0) for layer, scheme in candidates.pairs]
    return 1 / (share / np.array(known) + 1 - share)


def without_optimism(sens: Sensitivity, rounded: Rounded | None) -> Sensitivity:
    """The matrix as other samples would have it: a pair rises as both of its layers' errors do. ``notes`` says how much."""
    factors = optimism_of(sens.candidates, rounded, sens.sample_digests)
    if (factors == 1).all():
        return sens
    return replace(times(sens, factors), notes={**sens.notes, OPTIMISM: optimism_in_words(sens.candidates, factors)})


def optimism_in_words(candidates: Candidates, factors: NDArray[np.float64]) -> str:
    most = int(np.argmax(factors))
    return f"{np.median(factors):.2f} in the median, {factors[most]:.2f} at most ({candidates.label(most)})"


def uncorrected(sens: Sensitivity) -> Sensitivity:
    """The matrix as it was measured, on samples some of which decided the weights; the same where nothing was corrected.

    Raises:
        CladoError: it was corrected, and the file of its weights, which holds the factors, is missing.
    """
    if OPTIMISM not in sens.notes:
        return sens
    notes = {name: note for name, note in sens.notes.items() if name != OPTIMISM}
    return replace(times(sens, 1 / optimism_of(sens.candidates, sens.rounded, sens.sample_digests)), notes=notes)


def times(sens: Sensitivity, factors: NDArray[np.float64]) -> Sensitivity:
    """The matrix with each candidate's loss multiplied by its factor ``[V]``."""
    pairs = pair_factors(factors)
    return replace(
        sens,
        delta_loss=sens.delta_loss * factors,
        interaction=sens.interaction * pairs,
        stderr=sens.stderr * pairs,
    )


def pair_factors(factors: NDArray[np.float64]) -> Any:
    """``[V, V]``: those of the candidates themselves on the diagonal."""
    roots = np.sqrt(factors)
    found = np.outer(roots, roots)
    np.fill_diagonal(found, factors)
    return found
