"""The answer: bits per layer, what it is proven to be worth, and every byte that is counted."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import CladoError, require
from .files import atomic_file

SCHEMA = 1
FILE_NAME = "plan.json"
STATUSES = ("optimal", "feasible", "infeasible")


@dataclass(frozen=True)
class Plan:
    """Bits per layer with a certificate. Losses are predicted increases in nats.

    Attributes:
        bits: {layer name: bits} in layer order; empty when the status is "infeasible".
        objective: ½ xᵀGx of the objective that was solved; None when infeasible.
        bound: proven lower bound on that same objective over all plans within the budgets; None when infeasible.
        gap: (objective − bound) over the larger of |objective| and the plan's diagonal part; None when infeasible.
        status: "optimal" (gap ≤ 1e-6), "feasible", or "infeasible" (proven: no plan meets the budgets together).
        usage: {budget: {"used": …, "limit": …}} in the budget's own unit.
        objective_name: "original", "clipped", "shrunk" or "diagonal": what ``objective`` and ``bound`` belong to.
        values: the plan's value under each objective that is defined for the matrix.
        negative_mass: sum of the magnitudes of the negative eigenvalues of G over the sum of all magnitudes; None
            where G is too large for that.
        solver: what found and what proved the plan.
        seconds: wall time of the solve.
        layer_bytes: {layer name: bytes} of packed codes and scales, as export writes them.
        layer_numel: {layer name: weights}.
        candidate_bits: the bit-widths that were to choose from.
        quantizer: settings of :class:`clado.Quantizer` under which the matrix was measured.
        fingerprint: digests of weights, data and settings, copied from the sensitivity matrix.
        note: one line for people, such as why the budgets cannot hold together.
    """

    bits: dict[str, int]
    objective: float | None
    bound: float | None
    gap: float | None
    status: str
    usage: dict[str, dict[str, float]]
    objective_name: str = "original"
    values: dict[str, float] = field(default_factory=dict)
    negative_mass: float | None = None
    solver: str = ""
    seconds: float = 0.0
    layer_bytes: dict[str, int] = field(default_factory=dict)
    layer_numel: dict[str, int] = field(default_factory=dict)
    candidate_bits: tuple[int, ...] = ()
    quantizer: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        require(self.status in STATUSES, "plan", "status", f"be one of {STATUSES}", repr(self.status))
        require(bool(self.bits) != (self.status == "infeasible"), "plan", "bits", "be empty if infeasible", self.status)
        good = all(isinstance(b, int) and not isinstance(b, bool) and 2 <= b <= 8 for b in self.bits.values())
        require(good, "plan", "bits", "be widths in 2..8", sorted({str(b) for b in self.bits.values()}))
        for name in ("layer_bytes", "layer_numel"):
            known = getattr(self, name)
            require(not known or list(known) == list(self.bits), "plan", name, "name the layers of bits", len(known))

    @property
    def size_bytes(self) -> int:
        """Bytes of all layers: packed codes and scales, without file header and float leftovers."""
        return sum(self.layer_bytes.values())

    @property
    def avg_bits(self) -> float:
        """Σ bits·weights / Σ weights."""
        total = sum(self.layer_numel.values())
        return sum(self.bits[name] * numel for name, numel in self.layer_numel.items()) / total if total else 0.0

    def to_json(self) -> str:
        """Text that :meth:`from_json` reads back to an equal plan."""
        return json.dumps({"clado.plan": SCHEMA, **asdict(self)}, indent=2, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read :meth:`to_json`.

        Raises:
            CladoError: not JSON, not a plan, another schema, or fields that are missing, unknown or of another type.
        """
        try:
            content = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise CladoError(f"plan: text must be a whole clado plan, got broken JSON ({error})") from None
        require(isinstance(content, dict) and "clado.plan" in content, "plan", "text", "be a clado plan", "other JSON")
        schema = content.pop("clado.plan")
        require(schema == SCHEMA, "plan", "schema", f"be {SCHEMA}", repr(schema))
        names = {item.name for item in fields(Plan)}
        require(set(content) == names, "plan", "fields", "be exactly the known ones", sorted(set(content) ^ names))
        _check_types(content)
        content["candidate_bits"] = tuple(content["candidate_bits"])
        return Plan(**content)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``path`` (a file, or a run directory: ``plan.json`` in it) whole or not at all; returns the file."""
        target = _file(path)
        with atomic_file(target) as temporary:
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")
        return target

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a file or a run directory.

        Raises:
            CladoError: missing, truncated, foreign or of another schema.
        """
        source = _file(path)
        require(source.is_file(), "load", "path", "be a plan file or a run directory that holds one", source)
        try:
            return Plan.from_json(source.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, OSError) as error:
            raise CladoError(f"load: path must be a clado plan, got {source} ({error})") from None


_NUMBER = (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    "bits": (dict,),
    "objective": (*_NUMBER, type(None)),
    "bound": (*_NUMBER, type(None)),
    "gap": (*_NUMBER, type(None)),
    "status": (str,),
    "usage": (dict,),
    "objective_name": (str,),
    "values": (dict,),
    "negative_mass": (*_NUMBER, type(None)),
    "solver": (str,),
    "seconds": _NUMBER,
    "layer_bytes": (dict,),
    "layer_numel": (dict,),
    "candidate_bits": (list,),
    "quantizer": (dict,),
    "fingerprint": (dict,),
    "note": (str,),
}


def _check_types(content: dict[str, Any]) -> None:
    for name, kinds in _TYPES.items():
        value = content[name]
        good = isinstance(value, kinds) and not isinstance(value, bool)
        require(good, "plan", name, f"be {' or '.join(kind.__name__ for kind in kinds)}", type(value).__name__)
    for name in ("layer_bytes", "layer_numel"):
        counts = content[name].values()
        good = all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts)
        require(good, "plan", name, "hold counts", "other values")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _file(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    return target / FILE_NAME if target.is_dir() or not target.suffix else target
