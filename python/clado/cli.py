"""The command line. Heavy imports stay inside the commands, so that ``clado --help`` answers at once."""

from __future__ import annotations

import errno
import io
import json
import math
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from .errors import CladoError, require


class Command(click.Command):
    """What the system refuses (a full disk, a read-only folder) is one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.params.get("device") is not None:
            from .options import USABLE, usable

            device = ctx.params["device"]
            require(usable(device), op_of(ctx), "device", USABLE, repr(device))
        try:
            return super().invoke(ctx)
        except Exception as error:
            from safetensors import SafetensorError

            pipe = isinstance(error, OSError) and error.errno == errno.EPIPE  # click ends quietly
            if pipe or not isinstance(error, (OSError, SafetensorError)):
                raise
            given = next((ctx.params[name] for name in ("out", "output_dir", "run") if ctx.params.get(name)), "file")
            path, reason = getattr(error, "filename", None) or given, getattr(error, "strerror", None) or error
            path = re.sub(r"/\.([^/]+)\.[0-9a-f]{8}", r"/\1", str(path))  # files.py writes under such names first
            click.echo(f"error: {path}: {reason}", err=True)
            ctx.exit(1)


class Group(click.Group):
    """Bad input is one line on stderr and exit code 2; Ctrl-C ends cleanly."""

    command_class = Command

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal without Greek letters shows a question mark
        try:
            return super().invoke(ctx)
        except CladoError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("stopped; finished chunks are kept, run the same command again to go on", err=True)
            ctx.exit(130)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="clado")
def main() -> None:
    """Mixed-precision quantization of vision models, with layer interactions and a certificate.

    \b
    The stages share a run directory and can be repeated alone:
      clado profile  --model vit_tiny_patch16_224 --checkpoint w.safetensors --data images --output-dir run
      clado solve    run --avg-bits 3
      clado export   run --format safetensors
      clado evaluate run --data images
      clado pareto   run --avg-bits 2.2:8:0.2
      clado inspect  run
      clado report   run
    Start with `clado quickstart`: everything on an embedded, trained net in about a minute.
    """


def comma_ints(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"must be whole numbers separated by commas, got {value!r}") from None


def positive(ctx: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    known = value is None or 0 < value < math.inf
    require(known, op_of(ctx), parameter.opts[0].removeprefix("--"), "be a positive number", value)
    return value


def named_folder(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    require(bool(value), op_of(ctx), "output-dir", "name a folder", repr(value))
    return value


def op_of(ctx: click.Context) -> str:
    return ctx.info_name or "clado"


SEED = click.IntRange(0, 2**31 - 1)  # what every generator takes, SCIP's too
COUNT = click.IntRange(min=1)
new_run = click.option(
    "--output-dir",
    required=True,
    callback=named_folder,
    help="Run directory to write; it must not hold another matrix.",
)


@main.command()
@click.option("--output-dir", default="run", show_default=True, callback=named_folder, help="Run directory to write.")
@click.option("--avg-bits", default=3.0, show_default=True, help="Budget: bits per weight.")
def quickstart(output_dir: str, avg_bits: float) -> None:
    """The whole pipeline on an embedded, trained vision transformer and real digits."""
    from .quickstart import run

    run(Path(output_dir), avg_bits)


@main.command()
@click.option("--model", required=True, help="timm name, package.module:function, or digits (embedded).")
@click.option("--checkpoint", help="Weights: .safetensors, or a torch file of tensors alone.")
@click.option(
    "--pretrained",
    is_flag=False,
    flag_value="hub",
    help="timm's own weights: from its hub, or from a local folder or file when one is named.",
)
@click.option("--num-classes", type=click.IntRange(min=0), help="Classes of the head, as timm takes it.")
@click.option("--img-size", type=COUNT, help="Image size, as timm takes it.")
@click.option("--data", required=True, help="Image folder (one subfolder per class), timm:…, hf:…, own (see above).")
@click.option(
    "--nsamples",
    type=COUNT,
    default=512,
    show_default=True,
    help="Images of the sensitivity set; ask for more later.",
)
@click.option(
    "--skip",
    type=click.IntRange(min=0),
    default=0,
    help="Leave out that many first images: for a second run, to be merged with the first.",
)
@click.option(
    "--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode images."
)
@click.option("--bits", default="2,4,8", show_default=True, callback=comma_ints, help="Candidate widths.")
@click.option("--estimator", default="logit", show_default=True, help="logit, gradient, corrected, exact, diagonal.")
@click.option("--loss", default="kl", show_default=True, help="kl or cross_entropy.")
@click.option(
    "--loss-func",
    metavar="MODULE:FUNCTION",
    help="Instead of --loss: your function(output, batch), a loss per sample; for exact, gradient, diagonal.",
)
@click.option(
    "--forward-step", metavar="MODULE:FUNCTION", help="Your function(model, batch) that runs the model on a batch."
)
@click.option("--precision", default="float32", show_default=True, help="float32, tf32, bfloat16, float64 or auto.")
@click.option(
    "--group-size",
    type=click.IntRange(min=-1),
    default=-1,
    show_default=True,
    help="-1 per channel, 0 per tensor, g inputs per scale.",
)
@click.option(
    "--act-bits",
    type=COUNT,
    help="Also round the layers' inputs, to so many bits; weights only when left out.",
)
@click.option(
    "--act-samples",
    type=COUNT,
    help="Images that calibrate the ranges of --act-bits; all, at most 1,024, when left out.",
)
@click.option("--asymmetric", is_flag=True, help="A zero point with every scale.")
@click.option("--ignore", multiple=True, help="Layers to keep in float: pattern, or re:regex. May be repeated.")
@click.option("--quantize-ends", is_flag=True, help="Also quantize the first convolution and the classifier.")
@click.option("--batch-size", type=COUNT, help="Samples of a chunk, the unit that is kept; chosen when left out.")
@click.option(
    "--max-memory",
    type=float,
    callback=positive,
    help="GiB of weights, their variants and live values that must not be exceeded.",
)
@click.option("--device", help="cpu or cuda; where the model is when left out.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Which images come first.")
@click.option("--dry-run", is_flag=True, help="Print work, time, memory and disk; measure and write nothing.")
@click.option("--output-dir", required=True, callback=named_folder, help="Run directory to write, or to go on with.")
def profile(**options: Any) -> None:
    """Measure the sensitivity matrix of a model.

    A run that was stopped in any way goes on where it was when the same command is given again; with a larger --nsamples a
    finished one goes on as well. Several processes share a run under torchrun.

    \b
    clado profile --model resnet18 --pretrained --data imagenet/val --nsamples 1024 --output-dir run
    torchrun --nproc-per-node 8 -m clado profile --model vit_base_patch16_224 ... --output-dir run
    clado profile --model mine:net --data mine:data --loss-func mine:loss --forward-step mine:step \\
        --estimator exact --output-dir run

    \b
    --data  FOLDER                                        one subfolder per class
            timm:torch/cifar10?root=FOLDER&split=test     a dataset as timm names them
            hf:NAME?split=test&image=img&label=label      a Hugging Face dataset, by name or folder
            package.module:function                       returns a dataset or a data loader
            digits:sensitivity                            embedded
    """
    from .distributed import torchrun_group

    with torchrun_group(options["device"]) as device:
        _profile({**options, "device": device})


def _profile(options: dict[str, Any]) -> None:
    from .data import build_data
    from .distributed import is_writer
    from .models import ModelSpec, build_model
    from .named import named
    from .profiler import plan_run
    from .profiler import profile as measure
    from .rundir import write_note

    options["pretrained"] = {None: False, "hub": True}.get(options["pretrained"], options["pretrained"])
    spec = ModelSpec(*(options[name] for name in ("model", "checkpoint", "pretrained", "num_classes", "img_size")))
    model = build_model(spec)
    skip, workers = options["skip"], options["workers"]
    data = build_data(options["data"], model, spec, options["batch_size"] or 32, options["seed"], skip, workers)
    folder = Path(options["output_dir"])
    kept = (
        "estimator",
        "loss",
        "precision",
        "group_size",
        "ignore",
        "quantize_ends",
        "act_bits",
        "act_samples",
        "batch_size",
        "device",
        "seed",
        "bits",
    )
    limit = options["max_memory"]
    own = {
        name: options[name] and named("profile", name.replace("_", "-"), options[name])
        for name in ("loss_func", "forward_step")
    }
    arguments = {
        **own,
        "num_samples": options["nsamples"],
        "symmetric": not options["asymmetric"],
        "max_memory": None if limit is None else int(limit * 2**30),
        "output_dir": folder,
        **{name: options[name] for name in kept},
    }
    if options["dry_run"]:
        plan = plan_run(model, data, **arguments, verbose=is_writer())
        if is_writer():
            click.echo(str(plan))
        return
    if spec.random and is_writer():
        click.echo(f"warning: the weights of {spec.model} are random; give --pretrained or --checkpoint", err=True)
    sens = measure(model, data, **arguments)
    if not is_writer():
        return
    seen = skip + sens.num_samples
    write_note(folder, spec, options["data"], seen, options["seed"], command_line(), loss_func=options["loss_func"])
    for warning in sens.info["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    info = sens.info
    click.echo(
        f"{len(sens.layers)} layers, {sens.num_candidates} candidates, {sens.num_samples} samples, "
        f"{info['forward_equivalents']:.1f} forwards each, {info['seconds']:.1f} s -> {folder}"
    )
    click.echo(f"next: clado solve {folder} --avg-bits 3")


@main.command()
@click.argument("runs", nargs=-1, required=True)
@new_run
def merge(runs: tuple[str, ...], output_dir: str) -> None:
    """Join runs of the same model and settings over different images into what one run would have given.

    \b
    clado profile ... --nsamples 512            --output-dir a
    clado profile ... --nsamples 512 --skip 512 --output-dir b
    clado merge a b --output-dir run
    """
    from .rundir import merge_notes
    from .sensitivity import MATRIX_FILE, Sensitivity

    target = Path(output_dir)
    require(not (target / MATRIX_FILE).exists(), "merge", "output-dir", "not hold a matrix yet", output_dir)
    sens = Sensitivity.merge([Sensitivity.load(run) for run in runs])
    target.mkdir(parents=True, exist_ok=True)
    sens.save(target)
    merge_notes([Path(run) for run in runs], target)
    click.echo(f"{len(runs)} runs, {sens.num_samples} samples -> {output_dir}")
    click.echo(f"next: clado solve {output_dir} --avg-bits 3")


@main.command("import")
@click.argument("kind", type=click.Choice(["scores", "matrix", "clado", "modelopt"]))
@click.argument("path")
@click.option("--layers", help="matrix: JSON {layers: [[name, weights]], bits: []}; clado: JSON {layer: weights}.")
@new_run
def import_(kind: str, path: str, layers: str | None, output_dir: str) -> None:
    """Take scores that another tool measured; `clado solve` then works on them.

    \b
    scores    CSV layer,numel,bits,delta_loss, or JSON {layer: {numel, delta_loss: {bits: nats}}}
    matrix    G as .npy, .npz, .safetensors or .pt, with --layers
    clado     Ltilde pickle of CLADO's public code, with --layers (read without running it)
    modelopt  search state of NVIDIA ModelOpt's auto_quantize (read without running it)
    """
    from . import importers
    from .sensitivity import MATRIX_FILE

    target = Path(output_dir) / MATRIX_FILE
    require(not target.exists(), "import", "output-dir", "not hold a matrix yet", output_dir)
    require(layers is not None or kind in ("scores", "modelopt"), "import", "layers", f"be given for {kind}", "none")
    if kind == "scores":
        sens = importers.read_scores(path)
    elif kind == "modelopt":
        sens = importers.read_modelopt(path)
    elif kind == "matrix":
        sens = importers.read_matrix(path, layers or "")
    else:
        sens = importers.read_clado(path, importers.read_sizes(layers or ""))
    target.parent.mkdir(parents=True, exist_ok=True)
    sens.save(target)
    click.echo(f"{len(sens.layers)} layers at {', '.join(map(str, sens.bits))} bits -> {output_dir}")
    click.echo(f"next: clado solve {output_dir} --avg-bits 4")


def wishes(command: Any) -> Any:
    """Options that solve and pareto share."""
    for option in reversed(
        (
            click.option("--latency", help="Table of ms for --latency-ms: CSV of `clado latency`, or JSON."),
            click.option(
                "--objective", default="original", show_default=True, help="original, clipped, shrunk or diagonal."
            ),
            click.option(
                "--pin", multiple=True, metavar="LAYER=BITS", help="Keep a layer at a width. May be repeated."
            ),
            click.option("--forbid", multiple=True, metavar="LAYER=BITS", help="Leave a width out. May be repeated."),
            click.option("--min-bits", type=COUNT, help="Least bits of every layer."),
            click.option("--max-bits", type=COUNT, help="Most bits of every layer."),
            click.option(
                "--shared",
                multiple=True,
                metavar="LAYER,LAYER",
                help="Layers that take the same bits. May be repeated.",
            ),
            click.option("--solver", default="auto", show_default=True, help="auto, bnb, scip or heuristic."),
            click.option("--time-limit", default=60.0, callback=positive, show_default=True, help="Seconds."),
            click.option("--gap", default=0.0, show_default=True, help="Stop once this relative gap is proven."),
            click.option(
                "--threads",
                type=COUNT,
                default=1,
                show_default=True,
                help="Of the linear algebra behind the bound.",
            ),
            click.option("--seed", type=SEED, default=0, show_default=True, help="Of everything random."),
            click.option(
                "--act-bits",
                type=COUNT,
                default=32,
                show_default=True,
                help="Width of activations in --bitops.",
            ),
            click.option(
                "--constraints", help="JSON {name: {limit, coefficients: {layer: {bits: number}}}} of your own."
            ),
        )
    ):
        command = option(command)
    return command


@main.command()
@click.argument("run")
@click.option("--avg-bits", type=float, help="Bits per weight, codes alone.")
@click.option("--size-mb", type=float, help="MiB of packed codes and scales.")
@click.option("--size-bytes", type=float, help="Bytes of packed codes and scales.")
@click.option("--bitops", type=float, help="Sum of macs x bits x act-bits for one sample.")
@click.option("--latency-ms", type=float, help="Sum of the --latency table.")
@click.option(
    "--rerank",
    type=click.IntRange(min=0),
    help="Measure the best plans of every objective on so many other images; keep one.",
)
@click.option("--data", help="Image folder for --rerank; the one that was profiled when left out.")
@click.option(
    "--refine",
    type=COUNT,
    help="Measure again around the plan, at most so many times, while its loss falls.",
)
@click.option(
    "--correct",
    type=COUNT,
    help="Measure the plan's pairs exactly on so many images of the sensitivity set, and solve again, until it stands.",
)
@click.option("--device", help="Where --rerank, --refine and --correct run: cpu or cuda.")
@wishes
def solve(
    run: str,
    rerank: int | None,
    data: str | None,
    refine: int | None,
    correct: int | None,
    device: str | None,
    **options: Any,
) -> None:
    """Choose bits per layer within one or more budgets, with a bound.

    \b
    clado solve run --avg-bits 3 --pin blocks.0.attn.qkv=8
    clado solve run --avg-bits 3 --correct 128   # exact pairs where the closed form led; RUN keeps them
    clado solve run --avg-bits 3 --rerank 256    # the true loss decides among the best plans
    clado solve run --avg-bits 2.25 --refine 4   # few bits: the matrix again, around the plan
    """
    from dataclasses import replace

    from .plan import PLAN_FILE
    from .sensitivity import Sensitivity
    from .solver import shortlist
    from .solver import solve as choose
    from .terminal import show_plan

    sens, wishes = Sensitivity.load(run), _wishes(options)
    asked = [f"--{name}" for name, value in (("rerank", rerank), ("refine", refine), ("correct", correct)) if value]
    known = not asked or sens.info.get("loss") != "user"
    must = "be one of clado's own for --rerank, --refine and --correct"
    require(known, "solve", "loss of the run", must, f"that of --loss-func and {', '.join(asked)}")
    if correct is not None:
        sens, plan = _correct(run, sens, correct, wishes, device)
    if rerank is None and refine is None:
        plan = choose(sens, **wishes) if correct is None else plan
    else:
        measured = "--rerank or --refine"
        require(rerank is None or rerank >= 2, "solve", "rerank", "be at least 2 images", rerank)
        require(wishes.pop("objective") == "original", "solve", "objective", f"be left out with {measured}", "another")
        plans = shortlist(sens, **wishes)
        if refine is not None and plans[0].bits:
            plans = [_refine(run, sens, plans, refine, wishes, device), *plans]
        plan = _rerank(run, plans, data, rerank, device) if rerank is not None and plans[0].bits else plans[0]
    require(bool(plan.bits), "solve", "budgets", "fit together", plan.info.get("reason"))
    replace(plan, info={**plan.info, "command": command_line()}).save(Path(run) / PLAN_FILE)
    show_plan(plan)
    click.echo(f"next: clado export {run}   clado report {run}")


@main.command()
@click.argument("run")
@click.option("--avg-bits", required=True, help="Budgets: first:last:step, or numbers separated by commas.")
@click.option("--plot", help="Also draw it: a .png, .svg or .pdf file.")
@wishes
def pareto(run: str, avg_bits: str, plot: str | None, **options: Any) -> None:
    """Solve for many budgets; writes RUN/pareto.json.

    \b
    clado pareto run --avg-bits 2.2:8:0.2 --plot run/pareto.png
    """
    from rich.table import Table

    from .figures import check_path, frontier_figure, save_figure
    from .rundir import write_json
    from .sensitivity import Sensitivity
    from .solver import pareto as frontier
    from .terminal import console

    if plot is not None:
        check_path(plot)
    plans = frontier(Sensitivity.load(run), avg_bits=_points(avg_bits), **_wishes(options))
    write_json(Path(run) / "pareto.json", [json.loads(plan.to_json()) for plan in plans])
    table = Table(box=None, header_style="bold")
    for name in ("budget", "bits", "bytes", "loss increase", "no plan below", "status"):
        table.add_column(name, justify="left" if name == "status" else "right")
    for plan in plans:
        limit = f"{plan.usage['avg_bits']['limit']:g}" if plan.usage else ""
        numbers = (
            [f"{plan.avg_bits:.3f}", f"{plan.size_bytes:,}", f"{plan.objective:.5f}", f"{plan.bound:.5f}"]
            if plan.bits
            else [""] * 4
        )
        table.add_row(limit, *numbers, plan.status)
    console().print(table)
    if plot is not None:
        click.echo(f"-> {save_figure(frontier_figure(plans), plot)}")


@main.command()
@click.argument("run")
@click.option("--batch-size", type=COUNT, default=1, show_default=True, help="Samples of one forward.")
@click.option(
    "--repeats",
    type=COUNT,
    default=20,
    show_default=True,
    help="Timings per layer and width; the median counts.",
)
@click.option("--device", help="cpu or cuda.")
@click.option("--out", help="CSV file to write; RUN/latency.csv when left out.")
def latency(run: str, batch_size: int, repeats: int, device: str | None, out: str | None) -> None:
    """Time every layer at every width on this device, as packed layers run it.

    \b
    clado latency run --batch-size 8
    clado solve run --latency run/latency.csv --latency-ms 20
    """
    from .latency import time_layers, write_latency
    from .rundir import heldout, load_model
    from .sensitivity import Sensitivity

    model, spec, note = load_model(run)
    images = heldout(model, spec, {**note, "num_samples": 0}, None, batch_size, batch_size)[0][0]
    place = device or "cpu"
    table = time_layers(model.to(place), Sensitivity.load(run), images.to(place), repeats)
    path = write_latency(table, out or Path(run) / "latency.csv")
    widths = next(iter(table.values()))
    sums = ", ".join(f"{sum(row[bits] for row in table.values()):.3f} ms at {bits} bits" for bits in widths)
    click.echo(f"{len(table)} layers, batch {batch_size}: {sums} -> {path}")
    click.echo(f"next: clado solve {run} --latency {path} --latency-ms MS")


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
@click.option("--verify", is_flag=True, help="Then read it with a consumer of the format and compare.")
def export(run: str, format_: str, out: str | None, odd_widths: str | None, verify: bool) -> None:
    """Write the integer weights of the plan in RUN.

    \b
    clado export run                                          # clado.load reads it
    clado export run --format compressed-tensors --verify     # vLLM, transformers
    clado export run --format onnx --out run/onnx --verify    # onnxruntime (pip install clado[onnx])
    """
    from . import exporter
    from .rundir import heldout, load_model

    model, spec, note = load_model(run)
    plan, target = _chosen(run), out or Path(run) / "out"
    options: dict[str, Any] = {"odd_widths": odd_widths}
    if format_ == "onnx":
        options["example"] = heldout(model, spec, {**note, "num_samples": 0}, None, 2, 2)[0][0]
    written = exporter.export(model, plan, target, format_, **options)
    click.echo(
        f"{written.folder}: {written.quantized:,} bytes of codes and scales, {written.leftovers:,} bytes left in float, "
        f"{written.header:,} bytes of header"
    )
    if written.kept:
        names = ", ".join(written.kept[:3]) + (", …" if len(written.kept) > 3 else "")
        click.echo(f"{len(written.kept)} planned layers have no place in {format_} and stay float: {names}")
    if verify:
        click.echo(exporter.verify(model, plan, target, format_, **options))


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
    from .recipes import RECIPES
    from .rundir import write_json

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
    """Loss, top-1 and top-5 of the plan in RUN beside the float model, with standard errors.

    The last row is the plan less the float model on the same images: its errors are those of paired differences.

    \b
    clado evaluate run --data imagenet/val --nsamples 5000
    """
    from .evaluator import evaluate as score
    from .exporter import apply
    from .rundir import heldout, load_model, that_chose
    from .terminal import show_scores

    model, spec, note = load_model(run)
    plan = _chosen(run)
    kept = heldout(model, spec, note, data, nsamples, batch_size, that_chose(note, plan, data))
    if device is not None:
        model = model.to(device)
    rows = [
        ("float", score(model, kept, device)),
        (f"plan ({plan.avg_bits:.2f} bits)", score(apply(model, plan), kept, device)),
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
    from .report import write_figures, write_report
    from .rundir import RUN_FILE, read_note

    if nsamples != 0 and (Path(run) / RUN_FILE).exists():
        read_note(run)  # a damaged one is said here: the page would only do without measured plans
    arguments: dict[str, Any] = {"num_samples": nsamples, "data": data, "device": device}
    if format_ == "html":
        click.echo(f"-> {write_report(run, out, **arguments)}")
    else:
        for path in write_figures(run, format_, out, **arguments):
            click.echo(f"-> {path}")


@main.command()
@click.argument("run")
def inspect(run: str) -> None:
    """What a run directory holds: matrix, plan, frontier, exports, or the running sums of an unfinished run."""
    from .terminal import show_run

    show_run(Path(run))


def _chosen(run: str) -> Any:
    """The run's plan; where the matrix beside it was measured further since, a line says so."""
    from .plan import Plan
    from .sensitivity import MATRIX_FILE, Sensitivity
    from .terminal import say_if_older

    plan = Plan.load(run)
    if (Path(run) / MATRIX_FILE).is_file():
        say_if_older(Path(run), Sensitivity.load(run), plan)
    return plan


