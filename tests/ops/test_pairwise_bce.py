"""pairwise_bce against the second difference of losses in float64, and of 60 digits where float64 has too few."""

import math
from decimal import Decimal, localcontext
from itertools import combinations_with_replacement

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import clado_ext
from clado_ext.reference import pairwise_bce as oracle
from tests.ops.devices import DEVICES, at_every_cpu_setting, same_bits
from tests.ops.pairs import DENSE, check_blocks, check_op, check_order, check_spoiled, drawn_weight


def case(v: int, rows: int, size: float, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(rows, dtype=dtype, device=device), size * torch.randn(v, rows, dtype=dtype, device=device)


def exact(z: float, left: float, right: float) -> float:
    """L(z+δ_v+δ_w) - L(z+δ_v) - L(z+δ_w) + L(z) with L(z) = log(1 + e^z), by 60 digits."""
    with localcontext() as context:
        context.prec = 60 + int((abs(z) + abs(left) + abs(right)) / 2)  # e^z of them are lost beside the 1
        logits, one = Decimal(z), Decimal(1)

        def loss(x: Decimal) -> Decimal:
            return (one + x.exp()).ln()

        v, w = Decimal(left), Decimal(right)
        return float(loss(logits + v + w) - loss(logits + v) - loss(logits + w) + loss(logits))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1e-3, 0.3, 3.0])
@pytest.mark.parametrize("shape", DENSE)
def test_matches_the_definition(shape: tuple[int, int | None, int, int], size: float, device: str) -> None:
    v, w, samples, rows = shape
    for dtype, weighted in ((torch.float32, True), (torch.float32, False), (torch.float64, True)):
        logits, delta = case(v + (w or 0), samples * rows, size, dtype, device)
        delta, other = delta[:v], delta[v:] if w else None
        weight = drawn_weight((samples * rows,), device) if weighted else None
        got = clado_ext.pairwise_bce(logits, delta, weight, rows, other)
        # Each row is right to about 1e-6 of itself, or of 1 where 1 + s_v s_w cancels; a sum to that of its largest rows.
        a = oracle.interactions(logits, delta, other).abs()
        scale = oracle.sums(a * a.exp(), weight, rows)
        close = 1e-6 if dtype == torch.float32 else 1e-12
        for x, y, of in zip(got, oracle.pairwise_bce(logits, delta, weight, rows, other), scale, strict=True):
            assert (
                (x - y).abs() <= close * 2 * of + 1e-14 * max(samples * rows, 1)
            ).all()  # the oracle rounds at 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relatively_accurate_for_tiny_changes_saturated_logits_and_large_changes(dtype: torch.dtype) -> None:
    double = dtype == torch.float64
    delta = torch.tensor([1e-9, -1e-5, -0.7, 5.0, -20.0, 80.0, -160.0, *([290.0] if double else [])], dtype=dtype)
    for z in (0.0, 1.5, -9.0, 30.0, -80.0, 120.0, *([-250.0] if double else [])):
        total, _ = clado_ext.pairwise_bce(torch.tensor([z], dtype=dtype), delta[:, None])
        for (i, left), (j, right) in combinations_with_replacement(enumerate(delta.tolist()), 2):
            wanted = exact(z, left, right)
            if (
                abs(wanted) < 1e-36 or wanted < -14 or (wanted > 87 and not double)
            ):  # denormal, near the floor, above the cap
                continue
            # s to 5 ulp each, log1p to 3; where 1 + s_v s_w is small, what is lost of the product weighs as much more.
            slack = (4e-15 if double else 1e-6) * max(abs(wanted), math.expm1(-wanted))
            assert abs(total[i, j].item() - wanted) <= slack, (z, left, right)


def test_edges() -> None:
    inf, nan = torch.inf, torch.nan
    delta = torch.tensor([[0.3], [-400.0], [0.0]])
    for z, finite in ((inf, True), (-inf, True), (nan, False)):
        total, squares = clado_ext.pairwise_bce(torch.tensor([z]), delta)
        assert total.isfinite().all().item() is finite
        assert (not finite) or (not total.any() and not squares.any())  # a certain element adds nothing
    total, _ = clado_ext.pairwise_bce(torch.tensor([0.0]), torch.tensor([[200.0], [-200.0]]))
    assert total[0, 1].item() == pytest.approx(-16.6, abs=0.05)  # the floor
    total, _ = clado_ext.pairwise_bce(torch.tensor([150.0]), torch.tensor([[-170.0], [0.0]]))
    assert total[0, 0].item() == pytest.approx(87.3, abs=0.1)  # the cap
    assert not total[1].any()
    assert not clado_ext.pairwise_bce(torch.randn(4), torch.zeros(3, 4), None, 2)[0].any()


