"""Runs on dense outputs, features and several outputs: estimators against plain loops, groups, resumed runs, every stage."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import clado
from clado.artifacts import Sensitivity
from clado.graph.capture import capture
from clado.graph.rehearsal import LiveBytes
from clado.profiling import ESTIMATORS, Options, open_run, plan_run, profile
from tests.models import lively

BITS = (2, 4)
SAMPLES = 6


class Segmenter(nn.Module):
    """Maps of classes, a coarser auxiliary map and a number, from one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, stride=2)
        self.head, self.aux, self.score = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 1), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(self.stem(x).relu()).relu()
        return {
            "out": self.head(F.interpolate(x, scale_factor=2.0)),
            "aux": self.aux(x),
            "score": self.score(x.mean((2, 3)))[:, 0],
        }


class Map(Segmenter):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)["out"]


WEIGHTS = [1.0, 0.5, 0.0, 3.0]  # of classes


def net(kind: type[nn.Module] = Map) -> nn.Module:
    torch.manual_seed(0)
    return lively(kind()).eval()


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    y = torch.randint(4, (SAMPLES, 6, 6), generator=draw)
    y[:, 0] = 255
    return torch.randn(SAMPLES, 1, 6, 6, generator=draw), y


def run(model: nn.Module, batch: Any, estimator: str = "additive", **options: Any) -> Sensitivity:
    how = {"precision": "float64", "batch_size": 4, "rounding": "nearest", "quantize_ends": True, "verbose": False}
    return profile(model, [batch], BITS, estimator=estimator, **{**how, **options})


def kl(z: Tensor, clean: Tensor) -> Tensor:
    p, q = clean.log_softmax(1), z.log_softmax(1)
    return (p.exp() * (p - q)).sum(1).flatten(1).mean(1)


