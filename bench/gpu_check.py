"""One command on a machine with a GPU (``make gpu-check``): build, test, sanitize and time the CUDA kernels.

Needs no network: the Python that runs this must hold torch, pybind11, pytest, hypothesis, rich, cmake and ninja, and nvcc must be
in reach; the step ``profile`` needs timm too. A missing GPU is a failure, not a skip. The outcome goes to
``bench/results/<device>/`` as ``gpu_check.json``, ``ops.json`` and ``profile_*.json``, written anew after every step, so that a
step that fails or a machine that goes away loses nothing; only from there come claims about a GPU.

    python bench/gpu_check.py                                              everything
    python bench/gpu_check.py --only build tests --minutes 9 --out results     a part, on a machine lent by the minute
    python bench/gpu_check.py --only bench --ops fake_quant bitpack            results of the other parts are kept
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("pybind11", "pytest", "hypothesis", "rich")
STEPS = ("build", "tests", "bench", "profile", "memcheck", "racecheck", "synccheck", "large")
OPS = (*sorted(p.parent.name for p in ROOT.glob("csrc/*/*_cuda.cu")), "overhead")
# Model, estimator and precision of what the step profile times, on 1,024 samples.
PROFILES = {
    f"{model}_{estimator}_{precision}": [
        "--model",
        f"{model}_patch16_224",
        "--estimators",
        estimator,
        "--precision",
        precision,
    ]
    for model, estimator, precision in (
        ("vit_base", "logit", "float32"),
        ("vit_base", "logit", "bfloat16"),
        ("vit_large", "logit", "bfloat16"),
        ("vit_base", "exact", "tf32"),
    )
}
TAIL = 60  # lines of output that are kept of a step that did not pass


@dataclass
class Outcome:
    """Of one step: passed, FAILED or TIMED OUT; the last lines of its output where it did not pass."""

    step: str
    result: str = "passed"
    seconds: float = 0.0
    output: list[str] = field(default_factory=list)


def tool(name: str) -> str:
    """A program beside this Python, on the path or of the CUDA toolkit."""
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    places = [str(Path(sys.executable).parent), os.environ["PATH"], str(cuda), str(cuda.parent / "compute-sanitizer")]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise FileNotFoundError(f"{name} was not found beside {sys.executable}, on the path or in {cuda}")
    return found


def fail(why: str) -> None:
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


def build_lines() -> list[list[str]]:
    import pybind11
    import torch

    cmake, build = tool("cmake"), str(ROOT / "build" / "gpu-check")
    major, minor = torch.cuda.get_device_capability()
    settings = {
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "CMAKE_CUDA_COMPILER": tool("nvcc"),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "CLADO_CUDA": "ON",
        "CLADO_CUDA_ARCHS": f"{major}{minor}-real",
    }
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    return [
        [cmake, "-S", ".", "-B", build, "-G", "Ninja", *defines],
        [cmake, "--build", build],
        [cmake, "--install", build, "--prefix", "."],
    ]


def lines(step: str) -> list[list[str]]:
    """The commands of a step; FileNotFoundError where a program is missing."""
    test = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if step == "build":
        return build_lines()
    if step == "tests":
        workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
        # What runs CUDA kernels on the CPU needs no GPU.
        whole = ["tests/test_layout.py", "tests/profiling/test_devices.py", "tests/profiling/test_samples.py"]
        return [[*test, *workers, "tests/ops", *whole, "--ignore", "tests/ops/test_cuda_on_cpu.py"]]
    if step == "large":
        return [[*test, "-m", "large", "-k", "cuda", "tests/ops/test_dispatch.py"]]
    # A graph cannot be captured without the caching allocator, which would hide an access beyond a tensor from memcheck.
    small = [*test, "tests/ops/test_gpu.py", *(["-k", "not graph"] if step == "memcheck" else [])]
    sanitizer = [tool("compute-sanitizer"), "--error-exitcode", "9", "--target-processes", "all", "--tool", step]
    return [[*sanitizer, "--kernel-name", "kns=clado", *small]]


def run(step: str, commands: list[list[str]], seconds: float) -> Outcome:
    """Runs commands until one fails or ``seconds`` have passed; their output is shown as it comes."""
    environment = {**os.environ, "CLADO_REQUIRE_GPU": "1", "PYTHONPATH": ".:python", "PYTHONUNBUFFERED": "1"}
    if step == "memcheck":
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    start, outcome, tail = time.perf_counter(), Outcome(step), deque[str](maxlen=TAIL)
    for command in commands:
        print(f"gpu-check: {step}: {' '.join(command)}", flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        late = threading.Event()

        def stop(process: subprocess.Popen[str] = process, late: threading.Event = late) -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(max(0.1, seconds - (time.perf_counter() - start)), stop)
        timer.start()
        with process:  # closes the pipe
            for line in process.stdout or ():
                print(line, end="", flush=True)
                tail.append(line.rstrip())
        code = process.returncode
        timer.cancel()
        if late.is_set() or code != 0:
            outcome.result = "TIMED OUT" if late.is_set() else "FAILED"
            break
    outcome.seconds = round(time.perf_counter() - start, 1)
    outcome.output = [] if outcome.result == "passed" else list(tail)
    return outcome


def attempt(step: str, seconds: float) -> Outcome:
    """The outcome of a step that needs nothing but its commands."""
    try:
        return run(step, lines(step), seconds)
    except (OSError, ImportError) as error:
        return Outcome(step, "FAILED", output=[str(error)])


def bench(op: str, folder: Path, seconds: float) -> Outcome:
    """One op timed in a process of its own, its rows put among those of the others."""
    part = ROOT / "build" / "gpu-check" / f"{op}.json"
    part.parent.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    outcome = run(
        "bench " + op, [[sys.executable, "-m", "bench", op, "--device", "cuda", "--json", str(part)]], seconds
    )
    if part.exists():
        new, path = json.loads(part.read_text()), folder / "ops.json"
        old = json.loads(path.read_text()) if path.exists() else {"rows": []}
        ours = {row["op"] for row in new["rows"]}
        rows = [row for row in old["rows"] if row["op"] not in ours] + new["rows"]
        path.write_text(json.dumps({**old, **new, "rows": rows}, indent=1) + "\n")
    return outcome


def profile(name: str, folder: Path, seconds: float) -> Outcome:
    """A whole profile timed beside the loops it replaces."""
    target = folder / f"profile_{name}.json"
    target.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.pipeline.bench_profile", "--device", "cuda", "--samples", "1024"]
    command += [*PROFILES[name], "--pairs", "24", "--rounds", "1", "--json", str(target)]
    return run("profile " + name, [command], seconds)


def machine() -> dict[str, Any]:
    sys.path[:0] = [str(ROOT), str(ROOT / "python")]
    from bench.harness import machine

    return machine("cuda")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, help="steps to run (default: all)")
    parser.add_argument("--skip", nargs="+", choices=STEPS, default=[], help="steps to leave out")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, help="what the step bench times (default: all)")
    every = tuple(PROFILES)
    parser.add_argument("--profiles", nargs="+", choices=every, default=every, help="what the step profile times")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after as many in all; what is done is kept")
    parser.add_argument("--out", type=Path, help="folder for the results (default: bench/results/<device>)")
    options = parser.parse_args(arguments)
    end = time.perf_counter() + 60 * options.minutes
    name = device()
    folder = options.out or ROOT / "bench" / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    path, about = folder / "gpu_check.json", machine()
    before = json.loads(path.read_text())["steps"] if path.exists() else []
    done: dict[str, dict[str, Any]] = {row["step"]: row for row in before}
    now = []
    wanted = [step for step in STEPS if step in options.only and step not in options.skip]
    for step in wanted:
        for part in {"bench": options.ops, "profile": options.profiles}.get(step, [""]):
            left = end - time.perf_counter()
            timed = {"bench": bench, "profile": profile}.get(step)
            outcome = timed(part, folder, left) if timed else attempt(step, left)
            now.append(outcome)
            done[outcome.step] = asdict(outcome)
            path.write_text(json.dumps({"machine": about, "steps": list(done.values())}, indent=1) + "\n")
        if step == "build" and now[-1].result != "passed":
            break  # nothing else would test this tree
    for outcome in now:
        print(f"{outcome.step:30} {outcome.result:9} {outcome.seconds:8.1f} s")
    return int(any(outcome.result != "passed" for outcome in now))


if __name__ == "__main__":
    sys.exit(main())
