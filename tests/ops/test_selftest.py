"""python -m clado_ext.selftest: covers every op, passes here, and fails where an op is wrong."""

import pkgutil
from collections.abc import Callable
from typing import Any

import pytest

import clado_ext
from clado_ext import reference, selftest
from tests.ops.devices import DEVICES


def test_every_stem_is_checked() -> None:
    stems = {module.name for module in pkgutil.iter_modules(reference.__path__)}
    assert set(selftest.CHECKS) == stems - {"iqp_prove"}  # whose bounds are proofs, not values


@pytest.mark.parametrize("device", DEVICES)
def test_this_build_passes(device: str) -> None:
    assert not any(selftest.failures(device).values())


def off_by_one(op: Callable[..., Any]) -> Callable[..., Any]:
    def run(*given: Any, **more: Any) -> Any:
        found = op(*given, **more)
        return (found[0] + 1, *found[1:]) if isinstance(found, tuple) else found + 1

    return run


@pytest.mark.parametrize("name", ["pack", "fake_quant", "pairwise_ce", "carried_gelu", "iqp_search"])
def test_a_wrong_op_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clado_ext, name, off_by_one(getattr(clado_ext, name)))
    wrong = {stem for stem, said in selftest.failures("cpu").items() if said}
    assert wrong == {{"pack": "bitpack", "carried_gelu": "carried"}.get(name, name)}


def test_chance_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10**6))
    op = clado_ext.batched_ce
    monkeypatch.setattr(clado_ext, "batched_ce", lambda *given: op(*given) * (1 + 1e-9 * next(calls)))
    assert "depend" in "".join(selftest.failures("cpu")["batched_ce"])


def test_main_ends_with_one_where_an_op_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selftest, "failures", lambda device: {"bitpack": ["wrong"], "carried": []})
    with pytest.raises(SystemExit) as ended:
        selftest.main()
    assert ended.value.code == 1
    assert "bitpack        wrong" in capsys.readouterr().out
