"""The profiler against the loops it replaces, on the same model, samples and precision in one run.

    python -m bench.pipeline.bench_profile [--model digits|<timm name>] [--samples 128] [--pairs 400] [--json file]
    python -m bench.pipeline.bench_profile --model vit_base_patch16_224 --samples 1024 --estimators logit --device cuda \\
        --precision bfloat16

Rivals, both with a full forward of the whole model per candidate and per pair:

- `plain`: the model is deep-copied and its weights fake-quantized (given scales) for every evaluation, as the public
  reference does;
- `pre-quantized`: quantized weights are prepared once and swapped in.

A loop over all pairs takes long, so it is timed on `--pairs` randomly drawn pairs (0: all) at its best batch size and scaled to
all evaluations. Losses are compared with those of a float32 loop, of pairs under `exact`, of candidates else. Rounds alternate,
the loops before and after every round of ours; medians count.

Beside the ratios: the share of the device's matrix rate, measured by one large product of torch in the precision (on a CPU torch
counts no flops of attention's products: of a ViT-S 8 % more than are counted), and on a CPU in float32 what part of a run is not
the model's own operators, while samples are measured and with capture and scale search.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import clado
from bench.harness import machine, times
from clado.artifacts import Sensitivity
from clado.common import heap
from clado.graph import full_precision, open_runner
from clado.graph.cuts import Cuts
from clado.profiling import Run

# Relative errors of losses, which are quadratic in δ: twice what is asked of δ.
LIMITS = {"float32": 1e-3, "tf32": 6e-3, "bfloat16": 4e-2}


def build(name: str, samples: int) -> tuple[nn.Module, Tensor]:
    if name == "digits":
        from clado.runs.digits import load_data, load_model

        return load_model().eval(), load_data("sensitivity")[0][:samples]
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    return model, torch.randn(samples, *model.default_cfg["input_size"])


class Loop:
    """A full forward per evaluation, KL to the clean logits; `run(choice)` returns the mean loss."""

    def __init__(self, model: nn.Module, sens: Sensitivity, x: Tensor, plain: bool, dtype: torch.dtype) -> None:
        self.model, self.sens, self.plain, self.dtype = copy.deepcopy(model).to(dtype), sens, plain, dtype
        self.weights = [self.model.get_parameter(layer.names[0]) for layer in sens.layers]
        self.clean = [w.detach().clone() for w in self.weights]
        self.source = [model.get_parameter(layer.names[0]).detach() for layer in sens.layers]
        self.variants = [sens.quantizer.fake_quant(w, sens.bits).to(dtype) for w in self.source]
        self.scales = [[sens.quantizer.quantize(w, b).scale for b in sens.bits] for w in self.source]
        self.prepare(x.shape[0], x)

    def prepare(self, size: int, x: Tensor) -> None:
        self.batches = list(x.to(self.dtype).split(size))
        self.logs = [self.log_probabilities(self.model, b) for b in self.batches]

    @staticmethod
    def log_probabilities(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).float().log_softmax(-1)

    def run(self, choice: list[tuple[int, int]]) -> float:
        model = copy.deepcopy(self.model) if self.plain else self.model
        for layer, m in choice:
            name = self.sens.layers[layer].names[0]
            model.get_parameter(name).copy_(self.quantized(layer, m))
        total = 0.0
        for batch, logs in zip(self.batches, self.logs, strict=True):
            out = self.log_probabilities(model, batch)
            total += (logs.exp() * (logs - out)).sum(dtype=torch.float64).item()
        if not self.plain:
            for layer, _ in choice:
                self.weights[layer].copy_(self.clean[layer])
        return total / sum(map(len, self.batches))

    def quantized(self, layer: int, m: int) -> Tensor:
        if not self.plain:
            return self.variants[layer][m]
        weight, bits = self.source[layer], self.sens.bits[m]
        scale = self.scales[layer][m].reshape(-1)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


class Watch:
    """While it is entered: seconds in the model's own operators, and in all that measures samples. Means little on a GPU, which
    works on after an operator has returned."""

    def __enter__(self) -> Watch:
        self.model = self.measuring = 0.0
        self.patches = [
            mock.patch.object(Cuts, "_build", self._timed_segments(Cuts._build)),
            mock.patch.object(Run, "gather", self._timed_gather(Run.gather)),
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()

    def _timed_segments(self, build: Any) -> Any:
        def built(*arguments: Any) -> Any:
            segment = build(*arguments)

            def function(*values: Any) -> Any:
                took, result = seconds(lambda: segment.function(*values))
                self.model += took * self.counts
                return result

            return replace(segment, function=function)

        return built

    def _timed_gather(self, gather: Any) -> Any:
        def gathered(*arguments: Any) -> Any:
            self.counts = 1
            took, result = seconds(lambda: gather(*arguments))
            self.counts = 0
            self.measuring += took
            return result

        self.counts = 0
        return gathered


clock = time.perf_counter


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = clock()
    result = work()
    return clock() - start, result


def spread_out(model: nn.Module, x: Tensor, count: int | None) -> list[str]:
    """Layers to ignore, so that about `count` evenly spaced ones are left."""
    if count is None:
        return []
    names = [layer.name for layer in open_runner(model, x, stacked=False).layers]
    kept = set(names[:: max(1, len(names) // count)])
    return [name for name in names if name not in kept]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=400, help="pairs the loops are timed on; 0: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, help="quantize about so many layers, evenly spaced; left out: all")
    parser.add_argument("--estimators", nargs="+", default=["logit", "exact"], choices=("logit", "exact"))
    parser.add_argument("--precision", default="float32", choices=tuple(LIMITS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--no-loops", action="store_true", help="losses are compared, but the loops are not timed")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds instead of wall time; with --threads 1")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write the result to this file")
    options = parser.parse_args(arguments)
    if 0 < options.pairs <= options.rounds:
        parser.error(f"--pairs must be 0 or more than --rounds, got {options.pairs}")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.cpu_time:
        global clock
        clock = time.process_time
    model, x = build(options.model, options.samples)
    with torch.inference_mode(), full_precision():
        result = measure(model.to(options.device), x.to(options.device), options)
    show(result)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)


def measure(model: nn.Module, x: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """What is written as JSON; exit code 1 where losses do not agree."""
    ignore, precision = spread_out(model, x, options.layers), options.precision

    def ours(estimator: str, count: int = len(x)) -> Sensitivity:
        sens = clado.profile(
            model,
            [x],
            estimator=estimator,
            num_samples=count,
            ignore=ignore,
            precision=precision,
            rounding="nearest",  # as the loops have it
            verbose=False,
        )
        if sens.info["precision"] != precision:
            raise SystemExit(f"bench_profile: {precision} must be kept, got {sens.info['warnings']}")
        return sens

    sens = ours("logit", min(2, len(x)))
    layers, width = len(sens.layers), len(sens.bits)
    pairs = [(v, w) for v in range(layers * width) for w in range(v) if v // width != w // width]
    evaluations = 1 + layers * width + len(pairs)
    drawn = [pairs[k] for k in np.random.default_rng(0).permutation(len(pairs))[: options.pairs or None]]
    loops = {} if options.no_loops else rivals(model, sens, x, precision)
    taken: dict[str, list[float]] = {name: [] for name in (*options.estimators, *loops)}
    found: dict[str, Sensitivity] = {}
    outside: dict[str, dict[str, float]] = {}
    share = max(1, len(drawn) // (options.rounds + 1))

    def time_loops(r: int) -> None:
        part = drawn[r * share : (r + 1) * share]
        with heap(keep=True), multiplying(precision):  # memory is kept as for ours
            for name, loop in loops.items():
                took = seconds(lambda loop=loop: [loop.run(choice(pair, width)) for pair in part])[0]
                taken[name].append(took / len(part) * evaluations)

    time_loops(0)
    for r in range(options.rounds):
        for estimator in options.estimators:
            with Watch() as watch:
                took, found[estimator] = seconds(lambda e=estimator: ours(e))
            taken[estimator].append(took)
            if options.device == "cpu" and precision == "float32":
                outside[estimator] = {
                    "while samples are measured": 1 - watch.model / watch.measuring,
                    "of all, with capture and scale search": 1 - watch.model / took,
                }
        time_loops(r + 1)

    error = worst_error(Loop(model, sens, x, False, torch.float32), found, drawn, width)
    if error > LIMITS[precision]:
        raise SystemExit(f"bench_profile: losses must agree with the loops, relative error {error:.1e}")
    medians = {name: statistics.median(values) for name, values in taken.items()}
    suffixes, flops = prefixes(model, x, width, ignore)
    rate, done = matrix_rate(options.device, precision), {e: s.info["forward_equivalents"] for e, s in found.items()}
    return {
        "benchmark": "profile",
        "model": options.model,
        "samples": len(x),
        "precision": precision,
        "layers": layers,
        "bits": sens.bits,
        "evaluations": evaluations,
        "timed_pairs": 0 if options.no_loops else min(len(drawn), share * (options.rounds + 1)),
        "relative_error": error,
        "forward_equivalents": done,
        "suffix_sum_of_pairs": suffixes,
        "clock": "cpu" if options.cpu_time else "wall",
        "seconds": taken,
        "median_seconds": medians,
        "ratios": {f"{e} over {name}": medians[name] / medians[e] for e in found for name in loops},
        "gigaflops_of_one_forward": flops / 1e9,
        "matrix_gigaflops_per_second": rate / 1e9,
        "share_of_matrix_rate": {e: done[e] * len(x) * flops / medians[e] / rate for e in found},
        "outside_the_model": outside,
        "machine": machine(options.device),
    }


def rivals(model: nn.Module, sens: Sensitivity, x: Tensor, precision: str) -> dict[str, Loop]:
    """Both loops, each at its best batch size."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    loops = {"pre-quantized": Loop(model, sens, x, False, dtype), "plain": Loop(model, sens, x, True, dtype)}
    with multiplying(precision):
        for loop in loops.values():
            times = {}
            for size in sorted({min(len(x), s) for s in (16, 32, 64, 128, 256)}):
                loop.prepare(size, x)
                runs = (seconds(lambda loop=loop: loop.run([(0, 0), (1, 0)]))[0] for _ in range(5))
                times[size] = statistics.median(runs)
            loop.prepare(min(times, key=times.__getitem__), x)
    return loops


