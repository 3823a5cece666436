"""Plain-torch twin of clado_ext.pairwise_bce, in float64 by the definition: a second difference of losses."""

from torch import Tensor
from torch.nn.functional import softplus

from .pairwise_ce import sums


def interactions(logits: Tensor, delta: Tensor, other: Tensor | None = None) -> Tensor:
    """a_vw of every row, float64 ``[V, W, R]``: L(z+δ_v+δ_w) - L(z+δ_v) - L(z+δ_w) + L(z), L(z) = log(1 + e^z)."""
    z, d = logits.double(), delta.double()
    o = d if other is None else other.double()

    def loss(x: Tensor) -> Tensor:
        return softplus(x, threshold=1e4)

    return loss(z + d[:, None] + o[None, :]) - loss(z + d)[:, None] - loss(z + o)[None, :] + loss(z)


def pairwise_bce(
    logits: Tensor,
    delta: Tensor,
    weight: Tensor | None = None,
    rows_per_sample: int = 1,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """float64 ``[V, W]`` sums of a and a² over samples; see :func:`clado_ext.pairwise_bce`."""
    return sums(interactions(logits, delta, other), weight, rows_per_sample)
