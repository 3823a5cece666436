"""compensate against the plain-torch twin, bit for bit; its losses against the moments themselves and those of plain rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import clado_ext
from clado_ext.reference import compensate as oracle
from tests.ops.devices import DEVICES, at_every_cpu_setting, same_bits

BITS = (2, 4, 8)


def moments(factors: int, columns: int) -> Tensor:
    """Damped second moments of inputs that go together, float64 ``[G, K, K]``."""
    x = torch.randn(factors, 2 * columns + 3, columns, dtype=torch.float64)
    x = x + 2 * torch.randn(factors, 2 * columns + 3, 1, dtype=torch.float64)
    h = x.mT @ x / x.shape[1]
    return h + 0.01 * h.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(columns, dtype=torch.float64)


def factor_of(h: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse, float32."""
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True).float()


def layer_loss(weight: Tensor, values: Tensor, h: Tensor) -> Tensor:
    """The definition in float64: each row of ``(W - Q) H (W - Q)ᵀ``, ``[B, N]``; h ``[G, K, K]``."""
    difference = (values.double() - weight.double()).view(len(values), len(h), -1, weight[0].numel())
    return torch.einsum("bgnk,gkl,bgnl->bgn", difference, h, difference).flatten(1)


def case(rows: int, columns: int, group: int = -1, factors: int = 1, ranged: bool = False) -> dict[str, Tensor]:
    weight, h = torch.randn(rows, columns), moments(factors, columns)
    search = clado_ext.range_search(weight, BITS, group, 20) if ranged else None
    scale = search[0] if search else clado_ext.scale_search(weight, BITS, group, 20)
    return {"weight": weight, "h": h, "factor": factor_of(h), "scale": scale} | (
        {"zero_point": search[1]} if search else {}
    )


def given_to(op_case: dict[str, Tensor], device: str = "cpu") -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in op_case.items() if name != "h"}


def on_cpu(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.cpu() for x in result)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("ranged", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "group", "factors"),
    [
        (1, 1, -1, 1),
        (3, 9, 4, 3),
        (1, 40, -1, 1),
        (17, 33, 5, 1),
        (34, 130, 16, 2),
        (12, 289, 1, 1),
        (20, 64, 100, 5),
    ],
)
def test_is_the_twin(
    rows: int, columns: int, group: int, factors: int, ranged: bool, ordered: bool, device: str
) -> None:
    made = case(rows, columns, group, factors, ranged)
    if ordered:
        made["order"] = torch.stack([torch.randperm(columns) for _ in range(factors)])
    got = clado_ext.compensate(**given_to(made, device), bits=BITS, group_size=group)
    assert same_bits(on_cpu(got), oracle.compensate(**given_to(made), bits=BITS, group_size=group))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [5, 32, 50])
def test_half_weights_are_computed_on_as_float32(columns: int, dtype: torch.dtype, device: str) -> None:
    made = given_to(case(7, columns), device)
    made["weight"] = made["weight"].to(dtype)
    wanted = clado_ext.compensate(**made | {"weight": made["weight"].float()}, bits=BITS)
    assert same_bits(clado_ext.compensate(**made, bits=BITS), wanted)


def test_the_loss_is_that_of_the_layer() -> None:
    """Also in another order of columns, and for grouped convolutions with one factor per group."""
    for rows, columns, factors, group in ((9, 70, 1, 16), (12, 27, 4, -1)):
        made = case(rows, columns, group, factors)
        order = made["h"].diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True)
        turned = torch.stack([h[p][:, p] for h, p in zip(made["h"], order, strict=True)])
        for more in ({}, {"factor": factor_of(turned), "order": order}):
            codes, loss = clado_ext.compensate(**given_to(made) | more, bits=BITS, group_size=group)
            values = clado_ext.dequantize(codes, made["scale"], group)
            # Float32 in U and in up to 70 updates of a weight, each rounded to 2^-24 of it, where an error is near 0.3 of a step:
            # at 8 bits a step is 1/127 of the weight, 70 * 2^-24 * 127 / 0.3 = 2e-3 at worst; roundings cancel.
            torch.testing.assert_close(loss, layer_loss(made["weight"], values, made["h"]), rtol=1e-3, atol=0)


def test_without_correlation_it_is_rounding() -> None:
    made = given_to(case(11, 100, 7, ranged=True))
    made["factor"] = 0.25 * torch.eye(100)[None]
    codes, loss = clado_ext.compensate(**made, bits=BITS, group_size=7)
    plain = {name: x for name, x in made.items() if name != "factor"}
    assert torch.equal(codes, clado_ext.quantize(**plain, bits=BITS, group_size=7))
    _, squares = clado_ext.fake_quant(**plain, bits=BITS, group_size=7)
    torch.testing.assert_close(loss, 16 * squares, rtol=1e-6, atol=0)  # sums of float32 squares