def ce(z: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    weights = None if weights is None else weights.to(z.dtype)
    rows = F.cross_entropy(z, y, weights, ignore_index=255, reduction="none").flatten(1)
    return rows.sum(1) / (y != 255).flatten(1).sum(1)


def squared(z: Tensor, clean: Tensor) -> Tensor:
    return (z - clean).square().flatten(1).mean(1)


@torch.no_grad()
def by_loops(model: nn.Module, sens: Sensitivity, x: Tensor, loss: Any, additive: bool) -> tuple[Any, Any]:
    """ΔL and Ω by forwards of the model, one perturbation or pair at a time; or from outputs whose changes add."""
    model = copy.deepcopy(model).double()
    weights = [model.get_parameter(layer.names[0]) for layer in sens.layers]
    clean = [w.detach().clone() for w in weights]
    variants = [sens.quantizer.fake_quant(w.float(), BITS).double() for w in clean]

    def output(*choice: int) -> Tensor:
        for v in choice:
            weights[v // 2].copy_(variants[v // 2][v % 2])
        found = model(x.double())
        for v in choice:
            weights[v // 2].copy_(clean[v // 2])
        return found

    z, count = output(), 2 * len(weights)
    single = [output(v) for v in range(count)]
    base = loss(z, z)
    increase = torch.stack([loss(one, z) - base for one in single])
    omega = torch.zeros(count, count, len(x), dtype=torch.float64)
    for v in range(count):
        for w in range(count):
            if v // 2 != w // 2:
                both = single[v] + single[w] - z if additive else output(v, w)
                omega[v, w] = loss(both, z) - base - increase[v] - increase[w]
    return increase.numpy(), omega.numpy()


DENSE = {
    "kl": ({"loss_dim": 1}, lambda z, clean, y: kl(z, clean)),
    "cross_entropy": ({"loss": "cross_entropy", "ignore_index": 255}, lambda z, clean, y: ce(z, y)),
    "weighted classes": (
        {"loss": "cross_entropy", "ignore_index": 255, "class_weights": WEIGHTS},
        lambda z, clean, y: ce(z, y, torch.tensor(WEIGHTS)),
    ),
    "mse": ({"loss": "mse", "loss_against": "outputs"}, lambda z, clean, y: squared(z, clean)),
    "function": ({"loss_func": lambda z, batch: ce(z, batch[1])}, lambda z, clean, y: ce(z, y)),
}


@pytest.mark.parametrize("estimator", ["additive", "exact"])
@pytest.mark.parametrize("name", list(DENSE))
def test_a_map_under_every_kind_of_loss(name: str, estimator: str) -> None:
    model, (x, y) = net(), data()
    asked, defined = DENSE[name]
    sens = run(model, (x, y), estimator, **asked)
    increase, omega = by_loops(model, sens, x, lambda z, clean: defined(z, clean, y), estimator == "additive")
    np.testing.assert_allclose(sens.delta_loss, increase.mean(1), rtol=1e-6, atol=1e-14)
    by_hessian = "Gauss–Newton" in sens.provenance.loss_words and estimator == "additive"
    assert by_hessian == (name == "function" and estimator == "additive")  # cheaper, beside so small a net
    limit = (0.1 if by_hessian else 1e-6) * np.linalg.norm(omega.mean(2))
    assert np.linalg.norm(sens.interaction - omega.mean(2)) < limit
    if by_hessian:
        return
    wanted = omega.std(2, ddof=1) / SAMPLES**0.5
    off = ~sens.candidates.same_layer
    np.testing.assert_allclose(sens.stderr[off], wanted[off], rtol=1e-5, atol=1e-6 * wanted.max())
    assert sens.provenance.loss == asked.get("loss", "user" if name == "function" else "kl")


@pytest.mark.parametrize("estimator", ["gradient", "corrected", "diagonal"])
def test_the_other_estimators_of_a_map(estimator: str) -> None:
    model, batch = net(), data()
    asked = DENSE["cross_entropy"][0]
    some = {"exact_samples": SAMPLES} if estimator == "corrected" else {}
    sens, known = run(model, batch, estimator, **asked, **some), run(model, batch, "exact", **asked)
    np.testing.assert_allclose(sens.delta_loss, known.delta_loss, rtol=1e-9, atol=1e-14)
    if estimator == "corrected":
        np.testing.assert_allclose(sens.interaction, known.interaction, rtol=1e-6, atol=1e-12)
    if estimator == "gradient":  # linear in the later layer: right where that changes little
        pair = np.ix_(*[[v for v in range(sens.num_candidates) if v % 2]] * 2)
        got, wanted = sens.interaction[pair], known.interaction[pair]
        upper = np.triu_indices(len(got), 1)
        np.testing.assert_allclose(got[upper], wanted[upper], rtol=0, atol=0.2 * np.abs(wanted).max())


def test_several_outputs_are_the_weighted_sum_of_each() -> None:
    model, (x, y) = net(Segmenter), data()
    parts = {"out": ("kl", 1.0), "aux": ("mse", 0.5), "score": ("smooth_l1", 2.0)}
    whole = run(model, x, loss=parts, loss_dim=1)
    ones = [run(model, x, loss={key: name}, loss_dim=1) for key, (name, _) in parts.items()]
    for field in ("delta_loss", "interaction"):
        summed = sum(w * getattr(one, field) for one, (_, w) in zip(ones, parts.values(), strict=True))
        np.testing.assert_allclose(getattr(whole, field), summed, rtol=1e-9, atol=1e-15)
    assert whole.provenance.loss == "out=kl,aux=0.5*mse,score=2*smooth_l1"
    again = run(model, x, loss=whole.provenance.loss, loss_dim=1)
    assert again.fingerprint == whole.fingerprint
    aux = y[:, ::2, ::2]
    both = run(
        model, (x, {"out": y, "aux": aux}), loss={"out": "cross_entropy", "aux": "cross_entropy"}, ignore_index=255
    )
    assert np.isfinite(both.interaction).all()
    assert "aux: cross_entropy to the targets over dimension 1" in both.provenance.loss_words


@pytest.mark.parametrize("precision", ["bfloat16", "tf32"])
def test_differences_of_several_outputs_are_carried(precision: str) -> None:
    model, (x, _) = net(Segmenter), data()
    asked: dict[str, Any] = {"loss": "out=kl,score=mse", "loss_dim": 1, "batch_size": SAMPLES}
    plain, low = run(model, x, **asked), run(model, x, **asked, **{"precision": precision})
    assert low.info["probe"]["delta_error"]
    if low.provenance.precision == precision:  # else the sampling noise of six images is below its errors
        scale = np.abs(plain.interaction).max()
        np.testing.assert_allclose(low.interaction, plain.interaction, rtol=0, atol=0.1 * scale)


# Memory.


@pytest.mark.parametrize("estimator", ["additive", "diagonal"])
def test_groups_of_candidates_give_what_all_at_once_do(estimator: str) -> None:
    model, (x, _) = net(), data()
    options = {"estimator": estimator, "loss_dim": 1, "rounding": "nearest", "quantize_ends": True, "batch_size": 3}
    with torch.no_grad():
        every, some = (open_run(model, [x], Options(**options)) for _ in range(2))
        whole = every.measure(False)
        some.runner.held = 4
        parts = some.measure(False)
    np.testing.assert_allclose(parts.delta_loss, whole.delta_loss, rtol=1e-12)
    np.testing.assert_allclose(parts.interaction, whole.interaction, rtol=1e-6, atol=1e-12)
    expected = some.work.total(SAMPLES) / SAMPLES
    assert parts.info["forward_equivalents"] == pytest.approx(expected, rel=0.3)
    if estimator == "additive":
        assert parts.info["forward_equivalents"] > 1.2 * whole.info["forward_equivalents"]


def test_a_cap_keeps_fewer_outputs_and_the_plan_says_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(1 if k == 0 else 2, 2, 1) for k in range(8)), nn.Conv2d(2, 32, 1)).eval()
    x = torch.randn(4, 1, 16, 16)
    how: dict[str, Any] = {"loss": "mse", "bits": (2, 3, 4, 5), "rounding": "nearest", "quantize_ends": True}
    with torch.no_grad():
        free = open_run(model, [x], Options(**how, batch_size=1)).pieces
        need = free.fixed_bytes() + (free.chunk_bytes() or 0)
        tight = open_run(model, [x], Options(**how, batch_size=1, max_memory=int(0.7 * need)))
        assert tight.runner.held is not None
        assert tight.pieces.held < free.held
        assert tight.pieces.fixed_bytes() + (tight.pieces.chunk_bytes() or 0) <= 0.7 * need
        planned = tight.pieces.chunk_bytes()
        loss = tight.reader.blank(x[:1], 1)
        weights = [variant.weight for own in tight.variants for variant in own]
        with LiveBytes(torch.device("cpu"), (weights, list(model.parameters()))) as live:
            ESTIMATORS["additive"].run(tight.runner, tight.variants, x[:1], loss, lambda: None)
    assert planned == pytest.approx(live.peak, rel=0.05)
    text = str(plan_run(model, [x], **how, batch_size=1, max_memory=int(0.7 * need)))
    assert "mse to the float model's outputs, mean over 8,192 values" in text
    assert "candidates' at a time, later ones run again" in text


def test_a_run_is_gone_on_with_and_another_loss_is_refused(tmp_path: Path) -> None:
    model, (x, y) = net(), data()
    asked = DENSE["cross_entropy"][0]
    whole = run(model, (x, y), **asked)
    run(model, (x, y), **asked, num_samples=4, output_dir=tmp_path)
    grown = run(model, (x, y), **asked, num_samples=SAMPLES, output_dir=tmp_path)
    assert np.array_equal(grown.interaction, whole.interaction)
    known = clado.Sensitivity.load(tmp_path)
    assert known.provenance.loss_options == {"ignore_index": 255}
    assert known.provenance.loss_words == (
        "cross_entropy to the targets over dimension 1 (4 classes), mean over 36 positions"
    )
    for other in ({**asked, "positions": 5}, {"loss": "kl", "loss_dim": 1, "ignore_index": 255}):
        with pytest.raises(clado.CladoError, match="be new or hold the same run"):
            run(model, (x, y), **other, output_dir=tmp_path)


def test_later_stages_weigh_classes_as_the_matrix_does() -> None:
    model, (x, y) = net(), data()
    asked = DENSE["weighted classes"][0]
    sens = run(model, (x, y), **asked)
    assert "labels count by class_weights" in sens.provenance.loss_words
    plan = clado.solve(sens, avg_bits=3)
    score = clado.evaluate(clado.apply(model, plan), [(x, y)], **asked)
    wanted = ce(clado.apply(model, plan)(x), y, torch.tensor(WEIGHTS)).detach()
    np.testing.assert_allclose(score.losses, wanted, rtol=1e-5)
    before = ce(model(x), y, torch.tensor(WEIGHTS)).detach()
    ranked = clado.rerank(model, [(x, y)], [plan], **asked)
    assert ranked.info["rerank"][0]["loss_increase"] == pytest.approx((wanted - before).mean().item(), rel=1e-3)
    by_matrix, by_name = (clado.refine(model, [(x, y)], sens, plan, rounds=1, avg_bits=3, **how) for how in ({}, asked))
    as_array = clado.refine(
        model, [(x, y)], sens, plan, rounds=1, avg_bits=3, **{**asked, "class_weights": np.array(WEIGHTS)}
    )
    assert by_matrix.info["refine"] == by_name.info["refine"] == as_array.info["refine"]
    assert by_name.info["refine"][0]["loss_increase"] == pytest.approx((wanted - before).mean().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "must"),
    [
        ({"loss": "mse"}, "class_weights must go with one cross_entropy, got 'mse'"),
        ({"loss": "cross_entropy", "class_weights": [1.0, 2.0]}, "class_weights must be 4, one per class, got 2"),
        ({"loss": "cross_entropy", "class_weights": [0, 0, 0, 0]}, "one above 0 at least, got"),
        ({"loss": "cross_entropy", "class_weights": [1, 1, 1, -1]}, "be numbers from 0 up"),
        ({"loss": "cross_entropy", "class_weights": "abc"}, "class_weights must be a sequence of numbers, got 'abc'"),
        (
            {"loss": "cross_entropy", "class_weights": {0: 5.0}},
            "class_weights must be a sequence of numbers, got {0: 5.0}",
        ),
        ({"loss": {"a": "cross_entropy", "b": "cross_entropy"}}, "class_weights must go with one cross_entropy"),
    ],
)
def test_class_weights_that_do_not_fit_are_one_line(options: dict[str, Any], must: str) -> None:
    with pytest.raises(clado.CladoError, match=re.escape(must)):
        run(net(), data(), **{"class_weights": WEIGHTS, "ignore_index": 255, **options})


