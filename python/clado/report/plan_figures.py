"""Figures of plans: bits per layer, the frontier, predicted against measured loss increase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..artifacts import Plan, Sensitivity
from ..common import require
from ..quant import all_plain
from .style import Spec, decades, in_unit, note, rule, with_error

AXES = {  # of the frontier, by the budget that varies
    "avg_bits": "budget: bits per weight on average",
    "size_bytes": "budget: bytes",
    "size_mb": "budget: MiB",
    "bitops": "budget: BitOps",
    "latency_ms": "budget: milliseconds",
}


def bits_figure(plan: Plan, sens: Sensitivity | None = None) -> Spec:
    """Every layer as a block: its weights wide, its bits high, so that the area is its size.

    Raises:
        CladoError: a plan without bits.
    """
    require(bool(plan.bits), "figure", "plan", "have bits", plan.status)
    plain = all_plain(plan.chosen.values())
    rows: list[Spec] = []
    start = 0
    for layer in plan.layers:
        bits = plan.bits[layer.name]
        row = {
            "layer": layer.name,
            "bits": bits,
            "from": start,
            "to": start + layer.numel,
            "middle": start + layer.numel / 2,
            "weights": f"{layer.numel:,}",
            "shape": " × ".join(map(str, layer.shape)),
            "bytes": f"{plan.layer_bytes[layer.name]:,}",
            "alone": "",
        }
        if not plain:
            row["scheme"] = plan.schemes[layer.name]
        if sens is not None and sens.candidates.has(layer.name, plan.schemes[layer.name]):
            v = sens.index(layer.name, plan.schemes[layer.name])
            row["alone"] = with_error(sens.delta_loss[v], sens.stderr[v, v])
        rows.append(row)
        start += layer.numel
    widths = sorted(set(plan.bits.values()))
    tooltip = [
        {"field": "layer", "title": "layer"},
        {"field": "bits", "title": "bits"},
        {"field": "shape", "title": "shape"},
        {"field": "weights", "title": "weights"},
        {"field": "bytes", "title": "bytes"},
    ]
    if not plain:
        tooltip.insert(2, {"field": "scheme", "title": "scheme"})
    if any(row["alone"] for row in rows):
        tooltip.append({"field": "alone", "title": "loss increase alone"})
    blocks = {
        "mark": {"type": "rect", "stroke": "$card", "strokeWidth": 1 if len(rows) <= 200 else 0.2},
        "encoding": {
            "x": {
                "field": "from",
                "type": "quantitative",
                "scale": {"domain": [0, start], "nice": False},
                "axis": {
                    "title": "weights, in the order the network runs them",
                    "labelExpr": "datum.value == 0 ? '0' : datum.label",
                    "format": "~s",
                    "grid": False,
                    "tickCount": 8,
                },
            },
            "x2": {"field": "to"},
            "y": {
                "field": "bits",
                "type": "quantitative",
                "scale": {"domain": [0, max(widths)]},
                "axis": {"title": "bits per weight", "values": [0, *widths], "format": "d"},
            },
            "y2": {"datum": 0},
            "color": colour_of_bits(widths),
            "tooltip": tooltip,
        },
    }
    average = {
        "mark": {"type": "rule", "strokeDash": [5, 4], "color": "$ink", "strokeWidth": 1.2},
        "encoding": {"y": {"datum": plan.avg_bits}},
    }
    return {"width": "container", "height": 220, "data": {"values": rows}, "layer": [blocks, average]}


def colour_of_bits(widths: Sequence[int]) -> Spec:
    """The colour channel of bit-widths; a width has the same colour everywhere."""
    return {
        "field": "bits",
        "type": "ordinal",
        "scale": {"domain": list(widths), "range": [f"$bits{bits}" for bits in widths]},
        "legend": {"title": None, "orient": "top", "symbolType": "square", "labelExpr": "datum.label + ' bits'"},
    }


def frontier_figure(
    plans: Sequence[Plan], chosen: Plan | None = None, measured: Sequence[dict[str, Any]] = (), unit: str = "nats"
) -> Spec:
    """Predicted loss increase against the budget that varies; what is not yet proven as a bar below each point.

    Args:
        plans: an answer of :func:`clado.pareto`; infeasible points are left out.
        chosen: a plan to mark, with its own budget.
        measured: records of :func:`clado.report.measure`, drawn where they belong to a plan of the frontier.

    Raises:
        CladoError: no plan with bits.
    """
    known = [plan for plan in plans if plan.bits]
    require(len(known) > 0, "figure", "plans", "hold at least one plan with bits", "none")
    limits = {name: {plan.usage[name]["limit"] for plan in known} for name in known[0].usage}
    axis = max(limits, key=lambda name: len(limits[name]))
    rows: list[Spec] = [
        {
            "budget": plan.usage[axis]["limit"],
            "loss": plan.objective,
            "bound": max(min(plan.bound, plan.objective), -1e300),
            "status": "proven optimal" if plan.status == "optimal" else "not yet proven",
            "bytes": f"{plan.size_bytes:,}",
            "gap": f"{max(0.0, plan.gap):.2g}",
        }
        for plan in known
    ]
    by_schemes = {tuple(record["schemes"]): record for record in measured}
    checks: list[Spec] = []
    for plan, row in zip(known, rows, strict=True):
        record = by_schemes.get(tuple(plan.schemes.values()))
        if record is not None:
            checks.append(error_bar(record) | {"budget": row["budget"], "status": "measured on held-out samples"})
    logarithmic = min(row["loss"] for row in rows) > 0 and all(row["increase"] > 0 for row in checks)
    losses = [row["loss"] for row in rows]
    # A bound far below is drawn to the edge of the picture; the tooltip has the number.
    floor = min(losses) / 3 if logarithmic else min(losses) - 0.25 * (max(losses) - min(losses))
    rows = [row | {"bound": max(row["bound"], floor)} for row in rows]
    checks = [row | {"low": max(row["low"], floor)} for row in checks]
    x: Spec = {
        "field": "budget",
        "type": "quantitative",
        "scale": {"zero": False, "padding": 12, "nice": False},
        "axis": {"title": AXES.get(axis, axis), "grid": False},
    }
    y: Spec = {
        "field": "loss",
        "type": "quantitative",
        "scale": {"type": "log"} if logarithmic else {"zero": False},
        "axis": {"title": in_unit("loss increase", unit), "format": "~g"},
    }
    if logarithmic:
        spread = [row[key] for row in rows + checks for key in ("loss", "bound", "low", "high") if key in row]
        y["scale"] |= {"domain": [min(spread) * 0.8, max(spread) * 1.3], "nice": False}
        y["axis"] |= {"values": decades(spread)}
    kinds = ["proven optimal", "not yet proven", "measured on held-out samples"]
    present = [kind for kind in kinds if any(row["status"] == kind for row in rows + checks)]
    style = {"proven optimal": "$accent", "not yet proven": "$warm", "measured on held-out samples": "$ink"}
    colour = {
        "field": "status",
        "type": "nominal",
        "scale": {"domain": present, "range": [style[kind] for kind in present]},
        "legend": {"title": None, "orient": "top"},
    }
    marks = {"proven optimal": "circle", "not yet proven": "square", "measured on held-out samples": "diamond"}
    shape = {
        "field": "status",
        "type": "nominal",
        "scale": {"domain": present, "range": [marks[kind] for kind in present]},
    }
    tooltip = [
        {"field": "budget", "title": AXES.get(axis, axis)},
        {"field": "loss", "title": in_unit("predicted", unit), "format": ".4~g"},
        {"field": "gap", "title": in_unit("gap", unit)},
        {"field": "bytes"},
        {"field": "status"},
    ]
    layers: list[Spec] = [
        {
            "mark": {"type": "line", "color": "$accent", "strokeWidth": 1.5, "opacity": 0.7},
            "encoding": {"x": x, "y": y},
        },
        {
            "mark": {"type": "point", "size": 70},
            "encoding": {"x": x, "y": y, "color": colour, "shape": shape, "tooltip": tooltip},
        },
    ]
    if any(row["status"] == "not yet proven" for row in rows):
        layers.insert(
            1,
            {
                "transform": [{"filter": "datum.status == 'not yet proven'"}],
                "mark": {"type": "rule", "strokeWidth": 5, "opacity": 0.35, "color": "$warm"},
                "encoding": {"x": x, "y": {**y, "field": "bound"}, "y2": {"field": "loss"}},
            },
        )
    if checks:
        layers += [
            {
                "data": {"values": checks},
                "mark": {"type": "rule", "color": "$ink", "opacity": 0.5},
                "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}},
            },
            {
                "data": {"values": checks},
                "mark": {"type": "point", "size": 48},
                "encoding": {
                    "x": x,
                    "y": {**y, "field": "increase"},
                    "color": colour,
                    "shape": shape,
                    "tooltip": [
                        {"field": "budget", "title": AXES.get(axis, axis)},
                        {"field": "text", "title": in_unit("measured", unit)},
                    ],
                },
            },
        ]
    if chosen is not None and chosen.bits:
        place = budget_on(chosen, axis)
        if place is not None:
            layers += [
                rule("x", place),
                note("your budget" if axis in chosen.usage else "your plan", x={"datum": place}, y={"value": 12}, dx=5),
            ]
    return {"width": "container", "height": 300, "data": {"values": rows}, "layer": layers}


def budget_on(plan: Plan, axis: str) -> float | None:
    """The plan's own limit on an axis, or what it uses there."""
    if axis in plan.usage:
        return plan.usage[axis]["limit"]
    sizes = {"avg_bits": plan.avg_bits, "size_bytes": float(plan.size_bytes), "size_mb": plan.size_bytes / 2**20}
    return sizes.get(axis)


