"""``python -m bench.solve.schemes``: proofs where a layer has eight schemes, integers, floats and rounded inputs mixed.

A ViT-S-shaped net (48 layers) with random weights so large that every branch counts, on small random images: the matrix is
measured, its size is that of the real net's program, and noise and interactions are larger. With ``--photographs FOLDER``
(bench.study.photographs) the trained one, DINOv2 ViT-S/14, by the squared error of its features. The profile's cost is counted
in forwards of the net; then three budgets in bytes.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import clado
from bench.harness import machine
from bench.solve.frontier import timed
from bench.study.photographs import load_photographs
from bench.study.saliency import MEAN, STD, load_saliency
from bench.study.stable import SMALL_SIDE, small_vit
from clado.artifacts import MATRIX_FILE
from clado.common import atomic_file

SCHEMES = ("W2A16", "W3A16", "W4A16", "W4A8", "W8A8", "MXFP4", "NVFP4", "FP8")
BUDGETS = (3.0, 4.0, 5.0)  # bits per weight on average, every block scale counted


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.solve.schemes", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of a proof")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--photographs", type=Path, help="folder that bench.study.photographs wrote")
    parser.add_argument("--work", type=Path, help="keep the profile in this folder, or take it from there")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    model, images, settings = random_net(options.samples)
    if options.photographs:
        model, images, settings = trained_net(options.photographs, options.samples)
    ready = options.work is not None and (options.work / MATRIX_FILE).exists()
    settings |= {"schemes": SCHEMES, "num_samples": len(images), "output_dir": options.work, "verbose": False}
    sens, wall, cpu = timed(partial(clado.profile, model, [images], **settings))
    profile = {
        "layers": len(sens.layers),
        "candidates": sens.num_candidates,
        "forwards": sens.info["forward_equivalents"],
        **({} if ready else {"seconds": wall, "cpu": cpu}),
    }
    print(
        f"{profile['layers']} layers, {profile['candidates']} candidates: {profile['forwards']:.0f} forwards a sample, "
        f"{'read' if ready else f'CPU {cpu:.1f} s'} for {len(images)} samples"
    )
    rows: list[dict[str, Any]] = []
    for budget in BUDGETS:
        size = int(budget * sum(layer.numel for layer in sens.layers) / 8)
        plan, wall, cpu = timed(partial(clado.solve, sens, size_bytes=size, time_limit=options.seconds))
        rows.append(
            {
                "avg_bits": budget,
                "status": plan.status,
                "gap": plan.info["relative_gap"],
                "seconds": wall,
                "cpu": cpu,
                "schemes": sorted({scheme.label for scheme in plan.chosen.values()}),
            }
        )
        print(
            f"{budget:g} bits: {plan.status}, gap {rows[-1]['gap']:.2%}, {wall:.1f} s, CPU {cpu:.1f} s; {rows[-1]['schemes']}"
        )
    if options.json:
        found = {"benchmark": "schemes", "machine": machine(), "schemes": SCHEMES, "profile": profile, "rows": rows}
        with atomic_file(options.json) as temporary:
            Path(temporary).write_text(json.dumps(found, indent=1) + "\n")


Case = tuple[nn.Module, torch.Tensor, dict[str, Any]]  # a net, what it is measured on, and how


def random_net(samples: int) -> Case:
    images = torch.randn(samples, 3, SMALL_SIDE, SMALL_SIDE, generator=torch.Generator().manual_seed(0))
    return small_vit(Path()), images, {}


def trained_net(photographs: Path, samples: int) -> Case:
    images = load_photographs(photographs, "sensitivity", MEAN, STD)[:samples]
    return load_saliency().backbone, images, {"loss": "mse", "loss_against": "outputs"}


if __name__ == "__main__":
    main()
