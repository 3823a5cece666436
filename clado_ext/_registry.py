"""One way to make a torch op of native kernels: schema, allocation (with its checks) and launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _native

LIBRARY = torch.library.Library("clado", "DEF")
_CPU = torch.device("cpu")


def define(schema: str, allocate: Callable[..., Any], launch: Callable[..., None]) -> Callable[..., Any]:
    """Register ``clado::<name>`` for CPU, CUDA and fake tensors; returns the op (a call of it costs less than by its name).

    ``allocate(*args)`` checks the arguments and returns the empty output(s); it runs under fake tensors too, so it may
    look at shapes, dtypes and devices but never at values. ``launch(*args, *outputs)`` fills them.
    """
    name = schema.split("(", 1)[0]

    def run(*args: Any) -> Any:
        outputs = allocate(*args)
        launch(*args, *(outputs if isinstance(outputs, tuple) else (outputs,)))
        return outputs

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CPU")
    LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(f"clado::{name}", allocate, lib=LIBRARY)
    return getattr(torch.ops.clado, name).default


def call(name: str, device: torch.device, *args: int | float | list[int]) -> Any:
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
