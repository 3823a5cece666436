"""What a file format is, and what its functions are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor, nn

from ...artifacts import Plan
from ...quant import Layer, Quantized, codes
from ..flat import ForwardStep

O = TypeVar("O")  # noqa: E741  the options of a format


@dataclass(frozen=True)
class NoOptions:
    """Of a format that leaves a caller no choice."""


@dataclass(frozen=True)
class Request(Generic[O]):
    """A model, its plan, and the options of the format.

    ``model`` holds what was adapted with the plan's weights; ``forward_step`` runs it, None: itself.
    """

    model: nn.Module
    plan: Plan
    options: O
    forward_step: ForwardStep | None = None

    @cached_property
    def codes(self) -> dict[str, Quantized]:
        """{layer: its weight as the plan has it}, on the CPU."""
        return {name: found.cpu() for name, found in codes(self.model, self.plan).items()}

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


@dataclass(frozen=True)
class Format(Generic[O]):
    """One file format.

    Attributes:
        write: fills a folder; returns the bytes written of packed codes with their scales, and of what stays float.
        predict: the same two numbers from shapes alone, before anything is quantized.
        verify: runs a consumer on a written folder and compares; returns what held, in one line, or raises CladoError.
        files: every file that it may write; the first one is always there and tells an export from other folders.
        options: a dataclass of what a caller may choose: every field has a default and, in its metadata, a "help".
        kept: layers of the plan that have no place in the format and stay float.
        notes: what is to be known of a written folder, in a line each.
    """

    write: Callable[[Request[O], Path], tuple[int, int]]
    predict: Callable[[Request[O]], tuple[int, int]]
    verify: Callable[[Request[O], Path], str]
    files: tuple[str, ...]
    options: type[O]
    kept: Callable[[Request[O]], list[Layer]] = lambda _: []
    notes: Callable[[Request[O], Path], tuple[str, ...]] = lambda request, folder: ()

    @property
    def takes(self) -> tuple[str, ...]:
        """Names of its options."""
        return tuple(field.name for field in fields(self.options))  # type: ignore[arg-type]
