"""The embedded net and its data: the public face of :mod:`clado.runs.digits`, which says what they are."""

from .runs import load_data, load_model

__all__ = ["load_data", "load_model"]
