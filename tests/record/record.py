"""The record on disk, and the comparison with it.

    python -m tests.record.record           # compares, prints every difference, exits with 1 where there is one
    python -m tests.record.record --write   # writes the record anew, where results are meant to change

On the machine that wrote it (:func:`machine`) everything must be the same bits. Elsewhere codes, scales and bytes still must,
and floats are close: matrix products are summed in another order there.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

import clado_ext

from .cases import CASES, Found, found

HERE = Path(__file__).parent
ARRAYS, REST = HERE / "record.safetensors", HERE / "record.json"
PACKAGES = ("torch", "numpy", "scipy", "pyscipopt", "timm", "onnxscript", "onnx-ir")


def machine() -> dict[str, Any]:
    """Everything that decides in which order floats are summed."""
    known = {}
    for package in PACKAGES:
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            known[package] = "none"
    return {
        "cpu": _cpu(),
        "simd": clado_ext.simd_level(),
        "torch_simd": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        **known,
    }


def _cpu() -> str:
    """Model and vector instructions; virtual machines often name the model vaguely."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    names = [known.get(key, "") for key in ("model name", "cpu family", "model")]
    vector = [flag for flag in known.get("flags", "").split() if flag.startswith(("avx", "amx", "fma"))]
    return " ".join([*names, *sorted(vector)])


def write(results: dict[str, Found]) -> None:
    rest = {name: {"exact": item.exact, "local": item.local} for name, item in results.items()}
    arrays = {
        f"{name}/{key}": np.ascontiguousarray(v) for name, item in results.items() for key, v in item.floats.items()
    }
    save_file(arrays, ARRAYS)
    REST.write_text(json.dumps({"machine": machine(), "cases": rest}, separators=(",", ":"), indent=0) + "\n")


def read() -> tuple[dict[str, Any], dict[str, Found]]:
    """The machine of the record, and its cases."""
    held, arrays = json.loads(REST.read_text()), load_file(ARRAYS)
    cases = {name: Found(item["exact"], item["local"]) for name, item in held["cases"].items()}
    for key, value in arrays.items():
        name, _, entry = key.partition("/")
        cases[name].floats[entry] = value
    return held["machine"], cases


def differences(recorded: Found, now: Found, same_machine: bool) -> list[str]:
    """What is not as recorded, one line each."""
    told = _different("exact", recorded.exact, now.exact)
    if same_machine:
        told += _different("local", recorded.local, now.local)
    shared = recorded.floats.keys() & now.floats.keys()
    told += [f"{name}: in one of both only" for name in sorted(recorded.floats.keys() ^ now.floats.keys())]
    for name in sorted(shared):
        before, after = recorded.floats[name], now.floats[name]
        if before.shape != after.shape or before.dtype != after.dtype:
            told.append(f"{name}: {before.dtype} {before.shape} became {after.dtype} {after.shape}")
            continue
        if before.tobytes() == after.tobytes():
            continue
        finite = np.isfinite(before)
        unknown = (
            not np.array_equal(before[~finite], after[~finite], equal_nan=True) or not np.isfinite(after[finite]).all()
        )
        off, scale = (np.abs(x).max(initial=0.0) for x in (after[finite] - before[finite], before[finite]))
        if same_machine or unknown or off > now.tolerance * scale:
            told.append(f"{name}: off by {off:.3g} of {scale:.3g} at most" + ", not finite in one of both" * unknown)
    return told


def _different(kind: str, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    after = json.loads(json.dumps(after))
    keys = sorted(before.keys() | after.keys())
    rows = [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]
    return [f"{kind} {key}: {_short(old)} became {_short(new)}" for key, old, new in rows]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 200 else f"{text[:200]}…"


def main() -> int:
    started, results = time.perf_counter(), {}
    for name in CASES:
        begun = time.perf_counter()
        results[name] = found(name)
        print(f"{time.perf_counter() - begun:6.2f} s  {name}", flush=True)
    print(f"{time.perf_counter() - started:6.1f} s  {len(results)} cases")
    if "--write" in sys.argv[1:]:
        write(results)
        print(f"{(ARRAYS.stat().st_size + REST.stat().st_size) / 2**20:.2f} MiB written")
        return 0
    where, recorded = read()
    print("same machine: to the bit" if where == machine() else "another machine: floats within their tolerances")
    told = [f"{name}: in one of both only" for name in recorded.keys() ^ results.keys()]
    for name in recorded.keys() & results.keys():
        told += [f"{name}: {line}" for line in differences(recorded[name], results[name], where == machine())]
    print("\n".join(sorted(told)) or "nothing differs")
    return int(bool(told))


if __name__ == "__main__":
    sys.exit(main())
