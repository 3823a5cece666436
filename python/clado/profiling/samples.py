"""The sensitivity set as a stream: the batches of any data loader, cut into chunks of one size, every sample with a digest.

Nothing is kept: of 50,000 images as many are in memory as a chunk holds. The digests say, sample by sample and in order,
whether a run that is carried on, prolonged or merged saw the same data.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset

from ..common import CladoError, require

_Part = tuple[int, Any]  # index of the first sample, batch


@dataclass(frozen=True)
class Chunk:
    """Samples that are measured, summed and kept together.

    Attributes:
        first: index of the first sample in the run's order.
        batch: n samples in the structure the loader yields, on the CPU.
        digests: int64 ``[n]``.
    """

    first: int
    batch: Any
    digests: Tensor

    @property
    def samples(self) -> int:
        return len(self.digests)

    @property
    def last(self) -> int:
        return self.first + self.samples


class SampleStream:
    """Up to ``num_samples`` samples of a data loader in a fixed order.

    A plain :class:`torch.utils.data.DataLoader` over a map-style dataset is asked for its order once; its workers then load
    whole chunks, and every rank loads its own alone. Anything else is iterated as it is.

    Args:
        data_loader: iterable of batches: tensors, or tuples, lists or dicts of tensors with one leading dimension.
        num_samples: where to stop.
        seed: of torch's generator while the loader draws; the generator outside is left as it was.
        name: what errors call the loader.
        like: a stream whose batches these must be like.
    """

    def __init__(
        self,
        data_loader: Iterable[Any],
        num_samples: int,
        seed: int = 0,
        name: str = "data_loader",
        like: SampleStream | None = None,
    ) -> None:
        self.num_samples, self.name = num_samples, name
        self._random = torch.Generator().manual_seed(seed).get_state()
        self._loader = data_loader
        self._order = self._indices()
        self._started: Iterator[Any] = iter(()) if self._order is not None else self._read(data_loader)
        self._like: Any = None if like is None else like._like

    def peek(self, count: int = 2) -> Any:
        """Up to ``count`` first samples in the loader's structure; nothing is lost."""
        batches = self._started if self._order is None else self._read(self._reloader([self._order[:count]]))
        parts: list[Any] = []
        for batch in batches:
            parts.append(batch)
            if sum(map(_length, parts)) >= count:
                break
        require(len(parts) > 0, "profile", self.name, "yield at least one sample", "none")
        held = _join(parts)
        if self._order is None:
            self._started = itertools.chain([held], batches)
        return _cut(held, 0, min(count, self.num_samples))

    def at_hand(self, count: int) -> int:
        """How many of the ``count`` first samples there are; what cannot be asked for by its index is read."""
        return min(count, len(self._order)) if self._order is not None else _length(self.peek(count))

    def early(self, count: int, size: int) -> Iterator[Any]:
        """The ``count`` first samples in batches of ``size``, before the run has them.

        What can be asked for by its index is read twice; of anything else these samples are held until they are measured.
        """
        if self._order is None:
            held = self.peek(count)
            yield from (_cut(held, a, a + size) for a in range(0, _length(held), size))
            return
        before, order = self._random, self._order[:count]
        yield from self._read(self._reloader([order[a : a + size] for a in range(0, len(order), size)]))
        self._random = before

    @property
    def expected(self) -> int:
        """How many samples will come, where that can be known; ``num_samples`` otherwise."""
        if self._order is not None:
            return len(self._order)
        listed = isinstance(self._loader, (list, tuple)) and self._like is not None
        return min(self.num_samples, sum(map(_length, self._loader))) if listed else self.num_samples

    def chunks(self, size: int, rank: int = 0, world: int = 1, ahead: bool = False) -> Iterator[Chunk | None]:
        """One chunk a round: of the chunks in order, ``world`` to a round, the one at place ``rank``; None where it is missing.

        Args:
            ahead: get the next chunk ready while this one is measured, in memory that a GPU copies from on its own. For a
                CPU, which has no time to spare, it would only be two more chunks in memory.

        Raises:
            CladoError: the loader raises, or a batch has another structure, shape or dtype than the first.
        """
        parts = self._parts(size, rank, world)
        return _ready_ahead(parts) if ahead else map(_chunk, parts)

    def _parts(self, size: int, rank: int, world: int) -> Iterator[_Part | None]:
        if self._order is not None:
            starts = range(0, len(self._order), size)
            mine = starts[rank::world]
            batches = self._read(self._reloader([self._order[a : a + size] for a in mine]))
            for first, batch in zip(mine, batches, strict=True):
                yield first, batch
            if len(mine) < -(-len(starts) // world):
                yield None
            return
        own, place = None, 0
        for index, (first, batch) in enumerate(self._rebatched(size)):
            place = index % world
            if place == rank:
                own = first, batch
            if place == world - 1:
                yield own
                own = None
        if place != world - 1:
            yield own

    def _rebatched(self, size: int) -> Iterator[_Part]:
        """(first index, batch) of chunks of exactly ``size`` samples, the last one perhaps smaller."""
        first, held, parts = 0, 0, []
        for batch in self._started:
            batch = _cut(batch, 0, self.num_samples - first - held)
            while batch is not None:
                piece, batch = _cut(batch, 0, size - held), _cut(batch, size - held, None)
                parts.append(piece)
                held += _length(piece)
                if held == size:
                    yield first, _join(parts)
                    first, held, parts = first + size, 0, []
            if first + held >= self.num_samples:
                break
        if parts:
            yield first, _join(parts)

    def _read(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Checked batches on the CPU; what the loader raises becomes one line."""
        iterator = None
        for number in itertools.count(1):
            with self._drawing():
                try:
                    iterator = iter(loader) if iterator is None else iterator
                    batch = next(iterator)
                except StopIteration:
                    return
                except CladoError:
                    raise
                except Exception as error:  # whatever a dataset, a decoder or a worker raises
                    reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
                    raise CladoError(
                        f"profile: {self.name} must yield its batches, got {type(error).__name__} at batch {number}"
                        f"{': ' + reason.strip() if reason else ''}; finished chunks are kept"
                    ) from error
                batch = tree_map(lambda t: t.cpu() if isinstance(t, Tensor) else t, batch)
            self._check(batch)
            if _length(batch) > 0:
                yield batch

    def _check(self, batch: Any) -> None:
        leaves, structure = tree_flatten(batch)
        tensors = bool(leaves) and all(isinstance(leaf, Tensor) and leaf.dim() >= 1 for leaf in leaves)
        if not tensors:
            raise CladoError(
                f"profile: {self.name} must yield tensors or (inputs, targets), got {type(batch).__name__}"
            )
        lengths = [len(leaf) for leaf in leaves]
        must = "yield nests of tensors of one length"
        require(len(set(lengths)) == 1, "profile", self.name, must, f"lengths {lengths}")
        kinds = [(tuple(leaf.shape[1:]), leaf.dtype) for leaf in leaves]
        if self._like is None:
            self._like = (structure, kinds)
        known, wanted = self._like
        must = "yield batches of one structure, targets always or never"
        require(structure == known, "profile", self.name, must, f"{structure} after {known}")
        require(kinds == wanted, "profile", self.name, f"yield inputs of one shape {wanted}", kinds)

    def _indices(self) -> list[Any] | None:
        """The dataset's indices in the order the loader would take them, None where that cannot be known."""
        loader = self._loader
        if (
            type(loader) is not DataLoader
            or loader.batch_sampler is None
            or isinstance(loader.dataset, IterableDataset)
        ):
            return None
        with self._drawing():
            order = itertools.chain.from_iterable(loader.batch_sampler)
            return list(itertools.islice(order, self.num_samples))

    def _reloader(self, batches: list[list[Any]]) -> Iterable[Any]:
        """The loader with other batches: same dataset, workers and collation."""
        loader = self._loader
        assert isinstance(loader, DataLoader)
        workers = min(loader.num_workers, len(batches) - 1)  # none where one batch is all
        shared = {"prefetch_factor": loader.prefetch_factor, "multiprocessing_context": loader.multiprocessing_context}
        return DataLoader(
            loader.dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout if workers else 0,
            worker_init_fn=loader.worker_init_fn,
            **(shared if workers else {}),
        )

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Torch's generator in the stream's own state; tensors made inside are ordinary ones."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            with torch.inference_mode(False):
                yield
        finally:
            self._random = torch.get_rng_state()
            torch.set_rng_state(outside)


def sample_digests(batch: Any) -> Tensor:
    """int64 ``[n]``: the first 8 bytes of SHA-256 over the dtypes, shapes and bytes of each sample."""
    leaves = [leaf.contiguous() for leaf in tree_flatten(batch)[0]]
    head = json.dumps([[str(leaf.dtype), list(leaf.shape[1:])] for leaf in leaves]).encode()
    rows = [leaf.reshape(len(leaf), -1).view(torch.uint8).numpy() for leaf in leaves]
    digests = []
    for parts in zip(*rows, strict=True):
        total = hashlib.sha256(head)
        for part in parts:
            total.update(part.data)
        digests.append(int.from_bytes(total.digest()[:8], "little", signed=True))
    return torch.tensor(digests, dtype=torch.int64)


def _chunk(part: _Part | None) -> Chunk | None:
    return None if part is None else Chunk(*part, sample_digests(part[1]))


def _ready_ahead(parts: Iterator[_Part | None]) -> Iterator[Chunk | None]:
    """Chunks of ``parts``: the next one is drawn and copied before the caller has this one, and hashed while it is measured.

    It is drawn here, since drawing swaps the process's random state, and copied before the loader goes on, which may fill the
    same memory again. What drawing raises is raised when the chunk before is measured; only an interruption comes at once.
    """
    failed: Exception | None = None
    pending: Future[Chunk | None] | None = None
    with ThreadPoolExecutor(1, "clado-samples") as pool:
        while True:
            try:
                part = next(parts)
                following = pool.submit(_chunk, None if part is None else (part[0], tree_map(_own_copy, part[1])))
            except StopIteration:
                break
            except Exception as error:
                failed = error
                break
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()
    if failed is not None:
        raise failed


def _own_copy(tensor: Tensor) -> Tensor:
    """In pinned memory, where the system has some."""
    if torch.cuda.is_available():
        try:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
        except RuntimeError:
            pass
    return tensor.clone(memory_format=torch.contiguous_format)


def _length(batch: Any) -> int:
    leaves = tree_flatten(batch)[0]
    return len(leaves[0]) if leaves and isinstance(leaves[0], Tensor) and leaves[0].dim() > 0 else 0


def _cut(batch: Any, start: int, stop: int | None) -> Any:
    """Samples start..stop of a batch, None where that is none."""
    part = tree_map(lambda t: t[start:stop], batch)
    return part if _length(part) > 0 else None


def _join(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    leaves, structure = zip(*(tree_flatten(part) for part in parts), strict=True)
    return tree_unflatten([torch.cat(column) for column in zip(*leaves, strict=True)], structure[0])
