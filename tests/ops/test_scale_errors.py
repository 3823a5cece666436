"""scale_errors against the plain-torch twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import clado_ext
from clado_ext.reference.scale_errors import scale_errors as oracle
from tests.ops.devices import DEVICES, at_every_cpu_setting, same_bits

# step * s - w is off by a rounding of step * s and one of the difference: 2^-24 of up to 2^8 steps each, 2^-15 of a step, which
# may be the whole error. w * (1/s) is off as well, but a weight so near the middle of two steps has the same error at both.
TOLERANCE = 2.0**-14


def candidates(weight: torch.Tensor, count: int, group_size: int) -> torch.Tensor:
    """Scales around absmax / 7, some far off."""
    flat = weight.detach().cpu().float().reshape(weight.shape[0], -1)
    parts = flat.split(flat.shape[1] if group_size == -1 else group_size, 1)
    first = torch.stack([part.abs().amax(1) for part in parts], 1) / 7
    return (first * torch.linspace(0.1, 3, count).view(-1, 1, 1)).to(weight.device)


def check(weight: torch.Tensor, scale: torch.Tensor, low: int, high: int, group_size: int = -1) -> None:
    got, wanted = (f(weight, scale, low, high, group_size) for f in (clado_ext.scale_errors, oracle))
    assert got.dtype == torch.float64
    columns = weight[0].numel() if group_size == -1 else group_size
    least = (scale.double().abs() * TOLERANCE).square() * columns
    torch.testing.assert_close(got, wanted, rtol=TOLERANCE, atol=least.max().item())


@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 1024), (1, 2500), (2, 4, 3, 3)])
@pytest.mark.parametrize("group_size", [-1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_is_the_twin(shape: tuple[int, ...], group_size: int, dtype: torch.dtype, device: str) -> None:
    weight = torch.randn(shape, device=device).to(dtype)
    for count, (low, high) in zip((1, 2, 5), ((-8, 7), (-1, 1), (0, 255)), strict=True):
        check(weight, candidates(weight, count, group_size), low, high, group_size)


@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 60),
    group=st.integers(-1, 20).filter(bool),
    count=st.integers(1, 70),
    low=st.integers(-65536, 0),
    high=st.integers(0, 65536),
    exponent=st.integers(-40, 40),
    seed=st.integers(0, 2**31),
)
def test_property(
    rows: int, columns: int, group: int, count: int, low: int, high: int, exponent: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * 2.0**exponent
    check(weight, candidates(weight, count, group), low, high, group)


def test_is_what_fake_quant_leaves() -> None:
    """At the scales that the search finds, the error of the values, and no other of its steps is better."""
    weight = torch.randn(6, 300)
    first = clado_ext.scale_search(weight, (4,), steps=1)
    grid = first * torch.linspace(1, 0.06, 95).view(-1, 1, 1)
    errors = clado_ext.scale_errors(weight, grid, -8, 7)
    found = clado_ext.scale_search(weight, (4,))
    _, sqerr = clado_ext.fake_quant(weight, found, (4,))
    torch.testing.assert_close(clado_ext.scale_errors(weight, found, -8, 7)[0, :, 0], sqerr[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(errors.amin(0)[:, 0], sqerr[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_scales_of_zero_below_zero_and_not_finite(device: str) -> None:
    weight = torch.randn(2, 40, device=device)
    weight[1, 3] = torch.nan
    scale = torch.tensor([0.0, 1e-40, -0.3, 0.3, torch.inf, -torch.inf, torch.nan], device=device)
    errors = clado_ext.scale_errors(weight, scale.view(-1, 1, 1).expand(-1, 2, 1), -7, 7)[:, :, 0]
    nothing = weight[0].double().square().sum()
    torch.testing.assert_close(errors[:2, 0], torch.stack([nothing, nothing]))
    assert errors[2, 0] == errors[3, 0]  # steps from -7 to 7: the sign of the scale is that of the codes
    assert errors[4:, 0].isnan().all()
    assert errors[:, 1].isnan().all()


def test_same_bits_at_every_simd_level_and_thread_count() -> None:
    for weight, group in (
        (torch.randn(9, 1000), 100),
        (torch.randn(1, 70_000).half(), -1),
        (torch.randn(3, 2100), 1500),
    ):
        scale = candidates(weight, 67, group)
        results = at_every_cpu_setting(lambda w=weight, s=scale, g=group: clado_ext.scale_errors(w, s, -8, 7, g))
        assert all(same_bits(r, results[0]) for r in results)


def test_rows_that_lie_apart_and_scales_with_strides() -> None:
    whole = torch.randn(5, 90)
    view = whole[:, 7:67]
    scale = candidates(view, 6, 20)
    wanted = clado_ext.scale_errors(view.contiguous(), scale, -8, 7, 20)
    assert same_bits(
        clado_ext.scale_errors(view, scale.transpose(0, 2).contiguous().transpose(0, 2), -8, 7, 20), wanted
    )


@pytest.mark.parametrize("device", DEVICES)
def test_op_is_well_formed_and_compiles(device: str) -> None:
    weight = torch.randn(3, 40, device=device)
    scale = candidates(weight, 4, 16)
    torch.library.opcheck(torch.ops.clado.scale_errors.default, (weight, scale, -8, 7, 16))
    compiled = torch.compile(lambda w, s: clado_ext.scale_errors(w, s, -8, 7, 16), fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(weight, scale), clado_ext.scale_errors(weight, scale, -8, 7, 16))
    assert clado_ext.scale_errors(weight[:0], scale[:, :0], -8, 7, 16).shape == (4, 0, 3)
    assert clado_ext.scale_errors(weight, scale[:0], -8, 7, 16).shape == (0, 3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": 1}, r"low must lie in -65536\.\.0, got 1"),
        ({"high": 70_000}, r"high must lie in 0\.\.65536, got 70000"),
        ({"scale": torch.ones(2, 3)}, r"scale must be \[S, N, groups\], got \(2, 3\)"),
        ({"scale": torch.ones(2, 3, 1)}, r"scale must have shape \(2, 4, 1\), got \(2, 3, 1\)"),
        ({"scale": torch.ones(2, 4, 1).double()}, "scale must be float32, got torch.float64"),
        ({"weight": torch.ones(4, 6).double()}, "weight must be float32, float16, bfloat16, got torch.float64"),
        ({"group_size": 0}, "group_size must be -1 or positive, got 0"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    good = {"weight": torch.ones(4, 6), "scale": torch.ones(2, 4, 1), "low": -8, "high": 7}
    with pytest.raises(ValueError, match=f"^scale_errors: {message}"):
        clado_ext.scale_errors(**good | change)
