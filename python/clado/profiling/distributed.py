"""One run on many processes: torchrun starts them, torch.distributed carries their sums, rank 0 writes.

In every round each group of ranks measures one chunk of samples and rank 0 adds the sums in sample order, so any number of
ranks makes the same sums of the same parts. A group is one rank, or several that share the perturbations of a chunk where
chunks are few (share.py). A rank that fails takes the round with it, no more: rank 0's checkpoint stands.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..common import digest, require
from .samples import Chunk
from .share import Share, peers
from .sums import TENSORS, Sums

T = TypeVar("T")
# How long a rank waits for the slowest one: a chunk of a large model under "exact" can take hours, and torchrun ends all
# ranks at once where one of them dies.
_PATIENCE = timedelta(days=2)


class Ranks:
    """This process among its peers; alone when there is no process group.

    Attributes:
        rank, world: place and number of processes.
        device: where tensors lie while they travel.
        share: this rank's part of its group's chunks.
        group, groups: which of how many groups that measure a chunk each.
    """

    def __init__(self, device: torch.device) -> None:
        many = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
        self.device = device
        self.share, self.group, self.groups = Share(), self.rank, self.world

    def join(self, members: int) -> None:
        """Let so many neighbours, a divisor of all, measure every chunk together."""
        self.group, self.groups = self.rank // members, self.world // members
        together = None
        if 1 < members < self.world:
            with peers():
                every = [dist.new_group(range(a, a + members)) for a in range(0, self.world, members)]
            together = every[self.group]
        self.share = Share(self.rank % members, members, together, self.device)

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def agree(self, values: list[int]) -> list[int]:
        """Rank 0's values, on every rank."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64, device=self.device)
        with peers():
            dist.broadcast(tensor, 0)
        return tensor.tolist()

    def check_same(self, settings: dict[str, Any]) -> None:
        """Raise where this rank was started with other settings than rank 0."""
        own = [int(digest(value)[:15], 16) for value in settings.values()]
        first = self.agree(own)
        different = [name for name, mine, wanted in zip(settings, own, first, strict=True) if mine != wanted]
        got = f"other {', '.join(different)} on rank {self.rank}"
        require(not different, "profile", "ranks", "have the same model, data and settings", got)

    def collect(
        self, chunk: Chunk | None, part: Sums | None, like: Sums, size: int
    ) -> list[tuple[Tensor, Sums | None]]:
        """(sample digests, sums) of every group that has a chunk this round, in order, on rank 0; an empty list elsewhere.

        Args:
            chunk: this group's, of at most ``size`` samples; None without one.
            part: its sums, None where rank 0 has them already.
            like: sums of the run's shape.
        """
        if self.world == 1:
            return [] if chunk is None else [(chunk.digests, part)]
        if not self.share.leads:
            chunk = part = None
        flat = torch.zeros(0) if part is None else _flat(part)
        head = torch.zeros(2 + 2 * len(TENSORS) + size, dtype=torch.int64)
        if chunk is not None:
            head[0], head[1] = chunk.samples, len(flat)
            head[-size:][: chunk.samples] = chunk.digests
        if part is not None:
            head[2:-size] = torch.tensor([_sides(getattr(part, name)) for name in TENSORS]).view(-1)
        longest = torch.tensor([len(flat)], device=self.device)
        with peers():
            dist.all_reduce(longest, dist.ReduceOp.MAX)
        padded = torch.zeros(int(longest), dtype=torch.float64)
        padded[: len(flat)] = flat
        found: list[tuple[Tensor, Sums | None]] = []
        for numbers, values in zip(self._gather(head), self._gather(padded), strict=True):
            count = int(numbers[0])
            sides = numbers[2:-size].view(-1, 2).tolist()
            sums = _unflat(values, like, sides, count) if numbers[1] else None
            if count > 0:
                found.append((numbers[-size:][:count], sums))
        return found

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        sent = tensor.to(self.device)
        parts = [torch.empty_like(sent) for _ in range(self.world)] if self.writes else None
        with peers():
            dist.gather(sent, parts, dst=0)
        return [part.cpu() for part in parts or ()]

    def everyone(self, data: bytes) -> list[bytes]:
        """What every rank gives, in their order, on every rank."""
        size = torch.tensor([len(data)], device=self.device)
        sizes = [torch.empty_like(size) for _ in range(self.world)]
        with peers():
            dist.all_gather(sizes, size)
        parts = []
        for rank, count in enumerate(sizes):
            own = torch.frombuffer(bytearray(data), dtype=torch.uint8) if rank == self.rank else None
            part = torch.empty(int(count), dtype=torch.uint8) if own is None else own
            moved = part.to(self.device)
            with peers():
                dist.broadcast(moved, rank)
            parts.append(moved.cpu().numpy().tobytes())
        return parts

    def send(self, save: Callable[[Path], Path]) -> None:
        """Give the file that ``save`` writes into a folder to every other rank."""
        if self.world == 1:
            return
        with TemporaryDirectory() as folder:
            data = save(Path(folder)).read_bytes()
        self.agree([len(data)])
        with peers():
            dist.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device), 0)

    def receive(self, load: Callable[[Path], T], name: str) -> T:
        """What ``load`` makes of the file of this name that rank 0 sends."""
        data = torch.empty(self.agree([0])[0], dtype=torch.uint8, device=self.device)
        with peers():
            dist.broadcast(data, 0)
        with TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(data.cpu().numpy().tobytes())
            return load(path)


def is_writer() -> bool:
    """Whether this process writes and prints: rank 0, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


@contextmanager
def torchrun_group(device: str | None = None) -> Iterator[str | torch.device | None]:
    """The process group that torchrun asks for and this rank's device; what was asked for where there is none to make.

    CUDA devices talk through NCCL, CPUs through gloo. After an error the group is left as it is: taking it down would wait for
    ranks that wait for this one, and torchrun ends them all when this one has ended.

    Raises:
        CladoError: more ranks than GPUs on this machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ or dist.is_initialized():
        yield device
        return
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        require(local < count, "profile", "nproc-per-node", f"be at most {count}, one rank per GPU", f"rank {local}")
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=_PATIENCE)
    yield place
    dist.destroy_process_group()


def _flat(sums: Sums) -> Tensor:
    return torch.cat([getattr(sums, name).reshape(-1).double() for name in TENSORS])


def _sides(tensor: Tensor) -> tuple[int, int]:
    """Two numbers that tell the shape of at most two dimensions, given how many they are."""
    return (*tensor.shape, 1, 1)[:2]


def _unflat(flat: Tensor, like: Sums, sides: list[list[int]], samples: int) -> Sums:
    """Inverse of :func:`_flat`; dtypes and numbers of dimensions are those of ``like``."""
    values, start = {}, 0
    for name, (rows, columns) in zip(TENSORS, sides, strict=True):
        known = getattr(like, name)
        part = flat[start : start + rows * columns]
        values[name] = part.view((rows, columns)[: known.dim()]).to(known.dtype)
        start += rows * columns
    return Sums(**values, samples=samples)
