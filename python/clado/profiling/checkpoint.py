"""The running sums of a profile on disk, so that a run killed at any moment goes on to the same bits.

One file holds the sums over all finished chunks, the digest of every sample in them and the settings in clear. It is replaced
as a whole after every chunk, so its size does not grow, and it stays when the run is finished: with more samples the same
run goes on from there.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from ..artifacts import MATRIX_FILE, save_held
from ..common import CladoError, atomic_file, locked, read_safetensors, require
from ..quant import Rounded
from .groups import Groups
from .sums import TENSORS, Sums

PROGRESS_FILE = "progress.safetensors"
SCHEMA = 1


class Checkpoint:
    """Sums of finished chunks in sample order; with ``output_dir=None`` nothing is written.

    Chunks are added in order, so the sums are the same left fold however often a run was interrupted.

    Args:
        output_dir: the run directory.
        settings: JSON values by name that decide the result; a directory whose values differ is refused.
        size: samples of a whole chunk. Only whole chunks are written: a shorter one ends the set, and with more samples it is
            measured again as a whole one.
        candidates: V.
        grouped: keep sums over groups of chunks too; a directory that has some goes on with them in any case.

    Attributes:
        total: sums so far.
        digests: int64 ``[total.samples]``.
        pieces: (samples, perturbations) that advanced together on the writing rank: one pair, and another wherever that changed.
        expected: int64, digests of all samples the directory is known to hold, finished result included.
        held: weights that were rounded for the run, to be written before the first sums that were measured with them.
        groups: sums over groups of the whole chunks; None where they are not kept.
        checks: what was found of the plans after so many samples, as JSON values.

    Raises:
        CladoError: a directory of another run, or one whose samples are in no groups although they should be.
    """

    def __init__(
        self, output_dir: Path | None, settings: dict[str, Any], size: int, candidates: int, grouped: bool = False
    ) -> None:
        self.path = None if output_dir is None else output_dir / PROGRESS_FILE
        self.size = size
        self.settings = json.loads(json.dumps(settings))
        self.total = Sums.zeros(candidates)
        self.digests = torch.zeros(0, dtype=torch.int64)
        self.pieces: list[list[int]] = []
        self.held: Rounded | None = None
        self.groups = Groups(candidates) if grouped else None
        self.checks: list[dict[str, Any]] = []
        if self.path is not None and os.path.exists(self.path):
            header, self.total, self.digests, groups = _read(self.path)
            self.pieces, self.checks = header.get("pieces", []), header.get("checks", [])
            refuse_other_run(header["settings"], self.settings, self.path.parent)
            if groups is not None:
                self.groups = Groups.of(groups, len(self.digests) // size)
            bare = f"{len(self.digests)} samples of {self.path.parent} that were measured without it"
            known = groups is not None or len(self.digests) == 0 or not grouped
            require(known, "profile", "until_stable", "be given from a run's first sample on", bare)
        self.expected = self.digests

    def remove_leftovers(self) -> None:
        """Of a run that was killed while it wrote: for who holds the directory. Others may write weights, but not for an hour."""
        if self.path is not None:
            for left in self.path.parent.glob(".*.safetensors.*"):
                ours = left.name.startswith((f".{PROGRESS_FILE}.", f".{MATRIX_FILE}."))
                with suppress(OSError):
                    if ours or left.stat().st_mtime < time.time() - 3600:
                        left.unlink()

    def check(self, first: int, digests: Tensor) -> None:
        """Raise unless the samples from ``first`` on are those that the directory holds there, as far as it goes."""
        known = self.expected[first : first + len(digests)]
        different = (known != digests[: len(known)]).nonzero()
        if len(different) > 0:
            self.require_same(False, f"data differ from sample {first + int(different[0])} on")

    def check_end(self, seen: int) -> None:
        """Raise when the data ended before the samples that the directory holds."""
        short = f"{len(self.expected)} samples are more than the {seen} asked for or at hand now"
        self.require_same(seen >= len(self.expected), short)

    def require_same(self, same: bool, reason: str) -> None:
        place = None if self.path is None else self.path.parent
        require(same, "profile", "output_dir", "be new or hold the same run", f"{place}, whose {reason}")

    def add(self, part: Sums, digests: Tensor) -> None:
        """Add the next chunk and keep it.

        Raises:
            CladoError: the disk is full; what was kept before stays.
        """
        whole = part.samples == self.size
        if self.path is not None and not whole and not os.path.exists(self.path):
            self._write(self.path)  # the settings, for whoever comes with others
        self.total += part
        if self.groups is not None and whole:
            self.groups.add(part)
        self.digests = torch.cat([self.digests, digests])
        if self.path is not None and whole:
            self._write(self.path)

    def _write(self, path: Path) -> None:
        tensors = {name: getattr(self.total, name).clone(memory_format=torch.contiguous_format) for name in TENSORS} | {
            "digests": self.digests
        }
        header = {"schema": SCHEMA, "settings": self.settings, "pieces": self.pieces}
        if self.groups is not None:
            tensors["groups"] = self.groups.begun
            header["checks"] = self.checks
        with writing(path.parent):
            save_held(self.held, path.parent)
            with atomic_file(path) as temporary:
                temporary.write_bytes(save(tensors, {"clado.progress": json.dumps(header)}))


def check_writable(folder: Path) -> None:
    """Raise where a run directory cannot be made, before anything is measured; nothing is made yet."""
    place = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    usable = os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)
    why = "may not be written to" if os.path.isdir(place) else "is a file"
    require(usable, "profile", "output_dir", "be a folder that can be written", f"{folder} ({place} {why})")


@contextmanager
def alone(folder: Path | None, op: str) -> Iterator[None]:
    """Hold a run directory while it is measured into; None: nothing.

    Raises:
        CladoError: it cannot be written, or another process writes to it.
    """
    if folder is not None:
        check_writable(folder)
    with locked(folder, op):
        yield


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """One line where a file of a run directory cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _disk_error(error, place) from None


