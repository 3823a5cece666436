"""Results are those of the record: to the bit on the machine that wrote it, else as close as its sums allow."""

from __future__ import annotations

import copy
import importlib.util

import numpy as np
import pytest

from .cases import CASES, Found, found
from .record import differences, machine, read


@pytest.fixture(scope="module")
def record() -> tuple[bool, dict[str, Found]]:
    where, cases = read()
    return where == machine(), cases


@pytest.mark.parametrize("name", CASES)
def test_as_recorded(name: str, record: tuple[bool, dict[str, Found]]) -> None:
    if name.startswith("onnx") and importlib.util.find_spec("onnxscript") is None:
        pytest.skip("onnx is not installed")
    same_machine, cases = record
    assert not differences(cases[name], found(name), same_machine)


def test_the_record_holds_these_cases(record: tuple[bool, dict[str, Found]]) -> None:
    assert list(record[1]) == list(CASES)


def test_a_difference_is_found() -> None:
    """One bit on the same machine, more than the tolerance on another, and a code anywhere."""
    held = Found({"codes": "a"}, {"bits": {"fc": 2}}, {"delta_loss": np.array([1.0, 0.5, np.nan])}, 1e-3)
    assert not differences(held, copy.deepcopy(held), True)
    changes = [("floats", np.array([np.nextafter(1.0, 2), 0.5, np.nan])), ("floats", np.array([1.0, 0.6, np.nan]))]
    changes += [
        ("floats", np.array([1.0, np.nan, np.nan])),
        ("floats", np.array([1.0, 0.5])),
        ("local", None),
        ("exact", None),
    ]
    seen = []
    for kind, array in changes:
        now = copy.deepcopy(held)
        if array is None:
            getattr(now, kind)["more"] = 1
        else:
            now.floats["delta_loss"] = array
        seen.append([bool(differences(held, now, same_machine)) for same_machine in (True, False)])
    assert seen == [[True, False], [True, True], [True, True], [True, True], [True, False], [True, True]]
