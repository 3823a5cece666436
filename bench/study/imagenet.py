"""The paper's setting on ImageNet, for those who have it: ``python -m bench.study.imagenet --model resnet50 --train … --val …``.

ResNet-18, ResNet-50 or ViT-B/16, weights at 2, 4 and 8 bits with one scale per tensor (least squared error over 95 shrink
steps), rounded to the nearest code, activations at 8 bits, first convolution and classifier in float, cross-entropy. Profiles
on training images, solves for the budgets, and reports top-1 on the validation images beside the published figures; see
docs/imagenet.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import clado
from clado.cli.tables import console
from clado.common import atomic_file
from clado.runs import ModelSpec, build_data, build_model

BITS = (2, 4, 8)
MODELS = {  # name here: (timm's weights that the paper's come from, published figures)
    "resnet18": ("resnet18.tv_in1k", {"uniform 8": 69.474, "uniform 4": 46.274}),
    "resnet50": ("resnet50.tv_in1k", {"float": 76.146, "uniform 8": 75.782, "uniform 4": 45.426, "uniform 2": 0.1}),
    "vit_base": ("vit_base_patch16_224.augreg2_in21k_ft_in1k", {}),
}
# ResNet-18, cross-entropy over 8,192 images: loss increases at 2, 4, 8 bits, and the interaction of both layers at 2 bits.
CORNER = {"layer1.0.conv1": (1.5677, 0.07934, 0.000956), "layer4.1.conv2": (1.5287, 0.01968, 0.00131)}
CORNER_INTERACTION = -0.2268


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help=f"{', '.join(MODELS)}, or any timm name")
    parser.add_argument("--checkpoint", help="weights; timm's pretrained ones are fetched when left out")
    parser.add_argument("--num-classes", type=int)
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--train", required=True, help="image folder, one subfolder per class")
    parser.add_argument("--val", required=True, help="image folder with the same classes")
    parser.add_argument("--nsamples", type=int, default=8192, help="training images of the sensitivity set")
    parser.add_argument("--choice", type=int, default=1024, help="other training images, to re-rank plans")
    parser.add_argument("--avg-bits", default="2.5,3,3.5,4")
    parser.add_argument("--act-bits", type=int, default=8, help="of the layers' inputs; 0 keeps them float")
    parser.add_argument("--estimator", default="logit")
    parser.add_argument("--rounds", type=int, default=3, help="of refinement")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, required=True)
    options = parser.parse_args(arguments)

    name, published = MODELS.get(options.model, (options.model, {}))
    spec = ModelSpec(
        name,
        checkpoint=options.checkpoint,
        pretrained=options.checkpoint is None,
        num_classes=options.num_classes,
        img_size=options.img_size,
    )
    model = build_model(spec)
    if options.device is not None:
        model = model.to(options.device)

    def images(folder: str, skip: int = 0) -> Any:
        return build_data(folder, model, spec, options.batch_size, options.seed, skip)

    sens = clado.profile(
        model,
        images(options.train),
        BITS,
        estimator=options.estimator,
        loss="cross_entropy",
        num_samples=options.nsamples,
        group_size=0,
        rounding="nearest",
        act_bits=options.act_bits or None,
        output_dir=options.output_dir,
        seed=options.seed,
    )
    choice = first(images(options.train, sens.num_samples), options.choice)
    rows = [row("float", model, images(options.val), published.get("float"))]
    for bits in reversed(BITS):
        plan = clado.given_plan(sens, {layer.name: bits for layer in sens.layers})
        known = published.get(f"uniform {bits}")
        rows.append(row(f"uniform {bits}", clado.apply(model, plan), images(options.val), known, plan))
    for budget in map(float, options.avg_bits.split(",")):
        plans = clado.shortlist(sens, avg_bits=budget)
        diagonal = clado.solve(sens, avg_bits=budget, objective="diagonal")
        refined = clado.refine(model, images(options.train), sens, plans, avg_bits=budget, rounds=options.rounds)
        chosen = clado.rerank(model, choice, [refined, *plans])
        for title, plan in (("diagonal", diagonal), ("interactions", plans[0]), ("refined, re-ranked", chosen)):
            rows.append(row(f"{title} {budget:g}", clado.apply(model, plan), images(options.val), None, plan))
    result = {"model": name, "rows": rows, "corner": corner(sens), "profile": sens.info}
    with atomic_file(options.output_dir / "imagenet.json") as temporary:
        Path(temporary).write_text(json.dumps(result, indent=1))
    show(result)
    return result


def first(batches: Any, count: int) -> list[Any]:
    """The first ``count`` samples of a loader, in batches."""
    out: list[Any] = []
    for inputs, targets in batches:
        out.append((inputs[:count], targets[:count]))
        count -= len(inputs)
        if count <= 0:
            break
    return out


def row(title: str, model: Any, data: Any, published: float | None, plan: clado.Plan | None = None) -> dict[str, Any]:
    score = clado.evaluate(model, data)
    return {
        "weights": title,
        "avg_bits": None if plan is None else plan.avg_bits,
        "size_bytes": None if plan is None else plan.size_bytes,
        "loss": score.loss,
        "loss_stderr": score.loss_stderr,
        "top1": 100 * score.accuracy,
        "top1_stderr": 100 * score.accuracy_stderr,
        "published_top1": published,
    }


def corner(sens: clado.Sensitivity) -> dict[str, Any]:
    """Loss increases of two layers of ResNet-18 beside the published ones; empty for other nets."""
    if not set(CORNER) <= {layer.name for layer in sens.layers}:
        return {}
    rows = {name: [sens.index(name, b) for b in sens.bits] for name in CORNER}
    one, other = (rows[name][0] for name in CORNER)
    found: dict[str, Any] = {
        name: {"measured": sens.delta_loss[index].tolist(), "published": CORNER[name]} for name, index in rows.items()
    }
    pair = {"measured": float(sens.interaction[one, other]), "published": CORNER_INTERACTION}
    return {**found, "interaction": {**pair, "stderr": float(sens.stderr[one, other])}}


def show(result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column in ("weights", "bits", "bytes", "loss", "top-1", "± s.e.", "published (A8)"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    for line in result["rows"]:
        size = [f"{line['avg_bits']:.2f}", f"{line['size_bytes']:,}"] if line["avg_bits"] else ["32", ""]
        known = "" if line["published_top1"] is None else f"{line['published_top1']:.2f}"
        score = [f"{line['loss']:.4f}", f"{line['top1']:.2f}", f"{line['top1_stderr']:.2f}", known]
        table.add_row(line["weights"], *size, *score)
    console().print(table)
    for name, values in result["corner"].items():
        console().print(f"{name}: measured {values['measured']}, published {values['published']}")


if __name__ == "__main__":
    main()
