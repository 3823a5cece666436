"""One command on a machine with a GPU (``make gpu-check``): build, test, sanitize and time the CUDA kernels.

Needs no network: the Python that runs this must hold torch, pybind11, pytest, hypothesis, rich, cmake and ninja, and nvcc must be
in reach. A missing GPU is a failure, not a skip. The outcome goes to ``bench/results/<device>/`` as ``gpu_check.json`` and
``ops.json``; only from there come claims about a GPU.

    python bench/gpu_check.py [--skip build tests large memcheck racecheck bench]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("pybind11", "pytest", "hypothesis", "rich")
STEPS = ("build", "tests", "large", "memcheck", "racecheck", "bench")


def tool(name: str) -> str:
    """A program beside this Python, on the path or of the CUDA toolkit."""
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], str(cuda)]))
    return found or fail(f"{name} was not found beside {sys.executable}, on the path or in {cuda}")


def fail(why: str) -> str:
    print(f"gpu-check: {why}", file=sys.stderr)
    raise SystemExit(1)


def device() -> str:
    """Name of the GPU as a folder name; exit code 1 without one."""
    if importlib.util.find_spec("torch") is None:
        fail(f"{sys.executable} lacks torch")
    import torch

    if not torch.cuda.is_available():
        fail(f"torch {torch.__version__} sees no GPU")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        fail(f"{sys.executable} lacks {', '.join(missing)}")
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def commands(folder: Path) -> dict[str, list[list[str]]]:
    """What every step runs."""
    python = [sys.executable]
    cmake, build = tool("cmake"), ROOT / "build" / "gpu-check"
    pybind = subprocess.run(
        [*python, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    ).stdout
    settings = {
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "CMAKE_CUDA_COMPILER": tool("nvcc"),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind.strip(),
        "CLADO_CUDA": "ON",
        "CLADO_CUDA_ARCHS": "native",
        "CLADO_WERROR": "ON",
    }
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    small = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_gpu.py"]
    sanitizer = [tool("compute-sanitizer"), "--error-exitcode", "9", "--target-processes", "all"]
    return {
        "build": [
            [cmake, "-S", ".", "-B", str(build), "-G", "Ninja", *defines],
            [cmake, "--build", str(build)],
            [cmake, "--install", str(build), "--prefix", "."],
        ],
        "tests": [[*python, "-m", "pytest", "-q", "tests/ops", "tests/test_layout.py"]],
        "large": [[*python, "-m", "pytest", "-q", "-m", "large", "tests/ops"]],
        "memcheck": [[*sanitizer, "--tool", "memcheck", *small]],
        "racecheck": [[*sanitizer, "--tool", "racecheck", *small]],
        "bench": [[*python, "-m", "bench", "--device", "cuda", "--json", str(folder / "ops.json")]],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip", nargs="+", choices=STEPS, default=[], help="steps that are left out, and said to be")
    options = parser.parse_args()
    folder = ROOT / "bench" / "results" / device()
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "CLADO_REQUIRE_GPU": "1", "PYTHONPATH": ".:python"}
    outcome = []
    for step, lines in commands(folder).items():
        if step in options.skip:
            outcome.append({"step": step, "result": "left out", "seconds": 0.0})
            continue
        start, passed = time.perf_counter(), True
        # The caching allocator would hide an access beyond a tensor from memcheck.
        own = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if step == "memcheck" else environment
        for line in lines:
            print(f"gpu-check: {step}: {' '.join(line)}", flush=True)
            passed = passed and subprocess.run(line, cwd=ROOT, env=own, check=False).returncode == 0
        seconds = round(time.perf_counter() - start, 1)
        outcome.append({"step": step, "result": "passed" if passed else "FAILED", "seconds": seconds})
        if step == "build" and not passed:
            break  # nothing else would test this tree
    sys.path[:0] = [str(ROOT), str(ROOT / "python")]
    from bench.harness import machine

    (folder / "gpu_check.json").write_text(json.dumps({"machine": machine("cuda"), "steps": outcome}, indent=1) + "\n")
    for row in outcome:
        print(f"{row['step']:10} {row['result']:9} {row['seconds']:8.1f} s")
    return int(any(row["result"] == "FAILED" for row in outcome))


if __name__ == "__main__":
    sys.exit(main())
