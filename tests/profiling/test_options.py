"""The arguments of profile: written once, shown everywhere, checked, and the settings that run directories hold."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import nn

import clado
from clado import CladoError, Layer, Quantizer
from clado.common import code_digest, digest
from clado.profiling import Options, open_run, plan_run, profile

NAMES = [f.name for f in fields(Options)]
LAYERS = [
    Layer("stem", "conv2d", (4, 3, 3, 3), 10),
    Layer("0.attn.qkv", "linear", (8, 8), 10),
    Layer("0.mlp.fc1", "linear", (8, 8), 10),
]


def own_loss(output: torch.Tensor, batch: object) -> torch.Tensor:
    return output.sum(-1)


def test_every_argument_is_in_the_signature_and_in_the_docstring() -> None:
    for function in (profile, plan_run):
        shown = inspect.signature(function).parameters
        assert list(shown) == ["model", "data_loader", *NAMES, "verbose"]
        assert {name: shown[name].default for name in NAMES} == {f.name: f.default for f in fields(Options)}
    text = " ".join((profile.__doc__ or "").split())
    for name, about in Options.about().items():
        assert f" {name}: {' '.join(about.help.split())}" in text
        assert about.help.endswith(".")
        assert about.line  # an option, or why there is none
    assert "options:" not in text
    assert max(map(len, (profile.__doc__ or "").splitlines())) <= 126


def test_an_argument_that_is_unknown_is_one_line_with_the_nearest() -> None:
    for call in (profile, plan_run):
        with pytest.raises(CladoError, match=r"^profile: arguments must be .*, got nsamples \(meant: num_samples or"):
            call(nn.Flatten(), [], nsamples=3)


# What the settings of a run were before the arguments were fields; directories that hold them go on.
BEFORE = {"products": "float32", "act_ranges": None, "device": "cpu"}
RECORDED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {},
        {
            "bits": [2, 4, 8],
            "estimator": "logit",
            "exact_samples": None,
            "loss": "kl",
            "forward_step": None,
            "precision": "float32",
            "batch_size": 256,
            "quantizer": {"group_size": -1, "scale_steps": 95, "symmetric": True},
            "act_bits": None,
            "act_samples": None,
            "device": "cpu",
        },
    ),
    (
        {
            "bits": (8, 2),
            "estimator": "corrected",
            "loss": "cross_entropy",
            "precision": "float64",
            "batch_size": 4,
            "group_size": 0,
            "scale_steps": 1,
            "symmetric": False,
            "seed": 3,
            "ignore": ["0"],
            "quantize_ends": True,
        },
        {
            "bits": [2, 8],
            "estimator": "corrected",
            "exact_samples": 2,
            "loss": "cross_entropy",
            "forward_step": None,
            "precision": "float64",
            "batch_size": 4,
            "quantizer": {"group_size": 0, "scale_steps": 1, "symmetric": False},
            "act_bits": None,
            "act_samples": None,
            "device": "cpu",
        },
    ),
    (
        {"act_bits": 8, "estimator": "diagonal", "precision": "bfloat16", "max_memory": 1 << 30},
        {
            "bits": [2, 4, 8],
            "estimator": "diagonal",
            "exact_samples": None,
            "loss": "kl",
            "forward_step": None,
            "precision": "bfloat16",
            "batch_size": 256,
            "quantizer": {"group_size": -1, "scale_steps": 95, "symmetric": True},
            "act_bits": 8,
            "act_samples": 16,
            "device": "cpu",
        },
    ),
    (
        {"loss_func": own_loss, "estimator": "exact", "loss": "anything"},
        {
            "bits": [2, 4, 8],
            "estimator": "exact",
            "exact_samples": None,
            "loss": code_digest(own_loss),
            "forward_step": None,
            "precision": "float32",
            "batch_size": 256,
            "quantizer": {"group_size": -1, "scale_steps": 95, "symmetric": True},
            "act_bits": None,
            "act_samples": None,
            "device": "cpu",
        },
    ),
]


@pytest.mark.parametrize(("given", "recorded"), RECORDED, ids=["plain", "corrected", "inputs", "own loss"])
def test_settings_are_those_of_earlier_runs(given: dict[str, Any], recorded: dict[str, Any]) -> None:
    found = {name: recorded[name] for name in ("exact_samples", "batch_size", "act_samples", "device")}
    options = Options(rounding="nearest", **given)
    settings = options.settings(**found)
    assert json.loads(json.dumps(settings, default=list)) == recorded
    assert digest(settings) == digest(recorded)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    data = [(torch.randn(16, 4), torch.zeros(16, dtype=torch.int64))]
    run = open_run(model, data, options)
    assert {name: run.settings[name] for name in recorded} | settings == dict(settings)
    if given.get("loss_func") is None and given.get("act_bits") is None:
        names = ("weights", "layers", "products", "act_ranges")
        whole = {**settings, **{name: run.settings[name] for name in names}}
        assert digest(whole) == digest(run.settings)


def test_what_is_kept_is_kept_when_one_argument_changes() -> None:
    for given in ({"bits": [8, 2]}, {"schemes": ["W4A16", 2]}, {"loss_func": own_loss, "estimator": "exact"}):
        options = Options(**given, output_dir="x", device="cpu", ignore=["a"])
        assert replace(options, precision="float64") == Options(
            **given, output_dir="x", device="cpu", ignore=["a"], precision="float64"
        )
    assert Options(group_size=4, symmetric=False).quantizer == Quantizer(4, 95, False)
    assert Options().bits == (2, 4, 8)


def test_rounding_is_as_asked_for_else_as_the_run_began_else_compensated() -> None:
    old, new = (
        {"loss": "kl"},
        {"loss": "kl", "rounding": "compensated"},
    )  # settings that name none are of nearest rounding
    for given, known, rounding in (
        ({}, {}, "compensated"),
        ({}, old, "nearest"),
        ({}, new, "compensated"),
        ({"rounding": "nearest"}, new, "nearest"),
        ({"rounding": "compensated"}, old, "compensated"),
        ({"moment_samples": 4}, old, "compensated"),
        ({"rounded_as": "a"}, old, "compensated"),
    ):
        assert Options(**given).of_run(known).rounding == rounding
    assert Options().settings() == Options(rounding="compensated").settings()


def test_candidates_of_bits_and_of_schemes() -> None:
    def labels(**given: Any) -> list[list[str]]:
        return [[scheme.label for scheme in own] for own in Options(**given).candidates(LAYERS).schemes]

    assert labels() == [["W2A16", "W4A16", "W8A16"]] * 3
    assert labels(bits=(4, 2), act_bits=8) == [["W2A8", "W4A8"]] * 3
    assert labels(schemes=("W4A16", "W2A16")) == [["W2A16", "W4A16"]] * 3
    ragged = {"*.attn.*": ("W2A16", "W4A16"), "stem": ["W8A16"], "*": (3, 5, 6)}
    assert labels(schemes=ragged) == [["W8A16"], ["W2A16", "W4A16"], ["W3A16", "W5A16", "W6A16"]]


def test_settings_name_schemes_where_they_are_given_and_in_their_order() -> None:
    def settings(schemes: Any) -> Any:
        return json.loads(json.dumps(Options(schemes=schemes).settings(), default=list))

    assert settings(["W4A16", "W2A16"]) == json.loads(json.dumps(Options(bits=(2, 4)).settings(), default=list))
    assert settings({"a*": ["W4A16", "W2A16"], "*": [8]})["schemes"] == [["a*", ["W2A16", "W4A16"]], ["*", ["W8A16"]]]
    assert settings({"a*": [2], "*": [4]})["bits"] == []
    first, second = {"a*": [2], "*": [4]}, {"*": [4], "a*": [2]}
    assert digest(settings(first)) != digest(settings(second))
    assert "schemes" not in Options().settings()
    assert settings(["W4A16", "W4A8"])["schemes"] == [["*", ["W4A8", "W4A16"]]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": (2, 4), "schemes": ["W4A16"]}, "profile: bits must be left out with schemes, got (2, 4)"),
        (
            {"act_bits": 8, "schemes": ["W4A16"]},
            "profile: act_bits must be left out with schemes (it goes with bits), got 8",
        ),
        ({"schemes": ["W4A12"]}, "profile: schemes must round inputs to 2..8 bits, or not at all (A16), got W4A12"),
        ({"schemes": ["W9A16"]}, "scheme: label must be one of W2A16"),
        ({"schemes": "W4A16"}, "profile: schemes must be labels such as W4A16, or {pattern: labels}, got 'W4A16'"),
        ({"schemes": {"*": "W4A16"}}, "profile: schemes must hold lists of labels such as W4A16, got 'W4A16'"),
        ({"schemes": ["W4A16", 4]}, "profile: schemes must be distinct, at least one of a layer"),
        ({"schemes": {"*": []}}, "profile: schemes must be distinct, at least one of a layer"),
        ({"schemes": {}}, "profile: schemes must hold a list of labels at least, got none"),
        ({"ignore": "head"}, "profile: ignore must be a sequence of patterns, got 'head'"),
        ({"act_bits": 1}, "profile: act_bits must be None or lie in 2..8, got 1"),
        ({"precision": "int8"}, "profile: precision must be one of float32, float64, tf32, bfloat16, auto, got 'int8'"),
        (
            {"loss": "mae"},
            "profile: loss must be one of kl, cross_entropy, bce, mse, smooth_l1, cosine, got 'mae'",
        ),
        (
            {"loss": {"a": "mae"}},
            "profile: loss must be one of kl, cross_entropy, bce, mse, smooth_l1, cosine, got 'mae'",
        ),
        ({"loss": {}}, "profile: loss must name an output at least, got none"),
        ({"loss": {"a": ("mse", 0)}}, "profile: loss must have positive weights, as in {'key': ('mse', 0.5)}, got 0"),
        ({"loss": "kl", "loss_against": "targets"}, "profile: loss_against must be outputs for kl, got 'targets'"),
        ({"loss": "mse", "loss_against": "teacher"}, "profile: loss_against must be outputs or targets, got 'teacher'"),
        ({"loss_func": own_loss, "loss_dim": 1}, "profile: loss must be a named one with loss_dim, got user"),
        ({"positions": 0}, "profile: positions must be a whole number from 1 up, got 0"),
        (
            {"estimator": "gradient", "precision": "tf32"},
            "profile: precision must be float32 or float64 for the gradient",
        ),
        ({"group_size": -2}, "quantizer: group_size must be -1, 0 or positive, got -2"),
        ({"exact_samples": 0}, "profile: exact_samples must be a whole number from 1 up, got 0"),
    ],
)
def test_what_cannot_be_meant_is_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(CladoError, match=re.escape(message)) as error:
        clado.profile(nn.Flatten(), [], **given)
    assert "\n" not in str(error.value)


def test_patterns_fit_layers() -> None:
    with pytest.raises(CladoError, match="must have a pattern for every layer, got none for stem"):
        Options(schemes={"*.attn.*": [4]}).candidates(LAYERS)
    with pytest.raises(CladoError, match="hold patterns that fit a layer first"):
        Options(schemes={"*": [4], "head": [2]}).candidates(LAYERS)


def test_arguments_are_read_without_torch() -> None:
    code = """
import sys
sys.modules["torch"] = sys.modules["numpy"] = sys.modules["scipy"] = None
from clado.profiling import Options
from clado.solver import SolveOptions
print(len(Options.about()) > 20, len(SolveOptions.about()) > 15)
"""
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True True\n"
    )
