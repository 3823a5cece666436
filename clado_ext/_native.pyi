"""Types of the native module. Addresses, sizes, strides (in elements) and the stream are plain integers, alone or in tuples."""

from collections.abc import Sequence
from typing import TypeAlias

has_cuda: bool
version: str  # of the distribution, as pyproject.toml has it

# Codes of a weight's dtype, and the bit-widths of codes.
FLOAT32: int
FLOAT16: int
BFLOAT16: int
LEAST_BITS: int
MOST_BITS: int
# Codes of float elements, of where scales come from, and how many formats a call takes.
E2M1: int
E4M3: int
E5M2: int
ANY_SCALE: int
POWER_OF_TWO: int
E4M3_SCALE: int
MOST_FORMATS: int

# A weight in place: address, dtype, rows, columns, row stride, columns of a group.
Weight: TypeAlias = tuple[int, int, int, int, int, int]
# A format that a weight is quantized to: element, columns of a group, addresses of scales and zero points (or 0).
Format: TypeAlias = tuple[int, int, int, int]
# What scales are searched for: element, columns of a group, rule, address of the tensor's scale (or 0), of scales and of zero
# points (or 0).
Target: TypeAlias = tuple[int, int, int, int, int, int]
# Upper factors of inverse moments: addresses of the factors and of the order of their columns (or 0), their number.
Factors: TypeAlias = tuple[int, int, int, int, int, int]
# What errors count: address (or 0), rows.
Importances: TypeAlias = tuple[int, int]
# Scales to be rated: address, candidates, lowest and highest step.
Proposed: TypeAlias = tuple[int, int, int, int]
# Carried differences: streams, rows, columns, whether what is read is bfloat16, whether what is written is.
Streams: TypeAlias = tuple[int, int, int, bool, bool]
# Logits and their changes: both addresses, perturbations, samples, classes, whether they are float64.
Changes: TypeAlias = tuple[int, int, int, int, int, bool]
# Changes under two sets of perturbations: their addresses (the second or 0), perturbations, others, rows, width, whether float64.
Pairs: TypeAlias = tuple[int, int, int, int, int, int, bool]
# Logits of the rows: their address, that of the weights (or 0), rows per sample.
LogitRows: TypeAlias = tuple[int, int, int]
# An integer quadratic program: addresses of matrix, starts, rows and limits, layers, budgets.
Program: TypeAlias = tuple[int, int, int, int, int, int]
# A convex form below it: addresses of quadratic, linear, multipliers, removed (or 0) and point, constant, slack.
Form: TypeAlias = tuple[int, int, int, int, int, float, float]

def simd_level() -> int: ...
def set_simd(level: int) -> int: ...

# bitpack
def pack_cpu(codes: int, words: int, rows: int, columns: int, bits: int, threads: int, /) -> bool: ...
def unpack_cpu(words: int, codes: int, rows: int, columns: int, bits: int, threads: int, /) -> None: ...
def pack_cuda(codes: int, words: int, rows: int, columns: int, bits: int, device: int, stream: int, /) -> None: ...
def unpack_cuda(words: int, codes: int, rows: int, columns: int, bits: int, device: int, stream: int, /) -> None: ...

# carried
def carried_gelu_cpu(clean: int, delta: int, out: int, streams: Streams, threads: int, /) -> None: ...
def carried_layer_norm_cpu(
    clean: int,
    delta: int,
    weight: int,
    out: int,
    streams: Streams,
    eps: float,
    threads: int,
    /,
) -> None: ...
def carried_add_layer_norm_cpu(
    clean: int,
    residual: int,
    branch: int,
    weight: int,
    sum: int,
    out: int,
    streams: Streams,
    eps: float,
    threads: int,
    /,
) -> None: ...
def carried_softmax_cpu(
    scores: int,
    clean: int,
    delta: int,
    out: int,
    streams: Streams,
    scale: float,
    threads: int,
    /,
) -> None: ...
def carried_gelu_cuda(clean: int, delta: int, out: int, streams: Streams, device: int, stream: int, /) -> None: ...
def carried_layer_norm_cuda(
    clean: int,
    delta: int,
    weight: int,
    out: int,
    streams: Streams,
    eps: float,
    device: int,
    stream: int,
    /,
) -> None: ...
def carried_add_layer_norm_cuda(
    clean: int,
    residual: int,
    branch: int,
    weight: int,
    sum: int,
    out: int,
    streams: Streams,
    eps: float,
    device: int,
    stream: int,
    /,
) -> None: ...
def carried_softmax_cuda(
    scores: int,
    clean: int,
    delta: int,
    out: int,
    streams: Streams,
    scale: float,
    device: int,
    stream: int,
    /,
) -> None: ...

