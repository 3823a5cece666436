"""Values of several streams side by side: where the batch dimension lies, putting together, taking apart, comparing.

``meta`` is what torch.export knows of a value: a tensor, or a tuple of tensors, of symbolic shape. The one symbolic size is that
of the batch; a value without it is the same under every stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..common import require


def batch_dim(meta: Tensor) -> int | None:
    """The dimension that counts samples, from the symbolic shape."""
    symbolic = [d for d, size in enumerate(meta.shape) if isinstance(size, torch.SymInt)]
    return symbolic[0] if symbolic else None


def stacked(parts: Sequence[Any], meta: Any) -> Any:
    """The streams' values one after the other along the batch dimension."""
    if isinstance(meta, (tuple, list)):
        return tuple(stacked([part[k] for part in parts], m) for k, m in enumerate(meta))
    dim = batch_dim(meta)
    return parts[0] if dim is None or len(parts) == 1 else torch.cat(list(parts), dim)


def of_stream(value: Any, meta: Any, stream: int, streams: int) -> Any:
    """One stream's part of a stacked value."""
    if isinstance(meta, (tuple, list)):
        return tuple(of_stream(v, m, stream, streams) for v, m in zip(value, meta, strict=True))
    dim = batch_dim(meta)
    if dim is None:
        return value
    size = value.shape[dim] // streams
    return value.narrow(dim, stream * size, size)


def rows(tensor: Tensor, meta: Tensor, count: int) -> Tensor:
    """``[count, T, K]`` of a tensor whose batch dimension is that of ``meta`` and holds a multiple of the rows."""
    dim = batch_dim(meta)
    assert dim is not None
    return tensor.movedim(dim, 0).reshape(count, -1, tensor.shape[-1] if dim != tensor.dim() - 1 else 1)


def stream_major(value: Tensor, meta: Tensor, streams: int) -> Tensor:
    """``[S, …]`` of a stacked value, every stream's part as the model returns it."""
    dim = batch_dim(meta)
    if dim is None:
        return torch.stack([value] * streams)
    if dim == 0:
        return value.reshape(streams, value.shape[0] // streams, *value.shape[1:])
    return torch.stack([of_stream(value, meta, s, streams) for s in range(streams)])


def changes(finished: Any, clean: Any) -> Any:
    """δ of what streams gave, ``[S, …]`` for every floating-point tensor ``[…]`` of a nest; a single tensor is overwritten."""
    if isinstance(finished, Tensor):
        return finished.sub_(clean) if finished.is_floating_point() else finished

    def change(mine: Any, known: Any) -> Any:
        return mine - known if isinstance(mine, Tensor) and mine.is_floating_point() else mine

    return pytree.tree_map(change, finished, clean)


def check_same_shapes(op: str, first: Any, other: Any) -> None:
    """Raise unless what a model returned has the shapes that it returned before."""
    must = "return outputs of the same shapes whatever the weights and data (forward_step may return parts that have)"
    require(other == first, op, "model", must, f"{other} after {first}")


def stacked_outputs(outputs: Sequence[Any], op: str) -> Any:
    """The nest that streams gave, its tensors with the streams in front; what is no tensor as the first stream has it."""
    nests = [pytree.tree_flatten(output) for output in outputs]
    columns = list(zip(*(leaves for leaves, _ in nests), strict=False))
    shapes = [[tuple(x.shape) if isinstance(x, Tensor) else None for x in leaves] for leaves, _ in nests]
    for other in shapes:
        check_same_shapes(op, shapes[0], other)
    leaves = [torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    return pytree.tree_unflatten(leaves, nests[0][1])


def first_stream(finished: Any) -> Any:
    """A nest ``[…]`` of one ``[S, …]``."""
    return pytree.tree_map(lambda x: x[0] if isinstance(x, Tensor) else x, finished)


def tensors(nest: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(nest) if isinstance(leaf, Tensor)]


def close(got: Any, wanted: Any, rtol: float) -> bool:
    """Whether values agree to ``rtol`` of the largest finite one."""
    if isinstance(wanted, (tuple, list)):
        return all(close(g, w, rtol) for g, w in zip(got, wanted, strict=True))
    if got.shape != wanted.shape:
        return False
    if not wanted.is_floating_point() or wanted.numel() == 0:
        return torch.equal(got, wanted)
    largest = torch.where(torch.isfinite(wanted), wanted, 0).abs().max().item()
    return torch.allclose(got, wanted, rtol=0, atol=rtol * largest, equal_nan=True)