def _disk_error(error: Exception, place: Path) -> CladoError:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    must, got = (
        ("have space left", "a full disk") if full else ("be writable", getattr(error, "strerror", None) or str(error))
    )
    return CladoError(
        f"profile: output_dir must {must}, got {got} at {place}; finished chunks are kept, run the same call again to go on"
    )


def refuse_other_run(known: dict[str, Any], wanted: dict[str, Any], place: Path) -> None:
    """Raise when settings differ, naming those that do with both values."""
    known, wanted = _flat(known), _flat(wanted)
    different = [item for item in {**known, **wanted} if known.get(item) != wanted.get(item)]
    shown = [f"{item} differ ({_short(known.get(item))} there, {_short(wanted.get(item))} here)" for item in different]
    require(
        not different, "profile", "output_dir", "be new or hold the same run", f"{place}, whose {' and '.join(shown)}"
    )


def recorded(output_dir: Path | None) -> dict[str, Any]:
    """Settings of the run that the directory holds, empty without one: what is not asked for stays as it was there."""
    there = output_dir is not None and os.path.exists(output_dir / PROGRESS_FILE)
    return read_progress(output_dir / PROGRESS_FILE)[0]["settings"] if output_dir is not None and there else {}


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by one name each: ``quantizer.group_size`` beside ``bits``."""
    parts = [
        {f"{name}.{key}": v for key, v in value.items()} for name, value in settings.items() if isinstance(value, dict)
    ]
    flat = {name: value for name, value in settings.items() if not isinstance(value, dict)}
    return {name: value for part in (flat, *parts) for name, value in part.items()}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else text[:10] + "…"


def read_progress(path: Path) -> tuple[dict[str, Any], Sums, Tensor]:
    """(header with the settings, sums, sample digests) of a checkpoint file.

    Raises:
        CladoError: a damaged or foreign file.
    """
    return _read(path)[:3]


def _read(path: Path) -> tuple[dict[str, Any], Sums, Tensor, Tensor | None]:
    """As :func:`read_progress`, and the sums over groups where there are some."""
    try:
        metadata, held = read_safetensors(path)
        header = json.loads(metadata.get("clado.progress", "{}"))
        require(header.get("schema") == SCHEMA, "profile", f"schema of {path}", f"be {SCHEMA}", header.get("schema"))
        tensors = {name: held[name] for name in (*TENSORS, "digests")}
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise CladoError(
            f"profile: output_dir must hold a whole {PROGRESS_FILE}, got a damaged {path} ({error}); "
            "without it the run starts anew"
        ) from None
    digests = tensors.pop("digests")
    return header, Sums(**tensors, samples=len(digests)), digests, held.get("groups")
