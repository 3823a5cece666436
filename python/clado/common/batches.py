"""Batches as data loaders yield them: split into inputs and targets, checked, moved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .errors import CladoError


def split_batch(item: Any, op: str = "profile") -> tuple[Tensor, Any]:
    """(inputs, targets or None) of one batch of a data loader; targets may be a nest of tensors."""
    if isinstance(item, Tensor) and item.dim() >= 1:
        return item, None
    pair = isinstance(item, (tuple, list)) and 1 <= len(item) <= 2 and isinstance(item[0], Tensor)
    if pair and all(_tensors(part) for part in item[1:]):
        return item[0], item[1] if len(item) == 2 else None
    raise CladoError(f"{op}: data_loader must yield tensors or (inputs, targets), got {type(item).__name__}")


def _tensors(nest: Any) -> bool:
    leaves = tree_leaves(nest)
    return len(leaves) > 0 and all(isinstance(leaf, Tensor) for leaf in leaves)


def sample_count(batch: Any) -> int:
    """Of a nest of tensors ``[n, …]``."""
    return len(tree_leaves(batch)[0])


def shown_shapes(inputs: Any) -> str:
    """The shape of a tensor, or those of a nest."""
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return str(shapes[0] if isinstance(inputs, Tensor) else shapes)


def two_samples(inputs: Any) -> Any:
    """Two samples of a nest of tensors to export and test with; a single one is repeated."""
    return tree_map(lambda x: x[:2] if len(x) > 1 else x.repeat(2, *[1] * (x.dim() - 1)), inputs)


def moved_to(inputs: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """``inputs`` on the device, converted there, floating-point ones to ``dtype``; pinned ones without waiting.

    What is no tensor in a nest stays as it is.
    """
    ahead = device.type == "cuda"  # towards a CPU nothing would wait for what is still on its way
    there = tree_map(lambda x: x.to(device, non_blocking=ahead) if isinstance(x, Tensor) else x, inputs)
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, there)
