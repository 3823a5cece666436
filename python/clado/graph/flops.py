"""How many multiply-adds something takes."""

from __future__ import annotations

from typing import Any

from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker


class FlopCounter(FlopCounterMode):
    """torch's counter of everything that runs inside it, without its tables by module.

    Those come from hooks on whatever tensor enters a module, and the hooks raise an AssertionError where that tensor is a view
    of a parameter (query tokens, the pooling token of an attention head).
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = _NoModules()


class _NoModules(ModuleTracker):
    """Hooks nothing: all that runs belongs to the whole."""

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *args: Any) -> None:
        pass
