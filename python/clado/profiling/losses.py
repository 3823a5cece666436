"""What a perturbation costs: the loss of a chunk of samples as a function of the model's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import clado_ext

from ..common import CladoError, is_out_of_memory, require, said

LossFunc = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class LogitLoss:
    """KL to the clean logits, or with labels the cross-entropy: known in closed form from logits and their changes.

    Attributes:
        target: int64 ``[N]``, None for KL.
    """

    target: Tensor | None

    def reference(self, output: Any) -> Tensor:
        """What :meth:`increase_over` keeps of the float model's output: the logits, float64 on the CPU."""
        logits: Tensor = output.double().cpu()
        return logits

    def increase_over(self, reference: Tensor, output: Any) -> Tensor:
        """Loss increase ``[N]`` float64, on the CPU, of another output."""
        labels = None if self.target is None else self.target.cpu()
        found: Tensor = clado_ext.batched_ce(reference, (output.double().cpu() - reference)[None], labels)[0]
        return found

    def probabilities(self, reference: Tensor) -> Tensor:
        """What the loss compares with, ``[N, C]`` float64: the float model's probabilities, or the labels."""
        if self.target is None:
            return reference.softmax(-1)
        return torch.nn.functional.one_hot(self.target.cpu(), reference.shape[-1]).double()

    def increase(self, logits: Tensor, delta: Tensor) -> Tensor:
        """Loss increase ``[S, N]`` float64, for clean logits ``[N, C]`` and changes ``[S, N, C]``."""
        return clado_ext.batched_ce(logits, delta, self.target)

    def gradient(self, logits: Tensor, delta: Tensor) -> Tensor:
        """Derivative ``[S, N, C]`` of the losses by the logits, at the changed logits."""
        changed = (logits + delta).softmax(-1)
        if self.target is None:
            return changed - logits.softmax(-1)
        return changed - torch.nn.functional.one_hot(self.target, logits.shape[-1])

    def pair(self, logits: Tensor, first: Tensor, second: Tensor, joint: Tensor) -> tuple[Tensor, Tensor]:
        """The interaction of two layers, split so that nothing cancels (docs/numerics.md).

        Args:
            logits: clean, ``[N, C]``.
            first, second: logit changes ``[A, N, C]`` and ``[B, N, C]`` of the two layers' candidates alone.
            joint: ``[A, B, N, C]`` of both together.

        Returns:
            (closed form as if logit changes added, residual of the true joint change), float64 ``[A, B, N]``; their sum
            is Ω of every sample.
        """
        z, v, w = logits.double(), first.double(), second.double()
        clean = z.log_softmax(-1)
        p = clean.exp()
        closed = torch.einsum("nc,anc,bnc->abn", p, _excess(p, v), _excess(p, w)).log1p()
        added = v[:, None] + w[None]
        rest = joint.double().sub_(added)
        shape = rest.shape[:-1]
        base = (z + added).view(-1, z.shape[-1])
        rest = rest.reshape(base.shape)
        if self.target is None:  # log E_q[e^r] - E_p[r] = KL(q, q e^r) + Σ (q - p) r
            residual = clado_ext.batched_ce(base, rest[None]).view(shape)
            residual = residual + ((base.softmax(-1).view(*shape, -1) - p) * rest.view(*shape, -1)).sum(-1)
        else:
            labels = self.target.expand(shape).reshape(-1)
            residual = clado_ext.batched_ce(base, rest[None], labels).view(shape)
        return closed, residual


def _excess(p: Tensor, delta: Tensor) -> Tensor:
    """u = e^δ / E_p[e^δ] − 1, without cancellation."""
    mean = (p * delta).sum(-1, keepdim=True)
    centred = delta - mean
    return (centred - (p * centred.expm1()).sum(-1, keepdim=True).log1p()).expm1()


@dataclass(frozen=True)
class UserLoss:
    """A user's ``loss_func(output, batch)``: losses ``[N]``, or a mean over the batch, which is then asked sample by sample.

    Attributes:
        function: differentiable in the output for the gradient estimator.
        batch: the chunk's batch.
        samples: N.
        op: what is said to need the loss.
    """

    function: LossFunc
    batch: Any
    samples: int
    op: str = "profile"

    def reference(self, output: Any) -> Tensor:
        """What :meth:`increase_over` keeps of the float model's output: its losses, float64 on the CPU."""
        return self.losses(output).double().cpu()

    def increase_over(self, reference: Tensor, output: Any) -> Tensor:
        """Loss increase ``[N]`` float64, on the CPU, of another output."""
        return self.reference(output) - reference

    def losses(self, output: Any) -> Tensor:
        """Loss ``[N]`` of every sample."""
        value = self._call(output, self.batch)
        if isinstance(value, Tensor) and value.dim() == 0:
            value = torch.stack(
                [self._call(self._one(output, n), self._one(self.batch, n)) for n in range(self.samples)]
            )
        require(
            isinstance(value, Tensor) and value.shape == (self.samples,),
            self.op,
            "loss_func",
            f"return a loss per sample [{self.samples}] or their mean",
            tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__,
        )
        found: Tensor = value
        return found

    def values(self, outputs: Sequence[Any]) -> Tensor:
        """Losses ``[S, N]`` float64 of every stream's output."""
        return torch.stack([self.losses(output).double() for output in outputs])

    def _call(self, output: Any, batch: Any) -> Any:
        try:
            return self.function(output, batch)
        except Exception as error:  # whatever the user's code raises
            if is_out_of_memory(error):
                raise
            raise CladoError(f"{self.op}: loss_func must take (output, batch), got {said(error)}") from error

    def _one(self, nest: Any, n: int) -> Any:
        def row(leaf: Any) -> Any:
            rows = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == self.samples
            return leaf[n : n + 1] if rows else leaf

        return pytree.tree_map(row, nest)


Loss = LogitLoss | UserLoss
