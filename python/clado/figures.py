"""Figures as Vega-Lite specifications: one definition serves the report, single files and ``clado pareto --plot``.

A colour in a specification is a name of :data:`PALETTES` behind a dollar sign; :func:`painted` puts hexadecimal values or CSS
variables in its place, so that one drawing follows the page from light to dark and onto paper.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import CladoError, require
from .files import atomic_file
from .plan import Plan
from .sensitivity import Sensitivity, same_layer

Spec = dict[str, Any]

SUFFIXES = (".png", ".svg", ".pdf")
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif"
STEPS = 5  # shades of either sign in the interaction map, each √10 times the one before
LARGEST_MAP = 160  # layers; beyond, the map shows those that carry the most
PALETTES: dict[str, dict[str, str]] = {
    "light": {
        "paper": "#f7f7f5",
        "card": "#ffffff",
        "ink": "#1c2127",
        "muted": "#5f6b76",
        "line": "#e2e5e8",
        "accent": "#0a62c9",
        "warm": "#c8432b",
        "quiet": "#9aa5af",
        "bits2": "#f2b03d",
        "bits3": "#e8863c",
        "bits4": "#3aa58f",
        "bits5": "#2c8eb4",
        "bits6": "#3873c2",
        "bits7": "#5059b8",
        "bits8": "#5c3f9e",
        "zero": "#eef0f2",
        "up1": "#fcdccd",
        "up2": "#f7b497",
        "up3": "#ea7f5f",
        "up4": "#cf4631",
        "up5": "#981b1d",
        "down1": "#d5e6f5",
        "down2": "#a3c9e8",
        "down3": "#65a3d7",
        "down4": "#2d75ba",
        "down5": "#134684",
    },
    "dark": {
        "paper": "#0e1114",
        "card": "#161a1f",
        "ink": "#e7eaed",
        "muted": "#9ba6b1",
        "line": "#2a3138",
        "accent": "#62abff",
        "warm": "#ff7e62",
        "quiet": "#69747f",
        "bits2": "#f5bd57",
        "bits3": "#ee9450",
        "bits4": "#47b79f",
        "bits5": "#3fa3ca",
        "bits6": "#568fe0",
        "bits7": "#7a80de",
        "bits8": "#9a7be0",
        "zero": "#21272d",
        "up1": "#45281f",
        "up2": "#7a3827",
        "up3": "#b54d33",
        "up4": "#e56c4b",
        "up5": "#ffa489",
        "down1": "#1c3044",
        "down2": "#214d75",
        "down3": "#2d6faf",
        "down4": "#4f9ce2",
        "down5": "#96cdff",
    },
}


def check_path(path: str | os.PathLike[str]) -> Path:
    """Raise unless a figure can be written there by its suffix."""
    target = Path(path)
    require(target.suffix.lower() in SUFFIXES, "figure", "path", f"end in {', '.join(SUFFIXES)}", target)
    return target


def save_figure(figure: Spec, path: str | os.PathLike[str], palette: str = "light") -> Path:
    """Write a figure, its format by suffix, whole or not at all; needs no browser and no network.

    Raises:
        CladoError: another suffix, or no vl-convert.
    """
    target = check_path(path)
    colours = PALETTES[palette]
    spec = painted(themed({**figure, "background": "$card", "padding": 12}), lambda name: colours[name])
    if spec.get("width") == "container":
        spec["width"] = 640
    for parameter in spec.get("params", ()):
        parameter.pop("bind", None)
    converter = renderer()
    with atomic_file(target) as temporary:
        suffix = target.suffix.lower()
        if suffix == ".svg":
            temporary.write_text(converter.vegalite_to_svg(spec), encoding="utf-8")
        elif suffix == ".png":
            temporary.write_bytes(converter.vegalite_to_png(spec, scale=2))
        else:
            temporary.write_bytes(converter.vegalite_to_pdf(spec))
    return target


def renderer() -> Any:
    """The vl-convert module: Vega, Vega-Lite and their static renderer, without a browser."""
    try:
        import vl_convert
    except ImportError:
        raise CladoError("figure: vl-convert must be installed, got no such module (pip install clado[plot])") from None
    return vl_convert


def painted(spec: Any, colour: Callable[[str], str]) -> Any:
    """A copy of a specification with ``$name`` replaced by ``colour(name)``."""
    if isinstance(spec, dict):
        return {key: painted(value, colour) for key, value in spec.items()}
    if isinstance(spec, (list, tuple)):
        return [painted(value, colour) for value in spec]
    return colour(spec[1:]) if isinstance(spec, str) and spec[1:] in PALETTES["light"] and spec[0] == "$" else spec


def themed(spec: Spec) -> Spec:
    """A specification with the look all figures share."""
    text = {"labelColor": "$muted", "titleColor": "$muted", "labelFontSize": 11, "titleFontSize": 11.5}
    axis = {
        "gridColor": "$line",
        "domainColor": "$line",
        "tickColor": "$line",
        "titleFontWeight": 500,
        "labelPadding": 5,
    }
    config = {
        "font": FONT,
        "view": {"stroke": None},
        "axis": {**text, **axis, "titlePadding": 9},
        "legend": {**text, "titleFontWeight": 500, "symbolSize": 90, "symbolOpacity": 1, "labelLimit": 260},
        "header": text,
        "text": {"color": "$muted", "fontSize": 11},
        "point": {"filled": True, "size": 62},
    }
    return {"background": None, "padding": 2, **spec, "config": config}


# --- what the plan looks like ----------------------------------------------------------------------------------------


def bits_figure(plan: Plan, sens: Sensitivity | None = None) -> Spec:
    """Every layer as a block: its weights wide, its bits high, so that the area is its size.

    Raises:
        CladoError: a plan without bits.
    """
    require(bool(plan.bits), "figure", "plan", "have bits", plan.status)
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
        if sens is not None and bits in sens.bits:
            v = sens.index(layer.name, bits)
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


# --- what was measured -----------------------------------------------------------------------------------------------


def interaction_figure(sens: Sensitivity, plan: Plan | None = None) -> Spec:
    """The sensitivity matrix by pairs of layers: the later layer down, the earlier across, a layer alone on the diagonal.

    With the plan's bits the cells add up to the predicted loss increase. Cells within two standard errors are faint.
    """
    shown = heaviest_layers(sens, LARGEST_MAP)
    names = [sens.layers[k].name for k in shown]
    width = len(sens.bits)
    plan_bits = None if plan is None or not plan.bits else [sens.bits.index(plan.bits[name]) for name in names]
    rows: list[Spec] = []
    for row, later in enumerate(shown):
        for column, earlier in enumerate(shown[: row + 1]):
            a, b = slice(earlier * width, (earlier + 1) * width), slice(later * width, (later + 1) * width)
            if earlier == later:
                value = np.repeat(sens.delta_loss[a][:, None], width, axis=1)
                error = np.repeat(np.diag(sens.stderr)[a][:, None], width, axis=1)
            else:
                value, error = sens.interaction[a, b], sens.stderr[a, b]
            cell: Spec = {"a": names[column], "b": names[row], "w": rounded(value), "s": rounded(error)}
            if plan_bits is not None:
                cell |= {"m": plan_bits[column], "n": plan_bits[row]}
            rows.append(cell)
    choices = ([-1] if plan_bits is not None else []) + list(range(width))
    labels = (["the plan's bits"] if plan_bits is not None else []) + [f"{bits} bits" for bits in sens.bits]
    params = [
        {
            "name": name,
            "value": choices[0],
            "bind": {"input": "select", "options": choices, "labels": labels, "name": f"{name} layer at "},
        }
        for name in ("earlier", "later")
    ]
    bits = list(sens.bits)
    transform: list[Spec] = [
        {"calculate": "earlier < 0 ? datum.m : earlier", "as": "mm"},
        {"calculate": "later < 0 ? datum.n : later", "as": "nn"},
        {"calculate": f"datum.w[datum.mm * {width} + datum.nn]", "as": "value"},
        {"calculate": f"datum.s[datum.mm * {width} + datum.nn]", "as": "error"},
        {"filter": "isValid(datum.value)"},
        {"calculate": "isValid(datum.error) && abs(datum.value) < 2 * datum.error", "as": "faint"},
        {"calculate": f"datum.a + ' at ' + {bits}[datum.mm] + ' bits'", "as": "first"},
        {
            "calculate": f"datum.a == datum.b ? 'alone' : datum.b + ' at ' + {bits}[datum.nn] + ' bits'",
            "as": "second",
        },
        {
            "calculate": "format(datum.value, abs(datum.value) < 0.001 ? '.2e' : '.3~g')"
            " + (isValid(datum.error) ? ' ± ' + format(datum.error, datum.error < 0.001 ? '.1e' : '.2~g') : '') + ' nats'",
            "as": "text",
        },
    ]
    side = min(20.0, max(3.0, 620 / len(shown)))
    label: Spec = {"labelLimit": 150, "labelFontSize": min(10.0, max(7.0, side)), "labelOverlap": True, "ticks": False}
    if side < 7:
        label["values"] = names[:: math.ceil(8 / side)]
    thresholds = steps(sens)
    above = " + ".join(f"(datum.value > {t!r})" for t in thresholds)
    transform.append({"calculate": above, "as": "step"})
    colours = [f"$down{k}" for k in range(STEPS, 0, -1)] + ["$zero"] + [f"$up{k}" for k in range(1, STEPS + 1)]
    return {
        "width": side * len(shown),
        "height": side * len(shown),
        "data": {"values": rows},
        "params": params,
        "transform": transform,
        "mark": {"type": "rect", "stroke": "$card", "strokeWidth": 1 if side > 8 else 0.3},
        "encoding": {
            "x": {
                "field": "a",
                "type": "nominal",
                "sort": None,
                "axis": {**label, "title": "earlier layer", "domain": False},
            },
            "y": {
                "field": "b",
                "type": "nominal",
                "sort": None,
                "axis": {**label, "title": "later layer", "domain": False},
            },
            "color": {
                "field": "step",
                "type": "ordinal",
                "scale": {"domain": list(range(len(colours))), "range": colours},
                "legend": {
                    "title": ["what the pair adds to the loss, nats", "(on the diagonal: the layer alone)"],
                    "values": list(range(len(colours)))[::-1],
                    "labelExpr": f"{step_labels(thresholds)}[datum.value]",
                    "symbolType": "square",
                    "symbolSize": 210,
                    "symbolStrokeWidth": 0,
                    "orient": "none",
                    "legendX": side * len(shown) - 190 if side * len(shown) > 480 else side * len(shown) + 20,
                    "legendY": 0,
                    "titleLimit": 400,
                    "titlePadding": 8,
                    "rowPadding": 0,
                },
            },
            "opacity": {"condition": {"test": "datum.faint", "value": 0.28}, "value": 1},
            "tooltip": [
                {"field": "first", "title": "layer"},
                {"field": "second", "title": "with"},
                {"field": "text", "title": "adds"},
            ],
        },
    }


def heaviest_layers(sens: Sensitivity, count: int) -> list[int]:
    """At most ``count`` layers with the largest entries, in execution order."""
    size = np.nan_to_num(np.abs(sens.matrix)).reshape(len(sens.layers), len(sens.bits), -1).max(axis=(1, 2))
    return sorted(np.argsort(-size, kind="stable")[:count].tolist())


def steps(sens: Sensitivity) -> list[float]:
    """Thresholds of the diverging colours: ±t, ±√10·t, …, the largest near the top percent of the entries."""
    outside = ~same_layer(len(sens.layers), len(sens.bits))
    entries = np.abs(np.concatenate([sens.interaction[outside], sens.delta_loss]))
    entries = entries[np.isfinite(entries) & (entries > 0)]
    top = float(np.quantile(entries, 0.99)) if len(entries) else 1.0
    exponent = math.floor(2 * math.log10(top)) / 2
    up = [float(f"{10 ** (exponent - k / 2):.0e}") for k in range(STEPS)]
    return [-t for t in up] + up[::-1]


def step_labels(thresholds: Sequence[float]) -> list[str]:
    """What each colour stands for, from the most negative up."""
    names = [
        f"{t:.0e}".replace("e-0", "e-").replace("e+0", "e+").replace("-", "−", 1 if t < 0 else 0) for t in thresholds
    ]
    inner = [f"{a} … {b}" for a, b in pairwise(names)]
    inner[STEPS - 1] = f"within ±{names[STEPS]}"
    return [f"below {names[0]}", *inner, f"above {names[-1]}"]


def eigenvalue_figure(sens: Sensitivity) -> Spec:
    """Eigenvalues of G by size, and how far noise of the matrix' own standard errors reaches by itself."""
    values = np.linalg.eigvalsh(sens.matrix[np.ix_(sens.measured, sens.measured)])
    rows: list[Spec] = []
    for sign, name in ((1, "positive"), (-1, "negative")):
        part = np.sort(sign * values[sign * values > 0])[::-1]
        rows += [{"rank": k + 1, "size": figure(x), "sign": name} for k, x in enumerate(part)]
    layers: list[Spec] = [
        {
            "mark": {"type": "point", "filled": True, "size": 26, "opacity": 0.9},
            "encoding": {
                "x": {"field": "rank", "type": "quantitative", "axis": {"title": "rank", "grid": False}},
                "y": {
                    "field": "size",
                    "type": "quantitative",
                    "scale": {"type": "log"},
                    "axis": {
                        "title": "|eigenvalue|, nats",
                        "format": "~e",
                        "values": decades(row["size"] for row in rows),
                    },
                },
                "color": {
                    "field": "sign",
                    "type": "nominal",
                    "scale": {"domain": ["positive", "negative"], "range": ["$accent", "$warm"]},
                    "legend": {"title": None, "orient": "top"},
                },
                "tooltip": [
                    {"field": "rank"},
                    {"field": "size", "title": "|eigenvalue|", "format": ".3~g"},
                    {"field": "sign"},
                ],
            },
        }
    ]
    noise = noise_edge(sens)
    if noise is not None and noise > 0:
        layers.append(rule("y", noise))
        layers.append(note(f"noise alone reaches {noise:.1e}", x={"value": "width"}, y={"datum": noise}, align="right"))
    return {"width": "container", "height": 260, "data": {"values": rows}, "layer": layers}


