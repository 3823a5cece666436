"""The weights of a model as its candidates have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layers import Layer
from .quantizer import Quantizer


def quantized_variants(
    model: nn.Module,
    layers: Sequence[Layer],
    bits: Sequence[int],
    quantizer: Quantizer,
    device: torch.device,
    dtype: torch.dtype,
) -> list[list[Tensor]]:
    """For every layer its weight at every bit-width, quantized in the weight's own dtype, then converted."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = (parameters[layer.names[0]].detach() for layer in layers)
    return [list(quantizer.fake_quant(weight, bits).to(device, dtype)) for weight in weights]
