"""The one exception for input a user can mend; the command line prints it as a single line and exits with 2."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class CladoError(ValueError):
    """Bad input, said in one line: ``op: argument must …, got …``."""


class FileError(CladoError, OSError):
    """What the file system refuses, in one line: ``file: path must …, got …``. It is the system's error too."""

    def __init__(self, path: Path, must: str, error: BaseException) -> None:
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
        self.line = f"file: {path} must {must}, got {reason}"
        super().__init__(self.line)
        self.errno, self.strerror = getattr(error, "errno", None), reason
        self.filename = getattr(error, "filename", None) or str(path)

    def __str__(self) -> str:
        return self.line


def require(condition: bool, op: str, argument: str, must: str, got: object) -> None:
    """Raise :class:`CladoError` ``"op: argument must …, got …"`` unless ``condition`` holds."""
    if not condition:
        raise CladoError(f"{op}: {argument} must {must}, got {got}")


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    text = str(error)
    known = "not enough memory" in text or "out of memory" in text or type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and known)


def said(error: BaseException) -> str:
    """Type, first line and place of an exception that a user's code raised."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _library(frame.filename)]
    return f"{type(error).__name__}: {line}" + (f" at {_shown(frames[-1])}" if frames else "")


@contextmanager
def users_code(line: str) -> Iterator[None]:
    """What a user's code raises inside becomes one line: ``line``, what it said, and where. Ours and lack of memory pass."""
    try:
        yield
    except Exception as error:  # whatever it may be
        if isinstance(error, CladoError) or is_out_of_memory(error):
            raise
        raise CladoError(f"{line}, got {said(error)}") from error


def here() -> str:
    """The innermost line on the stack that is neither torch's nor ours."""
    return _shown([frame for frame in traceback.extract_stack() if not _library(frame.filename)][-1])


def _shown(frame: traceback.FrameSummary) -> str:
    return f"{Path(frame.filename).name}:{frame.lineno}" + (f" ({frame.line})" if frame.line else "")


def _library(path: str) -> bool:
    return "torch" in Path(path).parts or Path(path).is_relative_to(Path(__file__).parent.parent)
