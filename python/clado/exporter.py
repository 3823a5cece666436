"""Integer weights on disk and back: packed codes, scales, float leftovers and the plan in one folder."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import clado_ext

from .errors import CladoError, require
from .files import atomic_folder
from .fingerprint import tensor_digest, weights_digest
from .plan import FILE_NAME as PLAN_FILE
from .plan import Plan
from .quantizer import Quantizer

SCHEMA = 1
MODEL_FILE = "model.safetensors"
_HEADER = "clado.model"
_PACKED, _SCALE = ".weight_packed", ".weight_scale"


@dataclass(frozen=True)
class Exported:
    """What an export wrote, in bytes.

    Attributes:
        quantized: packed codes and scales; equals the plan's ``size_bytes``.
        leftovers: what stays float.
        header: names and metadata of the file.
    """

    folder: Path
    quantized: int
    leftovers: int
    header: int


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``model`` whose planned weights are quantized and dequantized, for evaluation.

    Raises:
        CladoError: a plan that is infeasible or was made for other weights.
    """
    check_fit(model, plan, "apply")
    quantized = copy.deepcopy(model)
    parameters = dict(quantized.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for layer in plan.layers:
            weight = parameters[layer.names[0]]
            weight.copy_(plan.quantizer.fake_quant(weight, (plan.bits[layer.name],))[0])
    return quantized


def export(model: nn.Module, plan: Plan, path: str | os.PathLike[str], format: str = "safetensors") -> Exported:
    """Write the integer weights of a plan to folder ``path``; the folder appears whole or not at all.

    Args:
        model: the model the plan was made for.
        plan: bits per layer.
        path: folder to write; an earlier export there is replaced once the new one is complete.
        format: one of :data:`FORMATS`.

    Raises:
        CladoError: an unknown format, a plan for other weights, or a path that holds something else.
    """
    require(format in FORMATS, "export", "format", f"be one of {', '.join(FORMATS)}", repr(format))
    check_fit(model, plan, "export")
    target = Path(path)
    foreign = target.exists() and not (target.is_dir() and ((target / PLAN_FILE).exists() or not any(target.iterdir())))
    require(not foreign, "export", "path", "be new, empty or an earlier export", target)
    with atomic_folder(target) as folder:
        sizes = FORMATS[format](model, plan, folder)
        plan.save(folder / PLAN_FILE)
    return Exported(target, *sizes)


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """A copy of ``model`` with the weights of an export: bit for bit what :func:`apply` gives.

    Args:
        path: folder written by :func:`export` in format "safetensors".
        model: a module of the same architecture; its weights do not matter and are not changed.

    Raises:
        CladoError: a missing, truncated, damaged or foreign file, or one that does not fit the model.
    """
    header, tensors = _read(Path(path) / MODEL_FILE)
    quantizer = Quantizer(**header["quantizer"])
    loaded = copy.deepcopy(model)
    state = loaded.state_dict()
    values: dict[str, Tensor] = {}
    for item in header["layers"]:
        dtype = getattr(torch, item["dtype"])
        shape = tuple(item["shape"])
        rows, columns = quantizer.rows_columns(shape)
        words, scales = tensors.pop(item["name"] + _PACKED), tensors.pop(item["name"] + _SCALE)
        require(
            scales.shape == (rows, quantizer.groups(shape)),
            "load",
            f"scales of {item['name']}",
            "fit the shape",
            tuple(scales.shape),
        )
        require(words.shape[0] == rows, "load", f"codes of {item['name']}", "fit the shape", tuple(words.shape))
        codes = clado_ext.unpack(words, item["bits"], columns)
        values |= dict.fromkeys(item["names"], quantizer.dequantize(codes, scales, shape, dtype))
    values |= tensors
    _fit(values, state)
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)
    return loaded


