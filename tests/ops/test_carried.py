"""carried_gelu, carried_layer_norm, carried_add_layer_norm and carried_softmax against f(x + d) − f(x) in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import clado_ext
from clado_ext.reference import carried as oracle
from tests.ops.devices import DEVICES, at_every_cpu_setting, same_bits

# streams, clean shape
SHAPES = [
    (1, (1, 1)),
    (3, (2, 5)),
    (2, (1, 3, 16)),
    (4, (2, 7, 33)),
    (2, (3, 197)),
    (3, (0, 5)),
    (0, (2, 5)),
    (2, (2, 4100)),
]


def case(shape: tuple[int, tuple[int, ...]], size: float, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    streams, clean = shape
    x = 2 * torch.randn(clean, device=device)
    return x, (size * torch.randn(streams * clean[0], *clean[1:], device=device)).to(dtype)


def gelu(x: Tensor, d: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    return clado_ext.carried_gelu(x, d, half), oracle.carried_gelu(x, d)


def layer_norm(x: Tensor, d: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    weight = torch.linspace(0.5, 2, x.shape[-1], device=x.device)
    return clado_ext.carried_layer_norm(x, d, weight, 1e-6, half), oracle.carried_layer_norm(x, d, weight, 1e-6)


def add_layer_norm(x: Tensor, d: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    residual, weight = d.float() / 4, torch.linspace(0.5, 2, x.shape[-1], device=x.device)
    got = clado_ext.carried_add_layer_norm(x, residual, d, weight, 1e-6, half)[1]
    return got, oracle.carried_add_layer_norm(x, residual, d, weight, 1e-6)[1]


def softmax(x: Tensor, d: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    got = clado_ext.carried_softmax(x, x.softmax(-1), d, 0.5, half)
    wanted = oracle.carried_softmax(x, x.softmax(-1), d, 0.5)
    return got[..., : x.shape[-1]], wanted[..., : x.shape[-1]]


OPS = [gelu, layer_norm, add_layer_norm, softmax]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-5, 1e-3, 0.3, 5.0])
@pytest.mark.parametrize("op", OPS)
def test_matches_the_definition(
    op: Callable[..., Any], size: float, dtype: torch.dtype, half: bool, device: str
) -> None:
    for shape in SHAPES:
        x, d = case(shape, size, dtype, device)
        got, wanted = op(x, d, half)
        assert got.dtype == (torch.bfloat16 if half else torch.float32)
        # Relative to the change as a whole: x − mean and Φ are rounded to float32 next to d (1e-6 of x over d at the smallest d
        # for gelu; the other two lose nothing), and the result to bfloat16 (2^-9).
        limit = (3e-5 + 2e-7 / size if op is gelu else 3e-5) + (2**-8 if half else 0)
        if wanted.shape[-1] == 1 and op is not gelu:  # a row of one: the change is zero
            limit = 1.0
        assert (got.double() - wanted).norm() <= limit * wanted.norm() + 1e-6 * size, (shape, size)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_and_its_norm_are_those_of_two_steps(dtype: torch.dtype, device: str) -> None:
    for shape in SHAPES:
        x, d = case(shape, 0.3, dtype, device)
        total, normed = clado_ext.carried_add_layer_norm(x, d.float().flip(0), d, None, 1e-5, True)
        assert same_bits(total, d.float().flip(0) + d)
        assert same_bits(normed, clado_ext.carried_layer_norm(x, total, None, 1e-5, True))


@pytest.mark.parametrize("device", DEVICES)
def test_softmax_gives_itself_beside_the_change_and_may_go_far(device: str) -> None:
    s = torch.randn(2, 3, 21, device=device)
    s[:, :, 5] = -torch.inf  # masked
    for size in (0.1, 60.0, 300.0):
        d = size * torch.randn(6, 3, 21, device=device)
        got, wanted = clado_ext.carried_softmax(s, s.softmax(-1), d), oracle.carried_softmax(s, s.softmax(-1), d)
        torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-7)
        assert (got[..., [5, 26]] == 0).all() or size > 1
        torch.testing.assert_close(got[..., 21:].sum(-1), torch.ones(6, 3, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_nan_stays_in_its_row(op: Callable[..., Any], device: str) -> None:
    x, d = case((2, (3, 40)), 0.1, torch.float32, device)
    clean, _ = op(x, d, False)
    d[4, 7] = torch.nan
    got, _ = op(x, d, False)
    assert got[4, 7].isnan()
    rows = torch.arange(6) != 4
    assert same_bits(got[rows], clean[rows])


@pytest.mark.parametrize("op", OPS)
def test_same_bits_at_every_cpu_setting(op: Callable[..., Any]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, d = case((3, (5, 61)), 0.1, dtype, "cpu")
        first, *others = at_every_cpu_setting(lambda x=x, d=d: op(x, d, True)[0])
        assert all(same_bits(first, other) for other in others)


@given(n=st.integers(1, 3), c=st.integers(1, 40), size=st.floats(1e-4, 1e3), seed=st.integers(0, 2**31))
def test_a_zero_difference_gives_zero_and_streams_do_not_mix(n: int, c: int, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, d = torch.randn(n, c, generator=generator), size * torch.randn(2 * n, c, generator=generator)
    d[:n] = 0
    for op in OPS:
        got = op(x, d, False)[0]
        assert (got[:n] == 0).all()
        assert same_bits(got[n:], op(x, d[n:], False)[0])


def test_strides_opcheck_and_compile() -> None:
    x, d = torch.randn(4, 6).T, torch.randn(4, 12).T
    weight = torch.rand(4)
    assert same_bits(clado_ext.carried_gelu(x, d), clado_ext.carried_gelu(x.contiguous(), d.contiguous()))
    for op, arguments in (
        ("carried_gelu", (x, d, True)),
        ("carried_layer_norm", (x, d, weight, 1e-5, True)),
        ("carried_add_layer_norm", (x, d, d.bfloat16(), weight, 1e-5, True)),
        ("carried_softmax", (x, x.softmax(-1), d, 0.5, False)),
    ):
        overload = getattr(torch.ops.clado, op).default
        torch.library.opcheck(overload, arguments)
        compiled = torch.compile(lambda *a, f=overload: f(*a), fullgraph=True, backend="eager")
        assert same_bits(compiled(*arguments), overload(*arguments))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, d: clado_ext.carried_gelu(x.double(), d), "clean must be float32"),
        (lambda x, d: clado_ext.carried_gelu(x, d.double()), "delta must be float32 or bfloat16"),
        (lambda x, d: clado_ext.carried_gelu(x, d[:3]), r"delta must have shape \[S·2, 4\], got \(3, 4\)"),
        (lambda x, d: clado_ext.carried_layer_norm(x, d[:, :3]), "delta must have shape"),
        (lambda x, d: clado_ext.carried_layer_norm(x, d, torch.ones(3)), r"weight must be float32 \[4\]"),
        (
            lambda x, d: clado_ext.carried_add_layer_norm(x, d, d[:3]),
            r"branch must have shape \[S·2, 4\], got \(3, 4\)",
        ),
        (
            lambda x, d: clado_ext.carried_add_layer_norm(x, d.bfloat16(), d),
            r"residual must be float32 \(4, 4\), got torch.bf",
        ),
        (lambda x, d: clado_ext.carried_add_layer_norm(x, d, d, torch.ones(3)), r"weight must be float32 \[4\]"),
        (lambda x, d: clado_ext.carried_softmax(x[:1], x, d), "scores must be as clean"),
    ],
)
def test_bad_input(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 4), torch.zeros(4, 4))
