"""Layers: the weights that can be quantized, their names, and which of them stay in float."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..common import CladoError, require


@dataclass(frozen=True)
class Layer:
    """A quantizable unit: a weight that is applied as a matrix or a kernel.

    Attributes:
        name: of the module that owns it, or of the parameter.
        kind: what applies it: linear, conv1d to conv3d, conv_transpose1d to 3d, or matmul (``x @ w``).
        shape: of its rows, ``[N, …]`` with output channels first, as it is quantized.
        macs: multiply-adds per sample.
        names: every parameter that shares the storage; the first one names the layer.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    macs: int
    names: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def in_rows(self) -> bool:
        """Whether the parameter has its output channels first, as the rows have."""
        return has_rows(self.kind)

    def weight(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """This layer's weight among a model's parameters, as :meth:`rows`."""
        return self.rows(parameters[self.names[0]])

    def rows(self, parameter: Tensor) -> Tensor:
        """A parameter of this layer with its output channels first: ``[N, …]`` of :attr:`shape`."""
        return parameter if self.in_rows else in_rows(self.kind, parameter, parameter.shape[0] // self.shape[1])

    def parameter(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Inverse of :meth:`rows`, for a parameter of this shape."""
        if self.in_rows:
            return rows
        if self.kind == "matmul":
            return rows.T
        inputs, outputs, *kernel = shape
        turned: Tensor = rows.unflatten(0, (-1, outputs)).transpose(1, 2)
        return turned.reshape(inputs, outputs, *kernel)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a parameter of this shape can be this layer's."""
        if self.in_rows:
            return tuple(shape) == self.shape
        if len(shape) != len(self.shape) or tuple(shape[2:]) != self.shape[2:]:
            return False
        groups, rest = divmod(shape[0], self.shape[1])
        return not rest and groups * shape[1] == self.shape[0] and (groups == 1 or self.kind != "matmul")

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


def has_rows(kind: str) -> bool:
    """Whether a parameter that is applied so has its output channels first."""
    return kind != "matmul" and "transpose" not in kind


def applied_as(kind: str, turned: bool) -> str:
    """The kind of a layer whose parameter, or its transpose where ``turned``, is given to a function of a kind."""
    if kind not in ("linear", "matmul"):
        return kind
    return "linear" if turned == (kind == "matmul") else "matmul"


def groups_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Of a convolution, plain or transposed, from the arguments of torch's functions; 1 for other functions."""
    return int(args[6]) if len(args) > 6 else int(kwargs.get("groups", 1))


def positions(kind: str, entered: Sequence[Any], left: Sequence[Any]) -> list[Any]:
    """Sizes over which a weight is applied, samples among them, from the shapes of what enters and of what leaves."""
    shape = entered if "transpose" in kind else left
    channel = 1 if kind.startswith("conv") else len(shape) - 1
    return [size for dim, size in enumerate(shape) if dim != channel]


def in_rows(kind: str, parameter: Tensor, groups: int = 1) -> Tensor:
    """A parameter with its output channels first: the transpose of ``x @ w``'s, and ``[out, in / groups, …]`` of a transposed
    convolution's ``[in, out / groups, …]``."""
    if has_rows(kind):
        return parameter
    return parameter.T if kind == "matmul" else parameter.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def storage(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def layer_name(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def modules(layer: Layer) -> list[str]:
    """Modules that own the weight; a layer of imported scores knows no parameters, and is its own."""
    return [layer_name(parameter) for parameter in layer.names or (layer.name,)]


def ignored(
    layers: Sequence[Layer], ignore: Sequence[str], quantize_ends: bool, only: Sequence[str] | None = None
) -> dict[str, str]:
    """Names of the layers to keep in float, with the reason; ``only``: all that are not among these, whatever else is said."""
    if only is not None:
        return {layer.name: "not asked for" for layer in layers if layer.name not in only}
    keep: dict[str, str] = {}
    if not quantize_ends and len(layers) > 1:
        if layers[0].kind.startswith("conv"):
            keep[layers[0].name] = "first convolution"
        if layers[-1].kind in ("linear", "matmul"):
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
