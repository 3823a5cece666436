"""One run on many processes: torchrun starts them, torch.distributed carries their sums, rank 0 writes.

In every round each rank measures one chunk of samples and rank 0 adds the sums in sample order, so any number of ranks
makes the same sums of the same parts. A rank that fails takes the round with it, no more: rank 0's checkpoint stands.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import CladoError
from .estimators import Sums
from .samples import Chunk
from .sensitivity import FILE_NAME

T = TypeVar("T")
_TENSORS = tuple(f.name for f in fields(Sums) if f.name != "samples")


class Ranks:
    """This process among its peers; alone when there is no process group.

    Attributes:
        rank, world: place and number of processes.
        device: where tensors lie while they travel.
    """

    def __init__(self, device: torch.device) -> None:
        many = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
        self.device = device

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def agree(self, values: list[int]) -> list[int]:
        """Rank 0's values, on every rank."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64, device=self.device)
        with _peers():
            dist.broadcast(tensor, 0)
        return tensor.tolist()

    def collect(
        self, chunk: Chunk | None, part: Sums | None, like: Sums, size: int
    ) -> list[tuple[Tensor, Sums | None]]:
        """(sample digests, sums) of every rank that has a chunk this round, in order, on rank 0; an empty list elsewhere.

        Args:
            chunk: this rank's, of at most ``size`` samples; None without one.
            part: its sums, None where rank 0 has them already.
            like: sums of the run's shape.
        """
        if self.world == 1:
            return [] if chunk is None else [(chunk.digests, part)]
        flat = torch.zeros(0) if part is None else _flat(part)
        head = torch.zeros(2 + 2 * len(_TENSORS) + size, dtype=torch.int64)
        if chunk is not None:
            head[0], head[1] = chunk.samples, len(flat)
            head[-size:][: chunk.samples] = chunk.digests
        if part is not None:
            head[2:-size] = torch.tensor([_sides(getattr(part, name)) for name in _TENSORS]).view(-1)
        longest = torch.tensor([len(flat)], device=self.device)
        with _peers():
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
        with _peers():
            dist.gather(sent, parts, dst=0)
        return [part.cpu() for part in parts or ()]

    def send(self, save: Callable[[Path], Any]) -> None:
        """Give the file that ``save`` writes to every other rank."""
        if self.world == 1:
            return
        with TemporaryDirectory() as folder:
            save(Path(folder) / FILE_NAME)
            data = (Path(folder) / FILE_NAME).read_bytes()
        self.agree([len(data)])
        with _peers():
            dist.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device), 0)

    def receive(self, load: Callable[[Path], T]) -> T:
        """What ``load`` makes of the file that rank 0 sends."""
        data = torch.empty(self.agree([0])[0], dtype=torch.uint8, device=self.device)
        with _peers():
            dist.broadcast(data, 0)
        with TemporaryDirectory() as folder:
            (Path(folder) / FILE_NAME).write_bytes(data.cpu().numpy().tobytes())
            return load(Path(folder) / FILE_NAME)


def is_writer() -> bool:
    """Whether this process writes and prints: rank 0, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


@contextmanager
def torchrun_group() -> Iterator[torch.device | None]:
    """The process group that torchrun asks for and this rank's device; None where nothing was asked for.

    CUDA devices talk through NCCL, CPUs through gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ or dist.is_initialized():
        yield None
        return
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise CladoError(
            f"profile: every rank must stay alive, got {reason}; finished work is kept, start the same run again to go on"
        ) from error


def _flat(sums: Sums) -> Tensor:
    return torch.cat([getattr(sums, name).reshape(-1).double() for name in _TENSORS])


def _sides(tensor: Tensor) -> tuple[int, int]:
    """Two numbers that tell the shape of at most two dimensions, given how many they are."""
    return (*tensor.shape, 1, 1)[:2]  # type: ignore[return-value]


def _unflat(flat: Tensor, like: Sums, sides: list[list[int]], samples: int) -> Sums:
    """Inverse of :func:`_flat`; dtypes and numbers of dimensions are those of ``like``."""
    values, start = {}, 0
    for name, (rows, columns) in zip(_TENSORS, sides, strict=True):
        known = getattr(like, name)
        part = flat[start : start + rows * columns]
        values[name] = part.view((rows, columns)[: known.dim()]).to(known.dtype)
        start += rows * columns
    return Sums(**values, samples=samples)
