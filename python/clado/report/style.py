"""How figures look and are saved: palettes, the theme, rules and notes, numbers as text.

Figures are Vega-Lite specifications: one definition serves the report, single files and ``clado pareto --plot``. A colour in a
specification is a name of :data:`PALETTES` behind a dollar sign; :func:`painted` puts hexadecimal values or CSS variables in its
place, so that one drawing follows the page from light to dark and onto paper.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common import CladoError, atomic_file, require

Spec = dict[str, Any]
SUFFIXES = (".png", ".svg", ".pdf")
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif"
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
        "bits16": "#4b3b53",
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
        "bits16": "#b9a3c9",
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
    """A dashed line through a value of the "x" or the "y" axis."""
    return {
        "mark": {"type": "rule", "strokeDash": [5, 4], "color": "$ink", "opacity": 0.7, "strokeWidth": 1.2},
        "encoding": {channel: {"datum": value, "type": "quantitative"}},
    }


def note(text: str, x: Spec, y: Spec, align: str = "left", dx: int = 0) -> Spec:
    """Words beside a rule."""
    mark = {"type": "text", "align": align, "baseline": "bottom", "dx": dx, "dy": -3, "text": text}
    return {"data": {"values": [{}]}, "mark": mark, "encoding": {"x": x, "y": y}}


def few_digits(value: float, digits: int = 4) -> float:
    """A number with few digits, for a small file."""
    return float(f"{value:.{digits - 1}e}")


def rounded(values: NDArray[np.float64]) -> list[float | None]:
    """Flat list with three digits; None where unknown."""
    return [few_digits(value, 3) if math.isfinite(value) else None for value in values.ravel().tolist()]


def in_unit(words: str, unit: str) -> str:
    """A title, with the unit where there is one."""
    return f"{words}, {unit}" if unit else words


def with_error(value: float, error: float) -> str:
    """Value and standard error, the latter left out where unknown."""
    if not math.isfinite(value):
        return "dropped"
    return f"{value:.3g}" + (f" ± {error:.2g}" if math.isfinite(error) and error > 0 else "")
