"""Arguments of public functions, each written once: as a field of a frozen dataclass.

A field says its default, what it means, how it is checked, what is kept of it, whether it decides the result, and how the
command line has it. Signatures, docstrings and options of commands are made from the fields.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from inspect import Parameter
from typing import Any, ClassVar, TypeVar

from .errors import require

A = TypeVar("A", bound="Arguments")
R = TypeVar("R")
WIDTH = 126  # columns of a generated docstring


@dataclass(frozen=True)
class Check:
    """What a value must be; a text that takes an import to know is given as a function.

    Attributes:
        holds: whether a value is good.
        must: how the message says what it must.
        got: what the message shows of another value.
    """

    holds: Callable[[Any], bool]
    must: str | Callable[[], str]
    got: Callable[[Any], object] = repr


def number_list(value: Any) -> tuple[float, ...] | None:
    """Of a sequence, an array or a tensor of numbers; None where it is none."""
    value = value.tolist() if hasattr(value, "tolist") else value
    good = isinstance(value, Sequence) and all(isinstance(number, numbers.Real) for number in value)
    return tuple(map(float, value)) if good else None


def one_of(known: Callable[[], Iterable[str]], must: Callable[[], str] | None = None) -> Check:
    """One of the names in a registry that is looked up when a value is checked."""
    return Check(lambda value: value in known(), must or (lambda: f"be one of {', '.join(known())}"))


@dataclass(frozen=True)
class Line:
    """How the command line has an argument.

    Attributes:
        flag: such as ``--nsamples``.
        kind: how it is read: one of ``clado.cli.fields.KINDS``.
        help: in a few words; the docstring says more.
        default: where the command line has one of its own.
    """

    flag: str
    kind: str
    help: str
    default: Any = None
    required: bool = False


@dataclass(frozen=True)
class About:
    """What is known of an argument beside its default.

    Attributes:
        help: a sentence or two for the docstring.
        line: how the command line has it, or why it does not.
        check: of any value but a default of None.
        kept: makes a checked value what the field holds; of what it made it makes the same.
        takes: type in the signature, where it is wider than the field's.
        setting: name under which it decides the result in a run's settings; "": it does not, or as the samples and layers do.
        group: what it belongs to.
    """

    help: str
    line: Line | str
    check: Check | None = None
    kept: Callable[[Any], Any] | None = None
    takes: str = ""
    setting: str = ""
    group: str = ""


def argument(default: Any, help: str, line: Line | str, **about: Any) -> Any:
    """A field of :class:`Arguments`."""
    return field(default=default, metadata={"about": About(help, line, **about)})


class Arguments:
    """Base of a dataclass whose fields are the arguments of a public function; they are checked when one is made."""

    op: ClassVar[str]

    def __post_init__(self) -> None:
        for name, about in self.about().items():
            value = getattr(self, name)
            if value is None and self.default(name) is None:
                continue
            check, kept = about.check, about.kept
            if check is not None and not check.holds(value):
                must = check.must if isinstance(check.must, str) else check.must()
                require(False, self.op, name, must, check.got(value))
            if kept is not None:
                object.__setattr__(self, name, kept(value))

    @classmethod
    def of(cls: type[A], **given: Any) -> A:
        """From arguments as a caller gives them, of wider types than the fields have.

        Raises:
            CladoError: one that cannot be meant, or that there is not.
        """
        check_known(cls.op, given, cls.about())
        return cls(**given)

    @classmethod
    def about(cls) -> dict[str, About]:
        """{argument: what is known of it}."""
        return {f.name: f.metadata["about"] for f in fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def default(cls, name: str) -> Any:
        return getattr(cls, name)

    @classmethod
    def positional(cls) -> tuple[str, ...]:
        """Arguments that may be given by their place."""
        return tuple(f.name for f in fields(cls) if not f.kw_only)  # type: ignore[arg-type]

    @classmethod
    def group(cls, name: str) -> tuple[str, ...]:
        """Arguments of a group."""
        return tuple(argument for argument, about in cls.about().items() if about.group == name)

    @classmethod
    def parameters(cls) -> list[Parameter]:
        """For a signature."""
        kinds = {False: Parameter.POSITIONAL_OR_KEYWORD, True: Parameter.KEYWORD_ONLY}
        return [
            Parameter(f.name, kinds[bool(f.kw_only)], default=f.default, annotation=f.metadata["about"].takes or f.type)
            for f in fields(cls)  # type: ignore[arg-type]
        ]

    @classmethod
    def described(cls, indent: str) -> str:
        """For the ``Args:`` of a docstring."""
        entries = (f"{name}: {about.help}" for name, about in cls.about().items())
        wrapper = textwrap.TextWrapper(WIDTH, indent, indent + "    ", break_long_words=False, break_on_hyphens=False)
        return "\n".join(map(wrapper.fill, entries))


def takes(kind: type[Arguments]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Give a function with an argument ``options`` of this kind the kind's arguments instead: its caller names them one by one.

    In the docstring they take the place of the line ``options: …``.
    """

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        signature = _signature(function, kind)

        @functools.wraps(function)
        def call(*values: Any, **named: Any) -> R:
            check_known(kind.op, named, signature.parameters)
            given = signature.bind(*values, **named).arguments
            own = {name: given.pop(name) for name in kind.about() if name in given}
            return function(**given, options=kind(**own))

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__doc__ = _docstring(function.__doc__, kind)
        return call

    return decorate


def check_known(op: str, given: Iterable[str], names: Iterable[str]) -> None:
    """Raise where an argument that is given has none of the names.

    Raises:
        CladoError: the first such, with the names that are nearest to it.
    """
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, list(names), 3)
            meant = f" (meant: {' or '.join(near)}?)" if near else ""
            require(False, op, "arguments", f"be among those of help(clado.{op})", f"{name}{meant}")


def _signature(function: Callable[..., Any], kind: type[Arguments]) -> inspect.Signature:
    """The function's own arguments, and the kind's in place of ``options``."""
    own = inspect.signature(function)
    every = [p for p in own.parameters.values() if p.name != "options"] + kind.parameters()
    # Sorting keeps the order within a sort of parameter; the function's own ones by name come last, as in its source.
    late = {p.name for p in own.parameters.values() if p.kind is Parameter.KEYWORD_ONLY}
    return own.replace(parameters=sorted(every, key=lambda p: (p.kind, p.name in late)))


def _docstring(text: str | None, kind: type[Arguments]) -> str | None:
    if text is None:
        return None
    lines = text.split("\n")
    for k, line in enumerate(lines):
        if line.lstrip().startswith("options:"):
            lines[k] = kind.described(line[: len(line) - len(line.lstrip())])
    return "\n".join(lines)
