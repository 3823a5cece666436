"""What every package needs, without a word of quantization: one-line errors, files that appear whole, digests, batches.

Everything that other packages use is named here; :func:`door` is how a package names it.
"""

from typing import TYPE_CHECKING

from .doors import door

if TYPE_CHECKING:
    from .allocator import heap
    from .arguments import About, Arguments, Check, Line, argument, check_known, number_list, one_of, takes
    from .batches import moved_to, sample_count, shown_shapes, split_batch, two_samples
    from .devices import USABLE, usable
    from .errors import CladoError, FileError, here, is_out_of_memory, require, said, some, users_code
    from .files import atomic_file, atomic_folder, read_safetensors, refused, write_json
    from .fingerprint import code_digest, data_digest, digest, tensor_digest, weights_digest
    from .locks import locked
    from .progress import progress_bar
else:
    __getattr__, __dir__ = door(__name__)

__all__ = [
    "USABLE",
    "About",
    "Arguments",
    "Check",
    "CladoError",
    "FileError",
    "Line",
    "argument",
    "atomic_file",
    "atomic_folder",
    "check_known",
    "code_digest",
    "data_digest",
    "digest",
    "door",
    "heap",
    "here",
    "is_out_of_memory",
    "locked",
    "moved_to",
    "number_list",
    "one_of",
    "progress_bar",
    "read_safetensors",
    "refused",
    "require",
    "said",
    "sample_count",
    "shown_shapes",
    "some",
    "split_batch",
    "takes",
    "tensor_digest",
    "two_samples",
    "usable",
    "users_code",
    "weights_digest",
    "write_json",
]