def test_positions_are_those_of_a_sample_whatever_the_chunks() -> None:
    model, (x, _) = net(), data()
    options: dict[str, Any] = {"loss_dim": 1, "positions": 9}
    one, two = (run(model, x, batch_size=size, **options) for size in (6, 2))
    np.testing.assert_allclose(one.interaction, two.interaction, rtol=1e-9, atol=1e-14)
    every = run(model, x, loss_dim=1)
    assert not np.allclose(one.delta_loss, every.delta_loss, rtol=1e-3)
    assert np.linalg.norm(one.delta_loss - every.delta_loss) < 0.5 * np.linalg.norm(every.delta_loss)
    said = one.info["warnings"][0]
    assert said.startswith("9 positions of every sample leave its loss increase right to ")
    assert "and the mean over " in said


def test_the_loss_is_said_before_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    run(net(), data()[0], loss="mse", verbose=True)
    assert "loss: mse to the float model's outputs, mean over 144 values" in capsys.readouterr().err


# The stages behind.


@pytest.mark.parametrize("name", ["kl", "cross_entropy", "function"])
def test_every_stage_takes_the_loss_of_the_run(name: str) -> None:
    model, (x, y) = net(), data()
    batches = [(x, y)]
    asked, defined = DENSE[name]
    how = {"rounding": "nearest", "quantize_ends": True, "verbose": False}
    sens = profile(model, batches, (2, 3, 8), **how, **asked)
    plans = [clado.given_plan(sens, {layer.name: b for layer in sens.layers}) for b in (2, 3)]

    @torch.no_grad()
    def measured(plan: clado.Plan) -> float:
        z, clean = clado.apply(model, plan)(x).double(), model(x).double()
        return float((defined(z, clean, y) - defined(clean, clean, y)).mean())

    best = clado.rerank(model, batches, plans, **asked)
    rows = [row["loss_increase"] for row in best.info["rerank"]]
    assert rows == pytest.approx(sorted(map(measured, plans)), rel=1e-4, abs=1e-6)
    refined = clado.refine(model, batches, sens, plans[0], avg_bits=4.0, rounds=1, verbose=False)
    assert refined.info["refine_loss"] == pytest.approx(measured(refined), rel=1e-4, abs=1e-6)
    assert refined.info["refine"][0]["loss_increase"] == pytest.approx(measured(plans[0]), rel=1e-4, abs=1e-6)
    judged = {"loss": "kl", **asked, "reference": model}
    scores = [clado.evaluate(m, batches, **judged) for m in (model, clado.apply(model, plans[0]))]
    assert scores[1].difference(scores[0])[0] == pytest.approx(measured(plans[0]), rel=1e-4, abs=1e-6)
    done = clado.finish(model, plans[0], batches, "compensated", heldout=batches, verbose=False, **asked)
    assert done.info["finish"]["loss_increase"]["before"] == pytest.approx(measured(plans[0]), rel=1e-4, abs=1e-6)
    fixed, plan = clado.correct(model, batches, sens, num_samples=SAMPLES, avg_bits=4.0, rounds=8, verbose=False)
    exact = profile(model, batches, (2, 3, 8), estimator="exact", **how, **asked)
    if plan.info["stands"]:
        pairs = fixed.provenance.corrected_pairs
        got, wanted = (np.array([s.interaction[v, w] for v, w in pairs]) for s in (fixed, exact))
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