def check_fit(model: nn.Module, plan: Plan, op: str) -> None:
    """Raise unless ``plan`` has bits and was made for the weights of ``model``."""
    require(bool(plan.bits), op, "plan", "hold bits for every layer", f"a plan that is {plan.status}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for layer in plan.layers:
        for name in layer.names:
            known = name in parameters and tuple(parameters[name].shape) == layer.shape
            require(known, op, "model", f"have a weight {name} of shape {layer.shape}", "another model")
    known_weights = plan.fingerprint.get("weights")
    require(
        known_weights in (None, weights_digest(model)), op, "model", "be the one the plan was made for", "other weights"
    )


def _write_safetensors(model: nn.Module, plan: Plan, folder: Path) -> tuple[int, int, int]:
    from safetensors.torch import save_file

    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    tensors: dict[str, Tensor] = {}
    layers = []
    for layer in plan.layers:
        bits, weight = plan.bits[layer.name], state[layer.names[0]]
        codes, scales = plan.quantizer.quantize(weight, bits)
        tensors[layer.name + _PACKED] = clado_ext.pack(codes, bits).cpu()
        tensors[layer.name + _SCALE] = scales.cpu().contiguous()
        layers.append(
            {
                "name": layer.name,
                "names": layer.names,
                "bits": bits,
                "shape": layer.shape,
                "dtype": str(weight.dtype).removeprefix("torch."),
            }
        )
    quantized = sum(t.nbytes for t in tensors.values())
    covered = {name for layer in plan.layers for name in layer.names}
    clash = [name for name in tensors if name in state]
    require(not clash, "export", "model", "have no tensors named like packed weights", clash[:1])
    leftovers = {
        name: value.detach().cpu().clone().contiguous() for name, value in state.items() if name not in covered
    }
    tensors |= leftovers
    header = {
        "schema": SCHEMA,
        "layers": layers,
        "quantizer": plan.quantizer.to_json(),
        "digest": tensor_digest(tensors),
    }
    save_file(tensors, folder / MODEL_FILE, metadata={_HEADER: json.dumps(header)})
    float_bytes = sum(t.nbytes for t in leftovers.values())
    return quantized, float_bytes, (folder / MODEL_FILE).stat().st_size - quantized - float_bytes


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Header and tensors of an export, checked against each other."""
    from safetensors import SafetensorError, safe_open

    require(path.is_file(), "load", "path", "be a folder written by clado export", path.parent)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
            require(isinstance(header, dict), "load", "file", "be a clado export", path)
            require(header.get("schema") == SCHEMA, "load", "schema", f"be {SCHEMA}", header.get("schema"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        require(
            tensor_digest(tensors) == header["digest"],
            "load",
            "file",
            "hold what was written",
            f"damaged data in {path}",
        )
        for item in header["layers"]:
            fits = item["name"] + _PACKED in tensors and item["name"] + _SCALE in tensors and 2 <= item["bits"] <= 8
            fits = (
                fits
                and all(isinstance(d, int) and d > 0 for d in item["shape"])
                and item["dtype"] in ("float32", "float16", "bfloat16", "float64")
            )
            require(fits, "load", f"layer {item['name']}", "be complete", "a damaged header")
        return header, tensors
    except (SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError, OSError) as error:
        raise CladoError(f"load: file must be a whole clado export, got {path} ({error})") from None


def _fit(values: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    missing, extra = sorted(set(state) - set(values)), sorted(set(values) - set(state))
    require(
        not missing and not extra,
        "load",
        "model",
        "have the tensors of the export",
        f"{len(missing)} more ({', '.join(missing[:2])}) and {len(extra)} fewer ({', '.join(extra[:2])})",
    )
    for name, value in values.items():
        fits = state[name].shape == value.shape and state[name].dtype == value.dtype
        require(
            fits,
            "load",
            f"model's {name}",
            f"be {value.dtype} {tuple(value.shape)}",
            f"{state[name].dtype} {tuple(state[name].shape)}",
        )


# Each writer fills a folder and returns the bytes of packed codes and scales, of float leftovers, and of headers.
FORMATS: dict[str, Callable[[nn.Module, Plan, Path], tuple[int, int, int]]] = {"safetensors": _write_safetensors}