def _profiled(run: str, sens: Any) -> tuple[Any, Any, int]:
    """Model, images of the sensitivity set, and the seed of their order."""
    from .data import build_data
    from .rundir import load_model

    model, spec, note = load_model(run)
    skipped = note["num_samples"] - sens.num_samples
    return model, build_data(note["data"], model, spec, 32, note["seed"], skipped), note["seed"]


def _correct(run: str, sens: Any, count: int, wishes: dict[str, Any], device: str | None) -> tuple[Any, Any]:
    """The matrix with exact pairs where plans went, and the plan that stands."""
    from .corrector import correct

    model, images, seed = _profiled(run, sens)
    options = {**wishes, "seed": seed, "device": device}
    sens, plan = correct(model, images, sens, num_samples=count, output_dir=run, **options)
    rows = plan.info["correct"]
    stands = "the plan stands" if plan.info["stands"] else "the plan does not stand yet: run the same again to go on"
    click.echo(
        f"{sum(row['pairs'] for row in rows[:-1]):,} exact pairs on {count} images in {len(rows) - 1} rounds; {stands}"
    )
    return sens, plan


def _refine(run: str, sens: Any, plans: list[Any], rounds: int, wishes: dict[str, Any], device: str | None) -> Any:
    """The best of the plans, improved on the images of the sensitivity set."""
    from .refiner import refine

    model, images, seed = _profiled(run, sens)
    best = refine(model, images, sens, plans, rounds=rounds, **{**wishes, "seed": seed, "device": device})
    losses = [row["loss_increase"] for row in best.info["refine"]]
    click.echo(f"refined on {sens.num_samples} images: loss increase {losses[0]:.4f} -> {best.info['refine_loss']:.4f}")
    return best