def noise_edge(sens: Sensitivity, draws: int = 4) -> float | None:
    """Mean largest |eigenvalue| of symmetric noise with the entries' standard errors, independent; None where unknown."""
    error = sens.stderr[np.ix_(sens.measured, sens.measured)]
    np.fill_diagonal(error, 2 * np.diag(error))
    if not np.isfinite(error).all():
        return None
    random = np.random.default_rng(0)
    edges = []
    for _ in range(draws):
        upper = np.triu(random.standard_normal(error.shape))
        noise = (upper + np.triu(upper, 1).T) * error
        edges.append(float(np.abs(np.linalg.eigvalsh(noise)).max()))
    return float(np.mean(edges))


def sampling_figure(sens: Sensitivity) -> Spec | None:
    """Relative error of the matrix against the number of samples; None where standard errors are unknown."""
    errors = relative_errors(sens)
    if not errors or sens.num_samples < 2:
        return None
    count = sens.num_samples
    grid = [count * 2.0**k for k in range(-5, 6)]
    rows: list[Spec] = [
        {"samples": n, "error": figure(error * math.sqrt(count / n)), "part": part, "beyond": n > count}
        for part, error in errors.items()
        for n in grid
    ]
    points = [{"samples": count, "error": figure(error), "part": part} for part, error in errors.items()]
    colours = ["$accent", "$bits2", "$bits3", "$bits4", "$bits5", "$bits6", "$bits7", "$bits8"]
    colour = {
        "field": "part",
        "type": "nominal",
        "sort": None,
        "scale": {
            "domain": list(errors),
            "range": [colours[0], *(f"$bits{bits}" for bits in sens.bits)][: len(errors)],
        },
        "legend": {"title": None, "orient": "top", "columns": 3},
    }
    x: Spec = {
        "field": "samples",
        "type": "quantitative",
        "scale": {"type": "log", "base": 2, "nice": False},
        "axis": {"title": "samples", "grid": False, "values": grid[1:-1:2], "format": ",d"},
    }
    y: Spec = {
        "field": "error",
        "type": "quantitative",
        "scale": {"type": "log", "nice": False},
        "axis": {"title": "relative error (rms)", "format": "~%", "values": decades(row["error"] for row in rows)},
    }
    tooltip = [{"field": "part"}, {"field": "samples", "format": ",d"}, {"field": "error", "format": ".2~p"}]
    layers: list[Spec] = [
        {
            "transform": [{"filter": f"datum.samples <= {count}"}],
            "mark": {"type": "line", "strokeWidth": 2},
            "encoding": {"x": x, "y": y, "color": colour},
        },
        {
            "transform": [{"filter": f"datum.samples >= {count}"}],
            "mark": {"type": "line", "strokeWidth": 2, "strokeDash": [4, 4]},
            "encoding": {"x": x, "y": y, "color": colour},
        },
        {
            "data": {"values": points},
            "mark": {"type": "point", "size": 70},
            "encoding": {"x": x, "y": y, "color": colour, "tooltip": tooltip},
        },
        rule("x", count),
    ]
    return {"width": "container", "height": 260, "data": {"values": rows}, "layer": layers}