def error_bar(record: dict[str, Any]) -> dict[str, Any]:
    """A measured plan with the ends of its bar of two standard errors."""
    error = record["stderr"] if record["stderr"] is not None else 0.0
    kept = {key: record[key] for key in ("name", "kind", "avg_bits", "predicted", "increase")}
    return kept | {
        "low": record["increase"] - 2 * error,
        "high": record["increase"] + 2 * error,
        "text": with_error(record["increase"], error),
    }


def agreement_figure(measured: Sequence[dict[str, Any]], unit: str = "nats") -> Spec:
    """Predicted against measured loss increase of plans that were really run.

    Args:
        measured: records of :func:`clado.report.measure`.
    """
    rows = [error_bar(record) for record in measured]
    values = [row[key] for row in rows for key in ("predicted", "increase")]
    logarithmic = min(values) > 0
    low, high = (min(values) * 0.7, max(values) * 1.4) if logarithmic else (min(0.0, *values), max(values) * 1.05)
    for row in rows:
        row["low"], row["high"] = max(row["low"], low), min(row["high"], high)
    scale: Spec = {"domain": [low, high], "nice": False, **({"type": "log"} if logarithmic else {})}
    ticks: Spec = {"values": decades((low, high))} if logarithmic else {"tickCount": 5}
    x: Spec = {
        "field": "predicted",
        "type": "quantitative",
        "scale": scale,
        "axis": {"title": in_unit("predicted", unit), "format": "~g", **ticks},
    }
    y: Spec = {
        "field": "increase",
        "type": "quantitative",
        "scale": scale,
        "axis": {"title": in_unit("measured", unit), "format": "~g", **ticks},
    }
    kinds = {"random": "$quiet", "uniform": "$bits4", "frontier": "$accent", "chosen": "$warm"}
    shapes = {"random": "circle", "uniform": "square", "frontier": "circle", "chosen": "diamond"}
    present = [kind for kind in kinds if any(row["kind"] == kind for row in rows)]
    return {
        "width": "container",
        "height": 300,
        "data": {"values": rows},
        "layer": [
            {
                "data": {"values": [{"predicted": low, "increase": low}, {"predicted": high, "increase": high}]},
                "mark": {"type": "line", "color": "$line", "strokeWidth": 2},
                "encoding": {"x": x, "y": y},
            },
            {
                "mark": {"type": "rule", "color": "$muted", "opacity": 0.45},
                "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "stroke": "$card", "strokeWidth": 0.8, "opacity": 1},
                "encoding": {
                    "x": x,
                    "y": y,
                    "color": {
                        "field": "kind",
                        "type": "nominal",
                        "scale": {"domain": present, "range": [kinds[kind] for kind in present]},
                        "legend": {"title": None, "orient": "top"},
                    },
                    "shape": {
                        "field": "kind",
                        "type": "nominal",
                        "scale": {"domain": present, "range": [shapes[kind] for kind in present]},
                    },
                    "size": {"condition": {"test": "datum.kind == 'chosen'", "value": 170}, "value": 62},
                    "tooltip": [
                        {"field": "name", "title": "plan"},
                        {"field": "avg_bits", "title": "bits on average", "format": ".3~f"},
                        {"field": "predicted", "title": in_unit("predicted", unit), "format": ".3~g"},
                        {"field": "text", "title": in_unit("measured", unit)},
                    ],
                },
            },
        ],
    }
