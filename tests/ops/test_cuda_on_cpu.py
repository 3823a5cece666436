"""Every CUDA kernel without a GPU: run by tests/cuda_on_cpu on host memory and held against the CPU kernels.

It shows their logic (indices, barriers, shuffles, edges of every size), not their speed and not the memory model of a GPU.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import clado_ext
from clado_ext import _registry
from tests.cuda_on_cpu.build import AsNative, build, build_broken, load, translate
from tests.ops import test_batched_ce, test_carried, test_compensate, test_formats, test_pairwise_ce, test_scale_search
from tests.ops.devices import same_bits

FORWARD, BACKWARD, SHUFFLED = ORDERS = range(3)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def kernels() -> AsNative:
    return AsNative(load(build()))


@contextmanager
def on_cuda(kernels: AsNative, order: int = SHUFFLED) -> Iterator[None]:
    """The ops on CPU tensors run the CUDA kernels."""
    before = _registry._native
    kernels.module.set_order(order, 1)
    _registry._native = kernels  # type: ignore[assignment]
    try:
        yield
    finally:
        _registry._native = before


def in_every_order(kernels: AsNative, run: Callable[[], Any]) -> Any:
    """The result, which may not depend on the order of threads and blocks."""
    results = []
    for order in ORDERS:
        with on_cuda(kernels, order):
            results.append(run())
    assert same_bits(results[1], results[0])
    assert same_bits(results[2], results[0])
    return results[0]


def offset(x: Tensor, by: int) -> Tensor:
    """A contiguous copy whose address is ``by`` elements past an aligned one."""
    room = x.new_empty(x.numel() + by)
    return room[by:].view(x.shape).copy_(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("shape", "group_size", "bits"),
    [
        ((1, 1), -1, (2, 3, 4, 5, 6, 7, 8)),
        ((0, 5), -1, (4,)),
        ((5, 0), -1, (4,)),
        ((6,), -1, (8,)),
        ((3, 31), 7, (2, 4, 8)),
        ((9, 33), 1, (2, 8)),
        ((2, 1024), 32, (3, 5)),
        ((3, 1025), -1, (2, 4, 8)),
        ((2, 2056), 8, (4,)),
        ((3, 4, 3, 3), 12, (2, 4, 8)),
        ((2, 3000), 1100, (2, 8)),
        ((1, 9000), -1, (2, 3, 4, 5, 6, 7, 8)),
        ((2, 16_500), -1, (2, 8)),
        ((1, 500), 400, (3,)),
    ],
)
def test_quantization_is_that_of_the_cpu(
    shape: tuple[int, ...],
    group_size: int,
    bits: tuple[int, ...],
    symmetric: bool,
    dtype: torch.dtype,
    kernels: AsNative,
) -> None:
    for by in (0, 1):
        weight = offset(torch.randn(shape).to(dtype), by)

        def run(weight: Tensor = weight) -> tuple[Tensor, ...]:
            values, sqerr, scale, zero = clado_ext.quantize_weight(weight, bits, group_size, 7, symmetric)
            codes = clado_ext.quantize(weight, scale, bits, group_size, zero)
            return (values, sqerr, scale, codes, *([] if zero is None else [zero]))

        assert same_bits(in_every_order(kernels, run), run())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_lie_apart_are_read_in_place(dtype: torch.dtype, kernels: AsNative) -> None:
    whole = torch.randn(3, 1200).to(dtype)
    for part, group in product((slice(0, 1104), slice(8, 48), slice(3, 36)), (-1, 16)):
        view = whole[:, part]
        wanted = clado_ext.quantize_weight(view.contiguous(), (2, 8), group, 7)
        codes = clado_ext.quantize(view.contiguous(), wanted.scale, (2, 8), group)
        with on_cuda(kernels):
            got = clado_ext.quantize_weight(view, (2, 8), group, 7)
            assert same_bits(clado_ext.quantize(view, wanted.scale, (2, 8), group), codes)
        assert same_bits(got[:3], wanted[:3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "group", "formats"),
    [
        ((1, 1), -1, test_formats.MIXED),
        ((3, 31), 7, test_formats.MIXED),
        ((2, 1056), 32, ("int4", "fp8_e4m3", "nvfp4")),
        ((3, 128), -1, test_formats.MIXED),
        ((3, 64), 5, test_formats.MIXED * 2),
        ((1, 2060), -1, ("fp8_e5m2", "mxfp8", "mxfp4")),
        ((1, 17_000), -1, ("fp8_e4m3", "fp8_e5m2")),
        ((0, 5), -1, ("nvfp4",)),
    ],
)
def test_formats_are_those_of_the_cpu(
    shape: tuple[int, ...], group: int, formats: tuple[str, ...], dtype: torch.dtype, kernels: AsNative
) -> None:
    raw = torch.randn(shape)
    if shape[0] > 1:
        raw[0, 3:40], raw[1] = raw[0, 3:40] * 1e-4, 0.0
    importance = torch.rand(shape[1]) if shape[1] == 128 else None
    for by, steps in ((0, 1), (1, 12 if shape[1] > 9000 else 95)):
        weight = offset(raw.to(dtype), by)

        def run(weight: Tensor = weight, steps: int = steps) -> tuple[Tensor, ...]:
            scales = clado_ext.format_search(weight, formats, group, steps, False, importance)
            values = clado_ext.fake_quant_formats(weight, scales)
            return (*(s.scale for s in scales), *values, clado_ext.quantize_formats(weight, scales))

        with on_cuda(kernels):
            got = run()
        assert same_bits(got, run())


@pytest.mark.parametrize("name", test_formats.FLOATS)
def test_codes_of_every_pattern_are_those_of_the_cpu(name: str, kernels: AsNative) -> None:
    x = test_formats.every_pattern()[:, ::5]
    x = torch.cat([x, torch.tensor([[torch.nan, torch.inf, -torch.inf]])], 1)
    for scale in (1.0, 0.3, 1e-44, torch.nan):
        to = [clado_ext.FormatScale(name, torch.full((1, 1), scale))]
        wanted = clado_ext.quantize_formats(x, to), clado_ext.fake_quant_formats(x, to)[0].nan_to_num(nan=3.0)
        with on_cuda(kernels):
            got = clado_ext.quantize_formats(x, to), clado_ext.fake_quant_formats(x, to)[0].nan_to_num(nan=3.0)
        assert same_bits(got, wanted)


def test_all_steps_of_the_search(kernels: AsNative) -> None:
    for shape, search, steps in product(
        ((5, 700), (2, 1500), (1, 17_000)), (clado_ext.scale_search, clado_ext.range_search), (1, 95, 99)
    ):
        weight = torch.randn(shape) + torch.randint(0, 30, shape).eq(0) * 3  # a few far out
        wanted = search(weight, (2, 4, 8), -1, steps)
        for order in ORDERS if shape[1] < 9999 else (FORWARD,):
            with on_cuda(kernels, order):
                assert same_bits(search(weight, (2, 4, 8), -1, steps), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "group", "steps", "shared"),
    [
        ((1, 1), -1, 95, 1),
        ((6, 31), 7, 20, 3),
        ((4, 100), -1, 99, 4),
        ((2, 384), -1, 95, 1),
        ((2, 700), -1, 95, 2),
        ((4, 4, 3, 3), 12, 95, 2),
        ((2, 3000), 1100, 40, 1),
        ((2, 16_500), -1, 9, 2),
        ((1, 17_000), 16_500, 1, 1),
        ((0, 5), -1, 5, 1),
        ((5, 0), -1, 5, 5),
    ],
)
def test_a_search_by_importance_is_that_of_the_cpu(
    shape: tuple[int, ...], group: int, steps: int, shared: int, dtype: torch.dtype, kernels: AsNative
) -> None:
    weight = torch.randn(shape).to(dtype)
    weight[weight < -1.5] = 0
    columns = torch.Size(shape[1:]).numel()
    for importance in (
        test_scale_search.spread(shared, columns),
        torch.rand(shared, columns).square() * 2.0**127,
        torch.rand(shared, columns) * 2.0**-127,
        torch.where(weight.view(-1, columns)[:1] == 0, 3e38, 0.0) if columns and shape[0] else torch.zeros(columns),
        torch.ones(columns) if columns else torch.zeros(0),
    ):
        for search in test_scale_search.SEARCHES:

            def run(search: Callable[..., Any] = search, importance: Tensor = importance) -> Any:
                return search(weight, (2, 4, 8), group, steps, importance)

            assert same_bits(in_every_order(kernels, run), run())


def test_bad_importance_spoils_its_groups(kernels: AsNative) -> None:
    def search(weight: Tensor, importance: Tensor) -> Tensor:
        with on_cuda(kernels):
            return clado_ext.scale_search(weight, (2, 4), 8, 95, importance)

    test_scale_search.check_spoiled(search)
    weight, importance = torch.randn(2, 33_000), torch.rand(2, 33_000)
    importance[0, 20_000] = torch.nan
    with on_cuda(kernels, FORWARD):
        scale, zero = clado_ext.range_search(weight, (2,), -1, 2, importance)
    assert scale.isnan().flatten().tolist() == [True, False]
    assert not zero[0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_not_finite_or_all_zero_or_tiny(dtype: torch.dtype, kernels: AsNative) -> None:
    weight = torch.randn(7, 40).to(dtype)
    weight[1] = 0
    weight[2, 39], weight[3, 0], weight[4, 7] = torch.nan, torch.inf, -torch.inf
    weight[5] *= 1e-38
    weight[6] = torch.finfo(dtype).max
    for group, search in product((-1, 16), (clado_ext.scale_search, clado_ext.range_search)):

        def run(group: int = group, search: Callable[..., Any] = search) -> tuple[Tensor, ...]:
            found = search(weight, (2, 8), group, 20)
            scale, zero = found if isinstance(found, tuple) else (found, None)
            values, sqerr = clado_ext.fake_quant(weight, scale, (2, 8), group, zero)
            return tuple(x.nan_to_num(nan=3.0) for x in (scale, values, sqerr)) + (  # noqa: RUF005
                clado_ext.quantize(weight, scale, (2, 8), group, zero),
            )

        assert same_bits(in_every_order(kernels, run), run())


def test_every_half_is_read_and_written_as_on_the_cpu(kernels: AsNative) -> None:
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in DTYPES[1:]:
        weight = patterns.view(dtype).view(64, -1)
        scale = torch.logspace(-9, 4, 64, 2.0).view(1, 64, 1)
        wanted = clado_ext.fake_quant(weight, scale, (8,))[0]
        with on_cuda(kernels):
            got = clado_ext.fake_quant(weight, scale, (8,))[0]
        assert same_bits(got.nan_to_num(nan=3.0), wanted.nan_to_num(nan=3.0))


@settings(max_examples=300)
@given(
    columns=st.integers(1, 300),
    exponent=st.integers(-149, 127),
    half=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    ranged=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_codes_at_the_middle_of_steps_and_at_any_scale(
    columns: int, exponent: int, half: bool, dtype: torch.dtype, ranged: bool, seed: int, kernels: AsNative
) -> None:
    """Weights on and one rounding beside the middle of two steps, where a product with the inverse could go the other way."""
    torch.manual_seed(seed)
    scale = (1 + torch.rand(2, 3, 1)) * 2.0**exponent
    zero = torch.randint(-8, 8, scale.shape, dtype=torch.int8) if ranged else None
    steps = torch.randint(-300, 300, (3, columns)) + 0.5 * half
    weight = (steps * scale[0] * (1 + torch.randint(-1, 2, steps.shape) * 2.0**-23)).to(dtype)

    def run() -> tuple[Tensor, ...]:
        values, sqerr = clado_ext.fake_quant(weight, scale, (4, 8), zero_point=zero)
        codes = clado_ext.quantize(weight, scale, (4, 8), zero_point=zero)
        return values.nan_to_num(nan=3.0), sqerr.nan_to_num(nan=3.0), codes

    with on_cuda(kernels):
        got = run()
    assert same_bits(got, run())


@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 2200),
    group=st.integers(1, 1200),
    steps=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(
    rows: int, columns: int, group: int, steps: int, dtype: torch.dtype, symmetric: bool, seed: int, kernels: AsNative
) -> None:
    torch.manual_seed(seed)
    weight = (torch.randn(rows, columns) * torch.randn(rows, 1).exp()).to(dtype)

    def run() -> tuple[Tensor, ...]:
        found = clado_ext.quantize_weight(weight, (2, 5, 8), max(group, columns // 20), steps, symmetric)
        return tuple(x for x in found if x is not None)

    with on_cuda(kernels):
        got = run()
    assert same_bits(got, run())


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_is_that_of_the_cpu(bits: int, kernels: AsNative) -> None:
    half = 2 ** (bits - 1)
    for shape in [(1, 1), (5, 31), (3, 32), (4, 33), (7, 3), (2, 257), (0, 8), (4, 0), (1, 4096), (3, 2048), (2, 1100)]:
        codes = torch.randint(-half, half, shape, dtype=torch.int8)
        for by in (0, 1, 4):
            source = offset(codes, by)
            packed = in_every_order(kernels, lambda c=source: clado_ext.pack(c, bits))
            assert same_bits(packed, clado_ext.pack(codes, bits))
            words = offset(packed, by)
            assert same_bits(in_every_order(kernels, lambda w=words, n=shape[1]: clado_ext.unpack(w, bits, n)), codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranged", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "group", "factors"),
    [(1, 1, -1, 1), (3, 9, 4, 3), (45, 33, 5, 1), (24, 130, 1, 2), (2, 200, 64, 1), (8, 3, -1, 8)],
)
def test_compensation_is_that_of_the_cpu(
    rows: int, columns: int, group: int, factors: int, ranged: bool, dtype: torch.dtype, kernels: AsNative
) -> None:
    made = test_compensate.given_to(test_compensate.case(rows, columns, group, factors, ranged))
    made["weight"] = made["weight"].to(dtype)
    if ranged:
        made["order"] = torch.stack([torch.randperm(columns) for _ in range(factors)])

    def run() -> tuple[Tensor, ...]:
        return clado_ext.compensate(**made, bits=test_compensate.BITS, group_size=group)

    assert same_bits(in_every_order(kernels, run), run())


@pytest.mark.parametrize("name", test_compensate.FORMATS)
def test_compensation_of_formats_is_that_of_the_cpu(name: str, kernels: AsNative) -> None:
    made = test_compensate.case(45, 64)
    (scale,) = clado_ext.format_search(made["weight"], (name,), steps=5)
    given = made["weight"], made["factor"], scale, torch.randperm(64)[None]
    assert same_bits(
        in_every_order(kernels, lambda: clado_ext.compensate_format(*given)), clado_ext.compensate_format(*given)
    )


def test_compensation_at_its_edges(kernels: AsNative) -> None:
    with on_cuda(kernels):
        test_compensate.test_strides_and_what_lies_below_the_diagonal("cpu")
        test_compensate.test_what_is_not_finite_spoils_its_row_alone("cpu")
        outside = torch.tensor([[0, 1, 7, -1]])  # not looked for: no access, and the losses say it
        _, loss = clado_ext.compensate(torch.ones(6, 4), torch.eye(4)[None], torch.ones(1, 6, 1), (4,), order=outside)
    assert loss.isnan().all()


@pytest.mark.parametrize("size", [1e-4, 0.2, 1.0, 50.0])
@pytest.mark.parametrize("shape", [*test_batched_ce.SHAPES, (3, 3, 128), (2, 2, 1028), (1, 1, 4401), (2, 1, 4500)])
def test_losses_by_their_own_tests(shape: tuple[int, int, int], size: float, kernels: AsNative) -> None:
    for dtype in (torch.float32, torch.float64):
        logits, delta, target = test_batched_ce.case(shape, size, dtype, "cpu")
        for y in (None, target):
            in_every_order(kernels, lambda z=logits, d=delta, y=y: clado_ext.batched_ce(z, offset(d, 1), y))
        with on_cuda(kernels):
            test_batched_ce.test_matches_oracle(shape, size, dtype, "cpu")


def test_losses_at_their_edges(kernels: AsNative) -> None:
    with on_cuda(kernels):
        for size in (1e-3, 1e-5, 1e-8):
            test_batched_ce.test_tiny_changes_lose_nothing(size, "cpu")
        test_batched_ce.test_classes_at_minus_infinity_and_nan("cpu")
        inside = clado_ext.batched_ce(torch.zeros(3, 4), torch.zeros(1, 3, 4), torch.tensor([0, 4, -1])).isnan()
    assert inside.tolist() == [[False, True, True]]


@pytest.mark.parametrize("shape", [*test_pairwise_ce.SHAPES, (131, 2, 40), (65, 7, 19)])
def test_interactions_by_their_own_tests(shape: tuple[int, int, int], kernels: AsNative) -> None:
    for dtype in (torch.float32, torch.float64):
        logits, delta = test_pairwise_ce.case(shape, 0.3, dtype)
        in_every_order(kernels, lambda z=logits, d=delta: clado_ext.pairwise_ce(z, d))
    with on_cuda(kernels):
        for size in (1e-4, 1e-2, 1.0):
            test_pairwise_ce.test_float32_matches_the_definition(shape, size, "cpu")
            test_pairwise_ce.test_float64_matches_the_definition(shape, size, "cpu")


def test_interactions_of_more_samples_than_slices(kernels: AsNative) -> None:
    """A thread block goes through several samples: what one leaves in shared memory may not reach the next."""
    logits, delta = test_pairwise_ce.case((1, 2200, 5), 0.3, torch.float32)
    total, squares = in_every_order(kernels, lambda: clado_ext.pairwise_ce(logits, delta))
    wanted, wanted_squares = clado_ext.pairwise_ce(logits, delta)
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(squares, wanted_squares, rtol=1e-5, atol=1e-6)


def test_interactions_at_their_edges(kernels: AsNative) -> None:
    with on_cuda(kernels):
        test_pairwise_ce.test_nan_stays_in_its_rows_and_masked_classes_do_not_count("cpu")
        test_pairwise_ce.test_large_changes_stay_finite_and_right()


@pytest.mark.parametrize("op", test_carried.OPS)
def test_carried_differences_by_their_own_tests(op: Callable[..., Any], kernels: AsNative) -> None:
    for dtype, half in product((torch.float32, torch.bfloat16), (False, True)):
        for shape in test_carried.SHAPES:
            x, d = test_carried.case(shape, 0.1, dtype, "cpu")
            in_every_order(kernels, lambda x=x, d=d, half=half: op(x, d, half)[0])
        with on_cuda(kernels):
            for size in (1e-5, 0.3, 5.0):
                test_carried.test_matches_the_definition(op, size, dtype, half, "cpu")
    with on_cuda(kernels):
        test_carried.test_softmax_gives_itself_beside_the_change_and_may_go_far("cpu")
        test_carried.test_nan_stays_in_its_row(op, "cpu")


def test_what_is_not_understood_is_refused() -> None:
    assert translate("__shared__ T a[2][n + 1], b;") == "static T a[2][n + 1], b; cuda_on_cpu::share(a, b);"
    launch = translate("f<T, 4><<<grid(n), dim3(32, 8), 0, queue>>>(\n    x, g(y));")
    assert launch.startswith('cuda_on_cpu::configure(grid(n), dim3(32, 8), 0, queue).run("f<T, 4>", [](auto... a)')
    assert launch.endswith("{ f<T, 4>(a...); }, \n    x, g(y));")
    with pytest.raises(ValueError, match="a launch is not understood"):
        translate("kernels[0]<<<1, 1>>>(x);")


@pytest.fixture(scope="module")
def broken() -> Callable[[str, int], subprocess.CompletedProcess]:
    program = build_broken()
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}

    def run(kernel: str, order: int) -> subprocess.CompletedProcess:
        return subprocess.run(
            [program, kernel, str(order)], env=environment, capture_output=True, text=True, check=False
        )

    return run


def test_a_right_kernel_passes_and_a_missing_barrier_shows(broken: Callable[..., Any]) -> None:
    right = {broken("reverse", order).stdout.split()[0] for order in ORDERS}
    assert right == {"95"}
    assert len({broken("missing_barrier", order).stdout for order in ORDERS}) > 1
    assert "nan" in broken("missing_barrier", FORWARD).stdout


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("early_end", "thread (0, 0, 0) waits at __syncthreads in line 23 while thread (70, 0, 0) has ended"),
        ("two_barriers", "waits at __syncthreads in line 28 while thread (64, 0, 0) waits at __syncthreads in line 30"),
        ("part_of_a_warp", "waits at __shfl_xor_sync in line 35 while thread (31, 0, 0) has ended"),
        ("beyond_the_end", "heap-buffer-overflow"),
        ("beyond_shared", "index 96 out of bounds for type 'float [96]'"),
        ("misaligned", "misaligned address"),
    ],
)
def test_broken_kernels_are_caught(kernel: str, message: str, order: int, broken: Callable[..., Any]) -> None:
    done = broken(kernel, order)
    assert done.returncode != 0
    assert message in done.stderr
