"""The part that searches for scales share: rate a tool's grid by our kernel, leave what rounding decides to the tool."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from clado_ext import has_cuda, scale_errors

# Candidates within this share of the least error are rated again, by the tool's arithmetic: it rounds differently (its quotient,
# its order of adding), which moves an error by up to about 1e-5 at 8 bits.
NEAR = 1e-4


def reachable(x: Tensor) -> bool:
    """Whether our kernels compute where a tensor lies."""
    return x.device.type == "cpu" or (x.is_cuda and has_cuda)


def losses(
    matrix: Tensor, scales: Tensor, low: int, high: int, values: Callable[[int, Tensor, Tensor], Tensor]
) -> Tensor:
    """Errors ``[S, N]`` float32 of S scales for each row of ``[N, K]``, the tool's own where rounding could decide.

    Args:
        values: (number of the scale, numbers of rows, those rows in float32) -> the rows as the tool quantizes them.
    """
    errors, near = rated(matrix, scales, low, high)
    found = errors.float()
    rows = near.any(0).nonzero().flatten()
    if len(rows):
        some = matrix[rows].float()
        for k in near.any(1).nonzero().flatten().tolist():
            found[k, rows] = nn.functional.mse_loss(some, values(k, rows, some), reduction="none").sum(1)
    return found


def rated(matrix: Tensor, scales: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Errors ``[S, N]`` float64 of S scales for each row of ``[N, K]``, and which of them rounding could make the least.

    Rows whose least error is 0 have no such candidates: rounding cannot undercut that.
    """
    errors = scale_errors(matrix, scales.unsqueeze(2), low, high).squeeze(2)
    best = errors.min(0).values
    near = (errors <= best * (1 + NEAR)) & (best > 0)
    return errors, near & (near.sum(0) > 1)