def _rerank(run: str, plans: list[Any], data: str | None, count: int, device: str | None) -> Any:
    """The plan of least true loss on held-out images, and a table of all."""
    from dataclasses import replace

    from rich.table import Table

    from .evaluator import rerank
    from .rundir import heldout, heldout_data, load_model
    from .terminal import console

    model, spec, note = load_model(run)
    best = rerank(model, heldout(model, spec, note, data, count, 32), plans, device=device)
    best = replace(best, info={**best.info, "rerank_data": heldout_data(note, data)})
    table = Table(box=None, header_style="bold")
    for name in ("plan", "true increase", "behind", "± s.e.", "bytes"):
        table.add_column(name, justify="left" if name == "plan" else "right")
    for row in best.info["rerank"]:
        numbers = (f"{row['loss_increase']:.5f}", f"{row['behind']:.5f}", f"{row['stderr']:.5f}")
        table.add_row(row["objective"], *numbers, f"{row['size_bytes']:,}")
    console().print(table)
    lead = "exceeds its error" if best.info["rerank_decided"] else "is within its error"
    click.echo(f"{best.info['rerank_samples']} images; the winner's lead {lead}")
    return best


def command_line() -> str:
    """This call, as it can be repeated."""
    return shlex.join(["clado", *sys.argv[1:]])


