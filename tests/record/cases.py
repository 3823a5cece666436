"""What the record holds: every result of the pipeline on nets so small that all of it takes less than a minute.

Only public names are used, so that the record stands while everything behind them moves. What has no public name yet is
isolated in the first functions.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import clado
from tests.models import random_plan

from .nets import Unexportable, cnn, digits_vit, images, vit


def work_of(sens: clado.Sensitivity) -> float:
    """Forward-equivalents per sample that a matrix took."""
    return sens.info["forward_equivalents"]


def noted(plan: clado.Plan, name: str) -> Any:
    """What rerank, refine and correct note in a plan."""
    return plan.info[name]


def codes_of(quantizer: clado.Quantizer, weight: Tensor, bits: int) -> dict[str, Tensor]:
    """Codes, scales and zero points of a weight."""
    found = quantizer.quantize(weight, bits)
    parts = {"codes": found.codes, "scale": found.scale, "zero_point": found.zero_point}
    return {name: part for name, part in parts.items() if part is not None}


def values_of(quantizer: clado.Quantizer, weight: Tensor, bits: tuple[int, ...]) -> Tensor:
    """A weight quantized and dequantized at every width."""
    return quantizer.fake_quant(weight, bits)


# Other machines sum matrix products in another order, and an interaction is a small difference of losses. Measured between
# SSE, AVX2 and AVX-512, of the largest entry: 8e-6 in float32, 1e-14 in float64.
FLOAT32, FLOAT64 = 1e-4, 1e-12
# Rounded inputs and bfloat16 operands make a whole step of a last bit beside a tie: measured 8e-3.
STEPS = 5e-2
# The objective of a plan sums entries of both signs that are larger than it is: measured 8e-4.
SUMS = 1e-2


@dataclass
class Found:
    """One case's results by name.

    Attributes:
        exact: JSON that is the same on every machine: codes, scales, names, counts; bytes as digests.
        local: JSON that is the same on the same machine: what was chosen by comparing floats.
        floats: float64 arrays: the same bits on the same machine, elsewhere within ``tolerance`` of the largest.
    """

    exact: dict[str, Any] = field(default_factory=dict)
    local: dict[str, Any] = field(default_factory=dict)
    floats: dict[str, np.ndarray] = field(default_factory=dict)
    tolerance: float = FLOAT32


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums whose order does not depend on how many cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        yield Path(place)


# What results look like in the record.


def digest(value: Tensor | np.ndarray | bytes) -> str:
    """Of the bytes, with dtype and shape of a tensor."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()[:16]
    if isinstance(value, Tensor):
        value = value.detach().contiguous()
        kind, raw = str(value.dtype), value.reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        kind, raw = str(value.dtype), np.ascontiguousarray(value).tobytes()
    return f"{kind} {'x'.join(map(str, value.shape))} {digest(raw)}"


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: digest(value) for name, value in sorted(tensors.items())}


def matrix(sens: clado.Sensitivity, tolerance: float = FLOAT32) -> Found:
    """ΔL, and the upper triangles of Ω and of the standard errors, whose lower ones mirror them."""
    floats = {"delta_loss": sens.delta_loss}
    for name in ("interaction", "stderr"):
        full = getattr(sens, name)
        assert np.array_equal(full, full.T, equal_nan=True), name
        floats[name] = full[np.triu_indices(len(full))]
    layers = [[layer.name, layer.kind, list(layer.shape), layer.macs, list(layer.names)] for layer in sens.layers]
    exact = {"layers": layers, "bits": list(sens.bits), "samples": digest(sens.sample_digests)}
    return Found({**exact, "num_samples": sens.num_samples}, {"work": work_of(sens)}, floats, tolerance)


def plans(chosen: dict[str, clado.Plan], tolerance: float = SUMS) -> Found:
    """Which plan is best and how far its bound is driven, floats decide; how good it is, hardly."""
    found = Found(tolerance=tolerance)
    for name, plan in chosen.items():
        found.local[name] = {
            "bits": plan.bits,
            "status": plan.status,
            "usage": plan.usage,
            "named": plan.objective_name,
        }
        if plan.bits:
            found.floats[f"{name}.objective"] = np.array([plan.objective])
            found.local[name]["bound"] = f"{plan.bound:.8e}"
            found.floats[f"{name}.values"] = np.array([plan.values[key] for key in sorted(plan.values)])
    return found


