"""Commands that deliver: export, recipe, evaluate, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..common import require
from .base import COUNT, main


@main.command()
@click.argument("run")
@click.option(
    "--format",
    "format_",
    default="safetensors",
    show_default=True,
    help="safetensors (clado's own, every width), compressed-tensors (Linear layers), onnx.",
)
@click.option("--out", help="Folder to write; RUN/out when left out.")
@click.option(
    "--odd-widths", help="compressed-tensors with 3, 5, 6, 7 bits: dense (readers ≥ 0.18.0), padded (≤ 0.17.1)."
)
@click.option(
    "--batch-size",
    type=COUNT,
    default=2,
    show_default=True,
    help="onnx: samples of the example, which the graph of a model that fixes their number keeps to.",
)
@click.option("--verify", is_flag=True, help="Then read it with a consumer of the format and compare.")
def export(run: str, format_: str, out: str | None, odd_widths: str | None, batch_size: int, verify: bool) -> None:
    """Write the integer weights of the plan in RUN.

    \b
    clado export run                                          # clado.load reads it
    clado export run --format compressed-tensors --verify     # vLLM, transformers
    clado export run --format onnx --out run/onnx --verify    # onnxruntime (pip install clado[onnx])
    """
    from .. import deploy
    from ..runs import example, functions, load_run

    model, spec, note = load_run(run)
    plan, target = _chosen(run), out or Path(run) / "out"
    options: dict[str, Any] = {"odd_widths": odd_widths}
    if format_ in deploy.FORMATS and "example" in deploy.FORMATS[format_].takes:
        options["example"] = example(model, spec, note, batch_size)
        options["forward_step"] = functions(note).get("forward_step")
    written = deploy.export(model, plan, target, format_, **options)
    click.echo(
        f"{written.folder}: {written.quantized:,} bytes of codes and scales, {written.leftovers:,} bytes left in float, "
        f"{written.header:,} bytes of header"
    )
    for line in written.notes:
        click.echo(line)
    if written.kept:
        names = ", ".join(written.kept[:3]) + (", …" if len(written.kept) > 3 else "")
        click.echo(f"{len(written.kept)} planned layers have no place in {format_} and stay float: {names}")
    if verify:
        click.echo(deploy.verify(model, plan, target, format_, **options))


@main.command()
@click.argument("run")
@click.option("--tool", default="json", show_default=True, help="json, modelopt, quanto or torchao.")
@click.option("--out", help="JSON file to write; the terminal when left out.")
def recipe(run: str, tool: str, out: str | None) -> None:
    """The plan in RUN as the configuration of another tool, which quantizes the model itself.

    \b
    clado recipe run                                   # {module: bits}
    clado recipe run --tool modelopt --out config.json
    In Python, clado.recipes gives the tools' own objects.
    """
    from ..common import write_json
    from ..interop import RECIPES

    require(tool in RECIPES, "recipe", "tool", f"be one of {', '.join(RECIPES)}", repr(tool))
    config = RECIPES[tool](_chosen(run))
    if out is None:
        click.echo(json.dumps(config, indent=1))
    else:
        write_json(Path(out), config)
        click.echo(f"-> {out}")


@main.command()
@click.argument("run")
@click.option("--data", help="Image folder; the one that was profiled, without its sensitivity set, when left out.")
@click.option("--nsamples", type=COUNT, help="At most so many images.")
@click.option("--batch-size", type=COUNT, default=32, show_default=True)
@click.option("--device", help="cpu or cuda.")
def evaluate(run: str, data: str | None, nsamples: int | None, batch_size: int, device: str | None) -> None:
    """Loss, top-1 and top-5 of the plan in RUN beside the float model, with standard errors; the run's own loss alone.

    The last row is the plan less the float model on the same images: its errors are those of paired differences.

    \b
    clado evaluate run --data imagenet/val --nsamples 5000
    """
    from ..deploy import apply
    from ..improve import evaluate as score
    from ..runs import heldout, load_run, measured_by, that_chose
    from .tables import show_scores

    model, spec, note = load_run(run)
    plan = _chosen(run)
    kept = heldout(model, spec, note, data, nsamples, batch_size, that_chose(note, plan, data))
    if device is not None:
        model = model.to(device)
    own = measured_by(note)
    own |= {"reference": model} if "loss" in own else {}
    rows = [
        ("float", score(model, kept, device, **own)),
        (f"plan ({plan.avg_bits:.2f} bits)", score(apply(model, plan), kept, device, **own)),
    ]
    show_scores(rows)


@main.command()
@click.argument("run")
@click.option(
    "--format", "format_", default="html", show_default=True, help="html: one page; png, svg, pdf: one file a figure."
)
@click.option("--out", help="File (html) or folder to write; RUN/report.html or RUN/figures when left out.")
@click.option(
    "--nsamples", type=click.IntRange(min=0), help="Held-out images to run plans on, 256 when left out; 0: none."
)
@click.option("--data", help="Image folder for them; what the profiled one has left when left out.")
@click.option("--device", help="cpu or cuda.")
def report(run: str, format_: str, out: str | None, nsamples: int | None, data: str | None, device: str | None) -> None:
    """Write RUN/report.html: what was measured, what was chosen, and whether it holds.

    \b
    clado report run
    clado report run --format svg       # one file a figure in RUN/figures
    The page is one file: it opens offline, light and dark, and prints. Plans are run once on held-out images
    and kept in RUN/measured.json.
    """
    from ..report import write_figures, write_report
    from ..runs import RUN_FILE, read_note

    if nsamples != 0 and (Path(run) / RUN_FILE).exists():
        read_note(run)  # a damaged one is said here: the page would only do without measured plans
    arguments: dict[str, Any] = {"num_samples": nsamples, "data": data, "device": device}
    if format_ == "html":
        click.echo(f"-> {write_report(run, out, **arguments)}")
    else:
        for path in write_figures(run, format_, out, **arguments):
            click.echo(f"-> {path}")


def _chosen(run: str) -> Any:
    """The run's plan; where the matrix beside it was measured further since, a line says so."""
    from ..artifacts import MATRIX_FILE, Plan, Sensitivity
    from .tables import say_if_older

    plan = Plan.load(run)
    if (Path(run) / MATRIX_FILE).is_file():
        say_if_older(Path(run), Sensitivity.load(run), plan)
    return plan
