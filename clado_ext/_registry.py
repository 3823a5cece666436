"""One way to make a torch op of native kernels: schema, allocation (with its checks) and launch."""

from __future__ import annotations

import inspect
import textwrap
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import _native

_library: Any = torch.library  # its methods are not annotated
LIBRARY = _library.Library("clado", "DEF")
_CPU = torch.device("cpu")
_P = ParamSpec("_P")
_R = TypeVar("_R")


def define(schema: str, allocate: Callable[_P, _R], launch: Callable[..., None]) -> Callable[_P, _R]:
    """Register ``clado::<name>`` for CPU, CUDA and fake tensors; returns the op (a call of it costs less than by its name).

    ``allocate(*args)`` checks the arguments and returns the empty output(s); it runs under fake tensors too, so it may
    look at shapes, dtypes and devices but never at values. ``launch(*args, *outputs)`` fills them.
    """
    name = schema.split("(", 1)[0]

    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        outputs = allocate(*args, **kwargs)
        launch(*args, *(outputs if isinstance(outputs, tuple) else (outputs,)), **kwargs)
        return outputs

    def run_by_host(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        outputs = allocate(*args, **kwargs)
        by_host(partial(launch, **kwargs), args, outputs if isinstance(outputs, tuple) else (outputs,))
        return outputs

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CPU")
    LIBRARY.impl(name, run if _native.has_cuda else run_by_host, "CUDA")
    _library.register_fake(f"clado::{name}", allocate, lib=LIBRARY)
    op: Callable[_P, _R] = getattr(torch.ops.clado, name).default
    return op


def fill(launch: Callable[..., None], inputs: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    """``launch(*inputs, *outputs)``, by way of the CPU where an output lies on a GPU and the build has no kernels for it."""
    if _native.has_cuda or not outputs[0].is_cuda:
        launch(*inputs, *outputs)
    else:
        by_host(launch, inputs, outputs)


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


def call(name: str, device: torch.device, *args: float | Sequence[int] | Sequence[tuple[int, ...]]) -> Any:
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


def check_output(op: str, name: str, got: Tensor, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise unless an output that the caller owns is a contiguous tensor of that shape and dtype on the device of ``like``."""
    if not (got.shape == shape and got.dtype == dtype and got.is_contiguous() and got.device == like.device):
        raise refusal(
            op,
            name,
            f"be contiguous {dtype} {shape} on {like.device}",
            f"{got.dtype} {tuple(got.shape)} on {got.device}",
        )


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
