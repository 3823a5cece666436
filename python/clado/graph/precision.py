"""In which arithmetic a model runs, and a copy of it that does; what enters a product in a low precision."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

LOW_PRECISIONS = ("tf32", "bfloat16")
PRECISIONS = {"float32": torch.float32, "float64": torch.float64} | dict.fromkeys(LOW_PRECISIONS, torch.float32)


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32: TF32 and bfloat16 shortcuts off."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def common_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that holds all floating-point values of a model: its own where it has one, float32 for half and float32."""
    return reduce(torch.promote_types, _floating(model), next(iter(_floating(model)), torch.float32))


def converted(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model itself, or a copy where device or dtype differ.

    Where a copy's forward casts to a dtype that the model had (``x.half()``), it casts to ``dtype`` instead.
    """
    tensors, others = [*model.parameters(), *model.buffers()], _floating(model) - {dtype}
    if not others and all(t.device == device for t in tensors):
        return model
    made = copy.deepcopy(model).to(device, dtype)
    if others:
        casts = _Casts(frozenset(others), dtype)
        made.register_forward_pre_hook(casts.begin, with_kwargs=True, prepend=True)
        made.register_forward_hook(casts.end, always_call=True)
    return made


def _floating(model: nn.Module) -> set[torch.dtype]:
    return {t.dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()}


class _Casts(TorchFunctionMode):
    """While a model runs, whatever asks for one of ``others`` gets ``dtype``."""

    def __init__(self, others: frozenset[torch.dtype], dtype: torch.dtype) -> None:
        super().__init__()
        self.others, self.dtype = others, dtype
        named = {torch.float16: Tensor.half, torch.bfloat16: Tensor.bfloat16}
        named |= {torch.float32: Tensor.float, torch.float64: Tensor.double}
        self._methods = {method for other, method in named.items() if other in others}

    def begin(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        """A hook before the forward: what enters has the dtype too."""
        self.__enter__()  # type: ignore[no-untyped-call]

        def cast(value: Any) -> Any:
            return value.to(self.dtype) if isinstance(value, Tensor) and value.dtype in self.others else value

        return pytree.tree_map(cast, (args, kwargs))

    def end(self, *_: Any) -> None:
        """A hook behind the forward, also where it raises."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._methods:
            return args[0].to(self.dtype)

        def asked(value: Any) -> Any:
            return self.dtype if isinstance(value, torch.dtype) and value in self.others else value

        args, kwargs = pytree.tree_map(asked, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


class Precision:
    """How matrix products round their operands; sums are float32."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.half = name == "bfloat16"  # what leaves a product, or enters the next one, is bfloat16; sums are float32
        self._emulated = name == "tf32" and device.type != "cuda"

    def operand(self, x: Tensor) -> Tensor:
        """What enters a product; TF32 is rounded here where no hardware does it."""
        if self.name == "bfloat16":
            return x.bfloat16()
        return _round_tf32(x) if self._emulated else x

    def product(self) -> AbstractContextManager[None]:
        """Where products run."""
        return _tf32_units() if self.name == "tf32" and not self._emulated else nullcontext()


def _round_tf32(x: Tensor) -> Tensor:
    """Ten bits behind the point, half to even; NaN and infinity stay."""
    bits = x.float().contiguous().view(torch.int32)
    rounded = (bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF
    return torch.where(torch.isfinite(x), rounded.view(torch.float32), x)


@contextmanager
def _tf32_units() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
