"""ONNX with quantized weights: DequantizeLinear before every planned weight, per channel or blocked, run by onnxruntime.

The graph comes from torch's exporter; its weights are quantized by name. Integers of 2, 4 and 8 bits, fp8 and fp4 have types of
their own, the other widths are stored as int8. Scales of blocks are float32, those of nvfp4 float8 with a DequantizeLinear of
their own; weights that are kept in 16 bits are cast. onnxruntime has no fp4 on the CPU, where onnx's reference runs such graphs.

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
from ...common import CladoError, require, said, some
from ...quant import (
    INPUTS,
    TENSOR_SCALE,
    Blocks,
    InputRounding,
    Integer,
    Kept,
    Layer,
    Number,
    Quantized,
    input_rounding,
    modules,
    round_inputs,
)
from ..applied import dequantized
from ..flat import INPUT, LOGITS, Face, face_of
from . import base

MODEL_FILE = "model.onnx"
_DATA_FILE = f"{MODEL_FILE}.data"
OPSET, OPSET_FP4, OPSET_INT2 = 21, 23, 25  # int4 came with 21, fp8 before it
_IR_VERSIONS = {OPSET: 10, OPSET_FP4: 11, OPSET_INT2: 13}
_LARGEST_FILE = 1_900_000_000  # bytes; protobuf ends at 2 GiB, beyond this the weights lie beside the graph
_TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order
_TOLERANCE_ACTIVATIONS = 5e-2  # a value beside a tie may take the next of 255 steps, and the layers behind it see that
_CODES = ".weight_codes"
_INPUT_SCALE, _INPUT_ZERO = ".input_scale", ".input_zero_point"
# Static formats of inputs, by the type of their codes.
_INPUTS = {"int8": "UINT8", "fp8_e4m3": "FLOAT8E4M3FN", "fp8_e5m2": "FLOAT8E5M2"}
_FLOATS = {
    "fp8_e4m3": "FLOAT8E4M3FN",
    "fp8_e5m2": "FLOAT8E5M2",
    "mxfp8": "FLOAT8E4M3FN",
    "mxfp4": "FLOAT4E2M1",
    "nvfp4": "FLOAT4E2M1",
    "bf16": "BFLOAT16",
    "fp16": "FLOAT16",
}


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
Ranges = dict[str, tuple[Layer, InputRounding]]  # by layer


def write(request: Request, folder: Path) -> tuple[int, int]:
    ir = _import_ir()
    ranges = _ranges(request)
    for layer in request.plan.layers:
        dtype = request.state[layer.names[0]].dtype
        require(dtype == torch.float32, "export", f"layer {layer.name}", "be float32 for onnx", dtype)
    model = _export(request)
    _inline(model)
    quantized: set[str] = set()
    for layer, rounding in ranges.values():
        planned = request.plan.chosen.get(layer.name)
        dequantized = planned is not None and not isinstance(planned.number, Kept)
        _quantize_inputs(ir, model.graph, layer, rounding, dequantized)
    for layer in request.plan.layers:
        quantized |= _quantize(ir, model.graph, request, layer, layer.name in ranges)
    leftovers = sum(request.state[name].nbytes for name in model.graph.initializers if name in _floating(request))
    _clean(model)
    for value in list(model.graph.inputs):
        if not value.uses():  # such as labels that came with the example
            model.graph.inputs.remove(value)
    model.ir_version = _IR_VERSIONS[_opset(request)]
    model.producer_name = "clado"
    written = sum(model.graph.initializers[name].const_value.nbytes for name in quantized), leftovers
    ir.save(model, folder / MODEL_FILE, external_data=_DATA_FILE if sum(written) > _LARGEST_FILE else None)
    return written


def predict(request: Request) -> tuple[int, int]:
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
    reader = "onnx's reference" if _holds_fp4(folder) else "onnxruntime"
    said = (
        f"{reader} gives {'the logits' if shown == LOGITS else shown} of clado.apply within {error:.1e} of the largest"
    )
    if not ranges:
        return said
    roundings = {name: rounding for name, (_, rounding) in ranges.items()}
    rounding = round_inputs(model, roundings, [layer for layer, _ in ranges.values()])
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


def _check_rounding(folder: Path, ranges: Ranges) -> None:
    """Raise unless the roundings of a graph are those of the ranges."""
    values = _import_ir("verify").load(folder / MODEL_FILE).graph.initializers
    held = {
        name.removesuffix(_INPUT_SCALE): [
            values[name.removesuffix(_INPUT_SCALE) + part].const_value for part in (_INPUT_SCALE, _INPUT_ZERO)
        ]
        for name in values
        if name.endswith(_INPUT_SCALE)
    }
    found = {name: (zero.dtype.name, scale.numpy().item(), float(zero.numpy())) for name, (scale, zero) in held.items()}
    wanted = {name: _scale_zero(rounding) for name, (_, rounding) in ranges.items()}
    other = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
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
    """Outputs of an exported folder by name in onnxruntime on the CPU, activations kept in float32; with fp4, which that has not,
    in onnx's reference evaluator.

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
    path = str(folder / MODEL_FILE)
    try:
        onnx.checker.check_model(path, full_check=True)
        if _holds_fp4(folder):
            from onnx.reference import ReferenceEvaluator

            session = ReferenceEvaluator(path)
            read, names = session.input_names, session.output_names
        else:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            read, names = ([value.name for value in face] for face in (session.get_inputs(), session.get_outputs()))
        missing = [name for name in read if name not in inputs]
        require(not missing, "verify", "example", "hold what the graph takes", f"no {', '.join(missing)}")
        fed = {name: inputs[name].detach().cpu().numpy() for name in read}
        return dict(zip(names, map(np.asarray, session.run(names, fed)), strict=True))
    except CladoError:
        raise
    except Exception as error:  # the checker and both readers have their own
        raise CladoError(f"verify: onnxruntime must run the graph, got {' '.join(said(error).split())}") from error


