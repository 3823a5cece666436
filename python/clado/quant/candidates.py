"""Candidates: a layer at a bit-width."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..common import require


def same_layer(num_layers: int, num_bits: int) -> NDArray[np.bool_]:
    """``[V, V]`` mask of candidate pairs that belong to one layer."""
    layer = np.repeat(np.arange(num_layers), num_bits)
    return layer[:, None] == layer[None, :]


def check_bits(bits: Sequence[int]) -> None:
    ascending = (
        len(bits) > 0 and all(isinstance(b, int) and 2 <= b <= 8 for b in bits) and list(bits) == sorted(set(bits))
    )
    require(ascending, "bits", "bits", "be distinct ascending widths in 2..8", tuple(bits))
