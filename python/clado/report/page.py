"""The report as one HTML file that needs nothing else, and its figures as single files."""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..artifacts import Plan, Sensitivity, minimized_in_words
from ..common import atomic_file, require
from ..quant import scheme_names
from ..runs import versions
from ..solver import negative_mass
from .contents import Contents, gather
from .matrix_figures import LARGEST_MAP, eigenvalue_figure, interaction_figure, noise_edge, sampling_figure
from .measured import agreement
from .plan_figures import agreement_figure, bits_figure, frontier_figure
from .style import PALETTES, SUFFIXES, Spec, in_unit, painted, renderer, save_figure, themed, with_error

REPORT_FILE = "report.html"


def write_report(run: str | os.PathLike[str], path: str | os.PathLike[str] | None = None, **arguments: Any) -> Path:
    """Write ``report.html``: one file that opens offline, light and dark, and prints.

    Args:
        run: run directory; what the report has to make (the frontier, the plans it runs) is kept there.
        path: file to write; None: ``report.html`` in the run directory.
        **arguments: as :func:`clado.report.gather`: ``model`` and ``heldout`` where the run directory does not say how to
            build them, ``num_samples``, ``data``, ``forward_step``, ``loss_func``, ``device``, ``verbose``.

    Raises:
        CladoError: no matrix there, a plan of another run, or no vl-convert.
    """
    renderer()
    contents = gather(run, **arguments)
    target = Path(path) if path is not None else contents.folder / REPORT_FILE
    with atomic_file(target) as temporary:
        temporary.write_text(render(contents), encoding="utf-8")
    return target


def write_figures(
    run: str | os.PathLike[str], format: str = "svg", path: str | os.PathLike[str] | None = None, **arguments: Any
) -> list[Path]:
    """Write every figure of the report as a file of its own.

    Args:
        run: as :func:`write_report`.
        format: "svg", "png" or "pdf".
        path: folder to write to; None: ``figures`` in the run directory.
        **arguments: as :func:`write_report`.

    Raises:
        CladoError: another format, and as :func:`write_report`.
    """
    require(f".{format}" in SUFFIXES, "report", "format", "be one of html, png, svg, pdf", repr(format))
    renderer()
    contents = gather(run, **arguments)
    folder = Path(path) if path is not None else contents.folder / "figures"
    return [save_figure(spec, folder / f"{name}.{format}") for name, spec in specs(contents).items()]


def specs(contents: Contents) -> dict[str, Spec]:
    """The figures that can be drawn, by name."""
    sens, plan = contents.sens, contents.plan
    has_bits, unit = plan is not None and bool(plan.bits), sens.provenance.unit
    drawn = {
        "bits": bits_figure(plan, sens) if plan is not None and has_bits else None,
        "interactions": interaction_figure(sens, plan),
        "agreement": agreement_figure(contents.measured, unit) if contents.measured else None,
        "frontier": frontier_figure(contents.front, plan, contents.measured, unit) if contents.front else None,
        "eigenvalues": eigenvalue_figure(sens) if np.nan_to_num(sens.matrix).any() else None,
        "sampling": sampling_figure(sens),
    }
    return {name: spec for name, spec in drawn.items() if spec is not None}


