"""Most of what a test of a small net costs is torch.export, and most tests export nets that a test before them exported.

The stand-in for ``clado.graph.capture._export`` exports what it has not seen and hands out copies of the graph otherwise, with
the tensors of the module that it is given. Two modules are alike if their trees are of the same classes, attributes, shapes,
strides and shared storages; whatever else an attribute is, only itself is like it.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Hashable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

KEPT = 200
_PLAIN = (int, float, str, bool, bytes, type(None), torch.dtype, torch.device)


class ExportedOnce:
    """``export`` with a memory of the last graphs."""

    def __init__(self, export: Callable[[nn.Module, Any], Any]) -> None:
        self.export = export
        self.known: dict[Hashable, Any] = {}
        self.alive: list[Any] = []  # what is known by its address must not make room for another

    def __call__(self, model: nn.Module, example: Any) -> Any:
        key = (self._tree(model), self._example(example), torch.get_default_dtype())
        if key not in self.known:
            if len(self.known) >= KEPT:
                self.known, self.alive = {}, []
                return self(model, example)
            self.known[key] = _kept(self.export(model, example), model)
        return _handed_out(self.known[key], model)

    def _tree(self, model: nn.Module) -> Hashable:
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        places = {tensor.untyped_storage()._cdata: k for k, (_, tensor) in enumerate(tensors)}
        own = [(name, self._tensor(t), t.requires_grad, places[t.untyped_storage()._cdata]) for name, t in tensors]
        parts = [
            (name, type(part), self._attributes(part)) for name, part in model.named_modules(remove_duplicate=False)
        ]
        return (tuple(own), tuple(parts))

    def _attributes(self, part: nn.Module) -> Hashable:
        return self._value({k: v for k, v in vars(part).items() if k not in ("_parameters", "_buffers", "_modules")})

    def _value(self, value: Any) -> Hashable:
        if isinstance(value, _PLAIN):
            return (type(value), repr(value))
        if isinstance(value, Mapping):
            return tuple((self._value(k), self._value(v)) for k, v in value.items())
        if isinstance(value, (list, tuple, set, frozenset)):
            return (type(value), tuple(map(self._value, value)))
        self.alive.append(value)
        return id(value)

    def _example(self, example: Any) -> Hashable:
        leaves, tree = pytree.tree_flatten(example)
        return (
            str(tree),
            tuple(self._tensor(leaf) if isinstance(leaf, Tensor) else self._value(leaf) for leaf in leaves),
        )

    @staticmethod
    def _tensor(t: Tensor) -> Hashable:
        return (type(t), tuple(t.shape), t.stride(), t.storage_offset(), t.dtype, t.device)


def install() -> None:
    """From here on in this process."""
    module = importlib.import_module("clado.graph.capture")
    module._export = ExportedOnce(module._export)  # type: ignore[attr-defined]


def _kept(program: Any, model: nn.Module) -> Any:
    """What ``capture`` reads of an exported program, without the tensors of the module it was made of."""
    own = _tensors_of(model)
    return SimpleNamespace(
        graph=program.graph,
        graph_signature=program.graph_signature,
        call_spec=program.call_spec,
        state=list(program.state_dict),
        constants={name: None if name in own else value for name, value in program.constants.items()},
    )


def _handed_out(known: Any, model: nn.Module) -> Any:
    """The same of another module, the graph free to be changed."""
    own = _tensors_of(model)
    graph = copy.deepcopy(known.graph)
    for node, copied in zip(known.graph.nodes, graph.nodes, strict=True):
        copied.name = node.name  # the signature goes by names, and a copy is named anew
    return SimpleNamespace(
        graph=graph,
        graph_signature=known.graph_signature,
        call_spec=known.call_spec,
        state_dict={name: own[name] for name in known.state},
        constants={name: own.get(name, value) for name, value in known.constants.items()},
    )


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
