"""Finished chunks of a profile on disk, so that a run killed at any moment resumes to the same bits.

Each chunk of samples is one file with its :class:`Sums`, named by its sample range, written whole or not at all. Sums of
chunks are added in sample order by whoever finishes, so it does not matter how often, or by how many processes, a run was
carried on.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import CladoError, require
from .estimators import Sums
from .files import atomic_file

FOLDER = "chunks"
_TENSORS = tuple(f.name for f in fields(Sums) if f.name != "samples")


class Chunks:
    """The chunk files of one run directory; with ``folder=None`` nothing is kept."""

    def __init__(self, output_dir: str | os.PathLike[str] | None, fingerprint: dict[str, str]) -> None:
        self.folder = None if output_dir is None else Path(output_dir) / FOLDER
        self.fingerprint = fingerprint
        if self.folder is not None and self.folder.exists():
            self._refuse_foreign()

    def load(self, first: int) -> Sums | None:
        """The finished chunk that starts at sample ``first``, None where there is none."""
        if self.folder is None:
            return None
        for path in sorted(self.folder.glob(f"{first:09d}-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                return Sums(**{name: file.get_tensor(name) for name in _TENSORS}, samples=_range(path)[1] - first)
        return None

    def save(self, first: int, sums: Sums) -> None:
        """Keep a finished chunk.

        Raises:
            CladoError: the disk is full; what was kept before stays.
        """
        if self.folder is None:
            return
        path = self.folder / f"{first:09d}-{first + sums.samples:09d}.safetensors"
        try:
            with atomic_file(path) as temporary:
                tensors = {name: getattr(sums, name).contiguous() for name in _TENSORS}
                save_file(tensors, temporary, metadata={"clado.chunk": json.dumps(self.fingerprint)})
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
                raise CladoError(
                    f"profile: output_dir must have space left, got a full disk at {self.folder}; "
                    "finished chunks are kept, run the same call again to go on"
                ) from None
            raise

    def clear(self) -> None:
        """Remove the chunks of a finished run."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _refuse_foreign(self) -> None:
        assert self.folder is not None
        for path in sorted(self.folder.glob("*.safetensors"))[:1]:
            try:
                with safe_open(path, framework="pt") as file:
                    known = json.loads((file.metadata() or {}).get("clado.chunk", "{}"))
            except (SafetensorError, OSError, json.JSONDecodeError):
                raise CladoError(f"profile: output_dir must hold whole chunk files, got a damaged {path}") from None
            refuse_other_run(known, self.fingerprint, self.folder.parent)


def refuse_other_run(known: dict[str, str], wanted: dict[str, str], place: Path) -> None:
    """Raise when two fingerprints differ, naming the items that do."""
    different = [item for item, value in wanted.items() if known.get(item) != value]
    require(
        not different,
        "profile",
        "output_dir",
        "be new or hold the same run",
        f"{place}, whose {' and '.join(different)} differ",
    )


def _range(path: Path) -> tuple[int, int]:
    first, last = path.stem.split("-")
    return int(first), int(last)
