"""Graph and samples to sensitivity matrix: estimators, sums, chunks, checkpoints, ranks.

Other packages call :func:`profile` or run a task of their own through :class:`Run`.
"""

from typing import TYPE_CHECKING

from ..common import door

if TYPE_CHECKING:
    from .checkpoint import PROGRESS_FILE, Checkpoint, alone, read_progress, recorded, writing
    from .distributed import Ranks, is_writer, torchrun_group
    from .estimators import ESTIMATORS, Later, joined
    from .losses import IGNORED, LOSSES, Loss, LossChoice, LossFunc, loss_arguments
    from .open import open_run
    from .options import NEAREST, Options
    from .profiler import plan_run, profile
    from .reader import Reader, all_finite
    from .run import PairTask, Run
    from .samples import SampleStream, sample_digests
    from .sums import Sums, corrected_entries, entries
    from .work import RunPlan
else:
    __getattr__, __dir__ = door(__name__)

__all__ = [
    "ESTIMATORS",
    "IGNORED",
    "LOSSES",
    "NEAREST",
    "PROGRESS_FILE",
    "Checkpoint",
    "Later",
    "Loss",
    "LossChoice",
    "LossFunc",
    "Options",
    "PairTask",
    "Ranks",
    "Reader",
    "Run",
    "RunPlan",
    "SampleStream",
    "Sums",
    "all_finite",
    "alone",
    "corrected_entries",
    "entries",
    "is_writer",
    "joined",
    "loss_arguments",
    "open_run",
    "plan_run",
    "profile",
    "read_progress",
    "recorded",
    "sample_digests",
    "torchrun_group",
    "writing",
]
