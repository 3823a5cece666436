"""Every op behind torch's dispatcher: fake and meta tensors, inference mode, inductor, and more than 2^31 elements."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import clado_ext
from clado_ext.reference import bitpack as pack_oracle
from tests.ops.devices import DEVICES, same_bits

BITS = (2, 4)


def inputs(device: str = "cpu") -> dict[str, torch.Tensor]:
    return {
        "weight": torch.randn(4, 3, 5, device=device),
        "codes": torch.randint(-8, 8, (3, 40), dtype=torch.int8, device=device),
        "factor": torch.randn(2, 15, 15, device=device).triu() + 4 * torch.eye(15, device=device),
        "logits": torch.randn(3, 10, device=device),
        "delta": torch.randn(2, 3, 10, device=device),
    }


WORKS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "quantize_weight": lambda x: tuple(clado_ext.quantize_weight(x["weight"], BITS, 7, 5)[:3]),
    "asymmetric": lambda x: tuple(clado_ext.quantize_weight(x["weight"], BITS, -1, 5, symmetric=False)),
    "importance": lambda x: clado_ext.range_search(x["weight"], BITS, 7, 5, x["factor"][:, 0].square()),
    "scale_errors": lambda x: clado_ext.scale_errors(x["weight"], x["delta"][:, 0, :4].abs().unsqueeze(2), -8, 7),
    "quantize": lambda x: clado_ext.quantize(x["weight"], clado_ext.scale_search(x["weight"], BITS), BITS),
    "compensate": lambda x: clado_ext.compensate(
        x["weight"], x["factor"], clado_ext.scale_search(x["weight"], BITS), BITS
    ),
    "bitpack": lambda x: clado_ext.unpack(clado_ext.pack(x["codes"], 4, 0), 4, 3, 0),
    "batched_ce": lambda x: clado_ext.batched_ce(x["logits"], x["delta"]),
    "pairwise_bce": lambda x: clado_ext.pairwise_bce(x["logits"].view(-1), x["delta"].view(2, -1), None, 10),
    "pairwise_ce": lambda x: clado_ext.pairwise_ce(x["logits"], x["delta"]),
    "pairwise_ce_blocks": lambda x: clado_ext.pairwise_ce(
        x["logits"], x["delta"], x["logits"][:, 0].abs(), 3, x["delta"][:1]
    ),
    "pairwise_mse": lambda x: clado_ext.pairwise_mse(x["delta"], x["logits"].abs(), x["delta"][:1]),
}


def described(x: Any) -> Any:
    return [(tuple(y.shape), y.dtype) for y in (x if isinstance(x, tuple) else (x,))]


@pytest.mark.parametrize("name", list(WORKS))
def test_fake_and_meta_tensors_have_the_shapes_of_real_ones(name: str) -> None:
    real = inputs()
    wanted = described(WORKS[name](real))
    assert described(WORKS[name]({k: v.to("meta") for k, v in real.items()})) == wanted
    with FakeTensorMode() as mode:
        got = WORKS[name]({k: mode.from_tensor(v) for k, v in real.items()})
    assert described(got) == wanted


@pytest.mark.parametrize("device", DEVICES)
def test_inference_mode_changes_nothing(device: str) -> None:
    given = inputs(device)
    for work in WORKS.values():
        wanted = work(given)
        with torch.inference_mode():
            assert same_bits(work(given), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_inductor_compiles_all_ops_into_one_graph(device: str) -> None:
    given = inputs(device)

    def everything(x: dict[str, torch.Tensor]) -> list[Any]:
        return [work(x) for work in WORKS.values()]

    for got, wanted in zip(torch.compile(everything, fullgraph=True)(given), everything(given), strict=True):
        assert same_bits(got, wanted)


@pytest.mark.large
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [2**30 + 33, 2**30 + 64])  # rows that start anywhere, and on 64 bytes
def test_more_than_two_to_the_31_elements(columns: int, device: str) -> None:
    codes = torch.randint(-2, 2, (3, columns), dtype=torch.int8, device=device)
    packed = clado_ext.pack(codes, 2)
    tail = packed[2, -1000:]  # 16 codes a word; the last one may hold fewer
    assert torch.equal(tail, pack_oracle.pack(codes[2, 999 * -16 - (columns % 16 or 16) :], 2))
    assert torch.equal(clado_ext.unpack(packed, 2, columns), codes)
    del packed
    weight, scale = codes.view(3, -1).to(torch.bfloat16), torch.ones(1, 3, 1, device=device)
    values, error = clado_ext.fake_quant(weight, scale, (2,))
    assert torch.equal(values[0], weight)
    assert not error.any()
