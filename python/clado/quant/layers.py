"""Layers: the weights that can be quantized, their names, and which of them stay in float."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..common import CladoError, require


@dataclass(frozen=True)
class Layer:
    """A quantizable unit. ``names`` holds every parameter that shares the storage; the first one names the layer."""

    name: str
    kind: str
    shape: tuple[int, ...]
    macs: int
    names: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @staticmethod
    def from_json(item: Any, op: str, what: str) -> Layer:
        """From an object of a file.

        Raises:
            CladoError: other fields, names that are no text, shapes or numbers that are none.
        """
        try:
            layer = Layer(item["name"], item["kind"], tuple(item["shape"]), item["macs"], tuple(item["names"]))
        except (KeyError, TypeError) as error:
            raise CladoError(f"{op}: file must be a whole clado {what}, got a layer without {error}") from None
        named = all(isinstance(name, str) for name in (layer.name, layer.kind, *layer.names))
        named = named and not isinstance(item["names"], str)  # imported scores know no parameters: none is right
        sized = bool(layer.shape) and all(type(size) is int and size > 0 for size in layer.shape)
        counted = type(layer.macs) is int and layer.macs >= 0
        shown = f"{layer.name!r} {layer.shape}"
        require(named and sized and counted, op, "layers", "have names, positive shapes and macs", shown)
        return layer


def storage(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def layer_name(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def modules(layer: Layer) -> list[str]:
    """Modules that own the weight; a layer of imported scores knows no parameters, and is its own."""
    return [layer_name(parameter) for parameter in layer.names or (layer.name,)]


def ignored(layers: Sequence[Layer], ignore: Sequence[str], quantize_ends: bool) -> dict[str, str]:
    """Names of the layers to keep in float, with the reason."""
    keep: dict[str, str] = {}
    if not quantize_ends and len(layers) > 1:
        if layers[0].kind == "conv2d":
            keep[layers[0].name] = "first convolution"
        if layers[-1].kind == "linear":
            keep[layers[-1].name] = "classifier"
    for pattern in ignore:
        if pattern.startswith("re:"):
            try:
                matcher = re.compile(pattern[3:]).fullmatch
            except re.error as error:
                raise CladoError(
                    f"capture: ignore must hold valid regular expressions, got {pattern!r} ({error})"
                ) from None
            matched = [layer.name for layer in layers if matcher(layer.name)]
        else:
            matched = [layer.name for layer in layers if fnmatch.fnmatchcase(layer.name, pattern)]
        require(
            len(matched) > 0,
            "capture",
            "ignore",
            "match at least one layer",
            f"{pattern!r} (first layers: " + ", ".join(layer.name for layer in layers[:4]) + ")",
        )
        keep.update(dict.fromkeys(matched, f"ignore {pattern!r}"))
    return keep
