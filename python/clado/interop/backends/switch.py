"""``with clado.backend("modelopt"):`` another tool runs on our kernels inside the block."""

from __future__ import annotations

import importlib
import importlib.metadata
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...common import CladoError, require

if TYPE_CHECKING:
    from .patches import Part, Used


@dataclass
class _Tool:
    package: str  # on the package index
    file: str  # beside this one, with PARTS
    depth: int = 0  # blocks that are open
    stack: ExitStack = field(default_factory=ExitStack)
    used: Used | None = None

    def parts(self) -> Sequence[Part]:
        parts: Sequence[Part] = importlib.import_module(f".{self.file}", __package__).PARTS
        return parts


BACKENDS = {
    "brevitas": _Tool("brevitas", "brevitas_kernels"),
    "modelopt": _Tool("nvidia-modelopt", "modelopt_kernels"),
}
_LOCK = threading.RLock()


@contextmanager
def backend(tool: str) -> Iterator[Used]:
    """Let another quantization tool run on our kernels inside a ``with`` block: its calls, its results, less time.

    ``"modelopt"`` (NVIDIA ModelOpt 0.47): inside ``mtq.quantize`` and ``mtq.auto_quantize``, the search for scales by squared
    error (``algorithm="mse"``); inside ``auto_quantize`` also the forwards of that calibration, left out where no quantizer looks
    at activations (batches are drawn all the same), and those of ``method="kl_div"``, which start where the perturbed layer is.
    ``"brevitas"`` (0.13): the search for scales of weights by squared error (``Int8WeightPerChannelFloatMSE`` and its kin).
    Grids, tie rules and choices stay the tool's; where two scales come within 1e-4 of the same error, its own arithmetic decides.

    Functions inside the tool are replaced for the whole process, all threads, until the outermost block of that tool ends, also
    by an error. What a replacement does not cover (other formats, devices, dtypes) runs as the tool has it and is counted.

    Args:
        tool: a name of ``clado.interop.BACKENDS``.

    Yields:
        What ran on our kernels and what did not, filled while the block runs; ``print`` it.

    Raises:
        CladoError: an unknown tool, one that is not installed, or a version that lacks what is replaced. Nothing is changed then.
    """
    require(tool in BACKENDS, "backend", "tool", f"be one of {', '.join(BACKENDS)}", repr(tool))
    own = BACKENDS[tool]
    with _LOCK:
        if own.depth == 0:
            own.stack, own.used = _start(tool, own)
        own.depth += 1
        used = own.used
    assert used is not None
    try:
        yield used
    finally:
        with _LOCK:
            own.depth -= 1
            if own.depth == 0:
                own.stack.close()


def _start(tool: str, own: _Tool) -> tuple[ExitStack, Used]:
    from .patches import Used, put_in

    try:
        version = importlib.metadata.version(own.package)
    except importlib.metadata.PackageNotFoundError:
        raise CladoError(f"backend: {own.package} must be installed, got no such package") from None
    used = Used()
    return put_in(own.package, version, own.parts(), used), used
