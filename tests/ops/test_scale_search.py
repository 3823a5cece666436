"""scale_search against the plain-torch twin: the chosen scale is of the grid, and no other is better."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import clado_ext
from clado_ext.reference import scale_search as oracle
from tests.ops.devices import DEVICES, at_every_cpu_setting, same_bits

# The kernel rates a step in float32 by w * (1/s): two roundings of up to 127 codes, 1e-5 of a code beside errors of about 0.3.
# A step within this of the best in float64 is as good.
TOLERANCE = 1e-4


def check(weight: torch.Tensor, bits: tuple[int, ...], group_size: int, steps: int, symmetric: bool = True) -> None:
    if symmetric:
        scales, zeros = clado_ext.scale_search(weight, bits, group_size, steps).cpu(), None
    else:
        scales, zeros = (x.cpu() for x in clado_ext.range_search(weight, bits, group_size, steps))
    flat = weight.cpu().float().reshape(weight.shape[0], -1)
    size = flat.shape[1] if group_size == -1 else group_size
    for b, width in enumerate(bits):
        for n, row in enumerate(flat):
            for g, group in enumerate(row.split(size)):
                chosen = scales[b, n, g]
                if not group.any():
                    assert chosen == 1
                    continue
                (tried, zero), errors = (f(group, width, steps, symmetric) for f in (oracle.grid, oracle.step_errors))
                assert zeros is None or zeros[b, n, g] == zero
                assert (tried == chosen).any()
                assert errors[tried == chosen].min() <= errors.min() * (1 + TOLERANCE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [-1, 5, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 1024), (1, 2500), (2, 4, 3, 3)])
def test_no_step_is_better(
    shape: tuple[int, ...], symmetric: bool, group_size: int, dtype: torch.dtype, device: str
) -> None:
    check(torch.randn(shape, device=device).to(dtype), (2, 3, 4, 8), group_size, 95, symmetric)


@given(
    columns=st.integers(1, 60),
    group=st.integers(-1, 20).filter(bool),
    steps=st.integers(1, 99),
    exponent=st.integers(-100, 100),
    shift=st.sampled_from([0.0, 1.0, -5.0]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_property(
    columns: int, group: int, steps: int, exponent: int, shift: float, symmetric: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    check((torch.randn(2, columns) + shift) * 2.0**exponent, (2, 6), group, steps, symmetric)


def test_one_step_is_absmax() -> None:
    weight = torch.randn(4, 50)
    for b in (2, 4, 8):
        torch.testing.assert_close(
            clado_ext.scale_search(weight, (b,), steps=1)[0, :, 0],
            weight.abs().amax(1) / (2 ** (b - 1) - 1),
            rtol=0,
            atol=0,
        )


def test_same_bits_at_every_simd_level_and_thread_count() -> None:
    """Many short groups, and one long row that the threads share."""
    for weight, group in ((torch.randn(9, 1000), 100), (torch.randn(1, 200_000).half(), -1)):
        for search in (clado_ext.scale_search, clado_ext.range_search):
            results = at_every_cpu_setting(lambda w=weight, g=group, f=search: f(w, (2, 4, 8), g, 20))
            assert all(same_bits(r, results[0]) for r in results)


def test_per_tensor_is_one_row() -> None:
    weight = torch.randn(16, 300)
    check(weight.reshape(1, -1), (2, 4), -1, 95)


def test_zeros_subnormals_and_non_finite() -> None:
    weight = torch.zeros(4, 8)
    weight[1, 3] = 1e-42
    weight[2, 3] = float("nan")
    weight[3, 3] = float("inf")
    ranged, zeros = clado_ext.range_search(weight, (2, 8))
    for scales in (clado_ext.scale_search(weight, (2, 8))[:, :, 0], ranged[:, :, 0]):
        assert (scales[:, 0] == 1).all()
        assert (scales[:, 1] >= torch.finfo(torch.float32).tiny).all()
        assert scales[:, 2:].isnan().all()
    assert not zeros[:, [0, 2, 3]].any()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_is_a_code_of_every_range(bits: int) -> None:
    """All positive, all negative, one-sided by a hair, the largest floats: the zero point is a code, its value exactly 0."""
    top = torch.finfo(torch.float32).max
    weight = torch.tensor([[1.0, 2, 3], [-1, -2, -3], [-1e-3, 5, 5], [-top, top, 0]])
    scale, zero = clado_ext.range_search(weight, (bits,))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert zero[0, :2, 0].tolist() == [low, high]
    assert scale.isfinite().all()
    assert not clado_ext.fake_quant(torch.zeros(4, 3), scale, (bits,), zero_point=zero)[0].any()


@pytest.mark.parametrize("device", DEVICES)
def test_op_is_well_formed_and_compiles(device: str) -> None:
    weight = torch.randn(3, 40, device=device)
    torch.library.opcheck(torch.ops.clado.scale_search.default, (weight, [2, 4], 16, 5))
    torch.library.opcheck(torch.ops.clado.range_search.default, (weight, [2, 4], 16, 5))
    compiled = torch.compile(lambda w: clado_ext.scale_search(w, (2, 4), 16, 5), fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(weight), clado_ext.scale_search(weight, (2, 4), 16, 5))
    assert clado_ext.scale_search(weight[:0], (2,)).shape == (1, 0, 1)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"scale_search: steps must lie in 1\.\.99, got 100"):
        clado_ext.scale_search(torch.zeros(2, 2), (2,), steps=100)
    with pytest.raises(ValueError, match="scale_search: weight must be float32"):
        clado_ext.scale_search(torch.zeros(2, 2, dtype=torch.int8), (2,))
