"""Which builds fetch a CUDA compiler, in which release, and what they say."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = Path(__file__).parent.parent / "csrc" / "build_backend.py"


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Loaded as the script it also is: its hooks need scikit-build-core, which only a build has."""
    spec = importlib.util.spec_from_file_location("__main__", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CMAKE_ARGS", "CLADO_CUDA", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "compiler_there", lambda: False)
    monkeypatch.setattr(module, "driver", lambda: None)
    return module


def test_nothing_is_fetched_without_a_gpu_or_with_a_compiler(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert backend.to_fetch() == ([], backend.to_fetch()[1])
    assert "no GPU" in backend.to_fetch()[1]
    monkeypatch.setattr(backend, "driver", lambda: (13, 0))
    monkeypatch.setattr(backend, "compiler_there", lambda: True)
    assert backend.to_fetch()[0] == []


@pytest.mark.parametrize(("runs", "release"), [((13, 0), "13.0"), ((13, 9), "13.0"), ((14, 1), "13.0")])
def test_every_part_of_the_compiler_is_of_one_release(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, runs: tuple[int, int], release: str
) -> None:
    monkeypatch.setattr(backend, "driver", lambda: runs)
    packages, why = backend.to_fetch()
    assert packages == [f"{name}=={release}.*" for name in backend.PACKAGES]
    assert f"nvcc {release} from PyPI" in why
    assert "MB" in why  # the download is said beforehand


def test_an_old_driver_is_told_what_would_help(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "driver", lambda: (12, 4))
    packages, why = backend.to_fetch()
    assert packages == []
    assert "CUDA 12.4" in why


def test_on_fetches_without_a_gpu_and_off_never(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLADO_CUDA", "ON")
    assert backend.to_fetch()[0] != []
    monkeypatch.setenv("CMAKE_ARGS", "-DFOO=1 -DCLADO_CUDA:STRING=OFF")
    assert backend.to_fetch() == ([], "no CUDA kernels: CLADO_CUDA=OFF")
    assert backend.to_fetch({"cmake.define.CLADO_CUDA": "on"})[0] != []


def test_the_compiler_of_the_build_environment_is_found_and_handed_to_cmake(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert backend.fetched() == str(nvcc)
    monkeypatch.delenv("LIBRARY_PATH", raising=False)
    backend._with_compiler(None)
    assert os.environ.pop("CUDACXX") == str(nvcc)
    assert os.environ.pop("LIBRARY_PATH") == str(tmp_path / "nvidia" / "cu13" / "lib")
    backend._with_compiler({"cmake.define.CLADO_CUDA": "OFF"})
    assert "CUDACXX" not in os.environ
