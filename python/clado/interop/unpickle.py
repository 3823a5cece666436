"""Foreign pickles read as data: arrays and plain containers are built, other classes become inert records, no code runs."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common import CladoError, require

TORCH_ZIP_ENTRY = "data.pkl"


def existing(path: str | os.PathLike[str]) -> Path:
    source = Path(path)
    require(os.path.isfile(source), "import", "path", "be a file", source)
    return source


def load_restricted(source: Path) -> Any:
    """What a pickle, or the pickle in a torch file, holds in arrays and plain containers."""
    if not zipfile.is_zipfile(source):
        return Restricted(io.BytesIO(source.read_bytes()), {}).load()
    with zipfile.ZipFile(source) as archive:
        stored = [item for item in archive.infolist() if item.compress_type == zipfile.ZIP_STORED]
        parts = {item.filename.partition("/")[2]: archive.read(item) for item in stored}
    return Restricted(io.BytesIO(parts[TORCH_ZIP_ENTRY]), parts).load()


def load_inert(source: Path) -> Any:
    """What the pickle in a torch file holds; an object of any class becomes a :class:`Record`."""
    with zipfile.ZipFile(source) as archive:
        name = next(n for n in archive.namelist() if n.endswith("/" + TORCH_ZIP_ENTRY))
        return Inert(io.BytesIO(archive.read(name))).load()


# The unpickler written in Python: the one in C takes as much memory as a damaged file asks for.
class Restricted(pickle._Unpickler):
    """Builds arrays and plain containers; any other name in the pickle ends the import.

    numpy's own classes stay out of it: the state of a forged dtype makes them read memory that is not theirs.
    """

    def __init__(self, file: io.BytesIO, parts: Mapping[str, bytes]) -> None:
        super().__init__(file)
        self.parts = parts

    def find_class(self, module: str, name: str) -> Any:
        known = _plain(module, name) or _arrays(module, name)
        if known is None:
            raise CladoError(f"import: pickle must hold numpy arrays and plain containers only, got {module}.{name}")
        return known

    def persistent_load(self, pid: Any) -> Any:
        """The storage of a torch tensor: ("storage", dtype, key, device, elements)."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], Storage)):
            raise CladoError(
                "import: pickle must hold numpy arrays and plain containers only, got an outside reference"
            )
        return np.frombuffer(self.parts[f"data/{pid[2]}"], pid[1].dtype)


class Storage:
    """Stands for a torch storage class."""

    def __init__(self, kind: str) -> None:
        self.dtype = np.dtype(kind)


class Dtype:
    """Stands for a numpy dtype of numbers."""

    def __init__(self, kind: str, *_: Any) -> None:
        require(re.fullmatch("[fiu][1248]|b1", kind) is not None, "import", "array", "hold numbers", repr(kind))
        self.dtype = np.dtype(kind)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """Stands for a numpy array until its state is known."""

    value: NDArray[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: Any, dtype: Dtype, shape: Any, order: str = "C") -> NDArray[Any]:
    found: NDArray[Any] = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
    return found


def _tensor(
    storage: NDArray[Any], offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> NDArray[Any]:
    """A torch tensor as numpy, its bounds checked."""
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    inside = offset >= 0 and min((*size, *stride), default=1) >= 0 and last < len(storage)
    require(inside, "import", "tensor", "lie inside its storage", f"size {size}, stride {stride}")
    steps = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def value_of(held: Any) -> Any:
    """The array that something loaded stands for; anything else as it is."""
    return held.value if isinstance(held, Array) else held


class Record:
    """What stands for an object of a class that is not imported: its arguments and its state, nothing that runs."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {"state": state}


class Inert(pickle._Unpickler):
    """Builds plain containers; every other name becomes a :class:`Record`."""

    def find_class(self, module: str, name: str) -> Any:
        return _plain(module, name) or type(name, (Record,), {})

    def persistent_load(self, pid: Any) -> Any:
        return Record(pid)


def _plain(module: str, name: str) -> Any:
    names = {"dict": dict, "list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    if module in ("builtins", "__builtin__"):
        return names.get(name)
    return {"OrderedDict": OrderedDict, "defaultdict": defaultdict}.get(name) if module == "collections" else None


def _arrays(module: str, name: str) -> Any:
    """What the names in pickles of arrays and tensors become."""
    if (module, name) == ("_codecs", "encode"):  # how protocol 2 writes the bytes of an array
        return _latin1
    if module == "torch" and name.endswith("Storage"):
        kinds = {"Double": "f8", "Float": "f4", "Half": "f2", "Long": "i8", "Int": "i4"}
        kind = kinds.get(name.removesuffix("Storage"))
        return None if kind is None else Storage(kind)
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
        return _tensor
    if module == "numpy":
        return {"ndarray": Array, "dtype": Dtype}.get(name)
    cores = [f"numpy.{core}.{part}" for core in ("core", "_core") for part in ("multiarray", "numeric")]
    makers: dict[str, Any] = {
        "_reconstruct": lambda *_: Array(),
        "_frombuffer": _array,
        "scalar": lambda dtype, data: _array(data, dtype, ())[()],
    }
    return makers.get(name) if module in cores else None


def _latin1(text: str, encoding: str) -> bytes:
    require(encoding == "latin1", "import", "pickle", "hold arrays as numpy writes them", encoding)
    return text.encode("latin1")
