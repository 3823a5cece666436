"""Types of the native module. Addresses, sizes, strides and the stream are plain integers; strides count elements."""

has_cuda: bool

def simd_level() -> int: ...
def set_simd(level: int) -> int: ...

# bitpack
def pack_cpu(codes: int, words: int, rows: int, columns: int, bits: int, threads: int, /) -> bool: ...
def unpack_cpu(words: int, codes: int, rows: int, columns: int, bits: int, threads: int, /) -> None: ...
def pack_cuda(codes: int, words: int, rows: int, columns: int, bits: int, device: int, stream: int, /) -> None: ...
def unpack_cuda(words: int, codes: int, rows: int, columns: int, bits: int, device: int, stream: int, /) -> None: ...

# carried
def carried_gelu_cpu(
    clean: int,
    delta: int,
    out: int,
    streams: int,
    size: int,
    delta_half: bool,
    out_half: bool,
    threads: int,
    /,
) -> None: ...
def carried_layer_norm_cpu(
    clean: int,
    delta: int,
    weight: int,
    out: int,
    streams: int,
    rows: int,
    columns: int,
    eps: float,
    delta_half: bool,
    out_half: bool,
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
    streams: int,
    rows: int,
    columns: int,
    eps: float,
    branch_half: bool,
    out_half: bool,
    threads: int,
    /,
) -> None: ...
def carried_softmax_cpu(
    scores: int,
    clean: int,
    delta: int,
    out: int,
    streams: int,
    rows: int,
    columns: int,
    scale: float,
    delta_half: bool,
    out_half: bool,
    threads: int,
    /,
) -> None: ...
def carried_gelu_cuda(
    clean: int,
    delta: int,
    out: int,
    streams: int,
    size: int,
    delta_half: bool,
    out_half: bool,
    device: int,
    stream: int,
    /,
) -> None: ...
def carried_layer_norm_cuda(
    clean: int,
    delta: int,
    weight: int,
    out: int,
    streams: int,
    rows: int,
    columns: int,
    eps: float,
    delta_half: bool,
    out_half: bool,
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
    streams: int,
    rows: int,
    columns: int,
    eps: float,
    branch_half: bool,
    out_half: bool,
    device: int,
    stream: int,
    /,
) -> None: ...
def carried_softmax_cuda(
    scores: int,
    clean: int,
    delta: int,
    out: int,
    streams: int,
    rows: int,
    columns: int,
    scale: float,
    delta_half: bool,
    out_half: bool,
    device: int,
    stream: int,
    /,
) -> None: ...

# fake_quant
def fake_quant_cpu(
    weight: int,
    dtype: int,
    scales: int,
    zeros: int,
    values: int,
    sqerr: int,
    rows: int,
    columns: int,
    group_size: int,
    bits: list[int],
    threads: int,
    /,
) -> None: ...
def quantize_weight_cpu(
    weight: int,
    dtype: int,
    scales: int,
    zeros: int,
    values: int,
    sqerr: int,
    rows: int,
    columns: int,
    group_size: int,
    bits: list[int],
    steps: int,
    threads: int,
    /,
) -> None: ...
def quantize_cpu(
    weight: int,
    dtype: int,
    scales: int,
    zeros: int,
    codes: int,
    rows: int,
    columns: int,
    group_size: int,
    bits: list[int],
    threads: int,
    /,
) -> None: ...
def fake_quant_cuda(
    weight: int,
    dtype: int,
    scales: int,
    zeros: int,
    values: int,
    sqerr: int,
    rows: int,
    columns: int,
    group_size: int,
    bits: list[int],
    block_errors: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def quantize_weight_cuda(
    weight: int,
    dtype: int,
    scales: int,
    zeros: int,
    values: int,
    sqerr: int,
    rows: int,
    columns: int,
    group_size: int,
    bits: list[int],
    steps: int,
    workspace: int,
    block_errors: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def quantize_cuda(
    weight: int,
    dtype: int,
    scales: int,
    zeros: int,
    codes: int,
    rows: int,
    columns: int,
    group_size: int,
    bits: list[int],
    device: int,
    stream: int,
    /,
) -> None: ...

# scale_search
def scale_search_cpu(
    weight: int,
    dtype: int,
    scales: int,
    zeros: int,
    rows: int,
    columns: int,
    group_size: int,
    bits: list[int],
    steps: int,
    threads: int,
    /,
) -> None: ...
def scale_search_workspace(rows: int, columns: int, group_size: int, num_bits: int, steps: int, /) -> int: ...
def scale_search_cuda(
    weight: int,
    dtype: int,
    scales: int,
    zeros: int,
    rows: int,
    columns: int,
    group_size: int,
    bits: list[int],
    steps: int,
    workspace: int,
    device: int,
    stream: int,
    /,
) -> None: ...

# batched_ce
def batched_ce_cpu(
    logits: int,
    delta: int,
    target: int,
    increase: int,
    perturbations: int,
    samples: int,
    classes: int,
    is_double: bool,
    threads: int,
    /,
) -> bool: ...
def batched_ce_cuda(
    logits: int,
    delta: int,
    target: int,
    increase: int,
    perturbations: int,
    samples: int,
    classes: int,
    is_double: bool,
    device: int,
    stream: int,
    /,
) -> None: ...

# iqp_prove
def iqp_prove_cpu(
    matrix: int,
    starts: int,
    rows: int,
    limits: int,
    layers: int,
    budgets: int,
    quadratic: int,
    linear: int,
    multipliers: int,
    removed: int,
    point: int,
    constant: float,
    slack: float,
    choice: int,
    alive: int,
    outcome: int,
    tolerance: float,
    nodes: int,
    seconds: float,
    /,
) -> None: ...

# iqp_search
def iqp_search_cpu(
    matrix: int,
    starts: int,
    rows: int,
    limits: int,
    layers: int,
    budgets: int,
    choice: int,
    seed: int,
    work: int,
    seconds: float,
    target: float,
    /,
) -> bool: ...

# pairwise_ce
def pairwise_ce_cpu(
    logits: int,
    delta: int,
    total: int,
    squares: int,
    perturbations: int,
    samples: int,
    classes: int,
    is_double: bool,
    threads: int,
    /,
) -> None: ...
def pairwise_ce_workspace(perturbations: int, samples: int, classes: int, is_double: bool, /) -> int: ...
def pairwise_ce_cuda(
    logits: int,
    delta: int,
    total: int,
    squares: int,
    perturbations: int,
    samples: int,
    classes: int,
    is_double: bool,
    workspace: int,
    device: int,
    stream: int,
    /,
) -> None: ...
