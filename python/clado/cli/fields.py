"""Options of commands, made of the arguments of the functions behind them (``common/arguments.py``)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import click

from ..common import Arguments, require
from .base import COUNT, SEED, named_folder, positive


@dataclass(frozen=True)
class Kind:
    """How an option is read.

    Attributes:
        click: arguments of ``click.option``.
        value: the function's argument from (op, name of the option, what click read).
    """

    click: Mapping[str, Any]
    value: Callable[[str, str, Any], Any] = lambda op, name, given: given


def comma_ints(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    try:
        return None if value is None else tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"must be whole numbers separated by commas, got {value!r}") from None


def comma_floats(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    try:
        return None if value is None else tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"must be numbers separated by commas, got {value!r}") from None


def _function(op: str, name: str, given: str) -> Callable[..., Any]:
    from ..runs import named

    return named(op, name, given)


def _per_layer(op: str, name: str, given: tuple[str, ...]) -> list[tuple[str, int | str]]:
    """(layer, bits or label) of every ``LAYER=BITS`` or ``LAYER=W4A16``."""
    pairs: list[tuple[str, int | str]] = []
    for text in given:
        layer, _, scheme = text.rpartition("=")
        known = bool(layer) and (scheme.isdigit() or scheme[:1].isupper())
        require(known, op, name, "read LAYER=BITS or LAYER=W4A16", repr(text))
        pairs.append((layer, int(scheme) if scheme.isdigit() else scheme))
    return pairs


def _several_per_layer(op: str, name: str, given: tuple[str, ...]) -> dict[str, list[int | str]]:
    found: dict[str, list[int | str]] = {}
    for layer, scheme in _per_layer(op, name, given):
        found.setdefault(layer, []).append(scheme)
    return found


def _schemes(op: str, name: str, given: tuple[str, ...]) -> tuple[str, ...] | dict[str, tuple[str, ...]] | None:
    """Labels, or {pattern: labels} of every ``PATTERN=W2A16,W4A8``, in order; labels alone are for whatever layer."""
    found: dict[str, tuple[str, ...]] = {}
    for text in given:
        pattern, _, labels = text.rpartition("=")
        require((pattern or "*") not in found, op, name, "give a pattern once", repr(pattern or "*"))
        found[pattern or "*"] = tuple(labels.split(","))
    return found["*"] if list(found) == ["*"] else found or None


PER_LAYER = {"multiple": True, "metavar": "LAYER=BITS"}
KINDS = {
    "text": Kind({}),
    "number": Kind({"type": float}),
    "positive": Kind({"type": float, "callback": positive}),
    "count": Kind({"type": COUNT}),
    "whole": Kind({"type": int}),
    "loss": Kind({}),
    "seed": Kind({"type": SEED}),
    "group": Kind({"type": click.IntRange(min=-1)}),
    "switch": Kind({"is_flag": True}),
    "either": Kind({"is_flag": True, "default": None}),
    "unless": Kind({"is_flag": True}, lambda op, name, given: not given),
    "several": Kind({"multiple": True}),
    "share": Kind({"type": float, "is_flag": False, "flag_value": 0.1, "metavar": "[SHARE]"}),
    "numbers": Kind({"callback": comma_floats}),
    "widths": Kind({"callback": comma_ints}),
    "schemes": Kind({"multiple": True, "metavar": "[PATTERN=]LABELS"}, _schemes),
    "GiB": Kind({"type": float, "callback": positive}, lambda op, name, given: int(given * 2**30)),
    "folder": Kind({"callback": named_folder}),
    "function": Kind({"metavar": "MODULE:FUNCTION"}, _function),
    "layer": Kind(PER_LAYER, lambda op, name, given: dict(_per_layer(op, name, given))),
    "layers": Kind(PER_LAYER, _several_per_layer),
    "groups": Kind(
        {"multiple": True, "metavar": "LAYER,LAYER"}, lambda op, name, given: [group.split(",") for group in given]
    ),
}


def options(kind: type[Arguments], only: Collection[str] = (), but: Collection[str] = ()) -> Callable[[Any], Any]:
    """A decorator that gives a command the options of these arguments, in the order of the fields."""
    names = [name for name in kind.about() if name not in but and (not only or name in only)]

    def decorate(command: Any) -> Any:
        for name in reversed(names):
            command = option(kind, name)(command) if has_option(kind, name) else command
        return command

    return decorate


def has_option(kind: type[Arguments], name: str) -> bool:
    """Whether the command line has an argument."""
    return not isinstance(kind.about()[name].line, str)


def option(kind: type[Arguments], name: str) -> Callable[[Any], Any]:
    """The option of one argument; its parameter is called as the argument is."""
    line = kind.about()[name].line
    assert not isinstance(line, str), line
    read = dict(KINDS[line.kind].click)
    if line.required:
        read["required"] = True
    elif not read.keys() & {"is_flag", "multiple"}:
        default = kind.default(name) if line.default is None else line.default
        read |= {"default": None if default == () else default, "show_default": default not in (None, ())}
    return click.option(line.flag, name, help=line.help, **read)


def values(kind: type[Arguments], given: Mapping[str, Any]) -> dict[str, Any]:
    """The function's arguments from what click read; one that was left out and has no default is not among them."""
    found: dict[str, Any] = {}
    for name, about in kind.about().items():
        line = about.line
        if not isinstance(line, str) and given.get(name) is not None:
            value = KINDS[line.kind].value(kind.op, line.flag.removeprefix("--"), given[name])
            found |= {} if value is None else {name: value}
    return found
