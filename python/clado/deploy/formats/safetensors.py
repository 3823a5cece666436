"""clado's own format: packed codes of every number format, scales, float leftovers, the plan and its certificate in one file."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...artifacts import Plan
from ...common import CladoError, digest, require, tensor_digest
from ...quant import Layer, Quantized, with_rounded_inputs
from ..applied import dequantized
from ..nn import replace_layers
from . import base

SCHEMA = 2
MODEL_FILE = "model.safetensors"
_HEADER = "clado.model"
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}

Request = base.Request[base.NoOptions]


def write(request: Request, folder: Path) -> tuple[int, int]:
    from safetensors.torch import save_file

    plan, state = request.plan, request.state
    tensors: dict[str, Tensor] = {}
    for layer in plan.layers:
        packed = request.codes[layer.name].packed()
        tensors |= {f"{layer.name}.{part}": value for part, value in packed.items()}
    clash = [name for name in tensors if name in state]
    require(not clash, "export", "model", "have no tensors named like packed weights", clash[:1])
    leftovers = request.leftovers(_covered(plan))
    header = {
        "schema": SCHEMA,
        "plan": json.loads(plan.to_json()),
        "dtypes": {layer.name: str(state[layer.names[0]].dtype).removeprefix("torch.") for layer in plan.layers},
    }
    header["digest"] = _digest(header, tensors | leftovers)
    save_file(tensors | leftovers, folder / MODEL_FILE, metadata={_HEADER: json.dumps(header)})
    return sum(t.nbytes for t in tensors.values()), sum(t.nbytes for t in leftovers.values())


def predict(request: Request) -> tuple[int, int]:
    return request.plan.size_bytes, request.leftover_bytes(_covered(request.plan))


def verify(request: Request, folder: Path) -> str:
    again = load(folder, request.model).state_dict()
    wanted = dequantized(request.model, request.plan, request.codes).state_dict()
    same = all(torch.equal(again[name], value.to(again[name].device)) for name, value in wanted.items())
    require(same, "verify", "export", "load back to the weights of clado.apply", "other weights")
    return "loaded back bit for bit"


def load(folder: Path, model: nn.Module, packed: bool = False) -> nn.Module:
    """See :func:`clado.load`."""
    plan, dtypes, tensors = read(folder)
    loaded = copy.deepcopy(model)
    state = {name: value for name, value in loaded.state_dict().items() if isinstance(value, Tensor)}
    held = {layer.name: _taken(plan, layer, tensors) for layer in plan.layers}
    values: dict[str, Tensor] = {}
    for layer in plan.layers:
        rows = held[layer.name].values(dtypes[layer.name])
        shapes = {name: state[name].shape if name in state else layer.shape for name in layer.names}
        fit = all(layer.fits(shape) for shape in shapes.values())
        values |= {name: layer.parameter(rows, shape) if fit else rows for name, shape in shapes.items()}
    values |= tensors
    _fit(values, state)
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)
    if packed:
        replace_layers(loaded, plan, held)
    return with_rounded_inputs(loaded, plan.layers, plan.chosen, plan.activations)


def read(folder: Path) -> tuple[Plan, dict[str, torch.dtype], dict[str, Tensor]]:
    """Plan, dtype of every planned weight, and tensors of an export, checked against each other and their digest."""
    from safetensors import safe_open

    path = folder / MODEL_FILE
    require(os.path.isfile(path), "load", "path", "be a folder written by clado export", folder)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
            require(isinstance(header, dict), "load", "file", "be a clado export", path)
            require(header.get("schema") == SCHEMA, "load", "schema", f"be {SCHEMA}", header.get("schema"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        sealed = _digest(header, tensors) == header["digest"]
        require(sealed, "load", "file", "hold what was written", f"damaged data in {path}")
        plan = Plan.from_json(json.dumps(header["plan"]))
        dtypes = {layer.name: _DTYPES[header["dtypes"][layer.name]] for layer in plan.layers}
        for layer in plan.layers:
            require(bool(layer.names), "load", "file", "name the parameters of its layers", f"none for {layer.name}")
            _check_layer(plan, layer, tensors)
        return plan, dtypes, tensors
    except CladoError:
        raise
    except Exception as error:  # safetensors, json and torch each have exceptions of their own for foreign files
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CladoError(f"load: file must be a whole clado export, got {path} ({reason})") from None


def _taken(plan: Plan, layer: Layer, tensors: dict[str, Tensor]) -> Quantized:
    """A layer's weight out of the tensors of a file, which lose its parts."""
    number = plan.chosen[layer.name].number
    parts = {part: tensors.pop(f"{layer.name}.{part}") for part in number.stored(layer.shape, plan.quantizer)}
    return Quantized.unpacked(number, layer.shape, parts, plan.quantizer)


def _check_layer(plan: Plan, layer: Layer, tensors: Mapping[str, Tensor]) -> None:
    for part, (shape, wanted) in plan.chosen[layer.name].number.stored(layer.shape, plan.quantizer).items():
        found = tensors.get(f"{layer.name}.{part}")
        got = "none" if found is None else f"{found.dtype} {tuple(found.shape)}"
        fits = found is not None and tuple(found.shape) == shape and found.dtype == wanted
        require(fits, "load", f"{layer.name}.{part}", f"be {wanted} {shape}", got)


def _covered(plan: Plan) -> set[str]:
    return {name for layer in plan.layers for name in layer.names}


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Over everything in the file but the digest itself."""
    return digest([{key: value for key, value in header.items() if key != "digest"}, tensor_digest(tensors)])


def _fit(values: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(set(state) - set(values)), sorted(set(values) - set(state))
    counts = f"{len(missing)} more ({', '.join(missing[:2])}) and {len(extra)} fewer ({', '.join(extra[:2])})"
    require(not missing and not extra, "load", "model", "have the tensors of the export", counts)
    for name, value in values.items():
        known = state[name]
        fits = known.shape == value.shape and known.dtype == value.dtype
        must = f"be {value.dtype} {tuple(value.shape)}"
        require(fits, "load", f"model's {name}", must, f"{known.dtype} {tuple(known.shape)}")


FORMAT = base.Format(write, predict, verify, files=(MODEL_FILE,), options=base.NoOptions)
