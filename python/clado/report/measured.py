"""The self-check: plans that are really run on held-out samples, kept so that a report is quick to redo."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..artifacts import Plan, Sensitivity
from ..common import CladoError, atomic_file, require
from ..graph import ForwardStep
from ..improve import loss_increases, standard_error
from ..profiling import LossChoice, LossFunc, loss_arguments
from ..quant import Scheme, scheme_names

MEASURED_FILE = "measured.json"
SCHEMA = 2
RANDOM = 16
Record = dict[str, Any]


def random_plans(sens: Sensitivity, count: int = RANDOM, seed: int = 0) -> list[Plan]:
    """Plans between all layers at their least scheme and most at their largest: a binomial draw per layer and plan."""
    random = np.random.default_rng(seed)
    first, last = sens.candidates.starts[:-1], np.array(sens.candidates.counts) - 1
    return [plan_of(sens, first + random.binomial(last, share)) for share in np.linspace(0.05, 0.7, count)]


def uniform_plans(sens: Sensitivity) -> list[Plan]:
    """Every layer at the same scheme, for each scheme that every layer has."""
    shared = [s for s in sens.candidates.distinct if all(s in own for own in sens.candidates.schemes)]
    return [plan_of(sens, [sens.index(layer.name, scheme) for layer in sens.layers]) for scheme in shared]


def plan_of(sens: Sensitivity, chosen: Sequence[int] | NDArray[np.int64]) -> Plan:
    """A plan of ``[L]`` candidates, one of every layer."""
    schemes = sens.candidates.choice(chosen)
    return Plan(
        sens.layers,
        schemes,
        "given",
        sens.predict(schemes),
        quantizer=sens.quantizer,
        fingerprint=sens.fingerprint,
        activations=sens.activations_of(schemes),
        rounding=sens.provenance.rounding,
        held=sens.held,
    )


def measure(
    sens: Sensitivity,
    plans: Sequence[Plan],
    model: nn.Module,
    heldout: Iterable[Any],
    device: str | None = None,
    verbose: bool = True,
    *,
    forward_step: ForwardStep | None = None,
    loss_func: LossFunc | None = None,
) -> list[Record]:
    """Run plans on samples that neither made the matrix nor chose among them.

    Args:
        sens: what predicts; its loss is the one that is measured.
        plans: distinct plans with bits.
        model: the float model.
        heldout: batches of inputs or (inputs, targets).
        forward_step, loss_func: as for :func:`clado.profile`; None: those that ``sens`` was measured with, where it knows them.

    Returns:
        One record per plan: schemes and bits in layer order, predicted and measured loss increase, and the
        standard error of the latter over samples (None for a single sample).

    Raises:
        CladoError: as :func:`clado.rerank`.
    """
    forward_step = forward_step or sens.functions.get("forward_step")
    known = {**loss_arguments(sens), **({} if loss_func is None else {"loss_func": loss_func})}
    own = sens.provenance.loss != "user" or "loss" in known or "loss_func" in known
    require(own, "report", "loss_func", "be given for a matrix that was measured under one", "none")
    chosen = LossChoice.of("report", **known)
    increases = loss_increases(model, heldout, plans, chosen, device, verbose, forward_step=forward_step)
    return [
        {
            "schemes": list(plan.schemes.values()),
            "bits": list(plan.bits.values()),
            "avg_bits": plan.avg_bits,
            "size_bytes": plan.size_bytes,
            "predicted": sens.predict(plan.schemes),
            "increase": row.mean().item(),
            "stderr": _finite(standard_error(row)),
            "samples": len(row),
        }
        for plan, row in zip(plans, increases, strict=True)
    ]


def load_measured(run: Path, key: dict[str, Any], sens: Sensitivity) -> list[Record]:
    """Records of an earlier report on the same matrix and samples; empty where there are none."""
    try:
        kept = json.loads((run / MEASURED_FILE).read_text())
        if kept["schema"] not in (1, SCHEMA) or kept["key"] != key:
            return []
        records: list[Record] = kept["plans"]
        return records if kept["schema"] == SCHEMA else [_of_schema_1(record, sens) for record in records]
    except (CladoError, OSError, ValueError, KeyError, TypeError):
        return []


def measured_key(run: Path) -> dict[str, Any]:
    """What an earlier report's records hold for; empty where there are none."""
    try:
        return dict(json.loads((run / MEASURED_FILE).read_text())["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def save_measured(run: Path, key: dict[str, Any], records: Sequence[Record]) -> None:
    """Keep records beside what they hold for: the run's fingerprint and the samples."""
    with atomic_file(run / MEASURED_FILE) as temporary:
        temporary.write_text(json.dumps({"schema": SCHEMA, "key": key, "plans": list(records)}, indent=1))


def named(records: Sequence[Record], plans: Mapping[str, Sequence[Plan]]) -> list[Record]:
    """Records with the kind and name their plan has now; a plan that is of several kinds takes the last."""
    known = {tuple(record["schemes"]): record for record in records}
    read = scheme_names(scheme for members in plans.values() for p in members for scheme in p.chosen.values())
    out: dict[tuple[str, ...], Record] = {}
    for kind, members in plans.items():
        for k, plan in enumerate(members):
            labels = tuple(plan.schemes.values())
            if labels in known:
                same = f"uniform {read[Scheme.of(labels[0])]}"
                names = {"random": f"random {k + 1}", "uniform": same, "chosen": "the chosen plan"}
                name = names.get(kind, f"frontier at {plan.avg_bits:.2f} bits")
                out[labels] = known[labels] | {"kind": kind, "name": name}
    return list(out.values())


def agreement(records: Sequence[Record]) -> dict[str, float]:
    """How far prediction and truth agree: rank correlation, and measured over predicted (median and 80 % of the plans)."""
    from scipy.stats import spearmanr

    predicted = np.array([record["predicted"] for record in records])
    increase = np.array([record["increase"] for record in records])
    if len(records) < 3 or np.ptp(predicted) == 0 or np.ptp(increase) == 0:
        return {}
    out = {"rank_correlation": float(spearmanr(predicted, increase).statistic)}
    both = (predicted > 0) & (increase > 0)
    if both.sum() >= 3:
        low, middle, high = np.quantile(increase[both] / predicted[both], (0.1, 0.5, 0.9))
        out |= {"ratio": float(middle), "ratio_low": float(low), "ratio_high": float(high)}
    return out


def _of_schema_1(record: Record, sens: Sensitivity) -> Record:
    """A record of schema 1, which knows bits alone: no layer has two schemes of the same bits."""
    bits = {layer.name: b for layer, b in zip(sens.layers, record["bits"], strict=True)}
    return {"schemes": list(sens.candidates.choice(sens.candidates.indices(bits)).values()), **record}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
