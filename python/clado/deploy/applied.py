"""The weights of a plan in a copy of the model, dequantized, for evaluation."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..artifacts import Plan
from ..common import require, weights_digest
from ..quant import INPUTS, Quantized, Rounded, codes, folded, with_rounded_inputs


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``model`` whose planned weights are quantized and dequantized, for evaluation.

    Inputs are rounded as the plan's schemes say.

    Raises:
        CladoError: a plan that is infeasible or was made for other weights.
    """
    model = folded(model)
    check_fit(model, plan, "apply")
    return dequantized(model, plan, codes(model, plan))


def dequantized(model: nn.Module, plan: Plan, weights: Mapping[str, Quantized]) -> nn.Module:
    """:func:`apply` with the plan's weights as :func:`clado.quant.codes` gives them."""
    rounding = with_rounded_inputs(model, plan.layers, plan.chosen, plan.activations)
    quantized = copy.deepcopy(model) if rounding is model else rounding
    _take(quantized, adapted(plan))
    parameters = dict(quantized.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for layer in plan.layers:
            weight = parameters[layer.names[0]]
            weight.copy_(layer.parameter(weights[layer.name].values(weight.dtype), weight.shape))
    return quantized


def adapted(plan: Plan) -> Mapping[str, Tensor]:
    """{parameter or buffer: its value} of what was adapted with the plan's weights; empty where nothing was."""
    return plan.rounded.others if plan.rounded is not None else {}


def with_adapted(model: nn.Module, plan: Plan) -> nn.Module:
    """The model with what was adapted with the plan's weights, in a copy; itself where nothing was."""
    changed = adapted(plan)
    if not changed:
        return model
    made = copy.deepcopy(model)
    _take(made, changed)
    return made


def _take(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values into a model by name."""
    state = model.state_dict()
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)


def check_fit(model: nn.Module, plan: Plan, op: str) -> None:
    """Raise unless ``plan`` has bits and was made for the weights of ``model``."""
    require(bool(plan.bits), op, "plan", "hold bits for every layer", f"a plan that is {plan.status}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for layer in plan.layers:
        require(bool(layer.names), op, "plan", "name the parameters of its layers", f"none for {layer.name}")
        for name in layer.names:
            known = name in parameters and layer.fits(parameters[name].shape)
            require(known, op, "model", f"have a weight {name} of shape {layer.shape}", "another model")
    _check_ranges(plan, op)
    if plan.rounded is not None:
        _check_rounded(plan, plan.rounded, model, op)
    known_weights = plan.fingerprint.get("weights")
    same = known_weights is None or known_weights == weights_digest(model)
    require(same, op, "model", "be the one the plan was made for", "other weights")


def _check_ranges(plan: Plan, op: str) -> None:
    """Raise unless every input that needs a range has one; where the base rounds all, older files name them by modules."""
    known = plan.activations
    lacking = [
        f"{scheme.label} of {name}"
        for name, scheme in plan.chosen.items()
        if scheme.input
        and INPUTS[scheme.input].ranged
        and (
            known is None or (scheme.input not in known.formats if known.base else known.of(name, scheme.input) is None)
        )
    ]
    require(
        not lacking,
        op,
        "plan",
        "hold ranges of the inputs that its schemes round",
        f"none for {', '.join(lacking[:3])}",
    )


def _check_rounded(plan: Plan, held: Rounded, model: nn.Module, op: str) -> None:
    """Raise unless rounded weights are of this plan, and what was adapted with them of this model."""
    lacking = [layer.name for layer in plan.layers if not held.has(layer.name, plan.chosen[layer.name].number)]
    require(not lacking, op, "plan", "have rounded weights for every layer's scheme", f"none for {lacking[:3]}")
    same = plan.fingerprint.get("weights") in (None, held.weights)
    require(same, op, "plan", "have weights that were rounded from the model's", "another model's")
    state = model.state_dict()
    for name, value in held.others.items():
        fits = name in state and state[name].shape == value.shape
        require(fits, op, "model", f"have a {name} of shape {tuple(value.shape)}", "another model")
