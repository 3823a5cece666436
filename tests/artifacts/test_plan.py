"""Plan as a file: it comes back equal, and nothing else is taken for one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import clado
from clado import CladoError, Plan
from tests.solver import instances

LAYERS = [f"layer{i}" for i in range(4)]


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
    assert plan.usage["avg_bits"]["used"] == pytest.approx(plan.avg_bits)
    assert plan.avg_bits <= plan.usage["avg_bits"]["limit"] == 4
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
        ({"schema": 4}, "schema must be 1 to 3, got 4"),
        ({"schema": None}, "schema must be 1 to 3"),
        ({"status": "great"}, "status must be one of"),
        ({"status": None}, "status must be one of"),
        ({"schemes": []}, "schemes must be an object"),
        ({"schemes": dict.fromkeys(LAYERS, "W9A16")}, "label must be one of"),
        ({"schemes": dict.fromkeys(LAYERS, "4")}, "label must be one of"),
        ({"schemes": dict.fromkeys(LAYERS, True)}, "bits must lie in"),
        ({"schemes": {"layer0": "W4A16"}}, "schemes must name every layer"),
        ({"schemes": {}}, "schemes must be there unless infeasible"),
        ({"bits": dict.fromkeys(LAYERS, 7)}, "bits must be those of the schemes"),
        ({"objective": "low"}, "file must be a whole clado plan"),
        ({"layers": [{}]}, "file must be a whole clado plan"),
        ({"layers": 3}, "file must be a whole clado plan"),
        ({"values": None}, "values must be an object"),
        ({"info": []}, "info must be an object"),
        ({"quantizer": None}, "file must be a whole clado plan"),
        ({"quantizer": {"speed": 1}}, "file must be a whole clado plan"),
    ],
)
def test_hostile_content_is_refused(plan: Plan, change: dict, message: str) -> None:
    data = {**json.loads(plan.to_json()), **change}
    if "schemes" in change:
        del data["bits"]  # derived from them
    with pytest.raises(CladoError, match=message):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '{"a": 1}', "[" * 100_000, '{"schema": 1}', '{"schema": NaN}'])
def test_foreign_text_is_refused(text: str) -> None:
    with pytest.raises(CladoError, match="plan: "):
        Plan.from_json(text)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(CladoError, match="path must be a plan file"):
        Plan.load(tmp_path)
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CladoError, match="file must be a clado plan"):
        Plan.load(tmp_path)
    (tmp_path / "plan.json").write_text("{" + " " * 10)
    with pytest.raises(CladoError, match="file must be a whole clado plan"):
        Plan.load(tmp_path)
