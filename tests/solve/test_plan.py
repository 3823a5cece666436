"""Plan as a file: it comes back equal, and nothing else is taken for one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import clado
import pytest
from clado import CladoError, Plan

from tests.solve import instances


@pytest.fixture(scope="module")
def plan() -> Plan:
    sens = instances.sensitivity(1, 4, (2, 4, 8))
    return replace(clado.solve(sens, avg_bits=4, size_mb=1), fingerprint={"weights": "ab", "data": "cd"})


def test_round_trip(plan: Plan, tmp_path: Path) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.save(tmp_path) == tmp_path / "plan.json"
    assert Plan.load(tmp_path) == plan
    assert Plan.load(plan.save(tmp_path / "other.json")) == plan
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json", "plan.json"]


def test_counts(plan: Plan) -> None:
    sens = instances.sensitivity(1, 4, (2, 4, 8))
    assert list(plan.bits) == [layer.name for layer in sens.layers]
    assert plan.size_bytes == sum(
        sens.quantizer.storage_bytes(layer.shape, plan.bits[layer.name]) for layer in sens.layers
    )
    assert plan.usage["size_mb"]["used"] == plan.size_bytes / 2**20
    assert plan.usage["avg_bits"]["used"] == plan.avg_bits <= plan.usage["avg_bits"]["limit"] == 4
    assert plan.objective == plan.values["original"] == pytest.approx(sens.predict(plan.bits))
    assert plan.values["diagonal"] == pytest.approx(
        sum(sens.delta_loss[sens.index(n, b)] for n, b in plan.bits.items())
    )


def test_every_truncation_is_refused(plan: Plan) -> None:
    text = plan.to_json()
    for end in range(0, len(text) - 1, 7):
        with pytest.raises(CladoError) as error:
            Plan.from_json(text[:end])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clado.plan": 2}, "schema must be 1, got 2"),
        ({"clado.plan": None}, "schema must be 1"),
        ({"extra": 1}, "fields must be exactly"),
        ({"status": "great"}, "status must be one of"),
        ({"status": None}, "status must be str"),
        ({"bits": []}, "bits must be dict"),
        ({"bits": {"layer0": 9}}, "bits must be widths"),
        ({"bits": {"layer0": "4"}}, "bits must be widths"),
        ({"bits": {"layer0": True}}, "bits must be widths"),
        ({"bits": {"layer0": 4}}, "layer_bytes must name the layers"),
        ({"bits": {}}, "bits must be empty if infeasible"),
        ({"objective": "low"}, "objective must be"),
        ({"objective": True}, "objective must be"),
        ({"layer_bytes": {"layer0": -1}}, "layer_bytes must hold counts"),
        ({"quantizer": None}, "quantizer must be dict"),
    ],
)
def test_hostile_content_is_refused(plan: Plan, change: dict, message: str) -> None:
    with pytest.raises(CladoError, match=message):
        Plan.from_json(json.dumps({**json.loads(plan.to_json()), **change}))


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", '{"a": 1}', "[" * 100_000, '{"clado.plan": 1}', '{"clado.plan": NaN}']
)
def test_foreign_text_is_refused(text: str) -> None:
    with pytest.raises(CladoError, match="plan: "):
        Plan.from_json(text)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(CladoError, match="path must be a plan file"):
        Plan.load(tmp_path)
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CladoError, match="path must be a clado plan"):
        Plan.load(tmp_path)
    (tmp_path / "plan.json").write_text("{" + " " * 10)
    with pytest.raises(CladoError, match="text must be a whole clado plan"):
        Plan.load(tmp_path)
