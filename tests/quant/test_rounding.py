"""Compensated rounding against its definition in float64: the factors, the layer loss, the scales, one pass for all widths."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import clado_ext
from clado import CladoError
from clado.quant import ROUNDINGS, Quantizer
from clado.quant.factors import DAMPING, Factors, factored
from clado.quant.numbers import NUMBERS, Integer, Number
from clado.quant.rounding import Coded, _Search

NEAREST, COMPENSATED = ROUNDINGS["nearest"], ROUNDINGS["compensated"]
WIDTHS = tuple(range(2, 9))


def integers(bits: Sequence[int] = WIDTHS) -> list[Number]:
    return [NUMBERS[f"int{b}"] for b in bits]


def correlated(groups: int, columns: int, samples: int) -> Tensor:
    """Moments of inputs that depend on each other, ``[G, K, K]``."""
    x = torch.randn(groups, samples, columns) @ torch.randn(groups, columns, columns)
    return x.transpose(1, 2) @ x


def damped(moments: Tensor, share: float = DAMPING) -> Tensor:
    """H in float64, by the definition."""
    wanted = moments.double().clone()
    for group in wanted:
        group += share * group.diagonal().mean() * torch.eye(len(group), dtype=torch.float64)
    return wanted


def losses(matrix: Tensor, coded: Coded, number: Number, h: Tensor) -> Tensor:
    """(w − q) H (w − q)ᵀ of every row in float64, ``[G, N/G]``."""
    values = number.decode(*coded, torch.float64)
    error = (matrix.double() - values).view(len(h), -1, h.shape[-1])
    return torch.stack([(e @ own * e).sum(-1) for e, own in zip(error, h, strict=True)])


def check_factor(found: Factors, h: Tensor) -> None:
    """U is upper triangular and UᵀU the inverse of H in the order of columns: float32, of matrices of condition 1e3 at most."""
    for u, order, own in zip(found.factor.double(), found.order, h, strict=True):
        assert torch.equal(u, u.triu())
        assert (u.diagonal() > 0).all()
        sorted_ = own[order][:, order]
        assert torch.equal(sorted_.diagonal(), sorted_.diagonal().sort(descending=True).values)
        product = u.T @ u @ sorted_
        torch.testing.assert_close(product, torch.eye(len(u), dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("groups", "columns", "samples"), [(1, 1, 1), (1, 7, 40), (3, 5, 30), (8, 9, 27), (1, 33, 4)])
def test_the_factor_is_of_the_inverse(groups: int, columns: int, samples: int) -> None:
    """Also with fewer samples than columns, whose moments have no inverse without damping."""
    moments = correlated(groups, columns, samples)
    found = factored(moments)
    check_factor(found, damped(moments))
    torch.testing.assert_close(found.moments.double(), damped(moments), rtol=1e-6, atol=0)
    assert found.damping == DAMPING
    assert found.dead == 0


def test_equal_columns_keep_their_order() -> None:
    assert factored(torch.eye(6)[None]).order.tolist() == [list(range(6))]
    ones = torch.ones(1, 4, 4)
    ones[0, 2, 2] = 2
    assert factored(ones).order.tolist() == [[2, 0, 1, 3]]


def test_dead_inputs_are_counted_and_come_last() -> None:
    moments = correlated(2, 6, 30)
    moments[0, 1], moments[0, :, 1] = 0, 0
    moments[1, 4:], moments[1, :, 4:] = 0, 0
    found = factored(moments)
    check_factor(found, damped(moments))
    assert found.dead == 3
    assert found.order[0, -1] == 1
    assert found.order[1, -2:].tolist() == [4, 5]


def test_a_group_of_zeros_is_rounded_to_the_nearest() -> None:
    moments = correlated(2, 6, 30)
    moments[1] = 0
    found = factored(moments)
    assert found.dead == 6
    assert torch.equal(found.moments[1], torch.eye(6))
    assert torch.equal(found.factor[1], torch.eye(6))
    matrix = torch.randn(4, 6)
    scale = clado_ext.scale_search(matrix, (3,))
    codes = clado_ext.compensate(matrix, found.factor, scale, (3,), order=found.order)[0][0]
    nearest = clado_ext.quantize(matrix, scale, (3,))[0]
    assert torch.equal(codes[2:], nearest[2:])
    assert not torch.equal(codes[:2], nearest[:2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_one_line(bad: float) -> None:
    moments = correlated(2, 4, 9)
    moments[1, 2, 3] = bad
    with pytest.raises(CladoError, match=r"^round: moments must be finite for head, got NaN or infinity$"):
        factored(moments, "head")


def test_slightly_indefinite_moments_are_damped_more() -> None:
    """An eigenvalue of −0.01 of the mean: what float32 sums or bfloat16 inputs may leave."""
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    values = torch.tensor([4.0, 3, 2, 1, 0], dtype=torch.float64)
    values[-1] = -0.01 * values.sum() / 5
    moments = (basis * values @ basis.T)[None]
    found = factored(moments)
    assert found.damping == 10 * DAMPING
    check_factor(found, damped(moments, found.damping))


@pytest.mark.parametrize("values", [[[1.0, 0], [0, -0.1]], [[-1.0, 0], [0, -1]], [[1.0, 5], [5, 1]]])
def test_what_are_no_second_moments_is_one_line(values: list[list[float]]) -> None:
    with pytest.raises(CladoError, match=r"^round: moments must be second moments, .* for a layer, got others$"):
        factored(torch.tensor([values]))


QUANTIZERS = st.sampled_from(
    [
        Quantizer(-1, 9),
        Quantizer(-1, 9, False),
        Quantizer(0, 9),
        Quantizer(0, 9, False),
        Quantizer(3, 9),
        Quantizer(3, 1, False),
    ]
)


@given(
    quantizer=QUANTIZERS,
    groups=st.sampled_from([1, 1, 2, 3]),
    own=st.integers(1, 4),
    columns=st.integers(1, 12),
    samples=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_no_layer_loses_by_compensation(
    quantizer: Quantizer, groups: int, own: int, columns: int, samples: int, dtype: torch.dtype, seed: int
) -> None:
    """The loss, by its definition, is never above nearest rounding's: of each row, or of all rows that share a scale."""
    torch.manual_seed(seed)
    moments = correlated(groups, columns, samples)
    weight = torch.randn(groups * own, columns).to(dtype)
    matrix, numbers, factors = quantizer.matrix(weight), integers(), factored(moments)
    h = damped(moments, factors.damping)
    found = COMPENSATED.rounded(matrix, numbers, quantizer, factors)
    nearest = NEAREST.rounded(matrix, numbers, quantizer, None)
    for number, (codes, scales), plain in zip(numbers, found, nearest, strict=True):
        low, high = -(2 ** (number.bits - 1)), 2 ** (number.bits - 1) - 1
        assert codes.dtype == torch.int8
        assert codes.shape == matrix.shape
        assert low <= codes.min()
        assert codes.max() <= high
        assert (scales.scale > 0).all()
        assert scales.scale.shape == plain[1].scale.shape
        assert (scales.zero_point is None) == quantizer.symmetric
        mine, theirs = (losses(matrix, coded, number, h) for coded in ((codes, scales), plain))
        if quantizer.group_size == 0:
            mine, theirs = mine.sum(), theirs.sum()
        # Rows are compared by float32 sums of K products of a matrix of condition 1e4 at most.
        assert (mine <= theirs * (1 + 1e-3) + 1e-6 * weight.double().square().sum()).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_it_pays_where_inputs_are_correlated(bits: int) -> None:
    """The loss of a layer of ordinary size falls to less than two thirds."""
    moments, weight = correlated(1, 48, 200), torch.randn(16, 48)
    factors, quantizer, numbers = factored(moments), Quantizer(), integers([bits])
    mine, theirs = (
        losses(weight, rounding.rounded(weight, numbers, quantizer, factors)[0], numbers[0], damped(moments)).sum()
        for rounding in (COMPENSATED, NEAREST)
    )
    assert mine < 2 / 3 * theirs


