"""Sees every call that applies a parameter to something, while a model runs: modules' own, and functional ones.

A parameter is followed through what takes output channels of it or turns it around, so that packed projections are seen too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .layers import applied_as, groups_of, positions

_KINDS = {"__matmul__": "matmul", "mm": "matmul"} | {
    name: name
    for name in ("linear", "matmul", *(f"conv{turned}{n}d" for turned in ("", "_transpose") for n in (1, 2, 3)))
}
_TURNED = ("t", "T", "mT", "transpose", "permute", "swapaxes", "movedim")
_TAKEN = ("chunk", "narrow", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split", "__getitem__")
_SAME = ("alias", "clone", "contiguous", "data", "detach")
_SHAPED = ("flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view")
_VIEWS = (*_TURNED, *_TAKEN, *_SAME, *_SHAPED)


@dataclass(frozen=True)
class Part:
    """A parameter, or what a view takes of it.

    Attributes:
        name: of the parameter.
        turned: whether its dimensions changed places.
        taken: the same part of another tensor of the parameter's shape.
    """

    name: str
    turned: bool
    taken: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """A function of torch's that applies a weight.

    Attributes:
        kind: linear, matmul, conv1d to conv3d, or conv_transpose1d to 3d.
        part: which weight.
        args, kwargs: input, weight and what else the function is given.
    """

    kind: str
    part: Part
    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def applied(self) -> str:
        """How the parameter itself is applied: the kind of its layer."""
        return applied_as(self.kind, self.part.turned)

    @property
    def groups(self) -> int:
        """Of a convolution."""
        return groups_of(self.args, self.kwargs)

    @property
    def x(self) -> Tensor:
        found: Tensor = self.args[0]
        return found

    def on(self, x: Tensor) -> Call:
        """The same call on another input."""
        return replace(self, args=(x, *self.args[1:]))

    def of(self, x: Tensor) -> Tensor:
        """What the call makes of another input."""
        return self.function(x, *self.args[1:], **self.kwargs)

    def with_weight(self, weight: Tensor) -> Tensor:
        """The call with another parameter in the place of its own."""
        return self.function(self.x, self.part.taken(weight), *self.args[2:], **self.kwargs)

    def under(self, weight: Tensor) -> Tensor:
        """What the input becomes under another parameter, without bias."""
        own = self.part.taken(weight)
        if self.kind == "matmul":
            return self.function(self.x, own)
        rest = {name: value for name, value in self.kwargs.items() if name != "bias"}
        return self.function(self.x, own, None, *self.args[3:], **rest)

    def macs(self, output: Tensor, samples: int) -> int:
        """Multiply-adds per sample."""
        weight: Tensor = self.args[1]
        applied: int = math.prod(positions(self.kind, self.x.shape, output.shape)) // samples
        return applied * weight.numel()


class Calls(TorchFunctionMode):
    """While it is active, ``seen`` is called for every application of a parameter and gives its output.

    Args:
        parameters: {name: tensor} as the model reads them.
        seen: ``seen(call)``.
    """

    def __init__(self, parameters: Mapping[str, Tensor], seen: Callable[[Call], Tensor]) -> None:
        super().__init__()
        self._seen = seen
        self._parts: dict[int, Part] = {}
        self._kept: list[Any] = []  # what is known by its address stays
        for name, parameter in parameters.items():
            self.know(parameter, name)

    def __enter__(self) -> Calls:
        _ACTIVE.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        _ACTIVE.remove(self)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, _name(func)
        if name == "multi_head_attention_forward":
            with _opened(), self:
                return func(*args, **kwargs)
        if name in _VIEWS and args and id(args[0]) in self._parts:
            return self._view(func, name, args, kwargs)
        call = self._call(func, name, args, kwargs)
        return self._other(func, name, args, kwargs) if call is None else self._seen(call)

    def know(self, tensor: Tensor, name: str) -> None:
        """Take a tensor for a parameter."""
        self._know(tensor, Part(name, False, lambda other: other))

    def _know(self, tensor: Tensor, part: Part) -> None:
        self._parts[id(tensor)] = part
        self._kept.append(tensor)

    def _view(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        part, output = self._parts[id(args[0])], func(*args, **kwargs)
        turned = part.turned != (name in _TURNED and args[0].dim() > 1)
        whole = isinstance(output, Tensor)
        for k, tensor in enumerate([output] if whole else output):

            def taken(other: Tensor, k: int = k) -> Tensor:
                made = func(part.taken(other), *args[1:], **kwargs)
                found: Tensor = made if whole else made[k]
                return found

            self._know(tensor, Part(part.name, turned, taken))
        return output

    def _call(self, func: Any, name: str, args: Any, kwargs: Any) -> Call | None:
        kind, args, rest = _operands(name, args, kwargs)
        if kind is None or id(args[0]) in self._parts:
            return None
        part = self._parts.get(id(args[1]))
        if part is None or (kind == "matmul" and args[1].dim() != 2):
            return None
        return Call(kind, part, func, args, rest)

    def _other(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """A function that applies no parameter."""
        return func(*args, **kwargs)


class Readers(Calls):
    """Calls, and what else becomes of parameters.

    Args:
        constants: other tensors that weights may be computed from, such as buffers.

    Attributes:
        read: {parameter: names of functions that read it otherwise}.
        computed: (name of the function that computes it, parameters behind it) of every weight that is applied but computed.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], seen: Callable[[Call], Tensor], constants: Iterable[Tensor]
    ) -> None:
        super().__init__(parameters, seen)
        self.read: dict[str, dict[str, None]] = {}
        self.computed: list[tuple[str, frozenset[str]]] = []
        self._made: dict[int, tuple[str, frozenset[str]]] = {}
        for tensor in constants:
            self._make(tensor, "", frozenset())

    def _other(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        kind, operands, _ = _operands(name, args, kwargs)
        if kind is not None and id(operands[0]) not in self._parts:
            made_by = self._made.get(id(operands[1]))
            self.computed += [made_by] if made_by is not None and made_by[1] else []
        if getattr(func, "__name__", "") != "__get__":  # shapes and dtypes
            for tensor in given:
                if id(tensor) in self._parts:
                    self.read.setdefault(self._parts[id(tensor)].name, {})[name] = None
        output = func(*args, **kwargs)
        if given and all(id(tensor) in self._parts or id(tensor) in self._made for tensor in given):
            behind = frozenset[str]().union(*map(self._behind, given))
            for made in pytree.tree_leaves(output):
                if isinstance(made, Tensor) and id(made) not in self._parts:
                    self._make(made, name, behind)
        return output

    def _behind(self, tensor: Tensor) -> frozenset[str]:
        """The parameters that a tensor is computed from."""
        part = self._parts.get(id(tensor))
        return self._made[id(tensor)][1] if part is None else frozenset([part.name])

    def _make(self, tensor: Tensor, function: str, behind: frozenset[str]) -> None:
        self._made[id(tensor)] = (function, behind)
        self._kept.append(tensor)


def _operands(name: str, args: Any, kwargs: Any) -> tuple[str | None, Any, dict[str, Any]]:
    """(kind of a function that multiplies two tensors, its arguments from these on, those by name); None for another one."""
    kind, rest = _KINDS.get(name), dict(kwargs)
    names = ("input", "other" if kind == "matmul" else "weight")
    while len(args) < 2 and names[len(args)] in rest:
        args = (*args, rest.pop(names[len(args)]))
    return kind if len(args) > 1 else None, args, rest


_ACTIVE: list[Calls] = []


def announce(weight: Tensor, name: str) -> Tensor:
    """Say that a tensor that was just made, from packed codes, stands for a parameter; it is returned."""
    for calls in _ACTIVE:
        calls.know(weight, name)
    return weight


def _name(func: Any) -> str:
    name: str = getattr(func, "__name__", str(func))
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name


_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


@contextmanager
def _opened() -> Iterator[None]:
    """Torch's own functions run their bodies where they would call this mode again."""
    functions = torch.nn.functional
    held = {name: getattr(functions, name) for name in _CHECKS}
    try:
        for name in _CHECKS:
            setattr(functions, name, lambda *_: False)
        yield
    finally:
        for name, check in held.items():
            setattr(functions, name, check)