# Nets of others, with random weights.


@pytest.fixture
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several runs of one model, whose graph is found once."""
    kept: list[Any] = []

    def captured(*arguments: Any) -> Any:
        kept.extend([] if kept else [capture(*arguments)])
        return kept[0]

    monkeypatch.setattr("clado.graph.open.capture", captured)


class TinyBackbone(nn.Module):
    """Two maps by name, as torchvision's heads take them."""

    out_channels = 8

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        self.stem, self.down = nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.stem(x).relu()
        return dict(zip(self.names, (fine, self.down(fine).relu()), strict=True))


def test_torchvision_segmentation(captured_once: None) -> None:
    segmentation = pytest.importorskip("torchvision").models.segmentation
    torch.manual_seed(0)
    model = lively(segmentation.LRASPP(TinyBackbone("low", "high"), 8, 8, 5)).eval()
    x = torch.randn(2, 3, 32, 32)
    options: dict[str, Any] = {"rounding": "nearest", "scale_steps": 1, "verbose": False}
    sens, exact = (
        profile(model, [x], (6,), loss={"out": "kl"}, loss_dim=1, estimator=name, **options)
        for name in ("additive", "exact")
    )
    assert sens.provenance.loss_words == (
        "out: kl to the float model's outputs over dimension 1 (5 classes), mean over 1,024 positions"
    )
    upper = np.triu(~sens.candidates.same_layer)
    assert np.corrcoef(sens.interaction[upper], exact.interaction[upper])[0, 1] > 0.95


