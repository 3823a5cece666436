"""``python -m bench.export.packed``: packed layers against float ones, in memory and in time.

Memory is the resident size of a fresh process that has loaded a model, less that of the same process before, when it had loaded
a small one; pages of the mapped file count. The float model is measured the same way. Time is a forward, the two
models taking turns; outputs are compared with ``clado.apply`` first.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import clado
from bench.harness import machine
from clado.deploy import predicted_bytes
from clado.nn import packed_bytes
from clado.quant import Quantizer
from tests.models import random_plan


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False).eval()


def resident() -> int:
    """Bytes of this process in memory, freed ones given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


def held_by(name: str, folder: str | None) -> dict[str, int]:
    """What a process holds with the float model, or with the packed one of an export."""
    small = nn.Sequential(nn.Linear(64, 64)).eval()  # whatever a first load and forward allocate
    with tempfile.TemporaryDirectory() as other:
        clado.export(small, random_plan(small, Quantizer()), Path(other) / "out")
        clado.load(Path(other) / "out", small, packed=True)(torch.zeros(1, 64))
    before = resident()
    model = build(name)
    if folder is not None:
        model = clado.load(folder, model, packed=True)
    return {"bytes": resident() - before, "packed": packed_bytes(model)}


def in_a_fresh_process(name: str, folder: str | None) -> dict[str, int]:
    code = "import sys, json; from bench.export.packed import held_by; print(json.dumps(held_by(*json.loads(sys.argv[1]))))"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([name, folder])], capture_output=True, text=True, check=True
    )
    held: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return held


def forward_times(models: dict[str, nn.Module], x: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of single forwards, the models taking turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            started = time.perf_counter()
            model(x)
            times[name].append(time.perf_counter() - started)
    return {name: values[1:] for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--group-size", type=int, default=-1)
    parser.add_argument("--json", help="write the result to this file")
    options = parser.parse_args()
    model = build(options.model)
    plan = random_plan(model, Quantizer(options.group_size, 2))
    result: dict[str, Any] = {"benchmark": "packed", "model": options.model, "avg_bits": plan.avg_bits, "forward": []}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        out = str(Path(folder) / "out")
        clado.export(model, plan, out)
        predicted = predicted_bytes(model, plan)
        small, float_ = in_a_fresh_process(options.model, out), in_a_fresh_process(options.model, None)
        packed = clado.load(out, model, packed=True)
        result["memory"] = {
            "predicted": sum(predicted),
            "packed": small["bytes"],
            "float": float_["bytes"],
            "packed over predicted": small["bytes"] / sum(predicted),
            "float over packed": float_["bytes"] / small["bytes"],
            "tensors": small["packed"],
            "tensors predicted": predicted[0],
        }
        wanted = clado.apply(model, plan)
        for batch in map(int, options.batches.split(",")):
            x = torch.randn(batch, *model.default_cfg["input_size"])
            if not torch.equal(packed(x), wanted(x)):
                raise SystemExit("packed: outputs must be those of clado.apply")
            times = forward_times({"float": wanted, "packed": packed}, x, options.rounds)
            medians = {name: statistics.median(values) for name, values in times.items()}
            ratios = [p / f for p, f in zip(times["packed"], times["float"], strict=True)]
            row = {"batch": batch, "seconds": medians, "packed over float": statistics.median(ratios)}
            result["forward"].append(row)
    result |= {"threads": torch.get_num_threads(), "machine": machine()}
    memory = result["memory"]
    print(
        f"{options.model}, {plan.avg_bits:.2f} bits: {memory['packed'] / 2**20:.1f} MiB in memory, "
        f"{memory['packed over predicted']:.3f} of the predicted bytes; float {memory['float over packed']:.1f}x as much"
    )
    for row in result["forward"]:
        ms = {name: f"{1e3 * value:.1f} ms" for name, value in row["seconds"].items()}
        ratio = f"{row['packed over float']:.2f}x"
        print(f"  batch {row['batch']}: float {ms['float']}, packed {ms['packed']}, {ratio}")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
