"""batched_ce against the definition of the losses in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import clado_ext
from clado_ext.reference import batched_ce as oracle
from tests.ops.devices import DEVICES, at_every_cpu_setting, same_bits

SHAPES = [(1, 1, 1), (3, 2, 2), (2, 5, 10), (33, 3, 31), (4, 2, 1000), (5, 0, 7), (0, 3, 7)]


def case(shape: tuple[int, int, int], size: float, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    v, n, c = shape
    logits = 3 * torch.randn(n, c, dtype=dtype, device=device)
    return logits, size * torch.randn(v, n, c, dtype=dtype, device=device), torch.randint(0, c, (n,), device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-2, 1.0, 20.0, 300.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_oracle(shape: tuple[int, int, int], size: float, dtype: torch.dtype, device: str) -> None:
    logits, delta, target = case(shape, size, dtype, device)
    # float32: p and x = δ - m carry one rounding each, |x| up to about 6 sizes, the exponential about two; relative to a sum of
    # positive terms (KL) or to terms of size δ that cancel (cross-entropy). float64: the oracle itself cancels, at 1e-16 of δ.
    relative, absolute = (1e-6, 6e-7 * size) if dtype == torch.float32 else (1e-9, 1e-13 * (1 + size))
    kl = clado_ext.batched_ce(logits, delta)
    assert kl.dtype == torch.float64
    torch.testing.assert_close(kl, oracle.batched_ce(logits, delta), rtol=2e-6, atol=1e-12 * (1 + size))
    torch.testing.assert_close(
        clado_ext.batched_ce(logits, delta, target),
        oracle.batched_ce(logits, delta, target),
        rtol=relative,
        atol=absolute,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-8])
def test_tiny_changes_lose_nothing(size: float, device: str) -> None:
    """KL is half the variance of δ to leading order: whatever its size, where a difference of float32 losses is noise."""
    logits, delta, _ = case((7, 5, 100), size, torch.float32, device)
    p, d = logits.double().softmax(-1), delta.double()
    x = d - (p * d).sum(-1, keepdim=True)
    wanted = (p * (x**2 / 2 + x**3 / 6 + x**4 / 24)).sum(-1)
    wanted = wanted - wanted**2 / 2
    torch.testing.assert_close(clado_ext.batched_ce(logits, delta), wanted, rtol=1e-6, atol=0)


@given(
    v=st.integers(1, 4),
    n=st.integers(1, 3),
    c=st.integers(1, 40),
    size=st.floats(1e-6, 1e4),
    seed=st.integers(0, 2**31),
)
def test_kl_is_never_negative_and_ignores_a_constant(v: int, n: int, c: int, size: float, seed: int) -> None:
    torch.manual_seed(seed)
    logits, delta, _ = case((v, n, c), size, torch.float64, "cpu")
    kl = clado_ext.batched_ce(logits, delta)
    assert (kl >= -1e-15).all()
    shifted = clado_ext.batched_ce(logits, delta + torch.randn(v, n, 1, dtype=torch.float64))
    torch.testing.assert_close(kl, shifted, rtol=1e-6, atol=1e-12 * (1 + size))


@pytest.mark.parametrize("device", DEVICES)
def test_classes_at_minus_infinity_and_nan(device: str) -> None:
    logits, delta, target = case((3, 4, 20), 0.5, torch.float32, device)
    masked, fewer = logits.clone(), slice(0, 13)
    masked[:, 13:] = -torch.inf
    delta[0, :, 15] = torch.nan  # of a class that does not count
    target = target % 13
    for y in (None, target):
        got = clado_ext.batched_ce(masked, delta, y)
        torch.testing.assert_close(
            got, clado_ext.batched_ce(logits[:, fewer], delta[..., fewer], y), rtol=1e-6, atol=1e-9
        )
    delta[1, 2, 3] = torch.nan
    spoiled = clado_ext.batched_ce(masked, delta).isnan()
    assert spoiled.nonzero().tolist() == [[1, 2]]
    masked[3, 0] = torch.nan
    assert clado_ext.batched_ce(masked, delta).isnan()[:, 3].all()


def test_half_precision_is_computed_as_float32() -> None:
    logits, delta, _ = case((2, 3, 10), 1.0, torch.float32, "cpu")
    for dtype in (torch.float16, torch.bfloat16):
        z, d = logits.to(dtype), delta.to(dtype)
        assert same_bits(clado_ext.batched_ce(z, d), clado_ext.batched_ce(z.float(), d.float()))


def test_same_bits_at_every_simd_level_and_thread_count() -> None:
    for size in (1e-3, 2.0, 100.0):
        logits, delta, target = case((40, 3, 77), size, torch.float32, "cpu")
        for y in (None, target):
            results = at_every_cpu_setting(lambda z=logits, d=delta, y=y: clado_ext.batched_ce(z, d, y))
            assert all(same_bits(r, results[0]) for r in results)


@pytest.mark.parametrize("device", DEVICES)
def test_strides_and_op(device: str) -> None:
    logits, delta, target = case((4, 6, 9), 1.0, torch.float32, device)
    strided = delta.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert same_bits(
        clado_ext.batched_ce(logits.t().contiguous().t(), strided, target), clado_ext.batched_ce(logits, delta, target)
    )
    torch.library.opcheck(torch.ops.clado.batched_ce.default, (logits, delta, target))
    torch.library.opcheck(torch.ops.clado.batched_ce.default, (logits, delta, None))
    compiled = torch.compile(lambda z, d: clado_ext.batched_ce(z, d) + 1, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(logits, delta), clado_ext.batched_ce(logits, delta) + 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(2, 3)), r"batched_ce: logits must have shape \[N, C\]"),
        ((torch.zeros(3, 4), torch.zeros(2, 3, 5)), r"batched_ce: delta must have shape \[V, 3, 4\], got \(2, 3, 5\)"),
        ((torch.zeros(3, 4), torch.zeros(2, 3, 4).double()), "batched_ce: delta must be torch.float32 as the logits"),
        ((torch.zeros(3, 0), torch.zeros(2, 3, 0)), "logits must have at least one class"),
        ((torch.zeros(3, 4), torch.zeros(2, 3, 4), torch.zeros(3)), "batched_ce: target must be int64"),
        (
            (torch.zeros(3, 4), torch.zeros(2, 3, 4), torch.zeros(2).long()),
            r"batched_ce: target must have shape \(3,\)",
        ),
        (
            (torch.zeros(3, 4), torch.zeros(2, 3, 4), torch.tensor([0, 4, 0])),
            r"batched_ce: target must lie in \[0, 4\)",
        ),
        ((torch.zeros(3, 4).int(), torch.zeros(2, 3, 4).int()), "logits must be a floating-point tensor"),
    ],
)
def test_bad_input(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clado_ext.batched_ce(*arguments)
