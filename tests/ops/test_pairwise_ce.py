"""pairwise_ce against the second difference of losses in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import clado_ext
from clado_ext.reference import pairwise_ce as oracle
from tests.ops.devices import DEVICES, at_every_cpu_setting, same_bits
from tests.ops.pairs import DENSE, check_blocks, check_op, check_order, check_spoiled, drawn_weight

SHAPES = [
    (1, 1, 1),
    (2, 1, 2),
    (3, 5, 10),
    (7, 4, 31),
    (16, 3, 33),
    (17, 5, 100),
    (33, 2, 1000),
    (150, 2, 50),
    (4, 0, 5),
    (70, 3, 129),
]


def case(
    shape: tuple[int, int, int], size: float, dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    v, n, c = shape
    return 3 * torch.randn(n, c, dtype=dtype, device=device), size * torch.randn(v, n, c, dtype=dtype, device=device)


def scale_of(logits: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Σ_n of what a_vw is made of: sqrt(E_p[u_v²] E_p[u_w²]), times the slope e^-a of the logarithm; float64 ``[V, V]``."""
    p, d = logits.double().softmax(-1), delta.double()
    u = torch.expm1(d - (logits.double().log_softmax(-1) + d).logsumexp(-1, keepdim=True))
    norm = (p * u * u).sum(-1).sqrt()
    return torch.einsum("vn,wn,vwn->vw", norm, norm, torch.exp(-oracle.interactions(logits, delta)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_matches_the_definition(shape: tuple[int, int, int], size: float, device: str) -> None:
    logits, delta = case(shape, size, torch.float32, device)
    total, squares = clado_ext.pairwise_ce(logits, delta)
    wanted, wanted_squares = oracle.pairwise_ce(logits, delta)
    # A float32 product of rows with entries rounded to about 2 ulp: below 1e-6 of the rows' norms. The oracle's second
    # difference of losses rounds at 1e-15.
    scale = scale_of(logits, delta) if len(logits) else torch.zeros_like(total)
    assert ((total - wanted).abs() <= 1e-6 * scale + 2e-14).all()
    torch.testing.assert_close(squares, wanted_squares, rtol=1e-4, atol=float(1e-6 * scale.square().sum()) + 1e-18)
    assert torch.equal(total, total.T)
    assert torch.equal(squares, squares.T)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1e-2, 1.0, 10.0])
@pytest.mark.parametrize("shape", SHAPES[:7])
def test_float64_matches_the_definition(shape: tuple[int, int, int], size: float, device: str) -> None:
    logits, delta = case(shape, size, torch.float64, device)
    total, squares = clado_ext.pairwise_ce(logits, delta)
    a = oracle.interactions(logits, delta) if shape[1] else torch.zeros(shape[0], shape[0], 0, dtype=torch.float64)
    floored = (a < -15).any(-1)  # below log(2^-24) the kernel clamps
    wanted, wanted_squares = oracle.pairwise_ce(logits, delta)
    torch.testing.assert_close(total[~floored], wanted[~floored], rtol=1e-8, atol=1e-12 * (1 + size))
    torch.testing.assert_close(squares[~floored], wanted_squares[~floored], rtol=1e-8, atol=1e-12 * (1 + size))


def test_large_changes_stay_finite_and_right() -> None:
    logits, delta = case((9, 4, 50), 0.1, torch.float32)
    delta[:, :, 3] += 60  # one class takes all: a = -log p_3 but for what the small changes add
    total, squares = clado_ext.pairwise_ce(logits, delta)
    torch.testing.assert_close(total, oracle.pairwise_ce(logits, delta)[0], rtol=1e-5, atol=1e-5)
    logits, delta = case((9, 4, 50), 1e4, torch.float32)
    total, squares = clado_ext.pairwise_ce(logits, delta)
    assert total.isfinite().all()
    assert squares.isfinite().all()


