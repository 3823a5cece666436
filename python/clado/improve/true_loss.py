"""The true loss of models and plans on samples that did not enter the matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import clado_ext

from ..artifacts import Plan
from ..common import (
    CladoError,
    check_targets,
    is_out_of_memory,
    moved_to,
    progress_bar,
    require,
    said,
    split_batch,
)
from ..deploy import adapted, apply, check_fit
from ..graph import Runner, common_dtype, converted, full_precision, open_runner
from ..profiling import LOSSES
from ..quant import Candidates, folded, variants


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

    @property
    def accuracy5(self) -> float | None:
        return None if self.correct5 is None else self.correct5.double().mean().item()

    @property
    def accuracy5_stderr(self) -> float | None:
        return None if self.correct5 is None else standard_error(self.correct5.double())

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
    logits, labels = _outputs(model, data_loader, device)
    must = "yield (inputs, targets) (images: in one subfolder per class)"
    require(labels is not None, "evaluate", "data_loader", must, "inputs alone")
    assert labels is not None
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    correct5 = (logits.topk(5).indices == labels[:, None]).any(1) if logits.shape[1] > 5 else None
    return Score(losses, logits.argmax(1) == labels, correct5)


def rerank(
    model: nn.Module,
    heldout: Iterable[Any],
    plans: Sequence[Plan],
    loss: str = "kl",
    device: str | torch.device | None = None,
) -> Plan:
    """The plan of least true loss increase on held-out samples; equals go to the smaller one.

    Args:
        model: the float model.
        heldout: batches of inputs or (inputs, targets) that did not enter the matrix; read once.
        plans: at least one plan with bits; equal ones are evaluated once.
        loss: "kl" to the float model's outputs (no labels, and far less noise between plans) or "cross_entropy".
        device: where to run; None: where the model is.

    Returns:
        The winner, its ``info["rerank"]`` listing every plan's loss increase, and how far it is behind the winner with
        the standard error of that paired difference; ``info["rerank_decided"]`` says whether the runner-up is more than
        1.96 standard errors behind.

    Raises:
        CladoError: no plans, no data, or no targets for the cross-entropy.
    """
    require(len(plans) > 0, "rerank", "plans", "not be empty", "none")
    distinct = list({tuple(plan.schemes.items()): plan for plan in reversed(plans)}.values())[::-1]
    increases = loss_increases(model, heldout, distinct, loss, device)
    order = sorted(range(len(distinct)), key=lambda k: (increases[k].mean().item(), distinct[k].size_bytes))
    best = order[0]
    compared = [
        {
            "objective": distinct[k].objective_name,
            "loss_increase": increases[k].mean().item(),
            "behind": (increases[k] - increases[best]).mean().item(),
            "stderr": standard_error(increases[k] - increases[best]),
            "size_bytes": distinct[k].size_bytes,
        }
        for k in order
    ]
    leads = [increases[k] - increases[best] for k in order[1:2]]
    decided = all(lead.mean().item() > 1.96 * standard_error(lead) for lead in leads)
    record = {
        "rerank": compared,
        "rerank_loss": loss,
        "rerank_samples": increases.shape[1],
        "rerank_decided": decided,
    }
    return replace(distinct[best], info={**distinct[best].info, **record})


def loss_increases(
    model: nn.Module,
    heldout: Iterable[Any],
    plans: Sequence[Plan],
    loss: str = "kl",
    device: str | torch.device | None = None,
    verbose: bool = False,
) -> Tensor:
    """True loss increase of every plan on every sample: float64 ``[plans, N]`` in nats; arguments as :func:`rerank`.

    Args:
        verbose: show a progress bar.

    Raises:
        CladoError: as :func:`rerank`.
    """
    require(loss in LOSSES, "rerank", "loss", f"be one of {', '.join(LOSSES)}", repr(loss))
    batches = list(heldout)
    clean, labels = _outputs(model, batches, device)
    known = loss == "kl" or labels is not None
    require(known, "rerank", "heldout", "yield (inputs, targets) for cross_entropy", "inputs alone")
    labels = None if loss == "kl" else labels
    outputs = _plan_outputs(model, plans, batches, device, verbose)
    return torch.stack([clado_ext.batched_ce(clean, (logits - clean)[None], labels)[0] for logits in outputs])


def _outputs(
    model: nn.Module, data_loader: Iterable[Any], device: str | torch.device | None
) -> tuple[Tensor, Tensor | None]:
    """Logits float64 ``[N, C]`` and labels ``[N]``, None where the loader gives none; on the CPU."""
    require(not model.training, "evaluate", "model", "be in eval mode (model.eval())", "train mode")
    place = torch.device(device) if device is not None else next(model.parameters()).device
    dtype = common_dtype(model)
    model = converted(model, place, dtype)
    logits, labels = [], []
    with torch.inference_mode(), full_precision():
        for item in data_loader:
            inputs, targets = split_batch(item, "evaluate")
            try:
                logits.append(model(moved_to(inputs, place, dtype)).double().cpu())
            except Exception as error:  # whatever a model makes of inputs it does not take
                if is_out_of_memory(error):
                    raise
                shape = tuple(inputs.shape)
                raise CladoError(f"evaluate: model must take inputs {shape}, got {said(error)}") from error
            check_targets(targets, logits[-1].shape[1])
            if targets is not None:
                labels.append(targets.cpu().long())
    require(len(logits) > 0, "evaluate", "data_loader", "yield at least one sample", "none")
    return torch.cat(logits), torch.cat(labels) if len(labels) == len(logits) else None


def _runner(
    model: nn.Module, batch: Any, plans: Sequence[Plan], device: torch.device, dtype: torch.dtype
) -> Runner | None:
    """What runs the model under one plan after the other; None where it does not know every weight of the plans."""
    inputs = split_batch(batch, "evaluate")[0]
    try:
        runner = open_runner(model, inputs, quantize_ends=True, device=device, dtype=dtype, stacked=False, op="rerank")
    except CladoError:  # none of the layers that a runner knows
        return None
    known = {layer.name for layer in runner.layers}
    return runner if all(known.issuperset(plan.schemes) for plan in plans) else None


def _plan_outputs(
    model: nn.Module,
    plans: Sequence[Plan],
    batches: Sequence[Any],
    device: str | torch.device | None,
    verbose: bool = False,
) -> list[Tensor]:
    """Logits float64 ``[N, C]`` under each plan; plans that agree on the first layers share that part of the forward."""
    model = folded(model)
    for plan in plans:
        check_fit(model, plan, "rerank")
    if any(plan.activations or adapted(plan) for plan in plans):  # the graph of the float model knows neither
        return [_outputs(apply(model, plan), batches, device)[0] for plan in plans]
    place = torch.device(device) if device is not None else next(model.parameters()).device
    dtype = common_dtype(model)
    with torch.inference_mode(), full_precision():
        runner = _runner(model, batches[0], plans, place, dtype)
        if runner is None:
            return [_outputs(apply(model, plan), batches, device)[0] for plan in plans]
        layers = runner.layers
        parts: list[list[Tensor]] = [[] for _ in plans]

        @cache
        def variant(k: int, m: int) -> Tensor:
            one = Candidates.uniform((layers[k],), (plans[m].schemes[layers[k].name],))
            return variants(model, one, plans[m].quantizer, place, dtype, plans[m].rounded)[0][0]

        def walk(state: Any, k: int, members: list[int]) -> None:
            state = runner.advance(state, k)
            if k == runner.num_layers:
                logits = runner.finish(state)[0].double().cpu()
                for m in members:
                    parts[m].append(logits)
                return
            groups: dict[Any, list[int]] = {}
            for m in members:
                scheme = plans[m].schemes.get(layers[k].name)
                groups.setdefault((plans[m].quantizer, plans[m].rounding, scheme), []).append(m)
            for (*_, scheme), group in groups.items():
                planned = state if scheme is None else runner.fork(state, k, [variant(k, group[0])])
                walk(planned, k + 1, group)

        with progress_bar(f"evaluate {len(plans)} plans", len(batches), "batches", verbose) as show:
            for k, item in enumerate(batches):
                inputs = split_batch(item, "evaluate")[0]
                walk(runner.start(moved_to(inputs, place, dtype)), 0, list(range(len(plans))))
                show(k + 1)
    return [torch.cat(part) for part in parts]