def test_outputs_that_no_loss_is_named_for_are_refused() -> None:
    x = data()[0]
    with pytest.raises(clado.CladoError, match=r"must return one tensor, such as logits .* dict of out, aux, score"):
        run(net(Segmenter), x)
    with pytest.raises(clado.CladoError, match=r"loss must be said for an output of shape \[N, 4, 6, 6\]: loss='mse'"):
        run(net(), x)


def test_timm_features() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = lively(timm.create_model("test_resnet", features_only=True, pretrained=False)).eval()
    x = torch.randn(2, 3, 32, 32)
    options: dict[str, Any] = {"rounding": "nearest", "scale_steps": 1, "verbose": False}
    sens = profile(model, [x], (4,), loss={"3": "mse", "4": ("cosine", 0.1)}, loss_dim=1, **options)
    assert np.isfinite(sens.interaction).all()
    assert np.abs(sens.interaction).max() > 0


def of_its_head(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What a detector makes of images before boxes are chosen: outputs of one shape."""
    return model.head(list(model.backbone(images).values()))


def all_of_it(model: nn.Module, images: Tensor) -> list[dict[str, Tensor]]:
    return model(list(images))


def test_a_detector_by_the_outputs_of_its_head() -> None:
    """What it returns after suppression changes its shape with the data, which is one line; its head's outputs serve."""
    detection = pytest.importorskip("torchvision").models.detection
    torch.manual_seed(0)
    anchors = detection.anchor_utils.AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
    model = detection.RetinaNet(
        TinyBackbone("0", "1"), num_classes=3, anchor_generator=anchors, min_size=32, max_size=32
    )
    lively(model).eval()
    x = torch.rand(2, 3, 32, 32)
    options: dict[str, Any] = {"rounding": "nearest", "scale_steps": 1, "verbose": False}
    losses = {"cls_logits": "bce", "bbox_regression": ("smooth_l1", 0.5)}
    sens = profile(model, [x], (4,), forward_step=of_its_head, loss=losses, **options)
    assert np.abs(sens.interaction).max() > 0
    assert sens.provenance.loss_words.startswith("cls_logits: bce to the float model's outputs, mean over 240 values")
    whole = {"loss_func": lambda out, batch: torch.stack([one["scores"].sum() for one in out])}
    with pytest.raises(clado.CladoError, match="must return outputs of the same shapes whatever the weights and data"):
        profile(model, [x], (2,), forward_step=all_of_it, estimator="diagonal", **whole, **options)
