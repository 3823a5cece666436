"""Chunks got ready ahead are those that are got ready when asked for, whatever the loader does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import clado
from clado.common import moved_to
from clado.profiling import SampleStream, samples

X, Y = torch.randn(21, 3, generator=torch.Generator().manual_seed(0)), torch.arange(21)


def shuffled() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)


def listed() -> list[Any]:
    return list(zip(X.split(5), Y.split(5), strict=True))


@pytest.mark.parametrize("make", [shuffled, listed])
@pytest.mark.parametrize(
    ("size", "rank", "world"), [(4, 0, 1), (1, 0, 1), (30, 0, 1), (6, 1, 3), (6, 2, 3), (12, 1, 2)]
)
def test_ahead_gives_the_same_chunks(make: Any, size: int, rank: int, world: int) -> None:
    plain, ahead = (
        list(SampleStream(make(), 21, seed=3).chunks(size, rank, world, ahead=ahead)) for ahead in (False, True)
    )
    assert len(plain) == len(ahead) > 0
    for one, other in zip(plain, ahead, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.first == other.first
            assert torch.equal(one.digests, other.digests)
            assert all(torch.equal(a, b) for a, b in zip(one.batch, other.batch, strict=True))


def test_the_next_chunk_is_hashed_by_another_thread_while_one_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[tuple[int, str]] = []
    plain = samples.sample_digests

    def noting(batch: Any) -> torch.Tensor:
        hashed.append((len(hashed), threading.current_thread().name))
        return plain(batch)

    monkeypatch.setattr(samples, "sample_digests", noting)
    chunks = SampleStream([X], 21).chunks(10, ahead=True)
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]  # waits for what is begun
    assert [number for number, _ in hashed] == [0, 1]
    assert all(name.startswith("clado-samples") for _, name in hashed)
    assert not any(thread.name.startswith("clado-samples") for thread in threading.enumerate())


def test_an_error_ahead_waits_until_the_chunk_before_is_measured() -> None:
    def breaking() -> Iterator[torch.Tensor]:
        yield X[:8]
        raise OSError("the disk is gone")

    chunks = SampleStream(breaking(), 21).chunks(4, ahead=True)
    assert [chunk and chunk.first for chunk in (next(chunks), next(chunks))] == [0, 4]
    with pytest.raises(clado.CladoError, match="the disk is gone"):
        next(chunks)


def test_a_loader_that_refills_its_batch_is_copied_in_time() -> None:
    def refilling() -> Iterator[torch.Tensor]:
        batch = torch.empty(4, 3)
        for k in range(4):
            yield batch.fill_(k)

    chunks = list(SampleStream(refilling(), 16).chunks(4, ahead=True))
    assert [chunk and set(chunk.batch.flatten().tolist()) for chunk in chunks] == [{0.0}, {1.0}, {2.0}, {3.0}]


def test_what_cannot_be_pinned_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no memory to pin")))
    (chunk,) = SampleStream([X[:, :1].expand(-1, 3)], 21).chunks(21, ahead=True)
    assert chunk is not None
    assert torch.equal(chunk.batch, X[:, :1].expand(-1, 3))


def test_an_error_of_the_thread_comes_with_its_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "sample_digests", lambda batch: 1 // len(batch[7:]))
    chunks = SampleStream([X], 21).chunks(14, ahead=True)  # the second has seven samples
    assert next(chunks) is not None
    with pytest.raises(ZeroDivisionError):
        next(chunks)


def test_moving_converts_floating_point_alone() -> None:
    moved = moved_to({"x": X, "y": Y}, torch.device("cpu"), torch.float64)
    assert moved["x"].dtype == torch.float64
    assert moved["y"].dtype == torch.int64
    assert torch.equal(moved["x"].float(), X)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ahead_is_pinned_beside_a_gpu() -> None:
    (chunk,) = SampleStream(listed(), 21).chunks(21, ahead=True)
    assert chunk is not None
    assert all(part.is_pinned() for part in chunk.batch)
    moved = moved_to(chunk.batch, torch.device("cuda"), torch.float32)
    assert torch.equal(moved[0].cpu(), X)
