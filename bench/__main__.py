"""``python -m bench``: microbenchmarks of the kernels, their comparison and their plot."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import compare, harness, overhead, plot

OPS = sorted(p.stem.removeprefix("bench_") for p in (Path(__file__).parent / "ops").glob("bench_*.py"))
DTYPES = ("float32", "bfloat16", "float16", "float64", "int8")
# Of functions that --rival takes, by the op of their rows.
SIGNATURES = {
    "batched_ce": "(logits, delta[, target]) -> increase [V, N]",
    "carried_add_layer_norm": "(clean, residual, branch, weight, eps, bfloat16) -> (sum, change of the norm)",
    "carried_gelu": "(clean, delta, bfloat16) -> change",
    "carried_layer_norm": "(clean, delta, weight, eps, bfloat16) -> change",
    "carried_softmax": "(scores, clean, delta, scale, bfloat16) -> change and value, side by side",
    "compensate": "(weight, factor, scale, bits) -> (codes [B, N, K], loss [B, N])",
    "fake_quant": "(weight, scale, bits) -> values [B, N, K], or (values, squared errors [B, N])",
    "fake_quant_formats": "(weight, scales) -> values [F, N, K], or (values, squared errors [F, N])",
    "pack": "(codes, bits) -> words",
    "pairwise_bce": "(logits, delta, weight, rows_per_sample) -> (sums [V, V], sums of squares [V, V])",
    "pairwise_ce": "(logits, delta[, weight, rows_per_sample]) -> (sums [V, V], sums of squares [V, V])",
    "pairwise_mse": "(delta) -> (sums [V, V], sums of squares [V, V])",
    "quantize_weight": "(weight, bits, group_size, steps) -> (values, squared errors, scale, zero_point or None)",
    "scale_errors": "(weight, scale, low, high) -> errors [S, N, groups]",
    "scale_search": "(weight, bits, group_size, steps[, importance]) -> scale [B, N, groups]",
    "unpack": "(words, bits, columns) -> codes",
}
EXAMPLES = """examples:
  python -m bench                                              every op at its own shapes
  python -m bench list                                         the ops
  python -m bench fake_quant --shape 768x3072 --dtype bfloat16 --threads 1 2 --json new.json
  python -m bench pairwise_ce --shape 2000x4x21843             V perturbations, N samples, C classes
  python -m bench overhead                                     what a call costs beside its kernel
  python -m bench compare old.json new.json                    faster, slower or within the noise; exit code 1 if slower
  python -m bench plot new.json --out share.svg                share of the ceiling by size
  python -m bench fake_quant --rival mypackage.ops:my_fake_quant --rival other.ops:theirs
  python -m bench bitpack --rival pack=mypackage.ops:my_pack   OP= where rows have another name than the benchmark

a rival, MODULE:FUNCTION, is one more way to a row's result. It is called by position with what our op of that row gets, which it
must not write to, and returns what ours returns, as in the docstring of clado_ext.OP. Its first result of every row is checked
as ours is; a wrong one is said in one line and not timed. It is called under torch.inference_mode, on --device, and follows
torch's number of threads where it can:
  """ + "\n  ".join(f"{op}{signature}" for op, signature in SIGNATURES.items())


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
    help_rival = "time this function beside ours (may be repeated); what it has to take and return stands below"
    parser.add_argument("--rival", action="append", default=[], metavar="[OP=]MODULE:FUNCTION", help=help_rival)
    options = parser.parse_args(arguments)
    if options.ops == ["list"]:
        for op in OPS:
            print((_module(op).__doc__ or op).splitlines()[0])
        return 0
    unknown = sorted(set(options.ops) - {*OPS, "overhead"})
    if unknown:
        parser.error(f"ops must be list, overhead or among {', '.join(OPS)}, got {', '.join(unknown)}")
    try:
        outside = _outside(options.rival, options.ops)
    except ValueError as error:
        parser.error(str(error))
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
                    part = harness.measure(_module(op).cases(grid), options.device, options.seconds, outside)
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
    met = {(row["op"], name) for row in rows for name in (*row["rivals_s"], *row.get("rivals_failed", ()))}
    missed = [
        f"{name} is left out: no row of {op} was timed"
        for op in outside
        for name in outside[op]
        if (op, name) not in met
    ]
    print(*missed, sep="\n", end="\n" if missed else "", file=sys.stderr)
    return 2 if missed else 0


def _outside(given: list[str], ops: list[str]) -> harness.Outside:
    """Functions by op and name of ``[OP=]MODULE:FUNCTION``; ``ValueError`` with one line for what cannot be had."""
    outside: harness.Outside = {}
    for text in given:
        op, _, name = text.rpartition("=")
        op = op or (ops[0] if len(ops) == 1 else "")
        if op not in SIGNATURES:
            raise ValueError(f"rival must be OP={name} with OP among {', '.join(SIGNATURES)}, got {text}")
        outside.setdefault(op, {})[name] = _function(name)
    return outside


def _function(name: str) -> Callable[..., Any]:
    module, _, path = name.partition(":")
    if not module or not path:
        raise ValueError(f"rival must be MODULE:FUNCTION, got {name}")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # a module may raise anything
        why = " ".join(str(error).split())
        raise ValueError(
            f"rival must be a function that can be imported, got {name}: {type(error).__name__}: {why}"
        ) from error
    if not callable(found):
        raise ValueError(f"rival must be a function, got {name}, of type {type(found).__name__}")
    return found  # type: ignore[no-any-return]


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
