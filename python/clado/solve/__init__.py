"""From a sensitivity matrix and budgets to a plan with a certificate."""

from .solver import solve

__all__ = ["solve"]
