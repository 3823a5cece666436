"""Every kernel on awkward sizes, by numpy alone: what the sanitizer builds run.

    python tests/sanitize.py <path of a _native module>        CPU kernels at every SIMD level and thread count
    python tests/sanitize.py <path of a cuda_on_cpu module>    CUDA kernels (tests/cuda_on_cpu) in every order of their threads

`make sanitize` builds both with AddressSanitizer and UndefinedBehaviorSanitizer and calls this. Results must have the same bits
at every setting; out-of-bounds accesses and undefined behaviour abort.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.cuda_on_cpu.build import AsNative, load

# A GPU's threads take turns on one here: shorter rows must do.
ON_CPU = not Path(sys.argv[1]).name.startswith("cuda_on_cpu")
LONG = 20_001 if ON_CPU else 2100
STEPS = 20 if ON_CPU else 3
BITS = [2, 3, 8]
THREADS = (1, 3)
ORDERS = (0, 1, 2)


def at(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data


def quantization(
    native: ModuleType | AsNative, draw: np.random.Generator
) -> Iterator[Callable[[int], list[np.ndarray]]]:
    for rows, columns in ((1, 1), (3, 31), (2, 33), (1, 1024), (2, 1029), (1, LONG), (0, 4)):
        for dtype in (0, 1, 2):
            for group in (columns, 7, 32) if ON_CPU or columns < 100 else (columns, 300):
                for ranged in (False, True):
                    raw = draw.standard_normal((rows, columns), dtype=np.float32)
                    weight = (
                        raw
                        if dtype == 0
                        else raw.astype(np.float16)
                        if dtype == 1
                        else (raw.view(np.uint32) >> 16).astype(np.uint16)
                    )
                    groups = -(-columns // group)
                    importance = draw.random((max(rows, 1) if ranged else 1, columns), np.float32).round(1)

                    def run(
                        threads: int,
                        weight: np.ndarray = weight,
                        dtype: int = dtype,
                        group: int = group,
                        ranged: bool = ranged,
                        importance: np.ndarray = importance,
                        shape: tuple[int, int, int] = (rows, columns, groups),
                    ) -> list[np.ndarray]:
                        rows, columns, groups = shape
                        scale = np.ones((3, rows, groups), np.float32)
                        zero = np.zeros((3, rows, groups), np.int8) if ranged else None
                        values = np.zeros((3, rows, columns), weight.dtype)
                        error, codes = np.zeros((3, rows)), np.zeros((3, rows, columns), np.int8)
                        taken = (at(weight), dtype, rows, columns, columns, group)
                        given = (taken, BITS)
                        by_importance = np.ones_like(scale)
                        weighted = targets_of(by_importance, zero, group), STEPS, (at(importance), len(importance))
                        assert native.scale_search_cpu(taken, *weighted, threads)
                        assert native.scale_search_cpu(taken, targets_of(scale, zero, group), STEPS, (0, 1), threads)
                        rated = np.zeros((3, rows, groups))
                        native.scale_errors_cpu(taken, (at(scale), 3, -8, 7), at(rated), threads)
                        formats = [(bits, group, at(scale[k]), zero_at(zero, k)) for k, bits in enumerate(BITS)]
                        native.fake_quant_cpu(taken, formats, at(values), at(error), threads)
                        native.quantize_cpu(taken, formats, at(codes), threads)
                        outputs = [scale, values, error, *([] if zero is None else [zero])]
                        again = [np.empty_like(x) for x in outputs]
                        at_zero = at(again[3]) if ranged else 0
                        addresses = (at(again[0]), at_zero, at(again[1]), at(again[2]))
                        native.quantize_weight_cpu(*given, STEPS, *addresses, threads)
                        assert all(x.tobytes() == y.tobytes() for x, y in zip(outputs, again, strict=True))
                        return [*outputs, codes, by_importance, rated]

                    yield run


def zero_at(zero: np.ndarray | None, k: int) -> int:
    return 0 if zero is None else at(zero[k])


def targets_of(scale: np.ndarray, zero: np.ndarray | None, group: int) -> list[tuple[int, ...]]:
    return [(bits, group, 0, 0, at(scale[k]), zero_at(zero, k)) for k, bits in enumerate(BITS)]


E2M1, E4M3, E5M2 = 16, 17, 18


def number_formats(
    native: ModuleType | AsNative, draw: np.random.Generator
) -> Iterator[Callable[[int], list[np.ndarray]]]:
    """Integers and floats of every rule in one list, blocks that end with the row and beyond it."""
    for rows, columns in ((1, 1), (3, 31), (2, 64), (1, 1029), (0, 4), *(((2, LONG),) if ON_CPU else ())):
        for dtype in (0, 1):
            for steps in (1, STEPS):
                raw = draw.standard_normal((rows, columns), np.float32)
                weight = raw if dtype == 0 else raw.astype(np.float16)
                importance = draw.random((1, columns), np.float32) if steps > 1 else None
                wanted = [
                    (4, columns, 0),
                    (E4M3, columns, 0),
                    (E5M2, 7, 0),
                    (E4M3, 32, 1),
                    (E2M1, 32, 1),
                    (E2M1, 16, 2),
                ]

                def run(
                    threads: int,
                    weight: np.ndarray = weight,
                    dtype: int = dtype,
                    steps: int = steps,
                    importance: np.ndarray | None = importance,
                    wanted: list[tuple[int, int, int]] = wanted,
                ) -> list[np.ndarray]:
                    rows, columns = weight.shape
                    scales = [np.ones((rows, -(-columns // group)), np.float32) for _, group, _ in wanted]
                    below = np.full(1, 300.0, np.float32)
                    targets, formats = [], []
                    for (element, group, rule), scale in zip(wanted, scales, strict=True):
                        targets.append((element, group, rule, at(below) if rule == 2 else 0, at(scale), 0))
                        formats.append((element, group, at(scale), 0))
                    values, codes = np.zeros((6, rows, columns), weight.dtype), np.zeros((6, rows, columns), np.int8)
                    error, taken = np.zeros((6, rows)), (at(weight), dtype, rows, columns, columns, columns)
                    assert native.scale_search_cpu(taken, targets, steps, (at(importance), 1), threads)
                    native.fake_quant_cpu(taken, formats, at(values), at(error), threads)
                    native.quantize_cpu(taken, formats, at(codes), threads)
                    return [*scales, values, error, codes]

                yield run


def packing(native: ModuleType | AsNative, draw: np.random.Generator) -> Iterator[Callable[[int], list[np.ndarray]]]:
    for bits in range(2, 9):
        for rows, columns in ((1, 1), (3, 31), (2, 32), (2, 33), (1, 16_385), (0, 5), (4, 0)):
            half = 2 ** (bits - 1)
            codes = draw.integers(-half, half, (rows, columns), np.int8)

            def run(threads: int, bits: int = bits, codes: np.ndarray = codes) -> list[np.ndarray]:
                words = np.zeros((codes.shape[0], -(-codes.shape[1] * bits // 32)), np.int32)
                back = np.zeros_like(codes)
                assert native.pack_cpu(at(codes), at(words), *codes.shape, bits, threads)
                native.unpack_cpu(at(words), at(back), *codes.shape, bits, threads)
                assert np.array_equal(back, codes)
                return [words]

            yield run


def losses(native: ModuleType | AsNative, draw: np.random.Generator) -> Iterator[Callable[[int], list[np.ndarray]]]:
    for perturbations, samples, classes in (
        (1, 1, 1),
        (3, 2, 15),
        (17, 3, 33),
        (33, 2, LONG // 20),
        (LONG // 40, 1, 700),
        (2, 0, 3),
    ):
        for double in (False, True):
            for size in (1e-3, 1.0, 50.0):
                kind = np.float64 if double else np.float32
                logits = (3 * draw.standard_normal((samples, classes))).astype(kind)
                delta = (size * draw.standard_normal((perturbations, samples, classes))).astype(kind)
                target = draw.integers(0, classes, samples, np.int64)

                def run(
                    threads: int,
                    logits: np.ndarray = logits,
                    delta: np.ndarray = delta,
                    target: np.ndarray = target,
                    double: bool = double,
                ) -> list[np.ndarray]:
                    n = delta.shape[0]
                    kl, ce = np.zeros(delta.shape[:2]), np.zeros(delta.shape[:2])
                    total, squares = np.zeros((n, n)), np.zeros((n, n))
                    changes = (at(logits), at(delta), *delta.shape, double)
                    native.batched_ce_cpu(changes, 0, at(kl), threads)
                    assert native.batched_ce_cpu(changes, at(target), at(ce), threads)
                    pairs = (at(delta), 0, n, *delta.shape, double)
                    native.pairwise_ce_cpu(pairs, (at(logits), 0, 1), at(total), at(squares), threads)
                    return [kl, ce, total, squares]

                yield run


def pairs(native: ModuleType | AsNative, draw: np.random.Generator) -> Iterator[Callable[[int], list[np.ndarray]]]:
    """Weighted rows in samples, and two sets of perturbations of ragged sizes."""
    for left, right, samples, per, classes in (
        (1, 1, 1, 1, 1),
        (3, 18, 2, 5, 7),
        (17, 2, 3, 2, 33),
        (65, 3, 1, 4, 16),
        (2, 1, 1, LONG // 10, 2),
    ):
        for double in (False, True):
            for blocks in (False, True):
                kind, rows = np.float64 if double else np.float32, samples * per
                logits = (3 * draw.standard_normal((rows, classes))).astype(kind)
                delta = draw.standard_normal((left, rows, classes)).astype(kind)
                other = draw.standard_normal((right, rows, classes)).astype(kind) if blocks else None
                weight = draw.integers(0, 3, rows) / 2.0

                def run(
                    threads: int,
                    logits: np.ndarray = logits,
                    delta: np.ndarray = delta,
                    other: np.ndarray | None = other,
                    weight: np.ndarray = weight,
                    per: int = per,
                    double: bool = double,
                ) -> list[np.ndarray]:
                    (left, rows, classes), right = delta.shape, len(delta if other is None else other)
                    elements = weight.repeat(classes).astype(delta.dtype)
                    sides, out = (at(delta), at(other), left, right), [np.zeros((left, right)) for _ in range(6)]
                    ce, bce, mse = (tuple(at(x) for x in out[i : i + 2]) for i in (0, 2, 4))
                    native.pairwise_ce_cpu((*sides, rows, classes, double), (at(logits), at(weight), per), *ce, threads)
                    singles, many = (*sides, rows * classes, 1, double), weight.repeat(classes)
                    native.pairwise_bce_cpu(singles, (at(logits), at(many), per * classes), *bce, threads)
                    whole = (*sides, rows // per, per * classes, double)
                    native.pairwise_mse_cpu(whole, at(elements), *mse, threads)
                    return out

                yield run


def carried(native: ModuleType | AsNative, draw: np.random.Generator) -> Iterator[Callable[[int], list[np.ndarray]]]:
    for streams, rows, columns in ((1, 1, 1), (2, 3, 33), (3, 2, 196), (2, 1, LONG // 20), (2, 0, 5)):
        for half_in in (False, True):
            for half_out in (False, True):
                clean = draw.standard_normal((rows, columns), np.float32)
                raw = np.float32(0.1) * draw.standard_normal((streams, rows, columns), np.float32)
                delta = (raw.view(np.uint32) >> 16).astype(np.uint16) if half_in else raw
                weight = np.ones(columns, np.float32)

                def run(
                    threads: int,
                    clean: np.ndarray = clean,
                    delta: np.ndarray = delta,
                    weight: np.ndarray = weight,
                    halves: tuple[bool, bool] = (half_in, half_out),
                ) -> list[np.ndarray]:
                    kind, weights = np.uint16 if halves[1] else np.float32, np.exp(clean)
                    gelu, norm = np.zeros(delta.shape, kind), np.zeros(delta.shape, kind)
                    soft = np.zeros((*delta.shape[:-1], 2 * delta.shape[-1]), kind)
                    streams = (*delta.shape, *halves)
                    native.carried_gelu_cpu(at(clean), at(delta), at(gelu), streams, threads)
                    native.carried_layer_norm_cpu(at(clean), at(delta), at(weight), at(norm), streams, 1e-5, threads)
                    native.carried_softmax_cpu(at(clean), at(weights), at(delta), at(soft), streams, 0.5, threads)
                    residual, total = np.ones(delta.shape, np.float32), np.zeros(delta.shape, np.float32)
                    added = np.zeros(delta.shape, kind)
                    addresses = (at(clean), at(residual), at(delta), at(weight), at(total), at(added))
                    native.carried_add_layer_norm_cpu(*addresses, streams, 1e-5, threads)
                    return [gelu, norm, soft, total, added]

                yield run


def compensation(
    native: ModuleType | AsNative, draw: np.random.Generator
) -> Iterator[Callable[[int], list[np.ndarray]]]:
    for rows, columns, group, factors in (
        (1, 1, 1, 1),
        (6, 9, 4, 3),
        (17, 33, 33, 1),
        (40, 150 if ON_CPU else 70, 1, 2),
        (0, 3, 3, 1),
    ):
        for dtype in (0, 1):
            for ranged in (False, True):
                raw = draw.standard_normal((rows, columns), np.float32)
                weight = raw if dtype == 0 else raw.astype(np.float16)
                factor = draw.standard_normal((factors, columns, columns), np.float32) / 8 + np.eye(
                    columns, dtype=np.float32
                )
                order = np.stack([draw.permutation(columns) for _ in range(factors)]) if ranged else None
                scale = np.full((3, rows, -(-columns // group)), 0.3, np.float32)
                zero = np.ones(scale.shape, np.int8) if ranged else None

                def run(
                    threads: int,
                    weight: np.ndarray = weight,
                    dtype: int = dtype,
                    group: int = group,
                    factor: np.ndarray = factor,
                    order: np.ndarray | None = order,
                    scale: np.ndarray = scale,
                    zero: np.ndarray | None = zero,
                ) -> list[np.ndarray]:
                    rows, columns = weight.shape
                    codes, loss = np.zeros((3, rows, columns), np.int8), np.zeros((3, rows))
                    taken = (
                        (at(weight), dtype, rows, columns, columns, group),
                        BITS,
                        (at(factor), at(order), len(factor), *(s // 4 for s in factor.strides)),
                    )
                    assert native.compensate_cpu(*taken, at(scale), at(zero), at(codes), at(loss), threads)
                    found = [codes, loss]
                    for element in (E2M1, E4M3, E5M2):
                        codes, loss = np.zeros((1, rows, columns), np.int8), np.zeros((1, rows))
                        places = at(scale), 0, at(codes), at(loss)
                        assert native.compensate_cpu(taken[0], [element], taken[2], *places, threads)
                        found += [codes, loss]
                    return found

                yield run


def programs(native: ModuleType | AsNative, draw: np.random.Generator) -> Iterator[Callable[[int], list[np.ndarray]]]:
    """Ragged layers, of one candidate to many; nothing here has a CUDA kernel."""
    for counts in ((1,), (3, 1, 8), (9, 2, 40), (64, 1), (5,) * 20) if ON_CPU else ():
        layers, size = len(counts), sum(counts)
        starts = np.concatenate([[0], np.cumsum(counts)])
        matrix = draw.standard_normal((size, size))
        matrix += matrix.T
        layer = np.repeat(np.arange(layers), counts)
        matrix[layer[:, None] == layer[None, :]] = 0
        matrix[np.diag_indices(size)] = 4
        rows = draw.integers(0, 100, (2, size))
        limits = np.full(2, 50 * layers)

        def run(
            threads: int,
            arrays: tuple[np.ndarray, ...] = (matrix, starts, rows, limits),
            shape: tuple[int, int, int] = (layers, 2, size),
        ) -> list[np.ndarray]:
            layers, budgets, size = shape
            program = (*(at(x) for x in arrays), layers, budgets)
            shift = max(0.0, -float(np.linalg.eigvalsh(arrays[0])[0]))
            quadratic, linear = arrays[0] + shift * np.eye(size), np.full(size, -shift / 2)
            multipliers, point, removed = np.zeros(budgets), np.zeros(size), np.zeros((size, size))
            choice, alive, outcome = np.full(layers, -1), np.zeros(size, np.uint8), np.zeros(3)
            found = native.iqp_search_cpu(program, at(choice), 1, 2000, 60.0, -np.inf)
            form = (at(quadratic), at(linear), at(multipliers), at(removed), at(point), 0.0, 1e-9)
            start = choice.copy() if found else np.full(layers, -1)
            native.iqp_prove_cpu(program, form, at(start), at(alive), at(outcome), 1e-6, 200, 60.0, threads)
            return [choice, start, alive, outcome]

        yield run


def settings(path: Path) -> tuple[ModuleType | AsNative, list[Callable[[], None]], tuple[int, ...]]:
    """The kernels, what sets each level or order of theirs, and the thread counts to try at each."""
    module = load(path)
    if ON_CPU:
        return module, [partial(module.set_simd, level) for level in range(module.simd_level() + 1)], THREADS
    return AsNative(module), [partial(module.set_order, order, 1) for order in ORDERS], (1,)


def main() -> None:
    native, levels, threads = settings(Path(sys.argv[1]).resolve())
    draw, count = np.random.default_rng(0), 0
    for family in (quantization, number_formats, packing, losses, pairs, carried, compensation, programs):
        for run in family(native, draw):
            first = None
            for level in levels:
                level()
                for thread_count in threads:
                    got = [x.tobytes() for x in run(thread_count)]
                    first = first or got
                    assert got == first, f"{family.__name__}: other bits by {level}, {thread_count} threads"
            count += 1
    print(f"{count} cases at {len(levels)} levels and {threads} threads: same bits, nothing out of bounds")


if __name__ == "__main__":
    main()
