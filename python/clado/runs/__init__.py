"""What a command names: a run directory with its note, a model, a data set, a function of the user's.

Other packages resolve names here and get models, batches and notes.
"""

from typing import TYPE_CHECKING

from ..common import door

if TYPE_CHECKING:
    from .data import build_data
    from .digits import load_data, load_model
    from .models import ModelSpec, build_model
    from .names import named
    from .rundir import (
        RUN_FILE,
        example,
        first,
        functions,
        heldout,
        heldout_data,
        load_run,
        measured_by,
        merge_notes,
        read_note,
        that_chose,
        versions,
        write_note,
    )
else:
    __getattr__, __dir__ = door(__name__)

__all__ = [
    "RUN_FILE",
    "ModelSpec",
    "build_data",
    "build_model",
    "example",
    "first",
    "functions",
    "heldout",
    "heldout_data",
    "load_data",
    "load_model",
    "load_run",
    "measured_by",
    "merge_notes",
    "named",
    "read_note",
    "that_chose",
    "versions",
    "write_note",
]
