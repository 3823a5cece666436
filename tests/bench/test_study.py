"""The ImageNet recipe end to end on a few noise images, and the arithmetic behind the evidence page."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from bench.study import imagenet
from bench.study.nets import NETS, SPLITS, load_split
from bench.study.numbers import clustered, verdict
from bench.study.page import PAGE, STABLE, samples_needed
from tests.models import timm_model


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            for k in range(count):
                image = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(image).save(tmp_path / split / label / f"{k}.png")
    save_file(timm_model("resnet18")[0].state_dict(), tmp_path / "weights.safetensors")
    return tmp_path


def test_imagenet_recipe(folders: Path) -> None:
    run = folders / "run"
    arguments = [
        "--model",
        "resnet18",
        "--checkpoint",
        folders / "weights.safetensors",
        "--num-classes",
        10,
        "--img-size",
        64,
    ]
    arguments += ["--train", folders / "train", "--val", folders / "val", "--output-dir", run]
    arguments += ["--nsamples", 4, "--choice", 4, "--avg-bits", "3", "--rounds", 1]
    result = imagenet.main([str(a) for a in arguments])
    assert json.loads((run / "imagenet.json").read_text())["rows"] == result["rows"]
    names = [row["weights"] for row in result["rows"]]
    assert names[:4] == ["float", "uniform 8", "uniform 4", "uniform 2"]
    assert names[4:] == ["diagonal 3", "interactions 3", "refined, re-ranked 3"]
    assert all(row["avg_bits"] <= 3 for row in result["rows"][4:])
    assert [row["published_top1"] for row in result["rows"][:4]] == [None, 69.474, 46.274, None]
    assert len(result["corner"]["layer1.0.conv1"]["measured"]) == 3


def test_splits_share_no_digit_and_come_out_the_same() -> None:
    spans = sorted((part.start, part.stop) for part, _ in SPLITS.values())
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
    one, again = load_split("choice"), load_split("choice")
    assert one.images.equal(again.images)
    first = np.flatnonzero(one.digit == 0)
    assert len(first) == SPLITS["choice"][1]
    assert not one.images[first[0]].equal(one.images[first[1]])  # each draw with other distortions


@pytest.mark.parametrize("name", NETS)
def test_nets_are_what_the_page_says(name: str) -> None:
    model = NETS[name][0]().eval()
    assert model(load_split("choice").images[:2]).shape == (2, 10)


def test_errors_are_clustered_by_digit() -> None:
    digit = np.repeat(np.arange(50), 4)
    values = np.random.default_rng(0).standard_normal(50)[digit]  # the four draws of a digit say the same
    found = clustered(values, digit)
    assert found["mean"] == pytest.approx(values.mean())
    assert found["stderr"] == pytest.approx(2 * values.std(ddof=1) / 200**0.5, rel=0.02)
    assert [verdict({"mean": m, "stderr": 1.0}) for m in (-3.0, 1.0, 3.0)] == ["helps", "ties", "hurts"]


def test_what_the_page_says_of_stopping_early_is_what_was_measured() -> None:
    section = samples_needed(json.loads(STABLE.read_text()))
    assert section.strip() in PAGE.read_text()
    assert section.count("\n| ") == 2 + 4 * 4
