"""The house: one stem, seven places; packages whose imports point one way, through doors."""

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
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


# A file imports from its own package and from packages above it in this list; those of one line know nothing of each other.
LAYERS = (
    ("common",),
    ("quant",),
    ("artifacts",),
    ("graph", "interop", "solver", "deploy", "runs"),
    ("profiling",),
    ("improve",),
    ("report",),
    ("cli",),
)
FLOOR = {package: k for k, packages in enumerate(LAYERS) for package in packages}
HOUSE = ROOT / "python" / "clado"
FACES = {"__init__", "__main__", "digits", "nn", "recipes"}  # beside the packages: thin public faces


def imports(root: Path) -> Iterator[tuple[Path, str, str, tuple[str, ...]]]:
    """(file, its package, the package it imports from, what stands behind that package's name) of every import in a file of a
    package, inside functions too; the house's own face counts as the package ``clado``."""
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root).with_suffix("").parts
        if len(place) == 1:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                base = ("clado", *place)[: len(place) + 1 - node.level] if node.level else ()
                whole = (*base, *(node.module or "").split(".")) if node.module else base
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                whole, names = (), [alias.name for alias in node.names]
            else:
                continue
            targets = [(*whole, name) for name in names]
            targets = [tuple(name.split(".")) for name in names] if not whole else targets
            for target in targets:
                if target[0] == "clado":
                    yield path, place[0], target[1] if len(target) > 1 else "clado", target[2:]


def upward(root: Path) -> list[str]:
    """Imports from a package that does not stand above the importing file's own."""
    return [
        f"{path.relative_to(root)} imports {target}"
        for path, own, target, _ in imports(root)
        if target != own and (target in FLOOR or own != "cli") and FLOOR.get(target, len(LAYERS)) >= FLOOR[own]
    ]


def past_the_door(root: Path) -> list[str]:
    """Imports from a file of another package instead of from the package, or of what its door does not name."""
    return [
        f"{path.relative_to(root)} imports {target}.{'.'.join(behind)}"
        for path, own, target, behind in imports(root)
        if target != own and behind and not (len(behind) == 1 and behind[0] in named_at(target))
    ]


@cache
def named_at(package: str) -> set[str]:
    return set(importlib.import_module(f"clado.{package}".removesuffix(".clado")).__all__)


def test_the_folder_lists_the_packages() -> None:
    entries = {path for path in HOUSE.iterdir() if path.name not in ("py.typed", "__pycache__")}
    assert {path.name for path in entries if path.is_dir()} == set(FLOOR)
    assert {path.stem for path in entries if path.is_file()} == FACES


def test_imports_point_one_way() -> None:
    assert not upward(HOUSE)


def test_other_packages_are_entered_by_their_door() -> None:
    assert not past_the_door(HOUSE)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from ..solver import solve", upward),
        ("from .. import cli", upward),
        ("import clado.report", upward),
        ("from clado import profile", upward),
        ("def f():\n    from ..profiling import Run", upward),
        ("from ..quant.layers import Layer", past_the_door),
        ("from ..quant import numbers", past_the_door),
        ("from ..quant import _nothing", past_the_door),
        ("from clado.common.errors import require", past_the_door),
        ("def f():\n    import clado.common.files", past_the_door),
    ],
)
def test_a_wrong_import_is_found(line: str, found, tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "wrong.py").write_text(line + "\n")
    assert len(found(tmp_path)) == 1


def test_doors_say_what_they_are_for_and_open() -> None:
    """Every name of a door is there; no file bears the name of one, since importing it would put the module in its place."""
    for package in FLOOR:
        door = importlib.import_module(f"clado.{package}")
        first, _, rest = (door.__doc__ or "").partition("\n\n")
        assert first.strip().endswith("."), package
        assert rest.strip(), f"{package}: what may be touched from outside"
        assert all(hasattr(door, name) for name in door.__all__), package
        files = {path.stem for path in (HOUSE / package).rglob("*.py")}
        assert package == "cli" or not files & set(door.__all__), package
    face = importlib.import_module("clado")
    assert not set(FLOOR) & set(face.__all__)
    assert all(hasattr(face, name) for name in face.__all__)


def test_tests_mirror_the_packages() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert set(FLOOR) <= folders
    assert not [path.name for path in (ROOT / "tests").glob("test_*.py") if path.stem not in OF_THE_WHOLE]


OF_THE_WHOLE = {"test_build_backend", "test_dependencies", "test_docs", "test_layout"}


def test_weights_are_quantized_in_one_place() -> None:
    calls = re.compile(r"\b(scale_search|range_search|fake_quant|quantize_weight)\(")
    outside = [path for path in HOUSE.rglob("*.py") if path.parent.name != "quant" and calls.search(path.read_text())]
    assert not outside
