"""A model of any inputs and outputs as a function of tensors with names, as a file of its graph has it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..common import moved_to, require, users_code

ForwardStep = Callable[[nn.Module, Any], Any]
INPUT, OUTPUT, LOGITS = (
    "input",
    "output",
    "logits",
)  # a single tensor's name, or what stands before a number; of one output


class Flat(nn.Module):
    """A model run on the tensors of an example, in order, that gives its outputs' tensors in order.

    Without ``forward_step`` a tensor is the model's input, a tuple or list its arguments, a mapping its arguments by name.

    Args:
        example: nest of tensors ``[n, …]``; what is no tensor in it stays as it is.

    Attributes:
        read: places of the leaves that the model reads, all tensors until :func:`face_of` has seen it run.
    """

    def __init__(self, model: nn.Module, forward_step: ForwardStep | None, example: Any) -> None:
        super().__init__()
        self.model, self.forward_step = model, forward_step
        self.leaves, self.structure = pytree.tree_flatten(example)
        self.read = [k for k, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Every tensor of the output; one that is given twice, or is an input, as a copy."""
        found, seen = [], {id(tensor) for tensor in tensors}
        for leaf in pytree.tree_leaves(_nest(self.called(tensors))):
            if isinstance(leaf, Tensor):
                found.append(leaf.clone() if id(leaf) in seen else leaf)
                seen.add(id(leaf))
        return tuple(found)

    def called(self, tensors: Sequence[Tensor]) -> Any:
        """The model's own output."""
        given = dict(zip(self.read, tensors, strict=True))
        leaves = [given.get(k, leaf) for k, leaf in enumerate(self.leaves)]
        batch = pytree.tree_unflatten(leaves, self.structure)
        if self.forward_step is not None:
            return self.forward_step(self.model, batch)
        if isinstance(batch, Mapping):
            return self.model(**batch)
        return self.model(*batch) if isinstance(batch, (tuple, list)) else self.model(batch)

    def under(self, model: nn.Module) -> Flat:
        """The same of another model."""
        made = Flat(model, self.forward_step, None)
        made.leaves, made.structure, made.read = self.leaves, self.structure, self.read
        return made.eval()


@dataclasses.dataclass(frozen=True)
class Face:
    """What a model shows: its inputs on an example, and its outputs, by name.

    Attributes:
        module: takes the inputs in order and gives the outputs in order.
        inputs: {name: tensor ``[n, …]``}; outputs: names.
        unread: tensors of the example that the model does not look at, such as labels.
    """

    module: Flat
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    unread: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        return len(next(iter(self.inputs.values())))

    def of(self, samples: int) -> Face:
        """With so many samples, repeated where there are fewer."""
        index = torch.arange(samples) % self.samples
        return dataclasses.replace(self, inputs={name: x[index.to(x.device)] for name, x in self.inputs.items()})


def face_of(model: nn.Module, forward_step: ForwardStep | None, example: Any, op: str) -> Face:
    """Run the model once on an example, moved to where it is, and name what goes in and what comes out.

    Keys and fields are names, places in a tuple numbers, arguments what the model's forward calls them.

    Raises:
        CladoError: no tensors ``[n, …]`` of one length, a forward that fails, or outputs without tensors.
    """
    training = any(module.training for module in model.modules())
    require(not training, op, "model", "be in eval mode (model.eval())", "train mode")
    first = next(model.parameters())
    moved = moved_to(example, first.device, first.dtype)
    module = Flat(model, forward_step, moved).eval()
    tensors = [module.leaves[k] for k in module.read]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    sound = bool(shapes) and all(shapes) and len({shape[0] for shape in shapes}) == 1 and shapes[0][0] > 0
    require(sound, op, "example", "hold tensors [n, …] of one length", shapes or type(example).__name__)
    with users_code(f"{op}: model must run on example, of shapes {shapes}"), torch.no_grad(), _Seen() as seen:
        output = _nest(module.called(tensors))
    given = _by_argument(model, moved) if forward_step is None and isinstance(moved, (tuple, list)) else moved
    names = _names(given, INPUT, INPUT, dict(model.state_dict()))
    single = LOGITS if isinstance(output, Tensor) else OUTPUT
    outputs = _names(output, single, OUTPUT, {*model.state_dict(), *names})
    require(bool(outputs), op, "model", "return tensors", type(output).__name__)
    looked_at = seen.ids | {id(leaf) for leaf in pytree.tree_leaves(output)}
    inputs = {name: x for name, x in zip(names, tensors, strict=True) if id(x) in looked_at}
    require(bool(inputs), op, "example", "be looked at by the model", "none of it is")
    module.read = [k for k, x in zip(module.read, tensors, strict=True) if id(x) in looked_at]
    return Face(module, inputs, tuple(outputs), tuple(name for name in names if name not in inputs))


class _Seen(TorchFunctionMode):
    """Notes what functions of torch are given, shapes included."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ids |= {id(leaf) for leaf in pytree.tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)}
        return func(*args, **(kwargs or {}))


def _nest(output: Any) -> Any:
    """Mappings and dataclasses that pytrees do not know, wherever they are in it, as dictionaries."""
    if dataclasses.is_dataclass(output) and not isinstance(output, (type, Mapping)):
        return {field.name: _nest(getattr(output, field.name)) for field in dataclasses.fields(output)}
    if isinstance(output, Mapping):
        return {key: _nest(value) for key, value in output.items()}
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*map(_nest, output))
    if type(output) in (tuple, list):
        return [_nest(value) for value in output]
    return output


def _by_argument(model: nn.Module, values: Sequence[Any]) -> Any:
    """{the forward's name of an argument: its value}; the values as they are where it has none."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return values
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return dict(zip(named, values, strict=False)) if len(named) >= len(values) else values


def _names(nest: Any, single: str, root: str, taken: Collection[str]) -> list[str]:
    """A name for every tensor of a nest: its path, after ``root`` where that begins with a number or is taken."""
    found: list[str] = []
    for path, leaf in pytree.tree_flatten_with_path(nest)[0]:
        if not isinstance(leaf, Tensor):
            continue
        steps = [str(getattr(step, "key", getattr(step, "idx", getattr(step, "name", step)))) for step in path]
        name = "_".join(steps) or single
        name = f"{root}_{name}" if name[0].isdigit() or name in taken else name
        while name in taken or name in found:
            name += "_"
        found.append(name)
    return found
