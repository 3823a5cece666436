"""``python -m clado``."""

from .cli import main

main()
