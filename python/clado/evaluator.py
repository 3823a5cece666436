"""The true loss of models and plans on samples that did not enter the matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import require
from .exporter import apply
from .plan import Plan
from .profiler import check_targets, full_precision, split_batch


@dataclass(frozen=True)
class Score:
    """Cross-entropy and accuracy on labelled samples.

    Attributes:
        losses: float64 ``[N]`` in nats, per sample.
        correct: bool ``[N]``; correct5: bool ``[N]``, the label among the five best, None with fewer than six classes.
    """

    losses: Tensor
    correct: Tensor
    correct5: Tensor | None

    @property
    def num_samples(self) -> int:
        return len(self.losses)

    @property
    def loss(self) -> float:
        return self.losses.mean().item()

    @property
    def loss_stderr(self) -> float:
        return standard_error(self.losses)

    @property
    def accuracy(self) -> float:
        return self.correct.double().mean().item()

    @property
    def accuracy_stderr(self) -> float:
        return standard_error(self.correct.double())

    def difference(self, other: Score) -> tuple[float, float]:
        """Mean and standard error of this loss minus another's on the same samples, paired."""
        gap = self.losses - other.losses
        return gap.mean().item(), standard_error(gap)


def standard_error(values: Tensor) -> float:
    """Of the mean; NaN for a single value."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else float("nan")


def evaluate(model: nn.Module, data_loader: Iterable[Any], device: str | torch.device | None = None) -> Score:
    """Cross-entropy and accuracy of a model in eval mode on batches of (inputs, targets).

    Raises:
        CladoError: no data, no targets, or labels that are no classes.
    """
    require(not model.training, "evaluate", "model", "be in eval mode (model.eval())", "train mode")
    place = torch.device(device) if device is not None else next(model.parameters()).device
    losses, correct, correct5 = [], [], []
    with torch.inference_mode(), full_precision():
        for item in data_loader:
            inputs, targets = split_batch(item)
            require(targets is not None, "evaluate", "data_loader", "yield (inputs, targets)", "inputs alone")
            assert targets is not None
            dtype = next(model.parameters()).dtype
            logits = model(inputs.to(place, dtype) if inputs.is_floating_point() else inputs.to(place)).double().cpu()
            check_targets(targets, logits.shape[1])
            labels = targets.cpu().long()
            losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
            correct.append(logits.argmax(1) == labels)
            if logits.shape[1] > 5:
                correct5.append((logits.topk(5).indices == labels[:, None]).any(1))
    require(len(losses) > 0, "evaluate", "data_loader", "yield at least one sample", "none")
    return Score(torch.cat(losses), torch.cat(correct), torch.cat(correct5) if correct5 else None)


def rerank(
    model: nn.Module, heldout: Iterable[Any], plans: Sequence[Plan], device: str | torch.device | None = None
) -> Plan:
    """The plan of least true loss on held-out samples; equals go to the smaller one.

    Args:
        model: the float model.
        heldout: batches of (inputs, targets) that did not enter the matrix; read once.
        plans: at least one plan with bits; equal ones are evaluated once.
        device: where to run; None: where the model is.

    Returns:
        The winner, its ``info["rerank"]`` listing every plan's loss, and its paired difference to the winner with standard error.

    Raises:
        CladoError: no plans, or held-out data that :func:`evaluate` refuses.
    """
    require(len(plans) > 0, "rerank", "plans", "not be empty", "none")
    batches = list(heldout)
    distinct = list({tuple(plan.bits.items()): plan for plan in reversed(plans)}.values())[::-1]
    scores = [evaluate(apply(model, plan), batches, device) for plan in distinct]
    order = sorted(range(len(distinct)), key=lambda k: (scores[k].loss, distinct[k].size_bytes))
    best = order[0]
    compared = []
    for k in order:
        gap, error = scores[k].difference(scores[best])
        compared.append(
            {
                "objective": distinct[k].objective_name,
                "loss": scores[k].loss,
                "behind": gap,
                "stderr": error,
                "size_bytes": distinct[k].size_bytes,
            }
        )
    record = {"rerank": compared, "rerank_samples": scores[best].num_samples}
    return replace(distinct[best], info={**distinct[best].info, **record})
