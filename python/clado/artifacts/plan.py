"""The chosen scheme of every layer, with what is proven about them and every byte that is counted."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..common import CladoError, atomic_file, refused, require
from ..quant import KEPT, ActivationRanges, Layer, Quantizer, Rounded, RoundedBy, Scheme, stored_bytes
from .rounded_file import Held, RoundedFile, discard, held_weights, rounded_path, save_held
from .sensitivity import Sensitivity

SCHEMA = 3
PLAN_FILE = "plan.json"
STATUSES = ("optimal", "feasible", "infeasible", "given")


@dataclass(frozen=True)
class ChosenOn:
    """Held-out samples that chose a plan among others, and so may not judge it: the first ``samples`` of ``data``."""

    data: str
    samples: int


@dataclass(frozen=True)
class Plan:
    """A scheme per layer.

    Attributes:
        layers: the layers in execution order.
        schemes: {layer name: label of its scheme, such as "W4A16"}, or bits for it; empty when infeasible.
        status: "optimal" (the bound closes), "feasible", "infeasible" (proven), or "given" (not solved for, e.g. uniform); where
            ``info["minimized"]`` is there, "optimal" says that no plan of so small a loss takes less (:func:`clado.solve`).
        objective: predicted loss increase ½xᵀGx under ``objective_name``.
        bound: no plan within the budgets has a lower objective; same units and same objective.
        objective_name: "original", "clipped", "shrunk" or "diagonal": what ``objective`` and ``bound`` belong to.
        values: predicted loss increase of this plan under every objective that can be computed.
        usage: {budget: {"used": …, "limit": …}}.
        quantizer: the settings the weights are quantized with.
        fingerprint: of the run the sensitivities came from; export checks the weights by it.
        activations: ranges of the layers' inputs, as far as the schemes need them; None: none is needed.
        chosen_on: held-out samples that chose it, as far as a command knows them; None: none.
        info: solver, seconds, what else is worth knowing.
        rounding: how its weights were rounded; None: to the nearest code.
        held: the weights that were rounded so, or the file that holds them.
    """

    layers: tuple[Layer, ...]
    schemes: dict[str, str]
    status: str
    objective: float = math.nan
    bound: float = -math.inf
    objective_name: str = "original"
    values: dict[str, float] = field(default_factory=dict)
    usage: dict[str, dict[str, float]] = field(default_factory=dict)
    quantizer: Quantizer = field(default_factory=Quantizer)
    fingerprint: dict[str, str] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    activations: ActivationRanges | None = None
    chosen_on: ChosenOn | None = None
    rounding: RoundedBy | None = None
    held: Held = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(self.status in STATUSES, "plan", "status", f"be one of {', '.join(STATUSES)}", repr(self.status))
        names, given = {layer.name for layer in self.layers}, dict(self.schemes)
        count = f"{len(given)} of {len(names)}"
        require(not given or set(given) == names, "plan", "schemes", "name every layer once", count)
        object.__setattr__(self, "schemes", {name: Scheme.of(scheme).label for name, scheme in given.items()})
        there = bool(given) == (self.status != "infeasible")
        require(there, "plan", "schemes", "be there unless infeasible", self.status)

    @cached_property
    def chosen(self) -> dict[str, Scheme]:
        """{layer name: its scheme}; empty when infeasible."""
        return {name: Scheme.of(label) for name, label in self.schemes.items()}

    @cached_property
    def bits(self) -> dict[str, int]:
        """{layer name: bits of its weight's codes}; empty when infeasible."""
        return {name: scheme.bits for name, scheme in self.chosen.items()}

    @property
    def base_rounds_inputs(self) -> bool:
        """Whether the matrix is around a model that rounds the inputs of all layers already (``act_bits``)."""
        return self.activations is not None and self.activations.base

    @property
    def rounded(self) -> Rounded | None:
        """The weights as ``rounding`` made them; None for nearest rounding.

        Raises:
            CladoError: they are not at hand, or damaged.
        """
        return held_weights(self.held, self.rounding, "plan")

    @property
    def gap(self) -> float:
        """``objective - bound``: how much better a plan could be at most."""
        return self.objective - self.bound

    @cached_property
    def layer_bytes(self) -> dict[str, int]:
        """{layer name: bytes of packed codes and scales}."""
        return {layer.name: stored_bytes(layer, self.chosen[layer.name], self.quantizer) for layer in self.layers}

    @property
    def average_in_words(self) -> str:
        """ "3.000 bits on average over 93 % of the weights"."""
        share = self.info.get("searched_share")
        return f"{self.avg_bits:.3f} bits on average" + (
            "" if share is None else f" over {100 * share:.3g} % of the weights"
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of the quantized layers on disk: packed codes and scales."""
        return sum(self.layer_bytes.values())

    @property
    def avg_bits(self) -> float:
        """Bits per weight, codes alone."""
        total = sum(layer.numel for layer in self.layers)
        return sum(self.bits[layer.name] * layer.numel for layer in self.layers) / total

    def to_json(self) -> str:
        """One JSON object; numbers that are not finite are written as null."""
        data = {
            "schema": SCHEMA,
            **asdict(replace(self, held=None)),
            "quantizer": self.quantizer.to_json(),
            "objective": _finite(self.objective),
            "bound": _finite(self.bound),
            "activations": self.activations.to_json() if self.activations else {},
        }
        del data["held"]  # a file of its own
        if self.schemes:
            data["bits"] = self.bits  # derived, for readers of the file, like the bytes
            data["layer_bytes"] = self.layer_bytes
        return json.dumps(data, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Inverse of :meth:`to_json`.

        Raises:
            CladoError: not a plan, or one of another schema.
        """
        try:
            data = json.loads(text, parse_constant=_refuse)
            plan = isinstance(data, dict) and ("schemes" in data or "bits" in data)
            require(plan, "plan", "file", "be a clado plan", "another file")
            schema = data.get("schema")
            require(schema in (1, 2, SCHEMA), "plan", "schema", f"be 1 to {SCHEMA}", schema)
            data = _of_schema_1(data) if schema == 1 else data
            data = {"rounding": None, **data} if schema < SCHEMA else data
            for name in ("schemes", "values", "usage", "fingerprint", "info"):
                require(isinstance(data[name], dict), "plan", name, "be an object", type(data[name]).__name__)
            bits = {name: Scheme.of(label).bits for name, label in data["schemes"].items()}
            agrees = data.get("bits", bits) == bits
            require(agrees, "plan", "bits", "be those of the schemes", "others")
            layers = tuple(Layer.from_json(item, "plan", "plan") for item in data["layers"])
            return Plan(
                layers,
                data["schemes"],
                data["status"],
                math.nan if data["objective"] is None else float(data["objective"]),
                -math.inf if data["bound"] is None else float(data["bound"]),
                data["objective_name"],
                data["values"],
                data["usage"],
                Quantizer(**data["quantizer"]),
                data["fingerprint"],
                data["info"],
                ActivationRanges.from_json(data["activations"]),
                None if data["chosen_on"] is None else ChosenOn(**data["chosen_on"]),
                RoundedBy.from_json(data["rounding"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, CladoError):
                raise
            raise CladoError(f"plan: file must be a whole clado plan, got {type(error).__name__}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``path`` (a file, or a run directory) whole or not at all; returns the file.

        Rounded weights are written beside it first, and those of a plan that it replaces go, unless another plan or a matrix
        there has them.
        """
        target = _file(path)
        with refused(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        before = _rounding_of(target)
        save_held(self.held, target.parent)
        with atomic_file(target) as temporary:
            temporary.write_text(self.to_json())
        if before is not None and before != self.rounding and before not in _roundings_in(target.parent):
            discard(rounded_path(target.parent, before))
        return target

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a file or a run directory.

        Raises:
            CladoError: missing, truncated, foreign or of another schema.
        """
        with refused(Path(path), "be readable"):
            source = _file(path)
            require(source.is_file(), "plan", "path", "be a plan file or a run directory that holds one", source)
            data = source.read_bytes()
        try:
            plan = Plan.from_json(data.decode())
            held = None if plan.rounding is None else RoundedFile(source.parent, plan.rounding)
            return replace(plan, held=held)
        except UnicodeDecodeError:
            raise CladoError(f"plan: file must be a clado plan, got binary data in {source}") from None


def minimized_in_words(plan: Plan) -> str:
    """What is proven of a plan that answers the inverse question, ``info["minimized"]``."""
    found = plan.info["minimized"]
    least = f"least {found['name']} with a predicted loss increase of at most {found['max_loss_increase']:.6g}"
    return least + (": proven" if plan.status == "optimal" else f": no plan below {found['bound']:,.6g} is proven")


def _rounding_of(path: Path) -> RoundedBy | None:
    """What a plan file says of rounded weights; None where there is no plan that can be read."""
    try:
        return Plan.from_json(path.read_text()).rounding
    except (OSError, UnicodeDecodeError, CladoError):
        return None


def _roundings_in(folder: Path) -> list[RoundedBy | None]:
    """What the plans and matrices in a folder say of rounded weights."""
    return [
        *(_rounding_of(path) for path in folder.glob("*.json")),
        *(_rounding_of_matrix(path) for path in folder.glob("*.safetensors")),
    ]


def _rounding_of_matrix(path: Path) -> RoundedBy | None:
    """As :func:`_rounding_of`, of the file of a matrix."""
    try:
        return Sensitivity.load(path).provenance.rounding
    except CladoError:
        return None


def _of_schema_1(data: dict[str, Any]) -> dict[str, Any]:
    """A plan of schema 1 as one of schema 2: its bits become schemes."""
    activations = data.get("activations", {})
    inputs = activations["bits"] if activations else KEPT
    schemes = {name: Scheme.of(bits, inputs).label for name, bits in data["bits"].items()}
    info = dict(data["info"])
    known = "rerank_data" in info
    chosen = {"data": info.pop("rerank_data"), "samples": info.get("rerank_samples", 0)} if known else None
    return {**data, "schemes": schemes, "activations": activations, "info": info, "chosen_on": chosen}


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _file(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    return target if target.suffix == ".json" else target / PLAN_FILE
