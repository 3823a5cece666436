"""scale_search against the plain-torch twin: the chosen scale is of the grid, and no other is better."""

from collections.abc import Callable
from typing import Any

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

SEARCHES: tuple[Callable[..., Any], ...] = (clado_ext.scale_search, clado_ext.range_search)


def check(
    weight: torch.Tensor,
    bits: tuple[int, ...],
    group_size: int,
    steps: int,
    symmetric: bool = True,
    importance: torch.Tensor | None = None,
) -> None:
    if symmetric:
        scales, zeros = clado_ext.scale_search(weight, bits, group_size, steps, importance).cpu(), None
    else:
        scales, zeros = (x.cpu() for x in clado_ext.range_search(weight, bits, group_size, steps, importance))
    flat = weight.cpu().float().reshape(weight.shape[0], -1)
    size = flat.shape[1] if group_size == -1 else group_size
    shared = torch.ones_like(flat[:1]) if importance is None else importance.cpu().view(-1, flat.shape[1])
    parts = [h.split(size) for h in shared.repeat_interleave(len(flat) // len(shared), 0)]
    for b, width in enumerate(bits):
        for n, row in enumerate(flat):
            for g, group in enumerate(row.split(size)):
                chosen = scales[b, n, g]
                if not group.any():
                    assert chosen == 1
                    continue
                tried, zero = oracle.grid(group, width, steps, symmetric)
                errors = oracle.step_errors(group, width, steps, symmetric, parts[n][g])
                assert zeros is None or zeros[b, n, g] == zero
                assert (tried == chosen).any()
                found, best = errors[tried == chosen].min(), errors.min()
                if importance is not None:
                    # The few that count may all lie on codes: what is left is what float32 makes of each, twice 2^-24 of at most
                    # 2^bits codes, in the step that is found and in the best one.
                    counted = parts[n][g][group != 0].double()
                    own = tried[0] * 2.0 ** (width - 23) * (counted.sum() if counted.any() else group.numel()) ** 0.5
                    best = (best.sqrt() + 2 * own).square()
                assert found <= best * (1 + TOLERANCE)


def spread(*shape: int) -> torch.Tensor:
    """Importance from 1e-12 to 1e12, a third of it zero."""
    return (10 ** (24 * torch.rand(shape) - 12)) * (torch.rand(shape) > 0.3)


def every_weight(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test on weights of all kinds."""
    for name, values in (
        ("shape", [(1, 1), (3, 33), (2, 1024), (1, 2500), (2, 4, 3, 3)]),
        ("symmetric", [True, False]),
        ("group_size", [-1, 5, 64]),
        ("dtype", [torch.float32, torch.float16, torch.bfloat16]),
        ("device", DEVICES),
    ):
        test = pytest.mark.parametrize(name, values)(test)
    return test


@every_weight
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


@every_weight
def test_no_step_is_better_by_importance(
    shape: tuple[int, ...], symmetric: bool, group_size: int, dtype: torch.dtype, device: str
) -> None:
    weight, columns = torch.randn(shape, device=device).to(dtype), torch.Size(shape[1:]).numel()
    for importance in (torch.randn(columns).square(), spread(shape[0], columns)):
        check(weight, (2, 3, 4, 8), group_size, 95, symmetric, importance.to(device))


@given(
    columns=st.integers(1, 60),
    group=st.integers(-1, 20).filter(bool),
    steps=st.integers(1, 99),
    exponent=st.integers(-100, 100),
    shift=st.sampled_from([0.0, 1.0, -5.0]),
    level=st.integers(-100, 80),
    shared=st.sampled_from([1, 2, 4]),
    dead=st.floats(0, 1),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_property_with_importance(
    columns: int,
    group: int,
    steps: int,
    exponent: int,
    shift: float,
    level: int,
    shared: int,
    dead: float,
    symmetric: bool,
    seed: int,
) -> None:
    """Any share of inputs that were never on, weights of zero, importance from 1e-42 to 1e36."""
    torch.manual_seed(seed)
    weight = (torch.randn(4, columns) + shift) * 2.0**exponent * (torch.rand(4, columns) > 0.2)
    importance = spread(4 // shared, columns) * (torch.rand(columns) >= dead) * 2.0**level
    check(weight, (2, 6), group, steps, symmetric, importance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["scale_search", "range_search"])
def test_is_the_twin(name: str, device: str) -> None:
    """Steps of 1 % whose errors differ by more than rounding does."""
    weight = torch.randn(4, 300, device=device)
    weight[2], weight[3, :100] = 0, 0
    for importance in (None, torch.randn(300, device=device).square(), torch.rand(2, 300, device=device)):
        got, wanted = (getattr(ops, name)(weight, (2, 4), 100, 20, importance) for ops in (clado_ext, oracle))
        assert same_bits(got, wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_only_ratios_of_importance_matter(device: str) -> None:
    """All alike is none at all, bit for bit; a common power of two changes nothing, to the ends of float32."""
    for shape, group in (((5, 700), -1), ((5, 700), 48), ((1, 20_000), -1)):
        weight = torch.randn(shape, device=device)
        importance = torch.rand(shape[1], device=device) + 2.0**-10
        for search in SEARCHES:
            plain, weighted = (search(weight, (2, 4, 8), group, 95, x) for x in (None, importance))
            assert not same_bits(weighted, plain)
            for exponent in (-126, -125, -60, -1, 0, 1, 33, 126):
                for x, wanted in ((torch.ones_like(importance), plain), (importance, weighted)):
                    assert same_bits(search(weight, (2, 4, 8), group, 95, (x * 2.0**exponent)), wanted)
            least = torch.full_like(importance, 1e-45)
            assert same_bits(search(weight, (2, 4, 8), group, 95, least), plain)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("search", SEARCHES)
def test_where_nothing_that_could_be_wrong_counts_all_of_it_does(search: Callable[..., Any], device: str) -> None:
    weight = torch.randn(4, 96, device=device)
    weight[:, 32:40] = 0
    importance = torch.rand(96, device=device)
    importance[:32] = 0  # the first group: none at all
    importance[40:64] = 0  # the second: only beside weights of zero, however large
    importance[32:40] = 3e38
    weighted, plain = (search(weight, (2, 4), 32, 95, x) for x in (importance, None))
    if isinstance(plain, tuple):
        weighted, plain = weighted[0], plain[0]
    assert same_bits(weighted[..., :2].contiguous(), plain[..., :2].contiguous())
    assert not torch.equal(weighted[..., 2], plain[..., 2])
    assert same_bits(search(weight, (2, 4), -1, 95, torch.zeros_like(importance)), search(weight, (2, 4)))
    assert same_bits(search(weight[:, 32:40], (2, 4), -1, 95, importance[32:40]), search(weight[:, 32:40], (2, 4)))


def test_what_counts_for_nothing_is_clipped() -> None:
    weight = torch.tensor([[10.0, 1.0, -1.0, 0.5]])
    scale = clado_ext.scale_search(weight, (3,), importance=torch.tensor([0.0, 1, 1, 1]))
    values, _ = clado_ext.fake_quant(weight, scale, (3,))
    torch.testing.assert_close(values[0, 0, 1:], weight[0, 1:], rtol=0.05, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_share_importance_and_it_may_have_strides(device: str) -> None:
    weight, importance = torch.randn(6, 4, 3, 3, device=device).half(), spread(3, 36).to(device)
    for search in SEARCHES:
        wanted = search(weight, (2, 4), 7, 50, importance)
        for g, part in enumerate(weight.split(2)):
            alone = search(part, (2, 4), 7, 50, importance[g])
            pairs = zip(alone, wanted, strict=True) if isinstance(wanted, tuple) else [(alone, wanted)]
            assert all(same_bits(x, y[:, 2 * g : 2 * g + 2]) for x, y in pairs)
        assert same_bits(search(weight, (2, 4), 7, 50, importance.T.contiguous().T), wanted)
        assert same_bits(search(weight, (2, 4), 7, 50, importance.repeat_interleave(2, 0)), wanted)
        apart = torch.randn(6, 50, device=device).half()
        apart[:, 9:45] = weight.view(6, 36)
        assert same_bits(search(apart[:, 9:45], (2, 4), 7, 50, importance), wanted)


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
        for importance in (None, torch.randn(weight.shape[1]).square(), spread(weight.shape[1])):
            for search in SEARCHES:
                results = at_every_cpu_setting(
                    lambda w=weight, g=group, f=search, h=importance: f(w, (2, 4, 8), g, 20, h)
                )
                assert all(same_bits(r, results[0]) for r in results)


def test_per_tensor_is_one_row() -> None:
    weight = torch.randn(16, 300)
    check(weight.reshape(1, -1), (2, 4), -1, 95)
    long = torch.randn(16, 1200).reshape(1, -1)  # more than a thread block takes
    for importance in (spread(1200), torch.randn(1200).square()):
        check(long, (2, 4), -1, 95, importance=importance.expand(16, 1200).reshape(1, -1))


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
    for importance in (None, torch.rand(40, device=device), torch.rand(3, 40, device=device)):
        for op in (torch.ops.clado.scale_search.default, torch.ops.clado.range_search.default):
            torch.library.opcheck(op, (weight, [2, 4], 16, 5, importance))
        for search in SEARCHES:
            compiled = torch.compile(
                lambda w, h, f=search: f(w, (2, 4), 16, 5, importance=h), fullgraph=True, backend="aot_eager"
            )
            assert same_bits(compiled(weight, importance), search(weight, (2, 4), 16, 5, importance))
        assert clado_ext.scale_search(weight[:0], (2,), importance=importance).shape == (1, 0, 1)
    assert clado_ext.scale_search(weight[:, :0], (2,), importance=torch.rand(0, device=device)).shape == (1, 3, 0)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (torch.ones(4), r"importance must have shape \(6,\), got \(4,\)"),
        (torch.ones(2, 4), r"importance must have shape \(2, 6\), got \(2, 4\)"),
        (torch.ones(()), r"importance must be \[K\] or \[G, K\] where G divides the 4 rows, got \(\)"),
        (torch.ones(3, 6), r"importance must be \[K\] or \[G, K\] where G divides the 4 rows, got \(3, 6\)"),
        (torch.ones(0, 6), r"importance must be \[K\] or \[G, K\] where G divides the 4 rows, got \(0, 6\)"),
        (torch.ones(1, 4, 6), r"importance must be \[K\] or \[G, K\] where G divides the 4 rows, got \(1, 4, 6\)"),
        (torch.ones(6).double(), "importance must be float32, got torch.float64"),
        (torch.ones(6, device="meta"), "importance must be on cpu, got meta"),
        (torch.tensor([1.0, 2, 3, 4, 5, -2]), "importance must be finite and not negative, got -2.0"),
        (torch.tensor([[1.0, 2, torch.nan, 4, 5, -6]]), "importance must be finite and not negative, got nan"),
        (torch.full((4, 6), torch.inf), "importance must be finite and not negative, got inf"),
        ([1.0] * 6, "importance must be a dense tensor"),
    ],
)
def test_bad_importance(importance: Any, message: str) -> None:
    for search in SEARCHES:
        with pytest.raises(ValueError, match=f"^{search.__name__}: {message}"):
            search(torch.ones(4, 6), (4,), importance=importance)
        assert search(torch.ones(4, 6), (4,), importance=-torch.zeros(6))[0].isfinite().all()


@pytest.mark.skipif("cuda" not in DEVICES, reason="values are not looked at before the kernel runs")
def test_bad_importance_spoils_its_groups_on_a_gpu() -> None:
    check_spoiled(
        lambda weight, importance: clado_ext.scale_search(weight.cuda(), (2, 4), 8, 95, importance.cuda()).cpu()
    )


def check_spoiled(search: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """By groups of 8: scales are NaN where importance is not what it must be, and nowhere else, beside weights of zero too."""
    weight, importance = torch.randn(4, 40), torch.rand(2, 40)
    weight[:, 25] = 0
    importance[0, 3], importance[0, 17], importance[1, 25] = torch.nan, -1e-45, torch.inf
    wanted = torch.zeros(4, 5, dtype=torch.bool)
    wanted[:2, 0] = wanted[:2, 2] = wanted[2:, 3] = True
    assert torch.equal(search(weight, importance).isnan(), wanted.expand(2, 4, 5))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"scale_search: steps must lie in 1\.\.99, got 100"):
        clado_ext.scale_search(torch.zeros(2, 2), (2,), steps=100)
    with pytest.raises(ValueError, match="scale_search: weight must be float32"):
        clado_ext.scale_search(torch.zeros(2, 2, dtype=torch.int8), (2,))
