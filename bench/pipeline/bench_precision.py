"""Carried precisions against float64 (errors) and against float32 and the plain forward (speed), in one run.

    python -m bench.pipeline.bench_precision [--model vit_small_patch16_224] [--samples 4] [--layers 12] [--json file]

Errors are of δ, the logit change, per candidate: relative norm over samples and classes, the worst and the median candidate at
each bit-width. Speed is CPU time (of one thread by default: a shared machine does not count) per forward-equivalent, the
multiply-adds of the model's own forward, in the perturbed forwards of `--layers` layers; the clean forward that a batch shares is
left out, or shared over the candidates of all layers where a ratio says so. `plain` is the model itself in the same precision at
the best of several batch sizes. Rounds alternate, medians count.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import machine
from bench.pipeline.bench_profile import build
from clado.common import heap
from clado.graph import Runner, full_precision
from clado.graph.capture import Captured, capture
from clado.graph.carried import CarriedExecutor
from clado.graph.executor import Executor
from clado.profiling.estimators.base import singles
from clado.profiling.losses import Categorical
from clado.quant import Candidates, Quantizer, Variant
from clado.quant import variants as variants_of

BITS = (2, 4, 8)
LIMITS = {"tf32": 3e-3, "bfloat16": 2e-2}


def deltas(executor: Runner, variants: list[list[Variant]], x: Tensor) -> Tensor:
    return singles(executor, variants, x, Categorical(), lambda: None).delta


def errors(delta: Tensor, wanted: Tensor) -> dict[str, list[float]]:
    relative = (delta.double() - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    widths = [relative[m :: len(BITS)] for m in range(len(BITS))]
    return {"worst": [w.max().item() for w in widths], "median": [w.median().item() for w in widths]}


def some(captured: Captured, count: int) -> Captured:
    """Every n-th layer, n odd: the blocks of a transformer have four, and each kind should be met."""
    step = max(1, len(captured.layers) // count) | 1
    return replace(captured, layers=captured.layers[::step], sources=captured.sources[::step])


class Timed:
    """Seconds per forward-equivalent and sample of the perturbed forwards alone."""

    def __init__(self, executor: Executor, variants: list[list[Variant]], x: Tensor) -> None:
        self.executor, self.variants, self.x = executor, variants, x
        self.seconds: list[float] = []

    def round(self) -> None:
        executor = self.executor
        state = executor.start(self.x)
        spent = done = 0.0
        for k in range(executor.num_layers):
            state = executor.advance(state, k)
            start, before = time.process_time(), executor.work
            executor.finish(executor.fork(state, k, self.variants[k]))
            spent, done = spent + time.process_time() - start, done + executor.work - before
        self.seconds.append(spent / done)

    def forget(self) -> None:
        self.seconds.clear()

    def median(self) -> float:
        return statistics.median(self.seconds)


class Plain:
    """Seconds per forward and sample of a model at the best of several batch sizes."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.batches = model, [x.repeat(n, 1, 1, 1) for n in (1, len(BITS), 2 * len(BITS))]
        self.seconds: list[list[float]] = [[] for _ in self.batches]

    def round(self) -> None:
        for batch, seconds in zip(self.batches, self.seconds, strict=True):
            start = time.process_time()
            self.model(batch)
            seconds.append((time.process_time() - start) / len(batch))

    def forget(self) -> None:
        for seconds in self.seconds:
            seconds.clear()

    def median(self) -> float:
        return min(map(statistics.median, self.seconds))


class Clean(Timed):
    """Seconds per sample of the clean forward that a batch shares."""

    def round(self) -> None:
        start = time.process_time()
        self.executor.start(self.x.clone())
        self.seconds.append((time.process_time() - start) / len(self.x))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--timed-samples", type=int, default=4, help="samples per batch while timing")
    parser.add_argument("--layers", type=int, default=12, help="about how many layers are perturbed, evenly spaced")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the result to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, x = build(options.model, options.samples)
    with heap(keep=True), full_precision():
        result = measure(model, x, options)
    print(json.dumps(result, indent=1))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)


def measure(model: nn.Module, x: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    every = capture(model, x[:2])
    captured = some(every, options.layers)
    variants = variants_of(model, Candidates.uniform(captured.layers, BITS), Quantizer(-1, 95), x.device, torch.float32)
    double = Executor(some(capture(copy.deepcopy(model).double(), x[:2].double()), options.layers))
    wanted = deltas(double, [[w.to(torch.float64) for w in v] for v in variants], x.double())
    plain = Executor(captured)
    found = {"float32, plain forward": errors(deltas(plain, variants, x), wanted)}
    for precision in ("float32", "tf32", "bfloat16"):
        got = errors(deltas(CarriedExecutor(captured, precision), variants, x), wanted)
        found[f"{precision}, carried"] = got
        if max(got["worst"]) > LIMITS.get(precision, 1e-3):
            raise SystemExit(f"bench_precision: {precision} must stay below its limit, got {got}")

    x = x[: options.timed_samples]
    plain.self_test(x[:2], model)
    low = CarriedExecutor(captured, "bfloat16", plain.cuts)
    low.take_costs(plain)
    whole = Executor(every)
    whole.self_test(x[:2], model)
    evaluated = sum(whole.suffix_share) * len(BITS)
    half = copy.deepcopy(model).bfloat16()
    timed: dict[str, Timed | Plain] = {
        "float32": Timed(plain, variants, x),
        "bfloat16, carried": Timed(low, variants, x),
        "carried, clean forward": Clean(CarriedExecutor(captured, "bfloat16"), variants, x),
        "float32, plain forward": Plain(model, x),
        "bfloat16, plain forward": Plain(half, x.bfloat16()),
    }
    for turn in range(options.rounds + 1):
        for one in timed.values():
            one.round()
            if turn == 0:  # warm-up
                one.forget()
    medians = {name: one.median() for name, one in timed.items()}
    carried, half_forward = medians["bfloat16, carried"], medians["bfloat16, plain forward"]
    shared = (medians["carried, clean forward"] + evaluated * carried) / (1 + evaluated)
    return {
        "benchmark": "precision",
        "model": options.model,
        "samples": options.samples,
        "layers": len(captured.layers),
        "bits": BITS,
        "delta_error": found,
        "threads": options.threads,
        "cpu_milliseconds_per_forward": {name: 1e3 * value for name, value in medians.items()},
        "ratios": {
            "carried bfloat16 over float32": medians["float32"] / carried,
            "carried bfloat16, time over plain bfloat16 forward": carried / half_forward,
            "carried bfloat16 with its clean forward, time over plain bfloat16 forward": shared / half_forward,
            "float32, time over plain float32 forward": medians["float32"] / medians["float32, plain forward"],
        },
        "machine": machine(),
    }


if __name__ == "__main__":
    main()
