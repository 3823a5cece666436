"""Digests that tell one run from another: of weights, of data, of settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


def digest(settings: Any) -> str:
    """SHA-256 of a JSON value with sorted keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=list).encode()).hexdigest()


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def data_digest(sample_digests: NDArray[np.int64]) -> str:
    """SHA-256 over the digests of all samples in order."""
    return hashlib.sha256(np.ascontiguousarray(sample_digests, np.int64).tobytes()).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of everything in the model's state dict."""
    return tensor_digest({name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)})


def code_digest(function: Callable[..., Any] | None) -> str | None:
    """A function's name and a digest of its code; None for None. What its code refers to is not followed."""
    if function is None:
        return None
    code = getattr(function, "__code__", None)
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
    return name if code is None else f"{name} {digest(_spelled(code))[:16]}"


def _spelled(code: CodeType) -> list[Any]:
    """Instructions, names and constants; of functions inside, theirs."""
    return [code.co_code.hex(), list(code.co_names), [_constant(value) for value in code.co_consts]]


def _constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return _spelled(value)
    return (
        sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)
    )  # a set's order changes from run to run