def _holds_fp4(folder: Path) -> bool:
    """Whether a graph has weights of four bits that are floats."""
    ir = _import_ir("verify")
    values = ir.load(folder / MODEL_FILE).graph.initializers.values()
    return any(value.dtype == ir.DataType.FLOAT4E2M1 for value in values)


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
                opset_version=_opset(request),
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


def _opset(request: Request) -> int:
    """The least that has the types of the weights."""
    numbers = [scheme.number for scheme in request.plan.chosen.values()]
    if any(isinstance(number, Integer) and number.bits == 2 for number in numbers):
        return OPSET_INT2
    return OPSET_FP4 if any(_FLOATS.get(number.name) == "FLOAT4E2M1" for number in numbers) else OPSET


def _number(request: Request, layer: Layer) -> Number:
    return request.plan.chosen[layer.name].number


def _container(number: Number) -> int:
    """Bits an element takes."""
    return number.bits if number.bits in (2, 4, 8, 16) else 8


def _groups(request: Request, layer: Layer) -> tuple[int, int]:
    """Elements of an output channel that share a scale, and the scales of a row; fp8 has one, as all integers of a row may."""
    number, quantizer = _number(request, layer), request.plan.quantizer
    columns = math.prod(layer.shape[1:])
    if isinstance(number, Blocks):
        return number.block, columns // number.block
    if isinstance(number, Integer) and quantizer.groups(layer.shape) > 1:
        return quantizer.group_size, quantizer.groups(layer.shape)
    return columns, 1


def _blocked(request: Request, layer: Layer) -> bool:
    """More than one scale in a row."""
    return _groups(request, layer)[1] > 1


def _scales(request: Request, layer: Layer) -> int:
    """Scales of a weight: one, or so many per output channel."""
    whole = request.plan.quantizer.group_size == 0 and not isinstance(_number(request, layer), Blocks)
    return 1 if whole else layer.shape[0] * _groups(request, layer)[1]


def _unsigned(request: Request, layer: Layer, rounded: bool) -> bool:
    """Whether codes lie 128 higher: all matrices that a kernel might take, so that shapes alone give the bytes."""
    wide = _number(request, layer).name == "int8"
    return rounded and wide and len(layer.shape) == 2 and not _blocked(request, layer)


def _layer_bytes(request: Request, layer: Layer, rounded: bool) -> int:
    """Codes, scales and zero points; elements below a byte are packed without gaps, tensors end on a whole byte."""
    number, scales = _number(request, layer), _scales(request, layer)
    codes = math.ceil(layer.numel * _container(number) / 8)
    if isinstance(number, Kept):
        return codes
    if number.name == "nvfp4":
        return codes + scales + 4
    symmetric = request.plan.quantizer.symmetric or not isinstance(number, Integer)
    has_zeros = not symmetric or _unsigned(request, layer, rounded)
    return codes + 4 * scales + (math.ceil(scales * _container(number) / 8) if has_zeros else 0)


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
    number = _number(request, layer)
    alone = 0 < len(turned) + len(products) == len(uses)
    transposed = alone and (number.bits != 2 or layer.shape[0] % 4 == 0)
    whole = isinstance(number, Integer) and _container(number) == 8
    apart = rounded and not (transposed and whole and not _blocked(request, layer))
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


