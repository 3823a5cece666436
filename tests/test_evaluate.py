"""Scores and their errors, and the choice among plans by true loss."""

import pytest
import torch

import clado
from tests.models import small_cnn, tiny_vit


def labelled() -> tuple[torch.nn.Module, list]:
    model, shape = tiny_vit()
    x = torch.randn(40, *shape)
    return model, [(x[:25], model(x[:25]).argmax(1)), (x[25:], torch.zeros(15, dtype=torch.int64))]


def test_scores_are_those_of_the_samples() -> None:
    model, data = labelled()
    score = clado.evaluate(model, data)
    logits = model(torch.cat([x for x, _ in data])).double()
    labels = torch.cat([y for _, y in data])
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(score.losses, losses, rtol=1e-5, atol=1e-6)
    assert score.loss_stderr == pytest.approx(losses.std().item() / 40**0.5, rel=1e-5)
    assert score.accuracy == (logits.argmax(1) == labels).double().mean().item() >= 25 / 40
    assert score.num_samples == 40
    assert score.correct5 is not None
    assert (score.correct5 | ~score.correct).all()
    assert score.difference(score) == (0.0, 0.0)


def test_rerank_takes_the_least_true_loss_and_says_by_how_much() -> None:
    model, data = labelled()
    sens = clado.profile(model, data, estimator="diagonal", verbose=False)
    plans = [clado.given_plan(sens, {layer.name: bits for layer in sens.layers}) for bits in (2, 8, 4, 2)]
    best = clado.rerank(model, iter(data), plans)
    losses = {b: clado.evaluate(clado.apply(model, p), data).loss for b, p in zip((2, 8, 4), plans, strict=False)}
    assert set(best.bits.values()) == {min(losses, key=losses.__getitem__)}
    compared = best.info["rerank"]
    assert [round(row["loss"], 9) for row in compared] == sorted(round(v, 9) for v in losses.values())
    assert compared[0]["behind"] == 0


def test_bad_input() -> None:
    model, data = labelled()
    with pytest.raises(clado.CladoError, match="yield at least one sample"):
        clado.evaluate(model, [])
    with pytest.raises(clado.CladoError, match=r"yield \(inputs, targets\), got inputs alone"):
        clado.evaluate(model, [data[0][0]])
    with pytest.raises(clado.CladoError, match="be in eval mode"):
        clado.evaluate(small_cnn()[0].train(), data)
    with pytest.raises(clado.CladoError, match=r"targets must lie in 0\.\.9"):
        clado.evaluate(model, [(data[0][0], data[0][1] + 10)])
    with pytest.raises(clado.CladoError, match="plans must not be empty"):
        clado.rerank(model, data, [])
