"""Layers that keep their weight packed and dequantize it on use: the memory of the codes at run time too."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..artifacts import Plan
from ..common import require
from ..quant import Layer, Number, Quantized, Quantizer, Scheme, announce, codes, folded
from .applied import check_fit, dequantized


class _Packed(nn.Module):
    """A module whose ``weight`` is computed from packed codes each time it is read; everything else is the source's.

    Attributes:
        weight_packed: int32 ``[rows, words]``, codes of ``bits`` each as :func:`clado_ext.pack` lays them.
        weight_scale: float32 ``[rows, groups]``.
        number: the format of the codes.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    number: Number
    quantizer: Quantizer
    weight_shape: tuple[int, ...]
    weight_dtype: torch.dtype
    weight_name: str  # in the model, where it is known

    @classmethod
    def from_float(cls, source: nn.Module, quantizer: Quantizer, bits: int) -> _Packed:
        """Pack the weight of ``source``, which is not changed; its other parameters are shared.

        Args:
            source: a module whose ``weight`` is ``[N, …]``.
            quantizer: settings of the quantization.
            bits: 2 to 8.
        """
        layer = Layer("weight", "", tuple(_weight_of(source).shape), 0, ("weight",))
        alone = Plan((layer,), {"weight": Scheme.of(bits).label}, "given", quantizer=quantizer)
        quantized = codes(source, alone)["weight"]
        return cls.from_packed(source, quantizer, quantized.number, quantized.packed())

    @classmethod
    def from_packed(
        cls, source: nn.Module, quantizer: Quantizer, number: Number, packed: Mapping[str, Tensor]
    ) -> _Packed:
        """:meth:`from_float` with the tensors of :meth:`Quantized.packed`; the weight of ``source`` is not read."""
        weight = _weight_of(source)
        module = cls.__new__(cls)
        module.__dict__ = {name: copy.copy(value) for name, value in source.__dict__.items()}
        del module._parameters["weight"]
        module.number, module.quantizer = number, quantizer
        module.weight_shape, module.weight_dtype, module.weight_name = tuple(weight.shape), weight.dtype, ""
        for name, part in packed.items():
            module.register_buffer(name, part)
        return module

    @property
    def bits(self) -> int:
        """Stored bits of an element."""
        return self.number.bits

    @property
    def weight(self) -> Tensor:
        """The dequantized weight: bit for bit what :func:`clado.apply` evaluates."""
        found = Quantized.unpacked(self.number, self.weight_shape, self.packed(), self.quantizer)
        return announce(found.values(self.weight_dtype), self.weight_name)

    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by name."""
        return {name: getattr(self, name) for name in self.number.stored(self.weight_shape, self.quantizer)}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.bits}, group_size={self.quantizer.group_size}"


class QuantLinear(_Packed, nn.Linear):  # type: ignore[override]  # weight is read-only here
    """A Linear with packed weights; make one with ``QuantLinear.from_float``."""


class QuantConv2d(_Packed, nn.Conv2d):  # type: ignore[override]
    """A Conv2d with packed weights; make one with ``QuantConv2d.from_float``."""


def pack_model(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``model`` whose planned Linear and convolution layers keep packed weights; outputs are those of ``clado.apply``.

    Subclasses keep their own forward. A weight that no such module owns is dequantized once, as :func:`clado.apply` does.

    Args:
        model: the model the plan was made for; not changed.
        plan: bits per layer.

    Returns:
        The copy; :func:`packed_bytes` counts what it holds packed.

    Raises:
        CladoError: a plan that is infeasible or was made for other weights.
    """
    model = folded(model)
    check_fit(model, plan, "apply")
    weights = codes(model, plan)
    packed = dequantized(model, plan, weights)
    replace_layers(packed, plan, weights)
    return packed


def replace_layers(model: nn.Module, plan: Plan, weights: Mapping[str, Quantized]) -> None:
    """Put packed modules in place of the Linear and convolution modules of ``model`` that own the weights of a plan."""
    for layer in plan.layers:
        if not layer.in_rows:
            continue
        number, packed = weights[layer.name].number, weights[layer.name].packed()  # the layer's modules share these
        owners = {
            path: model.get_submodule(path)
            for path, _, leaf in (n.rpartition(".") for n in layer.names)
            if leaf == "weight"
        }
        made: dict[int, _Packed] = {}
        for path, source in owners.items():
            if isinstance(source, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                if id(source) not in made:
                    packed = {name: part.to(source.weight.device) for name, part in packed.items()}
                    kind = quantized_kind(type(source))
                    made[id(source)] = kind.from_packed(source, plan.quantizer, number, packed)
                    made[id(source)].weight_name = f"{path}.weight"
                model.set_submodule(path, made[id(source)])


def packed_bytes(model: nn.Module) -> int:
    """Bytes of packed codes and scales that the layers of a model hold; what they share counts once."""
    layers = [module for module in model.modules() if isinstance(module, _Packed)]
    kept = {part.data_ptr(): part.nbytes for layer in layers for part in layer.packed().values()}
    return sum(kept.values())


_KINDS: dict[type, type[_Packed]] = {nn.Linear: QuantLinear, nn.Conv2d: QuantConv2d}


def quantized_kind(source: type[nn.Module]) -> type[_Packed]:
    """The packed class of a module class: its own subclass, so that whatever its forward does, it does here."""
    if source not in _KINDS:
        _KINDS[source] = type(f"Quant{source.__name__}", (_Packed, source), {})
    return _KINDS[source]


def _weight_of(source: nn.Module) -> Tensor:
    weight = source._parameters.get("weight")
    require(weight is not None, "from_float", "source", "have a parameter named weight", type(source).__name__)
    assert weight is not None
    return weight
