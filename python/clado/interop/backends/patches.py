"""Replacing functions inside another package: all of them or none, and every one put back."""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from ...common import CladoError


@dataclass
class Used:
    """What a tool did while :func:`clado.backend` was on: ``print`` it.

    Attributes:
        ours: calls that ran on our kernels, by what they compute.
        left: calls that ran as the tool has them, by what they compute and why.
    """

    ours: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        ours = [f"{count} × {what}" for what, count in sorted(self.ours.items())]
        left = [f"{count} × {what}" for what, count in sorted(self.left.items())]
        return f"on our kernels: {', '.join(ours) or 'nothing'}; as the tool has it: {', '.join(left) or 'nothing'}"


@dataclass(frozen=True)
class Part:
    """A function inside the tool that is replaced, or, without ``replace``, one that a replacement calls.

    Attributes:
        module: where it is defined, e.g. ``modelopt.torch.quantization.calib.mse``.
        name: its name there, ``Class.method`` for a method.
        parameters: their names as they must be; what else the tool may have there is unknown to us.
        replace: (the function, where to count) -> what stands in its place.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    replace: Callable[[Callable[..., Any], Used], Callable[..., Any]] | None = None


def put_in(tool: str, version: str, parts: Sequence[Part], used: Used) -> ExitStack:
    """Find every part, then replace those that have a replacement; closing what is returned puts all of them back.

    Raises:
        CladoError: a part is not there or takes other parameters; nothing has been replaced then.
    """
    found = [(part, *_find(tool, version, part)) for part in parts]
    with ExitStack() as stack:
        for part, owner, attribute, function in found:
            if part.replace is not None:
                stack.callback(setattr, owner, attribute, function)
                setattr(owner, attribute, part.replace(function, used))
        return stack.pop_all()


def _find(tool: str, version: str, part: Part) -> tuple[Any, str, Callable[..., Any]]:
    """(what holds the function, its name there, the function)."""
    signature = f"{part.module}.{part.name}({', '.join(part.parameters)})"
    must = f"backend: {tool} must have {signature}, got {tool} {version}"
    *path, attribute = part.name.split(".")
    try:
        owner: Any = importlib.import_module(part.module)
        for name in path:
            owner = getattr(owner, name)
        function = vars(owner)[attribute]
    except (ImportError, AttributeError, KeyError):
        raise CladoError(f"{must}, which has none") from None
    try:
        parameters = tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        raise CladoError(f"{must}, where it is no function") from None
    if parameters != part.parameters:
        raise CladoError(f"{must}, which takes ({', '.join(parameters)})")
    return owner, attribute, function
