"""Figures of the sensitivity matrix: interactions, eigenvalues, sampling errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..artifacts import Plan, Sensitivity
from ..quant import Scheme, all_plain, scheme_names
from .style import Spec, decades, few_digits, in_unit, note, rounded, rule

STEPS = 5  # shades of either sign in the interaction map, each √10 times the one before
LARGEST_MAP = 160  # layers; beyond, the map shows those that carry the most


def interaction_figure(sens: Sensitivity, plan: Plan | None = None) -> Spec:
    """The sensitivity matrix by pairs of layers: the later layer down, the earlier across, a layer alone on the diagonal.

    With the plan's bits the cells add up to the predicted loss increase. Cells within two standard errors are faint,
    those of a scheme that one of the layers does not have are empty.
    """
    shown = heaviest_layers(sens, LARGEST_MAP)
    names = [sens.layers[k].name for k in shown]
    distinct = sens.candidates.distinct
    width = len(distinct)
    taken = None if plan is None or not plan.bits else [distinct.index(plan.chosen[n]) for n in names]
    choices = ([-1] if taken is not None else []) + list(range(width))
    labels = ["the plan's bits"] if taken is not None else []
    labels += scheme_names(distinct, " bits").values()
    params = [
        {
            "name": name,
            "value": choices[0],
            "bind": {"input": "select", "options": choices, "labels": labels, "name": f"{name} layer at "},
        }
        for name in ("earlier", "later")
    ]
    transform: list[Spec] = [
        {"calculate": "earlier < 0 ? datum.m : earlier", "as": "mm"},
        {"calculate": "later < 0 ? datum.n : later", "as": "nn"},
        {"calculate": f"datum.w[datum.mm * {width} + datum.nn]", "as": "value"},
        {"calculate": f"datum.s[datum.mm * {width} + datum.nn]", "as": "error"},
        {"filter": "isValid(datum.value)"},
        {"calculate": "isValid(datum.error) && abs(datum.value) < 2 * datum.error", "as": "faint"},
        {"calculate": f"datum.a + ' at ' + {name_of(distinct, 'datum.mm')}", "as": "first"},
        {
            "calculate": f"datum.a == datum.b ? 'alone' : datum.b + ' at ' + {name_of(distinct, 'datum.nn')}",
            "as": "second",
        },
        {
            "calculate": "format(datum.value, abs(datum.value) < 0.001 ? '.2e' : '.3~g')"
            " + (isValid(datum.error) ? ' ± ' + format(datum.error, datum.error < 0.001 ? '.1e' : '.2~g') : '')"
            f" + ' {sens.provenance.unit}'",
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
        "data": {"values": cells(sens, shown, taken)},
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
                    "title": [
                        in_unit("what the pair adds to the loss", sens.provenance.unit),
                        "(on the diagonal: the layer alone)",
                    ],
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


def cells(sens: Sensitivity, shown: Sequence[int], taken: Sequence[int] | None) -> list[Spec]:
    """The map's cells: names, values and errors by the earlier layer's scheme, then the later's; and the plan's two."""
    names, width = [sens.layers[k].name for k in shown], len(sens.candidates.distinct)
    loss, loss_error, pairs, pair_error = at_every_scheme(sens, shown)
    out: list[Spec] = []
    for row in range(len(shown)):
        for column in range(row + 1):
            a, b = slice(column * width, (column + 1) * width), slice(row * width, (row + 1) * width)
            if column == row:
                value, error = (np.repeat(alone[a, None], width, axis=1) for alone in (loss, loss_error))
            else:
                value, error = pairs[a, b], pair_error[a, b]
            cell: Spec = {"a": names[column], "b": names[row], "w": rounded(value), "s": rounded(error)}
            out.append(cell if taken is None else cell | {"m": taken[column], "n": taken[row]})
    return out


def at_every_scheme(sens: Sensitivity, shown: Sequence[int]) -> tuple[NDArray[np.float64], ...]:
    """Loss increases and their errors ``[S·D]``, interactions and theirs ``[S·D, S·D]``, of S layers at the D schemes that
    occur; NaN where a layer does not have a scheme."""
    distinct, candidates = sens.candidates.distinct, sens.candidates
    picked = np.flatnonzero(np.isin(candidates.layer_of, shown))
    kind = np.array([distinct.index(candidates.flat[v]) for v in picked])
    place = np.searchsorted(shown, candidates.layer_of[picked]) * len(distinct) + kind
    size = len(shown) * len(distinct)
    loss, loss_error = np.full((2, size), np.nan)
    loss[place], loss_error[place] = sens.delta_loss[picked], np.diag(sens.stderr)[picked]
    pairs, pair_error = np.full((2, size, size), np.nan)
    pairs[np.ix_(place, place)] = sens.interaction[np.ix_(picked, picked)]
    pair_error[np.ix_(place, place)] = sens.stderr[np.ix_(picked, picked)]
    return loss, loss_error, pairs, pair_error


def name_of(schemes: Sequence[Scheme], number: str) -> str:
    """Expression for what people read for the scheme of a number."""
    if all_plain(schemes):
        return f"{[scheme.bits for scheme in schemes]}[{number}] + ' bits'"
    return f"{[scheme.label for scheme in schemes]}[{number}]"


def heaviest_layers(sens: Sensitivity, count: int) -> list[int]:
    """At most ``count`` layers with the largest entries, in execution order."""
    entries = np.nan_to_num(np.abs(sens.matrix)).max(axis=1)
    size = np.maximum.reduceat(entries, sens.candidates.starts[:-1])
    return sorted(np.argsort(-size, kind="stable")[:count].tolist())


def steps(sens: Sensitivity) -> list[float]:
    """Thresholds of the diverging colours: ±t, ±√10·t, …, the largest near the top percent of the entries."""
    outside = ~sens.candidates.same_layer
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
        rows += [{"rank": k + 1, "size": few_digits(x), "sign": name} for k, x in enumerate(part)]
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
                        "title": in_unit("|eigenvalue|", sens.provenance.unit),
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
        {"samples": n, "error": few_digits(error * math.sqrt(count / n)), "part": part, "beyond": n > count}
        for part, error in errors.items()
        for n in grid
    ]
    points = [{"samples": count, "error": few_digits(error), "part": part} for part, error in errors.items()]
    colours = {"one layer": "$accent"} | {f"pairs at {bits} bits": f"$bits{bits}" for bits in sens.bits}
    colour = {
        "field": "part",
        "type": "nominal",
        "sort": None,
        "scale": {
            "domain": list(errors),
            "range": [colours[part] for part in errors],
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
    widths = sens.candidates.weight_bits
    outside = ~sens.candidates.same_layer
    parts = {"one layer": (sens.delta_loss, np.diag(sens.stderr))}
    for bits in sens.bits:
        pick = outside & (widths[:, None] == bits) & (widths[None, :] == bits)
        parts[f"pairs at {bits} bits"] = (sens.interaction[pick], sens.stderr[pick])
    out = {}
    for name, (values, errors) in parts.items():
        value, error = values[np.isfinite(values)], errors[np.isfinite(values)]
        noise = float((error**2).sum())
        signal = float((value**2).sum()) - noise
        if math.isfinite(noise) and noise > 0 and signal > 0:
            out[name] = math.sqrt(noise / signal)
    return out
