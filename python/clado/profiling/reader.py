"""What every stage makes of the loader's batches: what the model is run on, labels, and the loss of what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..common import (
    moved_to,
    require,
    sample_count,
    shown_shapes,
    split_batch,
    users_code,
)
from ..graph import ForwardStep
from .losses import Loss, LossChoice


@dataclass(frozen=True)
class Reader:
    """How a model is run on batches, and what its loss is.

    A user's own functions get the loader's batches as they are; without any, these are inputs or (inputs, targets).

    Attributes:
        device, dtype: of what the model is run on.
        loss: which loss; :meth:`fitted` to an output before one of a batch is asked for.
        forward_step: ``forward_step(model, batch)`` runs the model; None: the model itself, on the inputs.
        op: what is said to need the batches.
    """

    device: torch.device
    dtype: torch.dtype
    loss: LossChoice = field(default_factory=LossChoice)
    forward_step: ForwardStep | None = None
    op: str = "profile"

    @property
    def whole_batches(self) -> bool:
        """Whether the user's own functions get the loader's batches as they are."""
        return self.loss.sees_batch or self.forward_step is not None

    @property
    def step(self) -> ForwardStep | None:
        """What runs the model on its part of a batch; None: the model itself."""
        return first_of_batch if self.forward_step is None and self.whole_batches else self.forward_step

    def parts(self, batch: Any) -> tuple[Any, Any]:
        """(what the model is run on, targets or None) of one of the loader's batches."""
        inputs, targets = self._whole(batch) if self.whole_batches else split_batch(batch, self.op)
        must = f"yield (inputs, targets) for {self.loss.name} (images: in one subfolder per class)"
        require(targets is not None or not self.loss.needs_targets, self.op, "data_loader", must, "inputs alone")
        return inputs, targets

    def _whole(self, batch: Any) -> tuple[Any, Any]:
        plain = self.forward_step is not None or isinstance(batch, (Tensor, tuple, list))
        must = "be given for batches that are neither inputs nor (inputs, …)"
        require(plain, self.op, "forward_step", must, type(batch).__name__)
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        return batch, batch[1] if pair else None

    def checked(self, batch: Any) -> Any:
        """What the model is run on of a batch that is read before the run; raises where its targets do not suit the loss."""
        inputs, targets = self.parts(batch)
        self.loss.on(inputs, targets, sample_count(batch), torch.device("cpu"))
        return inputs

    def moved(self, inputs: Any) -> Any:
        return moved_to(inputs, self.device, self.dtype)

    def outputs(self, model: nn.Module, inputs: Any) -> Any:
        """What a model makes of inputs that were moved.

        Raises:
            CladoError: whatever the forward raises, in one line.
        """
        with users_code(f"{self.op}: model must take inputs {shown_shapes(inputs)}"):
            return model(inputs) if self.step is None else self.step(model, inputs)

    def fitted(self, output: Any, inputs: Any, targets: Any) -> Reader:
        """The same with a loss that knows the model's output; raises where one does not suit the other."""
        return replace(self, loss=self.loss.fitted(output, inputs, targets, sample_count(inputs)))

    def of_batch(self, inputs: Any, targets: Any, samples: int, seeds: Any = None) -> Loss:
        """The loss of inputs that were moved; ``seeds`` as for :meth:`LossChoice.on`."""
        return self.loss.on(inputs, targets, samples, self.device, seeds)

    def blank(self, inputs: Any, samples: int) -> Loss:
        """The loss where targets only have a shape."""
        return self.loss.blank(inputs, samples, self.device)


def all_finite(batch: Any) -> bool:
    """Whether a nest of tensors holds neither NaN nor infinity."""
    return all(bool(torch.isfinite(leaf).all()) for leaf in pytree.tree_leaves(batch) if leaf.is_floating_point())


def first_of_batch(model: nn.Module, batch: Any) -> Any:
    """The forward step of a batch that is the input, or (input, …)."""
    return model(batch if isinstance(batch, Tensor) else batch[0])
