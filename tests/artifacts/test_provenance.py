"""What a matrix says of how it was measured."""

import pytest

from clado.artifacts import Provenance


@pytest.mark.parametrize(
    ("loss", "unit"),
    [
        ("kl", "nats"),
        ("out=kl,aux=0.4*cross_entropy", "nats"),
        ("mse", ""),
        ("out=bce,depth=0.5*smooth_l1", ""),
        ("user", ""),
        (None, "nats"),  # scores from elsewhere are cross-entropies
    ],
)
def test_only_entropies_are_counted_in_nats(loss: str | None, unit: str) -> None:
    assert Provenance(loss=loss).unit == unit
