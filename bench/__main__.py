"""``python -m bench``: microbenchmarks of the kernels, their comparison and their plot."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

from . import compare, harness, overhead, plot

OPS = sorted(p.stem.removeprefix("bench_") for p in (Path(__file__).parent / "ops").glob("bench_*.py"))
DTYPES = ("float32", "bfloat16", "float16", "float64", "int8")
EXAMPLES = """examples:
  python -m bench                                              every op at its own shapes
  python -m bench list                                         the ops
  python -m bench fake_quant --shape 768x3072 --dtype bfloat16 --threads 1 2 --json new.json
  python -m bench pairwise_ce --shape 2000x4x21843             V perturbations, N samples, C classes
  python -m bench overhead                                     what a call costs beside its kernel
  python -m bench compare old.json new.json                    faster, slower or within the noise; exit code 1 if slower
  python -m bench plot new.json --out share.svg                share of the ceiling by size"""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        return compare.main(arguments[1:])
    if arguments[:1] == ["plot"]:
        return plot.main(arguments[1:])
    parser = argparse.ArgumentParser(
        "python -m bench", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", help=f"list, overhead, or any of: {', '.join(OPS)}; all when left out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", nargs="+", type=_shape, default=[], help="e.g. 768x3072, or 150x256x1000 for V N C")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=[])
    parser.add_argument("--threads", nargs="+", type=_threads, default=[torch.get_num_threads()], help="of the CPU")
    parser.add_argument("--seconds", type=float, default=0.5, help="per case and contender")
    parser.add_argument("--json", help="write the rows to this file")
    options = parser.parse_args(arguments)
    if options.ops == ["list"]:
        for op in OPS:
            print((_module(op).__doc__ or op).splitlines()[0])
        return 0
    unknown = sorted(set(options.ops) - {*OPS, "overhead"})
    if unknown:
        parser.error(f"ops must be list, overhead or among {', '.join(OPS)}, got {', '.join(unknown)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("device must be cpu where torch sees no GPU, got cuda")
    if options.json:
        try:  # before minutes of timing
            harness.prepare(options.json)
        except OSError as error:
            parser.error(f"json must be a file that can be written, got {options.json}: {error.strerror}")
    grid = harness.Grid(options.device, tuple(options.shape), tuple(options.dtype))
    rows, more = [], {}
    for op in options.ops or [*OPS, "overhead"]:
        if op == "overhead":
            more["overhead_us"] = overhead.measure(options.device)
            overhead.show(more["overhead_us"])
            continue
        for threads in options.threads if options.device == "cpu" else [1]:
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            try:
                with torch.inference_mode():
                    part = harness.measure(_module(op).cases(grid), options.device, options.seconds)
                if not part:
                    raise harness.Unfit("device, shape and dtype must be its own, got others")
            except harness.Unfit as error:
                print(f"{op} is left out: {error}", file=sys.stderr)
                break
            harness.show(part)
            rows += part
    if not rows and not more:
        return 2
    if options.json:
        harness.save(options.json, rows, options.device, **more)
    return 0


def _module(op: str):  # type: ignore[no-untyped-def]
    return importlib.import_module(f"bench.ops.bench_{op}")


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) if part.isdecimal() else 0 for part in text.split("x"))
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"shape must be sizes joined by x, each at least 1, got {text}")
    return sizes


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"threads must be a number of at least 1, got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