def same(one: clado.Sensitivity, other: clado.Sensitivity) -> None:
    """Raise unless two matrices are the same bits."""
    for name in ("delta_loss", "interaction", "stderr"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name


# Matrices.


@cache
def net_of(name: str) -> nn.Module:
    return {"digits": digits_vit, "cnn": cnn, "vit": vit, "whole": lambda: Unexportable(cnn()).eval()}[name]()


def profiled(model: nn.Module, loader: Any, bits: tuple[int, ...] = (2, 3, 8), **options: Any) -> clado.Sensitivity:
    settings = {"num_samples": 8, "batch_size": 3, "scale_steps": 20, "quantize_ends": True, "verbose": False}
    settings["rounding"] = "nearest"  # whose weights do not depend on sums of another order
    return clado.profile(model, loader, bits, **{**settings, **options})


@cache
def digits_matrix(**options: Any) -> clado.Sensitivity:
    """The digits ViT without its ends, at widths 2, 4, 8."""
    options = {"bits": (2, 4, 8), "quantize_ends": False, "num_samples": 4, **options}
    return profiled(net_of("digits"), [images(4)], **options)


@cache
def small_matrix(net: str = "cnn", **options: Any) -> clado.Sensitivity:
    return profiled(net_of(net), [images(8)], **options)


def loss_per_sample(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return torch.nn.functional.cross_entropy(output, batch["label"], reduction="none")


def forward_of_dict(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["image"])


def user_matrix(estimator: str) -> Found:
    x, y = images(8)
    options: dict[str, Any] = {"loss_func": loss_per_sample, "forward_step": forward_of_dict, "estimator": estimator}
    return matrix(profiled(net_of("cnn"), [{"image": x, "label": y}], **options))


def interrupted() -> Found:
    """A run whose data fail after two chunks goes on to the bits of a run that nothing stopped."""
    x, y = images(8)
    batches = [(x[k : k + 2], y[k : k + 2]) for k in range(0, 8, 2)]
    options: dict[str, Any] = {"estimator": "corrected", "batch_size": 2, "exact_samples": 4}

    def failing() -> Iterator[Any]:
        yield from batches[:3]  # one ahead of the chunk that is measured
        raise OSError("no more data")

    with folder() as place:
        try:
            profiled(net_of("cnn"), failing(), output_dir=place / "run", **options)
        except (OSError, clado.CladoError):
            assert list((place / "run").iterdir()), "nothing was kept"
        else:
            raise AssertionError("the run was not interrupted")
        resumed = profiled(net_of("cnn"), batches, output_dir=place / "run", **options)
        same(resumed, clado.Sensitivity.load(place / "run"))
    same(resumed, profiled(net_of("cnn"), batches, **options))
    return matrix(resumed)


def grown() -> Found:
    """A run of four samples that is asked for eight."""
    options: dict[str, Any] = {"batch_size": 2}
    with folder() as place:
        profiled(net_of("cnn"), [images(8)], num_samples=4, output_dir=place, **options)
        sens = profiled(net_of("cnn"), [images(8)], output_dir=place, **options)
    same(sens, profiled(net_of("cnn"), [images(8)], **options))
    return matrix(sens)


def merged() -> Found:
    parts = [profiled(net_of("cnn"), [images(count, first)], num_samples=count) for first, count in ((0, 5), (5, 3))]
    return matrix(clado.Sensitivity.merge(parts))


# Plans.


def solved(**wishes: Any) -> Found:
    return plans({"plan": clado.solve(digits_matrix(estimator="logit"), seed=1, **wishes)})


def times() -> dict[str, dict[int, float]]:
    """Milliseconds that grow with size and width, not in proportion."""
    sens = digits_matrix(estimator="logit")
    return {
        layer.name: {b: (4 + b) * (k % 5 + layer.numel / 4096) / 64 for b in sens.bits}
        for k, layer in enumerate(sens.layers)
    }


def wishes() -> dict[str, dict[str, Any]]:
    """Budgets and wishes of the digits ViT by name."""
    sens = digits_matrix(estimator="logit")
    names = [layer.name for layer in sens.layers]
    four = clado.given_plan(sens, dict.fromkeys(names, 4))
    bitops = sum(layer.macs * 32 * 3 for layer in sens.layers)
    first = {name: {2: 3.0, 4: 1.0} for name in names[:8]}
    return {
        "avg_bits": {"avg_bits": 3.0},
        "size_bytes": {"size_bytes": int(0.8 * four.size_bytes)},
        "size_mb": {"size_mb": 0.7 * four.size_bytes / 2**20, "objective": "clipped"},
        "bitops": {"bitops": bitops, "objective": "shrunk"},
        "latency": {"latency_ms": sum(row[4] for row in times().values()), "latency": times()},
        "diagonal": {"avg_bits": 3.5, "objective": "diagonal"},
        "pins": {"avg_bits": 4.0, "pin": {names[0]: 8}, "forbid": {names[1]: (2, 8)}, "min_bits": {names[2]: 4}},
        "shared": {"avg_bits": 4.0, "max_bits": 4, "shared_layers": [names[:3], names[3:6]]},
        "two": {"avg_bits": 3.3, "size_bytes": int(0.82 * four.size_bytes), "solver": "heuristic"},
        "linear": {"avg_bits": 5.0, "constraints": [clado.LinearConstraint("first", first, 9.0)]},
        "conflict": {"avg_bits": 2.2, "constraints": [clado.LinearConstraint("first", first, 5.0)]},
    }


BUDGETS = (
    "avg_bits",
    "size_bytes",
    "size_mb",
    "bitops",
    "latency",
    "diagonal",
    "pins",
    "shared",
    "two",
    "linear",
    "conflict",
)


def budget(name: str) -> Found:
    return solved(**wishes()[name])


def front() -> Found:
    found = clado.pareto(digits_matrix(estimator="logit"), avg_bits=[2.5, 3.5, 5.0], solver="heuristic", seed=1)
    return plans({f"point {k}": plan for k, plan in enumerate(found)})


@cache
def shortlisted(**options: Any) -> tuple[clado.Plan, ...]:
    return tuple(clado.shortlist(small_matrix(**options), avg_bits=3.5, near=3, seed=1))


def listed() -> Found:
    first, *others = shortlisted()
    found = plans({"first": first})
    found.local["others"] = [[plan.objective_name, plan.objective, plan.bits] for plan in others]
    return found


def reranked(loss: str, **options: Any) -> Found:
    """The held-out loss of every plan of a shortlist; which of them are on it, floats decide."""
    best = clado.rerank(net_of("cnn"), [images(20, 100)], list(shortlisted(**options)), loss)
    rows = noted(best, "rerank")
    found = plans({"best": best}, STEPS if options else SUMS)
    found.floats["loss_increase"] = np.array([rows[0]["loss_increase"]])
    found.local["rows"] = [[row[name] for name in ("loss_increase", "behind", "stderr", "size_bytes")] for row in rows]
    return found


def corrected() -> Found:
    sens, plan = clado.correct(
        net_of("cnn"),
        [images(8)],
        small_matrix(),
        num_samples=5,
        batch_size=3,
        avg_bits=3.5,
        rounds=5,
        seed=1,
        verbose=False,
    )
    found, chosen = matrix(sens), plans({"plan": plan})
    local = {**chosen.local, "pairs": [row["pairs"] for row in noted(plan, "correct")]}
    return Found(found.exact, local, {**found.floats, **chosen.floats}, SUMS)


def refined() -> Found:
    sens = small_matrix()
    start = clado.given_plan(sens, {layer.name: 2 for layer in sens.layers})
    plan = clado.refine(net_of("cnn"), [images(8)], sens, start, rounds=2, batch_size=5, avg_bits=3.5, verbose=False)
    found = plans({"plan": plan})
    found.floats["start"] = np.array([noted(plan, "refine")[0]["loss_increase"]])
    found.local |= {name: noted(plan, name) for name in ("refine", "refine_loss", "refine_forward_equivalents")}
    return found


def evaluated() -> Found:
    plan = random_plan(net_of("vit"), clado.Quantizer(scale_steps=20))
    scores = [clado.evaluate(model, [images(20)]) for model in (net_of("vit"), clado.apply(net_of("vit"), plan))]
    return Found(floats={f"losses {k}": score.losses.numpy() for k, score in enumerate(scores)})


# Weights.

QUANTIZERS = {
    "channel": clado.Quantizer(),
    "tensor": clado.Quantizer(0, 20, False),
    "group": clado.Quantizer(5, 20),
    "asymmetric": clado.Quantizer(32, 20, False),
}


def quantized(name: str) -> Found:
    """Codes, scales and zero points at all widths, and the values in every dtype."""
    quantizer, found = QUANTIZERS[name], Found()
    for key, weight in net_of("vit").named_parameters():
        if weight.dim() in (2, 4):
            for bits in range(2, 9):
                parts = codes_of(quantizer, weight.detach(), bits)
                found.exact |= {f"{key} {bits} {part}": digest(value) for part, value in parts.items()}
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                values = values_of(quantizer, weight.detach().to(dtype), (2, 3, 8))
                found.exact[f"{key} {dtype}"] = digest(values)
    return found


def applied(net: str, name: str) -> Found:
    plan = random_plan(net_of(net), QUANTIZERS[name])
    return Found({"state": digests(clado.apply(net_of(net), plan).state_dict())})


def rounding() -> Found:
    """Rounded inputs: what apply and a loaded export make of them."""
    sens = small_matrix("vit", act_bits=8)
    plan = clado.given_plan(sens, {layer.name: sens.bits[k % 3] for k, layer in enumerate(sens.layers)})
    x, _ = images(4)
    with folder() as place, torch.no_grad():
        clado.export(net_of("vit"), plan, place / "out")
        loaded = [clado.load(place / "out", net_of("vit"), packed=packed)(x) for packed in (False, True)]
        outputs = clado.apply(net_of("vit"), plan)(x)
        plain = clado.apply(net_of("vit"), random_plan(net_of("vit"), plan.quantizer))(x)
    assert all(torch.equal(outputs, again) for again in loaded)
    return Found(floats={"outputs": outputs.double().numpy(), "plain": plain.double().numpy()}, tolerance=STEPS)


# Exports.


def written(model: nn.Module, plan: clado.Plan, place: Path, *arguments: Any, **options: Any) -> dict[str, int]:
    """Export to ``place``; the bytes that it says it wrote."""
    done = clado.export(model, plan, place, *arguments, **options)
    return {"quantized": done.quantized, "leftovers": done.leftovers}


def own_export(net: str, name: str) -> Found:
    model, plan = net_of(net), random_plan(net_of(net), QUANTIZERS[name])
    with folder() as place:
        sizes = written(model, plan, place / "out")
        held = digests(load_file(place / "out" / "model.safetensors"))
        fresh = {"cnn": cnn, "vit": vit}[net]()
        for tensor in fresh.state_dict().values():
            tensor.zero_()  # nothing may come from the module
        loaded, packed = (clado.load(place / "out", fresh, packed=flag).state_dict() for flag in (False, True))
    wanted = clado.apply(model, plan).state_dict()
    assert all(torch.equal(loaded[key], wanted[key]) for key in wanted)
    return Found({"bytes": sizes, "tensors": held, "packed": digests(packed)})


def compressed(name: str, odd_widths: str | None) -> Found:
    model, bits = net_of("vit"), (2, 4, 8) if odd_widths is None else range(2, 9)
    plan = random_plan(model, QUANTIZERS[name], bits)
    with folder() as place:
        sizes = written(model, plan, place / "out", "compressed-tensors", odd_widths=odd_widths)
        held = digests(load_file(place / "out" / "model.safetensors"))
        config = digest((place / "out" / "config.json").read_bytes())
    return Found({"bytes": sizes, "tensors": held, "config": config})


def onnx_graph(net: str, plan: clado.Plan, exact_ranges: bool = True, **options: Any) -> Found:
    """Initializers of the graph; those that torch's exporter names and folds, and the nodes, go by its version."""
    import onnx

    with folder() as place:
        sizes = written(net_of(net), plan, place / "out", "onnx", example=images(2)[0], **options)
        graph = onnx.load(place / "out" / "model.onnx").graph
    found = Found({"bytes": sizes})
    ours = (
        "weight_codes",
        "weight_scale",
        "weight_zero_point",
        *(("input_scale", "input_zero_point") if exact_ranges else ()),
    )
    for tensor in sorted(graph.initializer, key=lambda item: item.name):
        part = found.exact if tensor.name.endswith(ours) else found.local
        shape = "x".join(map(str, tensor.dims))
        part[tensor.name] = f"{onnx.TensorProto.DataType.Name(tensor.data_type)} {shape} {digest(_raw(onnx, tensor))}"
    kinds = [node.op_type for node in graph.node]
    found.local["nodes"] = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    return found


def _raw(onnx: Any, tensor: Any) -> bytes:
    """Raw bytes; small tensors may lie in a typed field."""
    return tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()


def onnx_export(net: str, name: str) -> Found:
    return onnx_graph(net, random_plan(net_of(net), QUANTIZERS[name]))


def onnx_given_ranges(net: str) -> Found:
    """Inputs rounded to 8 bits in ranges of the caller."""
    plan = random_plan(net_of(net), QUANTIZERS["channel"], (4, 8))
    return onnx_graph(net, plan, activations={layer.name: (-1.5, 2.25 + k) for k, layer in enumerate(plan.layers)})


def onnx_calibrated() -> Found:
    """Inputs rounded to 8 bits as the matrix was measured."""
    sens = small_matrix("vit", act_bits=8)
    plan = clado.given_plan(sens, {layer.name: sens.bits[k % 3] for k, layer in enumerate(sens.layers)})
    return onnx_graph("vit", plan, exact_ranges=False)


# All of it.

FIRST_BLOCKS = ("blocks.[0-4].*",)
ESTIMATORS = ("diagonal", "logit", "gradient", "corrected", "exact")


def _digits(estimator: str) -> Found:
    """The last three of eight blocks where pairs are measured."""
    pairs = (
        {"bits": (2, 4), "exact_samples": 2, "ignore": FIRST_BLOCKS}
        if estimator in ("gradient", "corrected", "exact")
        else {}
    )
    return matrix(digits_matrix(estimator=estimator, **pairs))


def _small(tolerance: float = FLOAT32, **options: Any) -> Found:
    return matrix(small_matrix(**options), tolerance)


def _all() -> dict[str, Callable[[], Found]]:
    cases: dict[str, Callable[[], Found]] = {}
    for name in ESTIMATORS:
        more = {"exact_samples": 4} if name == "corrected" else {}
        cases[f"digits {name}"] = partial(_digits, name)
        cases[f"cnn {name}"] = partial(_small, estimator=name, **more)
        cases[f"cnn {name} float64"] = partial(_small, FLOAT64, estimator=name, precision="float64", **more)
        cases[f"cnn {name} whole forwards"] = partial(_small, net="whole", estimator=name, **more)
    cases["digits float64"] = lambda: matrix(digits_matrix(precision="float64"), FLOAT64)
    cases["digits rounded inputs"] = lambda: matrix(digits_matrix(act_bits=8, ignore=FIRST_BLOCKS), STEPS)
    for name in ("logit", "gradient", "exact"):
        cases[f"cnn {name} cross-entropy"] = partial(_small, estimator=name, loss="cross_entropy")
        cases[f"cnn {name} rounded inputs"] = partial(_small, STEPS, estimator=name, act_bits=8)
    cases["digits bfloat16"] = lambda: matrix(digits_matrix(precision="bfloat16", bits=(2, 4)), STEPS)
    for name in ("bfloat16", "tf32"):
        cases[f"cnn {name}"] = partial(_small, STEPS, precision=name)
    cases["vit rounded inputs"] = partial(_small, STEPS, net="vit", act_bits=8)
    cases["cnn groups"] = partial(_small, group_size=3, symmetric=False)
    cases["cnn per tensor"] = partial(_small, group_size=0)
    cases["cnn ignored"] = partial(_small, ignore=("body.*",), quantize_ends=False)
    for name in ("diagonal", "gradient", "exact"):
        cases[f"user's loss {name}"] = partial(user_matrix, name)
    cases |= {"interrupted": interrupted, "grown": grown, "merged": merged}
    cases |= {f"plan {name}": partial(budget, name) for name in BUDGETS}
    cases |= {"pareto": front, "shortlist": listed}
    cases |= {f"rerank {loss}": partial(reranked, loss) for loss in ("kl", "cross_entropy")}
    cases["rerank rounded inputs"] = partial(reranked, "kl", act_bits=8)
    cases |= {"correct": corrected, "refine": refined, "evaluate": evaluated}
    cases |= {f"codes {name}": partial(quantized, name) for name in QUANTIZERS}
    for net, name in (("vit", "channel"), ("vit", "asymmetric"), ("cnn", "group"), ("cnn", "tensor")):
        cases[f"apply {net} {name}"] = partial(applied, net, name)
        cases[f"export {net} {name}"] = partial(own_export, net, name)
    cases["apply rounded inputs"] = rounding
    for name, odd in (("channel", None), ("asymmetric", "dense"), ("group", "padded"), ("tensor", "dense")):
        cases[f"compressed-tensors {name} {odd}"] = partial(compressed, name, odd)
    for net, name in (("vit", "channel"), ("vit", "asymmetric"), ("cnn", "tensor")):
        cases[f"onnx {net} {name}"] = partial(onnx_export, net, name)
    cases |= {f"onnx given ranges {net}": partial(onnx_given_ranges, net) for net in ("vit", "cnn")}
    cases["onnx rounded inputs"] = onnx_calibrated
    return cases


CASES = _all()


def found(name: str) -> Found:
    """The results of a case, by one thread."""
    with one_thread():
        return CASES[name]()
