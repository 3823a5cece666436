"""The command that says what works on this machine, and what to install for what does not."""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Iterator

import click

from .base import main

# {extra: what it is for}; extras that only developers need are left out.
EXTRAS = {
    "plot": "figures and the report's charts",
    "quickstart": "clado quickstart",
    "data": "--data with datasets of Hugging Face",
    "hf": "--model hf:FOLDER",
    "onnx": "export --format onnx, and its verification",
    "modelopt": "clado.backend('modelopt'); ModelOpt's recipes and scores",
    "brevitas": "clado.backend('brevitas')",
    "tools": "compressed-tensors' verification; recipes for torchao and quanto; the two above",
}
_AGAIN = "pip install --force-reinstall --no-deps ."
SIMD = ("base", "AVX2", "AVX-512")
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)[^;]*;.*extra\s*==\s*['\"]([A-Za-z0-9_-]+)['\"]")


@main.command()
def doctor() -> None:
    """What works here: kernels, processor, GPU, versions, optional packages; and what to install for what is missing."""
    for line in report():
        click.echo(line)


def report() -> Iterator[str]:
    """One finding per line."""
    import torch

    yield f"clado {_version('clado')}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    try:
        import clado_ext
    except ImportError as error:
        yield f"kernels: the native module does not load ({error}); install again, in its folder: {_AGAIN}"
        return
    yield (
        f"kernels: {clado_ext.__version__}, for this processor by {SIMD[clado_ext.simd_level()]}, "
        f"{torch.get_num_threads()} threads (OMP_NUM_THREADS or torch.set_num_threads)"
    )
    yield from _gpu(clado_ext.has_cuda)
    for name in ("torch", "timm", "numpy", "scipy", "pyscipopt", "safetensors"):
        yield f"{name} {_version(name) or f'is missing: pip install {name}'}"
    yield from _extras()


def _gpu(kernels: bool) -> Iterator[str]:
    import torch

    built = "CUDA kernels are built in" if kernels else "built without CUDA kernels"
    driver = _driver()
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count()))
        yield f"GPU: {names}; driver {driver}, torch for CUDA {torch.version.cuda}; {built}"
        if not kernels:
            yield f"     to build them, in clado's folder: CLADO_CUDA=ON {_AGAIN}"
    elif driver is not None:
        yield f"GPU: driver {driver}, but torch {torch.__version__} does not see a device: is it a build for the CPU?; {built}"
    else:
        yield f"GPU: none here; {built}"


def _driver() -> str | None:
    """Its version, None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    import subprocess

    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = found.stdout.split()
    return lines[0] if found.returncode == 0 and lines else None


def _extras() -> Iterator[str]:
    from importlib import metadata

    needs: dict[str, list[str]] = {}
    for line in metadata.requires("clado") or []:
        found = _REQUIREMENT.match(line)
        if found is not None:
            needs.setdefault(found[2], []).append(found[1])
    for extra, purpose in EXTRAS.items():
        missing = [name for name in needs.get(extra, []) if name != "clado" and _version(name) is None]
        state = f"missing: {', '.join(missing)}; pip install 'clado[{extra}]'" if missing else "there"
        yield f"[{extra}] for {purpose}: {state}"


def _version(name: str) -> str | None:
    """Of an installed distribution, None where it is not there."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
