"""What a user names as ``package.module:function`` on the command line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import reduce
from typing import Any

from ..common import CladoError, require

SPELLING = "package.module:function"


def named(op: str, argument: str, name: str, must: str = f"be {SPELLING}") -> Callable[..., Any]:
    """The function (or class) of that name; modules are found from the working directory too, as by ``python -m``.

    Raises:
        CladoError: another spelling, nothing of that name, or a module that fails while it is imported.
    """
    module, _, function = name.partition(":")
    require(bool(module and function), op, argument, must, repr(name))
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = reduce(getattr, function.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise CladoError(f"{op}: {argument} must {must} that can be imported, got {name} ({error})") from None
    except Exception as error:  # whatever the user's module does while it is imported
        reason = f"{type(error).__name__}: {error}"
        raise CladoError(f"{op}: {argument} must {must} that can be imported, got {name} ({reason})") from error
    require(callable(found), op, argument, must, f"{name}, {type(found).__name__}")
    function_or_class: Callable[..., Any] = found
    return function_or_class
