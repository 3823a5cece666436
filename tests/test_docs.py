"""The documentation holds: the tutorial runs, every command line in it parses, every page says where its figures come from."""

from __future__ import annotations

import re
import shlex
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


def test_commands_are_found() -> None:
    assert sum(len(commands(page)) for page in PAGES) >= 12


def test_figures_of_the_readme_have_a_file() -> None:
    """Each row of its tables of figures names a file under bench/results, and the file is there."""
    text = (ROOT / "README.md").read_text()
    files = set(re.findall(r"bench/results/[\w/.-]+\.json", text))
    assert files
    assert all((ROOT / file).is_file() for file in files)
