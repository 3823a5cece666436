"""The documentation holds: the tutorial runs, every command line in it parses, every page says where its figures come from."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from clado.cli import main

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.S | re.M)


def commands(page: Path) -> list[str]:
    """Command lines of clado in the page's sh blocks and inline code."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [line.strip() for line in text if re.match(r"\s*clado\s", line)]


def test_tutorial_runs() -> None:
    scope: dict[str, object] = {}
    page = ROOT / "docs" / "tutorial.md"
    for block in blocks(page, "python"):
        line = page.read_text()[: page.read_text().index(block)].count("\n")
        exec(compile("\n" * line + block, str(page), "exec"), scope)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page: Path) -> None:
    """Every command and option that is written down exists."""
    for line in commands(page):
        words = shlex.split(line, comments=True)[1:]
        command = main.commands.get(words[0]) if not words[0].startswith("-") else None
        assert words[0].startswith("-") or command is not None, line
        if command is not None:
            try:
                command.make_context(words[0], words[1:])
            except click.exceptions.Exit:
                pass  # --help
            except click.ClickException as error:
                pytest.fail(f"{line}: {error.format_message()}")


# Of docs and docstrings: what a reader may type after `import clado`, but for what `python -m` runs.
DOTTED = re.compile(r"(?<![\w./-])(?<!-m )clado(?:_ext)?(?:\.[A-Za-z_]\w*)+")
IMPORTED = re.compile(r"^\s*(?:>>> )?from (clado(?:_ext)?[\w.]*) import ([\w, ]+)", re.M)
RESOLVE = """
import sys, clado, clado_ext
for name in sys.stdin.read().split():
    found = {"clado": clado, "clado_ext": clado_ext}[name.partition(".")[0]]
    try:
        for part in name.split(".")[1:]:
            found = getattr(found, part)
    except AttributeError as error:
        print(name, error)
"""


def dotted(text: str) -> set[str]:
    """Dotted names in a text, those of its import lines included."""
    listed = {f"{module}.{name.split()[0]}" for module, names in IMPORTED.findall(text) for name in names.split(",")}
    return set(DOTTED.findall(text)) | listed


def docstrings(path: Path) -> str:
    """All docstrings of a file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return "\n".join(ast.get_docstring(n) or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, kinds))


def unresolved(names: set[str]) -> str:
    """Names that a fresh interpreter does not find."""
    path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE],
        input="\n".join(sorted(names)),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT / "docs",
    )
    return done.stdout


def test_every_dotted_name_is_there_after_import_clado() -> None:
    pages = set().union(*(dotted(page.read_text()) for page in PAGES))
    sources = [path for folder in ("python/clado", "clado_ext") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(pages) > 20
    assert unresolved(pages | set().union(*(dotted(docstrings(path)) for path in sources))) == ""


def test_a_name_that_is_not_there_is_found() -> None:
    text = "`clado.exporter.verify`, clado.solve, clado_ext.nothing\nfrom clado.report import gather, nobody\n"
    assert dotted(text) == {
        "clado.exporter.verify",
        "clado.solve",
        "clado_ext.nothing",
        "clado.report",
        "clado.report.gather",
        "clado.report.nobody",
    }
    lines = unresolved(dotted(text)).splitlines()
    assert [line.split()[0] for line in lines] == ["clado.exporter.verify", "clado.report.nobody", "clado_ext.nothing"]


def test_commands_are_found() -> None:
    assert sum(len(commands(page)) for page in PAGES) >= 12


def test_figures_of_the_readme_have_a_file() -> None:
    """Each row of its tables of figures names a file under bench/results, and the file is there."""
    text = (ROOT / "README.md").read_text()
    files = set(re.findall(r"bench/results/[\w/.-]+\.json", text))
    assert files
    assert all((ROOT / file).is_file() for file in files)
