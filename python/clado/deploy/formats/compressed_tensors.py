"""compressed-tensors: one config group per scheme, each in the layout of its number format, read by vLLM and transformers.

Integers are ``pack-quantized`` (int32 words per row), or ``int-quantized`` (a byte each) where inputs become integers too;
fp8_e4m3 is ``naive-quantized``, with rounded inputs ``float-quantized``; mxfp8 ``mxfp8-quantized``, mxfp4 and nvfp4
``mxfp4-pack-quantized`` and ``nvfp4-pack-quantized``; a file that holds several says ``mixed-precision`` on top. What inputs are
rounded to stands in the group, the scale of a static one beside the weight. Layers that are kept in 16 bits lie there as they
are, under ``ignore``, or as ``dense`` where their inputs are rounded. Only Linear weights have a place in the format; a planned
convolution stays float and is listed under ``ignore`` too. Its readers keep a layer's scales in the dtype of its weight, so
that is what they are written in, and make bfloat16 weights of blocks, so that only those have them. Of a transformers model the
folder holds the configuration too, so that ``from_pretrained`` reads it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from clado_ext import pack, packed_columns

from ...common import CladoError, refused, require, some, users_code
from ...quant import (
    INPUTS,
    PACKED,
    SCALE,
    TENSOR_SCALE,
    ZERO_POINT,
    Blocks,
    DynamicInteger,
    Float8,
    InputRounding,
    Integer,
    Kept,
    Layer,
    Number,
    StaticInteger,
    held_by,
    input_rounding,
    modules,
    stored_nbytes,
)
from ..applied import dequantized
from . import base

MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"
_PLAIN_WIDTHS = (2, 4, 8)
# The layout of 3, 5, 6 and 7 bits changed under the same format name: dense words from 0.18.0 on, before that as many codes
# as fit a word whole. 2, 4 and 8 bits are the same in both.
_VERSIONS = {"dense": "0.18.0", "padded": "0.17.1"}
_LAYOUTS = {  # of what is no integer
    "fp8_e4m3": "naive-quantized",
    "mxfp8": "mxfp8-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "bf16": "dense",
    "fp16": "dense",
}
_BLOCKS = {
    "mxfp8": {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"},
    "mxfp4": {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"},
    "nvfp4": {
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
        "zp_dtype": "torch.float8_e4m3fn",
    },
}
_INPUTS: dict[str, dict[str, Any]] = {  # of floats
    "fp8_e4m3": {"strategy": "tensor", "dynamic": False},
    "fp8_e4m3_dynamic": {"strategy": "token", "dynamic": True},
    "mxfp8": {**_BLOCKS["mxfp8"], "dynamic": True},
    "mxfp4": {**_BLOCKS["mxfp4"], "dynamic": True},
    "nvfp4": {**_BLOCKS["nvfp4"], "dynamic": "local"},
}
_INPUT_SCALE, _INPUT_ZERO, _INPUT_TENSOR_SCALE = "input_scale", "input_zero_point", "input_global_scale"


@dataclass(frozen=True)
class Options:
    """What a caller may choose."""

    odd_widths: str | None = field(
        default=None,
        metadata={
            "help": "3, 5, 6 and 7 bits: 'dense' for readers from 0.18.0 on, 'padded' to 0.17.1; None refuses them"
        },
    )


Request = base.Request[Options]


def write(request: Request, folder: Path) -> tuple[int, int]:
    from safetensors.torch import save_file

    quantized, _ = split(request)
    tensors: dict[str, Tensor] = {}
    groups: dict[str, dict[str, Any]] = {}
    for layer in quantized:
        parts = _parts(request, layer) | _input_parts(request, layer)
        tensors |= {f"{module}.{part}": value.clone() for module in modules(layer) for part, value in parts.items()}
        layout, rounds = _layout(request, layer), _input_scheme(request, layer)
        scheme = None if isinstance(_number(request, layer), Kept) else _scheme(request, layer)
        if scheme or rounds:
            group = groups.setdefault(str((layout, scheme, rounds)), _group(layout, scheme, rounds))
            group["targets"] += modules(layer)
    leftovers = request.leftovers({name for layer in quantized for name in layer.names})
    save_file(tensors | leftovers, folder / MODEL_FILE, metadata={"format": "pt"})
    layouts = {group["format"] for group in groups.values()}
    ignored = _ignored(request.model, {target for group in groups.values() for target in group["targets"]})
    quantization = {
        "quant_method": "compressed-tensors",
        "version": _VERSIONS[request.options.odd_widths or "dense"],
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {f"group_{k}": group for k, group in enumerate(groups.values())},
    }
    config = {**_config(request.model), "quantization_config": quantization}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1))
    return sum(t.nbytes for t in tensors.values()), sum(t.nbytes for t in leftovers.values())


def predict(request: Request) -> tuple[int, int]:
    quantized, _ = split(request)
    counted = sum(_layer_bytes(request, layer) for layer in quantized)
    return counted, request.leftover_bytes({name for layer in quantized for name in layer.names})


def kept(request: Request) -> list[Layer]:
    return split(request)[1]


def notes(request: Request, folder: Path) -> tuple[str, ...]:
    """What the format leaves out of the plan, and what it holds otherwise."""
    held, stays = split(request)
    lines = []
    left = [layer.name for layer in stays if _rounding(request, layer) is not None] + _rounded_elsewhere(request)
    if left:
        lines.append(f"inputs stay float, those of {some(left)} too, which the plan rounds")
    wide = [
        layer.name for layer in held if _layout(request, layer) == "int-quantized" and _number(request, layer).bits < 8
    ]
    if wide:
        lines.append(f"codes take a byte each where integers multiply integers: those of {some(wide)}")
    halves = {_dtype(request, layer) for layer in held if _INPUT_SCALE in _input_parts(request, layer)} - {
        torch.float32
    }
    if halves:
        named = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in halves))
        lines.append(f"scales of inputs are rounded to {named}, as its readers hold them")
    return tuple(lines)


def _rounded_elsewhere(request: Request) -> list[str]:
    """Modules outside the plan whose inputs a base rounds."""
    known = request.plan.activations
    if known is None or not known.base:
        return []
    planned = {path for layer in request.plan.layers for path in (layer.name, *modules(layer))}
    return [path for path in known.ranges if path not in planned]


def split(request: Request) -> tuple[list[Layer], list[Layer]]:
    """The plan's layers that the format holds packed, and those that stay float in it.

    Raises:
        CladoError: no layer left, a format of weights or inputs that it has not, or a width whose layout depends on the reader's
            version and no choice of it.
    """
    known = dict(request.model.named_modules(remove_duplicate=False))
    quantized: list[Layer] = []
    stays: list[Layer] = []
    for layer in request.plan.layers:
        dtype = request.state[layer.names[0]].dtype
        sound = dtype in (torch.float32, torch.float16, torch.bfloat16)
        require(sound, "export", f"layer {layer.name}", "be float32, float16 or bfloat16 for compressed-tensors", dtype)
        owners = [known.get(module) for module in modules(layer)]
        held = layer.kind == "linear" and all(isinstance(owner, nn.Linear) for owner in owners)
        (quantized if held else stays).append(layer)
        if held:
            _check_number(layer, _number(request, layer), dtype)
    _check_inputs(request, quantized)
    some = "a plan of convolutions alone"
    require(len(quantized) > 0, "export", "plan", "hold Linear layers for compressed-tensors", some)
    choice = request.options.odd_widths
    require(choice in (None, *_VERSIONS), "export", "odd_widths", f"be one of {', '.join(_VERSIONS)}", repr(choice))
    widths = {_number(request, layer).bits for layer in quantized if _layout(request, layer) == "pack-quantized"}
    odd = sorted(widths - set(_PLAIN_WIDTHS))
    must = (
        "keep to 2, 4 and 8 bits, or come with odd_widths (--odd-widths) "
        "'dense' (compressed-tensors ≥ 0.18.0) or 'padded' (≤ 0.17.1)"
    )
    require(not odd or choice is not None, "export", "plan", must, f"{', '.join(map(str, odd))} bits")
    return quantized, stays


def decompressed(folder: Path, model: nn.Module) -> nn.Module:
    """A copy of ``model`` with the weights of a folder as the compressed-tensors package reads them.

    Raises:
        CladoError: the package is not installed.
    """
    try:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    except ImportError as error:
        raise CladoError(f"verify: compressed-tensors must be installed, got {error}") from None
    from safetensors.torch import load_file

    with refused(folder, "be an export for compressed-tensors"):
        held = json.loads((folder / CONFIG_FILE).read_text())["quantization_config"]
    with refused(folder / MODEL_FILE, "hold the weights of the export"):
        tensors = load_file(folder / MODEL_FILE)
    read = copy.deepcopy(model)
    # Its progress bars; and what it cannot read, such as a module that has several names.
    with (
        contextlib.redirect_stderr(io.StringIO()),
        users_code("verify: compressed-tensors must be able to read the export"),
    ):
        config = QuantizationConfig.model_validate(held)
        apply_quantization_config(read, config, show_progress=False)
        compressor = ModelCompressor(quantization_config=config)
        compressor.compress_model(read)
        read.load_state_dict(tensors)
        compressor.decompress_model(read)
    return read


def verify(request: Request, folder: Path) -> str:
    quantized, stays = split(request)
    read, wanted = decompressed(folder, request.model), dequantized(request.model, request.plan, request.codes)
    for layer in request.plan.layers:
        source = request.model if layer in stays else wanted
        for name in layer.names:
            value = source.get_parameter(name)
            found = read.get_parameter(name).to(value.device)
            same = found.dtype == value.dtype and torch.equal(found, value)
            require(same, "verify", name, "decompress to the weight of clado.apply", "another weight")
    rounds = [layer for layer in quantized if _rounding(request, layer) is not None]
    for layer in rounds:
        for module in modules(layer):
            _check_read(request, layer, read.get_submodule(module))
    inputs = f", with the inputs of {len(rounds)}" if rounds else ""
    return f"compressed-tensors decompresses {len(quantized)} layers bit for bit{inputs}; {len(stays)} stay float"


def _check_read(request: Request, layer: Layer, module: Any) -> None:
    """Raise unless a module of the package rounds its inputs as the layer does."""
    found = module.quantization_scheme.input_activations
    wanted = _input_scheme(request, layer) or {}
    held = found is not None and all(str(getattr(found, name)) == str(value) for name, value in wanted.items())
    same = held and all(
        torch.equal(getattr(module, part).cpu(), value) for part, value in _input_parts(request, layer).items()
    )
    require(same, "verify", f"inputs of {layer.name}", "be rounded as the plan has it", found)


def _number(request: Request, layer: Layer) -> Number:
    return request.plan.chosen[layer.name].number


def _check_number(layer: Layer, number: Number, dtype: torch.dtype) -> None:
    known = isinstance(number, Integer) or number.name in _LAYOUTS
    floats = ", ".join(name for name, layout in _LAYOUTS.items() if layout != "dense")
    must = f"hold integers, {floats} or 16 bits for compressed-tensors"
    require(known, "export", "plan", must, f"{layer.name} as {number.name}")
    fits = not isinstance(number, Blocks) or dtype == torch.bfloat16
    must = f"be bfloat16 for {number.name} in compressed-tensors, whose reader makes that of it"
    require(fits, "export", f"layer {layer.name}", must, str(dtype).removeprefix("torch."))


def _rounding(request: Request, layer: Layer) -> InputRounding | None:
    """How a layer's input is rounded; None where it stays as it is, as under an empty range."""
    known = request.plan.activations
    found = input_rounding(layer, request.plan.chosen[layer.name], known)
    if known is not None and known.base:
        pairs = {known.ranges[path] for path in (layer.name, *modules(layer)) if path in known.ranges}
        several = "a weight shared by modules of several"
        require(len(pairs) < 2, "export", f"layer {layer.name}", "have one range for compressed-tensors", several)
        found = InputRounding(f"int{known.bits}", pairs.pop(), layer.kind) if pairs else None
    empty = found is not None and found.pair is not None and not any(found.pair)
    return None if empty else found


