"""``python -m bench.export.roundtrips``: timm nets with random plans of 2 to 8 bits, through every format and every setting.

Own format and compressed-tensors (through the package itself) must give the bits of ``clado.apply``, onnxruntime its logits;
the bytes on disk must be those predicted. Ends with exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import clado
from bench.harness import machine
from clado.deploy import FORMATS, predicted_bytes, verify
from clado.quant import Quantizer
from tests.models import random_plan, timm_model

NETS = (
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "resnet18",
    "mobilenetv3_small_100",
    "convnext_atto",
)
GROUPS = (-1, 32, 128)


def check(
    model: torch.nn.Module, x: torch.Tensor, format: str, group_size: int, symmetric: bool, seed: int
) -> dict[str, Any]:
    """One round trip; ``held`` says what the consumer found, ``exact`` whether the predicted bytes were written."""
    plan = random_plan(model, Quantizer(group_size, 2, symmetric), seed=seed)
    every = {"odd_widths": "dense", "example": x}
    options = {name: value for name, value in every.items() if name in FORMATS[format].takes}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        written = clado.export(model, plan, out, format, **options)
        seconds = time.perf_counter() - started
        predicted = predicted_bytes(model, plan, format, **options)
        held = verify(model, plan, out, format, **options)
    sizes = {"quantized": written.quantized, "leftovers": written.leftovers, "header": written.header}
    exact = (written.quantized, written.leftovers) == predicted
    return {**sizes, "exact": exact, "held": held, "float_layers": len(written.kept), "seconds": round(seconds, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default=",".join(NETS), help="timm names")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--every", type=int, default=1, help="only every n-th case, another one for each net")
    parser.add_argument("--json", help="write the rows to this file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    failed = 0
    for shift, name in enumerate(options.nets.split(",")):
        model, shape = timm_model(name)
        x = torch.randn(2, *shape)
        settings = itertools.product(options.formats.split(","), GROUPS, (True, False))
        for seed, (format, group_size, symmetric) in enumerate(settings):
            if (seed + shift) % options.every:
                continue
            row: dict[str, Any] = {"net": name, "format": format, "group_size": group_size, "symmetric": symmetric}
            try:
                row |= check(model, x, format, group_size, symmetric, seed)
            except clado.CladoError as error:
                row |= {"held": f"FAILED: {error}", "exact": False}
            failed += not row["exact"]
            rows.append(row)
            kind = "symmetric" if symmetric else "asymmetric"
            bytes_held = "bytes as predicted" if row["exact"] else "OTHER BYTES"
            print(f"{name:30} {format:19} {group_size:4} {kind:10} {bytes_held}; {row['held']}", flush=True)
            if options.json:
                Path(options.json).write_text(json.dumps({"rows": rows, "machine": machine()}, indent=1))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
