"""What is asked of a runner, be it a graph, carried differences, or whole forwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from ..quant import Layer, Variant
from .moments import Use

Objective = Callable[[Any], Tensor]
Variants = Sequence[Sequence[Variant]]


class Runner(Protocol):
    """Runs a model under many perturbations at once, from the cut before one layer to the next. States are opaque.

    A state holds one or more streams of the same samples, each under its own perturbed weights and input roundings. A layer may
    have any number of variants. A layer's input is rounded where its weight is applied; other readers of that value get it as it
    is.

    Attributes:
        work: done so far, in forwards of the model times samples.
        stack: how many variants of a layer callers fork into at once; None: all. :attr:`stacks`: whether fewer take less memory.
        held: how many variants' outputs callers keep at once; None: all.
        layers: quantizable layers in execution order; ``skipped``: others, with the reason.
        note: why it runs as it does, for whoever is told; None where there is nothing to tell.
        kept: tensors that it keeps beside the model's own.
        sample_bytes: of the largest activation of a sample; None where nobody knows.
        forward_flops: of the model's own forward, per sample.
        forward_share: what a clean pass takes of the model's own forward.
        suffix_share: for each layer, the share of a forward's multiply-adds from its node to the end.
    """

    work: float
    stack: int | None
    held: int | None
    note: str | None

    @property
    def stacks(self) -> bool: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def layers(self) -> tuple[Layer, ...]: ...
    @property
    def skipped(self) -> dict[str, str]: ...
    @property
    def kept(self) -> Sequence[Tensor]: ...
    @property
    def sample_bytes(self) -> int | None: ...
    @property
    def forward_flops(self) -> float: ...
    @property
    def forward_share(self) -> float: ...
    @property
    def suffix_share(self) -> list[float]: ...

    def slope_share(self, counts: Sequence[int]) -> list[float]:
        """For each layer, what derivatives by the weights of it and later ones take beyond a product each (:meth:`products`).

        ``counts``: variants of each layer.
        """
        ...

    def start(self, batch: Any) -> Any:
        """State before the first layer for inputs ``[N, …]``, or a nest of them: one stream, unperturbed."""
        ...

    def advance(self, state: Any, layer: int) -> Any:
        """Carry every stream, under its own weights, to the cut before ``layer`` (or the end for ``layer == num_layers``)."""
        ...

    def fork(self, state: Any, layer: int, variants: Sequence[Variant | Tensor]) -> Any:
        """Step over ``layer`` under each of ``variants`` (or weights alone): S streams become len(variants)·S, variant-major."""
        ...

    def outputs(self, state: Any) -> list[Any]:
        """The model's output under every stream."""
        ...

    def finish(self, state: Any) -> Any:
        """Outputs of every stream in the form that :meth:`changes` takes: the model's nest of tensors, each ``[S, N, …]``.

        Raises:
            CladoError: outputs whose shapes differ from stream to stream.
        """
        ...

    def clean(self, state: Any) -> Any:
        """The clean output, each tensor ``[N, …]``, from a state without perturbations."""
        ...

    def changes(self, finished: Any, clean: Any) -> Any:
        """Changes δ ``[S, N, …]`` of floating-point outputs from what :meth:`finish` gave, which is overwritten.

        Outputs that are whole numbers have no changes: what the streams made of them stands in their place.
        """
        ...

    def products(self, state: Any, variants: Variants, objective: Objective) -> Tensor:
        """Directional derivatives ⟨∂ objective / ∂w_j, Δ_j,n⟩ of every stream and sample, for the layers not yet run.

        Args:
            state: at a layer's cut.
            variants: of all layers. What one with a rounded input changes is the layer's output, Q(x)·(w + Δ) − x·w.
            objective: scalar from a state at the end, whose terms belong to one stream and sample each.

        Returns:
            float64 ``[candidates of the layers not yet run, S, N]``, layer-major.
        """
        ...

    def inputs(self, batch: Any, see: Callable[[int, Use, Tensor], None]) -> None:
        """One clean pass; ``see(layer, use, input)`` whenever a layer's weight is applied, in the order of the forward.

        A graph leaves out positions that the output does not depend on, such as all tokens but one behind a last attention.
        """
        ...

    def rebase(self, variants: Mapping[int, Variant]) -> None:
        """Take these weights and input roundings, by layer, as the clean ones from now on."""
        ...

    def only(self, layers: Sequence[int]) -> Runner:
        """The same model with these layers alone, ascending, and nothing known of its work."""
        ...

    def rehearsed(
        self, measure: Callable[[Runner, Variants, Any], object], variants: Variants, example: Any, samples: int
    ) -> int | None:
        """Peak bytes of live values while ``measure`` runs on so many samples, found without running it.

        Weights, variants and inputs are not counted.

        Args:
            measure: is called with a runner like this one, variants and a batch, all of them tensors without data.
            example: samples of the batch's shape, on the device.

        Returns:
            None for whole forwards, and for operators that do not run without data.
        """
        ...
