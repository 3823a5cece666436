"""pairwise_mse against products in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import clado_ext
from clado_ext.reference import pairwise_mse as oracle
from tests.ops.devices import DEVICES, at_every_cpu_setting, same_bits
from tests.ops.pairs import DENSE, check_blocks, check_op, check_order, check_spoiled, drawn_weight


def norms(delta: Tensor, weight: Tensor | None) -> Tensor:
    """sqrt(2 Σ weight δ²) of each perturbation and sample, float64 ``[V, N]``."""
    d = delta.double().square()
    return (2 * (d if weight is None else d * weight.double()).sum(-1)).sqrt()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [*DENSE, (33, None, 1, 5000)])
def test_matches_the_definition(shape: tuple[int, int | None, int, int], device: str) -> None:
    v, w, samples, elements = shape
    for dtype, weighted in ((torch.float32, True), (torch.float32, False), (torch.float64, True)):
        delta = torch.randn(v + (w or 0), samples, elements, dtype=dtype, device=device)
        delta, other = delta[:v], delta[v:] if w else None
        weight = drawn_weight((samples, elements), device) if weighted else None
        total, squares = clado_ext.pairwise_mse(delta, weight, other)
        wanted, wanted_squares = oracle.pairwise_mse(delta, weight, other)
        # 128 products meet in float32 and roots of weights are rounded: below 1e-6 of the norms of what is multiplied.
        sizes = torch.einsum("vn,wn->vwn", norms(delta, weight), norms(delta if other is None else other, weight))
        close = 1e-6 if dtype == torch.float32 else 1e-14
        assert ((total - wanted).abs() <= close * sizes.sum(-1)).all()
        assert ((squares - wanted_squares).abs() <= 3 * close * sizes.square().sum(-1)).all()


def test_sums_of_many_elements_keep_their_digits() -> None:
    """The diagonal adds a million positive products: in float32 alone it would be off by 1e-5 or more."""
    delta = 1 + torch.rand(2, 1, 2**20 + 3)
    total, _ = clado_ext.pairwise_mse(delta)
    torch.testing.assert_close(total, oracle.pairwise_mse(delta)[0], rtol=1e-7, atol=0)


def test_elements_of_weight_zero_count_nothing_whatever_they_hold() -> None:
    delta, weight = torch.randn(18, 3, 40), drawn_weight((3, 40))
    weight[0, 3], weight[2, 39] = 0, 0
    clean = clado_ext.pairwise_mse(delta, weight)
    delta[:, 0, 3], delta[4, 2, 39] = torch.nan, torch.inf
    assert same_bits(clado_ext.pairwise_mse(delta, weight), clean)


@given(v=st.integers(3, 40), samples=st.integers(1, 4), elements=st.integers(1, 60), seed=st.integers(0, 2**31))
def test_properties(v: int, samples: int, elements: int, seed: int) -> None:
    """Blocks, order and what is not finite, exactly; a power of two in the weight scales exactly, samples add."""
    torch.manual_seed(seed)
    delta, weight = torch.randn(v, samples, elements), drawn_weight((samples, elements)) + 0.5
    for check in (check_blocks, check_order, check_spoiled):
        check(lambda d, o: clado_ext.pairwise_mse(d, weight, o), delta)
    total, squares = clado_ext.pairwise_mse(delta, weight)
    assert same_bits(clado_ext.pairwise_mse(delta, weight / 4), (total / 4, squares / 16))
    single = [clado_ext.pairwise_mse(delta[:, n : n + 1], weight[n : n + 1]) for n in range(samples)]
    torch.testing.assert_close(total, sum(x[0] for x in single), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(squares, sum(x[0].square() for x in single), rtol=1e-12, atol=1e-12)


def test_a_sample_goes_through_the_workspace_in_slices() -> None:
    delta, weight = torch.randn(20, 3, 30_001), drawn_weight((3, 30_001))
    total, squares = clado_ext.pairwise_mse(delta, weight)
    wanted, wanted_squares = oracle.pairwise_mse(delta, weight)
    torch.testing.assert_close(total, wanted, rtol=0, atol=1e-7 * wanted.max().item())
    torch.testing.assert_close(squares, wanted_squares, rtol=0, atol=2e-7 * wanted_squares.max().item())


def test_same_bits_at_every_simd_level_and_thread_count() -> None:
    delta, weight = torch.randn(37, 3, 2222), drawn_weight((3, 2222))
    results = at_every_cpu_setting(lambda: clado_ext.pairwise_mse(delta[:20], weight, delta[20:]))
    assert all(same_bits(r, results[0]) for r in results)
    results = at_every_cpu_setting(lambda: clado_ext.pairwise_mse(delta))
    assert all(same_bits(r, results[0]) for r in results)


@pytest.mark.parametrize("device", DEVICES)
def test_strides_halves_and_op(device: str) -> None:
    delta, weight = torch.randn(5, 2, 9, device=device), drawn_weight((2, 9), device)
    strided = delta.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert same_bits(clado_ext.pairwise_mse(strided), clado_ext.pairwise_mse(delta))
    half = delta.bfloat16()
    assert same_bits(
        clado_ext.pairwise_mse(half, weight.half()), clado_ext.pairwise_mse(half.float(), weight.half().float())
    )
    check_op(torch.ops.clado.pairwise_mse.default, clado_ext.pairwise_mse, (delta[:2], weight, delta[2:]))


def test_bad_input() -> None:
    delta = torch.zeros(3, 2, 4)
    for change, text in (
        ({"delta": delta[0]}, r"delta must have shape \[V, N, M\], got \(2, 4\)"),
        ({"delta": delta.int()}, "delta must be a floating-point tensor, got torch.int32"),
        ({"delta": delta[..., :0]}, r"delta must have at least one element per sample, got \(3, 2, 0\)"),
        ({"weight": torch.ones(2, 3)}, r"weight must have shape \[2, 4\], got \(2, 3\)"),
        ({"other": delta.double()}, "other must be torch.float32 as delta, got torch.float64"),
        ({"other": delta[0]}, r"other must have shape \[W, 2, 4\], got \(2, 4\)"),
    ):
        with pytest.raises(ValueError, match=f"^pairwise_mse: {text}$"):
            clado_ext.pairwise_mse(**{"delta": delta} | change)
