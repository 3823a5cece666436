"""One forward before anything is measured: what would make every figure wrong is named, with the line that does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..common import here, require, sample_count, users_code


def check_forward(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any], op: str = "profile") -> None:
    """Run ``model`` once on ``batch``, in eval mode; its buffers stay as they are.

    A table that is no part of the state dict may be put in the place of another by the first forward of a size: it stays.

    Raises:
        CladoError: train mode; whatever the forward raises; something drawn at random; statistics taken over the batch;
            buffers that change.
    """
    check_eval(model)
    watch = _Watch(sample_count(batch))
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(batch)]
    line = f"{op}: model must run on batches of data_loader, of shapes {shapes}"
    with _Buffers(model) as buffers, users_code(line), torch.no_grad(), watch:
        forward(model, batch)
    changed = buffers.changed
    if changed and buffers.tables_alone:
        with torch.no_grad():
            forward(model, batch)
            with _Buffers(model) as again:
                forward(model, batch)
        changed = again.changed
        if changed:
            buffers.restore()
    require(watch.random is None, op, "model", "draw nothing at random in eval mode (dropout, noise)", watch.random)
    require(watch.statistics is None, op, "model", "take no statistics over the batch in eval mode", watch.statistics)
    require(
        not changed, op, "model", "leave its buffers unchanged in eval mode", f"changes of {', '.join(changed[:3])}"
    )


class _Buffers:
    """Puts the buffers of a model back as they were, and says which were changed within.

    Attributes:
        changed: their names.
        tables_alone: whether all of these were replaced by other tensors and are no part of the state dict.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
        self.changed: list[str] = []
        self.tables_alone = False

    def __enter__(self) -> _Buffers:
        return self

    def __exit__(self, *error: Any) -> None:
        now, lasting = dict(self.model.named_buffers()), self.model.state_dict()
        self.changed = [n for n, (_, value) in self.kept.items() if n not in now or not torch.equal(now[n], value)]
        self.tables_alone = all(
            name not in lasting and name in now and now[name] is not self.kept[name][0] for name in self.changed
        )
        self.restore()

    def restore(self) -> None:
        for name in self.changed:
            buffer, value = self.kept[name]
            place, _, own = name.rpartition(".")
            self.model.get_submodule(place)._buffers[own] = buffer
            buffer.copy_(value)


def generator_states(device: torch.device | None) -> bytes:
    """State of torch's generators on the CPU and on ``device``: it differs when something was drawn."""
    state = torch.get_rng_state().numpy().tobytes()
    if device is not None and device.type == "cuda":
        state += torch.cuda.get_rng_state(device).numpy().tobytes()
    return state


class _Watch(TorchDispatchMode):
    """Notes the first operator that draws at random, and the first that normalizes over a batch of ``samples``."""

    def __init__(self, samples: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.random: str | None = None
        self.statistics: str | None = None
        self._samples = samples

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        # Attention without dropout has the tag too, and draws nothing.
        seeded = torch.Tag.nondeterministic_seeded in func.tags and self.random is None
        leaves = pytree.tree_leaves((args, kwargs))
        device = next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), kwargs.get("device"))
        before = generator_states(device) if seeded else b""
        out = func(*args, **kwargs)
        if seeded and generator_states(device) != before:
            self.random = f"{name} at {here()}"
        # An instance norm is a batch norm of one sample with all channels of all samples.
        if "batch_norm" in name and self.statistics is None and args[0].shape[0] == self._samples > 1:
            given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
            if given.get("training", given.get("running_mean") is None):
                self.statistics = f"{name} at {here()}"
        return out


ForwardStep = Callable[[nn.Module, Any], Any]


class Step(nn.Module):
    """``forward_step(model, batch)`` as a module."""

    def __init__(self, model: nn.Module, forward_step: ForwardStep) -> None:
        super().__init__()
        self.model, self.forward_step = model, forward_step

    def forward(self, batch: Any) -> Any:
        return self.forward_step(self.model, batch)


def check_eval(model: nn.Module) -> None:
    """Raise when the model, or a part of it, is in train mode."""
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    require(
        not training, "capture", "model", "be in eval mode (model.eval())", f"train mode in {', '.join(training[:1])}"
    )


def plain_call(model: nn.Module, batch: Any) -> Any:
    return model(batch)


def check_model(model: nn.Module) -> None:
    """Raise unless ``model`` is a module with weights, none of them NaN or infinite."""
    require(isinstance(model, nn.Module), "profile", "model", "be a torch.nn.Module", type(model).__name__)
    first = next(model.parameters(), None)
    require(first is not None, "profile", "model", "have weights to quantize", "none")
    assert first is not None
    require(first.device.type != "meta", "profile", "model", "have weights with values", "weights on the meta device")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            require(bool(torch.isfinite(tensor).all()), "profile", f"weight {name}", "be finite", "NaN or infinity")
