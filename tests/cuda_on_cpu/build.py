"""Compiles csrc/*.cu with a C++ compiler against cuda_on_cpu.h, together with the bindings: every CUDA kernel without a GPU.

    python tests/cuda_on_cpu/build.py [--sanitize]     prints the path of the module

The result lies in build/cuda_on_cpu/<digest of all sources>/ and is made once. Needs a C++ compiler and pybind11, no CUDA.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
STEMS = sorted(p.parent.name for p in ROOT.glob("csrc/*/*_cuda.cu"))
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-Wall",
]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]


def translate(source: str) -> str:
    """CUDA's two syntaxes as C++, line for line: launches and shared variables."""
    source = re.sub(r"__shared__\s+([^;]+);", _share, source)
    while (start := source.find("<<<")) >= 0:
        name = re.search(r"([\w:]+(?:<[^<>]*>)?)(\s*)$", source[:start])
        end = source.index(">>>", start)
        opening = source.index("(", end)
        if name is None or source[end + 3 : opening].strip():
            raise ValueError(f"a launch is not understood: {source[start - 40 : end + 10]!r}")
        call = f"{name[2]}cuda_on_cpu::configure({source[start + 3 : end]})"
        call += f'.run("{name[1]}", [](auto... a) {{ {name[1]}(a...); }}, '
        source = source[: name.start()] + call + source[opening + 1 :]
    return source


def _share(declaration: re.Match[str]) -> str:
    names = re.findall(r"(\w+)\s*(?:\[[^\]]*\]\s*)*(?:,|$)", re.sub(r"<[^<>]*>", "", declaration[1]))
    return f"static {declaration[1]}; cuda_on_cpu::share({', '.join(names)});"


def compiler() -> str:
    return os.environ.get("CXX", "c++")


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def translated(source: Path, to: Path, before: str = "") -> Path:
    """A CUDA source or header as C++; the compiler still names its own lines."""
    to.parent.mkdir(exist_ok=True)
    to.write_text(f'{before}#line 1 "{source}"\n{translate(source.read_text())}')
    return to


def compiled(folder: Path, name: str, source: Path, flags: list[str]) -> str:
    """The object file of a C++ or CUDA source."""
    if source.suffix == ".cu":
        source = translated(source, folder / f"{name}.cpp", '#include "cuda_on_cpu.h"\n')
    run([compiler(), *flags, "-c", str(source), "-o", str(folder / f"{name}.o")])
    return str(folder / f"{name}.o")


def build(sanitize: bool = False) -> Path:
    """Path of the module ``cuda_on_cpu`` with ``<name>_cuda`` for every op, on addresses of host memory."""
    import pybind11

    kernels = {f"{s}_cuda": ROOT / "csrc" / s / f"{s}_cuda.cu" for s in STEMS}
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    link = ["-shared", "-Wl,-z,lazy"]
    return linked(
        f"cuda_on_cpu{sysconfig.get_config_var('EXT_SUFFIX')}",
        {"module": HERE / "module.cpp", **kernels},
        includes,
        link,
        sanitize,
    )


def build_broken() -> Path:
    """Path of the sanitized program of kernels with mistakes."""
    return linked("broken", {"broken": HERE / "broken.cu"}, [], [], sanitize=True)


def linked(name: str, sources: dict[str, Path], includes: list[str], link: list[str], sanitize: bool) -> Path:
    """``name``, compiled and linked unless that was done before from the same sources."""
    flags = [*FLAGS, *(SANITIZE if sanitize else []), "-DCLADO_WITH_CUDA"]
    read = [*sorted(ROOT.glob("csrc/**/*.*")), *sorted(ROOT.glob("clado_ext/bindings/*")), *sorted(HERE.glob("*.*"))]
    seen = [name, sys.version, compiler(), *flags, *(p.read_text() for p in read)]
    folder = ROOT / "build" / "cuda_on_cpu" / hashlib.sha256("\0".join(seen).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several test processes builds, the others wait
        if not (folder / name).exists():
            for name_of_cuda in ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h"):
                (folder / name_of_cuda).write_text("")  # cuda_on_cpu.h is all of them
            for header in ROOT.glob("csrc/common/*.cuh"):
                translated(header, folder / "common" / header.name, "#pragma once\n")
            places = (HERE, folder, ROOT / "csrc", ROOT / "clado_ext" / "bindings", *includes)
            flags += [f"-I{place}" for place in places]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda item: compiled(folder, *item, flags), sources.items()))
            run([compiler(), *flags, *objects, *link, "-o", str(folder / "made")])
            (folder / "made").rename(folder / name)
    return folder / name


def load(path: Path) -> ModuleType:
    """A native module by its path, bound lazily: the CPU halves of the bindings have no kernels in ``cuda_on_cpu``."""
    before = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        spec = importlib.util.spec_from_file_location(path.name.split(".")[0], path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.setdlopenflags(before)
    return module


class AsNative:
    """The native module's CPU functions by the CUDA kernels: ``fake_quant_cpu(…, threads)`` runs ``fake_quant_cuda``."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        stem = name.removesuffix("_cpu")
        kernel = getattr(self.module, f"{stem}_cuda")

        def run(*args: Any) -> bool:
            rooms = [np.full(n, 0xFF, np.uint8) for n in self._workspaces(stem, args)]  # NaN
            kernel(*args[:-1], *(room.ctypes.data for room in rooms), 0, 0)
            return True

        return run

    def _workspaces(self, stem: str, args: tuple[Any, ...]) -> list[int]:
        """Bytes of each, as the torch op asks for them."""
        if stem in ("pairwise_bce", "pairwise_ce"):
            return [int(getattr(self.module, f"{stem}_workspace")(args[0], args[1][2]))]
        if stem == "pairwise_mse":
            return [int(self.module.pairwise_mse_workspace(args[0]))]
        if stem == "compensate":
            return [int(self.module.compensate_workspace(*args[0][2:4], len(args[1])))]
        if stem == "scale_errors":
            (_, _, rows, columns, _, group), (_, count, *_) = args[:2]
            return [int(self.module.scale_errors_workspace(rows, columns, group, count))]
        if stem == "scale_search":
            weight, targets, steps = args[:3]
            return [max(self._search_workspace(weight, target[1], len(targets), steps) for target in targets)]
        if stem == "fake_quant":
            return [self._errors_workspace(*args[:2])]
        if stem == "quantize_weight":
            weight, bits, steps = args[:3]
            search = self._search_workspace(weight, weight[5], len(bits), steps)
            return [search, self._errors_workspace(weight, bits)]
        return []

    def _search_workspace(self, weight: tuple[int, ...], group: int, targets: int, steps: int) -> int:
        return int(self.module.scale_search_workspace(*weight[2:4], group, targets, steps))

    def _errors_workspace(self, weight: tuple[int, ...], formats: list[Any]) -> int:
        return int(self.module.fake_quant_workspace(*weight[2:4], len(formats)))


if __name__ == "__main__":
    print(build("--sanitize" in sys.argv[1:]))
