"""Candidates: what is counted, which rows are whose, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import clado
from clado import CladoError, Layer, Quantizer
from clado.artifacts import Sensitivity
from clado.quant import NUMBERS, Candidates, Scheme, candidates_of, stored_bytes
from clado.quant.numbers import Integer

LABELS = [f"W{bits}A{inputs}" for bits in range(2, 9) for inputs in range(1, 17)]
LAYERS = (
    Layer("a", "linear", (4, 6), 48),
    Layer("b.qkv", "linear", (5, 3), 0),
    Layer("b.proj", "conv2d", (2, 2, 3, 3), 9),
)


def ordered(labels: list[str]) -> tuple[Scheme, ...]:
    return tuple(sorted(map(Scheme.of, labels)))


@given(st.lists(st.lists(st.sampled_from(LABELS), min_size=1, max_size=16, unique=True), min_size=3, max_size=3))
def test_rows_bytes_and_bits_of_ragged_lists(lists: list[list[str]]) -> None:
    candidates = Candidates(LAYERS, tuple(map(ordered, lists)))
    flat = [(k, scheme) for k, own in enumerate(candidates.schemes) for scheme in own]
    assert len(candidates) == len(flat) == candidates.starts[-1]
    assert candidates.counts == tuple(map(len, lists))
    assert candidates.layer_of.tolist() == [k for k, _ in flat]
    assert list(candidates.flat) == [scheme for _, scheme in flat]
    quantizer = Quantizer(3, 1, False)
    for v, (k, scheme) in enumerate(flat):
        layer = LAYERS[k]
        assert candidates.index(layer.name, scheme) == candidates.index(layer.name, scheme.label) == v
        assert candidates.has(layer.name, scheme)
        assert candidates.block(k).start <= v < candidates.block(k).stop
        assert candidates.code_bits[v] == layer.numel * scheme.bits
        assert candidates.bitops(8)[v] == layer.macs * scheme.bits * 8
        wanted = quantizer.storage_bytes(layer.shape, scheme.bits)
        assert candidates.stored_bytes(quantizer)[v] == stored_bytes(layer, scheme, quantizer) == wanted
    same = candidates.same_layer
    assert same.tolist() == [[k == other for other, _ in flat] for k, _ in flat]
    first = candidates.choice(candidates.starts[:-1])
    assert candidates.indices(first).tolist() == candidates.starts[:-1].tolist()
    assert np.flatnonzero(candidates.one_hot(first)).tolist() == candidates.starts[:-1].tolist()
    assert candidates.bits == tuple(sorted({scheme.bits for _, scheme in flat}))


def test_a_format_that_is_no_integer_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Eighth(Integer):
        """Eight bits under another name."""

        name = "fp8_toy"

    monkeypatch.setitem(NUMBERS, "fp8_toy", Eighth(8))
    toy, rounded = Scheme("fp8_toy"), Scheme("fp8_toy", "int8")
    assert (toy.label, rounded.label, str(toy)) == ("FP8_TOY", "FP8_TOYA8", "FP8_TOY")
    assert (Scheme.of("FP8_TOY"), Scheme.of("FP8_TOYA8")) == (toy, rounded)
    sens = Sensitivity.from_matrix(np.diag([3.0, 2.0, 1.0]), [("a", 6)], schemes=[("W4A16", "FP8_TOY", "W8A16")])
    plan = clado.solve(sens, avg_bits=8, pin={"a": "FP8_TOY"})
    assert plan.schemes == {"a": "FP8_TOY"}
    assert clado.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(CladoError, match=r"label must be one of W2A16 … W8A16 .*, FP8_TOY, got 'FP9'"):
        Scheme.of("FP9")


def test_rounded_inputs_need_their_ranges() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    layer = Layer("0", "linear", (4, 6), 24, ("0.weight",))
    with pytest.raises(
        CladoError, match="apply: plan must hold ranges of the inputs that its schemes round, got none for W4A8 of 0"
    ):
        clado.apply(model, clado.Plan((layer,), {"0": "W4A8"}, "given"))


@given(st.sampled_from(LABELS))
def test_labels_are_read_back(label: str) -> None:
    assert Scheme.of(label).label == label
    assert Scheme.of(Scheme.of(label)) == Scheme.of(label)
    assert NUMBERS[Scheme.of(label).weight].bits == Scheme.of(label).bits == int(label[1])


def test_bits_mean_the_only_scheme_of_so_many() -> None:
    candidates = Candidates(LAYERS[:2], (ordered(["W4A8", "W8A8"]), ordered(["W4A4", "W4A8"])))
    assert candidates.index("a", 4) == 0
    with pytest.raises(CladoError, match=r"bits must be one of \(4, 4\) for b.qkv, got 4"):
        candidates.index("b.qkv", 4)
    assert not candidates.has("a", 2)
    assert not candidates.has("nowhere", 4)


def test_a_list_for_every_pattern() -> None:
    candidates = candidates_of(LAYERS, {"b.*": (2, 4), "*": ("W8A16",)})
    assert candidates.counts == (1, 2, 2)
    assert candidates.label(1) == "b.qkv at 2 bits"
    for patterns, line in (
        ({"b.*": (2,)}, "schemes must have a pattern for every layer, got none for a"),
        ({"*": (2,), "b.*": (4,)}, r"schemes must hold patterns that fit a layer first, got \['b.\*'\]"),
    ):
        with pytest.raises(CladoError, match=line):
            candidates_of(LAYERS, patterns)


@pytest.mark.parametrize("bits", [(8, 2), (4, 4), ()])
def test_lists_that_are_no_ascending_ones_are_refused(bits: tuple[int, ...]) -> None:
    with pytest.raises(CladoError, match="be distinct ones of ascending bits, at least one"):
        Sensitivity.from_matrix(np.zeros((len(bits),) * 2), [("a", 6)], bits=bits)


@pytest.mark.parametrize("given", ["W9A16", "W4", "w4a16", "", "W4A17", "W4A0", 1, 9, 2.5, True, None])
def test_unknown_schemes_are_refused(given: object) -> None:
    with pytest.raises(CladoError, match=r"(label must be one of W2A16|bits must lie in)"):
        Scheme.of(given)  # type: ignore[arg-type]


def test_operations_count_the_bits_of_each_candidates_input() -> None:
    layers = (Layer("a", "linear", (2, 3), 6, ("a",)), Layer("b", "linear", (4, 2), 80, ("b",)))
    candidates = Candidates.uniform(layers, ("W4A8", "W8A16"))
    assert candidates.bitops().tolist() == [6 * 4 * 8, 6 * 8 * 32, 80 * 4 * 8, 80 * 8 * 32]
    assert candidates.bitops(16).tolist() == [6 * 4 * 16, 6 * 8 * 16, 80 * 4 * 16, 80 * 8 * 16]
