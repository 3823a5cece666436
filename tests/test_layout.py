"""One stem, seven places: a kernel without one of them does not land."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLACES = (
    "csrc/{0}/{0}.h",
    "csrc/{0}/{0}_cpu.cpp",
    "csrc/{0}/{0}_cuda.cu",
    "clado_ext/bindings/{0}.cpp",
    "clado_ext/{0}.py",
    "clado_ext/reference/{0}.py",
    "tests/ops/test_{0}.py",
    "bench/ops/bench_{0}.py",
)
# Searches over integers: nothing for a GPU to do.
HOST_ONLY = {"iqp_prove": {"csrc/{0}/{0}_cuda.cu"}, "iqp_search": {"csrc/{0}/{0}_cuda.cu"}}

STEMS = sorted(p.name for p in (ROOT / "csrc").iterdir() if p.is_dir() and p.name != "common")


def test_cmake_builds_every_stem() -> None:
    listed = re.search(r"set\(STEMS\s+([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert listed is not None
    assert sorted(listed[1].split()) == STEMS


@pytest.mark.parametrize("stem", STEMS)
def test_every_place_is_there(stem: str) -> None:
    missing = [
        p.format(stem) for p in PLACES if p not in HOST_ONLY.get(stem, ()) and not (ROOT / p.format(stem)).is_file()
    ]
    assert not missing
    assert (ROOT / "clado_ext/_native.pyi").read_text().count(f"# {stem}") == 1
    assert f"bind_{stem}(m)" in (ROOT / "clado_ext/bindings/module.cpp").read_text()


def test_kernels_know_neither_python_nor_torch() -> None:
    for source in (ROOT / "csrc").rglob("*.*"):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10|pybind11|Python)", source.read_text()), source
