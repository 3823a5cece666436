"""Scores and their errors, and the choice among plans by true loss."""

import numpy as np
import pytest
import torch
from torch import nn

import clado
from tests.models import small_cnn, tiny_vit


def labelled() -> tuple[nn.Module, list]:
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


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
def test_rerank_takes_the_least_true_loss_and_says_by_how_much(loss: str) -> None:
    model, data = labelled()
    sens = clado.profile(model, data, estimator="diagonal", verbose=False)
    plans = [clado.given_plan(sens, {layer.name: bits for layer in sens.layers}) for bits in (2, 8, 4, 2)]
    best = clado.rerank(model, iter(data), plans, loss=loss)
    x, y = (torch.cat([batch[k] for batch in data]) for k in (0, 1))
    clean = model(x).double().log_softmax(1)
    increases = []
    for plan in plans[:3]:
        logs = clado.apply(model, plan)(x).double().log_softmax(1)
        kl = (clean.exp() * (clean - logs)).sum(1)
        increases.append((kl if loss == "kl" else (clean - logs).gather(1, y[:, None])[:, 0]).mean().item())
    assert best.bits == plans[min(range(3), key=increases.__getitem__)].bits
    compared = best.info["rerank"]
    assert [row["loss_increase"] for row in compared] == pytest.approx(sorted(increases), rel=1e-3, abs=1e-6)
    assert compared[0]["behind"] == 0
    assert all(row["stderr"] > 0 for row in compared[1:])


def test_rerank_lets_a_plan_stand_unless_another_is_surely_better() -> None:
    model, data = labelled()
    sens = clado.profile(model, data, estimator="diagonal", verbose=False)
    names = [layer.name for layer in sens.layers]
    # Layers of a kind cost about the same at 4 bits; all of them at 2 bits cost more.
    plans = [clado.given_plan(sens, dict.fromkeys(names, 8) | {name: 4}) for name in names]
    plans.append(clado.given_plan(sens, dict.fromkeys(names, 2)))
    inputs = [data[0][0][:4]]  # few, for errors large enough
    losses = {
        k: clado.evaluate(clado.apply(model, plan), inputs, loss="kl", reference=model).losses
        for k, plan in enumerate(plans)
    }
    least = min(losses, key=lambda k: losses[k].mean())
    stood = []
    for k, plan in enumerate(plans):
        gap = losses[k] - losses[least]
        stays = bool(gap.mean() <= 1.96 * gap.std() / len(gap) ** 0.5)
        best = clado.rerank(model, inputs, plans, stands=plan)
        assert best.bits == plans[k if stays else least].bits
        row = best.info["rerank"][0]
        assert row["loss_increase"] == pytest.approx(losses[k if stays else least].mean().item(), rel=1e-3, abs=1e-6)
        assert row["behind"] == row["stderr"] == 0
        assert not (stays and k != least and best.info["rerank_decided"])
        stood.append(stays)
    assert sum(stood) in range(2, len(plans))  # one beside the least stands, and one does not
    with pytest.raises(clado.CladoError, match="rerank: stands must be one of plans, got another"):
        clado.rerank(model, data, plans[1:], stands=plans[0])
    with pytest.raises(clado.CladoError, match="rerank: stands must be one of plans, got 'diagonal'"):
        clado.rerank(model, data, plans, stands="diagonal")


def test_accuracies_come_with_every_cross_entropy_of_logits() -> None:
    model, data = labelled()
    plain = clado.evaluate(model, data)
    classes = model(data[0][0]).shape[1]
    weighted = clado.evaluate(model, data, loss="cross_entropy", class_weights=range(1, classes + 1))
    assert weighted.correct is not None
    assert plain.correct is not None
    assert torch.equal(weighted.correct, plain.correct)
    assert not torch.equal(weighted.losses, plain.losses)


def test_bad_input() -> None:
    model, data = labelled()
    with pytest.raises(clado.CladoError, match="yield at least one sample"):
        clado.evaluate(model, [])
    with pytest.raises(clado.CladoError, match=r"yield \(inputs, targets\) .*, got inputs alone"):
        clado.evaluate(model, [data[0][0]])
    with pytest.raises(clado.CladoError, match="be in eval mode"):
        clado.evaluate(small_cnn()[0].train(), data)
    with pytest.raises(clado.CladoError, match=r"targets must lie in 0\.\.9"):
        clado.evaluate(model, [(data[0][0], data[0][1] + 10)])
    with pytest.raises(clado.CladoError, match=r"model must take inputs \(\d+, 5\), got \w+Error: [^\n]*$"):
        clado.evaluate(model, [(data[0][0].flatten(1)[:, :5], data[0][1])])
    with pytest.raises(clado.CladoError, match=r"one subfolder per class\), got inputs alone"):
        clado.evaluate(model, [(data[0][0],)])
    with pytest.raises(clado.CladoError, match="plans must not be empty"):
        clado.rerank(model, data, [])
    sens = clado.profile(model, data, estimator="diagonal", verbose=False)
    plan = clado.given_plan(sens, {layer.name: 8 for layer in sens.layers})
    with pytest.raises(clado.CladoError, match=r"data_loader must yield \(inputs, targets\) for cross_entropy"):
        clado.rerank(model, [data[0][0]], [plan], loss="cross_entropy")


def test_rerank_of_a_model_that_cannot_be_exported() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.second(x.relu() if x.sum() > 0 else x)

    torch.manual_seed(0)
    model, x = Branching().eval(), torch.randn(20, 4)
    layers = [clado.Layer("first", "linear", (8, 4), 0, ("first.weight",))]
    layers += [clado.Layer("second", "linear", (3, 8), 0, ("second.weight",))]
    sens = clado.Sensitivity.from_matrix(np.diag([4.0, 2, 1, 4, 2, 1]), layers)
    plans = [clado.given_plan(sens, {"first": b, "second": 8}) for b in (2, 8, 4)]
    best = clado.rerank(model, [x], plans)
    assert best.bits == {"first": 8, "second": 8}
    assert best.info["rerank_decided"]


def test_rerank_quantizes_weights_that_are_no_layer_of_the_graph() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Conv1d(1, 4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.first(x[:, None]).relu().mean(2))

    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(20, 8)
    layers = [clado.Layer("first", "conv1d", (4, 1, 3), 0, ("first.weight",))]
    layers += [clado.Layer("head", "linear", (3, 4), 0, ("head.weight",))]
    sens = clado.Sensitivity.from_matrix(np.diag([4.0, 2, 1, 4, 2, 1]), layers)
    plans = [clado.given_plan(sens, {"first": bits, "head": 8}) for bits in (2, 8)]
    rows = clado.rerank(model, [x], plans).info["rerank"]
    clean = model(x).double().log_softmax(1)
    for row, plan in zip(rows, reversed(plans), strict=True):
        logs = clado.apply(model, plan)(x).double().log_softmax(1)
        wanted = (clean.exp() * (clean - logs)).sum(1).mean().item()
        assert row["loss_increase"] == pytest.approx(wanted, rel=1e-3, abs=1e-9)