def test_two_classes_are_the_same_by_pairwise_ce() -> None:
    logits, delta = case(19, 30, 0.5, torch.float32)
    both = clado_ext.pairwise_ce(
        torch.stack([torch.zeros(30), logits], -1), torch.stack([0 * delta, delta], -1), None, 5
    )
    torch.testing.assert_close(clado_ext.pairwise_bce(logits, delta, None, 5), both, rtol=2e-5, atol=1e-6)


def test_rows_of_weight_zero_count_nothing_whatever_they_hold() -> None:
    logits, delta = case(18, 12, 0.3, torch.float32)
    weight = drawn_weight((12,))
    weight[[0, 4, 5, 11]] = 0
    clean = clado_ext.pairwise_bce(logits, delta, weight, 3)
    logits[0], logits[4], delta[:, 5], delta[2, 11] = torch.nan, torch.inf, torch.nan, torch.inf
    assert same_bits(clado_ext.pairwise_bce(logits, delta, weight, 3), clean)


@given(v=st.integers(3, 40), samples=st.integers(1, 3), rows=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_properties(v: int, samples: int, rows: int, seed: int) -> None:
    """Blocks, order and what is not finite, exactly; turning logits and changes over changes nothing; a flat δ is linear loss."""
    torch.manual_seed(seed)
    logits, delta = case(v, samples * rows, 0.5, torch.float32)
    weight = drawn_weight((samples * rows,)) + 0.5
    for check in (check_blocks, check_order, check_spoiled):
        check(lambda d, o: clado_ext.pairwise_bce(logits, d, weight, rows, o), delta)
    turned = clado_ext.pairwise_bce(-logits, -delta, weight, rows)
    assert same_bits(turned, clado_ext.pairwise_bce(logits, delta, weight, rows))


def test_a_sample_goes_through_the_workspace_in_slices() -> None:
    logits, delta = case(5, 3 * 30_001, 0.4, torch.float32)
    total, squares = clado_ext.pairwise_bce(logits, delta, None, 30_001)
    a = torch.stack(
        [oracle.interactions(z, d).sum(-1) for z, d in zip(logits.split(30_001), delta.split(30_001, 1), strict=True)]
    )
    torch.testing.assert_close(total, a.sum(0), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(squares, a.square().sum(0), rtol=2e-6, atol=1e-2)


def test_same_bits_at_every_simd_level_and_thread_count() -> None:
    logits, delta = case(37, 3 * 1111, 0.4, torch.float32)
    weight = drawn_weight((3 * 1111,))
    results = at_every_cpu_setting(lambda: clado_ext.pairwise_bce(logits, delta[:20], weight, 1111, delta[20:]))
    assert all(same_bits(r, results[0]) for r in results)


@pytest.mark.parametrize("device", DEVICES)
def test_strides_halves_and_op(device: str) -> None:
    logits, delta = case(5, 12, 1.0, torch.float32, device)
    weight = drawn_weight((12,), device)
    strided = delta.T.contiguous().T
    assert same_bits(clado_ext.pairwise_bce(logits, strided), clado_ext.pairwise_bce(logits, delta))
    half, changed = logits.half(), delta.half()
    assert same_bits(clado_ext.pairwise_bce(half, changed), clado_ext.pairwise_bce(half.float(), changed.float()))
    check_op(torch.ops.clado.pairwise_bce.default, clado_ext.pairwise_bce, (logits, delta[:2], weight, 4, delta[2:]))


def test_bad_input() -> None:
    logits, delta = case(3, 6, 1.0, torch.float32)
    for change, text in (
        ({"logits": logits[:, None]}, r"logits must have shape \[R\], got \(6, 1\)"),
        ({"logits": logits.int()}, "logits must be a floating-point tensor, got torch.int32"),
        ({"delta": delta[0]}, r"delta must have shape \[V, 6\], got \(6,\)"),
        ({"weight": torch.ones(5)}, r"weight must have shape \[6\], got \(5,\)"),
        ({"rows_per_sample": 4}, "rows_per_sample must be at least 1 and divide the 6 rows, got 4"),
        ({"other": delta.double()}, "other must be torch.float32 as the logits, got torch.float64"),
    ):
        with pytest.raises(ValueError, match=f"^pairwise_bce: {text}$"):
            clado_ext.pairwise_bce(**{"logits": logits, "delta": delta} | change)