def _ranges(request: Request) -> Ranges:
    """Layers whose inputs are quantized, by name, with the range given for each, or else calibrated with the plan."""
    plan, planned = request.plan, {layer.name: layer for layer in request.plan.layers}
    if request.options.activations is not None:
        unknown = sorted(set(request.options.activations) - set(planned))
        require(not unknown, "export", "activations", "name layers of the plan", unknown[:3])
        given = {name: _with_zero(name, pair) for name, pair in request.options.activations.items()}
        return {name: (planned[name], InputRounding("int8", pair, planned[name].kind)) for name, pair in given.items()}
    found = _ranges_of_base(plan) if plan.base_rounds_inputs else {}
    for layer in plan.layers if not plan.base_rounds_inputs else ():
        rounding = input_rounding(layer, plan.chosen[layer.name], plan.activations)
        if rounding is not None:
            found[layer.name] = layer, rounding
    labels = {} if plan.base_rounds_inputs else plan.schemes
    other = [f"{labels.get(name, own.input)} of {name}" for name, (_, own) in found.items() if own.input not in _INPUTS]
    must = "round inputs to 8 bits with one range per tensor (A8, fp8), or not at all, for onnx"
    require(not other, "export", "plan", must, some(other))
    return {name: own for name, own in found.items() if _scale_zero(own[1])[1] > 0}


def _ranges_of_base(plan: Plan) -> Ranges:
    """Of all layers of a model that rounds its inputs; a layer that is not planned has its module's name."""
    assert plan.activations is not None
    planned = {layer.name: layer for layer in plan.layers}
    owner = {module: layer for layer in plan.layers for module in modules(layer)}
    found: Ranges = {}
    for module, pair in plan.activations.ranges.items():
        layer = planned.get(module) or owner.get(module) or Layer(module, "linear", (), 0, (f"{module}.weight",))
        same = layer.name not in found or found[layer.name][1].pair == pair
        several = "a weight shared by modules of several"
        require(same, "export", f"layer {layer.name}", "have one range for onnx", several)
        found[layer.name] = layer, InputRounding(f"int{plan.activations.bits}", pair, layer.kind)
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


def _quantize_inputs(ir: Any, graph: Any, layer: Layer, rounding: InputRounding, dequantized: bool) -> None:
    """Put QuantizeLinear → DequantizeLinear before the input of every use of a weight: uint8 over a range, or float8.

    A Sum of one value, which changes nothing, keeps two passes of onnxruntime (1.32) away. One takes a Relu for part of any
    rounding whose code of zero is 0, which is right of uint8 alone; the other quantizes float weights behind rounded inputs,
    unless they are ``dequantized``.
    """
    kind, scale, zero = _scale_zero(rounding)
    codes_type, floats = ir.DataType[kind], kind != "UINT8"
    parts = {
        _INPUT_SCALE: ir.Tensor(np.array(scale, np.float32), name=f"{layer.name}{_INPUT_SCALE}"),
        _INPUT_ZERO: ir.Tensor(
            np.array(zero).astype(codes_type.numpy()), codes_type, name=f"{layer.name}{_INPUT_ZERO}"
        ),
    }
    settings = [_initializer(ir, graph, part) for part in parts.values()]
    for node in _products(_weight(graph, layer)):
        x = node.inputs[0]
        before = [ir.Node("", "Sum", [x])] if floats else []
        codes = ir.Node("", "QuantizeLinear", [before[0].outputs[0] if before else x, *settings])
        again = [ir.Node("", "DequantizeLinear", [codes.outputs[0], *settings])]
        again += [] if dequantized else [ir.Node("", "Sum", [again[0].outputs[0]])]
        for made in [*before, *again]:
            made.outputs[0].shape, made.outputs[0].type = x.shape, x.type
        graph.insert_before(node, [*before, codes, *again])
        node.replace_input_with(0, again[-1].outputs[0])


