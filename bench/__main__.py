"""``python -m bench [op …] [--device cpu|cuda] [--threads n] [--json file]``: microbenchmarks of the kernels."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

from . import harness

OPS = sorted(p.stem.removeprefix("bench_") for p in (Path(__file__).parent / "ops").glob("bench_*.py"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=f"Microbenchmarks of: {', '.join(OPS)}.")
    parser.add_argument("ops", nargs="*", default=OPS, help="which ones; all when left out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write the rows to this file")
    options = parser.parse_args()
    unknown = sorted(set(options.ops) - set(OPS))
    if unknown:
        parser.error(f"ops must be among {', '.join(OPS)}, got {', '.join(unknown)}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for op in options.ops:
        module = importlib.import_module(f"bench.ops.bench_{op}")
        with torch.inference_mode():
            part = harness.measure(module.cases(options.device), options.device)
        harness.show(part)
        rows += part
    if options.json:
        harness.save(options.json, rows, options.device)


if __name__ == "__main__":
    main()
