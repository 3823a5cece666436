"""Layers that keep their weight packed: the public face of what :func:`clado.load` puts into a model."""

from .deploy import QuantConv2d, QuantLinear, pack_model, packed_bytes

__all__ = ["QuantConv2d", "QuantLinear", "pack_model", "packed_bytes"]