def _scale_zero(rounding: InputRounding) -> tuple[str, float, float]:
    """The type of an input's codes, what they are multiples of, as float32 has it, and the code of zero."""
    assert rounding.pair is not None
    scale, *zero = INPUTS[rounding.input].constants(rounding.pair)
    return _INPUTS[rounding.input], float(np.float32(scale)), zero[0] if zero else 0.0


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
    """What gives a layer's weight from its codes, and the names of the initializers that it reads.

    Codes lie as [out, …], or as [in, out] when ``transposed``. Groups of a convolution run over its flattened inputs: they are
    dequantized as [out, inputs] and reshaped. ``apart``: through a Flatten of two axes, which changes nothing and stops fusion.
    """
    blocked = _blocked(request, layer)
    matrix = transposed or blocked or apart
    shape = (layer.shape[0], math.prod(layer.shape[1:])) if matrix else layer.shape
    parts = _parts(ir, request, layer, found, shape, transposed)
    values = {name: _initializer(ir, graph, part) for name, part in parts.items()}
    axis = int(transposed) if not blocked else int(not transposed)
    attributes = [ir.Attr("axis", ir.AttributeType.INT, axis)]
    if blocked:
        attributes.append(ir.Attr("block_size", ir.AttributeType.INT, _groups(request, layer)[0]))
    nodes, made = [], {value.name for value in values.values()}
    if isinstance(found.number, Kept):
        whole = ir.Attr("to", ir.AttributeType.INT, int(ir.DataType.FLOAT))
        nodes.append(ir.Node("", "Cast", [values["weight_codes"]], [whole]))
    else:
        below = values.pop(TENSOR_SCALE, None)
        if below is not None:
            nodes.append(ir.Node("", "DequantizeLinear", [values["weight_scale"], below]))
            values["weight_scale"] = nodes[-1].outputs[0]
        nodes.append(ir.Node("", "DequantizeLinear", list(values.values()), attributes))
    if apart:
        nodes.append(ir.Node("", "Flatten", [nodes[-1].outputs[0]]))
    if len(shape) < len(layer.shape):
        dims = ir.Tensor(np.array(layer.shape, np.int64), name=f"{layer.name}.weight_shape")
        nodes.append(ir.Node("", "Reshape", [nodes[-1].outputs[0], _initializer(ir, graph, dims)]))
    for node in nodes:
        node.outputs[0].dtype = ir.DataType.FLOAT
    nodes[-1].outputs[0].shape = ir.Shape(tuple(reversed(layer.shape)) if transposed else layer.shape)
    graph.insert_before(graph[0], nodes)
    return nodes[-1].outputs[0], made


def _parts(
    ir: Any, request: Request, layer: Layer, found: Quantized, shape: tuple[int, ...], transposed: bool
) -> dict[str, Any]:
    """Codes, scales and zero points as DequantizeLinear wants them, in its order.

    Scales and zero points: a scalar, one per row, or [rows, groups]. Scales of nvfp4 are float8; the scalar that they are
    multiples of comes last.
    """
    blocked, per_tensor = _blocked(request, layer), _scales(request, layer) == 1

    def placed(part: Tensor) -> Tensor:
        shaped = part.view(layer.shape[0], -1) if blocked else part.view(()) if per_tensor else part.view(-1)
        return shaped.T if transposed and blocked else shaped

    def tensor(part: str, value: Tensor, kind: Any) -> Any:
        own, integers = value.contiguous(), kind.name.startswith(("INT", "UINT"))
        same = own if integers else own.view({1: torch.int8, 2: torch.int16, 4: torch.float32}[own.element_size()])
        array = same.numpy().astype(kind.numpy()) if integers else same.numpy().view(kind.numpy())
        return ir.Tensor(array, dtype=kind, name=f"{layer.name}.{part}")

    kinds = ir.DataType
    codes = found.codes.view(shape)
    codes = codes.T if transposed else codes
    if not isinstance(found.number, Integer):
        parts = {"weight_codes": tensor("weight_codes", codes, kinds[_FLOATS[found.number.name]])}
        if isinstance(found.number, Kept):
            return parts
        if found.scales.tensor_scale is None:
            return parts | {"weight_scale": tensor("weight_scale", placed(found.scale), kinds.FLOAT)}
        packed = found.packed()
        parts["weight_scale"] = tensor("weight_scale", placed(packed["weight_scale"]), kinds.FLOAT8E4M3FN)
        return parts | {TENSOR_SCALE: tensor(TENSOR_SCALE, 1 / packed[TENSOR_SCALE].view(()), kinds.FLOAT)}
    signed = {2: kinds.INT2, 4: kinds.INT4, 8: kinds.INT8}[_container(found.number)]
    container = kinds.UINT8 if found.codes.dtype == torch.uint8 else signed
    parts = {
        "weight_codes": tensor("weight_codes", codes, container),
        "weight_scale": tensor("weight_scale", placed(found.scale), kinds.FLOAT),
    }
    if found.zero_point is not None:
        parts["weight_zero_point"] = tensor("weight_zero_point", placed(found.zero_point), container)
    return parts


def _initializer(ir: Any, graph: Any, tensor: Any) -> Any:
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _inline(model: Any) -> None:
    """No function hides what reads a weight."""
    import onnxscript.optimizer

    onnxscript.optimizer.inline(model)


def _clean(model: Any) -> None:
    """Fold constants other than stored weights, and drop what the exporter notes about the machine: stack traces with paths.

    No other pass of the optimizer runs: fusing and sharing would change tensors whose bytes were promised.
    """
    import onnxscript.optimizer
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    def stored(node: Any) -> bool | None:
        return False if any(value is not None and value.name.endswith(_CODES) for value in node.inputs) else None

    onnxscript.optimizer.fold_constants(model, should_fold=stored)
    onnxscript.optimizer.remove_unused_nodes(model)
    ClearMetadataAndDocStringPass()(model)


FORMAT = base.Format(write, predict, verify, files=(MODEL_FILE, _DATA_FILE), options=Options, notes=notes)