def test_one_pass_gives_what_each_width_gives_alone() -> None:
    moments = correlated(2, 9, 40)
    factors = factored(moments)
    for quantizer in (Quantizer(-1, 9), Quantizer(4, 9, False), Quantizer(0, 9)):
        matrix = quantizer.matrix(torch.randn(6, 9))
        together = COMPENSATED.rounded(matrix, integers(), quantizer, factors)
        for number, (codes, scales) in zip(integers(), together, strict=True):
            ((alone, own),) = COMPENSATED.rounded(matrix, [number], quantizer, factors)
            assert torch.equal(codes, alone)
            # The fit's products are a matrix product of torch, whose last bits depend on its size.
            torch.testing.assert_close(scales.scale, own.scale, rtol=1e-5, atol=0)
            assert (scales.zero_point is None and own.zero_point is None) or torch.equal(
                scales.zero_point, own.zero_point
            )


@pytest.mark.parametrize("quantizer", [Quantizer(), Quantizer(0), Quantizer(4, 20, False)])
def test_the_fit_lowers_the_loss_of_its_codes(quantizer: Quantizer) -> None:
    """Against the same codes with the scale before the fit, and with any other multiple of it."""
    moments = correlated(1, 10, 40)
    factors, h = factored(moments), damped(moments)
    matrix = quantizer.matrix(torch.randn(5, 10))
    numbers = [NUMBERS[f"int{b}"] for b in (2, 3, 8)]
    assert all(isinstance(number, Integer) for number in numbers)
    search = _Search(matrix, numbers, quantizer, factors)  # type: ignore[arg-type]
    for number, (codes, scales) in zip(numbers, search.best(), strict=True):

        def loss(multiple: float, codes: Tensor = codes, scales: object = scales, number: Number = number) -> Tensor:
            moved = scales._replace(scale=scales.scale * multiple)  # type: ignore[attr-defined]
            found = losses(matrix, (codes, moved), number, h)
            return found.sum() if quantizer.group_size == 0 else found

        for multiple in (0.9, 0.99, 1.01, 1.1):
            assert (loss(1.0) <= loss(multiple) + 1e-9).all()


