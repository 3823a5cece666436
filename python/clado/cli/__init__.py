"""The command line: a file per group of commands.

Nothing imports from here but the entry point.
"""

from . import choose, deliver, doctor, inspect, measure
from .base import main

__all__ = ["choose", "deliver", "doctor", "inspect", "main", "measure"]
