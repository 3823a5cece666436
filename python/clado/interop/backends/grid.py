"""The part that searches for scales share: rate a tool's grid by our kernel, leave what rounding decides to the tool."""

from __future__ import annotations

from torch import Tensor

from clado_ext import scale_errors

# Candidates within this share of the least error are rated again, by the tool's arithmetic: it rounds differently (its quotient,
# its order of adding), which moves an error by up to about 1e-5 at 8 bits.
NEAR = 1e-4


def rated(matrix: Tensor, scales: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Errors ``[S, N]`` float64 of S scales for each row of ``[N, K]``, and which of them rounding could make the least.

    Rows whose least error is 0 have no such candidates: rounding cannot undercut that.
    """
    errors = scale_errors(matrix, scales.unsqueeze(2), low, high).squeeze(2)
    best = errors.min(0).values
    near = (errors <= best * (1 + NEAR)) & (best > 0)
    return errors, near & (near.sum(0) > 1)
