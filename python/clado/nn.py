"""Layers that keep their weight packed and dequantize it on use: the memory of the codes at run time too."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import clado_ext

from .errors import require
from .plan import Plan
from .quantizer import Quantizer


class _Packed(nn.Module):
    """A module whose ``weight`` is computed from packed codes each time it is read; everything else is the source's.

    Attributes:
        weight_packed: int32 ``[rows, words]``, codes of ``bits`` each as :func:`clado_ext.pack` lays them.
        weight_scale: float32 ``[rows, groups]``.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    bits: int
    quantizer: Quantizer
    weight_shape: tuple[int, ...]
    weight_dtype: torch.dtype

    @classmethod
    def from_float(cls, source: nn.Module, quantizer: Quantizer, bits: int) -> _Packed:
        """Pack the weight of ``source``, which is not changed; its other parameters are shared.

        Args:
            source: a module whose ``weight`` is ``[N, …]``.
            quantizer: settings of the quantization.
            bits: 2 to 8.
        """
        weight = source._parameters.get("weight")
        require(weight is not None, "from_float", "source", "have a parameter named weight", type(source).__name__)
        assert weight is not None
        module = cls.__new__(cls)
        module.__dict__ = {name: copy.copy(value) for name, value in source.__dict__.items()}
        del module._parameters["weight"]
        codes, scales = quantizer.quantize(weight, bits)
        module.bits, module.quantizer = bits, quantizer
        module.weight_shape, module.weight_dtype = tuple(weight.shape), weight.dtype
        module.register_buffer("weight_packed", clado_ext.pack(codes, bits))
        module.register_buffer("weight_scale", scales.contiguous())
        return module

    @property
    def weight(self) -> Tensor:
        """The dequantized weight: bit for bit what :func:`clado.apply` evaluates."""
        columns = self.quantizer.rows_columns(self.weight_shape)[1]
        codes = clado_ext.unpack(self.weight_packed, self.bits, columns)
        return self.quantizer.dequantize(codes, self.weight_scale, self.weight_shape, self.weight_dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.bits}, group_size={self.quantizer.group_size}"


class QuantLinear(_Packed, nn.Linear):  # type: ignore[override]  # weight is read-only here
    """A Linear with packed weights; make one with ``QuantLinear.from_float``."""


class QuantConv2d(_Packed, nn.Conv2d):  # type: ignore[override]
    """A Conv2d with packed weights; make one with ``QuantConv2d.from_float``."""


def pack_model(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``model`` whose planned Linear and Conv2d layers keep packed weights; outputs are those of ``clado.apply``.

    Subclasses keep their own forward. A weight that no such module owns is dequantized once, as :func:`clado.apply` does.

    Args:
        model: the model the plan was made for; not changed.
        plan: bits per layer.

    Returns:
        The copy; :func:`packed_bytes` counts what it holds packed.

    Raises:
        CladoError: a plan that is infeasible or was made for other weights.
    """
    from .exporter import apply

    packed = apply(model, plan)
    for layer in plan.layers:
        made: dict[int, _Packed] = {}
        for name in layer.names:
            path, _, leaf = name.rpartition(".")
            source = model.get_submodule(path)
            if leaf != "weight" or not isinstance(source, (nn.Linear, nn.Conv2d)):
                continue
            module = made.get(id(source))
            if module is None:
                module = quantized_kind(type(source)).from_float(source, plan.quantizer, plan.bits[layer.name])
                for other in made.values():
                    module.weight_packed, module.weight_scale = other.weight_packed, other.weight_scale
                made[id(source)] = module
            packed.set_submodule(path, module)
    return packed


def packed_bytes(model: nn.Module) -> int:
    """Bytes of packed codes and scales that the layers of a model hold; what they share counts once."""
    layers = [module for module in model.modules() if isinstance(module, _Packed)]
    kept = {t.data_ptr(): t.nbytes for layer in layers for t in (layer.weight_packed, layer.weight_scale)}
    return sum(kept.values())


_KINDS: dict[type, type[_Packed]] = {nn.Linear: QuantLinear, nn.Conv2d: QuantConv2d}


def quantized_kind(source: type[nn.Module]) -> type[_Packed]:
    """The packed class of a module class: its own subclass, so that whatever its forward does, it does here."""
    if source not in _KINDS:
        _KINDS[source] = type(f"Quant{source.__name__}", (_Packed, source), {})
    return _KINDS[source]
