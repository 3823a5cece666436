"""The two calls that quantize: the same values from both, every scale searched once, and never a stale one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clado
import clado_ext
from clado.common import tensor_digest
from clado.deploy import pack_model, time_layers, verify
from clado.quant import (
    ROUNDINGS,
    Candidates,
    Number,
    Quantizer,
    Rounded,
    Rounding,
    Scheme,
    codes,
    round_weights,
    variants,
    weights,
)
from clado.quant.factors import Factors
from clado.quant.numbers import Scales
from clado.quant.rounding import Coded
from clado.quant.scaling import Scaling
from tests.models import random_plan, small_cnn, tiny_vit

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No scales of other tests."""
    monkeypatch.setattr(weights, "_SCALES", weights._Kept(1 << 20))


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often a scale was searched, by (digest of the weight, width or format)."""
    count: Counter[tuple[str, int]] = Counter()

    def counting(search: Callable[..., Any]) -> Callable[..., Any]:
        def run(weight: Tensor, formats: Any, *rest: int) -> Any:
            count.update((tensor_digest({"": weight}), own) for own in formats)
            return search(weight, formats, *rest)

        return run

    for name in ("scale_search", "range_search", "format_search", "quantize_weight"):
        monkeypatch.setattr(clado_ext, name, counting(getattr(clado_ext, name)))
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("quantizer", [Quantizer(), Quantizer(0, 3, False), Quantizer(5, 3)])
def test_both_calls_give_what_the_quantizer_gives(dtype: torch.dtype, quantizer: Quantizer) -> None:
    model = tiny_vit()[0].to(dtype)
    plan = random_plan(model, quantizer)
    widths = [sorted({plan.bits[layer.name], *range(2, 2 + k % 3)}) for k, layer in enumerate(plan.layers)]  # ragged
    candidates = Candidates(plan.layers, tuple(tuple(map(Scheme.of, own)) for own in widths))
    found = variants(model, candidates, quantizer, CPU, torch.float64)
    held = codes(model, plan)
    assert [len(own) for own in found] == [len(own) for own in widths]
    for layer, own, wide in zip(plan.layers, found, widths, strict=True):
        weight = model.get_parameter(layer.names[0])
        for value, bits in zip(own, wide, strict=True):
            assert value.weight.dtype == torch.float64
            assert torch.equal(value.weight, quantizer.fake_quant(weight, (bits,))[0].double())
        bits = plan.bits[layer.name]
        quantized, alone = held[layer.name], quantizer.quantize(weight, bits)
        assert torch.equal(quantized.codes, alone.codes)
        assert torch.equal(quantized.values(dtype), own[wide.index(bits)].weight.to(dtype))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_scale_is_searched_once_from_profile_to_a_loaded_export(
    symmetric: bool, tmp_path: Path, searched: Counter[tuple[str, int]]
) -> None:
    model, shape = small_cnn()
    x, bits = torch.randn(8, *shape), (2, 4, 8)
    how: dict[str, Any] = {"group_size": 5, "symmetric": symmetric, "num_samples": 8, "rounding": "nearest"}
    sens = clado.profile(model, [x], bits=bits, verbose=False, **how)
    plans = [clado.solve(sens, avg_bits=b, time_limit=2) for b in (3, 5)]
    best = clado.rerank(model, [x], plans)
    clado.correct(model, [x], sens, avg_bits=4, time_limit=2, verbose=False)
    clado.refine(model, [x], sens, best, avg_bits=4, rounds=1, time_limit=2, verbose=False)
    clado.apply(model, best)
    pack_model(model, best)
    time_layers(model, sens, x, repeats=1, verbose=False)
    written = [("safetensors", {}), ("compressed-tensors", {}), ("onnx", {"example": x[:2]})]
    for format, options in written:
        if format != "safetensors":
            pytest.importorskip({"onnx": "onnxruntime"}.get(format, "compressed_tensors"))
        clado.export(model, best, tmp_path / format, format, **options)
        verify(model, best, tmp_path / format, format, **options)
    clado.load(tmp_path / "safetensors", model, packed=True)
    assert len(searched) == len(sens.layers) * len(bits)
    assert set(searched.values()) == {1}


def test_a_weight_that_changes_in_place_is_searched_again(searched: Counter[tuple[str, int]]) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    plan = random_plan(model, Quantizer(), (3,))
    for change in (
        lambda w: w,
        lambda w: w.mul_(3),
        lambda w: w.data.mul_(3),
    ):  # the last one leaves torch's version alone
        with torch.no_grad():
            change(model[0].weight)
        wanted = plan.quantizer.quantize(model[0].weight, 3)
        found = codes(model, plan)["0"]
        assert torch.equal(found.scale, wanted.scale)
        assert torch.equal(found.codes, wanted.codes)
    assert len(searched) == 4  # three contents of one weight, one of the other


def test_settings_and_widths_do_not_meet(searched: Counter[tuple[str, int]]) -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    settings = [Quantizer(*s) for s in ((-1, 9), (0, 9), (2, 9), (2, 10), (2, 10, False))]
    for _ in range(2):
        for quantizer in settings:
            for bits in (2, 3):
                found = codes(model, random_plan(model, quantizer, (bits,)))["0"]
                assert torch.equal(found.values(torch.float32), quantizer.fake_quant(model[0].weight, (bits,))[0])
    assert sum(searched.values()) == 3 * len(settings) * 2  # the quantizer's own calls keep nothing


def test_who_changes_a_result_changes_no_other(searched: Counter[tuple[str, int]]) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    plan = random_plan(model, Quantizer(symmetric=False), (4,))
    with torch.inference_mode():
        wanted = codes(model, plan)["0"].values(torch.float32).clone()
    for _ in range(2):
        found = codes(model, plan)["0"]
        assert torch.equal(found.values(torch.float32), wanted)
        assert not found.scale.is_inference()
        found.scale.zero_()
        found.zero_point.fill_(1)
    assert set(searched.values()) == {1}


def scales(size: int) -> Scales:
    return Scales(torch.full((size, 1), float(size)), torch.ones(size, 1, dtype=torch.int8), -1)


def test_kept_scales_are_bounded_and_the_least_used_go() -> None:
    kept = weights._Kept(limit=100)
    for size in (5, 6, 7):  # 25, 30, 35 bytes
        kept.put(size, scales(size))
    assert kept.nbytes == 90
    assert kept.get(5, CPU) is not None
    kept.put(8, scales(8))  # 40 bytes: 6 goes, the least used, and that is enough
    assert [size for size in (5, 6, 7, 8) if kept.get(size, CPU) is not None] == [5, 7, 8]
    assert kept.nbytes == 100
    kept.put(8, scales(8))
    assert kept.nbytes == 100
    kept.put(30, scales(30))  # more than all: not kept
    assert kept.nbytes == 0
    assert kept.get(30, CPU) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_share_scales(searched: Counter[tuple[str, int]]) -> None:
    model = tiny_vit()[0]
    plan = random_plan(model, Quantizer(5, 9, False))
    here = codes(model, plan)
    there = codes(model.cuda(), plan)
    for name, found in there.items():
        assert found.scale.is_cuda
        assert torch.equal(found.codes.cpu(), here[name].codes)
        assert torch.equal(found.values(torch.float32).cpu(), here[name].values(torch.float32))
    assert set(searched.values()) == {1}


class Down(Rounding):
    """A toy: one code below the nearest where the first input is the strongest."""

    needs_moments = True

    def rounded(
        self, matrix: Tensor, numbers: Sequence[Number], scaling: Scaling, factors: Factors | None
    ) -> list[Coded]:
        assert factors is not None
        found = ROUNDINGS["nearest"].rounded(matrix, numbers, scaling, None)
        down = int(factors.order[0, 0] == 0)
        return [
            ((own - down).clamp_min(-(2 ** (n.bits - 1))), scales)
            for n, (own, scales) in zip(numbers, found, strict=True)
        ]


def test_another_rounding_is_one_class_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUNDINGS, "down", Down())
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    near = random_plan(model, Quantizer(), (4,))
    candidates = Candidates.uniform(near.layers, (3, 4))
    moments = {"0": torch.diag(torch.tensor([2.0, 1, 1, 1, 1, 1]))[None], "1": torch.diag(torch.arange(1.0, 6))[None]}
    seen: list[None] = []
    made = round_weights(model, candidates, near.quantizer, "down", moments, torch.arange(7), lambda: seen.append(None))
    assert len(seen) == 2
    assert made.by.rounding == "down"
    assert made.by.samples == 7
    down = replace(near, rounding=made.by, held=made)
    nearest, found = codes(model, near), codes(model, down)
    assert torch.equal(found["0"].codes, (nearest["0"].codes - 1).clamp_min(-8))
    assert torch.equal(found["1"].codes, nearest["1"].codes)
    settings = (near.quantizer, CPU, torch.float32)
    measured = variants(model, candidates, *settings, made)
    for own, wanted in zip(measured, found.values(), strict=True):
        assert torch.equal(own[1].weight, wanted.values(torch.float32))


def test_rounded_weights_that_do_not_fit_are_one_line() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    plan = random_plan(model, Quantizer(), (4,))
    candidates = Candidates.uniform(plan.layers, (4,))
    moments = {"0": torch.eye(6)[None], "1": torch.eye(5)[None]}
    digests = torch.zeros(1, dtype=torch.int64)

    def rounded(rounding: str = "compensated", **changed: Tensor) -> Rounded:
        given = {name: own for name, own in (moments | changed).items() if own.numel()}
        return round_weights(model, candidates, plan.quantizer, rounding, given, digests)

    for message, arguments in (
        ("round: rounding must be one of compensated, got 'nearest'", {"rounding": "nearest"}),
        ("round: rounding must be one of compensated, got 'up'", {"rounding": "up"}),
        ("round: moments must be there for 1 and compensated rounding, got none", {"1": torch.zeros(0)}),
        (r"round: moments must be \[G, 5, 5\] for 1, got \(1, 6, 6\)", {"1": torch.eye(6)[None]}),
        (r"round: moments must be \[G, 5, 5\] for 1, got \(2, 5, 5\)", {"1": torch.eye(5).repeat(2, 1, 1)}),
        ("round: moments must be finite for 1, got NaN or infinity", {"1": torch.full((1, 5, 5), torch.nan)}),
    ):
        with pytest.raises(clado.CladoError, match=f"^{message}$"):
            rounded(**arguments)
    made = rounded()
    with pytest.raises(clado.CladoError, match="quantize: rounded weights must be made with"):
        variants(model, candidates, Quantizer(scale_steps=3), CPU, torch.float32, made)
    with pytest.raises(clado.CladoError, match="round: rounded weights must hold 0 as int3"):
        variants(model, Candidates.uniform(plan.layers, (3,)), plan.quantizer, CPU, torch.float32, made)
    with pytest.raises(clado.CladoError, match="plan: rounded weights must be at hand, got none"):
        codes(model, replace(plan, rounding=made.by))