def _wishes(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of clado.solve from the options of the command line."""
    forbid: dict[str, list[int]] = {}
    for layer, bits in _layer_bits("forbid", options.pop("forbid")):
        forbid.setdefault(layer, []).append(bits)
    pin = dict(_layer_bits("pin", options.pop("pin")))
    shared = [group.split(",") for group in options.pop("shared")]
    constraints = options.pop("constraints") or ()
    return {**options, "pin": pin, "forbid": forbid, "shared_layers": shared, "constraints": constraints}


def _layer_bits(option: str, values: tuple[str, ...]) -> list[tuple[str, int]]:
    for value in values:
        layer, _, bits = value.rpartition("=")
        require(bool(layer) and bits.isdigit(), "solve", option, "read LAYER=BITS", repr(value))
    return [(value.rpartition("=")[0], int(value.rpartition("=")[2])) for value in values]


def _points(text: str) -> list[float]:
    """Numbers of "2,2.5,3" or "first:last:step", last included."""
    from fractions import Fraction

    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        first, last, step = (Fraction(part) for part in text.split(":"))
        require(step > 0 and last >= first, "pareto", "avg-bits", "rise from first to last", repr(text))
        return [float(first + k * step) for k in range(int((last - first) / step) + 1)]
    except ValueError:
        raise CladoError(f"pareto: avg-bits must be first:last:step or numbers, got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