def choice(pair: tuple[int, ...], width: int) -> list[tuple[int, int]]:
    """(layer, place of the width) of candidates."""
    return [(v // width, v % width) for v in pair]


def worst_error(loop: Loop, found: dict[str, Sensitivity], drawn: list[tuple[int, int]], width: int) -> float:
    """Largest relative error of losses, of some pairs under `exact` and of their candidates else."""
    errors = []
    for estimator, sens in found.items():
        some: list[tuple[int, ...]] = [(v,) for v in sorted({v for pair in drawn[:6] for v in pair})]
        expected = [float(sens.delta_loss[v]) for (v,) in some]
        if estimator == "exact":  # KL(clean, clean) = 0, so a joint loss is ΔL_v + ΔL_w + Ω
            some = list(drawn[:48])
            expected = [float(sens.delta_loss[v] + sens.delta_loss[w] + sens.interaction[v, w]) for v, w in some]
        known = np.array([loop.run(choice(candidates, width)) for candidates in some])
        errors.append(float(np.linalg.norm(known - expected) / np.linalg.norm(known)))
    return max(errors)


@contextmanager
def multiplying(precision: str) -> Iterator[None]:
    """The loops' float32 products as ours: in TF32 where that is the precision."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False


def matrix_rate(device: str, precision: str) -> float:
    """Flops per second of a large product."""
    size, dtype = (8192 if device == "cuda" else 2048), torch.bfloat16 if precision == "bfloat16" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    with multiplying(precision):
        return 2 * size**3 / statistics.median(times(lambda: left @ right, device, 0.5, 5))


def prefixes(model: nn.Module, x: Tensor, width: int, ignore: list[str]) -> tuple[float, float]:
    """(Σ over pairs of the share of a forward behind the later layer's cut: what `exact` cannot go below by prefixes; flops of
    a forward of one sample)."""
    runner = open_runner(model, x, ignore=ignore)
    with FlopCounterMode(display=False) as counter:
        model(x[:1])
    return width**2 * sum(j * share for j, share in enumerate(runner.suffix_share)), counter.get_total_flops()


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['model']}: {result['layers']} layers, {result['evaluations']:,} evaluations, {result['samples']} samples, "
        f"{result['precision']}, losses agree to {result['relative_error']:.0e}"
    )
    for name, value in result["median_seconds"].items():
        taken, ours = result["seconds"][name], name in result["forward_equivalents"]
        print(
            f"  {name:14} {value:10.2f} s  ± {(max(taken) - min(taken)) / value / 2:.0%}"
            + (f"  {result['share_of_matrix_rate'][name]:.0%} of the matrix rate" if ours else "  (scaled to all)")
        )
    for name, ratio in result["ratios"].items():
        print(f"  {name:26} {ratio:8.1f}x")
    for name, parts in result["outside_the_model"].items():
        print(f"  {name} outside the model: " + ", ".join(f"{part:.0%} {what}" for what, part in parts.items()))


if __name__ == "__main__":
    main()