def relative_errors(sens: Sensitivity) -> dict[str, float]:
    """Root-mean-square standard error over root-mean-square value, noise taken off the latter: the single loss increases,
    then the interactions of layers that share a bit-width; parts that drown in noise or are unknown are left out."""
    width = len(sens.bits)
    kind = np.tile(np.arange(width), len(sens.layers))
    outside = ~same_layer(len(sens.layers), width)
    parts = {"one layer": (sens.delta_loss, np.diag(sens.stderr))}
    for m, bits in enumerate(sens.bits):
        pick = outside & (kind[:, None] == m) & (kind[None, :] == m)
        parts[f"pairs at {bits} bits"] = (sens.interaction[pick], sens.stderr[pick])
    out = {}
    for name, (values, errors) in parts.items():
        value, error = values[np.isfinite(values)], errors[np.isfinite(values)]
        noise = float((error**2).sum())
        signal = float((value**2).sum()) - noise
        if math.isfinite(noise) and noise > 0 and signal > 0:
            out[name] = math.sqrt(noise / signal)
    return out


# --- what follows from it --------------------------------------------------------------------------------------------


def frontier_figure(plans: Sequence[Plan], chosen: Plan | None = None, measured: Sequence[dict[str, Any]] = ()) -> Spec:
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
    by_bits = {tuple(record["bits"]): record for record in measured}
    checks: list[Spec] = []
    for plan, row in zip(known, rows, strict=True):
        record = by_bits.get(tuple(plan.bits.values()))
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
        "axis": {"title": "loss increase, nats", "format": "~g"},
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
        {"field": "loss", "title": "predicted, nats", "format": ".4~g"},
        {"field": "gap", "title": "gap, nats"},
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
                        {"field": "text", "title": "measured, nats"},
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


