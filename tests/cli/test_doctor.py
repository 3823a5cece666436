"""clado doctor: what is there, what is missing, and the line that mends it."""

from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import clado_ext
from clado.cli import doctor, main


def lines() -> list[str]:
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def starting(word: str) -> str:
    (found,) = (line for line in lines() if line.startswith(word))
    return found


def test_names_versions_and_the_level_in_use() -> None:
    assert starting("clado").startswith(f"clado {metadata.version('clado')},")
    assert starting("torch") == f"torch {metadata.version('torch')}"
    assert f"by {doctor.SIMD[clado_ext.simd_level()]}, {torch.get_num_threads()} threads" in starting("kernels")


def test_a_lower_level_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clado_ext, "simd_level", lambda: 0)
    assert "by base" in starting("kernels")


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    known = metadata.version

    def version(name: str) -> str:
        if name in ("onnxruntime", "scipy"):
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", version)
    assert starting("[onnx]").endswith("missing: onnxruntime; pip install 'clado[onnx]'")
    assert starting("scipy").startswith("scipy is missing")


def test_every_extra_it_explains_exists() -> None:
    assert set(doctor.EXTRAS) <= set(metadata.metadata("clado").get_all("Provides-Extra") or [])


@pytest.mark.parametrize(
    ("sees", "driver", "kernels", "said"),
    [
        (False, None, False, "none here; built without CUDA kernels"),
        (False, "580.1", True, "does not see a device"),
        (True, "580.1", True, "H200; driver 580.1"),
        (True, "580.1", False, "CLADO_CUDA=ON"),
    ],
)
def test_gpu_driver_and_kernels(
    sees: bool, driver: str | None, kernels: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = SimpleNamespace(is_available=lambda: sees, device_count=lambda: 1, get_device_name=lambda k: "H200")
    monkeypatch.setattr(torch, "cuda", there)
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    monkeypatch.setattr(clado_ext, "has_cuda", kernels)
    assert any(said in line for line in lines())
