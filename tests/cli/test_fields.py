"""Options that are made of arguments: every one is there, with its help and default, and says what the argument takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from clado import CladoError
from clado.cli import fields, main
from clado.common import Arguments, Line
from clado.profiling import Options
from clado.solver import AXES, INVERSE, SolveOptions


def options(command: str) -> dict[str, click.Option]:
    return {p.name: p for p in main.commands[command].params if isinstance(p, click.Option) and p.name is not None}


@pytest.mark.parametrize(("command", "kind"), [("profile", Options), ("solve", SolveOptions), ("pareto", SolveOptions)])
def test_every_argument_has_its_option_once(command: str, kind: type[Arguments]) -> None:
    flags = [flag for option in main.commands[command].params for flag in option.opts]
    assert len(flags) == len(set(flags))
    shown = options(command)
    for name, about in kind.about().items():
        line = about.line
        if isinstance(line, str):
            assert name not in shown
            assert len(line.split()) > 3  # a reason
        elif command != "pareto" or name not in (*AXES, *INVERSE):
            assert [*shown[name].opts, *shown[name].secondary_opts] == line.flag.split("/")
            assert shown[name].help == line.help
            assert line.kind in fields.KINDS


def read(command: str, kind: type[Arguments], *words: object) -> dict[str, Any]:
    context = main.commands[command].make_context(command, [str(word) for word in words])
    return fields.values(kind, context.params)


BASE = ("--model", "m", "--data", "d", "--output-dir", "o")


def test_defaults_are_those_of_the_functions() -> None:
    """Only the number of images is another one."""
    for command, kind, words in (("profile", Options, BASE), ("solve", SolveOptions, ("run",))):
        found = read(command, kind, *words)
        found.pop("output_dir", None)
        for name, value in found.items():
            default = kind.default(name)
            assert value == (512 if name == "num_samples" else default) or (not value and not default), name


def test_what_profile_is_told() -> None:
    assert read("profile", Options, *BASE) == {
        "estimator": "additive",
        "loss": "kl",
        "ignore_index": -100,
        "precision": "float32",
        "num_samples": 512,
        "group_size": -1,
        "symmetric": True,
        "ignore": (),
        "quantize_ends": False,
        "seed": 0,
        "output_dir": "o",
    }
    words = (
        "--nsamples",
        3,
        "--asymmetric",
        "--max-memory",
        0.5,
        "--ignore",
        "a",
        "--ignore",
        "re:b",
        "--quantize-ends",
    )
    found = read("profile", Options, *BASE, *words, "--bits", "8,2", "--loss-func", "tests.cli.test_fields:read")
    assert found["num_samples"] == 3
    assert found["symmetric"] is False
    assert found["max_memory"] == 2**29
    assert found["ignore"] == ("a", "re:b")
    assert found["quantize_ends"] is True
    assert found["bits"] == (8, 2)
    assert found["loss_func"] is read
    assert "schemes" not in found
    assert read("profile", Options, *BASE, "--schemes", "W2A16,W4A16")["schemes"] == ("W2A16", "W4A16")
    with pytest.raises(click.BadParameter, match="must be whole numbers separated by commas, got 'two'"):
        read("profile", Options, *BASE, "--bits", "two")


def test_what_solve_is_told(tmp_path: Path) -> None:
    words = ("--avg-bits", 3, "--pin", "a=b.fc=8", "--pin", "head=W4A16", "--shared", "a,b", "--shared", "c,d")
    found = read("solve", SolveOptions, tmp_path, *words, "--forbid", "x=2", "--forbid", "x=W4A16", "--forbid", "y=8")
    assert found == {
        "avg_bits": 3.0,
        "objective": "original",
        "pin": {"a=b.fc": 8, "head": "W4A16"},
        "forbid": {"x": [2, "W4A16"], "y": [8]},
        "shared_layers": [["a", "b"], ["c", "d"]],
        "time_limit": 60.0,
        "gap": 0.0,
        "threads": 1,
        "seed": 0,
        "solver": "auto",
    }
    for text in ("blocks", "=4", "a=", "a=four"):
        with pytest.raises(CladoError, match="solve: pin must read LAYER=BITS or LAYER=W4A16, got"):
            read("solve", SolveOptions, tmp_path, "--pin", text)


@pytest.mark.parametrize(("command", "kind"), [("profile", Options), ("solve", SolveOptions)])
def test_help_shows_every_option(command: str, kind: type[Arguments]) -> None:
    text = "".join(CliRunner().invoke(main, [command, "--help"]).output.split())  # words are broken at hyphens
    for about in kind.about().values():
        if isinstance(about.line, Line):
            assert about.line.flag in text
            assert "".join(about.line.help.split()) in text