AXES = {
    "avg_bits": "budget: bits per weight on average",
    "size_bytes": "budget: bytes",
    "size_mb": "budget: MiB",
    "bitops": "budget: BitOps",
    "latency_ms": "budget: milliseconds",
}


def budget_on(plan: Plan, axis: str) -> float | None:
    """The plan's own limit on an axis, or what it uses there."""
    if axis in plan.usage:
        return plan.usage[axis]["limit"]
    sizes = {"avg_bits": plan.avg_bits, "size_bytes": float(plan.size_bytes), "size_mb": plan.size_bytes / 2**20}
    return sizes.get(axis)


def agreement_figure(measured: Sequence[dict[str, Any]]) -> Spec:
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
        "axis": {"title": "predicted, nats", "format": "~g", **ticks},
    }
    y: Spec = {
        "field": "increase",
        "type": "quantitative",
        "scale": scale,
        "axis": {"title": "measured, nats", "format": "~g", **ticks},
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
                        {"field": "predicted", "title": "predicted, nats", "format": ".3~g"},
                        {"field": "text", "title": "measured, nats"},
                    ],
                },
            },
        ],
    }


# --- small parts -----------------------------------------------------------------------------------------------------


def error_bar(record: dict[str, Any]) -> dict[str, Any]:
    """A measured plan with the ends of its bar of two standard errors."""
    error = record["stderr"] if record["stderr"] is not None else 0.0
    kept = {key: record[key] for key in ("name", "kind", "avg_bits", "predicted", "increase")}
    return kept | {
        "low": record["increase"] - 2 * error,
        "high": record["increase"] + 2 * error,
        "text": with_error(record["increase"], error),
    }


