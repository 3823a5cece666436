"""Commands that measure or take measured scores: quickstart, profile, merge, import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..common import require
from ..profiling import Options
from . import fields
from .base import COUNT, command_line, main, named_folder, new_run


@main.command()
@click.option("--output-dir", default="run", show_default=True, callback=named_folder, help="Run directory to write.")
@click.option("--avg-bits", default=2.25, show_default=True, help="Budget: bits per weight.")
def quickstart(output_dir: str, avg_bits: float) -> None:
    """The whole pipeline on an embedded, trained vision transformer and real digits."""
    from .quickstart import run

    run(Path(output_dir), avg_bits)


@main.command()
@click.option(
    "--model", required=True, help="timm name, hf:… of transformers (see below), package.module:function, or digits."
)
@click.option("--checkpoint", help="Weights: .safetensors, or a torch file of tensors alone.")
@click.option(
    "--pretrained",
    is_flag=False,
    flag_value="hub",
    help="timm's own weights: from its hub, or from a local folder or file when one is named.",
)
@click.option(
    "--num-classes",
    type=click.IntRange(min=0),
    help="Classes of the head; another number than the weights' is drawn anew.",
)
@click.option("--img-size", type=COUNT, help="Image size, in place of the model's own.")
@click.option("--data", required=True, help="Image folder (one subfolder per class), timm:…, hf:…, own (see above).")
@fields.option(Options, "num_samples")
@click.option(
    "--skip",
    type=click.IntRange(min=0),
    default=0,
    help="Leave out that many first images: for a second run, to be merged with the first.",
)
@click.option(
    "--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode images."
)
@fields.options(Options, but=("num_samples", "output_dir"))
@click.option("--dry-run", is_flag=True, help="Print work, time, memory and disk; measure and write nothing.")
@fields.option(Options, "output_dir")
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
    --model hf:FOLDER                                     as save_pretrained writes it, image processor too
            hf:owner/name                                 the same on the Hugging Face hub

    \b
    --data  FOLDER                                        one subfolder per class
            timm:torch/cifar10?root=FOLDER&split=test     a dataset as timm names them
            hf:NAME?split=test&image=img&label=label      a Hugging Face dataset, by name or folder
            package.module:function                       returns a dataset or a data loader
            digits:sensitivity                            embedded
    """
    from ..profiling import torchrun_group

    with torchrun_group(options["device"]) as device:
        _profile({**options, "device": device})


def _profile(options: dict[str, Any]) -> None:
    from ..profiling import is_writer, plan_run
    from ..profiling import profile as measure
    from ..runs import ModelSpec, build_data, build_model, write_note
    from .tables import say_how_corrected

    options["pretrained"] = {None: False, "hub": True}.get(options["pretrained"], options["pretrained"])
    spec = ModelSpec(*(options[name] for name in ("model", "checkpoint", "pretrained", "num_classes", "img_size")))
    model = build_model(spec)
    skip, workers = options["skip"], options["workers"]
    data = build_data(options["data"], model, spec, options["batch_size"] or 32, options["seed"], skip, workers)
    folder = Path(options["output_dir"])
    arguments = fields.values(Options, options)
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
    own = {name: options[name] for name in ("forward_step", "loss_func")}
    own["loss"] = _noted_loss(sens)
    write_note(folder, spec, options["data"], seen, options["seed"], command_line(), **own)
    for warning in sens.notes["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    info = sens.notes
    click.echo(
        f"{len(sens.layers)} layers, {sens.num_candidates} candidates, {sens.num_samples} samples, "
        f"{info['forward_equivalents']:.1f} forwards each, {info['seconds']:.1f} s -> {folder}"
    )
    say_how_corrected(sens)
    if sens.provenance.stability is not None:
        click.echo(str(sens.provenance.stability))
    if sens.provenance.float_layers:
        click.echo(f"left in float: {sens.in_float}")
    click.echo(f"next: clado solve {folder} --avg-bits 3")


def _noted_loss(sens: Any) -> dict[str, Any] | None:
    """How later stages are asked for the run's loss; None where they know it: by functions, or for plain logits."""
    from ..profiling import loss_arguments

    known = {name: value for name, value in loss_arguments(sens).items() if name != "loss_func"}
    plain = known.get("loss", "kl") in ("kl", "cross_entropy") and len(known) <= 1
    return None if plain else known


@main.command()
@click.argument("runs", nargs=-1, required=True)
@new_run
def merge(runs: tuple[str, ...], output_dir: str) -> None:
    """Join runs of the same model and settings over different images into what one run would have given.

    \b
    clado profile ... --nsamples 512                           --output-dir a
    clado profile ... --nsamples 512 --skip 512 --rounded-as a --output-dir b
    clado merge a b --output-dir run
    """
    from ..artifacts import MATRIX_FILE, Sensitivity
    from ..runs import merge_notes

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
    from .. import interop
    from ..artifacts import MATRIX_FILE

    target = Path(output_dir) / MATRIX_FILE
    require(not target.exists(), "import", "output-dir", "not hold a matrix yet", output_dir)
    require(layers is not None or kind in ("scores", "modelopt"), "import", "layers", f"be given for {kind}", "none")
    if kind == "scores":
        sens = interop.read_scores(path)
    elif kind == "modelopt":
        sens = interop.read_modelopt(path)
    elif kind == "matrix":
        sens = interop.read_matrix(path, layers or "")
    else:
        sens = interop.read_clado(path, interop.read_sizes(layers or ""))
    target.parent.mkdir(parents=True, exist_ok=True)
    sens.save(target)
    click.echo(f"{len(sens.layers)} layers at {', '.join(map(str, sens.bits))} bits -> {output_dir}")
    click.echo(f"next: clado solve {output_dir} --avg-bits 4")
