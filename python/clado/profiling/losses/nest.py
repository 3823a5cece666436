"""Several outputs: a loss of each, weighted; the interactions of the sum are the sum of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .base import L, Loss


@dataclass(frozen=True)
class Part:
    """The loss of one output, by its key."""

    key: str
    weight: float
    loss: Loss


@dataclass(frozen=True)
class Nest(Loss):
    """Σ weight · loss of outputs; ``z`` and ``delta`` are tuples, one for each part."""

    parts: tuple[Part, ...]

    @property
    def rests(self) -> bool:
        return all(part.loss.rests for part in self.parts)

    def taken(self, output: Any, lead: int = 0) -> tuple[Any, ...]:
        return tuple(part.loss.taken(field_of(output, part.key), lead) for part in self.parts)

    def increase(self, z: Any, delta: Any) -> Tensor:
        return self._sum(part.loss.increase(*own) for part, *own in zip(self.parts, z, delta, strict=True))

    def interactions(self, z: Any, first: Any, second: Any) -> Tensor:
        every = zip(self.parts, z, first, second, strict=True)
        return self._sum(part.loss.interactions(*own) for part, *own in every)

    def pair(self, z: Any, first: Any, second: Any, joint: Any) -> tuple[Tensor, Tensor]:
        every = zip(self.parts, z, first, second, joint, strict=True)
        closed, residual = zip(*(part.loss.pair(*own) for part, *own in every), strict=True)
        return self._sum(closed), self._sum(residual)

    def gradient(self, z: Any, delta: Any) -> Any:
        every = zip(self.parts, z, delta, strict=True)
        return tuple(part.weight * part.loss.gradient(*own) for part, *own in every)

    def anchored(self, output: Any) -> Loss:
        return self._with(lambda part: part.loss.anchored(field_of(output, part.key)))

    def value(self, output: Any) -> Tensor:
        return self._sum(part.loss.value(field_of(output, part.key)) for part in self.parts)

    def _each(self: L, change: Any) -> L:
        return self._with(lambda part: part.loss._each(change))  # type: ignore[attr-defined, no-any-return]

    def _with(self, change: Any) -> Nest:
        return Nest(tuple(replace(part, loss=change(part)) for part in self.parts))

    def _sum(self, values: Any) -> Tensor:
        weighted = [part.weight * value for part, value in zip(self.parts, values, strict=True)]
        total: Tensor = sum(weighted[1:], weighted[0])
        return total


def field_of(output: Any, key: str) -> Any:
    """An output by its key, its name or its place; None where there is none."""
    if isinstance(output, Mapping):
        return output.get(key)
    if isinstance(output, (tuple, list)) and key.isdigit():
        return output[int(key)] if int(key) < len(output) else None
    return getattr(output, key, None)


def keys_of(output: Any) -> list[str]:
    """The keys by which :func:`field_of` finds outputs."""
    if isinstance(output, Mapping):
        return list(map(str, output))
    if isinstance(output, (tuple, list)):
        return [str(k) for k in range(len(output))]
    return list(vars(output)) if hasattr(output, "__dict__") else []
