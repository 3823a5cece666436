"""Weights that torch computes from other parameters in every forward become parameters, which can be quantized and shipped."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def folded(model: nn.Module) -> nn.Module:
    """The model with the values of its parametrizations, weight and spectral norms and pruning masks as plain parameters.

    Args:
        model: in eval mode; it is not changed.

    Returns:
        A copy that computes the same; the model itself where nothing is to be folded.
    """
    if not any(parametrize.is_parametrized(module) or _hooks(module) for module in model.modules()):
        return model
    # What a hook has computed is no leaf of autograd, which deepcopy refuses.
    values = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    made = copy.deepcopy(model, {id(value): value.detach().clone() for value in values})
    with torch.no_grad():
        for module in list(made.modules()):
            if parametrize.is_parametrized(module):
                _without_parametrizations(module)
            for hook in _hooks(module):
                _without_hook(module, hook)
    return made


def _without_parametrizations(module: nn.Module) -> None:
    """As ``remove_parametrizations``, which would take the attribute from the class that the original shares, too."""
    held: Any = module.parametrizations
    values = {name: getattr(module, name).detach().clone() for name in held}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks of a module that compute one of its tensors."""
    kinds = (WeightNorm, SpectralNorm, prune.BasePruningMethod)
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, kinds)]


def _without_hook(module: nn.Module, hook: Any) -> None:
    if isinstance(hook, WeightNorm):
        remove_weight_norm(module, hook.name)
    elif isinstance(hook, SpectralNorm):
        remove_spectral_norm(module, hook.name)
    else:
        prune.remove(module, hook._tensor_name)
