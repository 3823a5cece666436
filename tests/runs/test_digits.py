"""The embedded net is the trained one, its data are fixed and disjoint, and its training script trains."""

import hashlib

import pytest
import torch

import clado
from clado.runs import digits
from clado.runs.digits import train


def test_data_are_fixed_and_disjoint() -> None:
    splits = {name: digits.load_data(name) for name in digits.SPLITS}
    assert [len(labels) for _, labels in splits.values()] == [685, 512, 600]
    again = digits.load_data("heldout")
    assert torch.equal(again[0], splits["heldout"][0])
    clean = [
        {hashlib.sha256(image.numpy().tobytes()).digest() for image in digits.clean_digits(name)[0]} for name in splits
    ]
    assert len(set.union(*clean)) == sum(map(len, clean))
    with pytest.raises(clado.CladoError, match="split must be one of"):
        digits.load_data("test")


def test_the_net_is_trained_and_not_saturated() -> None:
    assert digits.WEIGHTS.stat().st_size <= 2 * 2**20
    model = digits.load_model()
    assert not model.training
    for split in ("sensitivity", "heldout"):
        loss, accuracy = train.score(model, split)
        assert 0.4 < loss < 0.7
        assert 0.75 < accuracy < 0.9


def test_training_reduces_the_loss() -> None:
    threads = torch.get_num_threads()
    before = train.score(digits.build_model(), "train")[0]
    after = train.score(train.train(epochs=12, verbose=False), "train")[0]
    torch.set_num_threads(threads)
    assert after < before
