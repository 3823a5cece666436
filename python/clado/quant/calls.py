"""Sees every call that applies a parameter to something, while a model runs: modules' own, and functional ones.

A parameter is followed through what takes output channels of it or turns it around, so that packed projections are seen too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_KINDS = {"__matmul__": "matmul", "mm": "matmul"} | {
    name: name
    for name in ("linear", "matmul", *(f"conv{turned}{n}d" for turned in ("", "_transpose") for n in (1, 2, 3)))
}
_TURNED = ("t", "T", "mT", "transpose", "permute", "swapaxes", "movedim")
_VIEWS = (
    *_TURNED,
    *(
        "alias",
        "chunk",
        "clone",
        "contiguous",
        "data",
        "detach",
        "flatten",
        "narrow",
        "reshape",
        "split",
        "split_with_sizes",
    ),
    *("squeeze", "tensor_split", "unflatten", "unsafe_chunk", "unsafe_split", "unsqueeze", "view", "__getitem__"),
)


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
        if self.kind not in ("linear", "matmul"):
            return self.kind
        return "linear" if self.part.turned == (self.kind == "matmul") else "matmul"

    @property
    def groups(self) -> int:
        """Of a convolution."""
        return int(self.args[6]) if len(self.args) > 6 else int(self.kwargs.get("groups", 1))

    @property
    def x(self) -> Tensor:
        found: Tensor = self.args[0]
        return found

    def of(self, x: Tensor) -> Tensor:
        """The call on another input."""
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
        shape = self.x.shape if "transpose" in self.kind else output.shape
        channels = shape[-1] if not self.kind.startswith("conv") else shape[1]
        weight: Tensor = self.args[1]
        return math.prod(shape) // channels // samples * weight.numel()


class Calls(TorchFunctionMode):
    """While it is active, ``seen`` is called for every application of a parameter and gives its output.

    Args:
        parameters: {name: tensor} as the model reads them.
        seen: ``seen(call)``; None: :meth:`Call.of` its own input.
        constants: other tensors that weights may be computed from, such as buffers.

    Attributes:
        read: {parameter: names of functions that read it otherwise}.
        computed: {name of a function that computes a weight: the parameters behind it}, for each weight that is applied.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        seen: Callable[[Call], Tensor] | None = None,
        constants: Iterable[Tensor] = (),
    ) -> None:
        super().__init__()
        self.read: dict[str, dict[str, None]] = {}
        self.computed: dict[str, set[str]] = {}
        self._seen = seen or (lambda call: call.of(call.x))
        self._parts: dict[int, Part] = {}
        self._made: dict[int, tuple[str, set[str]]] = {}
        self._kept: list[Any] = []  # what is known by its address stays
        for tensor in constants:
            self._made[id(tensor)] = ("", set())
            self._kept.append(tensor)
        for name, parameter in parameters.items():
            self._know(parameter, Part(name, False, lambda tensor: tensor))

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
        if call is not None:
            return self._seen(call)
        if getattr(func, "__name__", "") != "__get__":  # shapes and dtypes
            self._note(name, args, kwargs)
        output = func(*args, **kwargs)
        self._follow(name, output, args, kwargs)
        return output

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
        if name not in _KINDS:
            return None
        names = ("input", "weight", "bias") if _KINDS[name] != "matmul" else ("input", "other")
        rest = dict(kwargs)
        while len(args) < 2 and names[len(args)] in rest:
            args = (*args, rest.pop(names[len(args)]))
        if len(args) < 2 or id(args[0]) in self._parts:
            return None
        part = self._parts.get(id(args[1]))
        if part is None:
            made = self._made.get(id(args[1]))
            if made is not None and made[1]:
                self.computed.setdefault(made[0], set()).update(made[1])
            return None
        if _KINDS[name] == "matmul" and args[1].dim() != 2:
            return None
        return Call(_KINDS[name], part, func, args, rest)

    def _note(self, name: str, args: Any, kwargs: Any) -> None:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and id(leaf) in self._parts:
                self.read.setdefault(self._parts[id(leaf)].name, {})[name] = None

    def _follow(self, name: str, output: Any, args: Any, kwargs: Any) -> None:
        """Know what is computed from parameters alone."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        behind: set[str] = set()
        for tensor in tensors:
            part, made = self._parts.get(id(tensor)), self._made.get(id(tensor))
            if part is None and made is None:
                return
            behind |= {part.name} if part is not None else made[1] if made is not None else set()
        for made in pytree.tree_leaves(output) if tensors else ():
            if isinstance(made, Tensor) and id(made) not in self._parts:
                self._made[id(made)] = (name, behind)
                self._kept.append(made)


_ACTIVE: list[Calls] = []


def announce(weight: Tensor, name: str) -> Tensor:
    """Say that a tensor that was just made, from packed codes, stands for a parameter; it is returned."""
    for calls in _ACTIVE:
        calls._know(weight, Part(name, False, lambda tensor: tensor))
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
