"""How ranks measure one chunk together: each takes some layers' perturbations, and what all must know is added up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..common import CladoError


class MemberFailed(RuntimeError):
    """Another member ran out of memory: the attempt is over for all, and all take less at a time."""


@dataclass(frozen=True)
class Share:
    """One rank's part of a chunk; by default all of it.

    Every entry of a sum is measured by one member and zero on the others, so adding them is exact.

    Attributes:
        place, members: which of how many ranks; place 0 leads.
        group: of torch.distributed, None for all processes.
        device: where tensors lie that have no other place to be.
    """

    place: int = 0
    members: int = 1
    group: Any = None
    device: str | torch.device = "cpu"

    @property
    def leads(self) -> bool:
        """Whether this member does what is not worth sharing."""
        return self.place == 0

    def own(self, count: int, costs: Callable[[], Sequence[float]]) -> list[int]:
        """Which of so many items are this member's, ascending; the same split on every member."""
        return list(range(count)) if self.members == 1 else split(costs(), self.members)[self.place]

    def gathered(self, rows: Tensor, own: Sequence[int], count: int) -> Tensor:
        """``[count, …]`` with this member's rows at ``own``, and all others' at theirs.

        Raises:
            MemberFailed: a member has none to give.
        """
        if self.members == 1:
            return rows
        whole = rows.new_zeros(count, *rows.shape[1:])
        whole[torch.tensor(own, device=rows.device)] = rows
        return self.added(whole)

    def added(self, tensor: Tensor) -> Tensor:
        """The sum of all members' tensors of one shape, overwriting this one.

        Raises:
            MemberFailed: a member has none to give.
        """
        if self.members == 1:
            return tensor
        moved = tensor.to(self.device)
        if self.any_failed(False):
            raise MemberFailed("another rank ran out of memory")
        with peers():
            dist.all_reduce(moved, group=self.group)
        return moved.to(tensor.device)

    def any_failed(self, failed: bool) -> bool:
        """Whether any member says so. Whoever fails before :meth:`added` asks this in its place."""
        if self.members == 1:
            return failed
        said = torch.tensor([int(failed)], device=self.device)
        with peers():
            dist.all_reduce(said, dist.ReduceOp.MAX, group=self.group)
        return bool(said.item())


def split(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Items in ``parts`` lists of about equal cost, the dearest first to the list that has least (Graham 1969)."""
    lists: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0.0, 0, part) for part in range(parts)]
    for item in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        load, count, part = min(loads)
        lists[part].append(item)
        loads[part] = (load + costs[item], count + 1, part)
    return [sorted(items) for items in lists]


def longest(costs: Sequence[float], parts: int) -> float:
    """The largest cost of a list of :func:`split`."""
    return max(sum(costs[item] for item in items) for items in split(costs, parts))


@contextmanager
def peers() -> Iterator[None]:
    """One line for whatever torch.distributed says when a rank is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise CladoError(
            f"profile: every rank must stay alive, got {reason}; finished chunks are kept, start the same run again to go on"
        ) from error
