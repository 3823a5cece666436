"""ONNX with integer weights: DequantizeLinear before every planned weight, per channel or blocked, run by onnxruntime.

The graph comes from torch's exporter; its weights are quantized by name. 2, 4 and 8 bits have types of their own, the
other widths are stored as int8.

Behind rounded inputs onnxruntime (1.32) puts integer kernels in the place of float ones. Without VNNI those for int8 weights
add two products in 16 bits, which 255 · 128 + 255 · 128 overflows: codes of 8 bits lie 128 higher there, as uint8, whose kernels
are exact everywhere. Narrower codes fit. Where the kernels differ from DequantizeLinear a Flatten keeps them away.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...artifacts import Plan
from ...common import CladoError, require, said
from ...quant import ActivationRanges, Layer, Quantized, modules, quantize_activations
from ..applied import dequantized
from ..flat import INPUT, LOGITS, Face, face_of
from . import base

MODEL_FILE = "model.onnx"
_DATA_FILE = f"{MODEL_FILE}.data"
OPSET, OPSET_INT2 = 21, 25  # int4 came with 21 (IR 10), int2 with 25 (IR 13)
_IR_VERSION, _IR_VERSION_INT2 = 10, 13
_LARGEST_FILE = 1_900_000_000  # bytes; protobuf ends at 2 GiB, beyond this the weights lie beside the graph
_TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order
_TOLERANCE_ACTIVATIONS = 5e-2  # a value beside a tie may take the next of 255 steps, and the layers behind it see that
_INPUT_SCALE, _INPUT_ZERO = ".input_scale", ".input_zero_point"


@dataclass(frozen=True)
class Options:
    """What a caller may choose."""

    example: Any = field(
        default=None,
        metadata={
            "help": "inputs [n, …], a tuple or dict of arguments, or a batch for forward_step: what the graph takes"
        },
    )
    activations: Mapping[str, tuple[float, float]] | None = field(
        default=None,
        metadata={
            "help": "{layer: (least, largest value of its input)}: quantized to 8 bits, asymmetric, one scale each"
        },
    )


Request = base.Request[Options]
Arrays = dict[str, np.ndarray[Any, Any]]


def write(request: Request, folder: Path) -> tuple[int, int]:
    ir = _import_ir()
    request.plan.check_integers("export", "onnx")
    for layer in request.plan.layers:
        dtype = request.state[layer.names[0]].dtype
        require(dtype == torch.float32, "export", f"layer {layer.name}", "be float32 for onnx", dtype)
    model = _export(request)
    _inline(model)
    quantized: set[str] = set()
    ranges = _ranges(request)
    for layer, low, high in ranges.values():
        _quantize_inputs(ir, model.graph, layer, low, high)
    for layer in request.plan.layers:
        quantized |= _quantize(ir, model.graph, request, layer, layer.name in ranges)
    leftovers = sum(request.state[name].nbytes for name in model.graph.initializers if name in _floating(request))
    _clean(model)
    for value in list(model.graph.inputs):
        if not value.uses():  # such as labels that came with the example
            model.graph.inputs.remove(value)
    model.ir_version = _IR_VERSION_INT2 if _holds_int2(request) else _IR_VERSION
    model.producer_name = "clado"
    written = sum(model.graph.initializers[name].const_value.nbytes for name in quantized), leftovers
    ir.save(model, folder / MODEL_FILE, external_data=_DATA_FILE if sum(written) > _LARGEST_FILE else None)
    return written


def predict(request: Request) -> tuple[int, int]:
    request.plan.check_integers("export", "onnx")
    ranges = _ranges(request)
    counted = sum(_layer_bytes(request, layer, layer.name in ranges) for layer in request.plan.layers)
    return counted, sum(request.state[name].nbytes for name in _floating(request))


def verify(request: Request, folder: Path) -> str:
    """Where inputs are rounded, the graph without that is held to sums in another order, the roundings to their ranges.

    The whole is off wherever a value beside a tie took the next step. Behind many layers that may be as far as rounding itself
    takes the logits.
    """
    require(os.path.isfile(folder / MODEL_FILE), "verify", "path", "hold an export for onnx", folder)
    ranges = _ranges(request)
    _check_rounding(folder, ranges)
    batches = _batches(request, folder)
    model = dequantized(request.model, _weights_alone(request.plan), request.codes)
    plain = [_outputs(model, face) for face in batches]
    with _without_rounding(folder) if ranges else nullcontext(folder) as bare:
        error = _gap([outputs_of(bare, face.inputs) for face in batches], plain)
    shown = ", ".join(batches[0].outputs)
    must = "equal those of clado.apply"
    require(error <= _TOLERANCE, "verify", shown, f"{must} within {_TOLERANCE:g}", f"{error:.1e}")
    said = f"onnxruntime gives {'the logits' if shown == LOGITS else shown} of clado.apply within {error:.1e} of the largest"
    if not ranges:
        return said
    pairs = {name: (low, high) for name, (_, low, high) in ranges.items()}
    rounding = quantize_activations(
        model, ActivationRanges.of_width(8, pairs), [layer for layer, _, _ in ranges.values()]
    )
    rounded = [_outputs(rounding, face) for face in batches]
    whole = _gap([outputs_of(folder, face.inputs) for face in batches], rounded)
    allowed = max(_TOLERANCE_ACTIVATIONS, _gap(plain, rounded))
    require(whole <= allowed, "verify", shown, f"{must} with rounded inputs within {allowed:.2g}", f"{whole:.1e}")
    return f"{said}, and within {whole:.1e} where the inputs of {len(ranges)} layers are rounded"


def notes(request: Request, folder: Path) -> tuple[str, ...]:
    """What the graph takes and gives, how many samples, and what of the example it does not read."""
    graph, face = _import_ir().load(folder / MODEL_FILE).graph, _face(request)
    read = [value.name for value in graph.inputs]
    fixed, unread = _fixed(folder), [*face.unread, *(name for name in face.inputs if name not in read)]
    samples = "1 sample" if fixed == 1 else f"{fixed} samples"
    count = f"exactly {samples}, which the model fixes" if fixed else "any number of samples"
    left = [f"left out, since the outputs do not depend on it: {', '.join(unread)}"] if unread else []
    return (f"the graph takes {', '.join(read)} and gives {', '.join(face.outputs)}, of {count}", *left)


def _face(request: Request, op: str = "export") -> Face:
    example = request.options.example
    require(example is not None, op, "example", "be given for onnx: inputs [n, …]", "none")
    return face_of(request.model, request.forward_step, example, op)


def _batches(request: Request, folder: Path) -> list[Face]:
    """The example and its first sample alone; the example where the graph takes no other number of samples."""
    face, fixed = _face(request, "verify"), _fixed(folder)
    if not fixed:
        return [face.of(max(2, face.samples)), face.of(1)]
    require(face.samples == fixed, "verify", "example", f"hold {fixed} samples, as the graph takes", face.samples)
    return [face]


def _fixed(folder: Path) -> int | None:
    """The only number of samples that a graph takes; None where that is free."""
    graph = _import_ir("verify").load(folder / MODEL_FILE).graph
    return next((value.shape[0] for value in graph.inputs if isinstance(value.shape[0], int)), None)


def _outputs(model: nn.Module, face: Face) -> Arrays:
    with torch.no_grad():
        found = face.module.under(model)(*face.inputs.values())
    return {name: value.detach().cpu().numpy() for name, value in zip(face.outputs, found, strict=True)}


def _gap(found: Sequence[Arrays], wanted: Sequence[Arrays]) -> float:
    """The largest difference as a share of the largest number of an output; of whole numbers the share that differs."""
    return max(_off(a[name], b[name]) for a, b in zip(found, wanted, strict=True) for name in b)


def _off(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    same = (found == wanted) | ((found != found) & (wanted != wanted))
    if found.shape != wanted.shape or not np.issubdtype(wanted.dtype, np.floating):
        return float(1 - np.mean(same)) if found.shape == wanted.shape else math.inf
    a, b = np.where(same, 0.0, found.astype(float)), np.where(same, 0.0, wanted.astype(float))
    difference = np.abs(a - b).max(initial=0.0)
    finite = np.abs(wanted[np.isfinite(wanted)].astype(float)).max(initial=0.0)
    return float(np.nan_to_num(difference / (finite or 1.0), nan=math.inf))


def _check_rounding(folder: Path, ranges: Mapping[str, tuple[Layer, float, float]]) -> None:
    """Raise unless the roundings of a graph are those of the ranges."""
    values = _import_ir("verify").load(folder / MODEL_FILE).graph.initializers
    held = {
        name.removesuffix(_INPUT_SCALE): tuple(
            values[name.removesuffix(_INPUT_SCALE) + part].const_value.numpy().item()
            for part in (_INPUT_SCALE, _INPUT_ZERO)
        )
        for name in values
        if name.endswith(_INPUT_SCALE)
    }
    wanted = {name: tuple(part.item() for part in _scale_zero(low, high)) for name, (_, low, high) in ranges.items()}
    other = sorted(name for name in held.keys() | wanted.keys() if held.get(name) != wanted.get(name))
    require(
        not other, "verify", "inputs", "be rounded to the ranges of the plan or of activations", f"other {other[:3]}"
    )


@contextmanager
def _without_rounding(folder: Path) -> Iterator[Path]:
    """A folder with the same graph whose inputs stay float."""
    ir = _import_ir("verify")
    model = ir.load(folder / MODEL_FILE)
    with tempfile.TemporaryDirectory() as bare:
        for node in model.graph:
            if node.op_type == "QuantizeLinear" and node.inputs[1].name.endswith(_INPUT_SCALE):  # ours, not the model's
                for again in list(node.outputs[0].consumers()):
                    again.outputs[0].replace_all_uses_with(node.inputs[0])
        ir.save(
            model, Path(bare) / MODEL_FILE, external_data=_DATA_FILE if os.path.exists(folder / _DATA_FILE) else None
        )
        yield Path(bare)


def run(folder: Path, inputs: Tensor) -> np.ndarray[Any, Any]:
    """The only output, for the only input, as :func:`outputs_of`."""
    return next(iter(outputs_of(folder, {INPUT: inputs}).values()))


def outputs_of(folder: Path, inputs: Mapping[str, Tensor]) -> Arrays:
    """Outputs of an exported folder by name in onnxruntime on the CPU, activations kept in float32.

    Without ``session.qdq_matmulnbits_accuracy_level=1`` onnxruntime quantizes the activations of MatMuls it fuses with their
    weights to int8: faster, and off by up to 1 % of the largest logit.

    Raises:
        CladoError: onnxruntime is not installed, or does not run the graph on such inputs.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise CladoError(f"verify: onnxruntime must be installed (pip install clado[onnx]), got {error}") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    try:
        onnx.checker.check_model(str(folder / MODEL_FILE), full_check=True)
        session = onnxruntime.InferenceSession(str(folder / MODEL_FILE), options, providers=["CPUExecutionProvider"])
        read = [value.name for value in session.get_inputs()]
        missing = [name for name in read if name not in inputs]
        require(not missing, "verify", "example", "hold what the graph takes", f"no {', '.join(missing)}")
        fed = {name: inputs[name].detach().cpu().numpy() for name in read}
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, map(np.asarray, session.run(names, fed)), strict=True))
    except CladoError:
        raise
    except Exception as error:  # the checker and onnxruntime have their own
        raise CladoError(f"verify: onnxruntime must run the graph, got {' '.join(said(error).split())}") from error


