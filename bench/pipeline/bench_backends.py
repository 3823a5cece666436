"""Other tools as they are and on our kernels, in turn: the same decisions first, then where the time goes and what is saved.

    python -m bench.pipeline.bench_backends [--only vit_small] [--pairs 3] [--threads 1] [--json file]

A row is one call of the tool on a timm net with random weights. Its outcome (scales, scores, recipe, outputs) has to be the same
bit for bit. Seconds are CPU time, which a busy machine stretches less than the clock; ratios are medians over pairs of calls that
follow each other. For each part of the call that is replaced: its share of the tool's own call, how much faster it became, and
from both what the whole call should gain, 1 / (1 - Σ share + Σ share / ratio), beside what it does gain.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import clado
from bench.harness import machine, quiet
from bench.study.modelopt import integers, searched

BITS = (2, 4, 8)


@dataclass(frozen=True)
class Row:
    """One call of a tool.

    Attributes:
        tool, package, name: for ``clado.backend``, its version, and the table.
        call: runs the tool and returns what has to be the same.
        parts: what is replaced: (module, function) by name; a part may not lie in another.
    """

    tool: str
    package: str
    name: str
    call: Callable[[], dict[str, Any]]
    parts: dict[str, tuple[str, str]]


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=100).eval()
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # ModelOpt's gradient method forbids it
    return model


def amax(model: nn.Module) -> dict[str, Tensor]:
    return {name: x for name, x in model.state_dict().items() if name.endswith("_amax")}


def auto_quantize(model: nn.Module, size: int, batch: int, method: str) -> dict[str, Any]:
    torch.manual_seed(1)
    batches = [(torch.randn(batch, 3, size, size), torch.randint(0, 100, (batch,)))]
    found, state = searched(model, 4.0, list(map(integers, BITS)), batches, method, num_score_steps=1)
    recipe = {name: str(chosen) for name, chosen in state["best"]["recipe"].items()}
    scores = {name: stats["scores"] for name, stats in state["candidate_stats"].items()}
    return {"recipe": recipe, "scores": scores, "scales": amax(found)}


def quantize(model: nn.Module) -> dict[str, Any]:
    import modelopt.torch.quantization as mtq

    return {"scales": amax(mtq.quantize(copy.deepcopy(model), integers(4)))}


def layerwise_quantize(model: nn.Module, size: int) -> dict[str, Any]:
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.nn import QuantConv2d, QuantLinear
    from brevitas.quant import Int8WeightPerChannelFloatMSE

    torch.manual_seed(1)
    settings = {"weight_quant": Int8WeightPerChannelFloatMSE.let(bit_width=4), "return_quant_tensor": False}
    layers = {nn.Linear: (QuantLinear, settings), nn.Conv2d: (QuantConv2d, settings)}
    quantized = layerwise_quantize(copy.deepcopy(model), layers)
    with torch.no_grad():
        output = quantized(torch.randn(8, 3, size, size))
    return {"output": output, "scales": quantized.state_dict()}


SEARCH = {"scale search": ("modelopt.torch.quantization.calib.mse", "MseCalibrator.collect")}
FORWARDS = {
    "forwards of calibration": ("modelopt.torch.quantization.algorithms", "_AutoQuantizeBaseSearcher._run_func")
}
SCORING = {
    "scoring": ("modelopt.torch.quantization.algorithms", "AutoQuantizeKLDivSearcher.estimate_sensitivity_scores")
}


def rows() -> Iterator[Row]:
    own = partial(Row, "modelopt", "nvidia-modelopt")
    for name, size in (("vit_small_patch16_224", 224), ("resnet18", 224)):
        model = net(name)
        call = partial(auto_quantize, model, size, 8, "gradient")
        yield own(f"auto_quantize gradient, {name}, 8 images", call, SEARCH | FORWARDS)
        yield own(f"quantize W4, {name}", partial(quantize, model), SEARCH)
        search = {"scale search": ("brevitas.core.stats.stats_op", "MSE.mse_search")}
        call = partial(layerwise_quantize, model, size)
        yield Row("brevitas", "brevitas", f"layerwise_quantize W4 and a forward of 8, {name}", call, search)
    for name, size in (("vit_tiny_patch16_224", 224), ("resnet18", 128)):  # a forward per layer and width
        call = partial(auto_quantize, net(name), size, 1, "kl_div")
        yield own(f"auto_quantize kl_div, {name} at {size} px, 1 image", call, SEARCH | FORWARDS | SCORING)


@contextmanager
def timed(parts: dict[str, tuple[str, str]], spent: dict[str, float]) -> Iterator[None]:
    """Adds the CPU seconds of each part, as it stands now, to ``spent``."""

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if name == "forwards of calibration" and not str(kwargs.get("desc", "")).startswith("Calibrating"):
                return function(*args, **kwargs)
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0.0) + time.process_time() - start

        return run

    with contextlib.ExitStack() as stack:
        for name, (module, path) in parts.items():
            owner: Any = import_module(module)
            *holders, attribute = path.split(".")
            for holder in holders:
                owner = getattr(owner, holder)
            stack.callback(setattr, owner, attribute, vars(owner)[attribute])
            setattr(owner, attribute, wrap(name, vars(owner)[attribute]))
        yield


def run(row: Row) -> tuple[dict[str, Any], dict[str, float]]:
    """What the call returns; CPU seconds of the whole and of its parts."""
    spent: dict[str, float] = {}
    with quiet(), timed(row.parts, spent):
        start = time.process_time()
        outcome = row.call()
        spent["whole"] = time.process_time() - start
    return outcome, spent


def differences(a: Any, b: Any) -> list[str]:
    """Where two outcomes differ; nothing where every bit is the same."""
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return ["names"]
        return [f"{key}: {what}" for key in a for what in differences(a[key], b[key])]
    same = torch.equal(a, b) if isinstance(a, Tensor) else a == b
    return [] if same else ["values"]


def measured(row: Row, pairs: int) -> dict[str, Any]:
    theirs, ours, ran = [], [], ""
    for _ in range(pairs):
        wanted, before = run(row)
        with clado.backend(row.tool) as used:
            got, after = run(row)
        ran = str(used)
        if found := differences(wanted, got):
            raise AssertionError(f"{row.name}: {'; '.join(found[:5])}")
        theirs.append(before)
        ours.append(after)
    whole = statistics.median(x["whole"] for x in theirs)
    parts = {}
    for name in row.parts:
        if name in theirs[0]:
            ratio = statistics.median(x[name] / max(y.get(name, 0.0), 1e-6) for x, y in zip(theirs, ours, strict=True))
            seconds = statistics.median(x[name] for x in theirs)
            parts[name] = {"seconds": seconds, "share": seconds / whole, "faster": ratio}
    rest = 1 - sum(x["share"] for x in parts.values())
    return {
        "tool": f"{row.package} {version(row.package)}",
        "call": row.name,
        "same": True,
        "seconds": whole,
        "parts": parts,
        "expected": 1 / (rest + sum(x["share"] / x["faster"] for x in parts.values())),
        "faster": statistics.median(x["whole"] / y["whole"] for x, y in zip(theirs, ours, strict=True)),
        "pairs": [[x["whole"], y["whole"]] for x, y in zip(theirs, ours, strict=True)],
        "ran": ran,
    }


def shown(result: dict[str, Any]) -> str:
    lines = [f"{result['tool']}: {result['call']}: same bits, {result['seconds']:.1f} s of CPU time as it is"]
    for name, part in result["parts"].items():
        lines.append(f"  {name}: {100 * part['share']:.0f} % of the call, {part['faster']:.1f}× faster")
    terms = " + ".join(f"{x['share']:.3f}/{x['faster']:.1f}" for x in result["parts"].values())
    rest = 1 - sum(x["share"] for x in result["parts"].values())
    lines.append(f"  whole call: {result['faster']:.2f}×; 1/({rest:.3f} + {terms}) = {result['expected']:.2f}×")
    return "\n".join([*lines, f"  {result['ran']}"])


def write(path: str, results: dict[str, Any]) -> None:
    """Replaces the file, after every row; the load says whether the machine was busy."""
    load = {"cores": os.cpu_count(), "load_average": list(os.getloadavg())}
    written = {"benchmark": "backends", "machine": machine() | load, **results}
    Path(path).write_text(json.dumps(written, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose tool or name holds this")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for row in rows():
        if args.only in f"{row.tool} {row.name}":
            results.append(measured(row, args.pairs))
            print(shown(results[-1]), flush=True)
            if args.json:
                write(args.json, {"threads": args.threads, "results": results})


if __name__ == "__main__":
    main()
