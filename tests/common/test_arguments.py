"""Arguments that are fields: signature, docstring, checks, and one line for a name that is unknown."""

from __future__ import annotations

import ast
import inspect
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

import clado
from clado.common import Arguments, Check, CladoError, Line, argument, one_of, takes


@dataclass(frozen=True)
class Tea(Arguments):
    op: ClassVar[str] = "brew"

    minutes: int = argument(
        3,
        "how long it draws.",
        Line("--minutes", "count", "Minutes."),
        check=Check(lambda value: value > 0, "be positive", str),
    )
    _: KW_ONLY
    leaf: str | None = argument(
        None, "which one; None: any.", "nobody asks", check=one_of(lambda: ("oolong", "sencha"))
    )
    cups: tuple[int, ...] = argument((1,), "sizes.", "nobody asks", kept=tuple, takes="Sequence[int]")


@takes(Tea)
def brew(pot: str, options: Tea, *, verbose: bool = True) -> tuple[str, Tea, bool]:
    """Brew tea.

    Args:
        pot: the vessel.
        options: of the tea.
        verbose: say so.
    """
    return pot, options, verbose


class Kitchen:
    @takes(Tea)
    def brew(self, options: Tea) -> Tea:
        """Brew."""
        return options


def test_fields_are_arguments() -> None:
    text = "(pot: 'str', minutes: 'int' = 3, *, leaf: 'str | None' = None, cups: 'Sequence[int]' = (1,), verbose: 'bool' = True)"
    assert str(inspect.signature(brew)).partition(" -> ")[0] == text
    lines = [line.strip() for line in (brew.__doc__ or "").strip().splitlines()]
    assert lines[2:] == [
        "Args:",
        "pot: the vessel.",
        "minutes: how long it draws.",
        "leaf: which one; None: any.",
        "cups: sizes.",
        "verbose: say so.",
    ]
    assert brew("kettle") == ("kettle", Tea(), True)
    assert brew("kettle", 5, cups=[2, 3], verbose=False) == ("kettle", Tea(5, cups=(2, 3)), False)
    assert Kitchen().brew(4).minutes == 4
    assert replace(Tea(cups=[2]), leaf="sencha") == Tea(cups=[2], leaf="sencha")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"minutes": 0}, "brew: minutes must be positive, got 0"),
        ({"leaf": "mint"}, "brew: leaf must be one of oolong, sencha, got 'mint'"),
        ({"minute": 3}, r"brew: arguments must be among those of help\(clado.brew\), got minute \(meant: minutes\?\)"),
        ({"sugar": 1}, r"brew: arguments must be among those of help\(clado.brew\), got sugar$"),
    ],
)
def test_what_cannot_be_meant_is_one_line(given: dict[str, object], message: str) -> None:
    with pytest.raises(CladoError, match=message):
        brew("kettle", **given)


def test_what_is_missing_or_given_twice_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="pot"):
        brew()
    with pytest.raises(TypeError, match="multiple values"):
        brew("kettle", 3, minutes=4)


def test_no_function_takes_its_arguments_from_locals() -> None:
    for path in Path(clado.__file__).parent.rglob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert "locals" not in names, path