def decades(values: Iterable[float]) -> list[float]:
    """Ticks of a logarithmic axis: powers of ten, and where there are few of them 2 and 5 times these."""
    positive = [value for value in values if value > 0]
    if not positive:
        return []
    low, high = min(positive), max(positive)
    span = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    return [float(f"{a}e{k}") for k in span for a in fine if low <= float(f"{a}e{k}") <= high]


def rule(channel: str, value: float) -> Spec:
    return {
        "mark": {"type": "rule", "strokeDash": [5, 4], "color": "$ink", "opacity": 0.7, "strokeWidth": 1.2},
        "encoding": {channel: {"datum": value, "type": "quantitative"}},
    }


def note(text: str, x: Spec, y: Spec, align: str = "left", dx: int = 0) -> Spec:
    """Words beside a rule."""
    mark = {"type": "text", "align": align, "baseline": "bottom", "dx": dx, "dy": -3, "text": text}
    return {"data": {"values": [{}]}, "mark": mark, "encoding": {"x": x, "y": y}}


def figure(value: float, digits: int = 4) -> float:
    """A number with few digits, for a small file."""
    return float(f"{value:.{digits - 1}e}")


def rounded(values: NDArray[np.float64]) -> list[float | None]:
    """Flat list with three digits; None where unknown."""
    return [figure(value, 3) if math.isfinite(value) else None for value in values.ravel().tolist()]


def with_error(value: float, error: float) -> str:
    """Value and standard error, the latter left out where unknown."""
    if not math.isfinite(value):
        return "dropped"
    return f"{value:.3g}" + (f" ± {error:.2g}" if math.isfinite(error) and error > 0 else "")
