"""A package's door: its ``__init__.py`` names what others may import; a name's file is imported when asked for."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def door(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package that imports its public names under ``if TYPE_CHECKING:``.

    What stands there is read from the source, so that type checkers, people and this function see the same list. So
    ``clado --help`` needs no torch, and profiling no solver. Packages and files within it are found likewise: after
    ``import clado`` every path such as ``clado.report.gather`` is there.
    """
    homes = _homes(package)

    def get(name: str) -> Any:
        if name not in homes:
            if name.startswith("__") or importlib.util.find_spec(f"{package}.{name}") is None:
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            return importlib.import_module(f"{package}.{name}")
        file, known_as = homes[name]
        value = getattr(importlib.import_module(file, package), known_as)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *homes})


def _homes(package: str) -> dict[str, tuple[str, str]]:
    """{public name: (file it comes from, its name there)}."""
    spec = sys.modules[package].__spec__
    source = spec.loader.get_source(package) if spec is not None else ""  # type: ignore[union-attr]
    blocks = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {
        alias.asname or alias.name: ("." * node.level + (node.module or ""), alias.name)
        for node in imports
        for alias in node.names
    }
