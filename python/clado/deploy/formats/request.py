"""What every writer is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from ...artifacts import Plan


@dataclass(frozen=True)
class Request:
    """A model, its plan, and the options of the formats that have any.

    Attributes:
        example: inputs ``[n, …]``, n ≥ 2, for formats that hold the graph.
        activations: {layer: (least, largest value of its input)} for formats that quantize activations to 8 bits.
        odd_widths: how compressed-tensors lays out 3, 5, 6 and 7 bits: "dense", "padded", or None to refuse them.
    """

    model: nn.Module
    plan: Plan
    example: Tensor | None = None
    odd_widths: str | None = None
    activations: Mapping[str, tuple[float, float]] | None = None

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """Everything in the model's state dict that is a tensor."""
        return {name: value for name, value in self.model.state_dict().items() if isinstance(value, Tensor)}

    def leftovers(self, quantized: set[str]) -> dict[str, Tensor]:
        """The rest of the state, detached, on the CPU, each tensor with storage of its own."""
        rest = (item for item in self.state.items() if item[0] not in quantized)
        return {name: value.detach().cpu().clone().contiguous() for name, value in rest}

    def leftover_bytes(self, quantized: set[str]) -> int:
        return sum(value.nbytes for name, value in self.state.items() if name not in quantized)