# compensate; bits: widths of integers, or one float element
def compensate_cpu(
    weight: Weight,
    bits: Sequence[int],
    factors: Factors,
    scales: int,
    zeros: int,
    codes: int,
    loss: int,
    threads: int,
    /,
) -> bool: ...
def compensate_workspace(rows: int, columns: int, num_bits: int, /) -> int: ...
def compensate_cuda(
    weight: Weight,
    bits: Sequence[int],
    factors: Factors,
    scales: int,
    zeros: int,
    codes: int,
    loss: int,
    workspace: int,
    device: int,
    stream: int,
    /,
) -> None: ...

# fake_quant
def fake_quant_cpu(weight: Weight, formats: Sequence[Format], values: int, sqerr: int, threads: int, /) -> None: ...
def quantize_weight_cpu(
    weight: Weight,
    bits: Sequence[int],
    steps: int,
    scales: int,
    zeros: int,
    values: int,
    sqerr: int,
    threads: int,
    /,
) -> None: ...
def quantize_cpu(weight: Weight, formats: Sequence[Format], codes: int, threads: int, /) -> None: ...
def fake_quant_workspace(rows: int, columns: int, num_formats: int, /) -> int: ...
def fake_quant_cuda(
    weight: Weight,
    formats: Sequence[Format],
    values: int,
    sqerr: int,
    workspace: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def quantize_weight_cuda(
    weight: Weight,
    bits: Sequence[int],
    steps: int,
    scales: int,
    zeros: int,
    values: int,
    sqerr: int,
    search_workspace: int,
    workspace: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def quantize_cuda(weight: Weight, formats: Sequence[Format], codes: int, device: int, stream: int, /) -> None: ...

# scale_errors
MOST_STEP: int  # the farthest step from zero

def scale_errors_cpu(weight: Weight, proposed: Proposed, errors: int, threads: int, /) -> None: ...
def scale_errors_workspace(rows: int, columns: int, group_size: int, count: int, /) -> int: ...
def scale_errors_cuda(
    weight: Weight, proposed: Proposed, errors: int, workspace: int, device: int, stream: int, /
) -> None: ...

# scale_search
MOST_STEPS: int  # shrink factors

def scale_search_cpu(
    weight: Weight, targets: Sequence[Target], steps: int, importance: Importances, threads: int, /
) -> bool: ...
def scale_search_workspace(rows: int, columns: int, group_size: int, num_targets: int, steps: int, /) -> int: ...
def scale_search_cuda(
    weight: Weight,
    targets: Sequence[Target],
    steps: int,
    importance: Importances,
    workspace: int,
    device: int,
    stream: int,
    /,
) -> None: ...

# batched_ce
def batched_ce_cpu(changes: Changes, target: int, increase: int, threads: int, /) -> bool: ...
def batched_ce_cuda(changes: Changes, target: int, increase: int, device: int, stream: int, /) -> None: ...

# iqp_prove
def iqp_prove_cpu(
    program: Program,
    form: Form,
    choice: int,
    alive: int,
    outcome: int,
    tolerance: float,
    nodes: int,
    seconds: float,
    threads: int,
    /,
) -> None: ...

# iqp_search
def iqp_search_cpu(program: Program, choice: int, seed: int, work: int, seconds: float, target: float, /) -> bool: ...

# pairwise_bce
def pairwise_bce_cpu(pairs: Pairs, rows: LogitRows, total: int, squares: int, threads: int, /) -> None: ...
def pairwise_bce_workspace(pairs: Pairs, rows_per_sample: int, /) -> int: ...
def pairwise_bce_cuda(
    pairs: Pairs, rows: LogitRows, total: int, squares: int, workspace: int, device: int, stream: int, /
) -> None: ...

# pairwise_ce
def pairwise_ce_cpu(pairs: Pairs, rows: LogitRows, total: int, squares: int, threads: int, /) -> None: ...
def pairwise_ce_workspace(pairs: Pairs, rows_per_sample: int, /) -> int: ...
def pairwise_ce_cuda(
    pairs: Pairs, rows: LogitRows, total: int, squares: int, workspace: int, device: int, stream: int, /
) -> None: ...

# pairwise_mse
def pairwise_mse_cpu(pairs: Pairs, weight: int, total: int, squares: int, threads: int, /) -> None: ...
def pairwise_mse_workspace(pairs: Pairs, /) -> int: ...
def pairwise_mse_cuda(
    pairs: Pairs, weight: int, total: int, squares: int, workspace: int, device: int, stream: int, /
) -> None: ...
