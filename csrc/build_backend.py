"""The build backend: scikit-build-core, and NVIDIA's compiler from PyPI where CUDA kernels are wanted and nvcc is missing.

``CLADO_CUDA=AUTO`` wants them where there is a GPU, ``ON`` always, ``OFF`` never. The compiler is installed into the build
environment alone and goes with it. ``python csrc/build_backend.py`` says what a build would do.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OLDEST, NEWEST = (
    (13, 0),
    (13, 0),
)  # CUDA releases to fetch: PyPI has no whole compiler before; the newest that was tried
# What nvcc calls, in its own release: left to themselves they would come in the newest.
PACKAGES = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-cccl", "nvidia-cuda-runtime")
MEGABYTES = 105  # of downloads


def wanted(settings: Mapping[str, Any] | None = None) -> str:
    """AUTO, ON or OFF, as the call, ``CMAKE_ARGS`` or the environment has it."""
    given = (settings or {}).get("cmake.define.CLADO_CUDA")
    defined = re.findall(r"-DCLADO_CUDA(?::\w+)?=(\w+)", os.environ.get("CMAKE_ARGS", ""))
    return str(given or (defined[-1] if defined else os.environ.get("CLADO_CUDA", "AUTO"))).upper()


def driver() -> tuple[int, int] | None:
    """The CUDA release that the driver runs at most; None where no GPU is."""
    if shutil.which("nvidia-smi") is None:
        return None
    found = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
    release = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", found.stdout)
    return (int(release[1]), int(release[2])) if found.returncode == 0 and release else None


def compiler_there() -> bool:
    """Whether CMake finds nvcc by itself."""
    return bool(os.environ.get("CUDACXX")) or shutil.which("nvcc") is not None


def to_fetch(settings: Mapping[str, Any] | None = None) -> tuple[list[str], str]:
    """Requirements for the build environment, and why these."""
    choice = wanted(settings)
    if choice == "OFF":
        return [], "no CUDA kernels: CLADO_CUDA=OFF"
    if compiler_there():
        return [], f"CUDA kernels by {os.environ.get('CUDACXX') or shutil.which('nvcc')}"
    runs = driver()
    if choice == "AUTO" and runs is None:
        return [], "no CUDA kernels: there is no GPU, nor nvcc (CLADO_CUDA=ON fetches it from PyPI)"
    if runs is not None and runs < OLDEST:
        return [], (
            f"no CUDA kernels: the driver runs CUDA {runs[0]}.{runs[1]}, and PyPI has nvcc from {OLDEST[0]}.{OLDEST[1]} on; "
            "install the CUDA toolkit, or a newer driver"
        )
    major, minor = min(runs or NEWEST, NEWEST)
    why = f"CUDA kernels by nvcc {major}.{minor} from PyPI (about {MEGABYTES} MB, into the build environment alone)"
    return [f"{name}=={major}.{minor}.*" for name in PACKAGES], why


def fetched() -> str | None:
    """The nvcc of the build environment."""
    found = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (found.submodule_search_locations or [])] if found is not None else []
    compilers = [path for folder in folders for path in sorted(folder.glob("cu*/bin/nvcc"))]
    return str(compilers[-1]) if compilers else None


def _with_compiler(settings: Mapping[str, Any] | None) -> None:
    """What the build runs under: CMake reads CUDACXX."""
    found = fetched()
    if wanted(settings) != "OFF" and not compiler_there() and found is not None:
        os.environ["CUDACXX"] = found
        os.environ.setdefault("LIBRARY_PATH", str(Path(found).parents[1] / "lib"))


if __name__ == "__main__":
    print(f"clado: {to_fetch()[1]}")
else:
    from scikit_build_core import build as _build
    from scikit_build_core.build import *  # noqa: F403

    def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
        return [*_build.get_requires_for_build_wheel(config_settings), *_said(config_settings)]

    def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
        return [*_build.get_requires_for_build_editable(config_settings), *_said(config_settings)]

    def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
        _with_compiler(config_settings)
        return _build.build_wheel(wheel_directory, config_settings, metadata_directory)

    def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
        _with_compiler(config_settings)
        return _build.build_editable(wheel_directory, config_settings, metadata_directory)

    def _said(settings: Mapping[str, Any] | None) -> list[str]:
        packages, why = to_fetch(settings)
        print(f"clado: {why}", file=sys.stderr)
        return packages