def _import_ir(op: str = "export") -> Any:
    try:
        import onnx_ir
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise CladoError(f"{op}: onnxscript must be installed (pip install clado[onnx]), got {error}") from None
    return onnx_ir


def _export(request: Request) -> Any:
    """The graph, its batch size free unless the model fixes it, not yet optimized: weights stand under their own names."""
    face = _face(request)
    try:
        model = _program(request, face.of(max(2, face.samples)), free=True)
    except CladoError:  # a fixed size may be why; another reason is told once more
        model = None
    if model is None or any(isinstance(value.shape[0], int) for value in model.graph.inputs):
        model = _program(request, face, free=False)
    return model


def _program(request: Request, face: Face, free: bool) -> Any:
    logger, before = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level
    logger.setLevel(logging.ERROR)
    batch = {0: torch.export.Dim("batch")}
    try:
        # With gradients attention is traced in one order of memory and decomposed in another, which views do not survive.
        with warnings.catch_warnings(), torch.no_grad(), _FourDimensions():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(
                face.module,
                tuple(face.inputs.values()),
                dynamo=True,
                dynamic_shapes={"tensors": (batch,) * len(face.inputs)} if free else None,
                opset_version=OPSET_INT2 if _holds_int2(request) else OPSET,
                input_names=list(face.inputs),
                output_names=list(face.outputs),
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # torch raises whatever the model's code raises, behind a page of advice
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        raise CladoError(f"export: model must go through torch.onnx.export, got {said(reason)}") from error
    finally:
        logger.setLevel(before)
    assert made is not None
    _take_names(made.model.graph, face)
    return made.model


class _FourDimensions(TorchFunctionMode):
    """Attention over any number of batch dimensions as attention over two, which is all that torch's exporter takes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and (args[0] if args else given["query"]).dim() != 4:
            return self._attention(func, *args, **given)
        return func(*args, **given)

    @staticmethod
    def _attention(
        func: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *more: Any, **given: Any
    ) -> Tensor:
        batch = query.shape[:-2]

        def two(x: Tensor) -> Tensor:
            return x.reshape(-1, x.shape[-3] if x.dim() > 2 else 1, *x.shape[-2:])

        mask = attn_mask
        if mask is not None and mask.dim() > 2:
            mask = two(mask.expand(*batch, *mask.shape[-2:]))
        found: Tensor = func(two(query), two(key), two(value), mask, *more, **given)
        return found.reshape(*batch, *found.shape[-2:])


def _take_names(graph: Any, face: Face) -> None:
    """The model's own names for its weights, and none of the inputs' and outputs' for anything else."""
    for name in list(graph.initializers):
        graph.initializers[name].name = name.removeprefix("model.")
    reserved, outputs = {*face.inputs, *face.outputs}, set(graph.outputs)
    for node in graph:
        for value in node.outputs:
            if value.name in reserved and value not in outputs:
                value.name += "_inside"


def _floating(request: Request) -> set[str]:
    """Names of the parameters and buffers that stay float; counters of batches have no place in the graph."""
    covered = {name for layer in request.plan.layers for name in layer.names}
    return {name for name, value in request.state.items() if name not in covered and value.is_floating_point()}


def _holds_int2(request: Request) -> bool:
    return 2 in request.plan.bits.values()


def _container(bits: int) -> int:
    """Bits an element takes."""
    return bits if bits in (2, 4, 8) else 8


def _blocked(request: Request, layer: Layer) -> bool:
    """More than one scale in a row."""
    return request.plan.quantizer.groups(layer.shape) > 1


def _unsigned(request: Request, layer: Layer, rounded: bool) -> bool:
    """Whether codes lie 128 higher: all matrices that a kernel might take, so that shapes alone give the bytes."""
    wide = request.plan.bits[layer.name] == 8
    return rounded and wide and len(layer.shape) == 2 and not _blocked(request, layer)


def _layer_bytes(request: Request, layer: Layer, rounded: bool) -> int:
    """Codes, scales and zero points; elements below a byte are packed without gaps, tensors end on a whole byte."""
    rows, groups = request.plan.quantizer.rows_columns(layer.shape)[0], request.plan.quantizer.groups(layer.shape)
    width = _container(request.plan.bits[layer.name])
    has_zeros = not request.plan.quantizer.symmetric or _unsigned(request, layer, rounded)
    zeros = math.ceil(rows * groups * width / 8) if has_zeros else 0
    return math.ceil(layer.numel * width / 8) + 4 * rows * groups + zeros


def _quantize(ir: Any, graph: Any, request: Request, layer: Layer, rounded: bool) -> set[str]:
    """Put DequantizeLinear in the place of a weight; returns the names of the initializers it reads.

    onnxruntime fuses DequantizeLinear and MatMul where the weight lies as [in, out]. With 2 bits it reads that layout wrong
    when ``out`` is no multiple of 4 (1.32), and DequantizeLinear → Transpose → MatMul is wrong in other ways; there the
    weight lies as [out, in] and multiplies from the left.

    Its integer kernels round the biases of Conv and Gemm, overlook blocks and know one scale for a left factor: where the inputs
    are ``rounded``, only a MatMul by [in, out] in whole bytes may become one.
    """
    uses = list(_weight(graph, layer).uses())
    if "transpose" in layer.kind:
        return _quantize_turned(ir, graph, request, layer)
    turned = [use.node for use in uses if _feeds_matmul_alone(use.node)]
    products = [use.node for use in uses if layer.kind == "matmul" and use.node.op_type == "MatMul" and use.idx == 1]
    bits = request.plan.bits[layer.name]
    alone = 0 < len(turned) + len(products) == len(uses)
    transposed = alone and (bits != 2 or layer.shape[0] % 4 == 0)
    apart = rounded and not (transposed and _container(bits) == 8 and not _blocked(request, layer))
    found = request.codes[layer.name]
    found = _shifted(found) if _unsigned(request, layer, rounded) else found
    value, made = _dequantized(ir, graph, request, layer, found, transposed, apart)
    if transposed:
        for node in turned:
            node.outputs[0].replace_all_uses_with(value)
        for node in products:
            node.replace_input_with(1, value)
        return made
    others = [use for use in uses if use.node not in turned and use.node not in products]
    for use in others:
        use.node.replace_input_with(use.idx, value if layer.in_rows else _turned(ir, graph, value, [1, 0]))
    for product in [*products, *(use.node for node in turned for use in list(node.outputs[0].uses()))]:
        _multiply_from_left(ir, graph, product, value)
    return made


def _quantize_turned(ir: Any, graph: Any, request: Request, layer: Layer) -> set[str]:
    """Of a transposed convolution, with a weight [in, out / groups, …]: DequantizeLinear of [out, in / groups, …], turned."""
    weight = _weight(graph, layer)
    inputs, outputs, *kernel = (int(size) for size in weight.shape)
    value, made = _dequantized(ir, graph, request, layer, request.codes[layer.name], transposed=False, apart=True)
    uses = list(weight.uses())
    groups = inputs // layer.shape[1]
    parts = _reshaped(ir, graph, value, (groups, outputs, layer.shape[1], *kernel), f"{layer.name}.groups_shape")
    turned = _turned(ir, graph, parts, [0, 2, 1, *range(3, 3 + len(kernel))])
    whole = _reshaped(ir, graph, turned, (inputs, outputs, *kernel), f"{layer.name}.parameter_shape")
    for use in uses:
        use.node.replace_input_with(use.idx, whole)
    return made


def _reshaped(ir: Any, graph: Any, value: Any, shape: tuple[int, ...], name: str) -> Any:
    dims = _initializer(ir, graph, ir.Tensor(np.array(shape, np.int64), name=name))
    return _behind(ir, graph, value, ir.Node("", "Reshape", [value, dims]), shape)


def _turned(ir: Any, graph: Any, value: Any, order: list[int]) -> Any:
    node = ir.Node("", "Transpose", [value], [ir.Attr("perm", ir.AttributeType.INTS, order)])
    return _behind(ir, graph, value, node, tuple(value.shape[k] for k in order))


def _behind(ir: Any, graph: Any, value: Any, node: Any, shape: tuple[int, ...]) -> Any:
    """The output of a node that is put right behind a value."""
    node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(shape)
    graph.insert_after(value.producer(), node)
    return node.outputs[0]


def _ranges(request: Request) -> dict[str, tuple[Layer, float, float]]:
    """Layers whose inputs are quantized, by name, with the range given for each, or else calibrated with the plan."""
    plan, planned = request.plan, {layer.name: layer for layer in request.plan.layers}
    if request.options.activations is not None:
        unknown = sorted(set(request.options.activations) - set(planned))
        require(not unknown, "export", "activations", "name layers of the plan", unknown[:3])
        return {name: (planned[name], *_with_zero(name, pair)) for name, pair in request.options.activations.items()}
    other = [f"{scheme.label} of {name}" for name, scheme in plan.chosen.items() if scheme.input not in ("", "int8")]
    must = "round inputs to 8 bits with one range per tensor (A8), or not at all, for onnx"
    require(not other, "export", "plan", must, ", ".join(other[:3]))
    if not plan.activations:
        return {}
    owner = {module: layer for layer in plan.layers for module in modules(layer)}
    found: dict[str, tuple[Layer, float, float]] = {}
    for module, (low, high) in plan.activations.ranges.items():
        layer = planned.get(module) or owner.get(module) or Layer(module, "", (), 0, (f"{module}.weight",))
        same = layer.name not in found or found[layer.name][1:] == (low, high)
        require(
            same, "export", f"layer {layer.name}", "have one range for onnx", "a weight shared by modules of several"
        )
        if high > low:
            found[layer.name] = (layer, low, high)
    return found


def _weights_alone(plan: Plan) -> Plan:
    """The plan under which no input is rounded."""
    schemes = {name: replace(scheme, input="").label for name, scheme in plan.chosen.items()}
    return replace(plan, schemes=schemes, activations=None)


def _with_zero(layer: str, pair: tuple[float, float]) -> tuple[float, float]:
    """A range that somebody gave, zero included."""
    low, high = min(pair[0], 0.0), max(pair[1], 0.0)
    sound = math.isfinite(high - low) and high > low
    require(sound, "export", f"range of {layer}", "be finite and hold more than 0", (low, high))
    return low, high


def _weight(graph: Any, layer: Layer) -> Any:
    name = next((name for name in layer.names if name in graph.initializers), None)
    require(name is not None, "export", f"layer {layer.name}", "be a weight of the exported graph", "none")
    return graph.initializers[name]


def _quantize_inputs(ir: Any, graph: Any, layer: Layer, low: float, high: float) -> None:
    """Put QuantizeLinear → DequantizeLinear before the input of every use of a weight: uint8 over [low, high]."""
    scale, zero = _scale_zero(low, high)
    parts = {_INPUT_SCALE: np.array(scale), _INPUT_ZERO: np.array(zero)}
    settings = [_initializer(ir, graph, ir.Tensor(array, name=f"{layer.name}{part}")) for part, array in parts.items()]
    for node in _products(_weight(graph, layer)):
        x = node.inputs[0]
        codes = ir.Node("", "QuantizeLinear", [x, *settings])
        again = ir.Node("", "DequantizeLinear", [codes.outputs[0], *settings])
        again.outputs[0].shape, again.outputs[0].type = x.shape, x.type
        graph.insert_before(node, [codes, again])
        node.replace_input_with(0, again.outputs[0])


def _scale_zero(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """The step of 255 over [low, high], and the code of zero."""
    return np.float32((high - low) / 255), np.uint8(min(255, max(0, round(-low / ((high - low) / 255)))))


_PARTS = ("Gather", "Identity", "Reshape", "SequenceAt", "Slice", "Split", "SplitToSequence", "Squeeze", "Transpose")


def _products(weight: Any) -> list[Any]:
    """The nodes that multiply something with a weight, or with what is taken of it."""
    found: dict[Any, None] = {}
    for use in weight.uses():
        if use.idx == 1 and use.node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            found[use.node] = None
        elif use.idx == 0 and use.node.op_type in _PARTS:
            found |= {node: None for output in use.node.outputs for node in _products(output)}
    return list(found)


def _feeds_matmul_alone(node: Any) -> bool:
    uses = node.outputs[0].uses() if node.op_type == "Transpose" else ()
    return len(uses) > 0 and all(use.node.op_type == "MatMul" and use.idx == 1 for use in uses)


def _multiply_from_left(ir: Any, graph: Any, matmul: Any, weight: Any) -> None:
    """x·Wᵀ as (W·xᵀ)ᵀ."""
    x, out = matmul.inputs[0], matmul.outputs[0]
    require(x.shape is not None and len(x.shape) >= 2, "export", "model", "multiply values of known rank", x.name)
    rank = len(x.shape)
    swapped = ir.Attr("perm", ir.AttributeType.INTS, [*range(rank - 2), rank - 1, rank - 2])
    first = ir.Node("", "Transpose", [x], [swapped])
    product = ir.Node("", "MatMul", [weight, first.outputs[0]])
    last = ir.Node("", "Transpose", [product.outputs[0]], [swapped])
    last.outputs[0].shape, last.outputs[0].type = out.shape, out.type
    graph.insert_before(matmul, [first, product, last])
    out.replace_all_uses_with(last.outputs[0], replace_graph_outputs=True)


def _shifted(found: Quantized) -> Quantized:
    """Codes and zero points 0 … 255 for the same weight."""
    zero_point = torch.zeros_like(found.scale) if found.zero_point is None else found.zero_point
    codes, zeros = ((part.short() + 128).to(torch.uint8) for part in (found.codes, zero_point))
    return replace(found, codes=codes, scales=found.scales._replace(zero_point=zeros))


def _dequantized(
    ir: Any, graph: Any, request: Request, layer: Layer, found: Quantized, transposed: bool, apart: bool
) -> tuple[Any, set[str]]:
    """The output of a DequantizeLinear that gives a layer's weight, and the names of its initializers.

    Codes lie as [out, …], or as [in, out] when ``transposed``. Groups of a convolution run over its flattened inputs: they are
    dequantized as [out, inputs] and reshaped. ``apart``: through a Flatten of two axes, which changes nothing and stops fusion.
    """
    blocked = _blocked(request, layer)
    matrix = transposed or blocked or apart
    shape = (layer.shape[0], math.prod(layer.shape[1:])) if matrix else layer.shape
    values = [_initializer(ir, graph, part) for part in _parts(ir, request, layer, found, shape, transposed)]
    axis = int(transposed) if not blocked else int(not transposed)
    attributes = [ir.Attr("axis", ir.AttributeType.INT, axis)]
    if blocked:
        attributes.append(ir.Attr("block_size", ir.AttributeType.INT, request.plan.quantizer.group_size))
    nodes = [ir.Node("", "DequantizeLinear", values, attributes)]
    if apart:
        nodes.append(ir.Node("", "Flatten", [nodes[-1].outputs[0]]))
    if len(shape) < len(layer.shape):
        dims = ir.Tensor(np.array(layer.shape, np.int64), name=f"{layer.name}.weight_shape")
        nodes.append(ir.Node("", "Reshape", [nodes[-1].outputs[0], _initializer(ir, graph, dims)]))
    for node in nodes:
        node.outputs[0].dtype = ir.DataType.FLOAT
    nodes[-1].outputs[0].shape = ir.Shape(tuple(reversed(layer.shape)) if transposed else layer.shape)
    graph.insert_before(graph[0], nodes)
    return nodes[-1].outputs[0], {value.name for value in values}


def _parts(
    ir: Any, request: Request, layer: Layer, found: Quantized, shape: tuple[int, ...], transposed: bool
) -> list[Any]:
    """Codes, scales and zero points as DequantizeLinear wants them.

    Scales and zero points: a scalar, one per row, or [rows, groups].
    """
    blocked, per_tensor = _blocked(request, layer), request.plan.quantizer.group_size == 0

    def placed(part: Tensor) -> np.ndarray[Any, Any]:
        shaped = part if blocked else part.view(()) if per_tensor else part.view(-1)
        return (shaped.T if transposed and blocked else shaped).contiguous().numpy()

    signed = {2: ir.DataType.INT2, 4: ir.DataType.INT4, 8: ir.DataType.INT8}[_container(request.plan.bits[layer.name])]
    container = ir.DataType.UINT8 if found.codes.dtype == torch.uint8 else signed
    codes = found.codes.view(shape)
    arrays = {"weight_codes": (codes.T if transposed else codes).contiguous().numpy().astype(container.numpy())}
    arrays["weight_scale"] = placed(found.scale)
    if found.zero_point is not None:
        arrays["weight_zero_point"] = placed(found.zero_point).astype(container.numpy())
    kinds = {name: ir.DataType.FLOAT if name == "weight_scale" else container for name in arrays}
    return [ir.Tensor(array, dtype=kinds[name], name=f"{layer.name}.{name}") for name, array in arrays.items()]


def _initializer(ir: Any, graph: Any, tensor: Any) -> Any:
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _inline(model: Any) -> None:
    """No function hides what reads a weight."""
    import onnxscript.optimizer

    onnxscript.optimizer.inline(model)


def _clean(model: Any) -> None:
    """Fold constants, and drop what the exporter notes about the machine: stack traces with paths.

    No other pass of the optimizer runs: fusing and sharing would change tensors whose bytes were promised.
    """
    import onnxscript.optimizer
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    onnxscript.optimizer.fold_constants(model)
    onnxscript.optimizer.remove_unused_nodes(model)
    ClearMetadataAndDocStringPass()(model)


FORMAT = base.Format(write, predict, verify, files=(MODEL_FILE, _DATA_FILE), options=Options, notes=notes)
