"""What every stage makes of the loader's batches: what the model is run on, labels, and the loss of what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..common import (
    check_targets,
    moved_to,
    require,
    shown_shapes,
    split_batch,
    users_code,
)
from ..graph import ForwardStep
from .losses import LogitLoss, Loss, LossFunc, UserLoss
from .options import LOSSES


@dataclass(frozen=True)
class Reader:
    """How a model is run on batches, and what its loss is.

    A user's own functions get the loader's batches as they are; without any, these are inputs or (inputs, targets).

    Attributes:
        device, dtype: of what the model is run on.
        loss_name: "kl" or "cross_entropy"; anything beside ``loss_func``.
        forward_step: ``forward_step(model, batch)`` runs the model; None: the model itself, on the inputs.
        loss_func: ``loss_func(output, batch)``, see :class:`UserLoss`; None: ``loss``, of logits.
        classes: of the model's output, 0 where unknown.
        op: what is said to need the batches.
    """

    device: torch.device
    dtype: torch.dtype
    loss_name: str = "kl"
    forward_step: ForwardStep | None = None
    loss_func: LossFunc | None = None
    classes: int = 0
    op: str = "profile"

    def __post_init__(self) -> None:
        known = self.loss_func is not None or self.loss_name in LOSSES
        require(known, self.op, "loss", f"be one of {', '.join(LOSSES)}", repr(self.loss_name))

    @property
    def whole_batches(self) -> bool:
        """Whether the user's own functions get the loader's batches as they are."""
        return self.loss_func is not None or self.forward_step is not None

    @property
    def step(self) -> ForwardStep | None:
        """What runs the model on its part of a batch; None: the model itself."""
        return first_of_batch if self.forward_step is None and self.whole_batches else self.forward_step

    def parts(self, batch: Any) -> tuple[Any, Tensor | None]:
        """(what the model is run on, labels or None) of one of the loader's batches."""
        inputs, targets = self._whole(batch) if self.whole_batches else split_batch(batch, self.op)
        labelled = targets is not None or self.loss_name != "cross_entropy" or self.loss_func is not None
        require(
            labelled,
            self.op,
            "data_loader",
            "yield (inputs, targets) for cross_entropy (images: in one subfolder per class)",
            "inputs alone",
        )
        return inputs, targets

    def _whole(self, batch: Any) -> tuple[Any, Tensor | None]:
        plain = self.forward_step is not None or isinstance(batch, (Tensor, tuple, list))
        must = "be given for batches that are neither inputs nor (inputs, …)"
        require(plain, self.op, "forward_step", must, type(batch).__name__)
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        labels = batch[1] if pair and isinstance(batch[1], Tensor) and batch[1].dim() == 1 else None
        return batch, None if labels is None or labels.is_floating_point() else labels

    def checked(self, batch: Any) -> Any:
        """What the model is run on of a batch that is read before the run; raises where labels are no classes."""
        inputs, targets = self.parts(batch)
        self._check(targets)
        return inputs

    def _check(self, targets: Tensor | None) -> None:
        if self.loss_func is None and self.classes:
            check_targets(targets, self.classes)

    def moved(self, inputs: Any) -> Any:
        return moved_to(inputs, self.device, self.dtype)

    def outputs(self, model: nn.Module, inputs: Any) -> Any:
        """What a model makes of inputs that were moved.

        Raises:
            CladoError: whatever the forward raises, in one line.
        """
        with users_code(f"{self.op}: model must take inputs {shown_shapes(inputs)}"):
            return model(inputs) if self.step is None else self.step(model, inputs)

    def classes_of(self, output: Any) -> int:
        """The number of classes of the model's output, 0 where unknown; raises where it does not suit the loss."""
        if self.loss_func is not None:
            return 0
        fits = isinstance(output, Tensor) and output.dim() == 2
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        got += f" of {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        must = "return logits [N, C] (others need forward_step to take them, or loss_func)"
        require(fits, self.op, "model", must, got)
        return int(output.shape[1])

    def loss(self, inputs: Any, targets: Tensor | None, samples: int) -> Loss:
        if self.loss_func is not None:
            return UserLoss(self.loss_func, inputs, samples, self.op)
        self._check(targets)
        labels = targets if self.loss_name == "cross_entropy" else None
        return LogitLoss(None if labels is None else labels.to(self.device, torch.int64))

    def unlabelled_loss(self, inputs: Any, samples: int) -> Loss:
        """The loss where labels only have a shape."""
        wanted = self.loss_name == "cross_entropy"
        return self.loss(inputs, torch.zeros(samples, dtype=torch.int64) if wanted else None, samples)


def all_finite(batch: Any) -> bool:
    """Whether a nest of tensors holds neither NaN nor infinity."""
    return all(bool(torch.isfinite(leaf).all()) for leaf in pytree.tree_leaves(batch) if leaf.is_floating_point())


def first_of_batch(model: nn.Module, batch: Any) -> Any:
    """The forward step of a batch that is the input, or (input, …)."""
    return model(batch if isinstance(batch, Tensor) else batch[0])