@given(rows=st.integers(16, 40), columns=st.integers(8, 60), ranged=st.booleans(), seed=st.integers(0, 2**31))
def test_a_layer_loses_less_than_by_rounding_alone(rows: int, columns: int, ranged: bool, seed: int) -> None:
    torch.manual_seed(seed)
    made = case(rows, columns, ranged=ranged)
    _, loss = clado_ext.compensate(**given_to(made), bits=BITS)
    values, _ = clado_ext.fake_quant(made["weight"], made["scale"], BITS, zero_point=made.get("zero_point"))
    assert (loss.sum(1) <= layer_loss(made["weight"], values, made["h"]).sum(1)).all()


def test_widths_and_factors_side_by_side_are_those_alone() -> None:
    made = given_to(case(24, 45, 10, 4))
    codes, loss = clado_ext.compensate(**made, bits=BITS, group_size=10)
    for b, width in enumerate(BITS):
        alone = clado_ext.compensate(**made | {"scale": made["scale"][b : b + 1]}, bits=(width,), group_size=10)
        assert same_bits(alone, (codes[b : b + 1], loss[b : b + 1]))
    for g in range(4):
        part = slice(6 * g, 6 * g + 6)
        mine = {"weight": made["weight"][part], "scale": made["scale"][:, part], "factor": made["factor"][g : g + 1]}
        assert same_bits(clado_ext.compensate(**mine, bits=BITS, group_size=10), (codes[:, part], loss[:, part]))


def test_an_order_is_that_of_the_columns() -> None:
    made, order = given_to(case(10, 50)), torch.randperm(50)
    codes, loss = clado_ext.compensate(**made, bits=BITS, order=order[None])
    turned, turned_loss = clado_ext.compensate(**made | {"weight": made["weight"][:, order]}, bits=BITS)
    assert same_bits((codes[:, :, order], loss), (turned, turned_loss))


@pytest.mark.parametrize("device", DEVICES)
def test_strides_and_what_lies_below_the_diagonal(device: str) -> None:
    made = given_to(case(12, 40), device)
    wanted = clado_ext.compensate(**made, bits=BITS)
    apart = torch.randn(12, 60, device=device)
    apart[:, 7:47] = made["weight"]
    below = torch.full((40, 40), torch.nan, device=device).tril(-1)
    strange = {"weight": apart[:, 7:47], "factor": (made["factor"] + below).mT.contiguous().mT}
    assert same_bits(clado_ext.compensate(**made | strange, bits=BITS), wanted)
    turned = made["weight"].T.contiguous().T
    assert same_bits(clado_ext.compensate(**made | {"weight": turned}, bits=BITS), wanted)
    shaped = made["weight"].view(12, 10, 2, 2)
    codes, loss = clado_ext.compensate(**made | {"weight": shaped}, bits=BITS)
    assert same_bits((codes.flatten(2), loss), wanted)


def test_same_bits_at_every_simd_level_and_thread_count() -> None:
    for rows, columns, factors in ((40, 150, 1), (100, 33, 2), (64, 9, 64)):
        made = given_to(case(rows, columns, 8, factors))
        results = at_every_cpu_setting(lambda m=made: clado_ext.compensate(**m, bits=BITS, group_size=8))
        assert all(same_bits(r, results[0]) for r in results)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_finite_spoils_its_row_alone(device: str) -> None:
    made = given_to(case(6, 40), device)
    codes, loss = clado_ext.compensate(**made, bits=BITS)
    made["weight"][1, 3], made["weight"][2, 39], made["scale"][:, 3] = torch.nan, torch.inf, torch.nan
    spoiled, lost = clado_ext.compensate(**made, bits=BITS)
    clean = [0, 4, 5]
    assert same_bits((spoiled[:, clean], lost[:, clean]), (codes[:, clean], loss[:, clean]))
    assert not lost[:, 1:4].isfinite().any()
    assert not spoiled[:, 1, 3:].any()
    made = given_to(case(6, 40), device)
    made["factor"][0, 20, 20] = 0
    assert not clado_ext.compensate(**made, bits=BITS)[1].isfinite().any()


FORMATS = ("int4", "fp8_e4m3", "fp8_e5m2", "mxfp8", "mxfp4", "nvfp4")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "columns", "factors"), [(1, 1, 1), (6, 35, 3), (20, 64, 1)])
def test_every_format_is_the_twin(name: str, rows: int, columns: int, factors: int, device: str) -> None:
    made = case(rows, columns, factors=factors)
    order = torch.stack([torch.randperm(columns) for _ in range(factors)])
    (scale,) = clado_ext.format_search(made["weight"], (name,), steps=5)
    ordered = torch.stack([h[place][:, place] for h, place in zip(made["h"], order, strict=True)])
    given = (made["weight"], factor_of(ordered), scale, order)
    wanted = oracle.compensate_format(*given)
    at = scale._replace(scale=scale.scale.to(device))
    results = [clado_ext.compensate_format(*(x.to(device) for x in given[:2]), at, order.to(device))]
    if device == "cpu":
        results += at_every_cpu_setting(lambda: clado_ext.compensate_format(*given))
    for codes, loss in results:
        assert same_bits(codes.cpu(), wanted[0])
        assert same_bits(loss.cpu(), wanted[1])
    values = clado_ext.dequantize_formats(wanted[0][None], [scale])
    # As for integers: float32 errors of columns that make up for one another.
    torch.testing.assert_close(wanted[1], layer_loss(made["weight"], values, made["h"])[0], rtol=1e-2, atol=1e-12)