def test_a_grouped_convolution_has_moments_of_each_group() -> None:
    """Rounded together it is rounded as its groups are, each by its own moments; depthwise ones are groups of one row."""
    for groups, own in ((2, 3), (5, 1)):
        moments, weight = correlated(groups, 9, 40), torch.randn(groups * own, 1, 3, 3)
        quantizer, numbers = Quantizer(), integers((2, 4))
        found = COMPENSATED.rounded(quantizer.matrix(weight), numbers, quantizer, factored(moments))
        for k in range(groups):
            rows = slice(k * own, (k + 1) * own)
            alone = COMPENSATED.rounded(
                quantizer.matrix(weight[rows]), numbers, quantizer, factored(moments[k : k + 1])
            )
            for (codes, scales), (wanted, known) in zip(found, alone, strict=True):
                assert torch.equal(codes[rows], wanted)
                torch.testing.assert_close(scales.scale[rows], known.scale, rtol=1e-5, atol=0)  # the fit's products


def test_one_scale_of_a_tensor_stays_one() -> None:
    quantizer, moments = Quantizer(0, 9), correlated(1, 6, 30)
    matrix = quantizer.matrix(torch.randn(4, 6))
    for codes, scales in COMPENSATED.rounded(matrix, integers(), quantizer, factored(moments)):
        assert codes.shape == (1, 24)
        assert scales.scale.shape == (1, 1)


def test_weights_of_zeros_and_of_one_value() -> None:
    moments = factored(correlated(1, 5, 20))
    for weight in (torch.zeros(3, 5), torch.full((3, 5), 0.7)):
        for quantizer in (Quantizer(), Quantizer(symmetric=False), Quantizer(0)):
            matrix = quantizer.matrix(weight)
            for number, coded in zip(
                integers(), COMPENSATED.rounded(matrix, integers(), quantizer, moments), strict=True
            ):
                values = number.decode(*coded, torch.float32)
                assert torch.isfinite(values).all()
                assert coded[1].scale.isfinite().all()
                if not weight.any():
                    assert not values.any()


@pytest.mark.parametrize("bits", [2, 4])
def test_each_row_searches_its_own_scale(bits: int) -> None:
    """A plain search, row by row: multiples of the first scale, then steps around the best, twice; the first among equals."""
    moments, weight = correlated(1, 24, 60), torch.randn(8, 24)
    factors, quantizer, numbers = factored(moments), Quantizer(), integers([bits])
    ((codes, scales),) = COMPENSATED.rounded(weight, numbers, quantizer, factors)
    first = clado_ext.scale_search(weight, (bits,))[0]
    far = 0
    for row, found, scale, wide in zip(weight, codes, first, scales.scale, strict=True):

        def tried(own: Tensor, row: Tensor = row) -> tuple[float, Tensor, Tensor]:
            got, loss = clado_ext.compensate(row[None], factors.factor, own.view(1, 1, 1), (bits,), order=factors.order)
            return loss.item(), own, got[0, 0]

        best = tried(scale)
        for multiple in (0.6, 0.7, 0.8, 0.9, 1.1, 1.2):
            best = min(best, tried(scale * multiple), key=lambda one: one[0])
        for step in (0.05, 0.025):
            centre = best[1]
            for side in (1 - step, 1 + step):
                best = min(best, tried(centre * side), key=lambda one: one[0])
        assert torch.equal(found, best[2])
        assert 0.5 < (wide / best[1]).item() < 1.5  # what the fit adds
        far += int(not torch.equal(best[1], scale))
    assert far > 0


@pytest.mark.parametrize("quantizer", [Quantizer(scale_steps=5), Quantizer(0, 5), Quantizer(8, 5, False)])
@pytest.mark.parametrize("groups", [1, 2])
def test_floats_are_compensated_under_their_scales(quantizer: Quantizer, groups: int) -> None:
    """In any company, never worse than nearest rounding, and much better on inputs that depend on each other."""
    weight, moments = torch.randn(8, 64), correlated(groups, 64, 200)
    factors, h = factored(moments, "a layer"), damped(moments)
    matrix, numbers = quantizer.matrix(weight), list(NUMBERS.values())
    found = COMPENSATED.rounded(matrix, numbers, quantizer, factors)
    near = NEAREST.rounded(matrix, numbers, quantizer, None)
    for number, coded, plain in zip(numbers, found, near, strict=True):
        if number.name.startswith("int"):
            continue
        assert torch.equal(coded[1].scale, plain[1].scale)
        better, worse = (losses(matrix, own, number, h) for own in (coded, plain))
        assert (better <= worse * (1 + 1e-5)).all()
        assert number.bits == 16 or better.sum() < 0.7 * worse.sum()
        (alone,) = COMPENSATED.rounded(matrix, [number], quantizer, factors)
        assert torch.equal(alone[0], coded[0])
