"""Types of the native module. Addresses, sizes, strides and the stream are plain integers; strides count elements."""

has_cuda: bool

def simd_level() -> int: ...
def set_simd(level: int) -> int: ...
def pack_cpu(codes: int, words: int, rows: int, columns: int, bits: int, threads: int, /) -> bool: ...
def unpack_cpu(words: int, codes: int, rows: int, columns: int, bits: int, threads: int, /) -> None: ...
def pack_cuda(codes: int, words: int, rows: int, columns: int, bits: int, device: int, stream: int, /) -> None: ...
def unpack_cuda(words: int, codes: int, rows: int, columns: int, bits: int, device: int, stream: int, /) -> None: ...
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
