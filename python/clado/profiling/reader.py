"""What a run makes of the loader's batches: what the model is run on, labels, and the loss of what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..common import check_targets, moved_to, split_batch
from ..graph import ForwardStep
from .losses import LogitLoss, Loss, UserLoss
from .options import Options


@dataclass(frozen=True)
class Reader:
    """Batches under the options of a run.

    Attributes:
        options: of the run; device, dtype: of what the model is run on.
        classes: of the model's output, 0 where unknown.
    """

    options: Options
    device: torch.device
    dtype: torch.dtype
    classes: int = 0

    @property
    def step(self) -> ForwardStep | None:
        """What runs the model on its part of a batch; None: the model itself."""
        whole = self.options.whole_batches
        return first_of_batch if self.options.forward_step is None and whole else self.options.forward_step

    def parts(self, batch: Any) -> tuple[Any, Tensor | None]:
        """(what the model is run on, labels or None) of one of the loader's batches."""
        if not self.options.whole_batches:
            return split_batch(batch)
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        labels = batch[1] if pair and isinstance(batch[1], Tensor) and batch[1].dim() == 1 else None
        return batch, None if labels is None or labels.is_floating_point() else labels

    def checked(self, batch: Any) -> Any:
        """What the model is run on of a batch that is read before the run; raises where labels are no classes."""
        inputs, targets = self.parts(batch)
        if self.options.loss_func is None:
            check_targets(targets, self.classes)
        return inputs

    def moved(self, inputs: Any) -> Any:
        return moved_to(inputs, self.device, self.dtype)

    def loss(self, inputs: Any, targets: Tensor | None, samples: int) -> Loss:
        if self.options.loss_func is not None:
            return UserLoss(self.options.loss_func, inputs, samples)
        check_targets(targets, self.classes)
        labels = targets if self.options.loss == "cross_entropy" else None
        return LogitLoss(None if labels is None else labels.to(self.device, torch.int64))

    def unlabelled_loss(self, inputs: Any, samples: int) -> Loss:
        """The loss where labels only have a shape."""
        wanted = self.options.loss == "cross_entropy"
        return self.loss(inputs, torch.zeros(samples, dtype=torch.int64) if wanted else None, samples)


def all_finite(batch: Any) -> bool:
    """Whether a nest of tensors holds neither NaN nor infinity."""
    return all(bool(torch.isfinite(leaf).all()) for leaf in pytree.tree_leaves(batch) if leaf.is_floating_point())


def first_of_batch(model: nn.Module, batch: Any) -> Any:
    """The forward step of a batch that is the input, or (input, …)."""
    return model(batch if isinstance(batch, Tensor) else batch[0])
