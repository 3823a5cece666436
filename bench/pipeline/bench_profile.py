"""The profiler against the loops it replaces, on the same model and samples in one run.

    python -m bench.pipeline.bench_profile [--model digits|<timm name>] [--samples 128] [--pairs 400] [--json file]

Rivals, both with a full forward of the whole model per candidate and per pair:

- `plain`: the model is deep-copied and its weights fake-quantized (given scales) for every evaluation, as the public
  reference does;
- `pre-quantized`: quantized weights are prepared once and swapped in.

A loop over all pairs takes long, so it is timed on `--pairs` randomly drawn pairs (0: all) at its best batch size and scaled to
all evaluations; the losses it gives are compared with ours, those of pairs under `exact`, of candidates else. Rounds alternate,
the loops before and after every round of ours; medians count.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import clado
from clado.heap import heap
from clado.sensitivity import Sensitivity


def build(name: str, samples: int) -> tuple[nn.Module, Tensor]:
    if name == "digits":
        from clado.digits import load_data, load_model

        return load_model().eval(), load_data("sensitivity")[0][:samples]
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    return model, torch.randn(samples, *model.default_cfg["input_size"])


class Loop:
    """A full forward per evaluation, KL to the clean logits; `run(choice)` returns the mean loss."""

    def __init__(self, model: nn.Module, sens: Sensitivity, x: Tensor, plain: bool) -> None:
        self.model, self.sens, self.batches, self.plain = copy.deepcopy(model), sens, [x], plain
        self.weights = [self.model.get_parameter(layer.names[0]) for layer in sens.layers]
        self.clean = [w.detach().clone() for w in self.weights]
        self.variants = [sens.quantizer.fake_quant(w, sens.bits) for w in self.clean]
        self.scales = [[sens.quantizer.quantize(w, b)[1] for b in sens.bits] for w in self.clean]
        self.prepare(x.shape[0], x)

    def prepare(self, size: int, x: Tensor) -> None:
        self.batches = list(x.split(size))
        self.logs = [self.model(b).log_softmax(-1) for b in self.batches]

    def run(self, choice: list[tuple[int, int]]) -> float:
        model = copy.deepcopy(self.model) if self.plain else self.model
        for layer, m in choice:
            name = self.sens.layers[layer].names[0]
            model.get_parameter(name).copy_(self.quantized(layer, m))
        total = 0.0
        for batch, logs in zip(self.batches, self.logs, strict=True):
            out = model(batch).log_softmax(-1)
            total += (logs.exp() * (logs - out)).sum(dtype=torch.float64).item()
        if not self.plain:
            for layer, _ in choice:
                self.weights[layer].copy_(self.clean[layer])
        return total / sum(map(len, self.batches))

    def quantized(self, layer: int, m: int) -> Tensor:
        if not self.plain:
            return self.variants[layer][m]
        weight, bits = self.clean[layer], self.sens.bits[m]
        scale = self.scales[layer][m].reshape(-1)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


clock = time.perf_counter


def spread_out(model: nn.Module, x: Tensor, count: int | None) -> list[str]:
    """Layers to ignore, so that about `count` evenly spaced ones are left."""
    if count is None:
        return []
    from clado.capture import capture

    names = [layer.name for layer in capture(model, x[:2]).layers]
    kept = set(names[:: max(1, len(names) // count)])
    return [name for name in names if name not in kept]


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = clock()
    result = work()
    return clock() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=400, help="pairs the loops are timed on; 0: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, help="quantize about so many layers, evenly spaced; left out: all")
    parser.add_argument("--estimators", nargs="+", default=["logit", "exact"], choices=("logit", "exact"))
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds instead of wall time; with --threads 1")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write the result to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.cpu_time:
        global clock
        clock = time.process_time
    model, x = build(options.model, options.samples)

    ignore = spread_out(model, x, options.layers)

    def ours(estimator: str, count: int = len(x)) -> Sensitivity:
        return clado.profile(model, [x], estimator=estimator, num_samples=count, ignore=ignore, verbose=False)

    with torch.inference_mode():
        sens = ours("logit", 1)
        layers, width = len(sens.layers), len(sens.bits)
        pairs = [(v, w) for v in range(layers * width) for w in range(v) if v // width != w // width]
        evaluations = 1 + layers * width + len(pairs)
        drawn = np.random.default_rng(0).permutation(len(pairs))[: options.pairs or None]
        loops = {"pre-quantized": Loop(model, sens, x, plain=False), "plain": Loop(model, sens, x, plain=True)}
        for loop in loops.values():  # each at its best batch size
            sizes = sorted({min(len(x), s) for s in (16, 32, 64, 128, 256)})
            times = {}
            for size in sizes:
                loop.prepare(size, x)
                times[size] = statistics.median(
                    seconds(lambda loop=loop: loop.run([(0, 0), (1, 0)]))[0] for _ in range(5)
                )
            loop.prepare(min(times, key=times.__getitem__), x)

        measured: dict[str, list[float]] = {name: [] for name in (*options.estimators, *loops)}
        got: dict[tuple[int, int], float] = {}
        share = max(1, len(drawn) // (options.rounds + 1))

        def time_loops(r: int) -> None:
            part = [pairs[k] for k in drawn[r * share : (r + 1) * share]]
            choices = [[(v // width, v % width), (w // width, w % width)] for v, w in part]
            for name, loop in loops.items():
                with heap(keep=True):  # as for ours
                    took, losses = seconds(lambda loop=loop: [loop.run(c) for c in choices])
                measured[name].append(took / len(part) * evaluations)
                got.update(zip(part, losses, strict=True))

        time_loops(0)
        for r in range(options.rounds):
            for estimator in options.estimators:
                took, sens = seconds(lambda e=estimator: ours(e))
                measured[estimator].append(took)
            time_loops(r + 1)

        if options.estimators[-1] == "exact":  # KL(clean, clean) = 0, so a joint loss is ΔL_v + ΔL_w + Ω.
            expected = np.array([sens.delta_loss[v] + sens.delta_loss[w] + sens.interaction[v, w] for v, w in got])
            known = list(got.values())
        else:
            singles = sorted({v for pair in list(got)[:6] for v in pair})
            expected = sens.delta_loss[singles]
            known = [loops["pre-quantized"].run([(v // width, v % width)]) for v in singles]
    error = float(np.linalg.norm(np.array(known) - expected) / np.linalg.norm(expected))
    if error > 1e-3:
        raise SystemExit(f"bench_profile: losses must agree with the loops, relative error {error:.1e}")

    medians = {name: statistics.median(values) for name, values in measured.items()}
    result = {
        "benchmark": "profile",
        "model": options.model,
        "samples": len(x),
        "layers": layers,
        "bits": sens.bits,
        "evaluations": evaluations,
        "timed_pairs": len(got),
        "relative_error": error,
        "threads": options.threads,
        "forward_equivalents": {e: ours_info(model, x, e, ignore) for e in options.estimators},
        "suffix_sum_of_pairs": suffix_sum(model, x, width, ignore),
        "clock": "cpu" if options.cpu_time else "wall",
        "seconds": measured,
        "median_seconds": medians,
        "ratios": {f"{e} over {name}": medians[name] / medians[e] for e in options.estimators for name in loops},
        "machine": machine(),
    }
    print(
        f"{options.model}: {layers} layers, {evaluations:,} evaluations, {len(x)} samples, losses agree to {error:.0e}"
    )
    for name, value in medians.items():
        spread = (max(measured[name]) - min(measured[name])) / value
        print(
            f"  {name:14} {value:10.2f} s  ± {spread / 2:.0%}"
            + ("" if name in ("logit", "exact") else "  (scaled to all evaluations)")
        )
    for name, ratio in result["ratios"].items():
        print(f"  {name:26} {ratio:8.1f}x")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)


def ours_info(model: nn.Module, x: Tensor, estimator: str, ignore: list[str]) -> float:
    sens = clado.profile(
        model, [x[:1]], estimator=estimator, num_samples=1, scale_steps=1, ignore=ignore, verbose=False
    )
    return sens.info["forward_equivalents"]


def suffix_sum(model: nn.Module, x: Tensor, width: int, ignore: list[str]) -> float:
    """Σ over pairs of the share of a forward behind the later layer's cut: what `exact` cannot go below by prefixes."""
    from clado.capture import capture
    from clado.executor import Executor

    executor = Executor(capture(model, x[:2], ignore))
    executor.self_test(x[:2], model)
    return width**2 * sum(j * share for j, share in enumerate(executor.suffix_share))


def machine() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__, "clado_commit": commit}


if __name__ == "__main__":
    main()
