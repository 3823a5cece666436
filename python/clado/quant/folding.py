"""Weights that torch computes from other parameters in every forward become parameters, which can be quantized and shipped."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode


def folded(model: nn.Module) -> nn.Module:
    """The model with the values of its parametrizations, weight and spectral norms, pruning masks and timm's weight
    standardization as plain parameters.

    Args:
        model: in eval mode; it is not changed.

    Returns:
        A copy that computes the same; the model itself where nothing is to be folded.
    """
    if not any(parametrize.is_parametrized(m) or _hooks(m) or _standardizes(m) for m in model.modules()):
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
            if _standardizes(module):
                _without_standardization(module)
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


def _standardizes(module: nn.Module) -> bool:
    """Whether it is one of timm's convolutions with standardized weights (arXiv 1903.10520, 2101.08692)."""
    return isinstance(module, nn.Conv2d) and type(module).__module__ == "timm.layers.std_conv"


def _without_standardization(module: Any) -> None:
    """As the plain convolution of the weight that it applies."""
    from timm.layers.conv2d_same import Conv2dSame

    weight = _applied(module)
    module.__class__ = Conv2dSame if getattr(module, "same_pad", False) else nn.Conv2d
    module._parameters.pop("gain", None)
    module.weight = nn.Parameter(weight, module.weight.requires_grad)


def _applied(module: Any) -> Tensor:
    """The weight that a convolution hands to torch."""
    seen: list[Tensor] = []

    class Noted(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is conv2d:
                seen.append(args[1])
            return func(*args, **(kwargs or {}))

    size = [1 + step * (side - 1) for side, step in zip(module.kernel_size, module.dilation, strict=True)]
    with Noted():
        module(module.weight.new_zeros(1, module.in_channels, *size))
    return seen[0].detach().clone()
