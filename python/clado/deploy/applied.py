"""The weights of a plan in a copy of the model, dequantized, for evaluation."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from ..artifacts import Plan
from ..common import require, weights_digest
from ..quant import KEPT, Quantized, codes, quantize_activations


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``model`` whose planned weights are quantized and dequantized, for evaluation.

    A plan that was made under quantized activations rounds the layers' inputs too.

    Raises:
        CladoError: a plan that is infeasible or was made for other weights.
    """
    check_fit(model, plan, "apply")
    return dequantized(model, plan, codes(model, plan))


def dequantized(model: nn.Module, plan: Plan, weights: Mapping[str, Quantized]) -> nn.Module:
    """:func:`apply` with the plan's weights as :func:`clado.quant.codes` gives them."""
    quantized = copy.deepcopy(model)
    parameters = dict(quantized.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for layer in plan.layers:
            weight = parameters[layer.names[0]]
            weight.copy_(weights[layer.name].values(weight.dtype))
    return quantize_activations(quantized, plan.activations) if plan.activations else quantized


def check_fit(model: nn.Module, plan: Plan, op: str) -> None:
    """Raise unless ``plan`` has bits and was made for the weights of ``model``."""
    require(bool(plan.bits), op, "plan", "hold bits for every layer", f"a plan that is {plan.status}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for layer in plan.layers:
        require(bool(layer.names), op, "plan", "name the parameters of its layers", f"none for {layer.name}")
        for name in layer.names:
            known = name in parameters and tuple(parameters[name].shape) == layer.shape
            require(known, op, "model", f"have a weight {name} of shape {layer.shape}", "another model")
    rounded = {scheme.input_bits for scheme in plan.chosen.values()} - {KEPT}
    given = {plan.activations.bits} if plan.activations else set()
    must = f"hold ranges for inputs of {', '.join(map(str, sorted(rounded)))} bits"
    require(rounded <= given, op, "plan", must, f"ranges for {', '.join(map(str, given)) or 'none'}")
    known_weights = plan.fingerprint.get("weights")
    require(
        known_weights in (None, weights_digest(model)), op, "model", "be the one the plan was made for", "other weights"
    )
