"""A finished plan: lower loss on samples apart, the weights that were judged are those that ship, bad input in a line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import clado
from clado.artifacts import PLAN_FILE
from clado.deploy import adapted, pack_model, verify
from clado.graph import Blocks, Use, open_runner
from clado.improve import finish_progress, finisher, loss_increases
from clado.improve.compensation import Finished, _Inputs
from clado.improve.learning import Pace, gap, gaps, learn_block, learn_net, outputs_of, relative_error
from clado.quant import LearnedWeight, Quantizer, codes
from tests.models import random_plan, small_cnn, tiny_vit


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps of the whole net."""
    monkeypatch.setattr(finisher, "NET", replace(finisher.NET, steps=20))


def data(shape: tuple[int, ...], count: int = 96) -> Tensor:
    """Inputs that go together, as images do."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, *shape, generator=generator)
    return (
        x + 2 * torch.randn(count, *[1] * len(shape), generator=generator) + torch.randn(1, *shape, generator=generator)
    )


def planned(model: nn.Module, x: Tensor, bits: float = 3.0, **options: object) -> clado.Plan:
    sens = clado.profile(model, [x[:16]], bits=(2, 3, 4, 8), scale_steps=20, num_samples=16, verbose=False, **options)
    return clado.solve(sens, avg_bits=bits, time_limit=2)


def uniform(model: nn.Module, x: Tensor, **options: object) -> clado.Plan:
    """Two bits everywhere, where there is much to gain."""
    sens = clado.profile(model, [x[:16]], bits=(2, 8), scale_steps=20, num_samples=16, verbose=False, **options)
    return clado.given_plan(sens, {layer.name: 2 for layer in sens.layers})


@pytest.mark.parametrize("options", [{"rounding": "nearest"}, {"symmetric": False}, {"group_size": 4}])
@pytest.mark.parametrize("make", [small_cnn, tiny_vit])
def test_each_level_lowers_the_loss_on_samples_it_did_not_see(make: object, options: dict[str, object]) -> None:
    model, shape = make()  # type: ignore[operator]
    x, fresh = data(shape).split([64, 32])
    plan = uniform(model, x, **options)
    compensated = clado.finish(model, plan, [x], "compensated", num_samples=64, verbose=False)
    learned = clado.finish(model, plan, [x], "learned", num_samples=64, verbose=False)
    before, one, two = loss_increases(model, [fresh], [plan, compensated, learned]).mean(1).tolist()
    assert two < before
    # Eight channels at two bits leave the order of layers nothing to make up for; then the weights stay.
    assert one < before or (make is small_cnn and compensated.info["finish"]["taken"] == "before")
    losses = learned.info["finish"]["loss_increase"]
    assert losses["compensated"] == compensated.info["finish"]["loss_increase"]["compensated"]
    assert list(losses) == ["before", "compensated", "learned", "learned together"]
    assert plan.schemes == learned.schemes
    assert learned.rounding is not None
    assert learned.rounding.rounding == "learned"


@pytest.mark.usefixtures("short")
def test_what_was_judged_is_what_ships(tmp_path: Path) -> None:
    model, shape = small_cnn()
    x = data(shape)
    plan = clado.finish(model, planned(model, x), [x], "learned", num_samples=64, verbose=False)
    applied = clado.apply(model, plan)
    state = applied.state_dict()
    assert {"norms.0.running_mean", "stem.bias"} & set(adapted(plan))
    plan.save(tmp_path)
    again = clado.Plan.load(tmp_path)
    assert again == plan
    for format, options in (("safetensors", {}), ("compressed-tensors", {}), ("onnx", {"example": x[:2]})):
        clado.export(model, again, tmp_path / format, format=format, **options)
        verify(model, again, tmp_path / format, format=format, **options)
    loaded = clado.load(tmp_path / "safetensors", model).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    with torch.no_grad():
        assert torch.equal(pack_model(model, again)(x[:4]), applied(x[:4]))
        wanted = (
            model(x[:8]).double().softmax(1)
            * (model(x[:8]).double().log_softmax(1) - applied(x[:8]).double().log_softmax(1))
        ).sum(1)
    assert torch.allclose(loss_increases(model, [x[:8]], [again])[0], wanted, atol=1e-6)


@pytest.mark.usefixtures("short")
def test_the_same_call_gives_the_same_bits_and_leaves_the_model_as_it_was() -> None:
    model, shape = tiny_vit()
    x, before = data(shape, 48), {name: value.clone() for name, value in model.state_dict().items()}
    plan = planned(model, x)
    one, two = (clado.finish(model, plan, [x], num_samples=48, verbose=False) for _ in range(2))
    assert one.rounding == two.rounding
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("stage", [0, 1])
def test_an_interrupted_call_goes_on_to_the_same_bits(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shape = small_cnn()
    x = data(shape, 48)
    plan = planned(model, x)
    wanted = clado.finish(model, plan, [x], num_samples=48, verbose=False)
    monkeypatch.setattr(finish_progress, "SECONDS", 0.0)
    run, skipped = finisher.walk, []

    def dying(*arguments: Any) -> Any:
        *given, pace, seed, skip, done = arguments

        def counted(blocks: int, now: Any) -> None:
            done(blocks, now)
            if blocks == 1 and stage == (pace is not None):
                raise KeyboardInterrupt

        return run(*given, pace, seed, skip, counted)

    def going_on(*arguments: Any) -> Any:
        skipped.append(arguments[-2])
        return run(*arguments)

    monkeypatch.setattr(finisher, "walk", dying)
    with pytest.raises(KeyboardInterrupt):
        clado.finish(model, plan, [x], num_samples=48, verbose=False, output_dir=tmp_path)
    assert (tmp_path / finish_progress.FINISH_FILE).exists()
    monkeypatch.setattr(finisher, "walk", going_on)
    other = clado.finish(model, plan, [x], num_samples=40, verbose=False)  # another call is no part of it
    found = clado.finish(model, plan, [x], num_samples=48, verbose=False, output_dir=tmp_path)
    assert skipped == [0, 0, *([1, 0] if stage == 0 else [1])]  # two walks of the other call, then what was left
    assert found.rounding == wanted.rounding != other.rounding
    assert found.info == wanted.info
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("liked", "taken"),
    [((0, 0, 0), "before"), ((1, 0, 0), "compensated"), ((0, 1, 0), "learned"), ((1, 1, 1), "learned together")],
)
@pytest.mark.usefixtures("short")
def test_the_last_stage_begins_anew_when_it_is_interrupted(
    liked: tuple[int, ...], taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shape = small_cnn()
    x = data(shape, 48)
    plan = uniform(model, x)
    judged = iter([*liked, *liked])  # of the whole call, then of the interrupted one and what goes on
    monkeypatch.setattr(finisher, "surely_less", lambda own, known, errors: bool(next(judged)))
    wanted = clado.finish(model, plan, [x], num_samples=48, verbose=False)
    assert wanted.info["finish"]["taken"] == taken
    monkeypatch.setattr(finish_progress, "SECONDS", 0.0)
    run = finisher.learn_net

    def dying(*arguments: Any) -> Any:
        *given, done = arguments

        def counted(steps: int) -> None:
            done(steps)
            if steps == finisher.NET.steps // 2:
                raise KeyboardInterrupt

        return run(*given, counted)

    monkeypatch.setattr(finisher, "learn_net", dying)
    with pytest.raises(KeyboardInterrupt):
        clado.finish(model, plan, [x], num_samples=48, verbose=False, output_dir=tmp_path)
    monkeypatch.setattr(finisher, "learn_net", run)
    monkeypatch.setattr(finisher, "walk", None)  # both walks are behind it
    found = clado.finish(model, plan, [x], num_samples=48, verbose=False, output_dir=tmp_path)
    assert found.rounding == wanted.rounding
    assert found.info == wanted.info
    assert next(judged, None) is None


@pytest.mark.parametrize("make", [small_cnn, tiny_vit])
def test_gradients_through_the_blocks_are_those_of_the_net(make: object) -> None:
    model, shape = make()  # type: ignore[operator]
    x = data(shape, 4)
    blocks = Blocks.of(open_runner(model, x, quantize_ends=True, stacked=False))
    assert blocks is not None
    own = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    (wanted, found) = (
        torch.autograd.grad(outputs.square().sum(), list(own.values()), allow_unused=True)
        for outputs in (functional_call(model, own, (x,)), outputs_of(blocks, blocks.start(x), own))
    )
    for name, one, other in zip(own, wanted, found, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * one.abs().max().item())  # float32 sums


def test_a_block_keeps_the_better_of_what_it_is_given() -> None:
    model, shape = small_cnn()
    x = data(shape, 16)
    blocks = Blocks.of(open_runner(model, x, quantize_ends=True, stacked=False))
    assert blocks is not None
    sens = clado.profile(model, [x], bits=(2, 8), scale_steps=20, num_samples=16, verbose=False)
    plan = clado.given_plan(sens, {layer.name: 2 for layer in sens.layers})
    fine = clado.given_plan(sens, {layer.name: 8 for layer in sens.layers})
    state, pace = {name: value.detach() for name, value in model.state_dict().items()}, Pace(0, 1e-2, 1e-3, 1e-3)
    coarse, better = (Finished(codes(model, which), {}) for which in (plan, fine))
    with torch.no_grad():
        live = blocks.start(x)
        for block in blocks.blocks:
            pairs = [(live, blocks.run(block, live, {}))]
            for starts in ([coarse, better], [better, coarse]):
                assert learn_block(blocks, block, plan, starts, pairs, pairs, state, pace, 0) is better
            live = pairs[0][1]


@pytest.mark.parametrize(("losses", "kept"), [([1.0, 2.0, 3.0], True), ([1.0, 0.5, 0.7], False)])
def test_the_whole_net_is_taken_only_where_judges_like_it(losses: list[float], kept: bool) -> None:
    model, shape = small_cnn()
    x = data(shape, 16)
    blocks = Blocks.of(open_runner(model, x, quantize_ends=True, stacked=False))
    assert blocks is not None
    plan = uniform(model, x)
    state, pace = {name: value.detach() for name, value in model.state_dict().items()}, Pace(2, 1e-2, 1e-3, 1e-3)
    start, parts = Finished(codes(model, plan), {}), [blocks.start(x[:8]), blocks.start(x[8:])]
    judged, steps = iter(losses), list[int]()
    with torch.no_grad():
        found = learn_net(blocks, plan, start, parts, lambda _: next(judged), state, pace, 0, steps.append)
    assert (found is start) == kept
    assert next(judged, None) is None
    assert steps == [1, 2]


def test_others_may_judge() -> None:
    model, shape = small_cnn()
    x, others = data(shape, 60).split([40, 20])
    plan = uniform(model, x)
    found = clado.finish(model, plan, [x], "compensated", heldout=[others], num_samples=40, verbose=False)
    note = found.info["finish"]
    assert (note["samples"], note["judged_by"]) == (40, 20)
    before = loss_increases(model, [others], [plan]).mean().item()
    assert abs(note["loss_increase"]["before"] - before) <= 1e-4 * before  # float32 losses


def test_a_damaged_or_foreign_file_on_the_way_is_begun_anew(tmp_path: Path) -> None:
    model, shape = small_cnn()
    x = data(shape, 16)
    plan = planned(model, x)
    (tmp_path / finish_progress.FINISH_FILE).write_bytes(b"no")
    clado.finish(model, plan, [x], "compensated", num_samples=16, verbose=False, output_dir=tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("short")
def test_rounded_inputs_and_another_forward_step() -> None:
    model, shape = tiny_vit()
    x = data(shape, 48)
    plan = planned(model, x, 4.0, act_bits=8)
    found = clado.finish(
        model, plan, [{"image": x}], num_samples=48, verbose=False, forward_step=lambda m, batch: m(batch["image"])
    )
    losses = found.info["finish"]["loss_increase"]
    assert losses[found.info["finish"]["taken"]] < losses["before"]


class Tokens(nn.Module):
    """Whole numbers in; a weight that is used twice, once through its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(self.table(x)))
        return self.second((y @ self.first.weight).mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_whole_numbers_as_inputs_and_weights_of_any_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Tokens().eval().to(dtype), torch.randint(0, 12, (64, 6))
    plan = uniform(model, x, quantize_ends=True)
    found = clado.finish(model, plan, [x], num_samples=64, verbose=False)
    losses = found.info["finish"]["loss_increase"]
    assert losses[found.info["finish"]["taken"]] < losses["before"]
    assert all(value.dtype == dtype for value in clado.apply(model, found).state_dict().values())


class HalfAndWhole(nn.Module):
    """A layer in half precision between others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(16, 32), nn.Linear(32, 64).half(), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).relu().half()).relu().to(x.dtype))


def test_a_layer_in_half_precision_is_finished_as_its_dtype_holds_it(tmp_path: Path) -> None:
    """Its scales and biases; an export keeps them in that dtype."""
    torch.manual_seed(0)
    model, x = HalfAndWhole().eval(), data((16,))
    plan = clado.finish(model, uniform(model, x, quantize_ends=True), [x], num_samples=96, verbose=False)
    assert plan.info["finish"]["taken"] != "before"
    scale = codes(model, plan)["middle"].scale
    assert torch.equal(scale, scale.half().float())
    clado.export(model, plan, tmp_path / "out", "compressed-tensors")
    verify(model, plan, tmp_path / "out", "compressed-tensors")


def test_a_plan_that_nothing_makes_better_keeps_its_weights() -> None:
    model, shape = tiny_vit()
    x = data(shape, 32)
    plan = planned(model, x, 8.0, rounding="compensated")
    found = clado.finish(model, plan, [x[:3]], "compensated", num_samples=3, verbose=False)
    losses = found.info["finish"]["loss_increase"]
    assert found.info["finish"]["judged_by"] == 2
    assert found.rounding == plan.rounding or losses["compensated"] < losses["before"]
    assert (found.info["finish"]["taken"] == "before") == (found.rounding == plan.rounding)


@pytest.mark.parametrize(
    ("after", "taken"),
    [
        ([[0.9, 1.9, 2.9, 3.9], [0.8, 1.8, 2.8, 3.8], [0.7, 1.7, 2.7, 3.7]], "learned together"),
        # A mean below, within its error.
        ([[0.0, 2.0, 2.0, 5.9], [0.9, 1.9, 2.9, 3.9], [0.9, 1.9, 2.9, 3.9]], "learned"),
        ([[0.9, 1.9, 2.9, 3.9], [0.0, 1.0, 2.0, 6.0], [0.9, 1.9, 3.9, 1.9]], "compensated"),
        ([[1.0, 2.0, 3.0, 4.0], [1.1, 2.0, 3.0, 4.0], [torch.nan, 1.0, 1.0, 1.0]], "before"),
    ],
)
@pytest.mark.usefixtures("short")
def test_a_stage_is_taken_where_it_is_better_by_more_than_an_error(
    after: list[list[float]], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shape = small_cnn()
    judged, run = [[1.0, 2.0, 3.0, 4.0], *after], finisher._Ground.losses
    asked = list[int]()

    def losses(ground: finisher._Ground, finished: Finished) -> Tensor:
        asked.append(len(run(ground, finished)))
        return torch.tensor(judged[len(asked) - 1], dtype=torch.float64)

    monkeypatch.setattr(finisher._Ground, "losses", losses)
    x = data(shape, 20)
    plan = uniform(model, x)
    found = clado.finish(model, plan, [x], num_samples=20, verbose=False)
    assert found.info["finish"]["taken"] == taken
    assert (found.rounding == plan.rounding) == (taken == "before")
    assert asked == [4] * 4  # one loss per sample that judges


@pytest.mark.parametrize("shapes", [[(6, 5)], [(6, 1)], [(6, 3, 4), (6, 7), (6,)]])
def test_gaps_of_samples_are_their_own_and_have_the_gap_as_their_mean(shapes: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    wanted = [torch.randn(shape) for shape in shapes]
    found = [value + 0.1 * torch.randn_like(value) for value in wanted]
    one, other = (wanted[0], found[0]) if len(shapes) == 1 else (wanted, found)
    each = gaps(other, one)
    assert each.shape == (6,)
    torch.testing.assert_close(each.mean(), gap(other, one))
    if shapes == [(6, 5)]:
        p, q = wanted[0].double().softmax(1), found[0].double().softmax(1)
        by_hand = (p * (p / q).log()).sum(1)
    else:
        pairs = [(a.double(), b.double()) for a, b in zip(wanted, found, strict=True)]
        by_hand = sum(6 * (b - a).square().reshape(6, -1).sum(1) / a.square().sum() for a, b in pairs)  # type: ignore[assignment]
    torch.testing.assert_close(each.double(), by_hand, rtol=1e-4, atol=1e-7)  # float32 sums
    if len(shapes) > 1:
        torch.testing.assert_close(relative_error(found, wanted), gap(other, one))


def test_a_finished_plan_replaces_its_file(tmp_path: Path) -> None:
    model, shape = tiny_vit()
    x = data(shape, 32)
    plan = uniform(model, x, rounding="nearest")
    one = clado.finish(model, plan, [x], "compensated", num_samples=32, verbose=False)
    two = clado.finish(model, plan, [x], "compensated", num_samples=20, verbose=False)
    assert one.rounding != two.rounding
    one.save(tmp_path)
    two.save(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [PLAN_FILE, f"rounded-{two.rounding.digest[:12]}.safetensors"]  # type: ignore[union-attr]


def test_the_target_is_the_weight_of_least_squares() -> None:
    torch.manual_seed(0)
    clean = torch.randn(400, 7, dtype=torch.float64)
    rounded = clean + 0.3 * torch.randn(400, 7, dtype=torch.float64)
    weight = torch.randn(5, 7, dtype=torch.float64)
    inputs = _Inputs.of([(Use((5, 7)), clean, rounded)], centered=False)
    wanted = torch.linalg.lstsq(rounded, clean @ weight.T).solution.T
    loss = [(weight @ clean.T - w @ rounded.T).square().sum() for w in (weight, inputs.target(weight), wanted)]
    assert loss[2] <= loss[1] < loss[0]  # damping keeps it from the very least
    shifted = _Inputs.of([(Use((5, 7)), clean, rounded + 1)], centered=True)
    mean = ((rounded + 1) @ weight.T - clean @ weight.T).mean(0)
    assert torch.allclose(shifted.shift(weight, weight), mean)


@pytest.mark.parametrize("quantizer", [Quantizer(), Quantizer(0, 5, False), Quantizer(3, 5)])
def test_learning_begins_at_the_weight_it_is_given(quantizer: Quantizer) -> None:
    weight = torch.randn(6, 70)
    start = quantizer.quantize(weight, 3)
    learned = LearnedWeight(weight, start)
    assert torch.allclose(learned.value(), start.values(torch.float32), rtol=1e-6, atol=1e-7)
    assert torch.equal(learned.quantized().codes, start.codes)
    learned.value().square().sum().backward()
    assert learned.log_scale.grad is not None
    with torch.no_grad():
        learned.offset += 1
        learned.log_scale += 0.1
    moved = learned.quantized()
    assert torch.equal(moved.codes, (start.codes + 1).clamp(-4, 3))
    assert torch.allclose(moved.values(torch.float32), learned.value(), rtol=1e-5, atol=1e-6)


class Buffered(nn.Module):
    """Constants that are no parameters, one of them in no state dict; one logit that is masked."""

    def __init__(self, outputs: int, masked: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, outputs)
        self.register_buffer("mean", torch.randn(16))
        self.register_buffer("off", torch.randn(24), persistent=False)
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.relu(self.first(x - self.mean)) * self.off)
        return y.masked_fill(torch.arange(y.shape[1]) == 1, -torch.inf) if self.masked else y


@pytest.mark.parametrize(("outputs", "masked"), [(1, False), (4, False), (4, True)])
def test_buffers_stay_and_any_head_is_judged(outputs: int, masked: bool) -> None:
    torch.manual_seed(0)
    model, x = Buffered(outputs, masked).eval(), data((16,), 80)
    shapes = {"first": (24, 16), "second": (outputs, 24)}
    layers = tuple(clado.Layer(name, "linear", shape, 0, (f"{name}.weight",)) for name, shape in shapes.items())
    plan = clado.Plan(layers, {"first": "W2A16", "second": "W2A16"}, "given")
    found = clado.finish(model, plan, [x], num_samples=80, verbose=False)
    losses = found.info["finish"]["loss_increase"]
    assert 0 < losses[found.info["finish"]["taken"]] < losses["before"]
    assert not {"mean", "off"} & set(adapted(found))
    assert clado.Plan.from_json(found.to_json()) == found


@pytest.mark.usefixtures("short")
def test_a_plan_of_another_resolution() -> None:
    model, shape = small_cnn()
    plan = uniform(model, data(shape, 16))
    larger = data((1, 12, 12), 32)
    found = clado.finish(model, plan, [larger], num_samples=32, verbose=False)
    losses = found.info["finish"]["loss_increase"]
    assert losses[found.info["finish"]["taken"]] < losses["before"]


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    model, shape = tiny_vit()
    x = data(shape, 16)
    plan = planned(model, x)
    with pytest.raises(clado.CladoError, match="finish: method must be one of compensated, learned, got 'magic'"):
        clado.finish(model, plan, [x], "magic")
    for wrong in (
        {"num_samples": 0},
        {"num_samples": -3},
        {"num_samples": "x"},
        {"batch_size": 0},
        {"batch_size": 2.5},
    ):
        with pytest.raises(clado.CladoError, match=f"finish: {next(iter(wrong))} must be a whole number from"):
            clado.finish(model, plan, [x], **wrong)
    (tmp_path / "file").touch()
    with pytest.raises(clado.CladoError, match="finish: output_dir must be a folder, got"):
        clado.finish(model, plan, [x], output_dir=tmp_path / "file")
    with pytest.raises(clado.CladoError, match="finish: data_loader must yield three samples at least, got 1"):
        clado.finish(model, plan, [x[:1]])
    with pytest.raises(clado.CladoError, match="finish: heldout must yield two samples at least, got 1"):
        clado.finish(model, plan, [x], heldout=[x[:1]])
    with pytest.raises(clado.CladoError, match="data_loader must yield at least one sample"):
        clado.finish(model, plan, [])
    with pytest.raises(clado.CladoError, match="finish: data_loader must yield finite numbers, got NaN or infinity"):
        clado.finish(model, plan, [x / 0])
    with pytest.raises(clado.CladoError, match="finish: model must run on the samples of data_loader, got"):
        clado.finish(model, plan, [x[:, :, :4].to(torch.uint8)])
    other, _ = tiny_vit()
    with torch.no_grad():
        other.head.bias += 1
    with pytest.raises(clado.CladoError, match="finish: model must be the one the plan was made for"):
        clado.finish(other, plan, [x])


class Again(nn.Module):
    """A weight of the first block that the last one uses again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(6, 6), nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for layer in self.middle:
            y = layer(y.relu())
        return self.head(self.first(y))


def test_codes_of_floats_are_not_learned_and_it_is_said_before_anything_is_run() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6))).eval()
    plan = random_plan(model, Quantizer(), (4,))
    labels = ("FP8A16", "W4A16", "NVFP4A16", "BF16", "W8A16", "MXFP8A16")
    plan = replace(plan, schemes=dict(zip(plan.schemes, labels, strict=True)))
    must = "finish: plan must hold integer weights for method 'learned', got FP8A16 of 0, NVFP4A16 of 2, BF16 of 3 and 1 more"
    with pytest.raises(clado.CladoError, match=f"^{must}$"):
        clado.finish(model, plan, iter([]))


def test_a_weight_that_is_used_again_is_its_rounded_one_while_a_later_block_is_learned() -> None:
    """What is learned, and what is compared with where it began, is one net: else a worse state would be taken for a better."""
    torch.manual_seed(0)
    model, x = Again().eval(), torch.randn(48, 6)
    sens = clado.profile(model, [x], bits=(2,), num_samples=48, quantize_ends=True, verbose=False)
    plan = clado.given_plan(sens, {layer.name: 2 for layer in sens.layers})
    seen: list[set[str]] = []
    known = Blocks.run

    def run(self: Any, block: Any, live: Any, given: Any) -> Any:
        if torch.is_grad_enabled():
            seen.append(set(given))
        return known(self, block, live, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Blocks, "run", run)
        clado.finish(model, plan, [x], "learned", num_samples=48, verbose=False)
    assert seen
    assert all("first.weight" in given for given in seen)