def _check_inputs(request: Request, layers: list[Layer]) -> None:
    """Raise unless the package knows how inputs are rounded, and its blocks divide them."""
    rounded = {layer: rounding for layer in layers if (rounding := _rounding(request, layer)) is not None}
    labels = {layer: request.plan.chosen[layer.name].label for layer in rounded}
    other = [layer for layer, rounding in rounded.items() if _known_input(rounding.input) is None]
    must = f"round inputs to integers of 2 to 8 bits, {', '.join(_INPUTS)}, or not at all, for compressed-tensors"
    require(not other, "export", "plan", must, some([f"{labels[layer]} of {layer.name}" for layer in other]))
    sizes = {layer: _INPUTS.get(rounding.input, {}).get("group_size") or 1 for layer, rounding in rounded.items()}
    odd = [layer for layer, size in sizes.items() if layer.shape[1] % size]
    must = "round inputs in blocks that divide them for compressed-tensors"
    require(not odd, "export", "plan", must, some([f"{labels[layer]} of {layer.name}" for layer in odd]))


def _known_input(name: str) -> dict[str, Any] | None:
    """What a group says of inputs of a format; None for one that the package has not."""
    format = INPUTS[name]
    if isinstance(format, (StaticInteger, DynamicInteger)):
        dynamic = isinstance(format, DynamicInteger)
        known = {"type": "int", "symmetric": dynamic, "strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
        return {"num_bits": format.bits, **known} if 2 <= format.bits <= 8 else None
    return {"num_bits": format.bits, "type": "float", "symmetric": True, **_INPUTS[name]} if name in _INPUTS else None


def _input_scheme(request: Request, layer: Layer) -> dict[str, Any] | None:
    """The ``input_activations`` entry of a layer."""
    rounding = _rounding(request, layer)
    return None if rounding is None else _known_input(rounding.input)


def _input_parts(request: Request, layer: Layer) -> dict[str, Tensor]:
    """Scale and zero point of an input with a range; that of nvfp4 is the one that scales of blocks are multiplied by."""
    rounding = _rounding(request, layer)
    if rounding is None or rounding.pair is None:
        return {}
    scale, *zero = INPUTS[rounding.input].constants(rounding.pair)
    if rounding.input == "nvfp4":
        return {_INPUT_TENSOR_SCALE: torch.tensor([1 / scale], dtype=torch.float32)}
    parts = {_INPUT_SCALE: held_by(_dtype(request, layer), torch.tensor([scale])).to(_dtype(request, layer))}
    lowest = 1 << (INPUTS[rounding.input].bits - 1)
    return parts | ({_INPUT_ZERO: torch.tensor([zero[0] - lowest], dtype=torch.int8)} if zero else {})


def _layout(request: Request, layer: Layer) -> str:
    """By the formats of the weight and the input, as the package's own choice; but integers whose inputs are floats are packed,
    as vLLM reads them."""
    number, rounding = _number(request, layer), _rounding(request, layer)
    if not isinstance(number, Integer):
        named = _LAYOUTS[number.name]
        return "float-quantized" if rounding is not None and named == "naive-quantized" else named
    integers = rounding is not None and isinstance(INPUTS[rounding.input], (StaticInteger, DynamicInteger))
    return "int-quantized" if integers else "pack-quantized"


def _scheme(request: Request, layer: Layer) -> dict[str, Any]:
    """The ``weights`` entry of a layer. Groups that do not divide the row are cut to their greatest common divisor with it."""
    number, columns, size = _number(request, layer), layer.shape[1], request.plan.quantizer.group_size
    strategy = "tensor" if size == 0 else "channel" if size == -1 or size >= columns else "group"
    known: dict[str, Any] = {"type": "float", "symmetric": True}
    if isinstance(number, Integer):
        cut = math.gcd(size, columns) if strategy == "group" else None
        known = {"type": "int", "symmetric": request.plan.quantizer.symmetric, "strategy": strategy, "group_size": cut}
    elif isinstance(number, Blocks):
        known |= _BLOCKS[number.name]
    else:
        known |= {"strategy": "tensor" if size == 0 else "channel", "group_size": None}
    return {"num_bits": number.bits, **known, "dynamic": False}


def _group(layout: str, scheme: dict[str, Any] | None, rounds: dict[str, Any] | None) -> dict[str, Any]:
    targets: list[str] = []
    activations = {"input_activations": rounds, "output_activations": None}
    return {"targets": targets, "format": layout, "weights": scheme, **activations}


def _parts(request: Request, layer: Layer) -> dict[str, Tensor]:
    number = _number(request, layer)
    if isinstance(number, Integer):
        return _integer_parts(request, layer, number.bits)
    packed, (rows, columns) = request.codes[layer.name].packed(), layer.shape
    if isinstance(number, Kept):
        return {"weight": packed[PACKED].view(rows, columns)}
    codes = packed[PACKED].view(rows, -1)
    parts = {PACKED if codes.dtype == torch.uint8 else "weight": codes}
    if isinstance(number, Float8):
        per_tensor = request.plan.quantizer.group_size == 0
        return parts | {SCALE: _held(request, layer, packed[SCALE].view(1) if per_tensor else packed[SCALE])}
    parts[SCALE] = packed[SCALE].view(rows, -1)
    return parts | ({TENSOR_SCALE: packed[TENSOR_SCALE].view(1)} if TENSOR_SCALE in packed else {})


def _held(request: Request, layer: Layer, scale: Tensor) -> Tensor:
    """Scales in the dtype of the layer's weight, which holds them."""
    dtype = _dtype(request, layer)
    held = scale.to(dtype)
    must = f"have scales that {dtype} holds, as round-to-nearest and profiles of this version make them"
    require(torch.equal(held.float(), scale), "export", f"layer {layer.name}", must, "others")
    return held.contiguous()


def _integer_parts(request: Request, layer: Layer, bits: int) -> dict[str, Tensor]:
    found, quantizer = request.codes[layer.name], request.plan.quantizer
    codes, scale, zero_point = found.codes.view(layer.shape), found.scale, found.zero_point
    scheme = _scheme(request, layer)
    if scheme["strategy"] == "tensor":
        scale, zero_point = scale.view(1), None if zero_point is None else zero_point.view(1)
    elif scheme["strategy"] == "group":
        repeat = quantizer.group_size // scheme["group_size"]
        groups = layer.shape[1] // scheme["group_size"]
        scale = scale.repeat_interleave(repeat, 1)[:, :groups]
        zero_point = None if zero_point is None else zero_point.repeat_interleave(repeat, 1)[:, :groups]
    if _layout(request, layer) == "int-quantized":
        parts = {"weight": codes.contiguous(), SCALE: _held(request, layer, scale)}
        return parts | ({} if zero_point is None else {ZERO_POINT: zero_point.contiguous()})
    parts = {
        PACKED: _pack(request, codes, bits),
        SCALE: _held(request, layer, scale),
        "weight_shape": torch.tensor(layer.shape),
    }
    if zero_point is not None:
        packed = scheme["strategy"] != "tensor"  # the zero point of a tensor is stored as it is
        parts[ZERO_POINT] = _pack(request, zero_point.T, bits).T.contiguous() if packed else zero_point
    return parts


def _layer_bytes(request: Request, layer: Layer) -> int:
    """Bytes of a layer's tensors, once for each module that holds it."""
    inputs = sum(part.nbytes for part in _input_parts(request, layer).values())
    return len(layer.names) * (_weight_bytes(request, layer) + inputs)


def _weight_bytes(request: Request, layer: Layer) -> int:
    number, (rows, columns) = _number(request, layer), layer.shape
    if not isinstance(number, Integer):
        stored = number.stored(layer.shape, request.plan.quantizer)
        held = {SCALE: (stored[SCALE][0], _dtype(request, layer))} if isinstance(number, Float8) else {}
        return stored_nbytes(stored | held)
    bits, scheme = number.bits, _scheme(request, layer)
    groups = columns // scheme["group_size"] if scheme["strategy"] == "group" else 1
    per_tensor = scheme["strategy"] == "tensor"
    scales = _dtype(request, layer).itemsize * (1 if per_tensor else rows * groups)
    asymmetric = not request.plan.quantizer.symmetric
    if _layout(request, layer) == "int-quantized":
        return rows * columns + scales + asymmetric * (1 if per_tensor else rows * groups)
    words = rows * _words(request, columns, bits)
    zeros = asymmetric * (1 if per_tensor else 4 * groups * _words(request, rows, bits))
    return 4 * words + scales + zeros + 16  # 16: the shape, two int64


def _dtype(request: Request, layer: Layer) -> torch.dtype:
    return request.state[layer.names[0]].dtype


def _padded(request: Request, bits: int) -> bool:
    return request.options.odd_widths == "padded" and bits not in _PLAIN_WIDTHS


def _words(request: Request, columns: int, bits: int) -> int:
    return math.ceil(columns / (32 // bits)) if _padded(request, bits) else packed_columns(columns, bits)


def _pack(request: Request, codes: Tensor, bits: int) -> Tensor:
    """int8 ``[rows, columns]`` -> int32 ``[rows, words]``; "padded" leaves the bits of a word empty that hold no whole code."""
    if not _padded(request, bits):
        return pack(codes.contiguous(), bits)
    fit, columns = 32 // bits, codes.shape[1]
    unsigned = nn.functional.pad(codes.long() + (1 << (bits - 1)), (0, -columns % fit)).unflatten(1, (-1, fit))
    found: Tensor = (unsigned << (bits * torch.arange(fit))).sum(-1).int()
    return found


def _config(model: nn.Module) -> dict[str, Any]:
    """A transformers model's own configuration, by which ``from_pretrained`` builds it; nothing for other models."""
    own: Any = getattr(model, "config", None)
    if not (hasattr(own, "model_type") and hasattr(own, "to_json_string")):
        return {}
    return {**json.loads(own.to_json_string()), "architectures": [type(model).__name__]}


def _ignored(model: nn.Module, targets: set[str]) -> list[str]:
    """Every Linear and convolution that stays float, by name."""
    every = model.named_modules(remove_duplicate=False)
    return [name for name, m in every if isinstance(m, (nn.Linear, _ConvNd)) and name not in targets]


FORMAT = base.Format(write, predict, verify, files=(MODEL_FILE, CONFIG_FILE), options=Options, kept=kept, notes=notes)
