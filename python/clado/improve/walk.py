"""One walk through a net, block after block: compensate, learn, go on with what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ..artifacts import Plan
from ..graph import Blocks, Live
from .compensation import Finished, compensate_block, dtype_of
from .learning import Pace, learn_block


def walk(
    blocks: Blocks,
    plan: Plan,
    start: Finished,
    parts: Sequence[Live],
    apart: Sequence[Live],
    state: Mapping[str, Tensor],
    pace: Pace | None,
    seed: int,
    skip: int,
    done: Callable[[int, Finished], None],
) -> Finished:
    """Round the layers of a plan once more, each block on what comes out of those before it.

    Args:
        blocks: the float model.
        plan: which layers.
        start: their rounded weights, and what was adapted to them.
        parts, apart: samples that decide and samples that judge, some each, before the first block.
        state: the float model's parameters and buffers, on its device.
        pace: of a block's learning; None: compensated alone.
        seed: of the order of samples.
        skip: blocks that are done already, as an interrupted call left them in ``start``.
        done: called after every block, with how many are done and the weights so far.
    """
    known = start
    clean, rounded = [[*parts, *([] if pace is None else apart)] for _ in range(2)]
    for index, block in enumerate(blocks.blocks):
        targets = [blocks.run(block, live, {}) for live in clean]
        if index >= skip and any(layer.name in known.weights for layer in block.layers):
            both = pairs(clean, rounded)[: len(parts)]
            fresh = known.without(block.parameters)  # adapted to weights that are replaced
            compensated = fresh.plus(compensate_block(blocks, block, plan, fresh, both, state))
            if pace is None:
                known = compensated
            else:
                samples, starts = pairs(rounded, targets), [known, compensated]
                learned = samples[: len(parts)], samples[len(parts) :]
                known = learn_block(blocks, block, plan, starts, *learned, state, pace, seed)
        given = known.tensors(plan, dtype_of(plan, state))
        rounded = [blocks.run(block, live, given) for live in rounded]
        clean = targets
        done(index + 1, known)
    return known


def pairs(one: Sequence[Live], other: Sequence[Live]) -> list[tuple[Live, Live]]:
    """The same samples in two nets, or at two places."""
    return list(zip(one, other, strict=True))