@given(v=st.integers(1, 40), n=st.integers(1, 4), c=st.integers(1, 60), seed=st.integers(0, 2**31))
def test_properties(v: int, n: int, c: int, seed: int) -> None:
    """Permuting the perturbations permutes the result exactly; a constant added to δ changes nothing but rounding."""
    torch.manual_seed(seed)
    logits, delta = case((v, n, c), 0.1, torch.float32)
    total, squares = clado_ext.pairwise_ce(logits, delta)
    order = torch.randperm(v)
    again = clado_ext.pairwise_ce(logits, delta[order])
    assert same_bits(again, (total[order][:, order], squares[order][:, order]))
    shifted, _ = clado_ext.pairwise_ce(logits, delta + torch.randn(v, n, 1))
    torch.testing.assert_close(shifted, total, rtol=0, atol=3e-6 * float(n + total.abs().max()))


def test_same_bits_at_every_simd_level_and_thread_count() -> None:
    logits, delta = case((37, 5, 300), 0.3, torch.float32)
    results = at_every_cpu_setting(lambda: clado_ext.pairwise_ce(logits, delta))
    assert all(same_bits(r, results[0]) for r in results)


def test_many_samples_go_through_the_workspace_in_parts() -> None:
    logits, delta = case((20, 300, 900), 0.2, torch.float32)  # 300 panels of 115 kB each do not fit at once
    total, squares = clado_ext.pairwise_ce(logits, delta)
    parts = [clado_ext.pairwise_ce(logits[k : k + 50], delta[:, k : k + 50]) for k in range(0, 300, 50)]
    torch.testing.assert_close(total, sum(p[0] for p in parts), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(squares, sum(p[1] for p in parts), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_in_its_rows_and_masked_classes_do_not_count(device: str) -> None:
    logits, delta = case((20, 3, 15), 0.5, torch.float32, device)
    logits[:, 11:] = -torch.inf
    clean, _ = clado_ext.pairwise_ce(logits, delta)
    fewer, _ = clado_ext.pairwise_ce(logits[:, :11], delta[..., :11])
    torch.testing.assert_close(clean, fewer, rtol=1e-5, atol=1e-8)
    delta[4, 1, 2] = torch.nan
    delta[18, 0, 0] = torch.inf
    total, squares = clado_ext.pairwise_ce(logits, delta)
    spoiled = torch.zeros(20, dtype=torch.bool, device=device)
    spoiled[[4, 18]] = True
    mask = spoiled[:, None] | spoiled[None, :]
    assert total.isnan().equal(mask)
    assert squares.isnan().equal(mask)
    assert torch.equal(total[~mask], clean[~mask])


@pytest.mark.parametrize("device", DEVICES)
def test_strides_and_op(device: str) -> None:
    logits, delta = case((5, 4, 9), 1.0, torch.float32, device)
    strided = delta.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert same_bits(clado_ext.pairwise_ce(logits, strided), clado_ext.pairwise_ce(logits, delta))
    torch.library.opcheck(torch.ops.clado.pairwise_ce.default, (logits, delta, None, 1, None))
    compiled = torch.compile(lambda z, d: clado_ext.pairwise_ce(z, d)[0] * 2, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(logits, delta), clado_ext.pairwise_ce(logits, delta)[0] * 2)
    assert clado_ext.pairwise_ce(logits, delta[:0])[0].shape == (0, 0)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"pairwise_ce: delta must have shape \[V, 3, 4\]"):
        clado_ext.pairwise_ce(torch.zeros(3, 4), torch.zeros(3, 4))
    logits, delta = case((3, 6, 4), 1.0, torch.float32)
    for change, text in (
        ({"weight": torch.ones(5)}, r"weight must have shape \[6\], got \(5,\)"),
        ({"weight": torch.ones(6, dtype=torch.int8)}, "weight must be a floating-point tensor, got torch.int8"),
        ({"rows_per_sample": 4}, "rows_per_sample must be at least 1 and divide the 6 rows, got 4"),
        ({"rows_per_sample": 0}, "rows_per_sample must be at least 1 and divide the 6 rows, got 0"),
        ({"other": delta[0]}, r"other must have shape \[W, 6, 4\], got \(6, 4\)"),
        ({"other": delta.double()}, "other must be torch.float32 as the logits, got torch.float64"),
    ):
        with pytest.raises(ValueError, match=f"^pairwise_ce: {text}$"):
            clado_ext.pairwise_ce(logits, delta, **change)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", DENSE)
def test_rows_weights_and_blocks_match_the_definition(shape: tuple[int, int | None, int, int], device: str) -> None:
    v, w, samples, rows = shape
    for dtype, weighted in ((torch.float32, True), (torch.float32, False), (torch.float64, True)):
        logits, delta = case((v + (w or 0), samples * rows, 7), 0.3, dtype, device)
        delta, other = delta[:v], delta[v:] if w else None
        weight = drawn_weight((samples * rows,), device) if weighted else None
        got = clado_ext.pairwise_ce(logits, delta, weight, rows, other)
        # As for single rows: 1e-6 of the rows' norms, which lie below 0.3² here. The oracle rounds at 1e-15.
        size = 4 / 3 * 0.1 * max(samples * rows, 1) * (1e-6 if dtype == torch.float32 else 1e-12)
        for x, y, slope in zip(got, oracle.pairwise_ce(logits, delta, weight, rows, other), (1, rows), strict=True):
            torch.testing.assert_close(x, y, rtol=2e-6, atol=size * slope)


def test_rows_of_weight_zero_count_nothing_whatever_they_hold() -> None:
    logits, delta = case((18, 12, 5), 0.3, torch.float32)
    weight = drawn_weight((12,))
    weight[[0, 4, 5, 11]] = 0
    clean = clado_ext.pairwise_ce(logits, delta, weight, 3)
    logits[0], logits[4], delta[:, 5], delta[2, 11] = torch.nan, torch.inf, torch.nan, torch.inf
    assert same_bits(clado_ext.pairwise_ce(logits, delta, weight, 3), clean)
    assert not clado_ext.pairwise_ce(logits, delta, torch.zeros(12), 3)[0].any()


def test_blocks_order_and_what_is_not_finite_over_rows() -> None:
    logits, delta = case((40, 12, 5), 0.5, torch.float32)
    weight = drawn_weight((12,)) + 0.5
    for rows in (1, 4):
        for check in (check_blocks, check_order, check_spoiled):
            check(lambda d, o, rows=rows: clado_ext.pairwise_ce(logits, d, weight, rows, o), delta)


def test_a_sample_goes_through_the_workspace_in_parts() -> None:
    """As many rows as fit in the cache come together, however many a sample has; classes are sliced too."""
    for shape, rows in (((20, 600, 900), 200), ((2, 2, 300_000), 2)):
        logits, delta = case(shape, 0.2, torch.float32)
        single = [clado_ext.pairwise_ce(logits[k : k + 1], delta[:, k : k + 1])[0] for k in range(shape[1])]
        a = torch.stack(single).view(-1, rows, *single[0].shape).sum(1)
        total, squares = clado_ext.pairwise_ce(logits, delta, None, rows)
        torch.testing.assert_close(total, a.sum(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(squares, a.square().sum(0), rtol=1e-12, atol=1e-12)


def test_rows_have_the_same_bits_at_every_setting() -> None:
    logits, delta = case((37, 12, 21), 0.3, torch.float32)
    weight = drawn_weight((12,))
    results = at_every_cpu_setting(lambda: clado_ext.pairwise_ce(logits, delta[:20], weight, 4, delta[20:]))
    assert all(same_bits(r, results[0]) for r in results)


@pytest.mark.parametrize("device", DEVICES)
def test_every_argument_through_the_dispatcher(device: str) -> None:
    logits, delta = case((5, 4, 9), 1.0, torch.float32, device)
    arguments = (logits, delta[:2], drawn_weight((4,), device), 2, delta[2:])
    check_op(torch.ops.clado.pairwise_ce.default, clado_ext.pairwise_ce, arguments)
    halves = [x.bfloat16() if isinstance(x, torch.Tensor) else x for x in arguments]
    floats = [x.float() if isinstance(x, torch.Tensor) else x for x in halves]
    assert same_bits(clado_ext.pairwise_ce(*halves), clado_ext.pairwise_ce(*floats))