def render(contents: Contents) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    def css(name: str) -> str:
        return f"var(--{name})"

    sens, plan = contents.sens, contents.plan
    drawn = {name: painted(themed(spec), css) for name, spec in specs(contents).items()}
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_part("page.html"))
    return template.render(
        title=contents.note.get("spec", {}).get("model") or contents.folder.resolve().name,
        sens=sens,
        plan=plan if plan is not None and plan.bits else None,
        contents=contents,
        drawn=set(drawn),
        tiles=tiles(contents),
        agreement=agreement([r for r in contents.measured if r["kind"] == "random"]),
        negative=negative_mass(sens.matrix[np.ix_(sens.measured, sens.measured)]),
        noise=noise_edge(sens),
        clear=clear_share(sens),
        many=len(sens.layers) > LARGEST_MAP,
        largest=LARGEST_MAP,
        byte_rows=byte_rows(plan),
        schemes=list(scheme_names(sens.candidates.flat, " bits").values()),
        layer_rows=layer_rows(sens, plan),
        commands=commands(contents),
        versions=contents.note.get("versions") or versions(),
        settings=settings(sens),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        style=_palette_css() + _part("page.css"),
        script=_part("page.js"),
        vega=_vega(),
        figures=json.dumps(drawn, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    )


def _proof(plan: Plan) -> str:
    """What is proven of a plan."""
    if "minimized" in plan.info:
        return minimized_in_words(plan)
    left = f"at most {plan.gap:.2g} above the optimum" if plan.status == "feasible" else "not solved for"
    return "proven optimal" if plan.status == "optimal" else left


def tiles(contents: Contents) -> list[dict[str, str]]:
    """The few numbers on top."""
    sens, plan = contents.sens, contents.plan
    out = [
        {
            **counted(sens),
            "detail": f"{sens.num_candidates} candidates, "
            + (f"{sens.num_samples:,} samples" if sens.num_samples else "scores from elsewhere"),
        }
    ]
    if plan is None or not plan.bits:
        return out
    whole = 4 * sum(layer.numel for layer in plan.layers)
    out.append(
        {
            "label": "size",
            "value": readable_bytes(plan.size_bytes),
            "detail": f"{whole / plan.size_bytes:.1f}× smaller than float32; {plan.avg_bits:.3g} bits per weight",
        }
    )
    predicted = plan.values.get("original", plan.objective)
    # What is proven is of the plan's own objective.
    own = "" if plan.objective_name == "original" else f", {plan.objective:.4f}"
    unit = sens.provenance.unit
    out.append(
        {
            "label": "predicted loss increase",
            "value": f"{predicted:.4f}",
            "detail": f"{in_unit('interactions included', unit)}; {_proof(plan)} for the {plan.objective_name} objective{own}",
        }
    )
    chosen = next((r for r in contents.measured if r["kind"] == "chosen"), None)
    if chosen is not None:
        error = f"± {chosen['stderr']:.4f}" if chosen["stderr"] is not None else ""
        detail = " ".join([error, *unit.split(), f"on {chosen['samples']:,} held-out samples"])
        out.append({"label": "measured loss increase", "value": f"{chosen['increase']:.4f}", "detail": detail})
    return out


def counted(sens: Sensitivity) -> dict[str, str]:
    """Layers, and how many candidates each has."""
    counts = sens.candidates.counts
    least, most = min(counts), max(counts)
    if len(set(sens.candidates.schemes)) == 1:
        return {"label": "layers × widths", "value": f"{len(counts)} × {most}"}
    return {"label": "layers × schemes", "value": f"{len(counts)} × {least}" + (f" … {most}" if most > least else "")}


def clear_share(sens: Sensitivity) -> float | None:
    """Share of the interactions beyond two standard errors; None where these are unknown."""
    outside = np.triu(~sens.candidates.same_layer)
    value, error = np.abs(sens.interaction[outside]), sens.stderr[outside]
    known = np.isfinite(error) & np.isfinite(value)
    return float((value[known] > 2 * error[known]).mean()) if known.any() else None


def byte_rows(plan: Plan | None) -> list[dict[str, Any]]:
    """Where the plan's bytes are, by width: codes without padding, then scales and padding."""
    if plan is None or not plan.bits:
        return []
    rows = []
    for bits in sorted(set(plan.bits.values())):
        layers = [layer for layer in plan.layers if plan.bits[layer.name] == bits]
        weights = sum(layer.numel for layer in layers)
        total = sum(plan.layer_bytes[layer.name] for layer in layers)
        codes = sum(-(-layer.numel * bits // 8) for layer in layers)
        rows.append(
            {
                "bits": bits,
                "layers": len(layers),
                "weights": weights,
                "codes": codes,
                "rest": total - codes,
                "total": total,
            }
        )
    return rows


def layer_rows(sens: Sensitivity, plan: Plan | None) -> list[dict[str, Any]]:
    """Every layer with its loss increases, one for each scheme that occurs, and what was chosen."""
    rows, distinct = [], sens.candidates.distinct
    chosen = plan.chosen if plan is not None else {}
    sizes = plan.layer_bytes if plan is not None and chosen else {}
    for layer, own in zip(sens.layers, sens.candidates.schemes, strict=True):
        entries = {scheme: sens.index(layer.name, scheme) for scheme in own}
        losses = {scheme: with_error(sens.delta_loss[v], sens.stderr[v, v]) for scheme, v in entries.items()}
        taken = chosen.get(layer.name)
        rows.append(
            {
                "name": layer.name,
                "kind": layer.kind,
                "shape": " × ".join(map(str, layer.shape)),
                "weights": f"{layer.numel:,}",
                "losses": [losses.get(scheme, "") for scheme in distinct],
                "chosen": distinct.index(taken) if taken is not None else None,
                "bits": taken.bits if taken is not None else "",
                "bytes": f"{sizes[layer.name]:,}" if sizes else "",
            }
        )
    return rows


def commands(contents: Contents) -> list[str]:
    """The commands that lead here, as far as the run knows them."""
    note, plan = contents.note, contents.plan
    known = [note.get("command"), plan.info.get("command") if plan is not None else None]
    return [*(command for command in known if command), f"clado report {contents.folder}"]


def _plain(sens: Sensitivity) -> str:
    """The name of a loss of plain logits; empty where more is to be said."""
    known = sens.provenance
    return "" if known.loss_options or known.loss is None else known.loss


def settings(sens: Sensitivity) -> dict[str, str]:
    """How the matrix was measured."""
    known, notes, group = sens.provenance, sens.notes, sens.quantizer.group_size
    scales = {-1: "one per output channel", 0: "one per tensor"}.get(group, f"one per {group} inputs")
    out = {
        "estimator": known.estimator or "from elsewhere",
        "exact pairs": f"{len(known.corrected_pairs):,}" if known.corrected_pairs else "",
        "loss": {"kl": "KL to the float model", "cross_entropy": "cross-entropy"}.get(_plain(sens), known.loss_words),
        "precision": known.precision or "",
        "rounding": "to the nearest code" if known.rounding is None else str(known.rounding),
        "corrected for the fit": f"losses times {notes['optimism']}" if "optimism" in notes else "",
        "scales": f"{scales}; {sens.quantizer.scale_steps} shrink steps",
        "work": f"{notes['forward_equivalents']:,.1f} forwards per sample" if "forward_equivalents" in notes else "",
        "time": f"{notes['seconds']:,.1f} s on {notes.get('device', '')}" if "seconds" in notes else "",
        "samples": "" if known.stability is None else str(known.stability),
        "left in float": sens.in_float,
        "warnings": "; ".join(notes.get("warnings", [])),
    }
    return {name: str(value) for name, value in out.items() if value}


def readable_bytes(size: float) -> str:
    """1,536 → "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _palette_css() -> str:
    """The palettes as CSS variables: light, dark by preference or choice, light on paper."""

    def variables(name: str) -> str:
        return "".join(f"--{key}:{value};" for key, value in PALETTES[name].items())

    light, dark = variables("light"), variables("dark")
    return (
        f":root{{color-scheme:light;{light}}}\n"
        f"@media(prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{dark}}}}}\n"
        f":root[data-theme=dark]{{color-scheme:dark;{dark}}}\n"
        f"@media print{{:root:root:root{{color-scheme:light;{light}--paper:#fff;}}}}\n"
    )


@cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, from the renderer itself: nothing is fetched."""
    bundle: str = renderer().javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", "<\\/script")
