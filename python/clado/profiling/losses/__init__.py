"""Losses: a class each, and a line of ``LOSSES`` for those that have a name. Nobody else asks what kind one is."""

from .base import Loss
from .choice import IGNORED, LOSSES, OUTPUTS, TARGETS, LossChoice, loss_arguments
from .rows import Categorical, Cosine
from .users import LossFunc, UserLoss
from .values import Binary, SmoothL1, Squared

__all__ = [
    "IGNORED",
    "LOSSES",
    "OUTPUTS",
    "TARGETS",
    "Binary",
    "Categorical",
    "Cosine",
    "Loss",
    "LossChoice",
    "LossFunc",
    "SmoothL1",
    "Squared",
    "UserLoss",
    "loss_arguments",
]
