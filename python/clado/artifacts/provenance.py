"""Where a sensitivity matrix comes from: what later stages decide by."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..quant import RoundedBy
from .stability import Stability

_ENTROPIES = ("kl", "cross_entropy", "bce")


def unit_of(loss: str) -> str:
    """What a loss is counted in, by its name: "nats" of divergences and entropies, else "": a unit of its own."""
    parts = [part.partition("=")[2] or part for part in loss.split(",")]
    return "nats" if all(part.rpartition("*")[2] in ("", *_ENTROPIES) for part in parts) else ""


@dataclass(frozen=True)
class Provenance:
    """How a matrix was measured.

    Attributes:
        estimator: its name; None for scores from elsewhere.
        loss: name of the loss, {key: name} written as "key=name,key=0.5*name", or "user" for a function or object of the user's.
        loss_options: {"loss_dim", "loss_against", "ignore_index", "class_weights", "positions": as they were given}, those
            that were.
        loss_words: what the loss was, in a line.
        precision: of the matrix products.
        float_layers: {layer, module or parameter of two or more dimensions that was kept in float: why}.
        float_weights: how many weights each of them has.
        dropped: (layer, label of the scheme) of candidates whose loss was not finite.
        corrected_pairs: (v, w) whose interaction :func:`clado.correct` measured exactly.
        rounding: how the weights were rounded; None: to the nearest code.
        stability: what a run that was to end as soon as its plans stand found of them; None: it was to take all samples.
    """

    estimator: str | None = None
    loss: str | None = None
    precision: str | None = None
    float_layers: dict[str, str] = field(default_factory=dict)
    float_weights: dict[str, int] = field(default_factory=dict)
    dropped: tuple[tuple[str, str], ...] = ()
    corrected_pairs: tuple[tuple[int, int], ...] = ()
    rounding: RoundedBy | None = None
    stability: Stability | None = None
    loss_options: dict[str, Any] = field(default_factory=dict)
    loss_words: str = ""

    @property
    def unit(self) -> str:
        """What losses are counted in."""
        return unit_of(self.loss or "")

    @property
    def known(self) -> bool:
        """Whether the matrix was measured by :func:`clado.profile`."""
        return self.estimator is not None

    def in_float(self, searched: int) -> str:
        """What stayed float, with its share of all weights, beside so many that were searched; empty where nothing did."""
        total = searched + sum(self.float_weights.values())
        ordered = sorted(self.float_layers, key=lambda name: -self.float_weights.get(name, 0))
        shares = {name: f"{self.float_weights[name] / total:.1%}, " for name in ordered if name in self.float_weights}
        return "; ".join(f"{name} ({shares.get(name, '')}{self.float_layers[name]})" for name in ordered)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Provenance:
        """Inverse of :meth:`to_json`, by way of JSON."""
        pairs = tuple((int(v), int(w)) for v, w in data["corrected_pairs"])
        dropped = tuple((str(layer), str(label)) for layer, label in data["dropped"])
        rounding = RoundedBy.from_json(data.get("rounding"))
        stability = Stability.from_json(data.get("stability"))
        old = {"logit": "additive"}
        estimator = old.get(data.get("estimator", ""), data.get("estimator"))
        parsed = {
            "estimator": estimator,
            "dropped": dropped,
            "corrected_pairs": pairs,
            "rounding": rounding,
            "stability": stability,
        }
        return Provenance(**{**data, **parsed})
