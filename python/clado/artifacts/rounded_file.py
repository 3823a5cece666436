"""Rounded weights as a file beside the matrix and the plans that were made with them, named by what it holds."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..common import CladoError, atomic_file, read_safetensors, require
from ..quant import Rounded, RoundedBy

SCHEMA = 1
_HEADER, _SAMPLES = "clado.rounded", "sample_digests"


@dataclass(frozen=True)
class RoundedFile:
    """Rounded weights that lie in a folder, read and checked when they are first asked for."""

    folder: Path
    by: RoundedBy

    @property
    def path(self) -> Path:
        return rounded_path(self.folder, self.by)

    @cached_property
    def rounded(self) -> Rounded:
        """What the file holds.

        Raises:
            CladoError: it is missing, damaged or another one.
        """
        must = f"hold the weights by {self.by.rounding} rounding that it was made with"
        require(self.path.is_file(), "load", "folder", must, f"no {self.path.name} in {self.folder}")
        found = read_rounded(self.path)
        require(found.by == self.by, "load", "rounded weights", f"be those of {self.path.name}", "others")
        return found


Held = Rounded | RoundedFile | None


def rounded_name(digest: str) -> str:
    """The file's name, by the digest of what it holds."""
    return f"rounded-{digest[:12]}.safetensors"


def rounded_path(folder: Path, by: RoundedBy) -> Path:
    return folder / rounded_name(by.digest)


def held_weights(held: Held, by: RoundedBy | None, what: str) -> Rounded | None:
    """The rounded weights of a plan or a matrix; None for nearest rounding.

    Raises:
        CladoError: they are not at hand.
    """
    if by is None:
        return None
    if held is None:
        raise CladoError(
            f"{what}: rounded weights must be at hand, got none; load the {what} from the folder that holds them"
        )
    return held if isinstance(held, Rounded) else held.rounded


def save_held(held: Held, folder: Path) -> Path | None:
    """Write rounded weights into a folder unless they are there; returns the file, None where there are none."""
    if held is None:
        return None
    path = rounded_path(folder, held.by)
    if not path.exists():
        _write(held if isinstance(held, Rounded) else held.rounded, path)
    return path


def _write(rounded: Rounded, path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in rounded.tensors.items()}
    header = {"schema": SCHEMA, **rounded.header()}
    with atomic_file(path) as temporary:
        save_file(tensors | {_SAMPLES: rounded.sample_digests}, temporary, {_HEADER: json.dumps(header)})


def read_rounded(path: Path) -> Rounded:
    """A file of rounded weights.

    Raises:
        CladoError: damaged, foreign or of another schema.
    """
    from safetensors import SafetensorError

    try:
        metadata, tensors = read_safetensors(path)
        header = json.loads(metadata.get(_HEADER, "null"))
        require(isinstance(header, dict), "load", "file", "hold rounded weights of clado", path)
        require(header.get("schema") == SCHEMA, "load", "schema", f"be {SCHEMA}", header.get("schema"))
        samples = tensors.pop(_SAMPLES)
        return Rounded.from_parts(header, tensors, samples)
    except CladoError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CladoError(f"load: file must hold whole rounded weights, got {path} ({reason})") from None


def discard(path: Path) -> None:
    """Remove a file of rounded weights that nothing refers to any more."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
