"""The self-check: plans that are really run on held-out samples, kept so that a report is quick to redo."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..artifacts import Plan, Sensitivity
from ..common import atomic_file
from ..improve import loss_increases, standard_error

MEASURED_FILE = "measured.json"
SCHEMA = 1
RANDOM = 16
Record = dict[str, Any]


def random_plans(sens: Sensitivity, count: int = RANDOM, seed: int = 0) -> list[Plan]:
    """Plans between all layers at the least width and most at the largest: widths drawn from a binomial per plan."""
    random = np.random.default_rng(seed)
    top = len(sens.bits) - 1
    plans = []
    for share in np.linspace(0.05, 0.7, count):
        widths = random.binomial(top, share, size=len(sens.layers))
        plans.append(plan_of(sens, [sens.bits[m] for m in widths]))
    return plans


def uniform_plans(sens: Sensitivity) -> list[Plan]:
    """Every layer at the same width, for each width."""
    return [plan_of(sens, [bits] * len(sens.layers)) for bits in sens.bits]


def plan_of(sens: Sensitivity, widths: Sequence[int]) -> Plan:
    """A plan of the given bits in layer order."""
    bits = {layer.name: int(width) for layer, width in zip(sens.layers, widths, strict=True)}
    chosen = sens.candidates.indices(bits)
    objective = sens.predict(bits)
    return Plan(
        sens.layers,
        sens.candidates.choice(chosen),
        "given",
        objective,
        quantizer=sens.quantizer,
        fingerprint=sens.fingerprint,
        activations=sens.activations,
    )


def measure(
    sens: Sensitivity,
    plans: Sequence[Plan],
    model: nn.Module,
    heldout: Iterable[Any],
    device: str | None = None,
    verbose: bool = True,
) -> list[Record]:
    """Run plans on samples that neither made the matrix nor chose among them.

    Args:
        sens: what predicts; its loss is the one that is measured.
        plans: distinct plans with bits.
        model: the float model.
        heldout: batches of inputs or (inputs, targets).

    Returns:
        One record per plan: bits in layer order, predicted and measured loss increase in nats, and the standard error of
        the latter over samples (None for a single sample).

    Raises:
        CladoError: as :func:`clado.rerank`.
    """
    increases = loss_increases(model, heldout, plans, sens.provenance.loss or "kl", device, verbose)
    return [
        {
            "bits": list(plan.bits.values()),
            "avg_bits": plan.avg_bits,
            "size_bytes": plan.size_bytes,
            "predicted": sens.predict(plan.bits),
            "increase": row.mean().item(),
            "stderr": _finite(standard_error(row)),
            "samples": len(row),
        }
        for plan, row in zip(plans, increases, strict=True)
    ]


def load_measured(run: Path, key: dict[str, Any]) -> list[Record]:
    """Records of an earlier report on the same matrix and samples; empty where there are none."""
    try:
        kept = json.loads((run / MEASURED_FILE).read_text())
        return kept["plans"] if kept["schema"] == SCHEMA and kept["key"] == key else []
    except (OSError, ValueError, KeyError, TypeError):
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
    known = {tuple(record["bits"]): record for record in records}
    out: dict[tuple[int, ...], Record] = {}
    for kind, members in plans.items():
        for k, plan in enumerate(members):
            bits = tuple(plan.bits.values())
            if bits in known:
                name = {"random": f"random {k + 1}", "uniform": f"uniform {bits[0]}", "chosen": "the chosen plan"}
                label = name.get(kind, f"frontier at {plan.avg_bits:.2f} bits")
                out[bits] = known[bits] | {"kind": kind, "name": label}
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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