def test_a_format_of_nan_spoils_its_row_alone() -> None:
    made = case(4, 32)
    made["weight"][1, 3], made["weight"][2, 5] = torch.nan, torch.inf
    scale = clado_ext.FormatScale("nvfp4", torch.full((4, 2), 0.3), 16)
    codes, loss = clado_ext.compensate_format(made["weight"], made["factor"], scale)
    assert (codes >= 0).all()
    assert loss.isfinite().tolist() == [True, False, False, True]


def test_gradients_do_not_pass() -> None:
    made = given_to(case(3, 8))
    _, loss = clado_ext.compensate(**made | {"weight": made["weight"].requires_grad_()}, bits=BITS)
    assert not loss.requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_op_is_well_formed_and_compiles(device: str) -> None:
    made = given_to(case(6, 40, 16, 2, ranged=True), device)
    order = torch.stack([torch.randperm(40, device=device) for _ in range(2)])
    arguments = (made["weight"], made["factor"], made["scale"], made["zero_point"], order, list(BITS), 16)
    torch.library.opcheck(torch.ops.clado.compensate.default, arguments)
    compiled = torch.compile(
        lambda w: clado_ext.compensate(w, made["factor"], made["scale"], BITS, 16), fullgraph=True, backend="aot_eager"
    )
    wanted = clado_ext.compensate(made["weight"], made["factor"], made["scale"], BITS, 16)
    assert same_bits(compiled(made["weight"]), wanted)


def test_format_op_is_well_formed_and_compiles() -> None:
    made = case(5, 32)
    (scale,) = clado_ext.format_search(made["weight"], ("nvfp4",), steps=5)
    given = (made["weight"], made["factor"], scale.scale, None, None, 16, 16)
    torch.library.opcheck(torch.ops.clado.compensate_format.default, given)
    compiled = torch.compile(clado_ext.compensate_format, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(*given[:2], scale), clado_ext.compensate_format(*given[:2], scale))
    with pytest.raises(ValueError, match="compensate_format: formats must be among int2, "):
        clado_ext.compensate_format(*given[:2], scale._replace(format="fp3"))
    with pytest.raises(ValueError, match="compensate_format: scale must be a FormatScale, got"):
        clado_ext.compensate_format(*given[:3])


def test_nothing_to_round() -> None:
    one = torch.ones(1, 0, 1)
    codes, loss = clado_ext.compensate(torch.ones(0, 5), torch.eye(5)[None], one, (4,))
    assert (codes.shape, loss.shape) == ((1, 0, 5), (1, 0))
    codes, loss = clado_ext.compensate(torch.ones(5, 0), torch.ones(1, 0, 0), torch.ones(1, 5, 0), (4,))
    assert codes.shape == (1, 5, 0)
    assert loss.tolist() == [[0.0] * 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": torch.eye(4)}, r"factor must be \[G, K, K\] where G divides the 6 rows, got \(4, 4\)"),
        ({"factor": torch.ones(1, 4, 5)}, r"factor must have shape \(1, 4, 4\), got \(1, 4, 5\)"),
        ({"factor": torch.eye(4).double()[None]}, "factor must be float32, got torch.float64"),
        ({"scale": torch.ones(2, 6, 1)}, r"scale must have shape \(1, 6, 1\), got \(2, 6, 1\)"),
        ({"zero_point": torch.zeros(1, 6, 1)}, "zero_point must be int8, got torch.float32"),
        ({"order": torch.arange(4)}, r"order must have shape \(1, 4\), got \(4,\)"),
        ({"order": torch.arange(4).int()[None]}, "order must be int64, got torch.int32"),
        ({"order": torch.tensor([[0, 1, 1, 3]])}, "order must name every column once per factor, got"),
        ({"order": torch.tensor([[0, 1, 2, 4]])}, "order must name every column once per factor, got"),
        ({"order": torch.tensor([[0, 1, 2, -1]])}, "order must name every column once per factor, got"),
        ({"bits": (4, 2)}, "bits must be distinct ascending widths"),
        ({"weight": torch.ones(6, 4).int()}, "weight must be float32"),
        ({"weight": None}, "weight must be a dense tensor"),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    good = {"weight": torch.ones(6, 4), "factor": torch.eye(4)[None], "scale": torch.ones(1, 6, 1), "bits": (4,)}
    with pytest.raises(ValueError, match=f"^compensate: {message}"):
        clado_ext.compensate(**good | change)
