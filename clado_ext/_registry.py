"""One way to make a torch op of native kernels: schema, allocation (with its checks) and launch."""

from __future__ import annotations

import inspect
import textwrap
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from numbers import Integral, Real
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import _native

_library: Any = torch.library  # its methods are not annotated
LIBRARY = _library.Library("clado", "DEF")
_CPU = torch.device("cpu")
_P = ParamSpec("_P")
_R = TypeVar("_R")
# Memory for an output: (tensor on whose device it lies, shape, dtype) -> tensor.
Empty = Callable[[Tensor, Sequence[int], torch.dtype], Tensor]
_INTO: dict[Any, Any] = {}  # an op -> the same into tensors of the caller: as a function, as an op


def define(
    schema: str, allocate: Callable[Concatenate[Empty, _P], _R], launch: Callable[..., None]
) -> Callable[_P, _R]:
    """Register ``clado::<name>`` for CPU, CUDA and fake tensors; returns the op (a call of it costs less than by its name).

    ``allocate(empty, *args)`` checks the arguments and returns the output(s), each from ``empty`` and in order; it runs under
    fake tensors too, so it may look at shapes, dtypes and devices but never at values. ``launch(*args, *outputs)`` fills them.

    ``clado::<name>_into(args, outputs) -> ()`` is the same op with ``empty`` handing out the caller's tensors (see :func:`run`).
    """
    head, _, results = schema.rpartition(" -> ")
    name, kinds = head.partition("(")[0], results.strip("()").split(", ")

    def run_new(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        outputs = allocate(_new, *args, **kwargs)
        launch(*args, *(outputs if isinstance(outputs, tuple) else (outputs,)), **kwargs)
        return outputs

    def run_by_host(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        outputs = allocate(_new, *args, **kwargs)
        by_host(partial(launch, **kwargs), args, outputs if isinstance(outputs, tuple) else (outputs,))
        return outputs

    def taken(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        inputs, outputs = args[: -len(kinds)], args[-len(kinds) :]
        allocate(_Given(name, outputs), *inputs)  # type: ignore[call-arg]
        return inputs, outputs

    def run_into(*args: Any) -> None:
        inputs, outputs = taken(args)
        tensors = _tensors(outputs)
        if here or not tensors[0].is_cuda:
            launch(*inputs, *outputs)
        else:
            by_host(launch, inputs, outputs)
        for tensor in tensors:  # so that a backward pass that needs what stood there raises
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)

    def check_into(*args: Any) -> None:
        taken(args)

    here = _native.has_cuda
    op: Callable[_P, _R] = _register(schema, run_new, run_new if here else run_by_host, partial(allocate, _new))
    targets = ", ".join(f"Tensor({chr(97 + k)}!){kind.removeprefix('Tensor')} out{k}" for k, kind in enumerate(kinds))
    into_schema = f"{head[:-1].replace('(', '_into(', 1)}, {targets}) -> ()"
    _INTO[op] = run_into, _register(into_schema, run_into, run_into, check_into)
    return op


def _register(schema: str, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    _library.register_fake(f"clado::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.clado, name).default


def _new(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


class _Given:
    """Hands out the caller's tensors one after the other, each checked."""

    def __init__(self, op: str, outputs: tuple[Any, ...]) -> None:
        self.op, self.outputs, self.taken = op, outputs, 0
        self.tensors = _tensors(outputs)

    def __call__(self, like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        got = self.tensors[self.taken]
        if got.shape != shape or got.dtype != dtype or got.device != like.device or not got.is_contiguous():
            apart = "" if got.is_contiguous() else " of other strides"
            must = f"be contiguous {dtype} {tuple(shape)} on {like.device}"
            raise refusal(self.op, self._name(), must, f"{got.dtype} {tuple(got.shape)} on {got.device}{apart}")
        self.taken += 1
        return got

    def _name(self) -> str:
        """A tensor of a list goes by its place there, another by its place among several."""
        if isinstance(self.outputs[0], (list, tuple)):
            return f"out[{self.taken % len(self.outputs[0])}]"
        return f"out[{self.taken}]" if len(self.outputs) > 1 else "out"


def run(op: Callable[..., _R], args: tuple[Any, ...], out: _R | None) -> _R:
    """``op(*args)``, into the caller's tensors where they are given: of the structure and shapes that the op gives."""
    if out is None:
        return op(*args)
    outputs = out if isinstance(out, tuple) else (out,)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors(outputs)):
        raise refusal(str(op).split(".")[1], "out", "not require gradients", "one that does")
    given = (*args, *outputs)
    direct, dispatched = _INTO[op]
    # Torch's dispatcher takes longer than a small kernel; graphs, fake and meta tensors need it.
    (dispatched if torch.compiler.is_compiling() or not _lie_in_memory(given) else direct)(*given)
    return out


def _lie_in_memory(given: Sequence[Any]) -> bool:
    """Whether all tensors, in lists too, are plain ones on a real device."""
    for value in given:  # isinstance would take longer than the rest
        kind = type(value)
        if kind is Tensor or kind is torch.nn.Parameter:
            if value.is_meta:
                return False
        elif kind is list:
            if not _lie_in_memory(value):
                return False
        elif hasattr(value, "is_meta"):
            return False
    return True


def given_or_new(op: str, like: Tensor, shape: Sequence[int], dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """The caller's tensor, checked, or a new one, for what torch's own ops compute."""
    return _new(like, shape, dtype) if out is None else _Given(op, (out,))(like, shape, dtype)


def by_host(launch: Callable[..., None], inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """``launch(*inputs, *outputs)`` on copies in the CPU's memory: the same bits as on a GPU, slower; said once."""
    _warn_slow()
    copies = [_each(output, lambda tensor: torch.empty_like(tensor, device=_CPU)) for output in outputs]
    launch(*(_each(value, Tensor.cpu) for value in inputs), *copies)
    for output, copy in zip(_tensors(outputs), _tensors(copies), strict=True):
        output.copy_(copy)


def _tensors(given: Any) -> list[Tensor]:
    """Those of lists within lists, in order."""
    if isinstance(given, (list, tuple)):
        return [tensor for part in given for tensor in _tensors(part)]
    return [given]


def _each(given: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(given, (list, tuple)):
        return [_each(part, change) for part in given]
    return change(given) if hasattr(given, "is_cuda") else given


@cache
def _warn_slow() -> None:
    """Once in a process."""
    remedy = "CLADO_CUDA=ON pip install --force-reinstall --no-deps . in its folder builds them (see `clado doctor`)"
    warnings.warn(
        f"clado_ext: built without CUDA kernels, so the CPU computes what is on the GPU; {remedy}", stacklevel=5
    )


def call(name: str, device: torch.device, *args: float | Sequence[float] | Sequence[tuple[int, ...]]) -> Any:
    """Run native ``<name>_cpu`` on torch's thread count, or ``<name>_cuda`` on torch's current stream of ``device``."""
    if device == _CPU or device.type == "cpu":  # the first test is a tenth of the second
        return getattr(_native, f"{name}_cpu")(*args, torch.get_num_threads())
    if not _native.has_cuda:
        raise RuntimeError(f"{name}: this build of clado_ext has no CUDA kernels; rebuild with CLADO_CUDA=ON")
    index = torch.cuda.current_device() if device.index is None else device.index
    return getattr(_native, f"{name}_cuda")(*args, index, torch.cuda.current_stream(index).cuda_stream)


def require(condition: bool, op: str, argument: str, must: str, got: object) -> None:
    """Raise ``ValueError("op: argument must …, got …")`` unless ``condition`` holds.

    Where the text takes work to build, test first and raise :func:`refusal`: a check that passes must cost next to nothing.
    """
    if not condition:
        raise refusal(op, argument, must, got)


def refusal(op: str, argument: str, must: str, got: object) -> ValueError:
    """The error of an argument that does not fit."""
    return ValueError(f"{op}: {argument} must {must}, got {got}")


def checked(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A public function whose arguments of a wrong type are refused in one line, where torch's own text has many.

    Types are looked at only after a call has failed, so that a good call pays for one Python call more.
    """

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except Exception:
            clear = _misfit(function, *args, **kwargs)
            if clear is None:
                raise
            raise clear from None

    return run


def _dense(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided and x.device.type in ("cpu", "cuda", "meta")


_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "Tensor": ("be a dense tensor on cpu or cuda", _dense),
    "tuple[Tensor, Tensor]": (
        "be a tuple of 2 dense tensors",
        lambda x: isinstance(x, tuple) and len(x) == 2 and all(_dense(y) for y in x),
    ),
    "QuantizedWeight": ("be a QuantizedWeight", lambda x: hasattr(x, "zero_point")),
    "Sequence[int]": (
        "be a sequence of integers",
        lambda x: isinstance(x, Sequence) and all(isinstance(y, Integral) for y in x),
    ),
    "Sequence[str]": (
        "be a sequence of names",
        lambda x: isinstance(x, Sequence) and not isinstance(x, str) and all(isinstance(y, str) for y in x),
    ),
    "FormatScale": ("be a FormatScale", lambda x: hasattr(x, "tensor_scale")),
    "Sequence[FormatScale]": (
        "be a sequence of FormatScale",
        lambda x: isinstance(x, Sequence) and all(hasattr(y, "tensor_scale") for y in x),
    ),
    "int": ("be an integer", lambda x: isinstance(x, Integral)),
    "float": ("be a number", lambda x: isinstance(x, Real)),
    "bool": ("be True or False", lambda x: isinstance(x, bool)),
    "torch.dtype": ("be a torch.dtype", lambda x: isinstance(x, torch.dtype)),
}


def _misfit(function: Callable[..., Any], *args: Any, **kwargs: Any) -> ValueError | None:
    """The refusal of the first argument that is not of its annotated type, if there is one."""
    signature = inspect.signature(function)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:  # missing or unknown arguments: Python says that well
        return None
    for name, value in given.items():
        kind = signature.parameters[name].annotation
        must, fits = _TYPES[kind.removesuffix(" | None")]
        if fits(value) or (value is None and kind.endswith(" | None")):
            continue
        tensor = isinstance(value, Tensor)
        got = f"a {value.layout} tensor on {value.device}" if tensor else textwrap.shorten(repr(value), 60)
        return refusal(function.__name__, name, must, got)
    return None
