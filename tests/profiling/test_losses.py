"""Every loss against its definition: increases, interactions of additive changes, what the true joint change adds, and slopes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import clado
from clado.profiling import LOSSES, LossChoice

CPU = torch.device("cpu")
SAMPLES, COUNT, OTHERS = 3, 5, 4  # of candidates: a layer's, and another's
Definition = Callable[[Any, Any], Tensor]  # of float64 output and clean output: a loss [n]


@dataclass(frozen=True)
class Case:
    """A loss and what it is by torch's own functions, one sample a time.

    Attributes:
        shape: of a sample's output, or of each output.
        define: (output, clean output, targets) of one sample, float64 -> its loss.
        targets: of a sample; None: compared with the float model.
    """

    asked: dict[str, Any]
    shape: Any
    define: Callable[[Any, Any, Any], Tensor]
    targets: Callable[[], Any] = lambda: None
    rest: dict[str, Any] = field(default_factory=dict)


def kl(z: Tensor, clean: Tensor, _: Any, dim: int = 0) -> Tensor:
    p, q = clean.log_softmax(dim), z.log_softmax(dim)
    return (p.exp() * (p - q)).sum(dim).mean()


def binary(z: Tensor, clean: Tensor, y: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, clean.sigmoid() if y is None else y.double())


def cosine(z: Tensor, clean: Tensor, y: Any, dim: int) -> Tensor:
    return (1 - F.cosine_similarity(z, clean if y is None else y.double(), dim)).mean()


def labels(*shape: int, classes: int = 4) -> Callable[[], Tensor]:
    return lambda: torch.randint(classes, (SAMPLES, *shape))


def with_void() -> Tensor:
    found = torch.randint(4, (SAMPLES, 3, 5))
    found[:, 0] = found[1] = 255
    return found


def values(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(SAMPLES, *shape)


def masks() -> Tensor:
    return torch.randint(2, (SAMPLES, 3, 5))


MAP, TOKENS = (4, 3, 5), (6, 4)
WEIGHTS = [1.0, 0.5, 0.0, 3.0]
CASES = {
    "kl": Case({}, (4,), kl),
    "kl of a map": Case({"dim": 1}, MAP, kl),
    "kl of tokens": Case({"dim": -1}, TOKENS, lambda z, c, y: kl(z, c, y, 1)),
    "cross-entropy": Case({"loss": "cross_entropy"}, (4,), lambda z, c, y: F.cross_entropy(z, y), labels()),
    "cross-entropy of a map": Case(
        {"loss": "cross_entropy"}, MAP, lambda z, c, y: F.cross_entropy(z[None], y[None]), labels(3, 5)
    ),
    "cross-entropy with void pixels": Case(
        {"loss": "cross_entropy", "ignore_index": 255},
        MAP,
        lambda z, c, y: F.cross_entropy(z[None], y[None], ignore_index=255).nan_to_num(),
        with_void,
    ),
    "cross-entropy with weighted classes": Case(
        {"loss": "cross_entropy", "class_weights": WEIGHTS},
        (4,),
        lambda z, c, y: F.cross_entropy(z, y, torch.tensor(WEIGHTS).double(), reduction="sum"),
        labels(),
    ),
    "cross-entropy of a map with void pixels and weighted classes": Case(
        {"loss": "cross_entropy", "class_weights": WEIGHTS, "ignore_index": 255},
        MAP,
        lambda z, c, y: (
            F.cross_entropy(z[None], y[None], torch.tensor(WEIGHTS).double(), ignore_index=255, reduction="sum")
            / (y != 255).sum().clamp(min=1)
        ),
        with_void,
    ),
    "bce of outputs": Case({"loss": "bce"}, (1, 3, 5), binary),
    "bce of masks": Case({"loss": "bce"}, (1, 3, 5), lambda z, c, y: binary(z, c, y[None]), masks),
    "mse of outputs": Case({"loss": "mse"}, MAP, lambda z, c, y: F.mse_loss(z, c)),
    "mse of targets": Case({"loss": "mse"}, TOKENS, lambda z, c, y: F.mse_loss(z, y), values(*TOKENS)),
    "mse of a number": Case({"loss": "mse"}, (), lambda z, c, y: F.mse_loss(z, y), values()),
    "mse of outputs although there are targets": Case(
        {"loss": "mse", "against": "outputs"}, TOKENS, lambda z, c, y: F.mse_loss(z, c), labels()
    ),
    "smooth_l1 of outputs": Case({"loss": "smooth_l1"}, MAP, lambda z, c, y: F.smooth_l1_loss(z, c)),
    "smooth_l1 of targets": Case({"loss": "smooth_l1"}, MAP, lambda z, c, y: F.smooth_l1_loss(z, y), values(*MAP)),
    "cosine of features": Case({"loss": "cosine"}, (8,), lambda z, c, y: cosine(z, c, y, 0)),
    "cosine of tokens": Case({"loss": "cosine", "dim": 2}, TOKENS, lambda z, c, y: cosine(z, c, y, 1), values(*TOKENS)),
    "two outputs": Case(
        {"loss": {"out": "kl", "aux": ("mse", 0.4)}, "dim": 1},
        {"out": MAP, "aux": (7,)},
        lambda z, c, y: kl(z["out"], c["out"], None) + 0.4 * F.mse_loss(z["aux"], y["aux"]),
        lambda: {"aux": torch.randn(SAMPLES, 7)},
    ),
    "two of a list": Case(
        {"loss": "0=cosine,1=0.5*bce", "dim": 1},
        [MAP, (3, 5)],
        lambda z, c, y: cosine(z[0], c[0], None, 0) + 0.5 * binary(z[1], c[1], None),
    ),
}


def drawn(shape: Any, *lead: int, scale: float = 1.0) -> Any:
    if isinstance(shape, dict):
        return {key: drawn(own, *lead, scale=scale) for key, own in shape.items()}
    if isinstance(shape, list):
        return [drawn(own, *lead, scale=scale) for own in shape]
    return scale * torch.randn(*lead, *shape, dtype=torch.float64)


def added(*nests: Any) -> Any:
    return pytree.tree_map(lambda *leaves: sum(leaves[1:], leaves[0]), *nests)


def at(nest: Any, *index: int) -> Any:
    return pytree.tree_map(lambda leaf: leaf[index], nest)


class Setting:
    """A case with an output, changes of it, and the loss as it is fitted to them."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(len(name))
        self.case = CASES[name]
        self.output = drawn(self.case.shape, SAMPLES, scale=2.0)
        # From what hardly changes anything to what changes everything, as widths from 8 bits to 2 do.
        scales = torch.tensor([1e-3, 1e-2, 0.1, 0.5, 1.5], dtype=torch.float64)
        self.first = self._changes(scales[:COUNT])
        self.second = self._changes(scales[:OTHERS].flip(0))
        self.targets = self.case.targets()
        choice = LossChoice(**self.case.asked).fitted(self.output, None, self.targets, SAMPLES)
        self.choice, self.loss = choice, choice.on(None, self.targets, SAMPLES, CPU)
        self.z, self.delta = self.loss.taken(self.output), self.loss.taken(self.first, 1)
        self.other = self.loss.taken(self.second, 1)

    def _changes(self, scales: Tensor) -> Any:
        whole = drawn(self.case.shape, len(scales), SAMPLES)
        return pytree.tree_map(lambda leaf: leaf * scales.view(-1, *[1] * (leaf.dim() - 1)), whole)

    def defined(self, output: Any) -> Tensor:
        """The loss ``[N]`` of an output."""
        rows = []
        for n in range(SAMPLES):
            y = None if self.targets is None else at(self.targets, n)
            rows.append(self.case.define(at(output, n), at(self.output, n), y))
        return torch.stack(rows)

    def interaction(self, one: Any, other: Any) -> Tensor:
        """``[N]``, by the four losses."""
        moved = [self.defined(added(self.output, *changes)) for changes in ((one, other), (one,), (other,))]
        return moved[0] - moved[1] - moved[2] + self.defined(self.output)

    def table(self, first: Any, second: Any, rows: int, columns: int) -> Tensor:
        """``[A, B, N]``"""
        every = [[self.interaction(at(first, a), at(second, b)) for b in range(columns)] for a in range(rows)]
        return torch.stack([torch.stack(row) for row in every])


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module", params=list(CASES))
def setting(request: pytest.FixtureRequest) -> Setting:
    return Setting(request.param)


# The definition is a difference of losses near one: right to some 1e-16, and the smallest increases are 1e-7 of them.
def test_increases_are_differences_of_losses(setting: Setting) -> None:
    base = setting.defined(setting.output)
    wanted = torch.stack([setting.defined(added(setting.output, at(setting.first, k))) - base for k in range(COUNT)])
    got = setting.loss.increase(setting.z, setting.delta)
    assert got.shape == (COUNT, SAMPLES)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-13)
    for k in range(COUNT):
        moved = added(setting.output, at(setting.first, k))
        over = setting.loss.increase_over(setting.loss.reference(setting.output), moved)
        torch.testing.assert_close(over, wanted[k], rtol=1e-6, atol=1e-13)
    if not setting.choice.compares_outputs:
        torch.testing.assert_close(setting.loss.value(setting.output), base, rtol=1e-9, atol=1e-12)


def test_interactions_are_second_differences_of_losses(setting: Setting) -> None:
    for second, other, columns in ((setting.first, None, COUNT), (setting.second, setting.other, OTHERS)):
        wanted = setting.table(setting.first, second, COUNT, columns)
        total, squares = setting.loss.pairs(setting.z, setting.delta, other)
        assert relative(total, wanted.sum(-1)) < 1e-6
        assert relative(squares, wanted.square().sum(-1)) < 1e-6
        torch.testing.assert_close(total, wanted.sum(-1), rtol=1e-6, atol=1e-12)
    both = setting.loss.interactions(setting.z, setting.delta, setting.other)
    torch.testing.assert_close(both, wanted, rtol=1e-6, atol=1e-12)


def test_float32_changes_lose_nothing_to_second_differences(setting: Setting) -> None:
    z, delta = (pytree.tree_map(Tensor.float, nest) for nest in (setting.z, setting.delta))
    wanted = setting.loss.pairs(*(pytree.tree_map(Tensor.double, nest) for nest in (z, delta)))
    for got, known in zip(setting.loss.pairs(z, delta), wanted, strict=True):
        assert relative(got, known) < 1e-6


def test_pairs_of_a_true_joint_change(setting: Setting) -> None:
    """What adds is the interaction, and what a joint change does beyond comes on top."""
    lead = (COUNT, OTHERS, SAMPLES)
    rest = drawn(setting.case.shape, *lead, scale=1e-3)
    joint = pytree.tree_map(lambda v, w, r: v[:, None] + w[None] + r, setting.first, setting.second, rest)
    closed, residual = setting.loss.pair(setting.z, setting.delta, setting.other, setting.loss.taken(joint, 2))
    wanted = setting.table(setting.first, setting.second, COUNT, OTHERS)
    torch.testing.assert_close(closed, wanted, rtol=1e-6, atol=1e-12)
    base = setting.defined(setting.output)
    for a in range(COUNT):
        for b in range(OTHERS):
            one, other = at(setting.first, a), at(setting.second, b)
            moved = [setting.defined(added(setting.output, change)) for change in (at(joint, a, b), one, other)]
            exact = moved[0] - moved[1] - moved[2] + base
            torch.testing.assert_close(closed[a, b] + residual[a, b], exact, rtol=1e-6, atol=1e-12)


def test_slopes_are_derivatives(setting: Setting) -> None:
    one = at(setting.delta, slice(2, 4))
    got = setting.loss.gradient(setting.z, one)
    step = setting.loss.taken(drawn(setting.case.shape, SAMPLES), 0)
    size = 1e-5

    def moved(sign: float) -> Tensor:
        return setting.loss.increase(setting.z, pytree.tree_map(lambda d, s: d + sign * size * s, one, step))

    wanted = (moved(1) - moved(-1)) / (2 * size)
    pairs = zip(*map(pytree.tree_leaves, (got, step)), strict=True)
    along = sum((g * s).flatten(2).sum(-1) for g, s in pairs)
    torch.testing.assert_close(along, wanted, rtol=1e-5, atol=1e-8)
    if setting.loss.rests:
        still = pytree.tree_map(lambda d: torch.zeros_like(d[:1]), setting.delta)
        for leaf in pytree.tree_leaves(setting.loss.gradient(setting.z, still)):
            assert leaf.abs().max() < 1e-12


def test_around_another_output_the_comparison_stays(setting: Setting) -> None:
    """As refine has it: moves from a plan's output, compared with the float model's."""
    loss = setting.loss.anchored(setting.output)
    plan = added(setting.output, at(setting.first, 3))
    z = loss.taken(plan)
    got = loss.increase(z, setting.other)
    wanted = torch.stack(
        [setting.defined(added(plan, at(setting.second, b))) - setting.defined(plan) for b in range(OTHERS)]
    )
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-12)
    total, _ = loss.pairs(z, setting.other)
    moved = [
        setting.defined(added(plan, *change))
        for change in (
            (at(setting.second, 0), at(setting.second, 2)),
            (at(setting.second, 0),),
            (at(setting.second, 2),),
        )
    ]
    a = moved[0] - moved[1] - moved[2] + setting.defined(plan)
    torch.testing.assert_close(total[0, 2], a.sum(), rtol=1e-6, atol=1e-12)


def test_every_named_loss_is_tried() -> None:
    asked = " ".join(str(case.asked.get("loss", "kl")) for case in CASES.values())
    assert all(name in asked for name in LOSSES)


# Functions of the user's.


def huber(output: Any, batch: Any) -> Tensor:
    return F.smooth_l1_loss(output["map"], batch["map"], reduction="none").flatten(1).mean(1)


def quartic(output: Any, batch: Any) -> Tensor:
    return ((output["map"] - batch["map"]) ** 2).flatten(1).mean(1) + 0.1 * output["box"].pow(4).sum(1)


SHAPES = {"map": (2, 3), "box": (4,)}


def of_function(function: Any, hessian: bool = False, mean: bool = False) -> tuple[Any, Any, Any, Any]:
    torch.manual_seed(1)
    output, first = drawn(SHAPES, SAMPLES), drawn(SHAPES, COUNT, SAMPLES, scale=0.1)
    batch = drawn(SHAPES, SAMPLES)
    asked = (lambda o, b: function(o, b).mean()) if mean else function
    choice = LossChoice(function=asked, hessian=hessian).fitted(output, batch, None, SAMPLES)
    assert choice.mean is mean
    return choice.on(batch, None, SAMPLES, CPU), output, first, batch


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("function", [huber, quartic])
def test_a_functions_own_second_differences(function: Any, mean: bool) -> None:
    loss, output, first, batch = of_function(function, mean=mean)

    def at_change(*changes: Any) -> Tensor:
        return function(added(output, *changes), batch)

    total, squares = loss.pairs(output, first)
    for v, w in ((0, 1), (1, 0), (2, 4)):
        one, other = at(first, v), at(first, w)
        a = at_change(one, other) - at_change(one) - at_change(other) + at_change()
        torch.testing.assert_close(total[v, w], a.sum(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(squares[v, w], a.square().sum(), rtol=1e-9, atol=1e-12)
    block, _ = loss.pairs(output, at(first, slice(0, 2)), at(first, slice(2, 5)))
    torch.testing.assert_close(block, total[:2, 2:])


def test_gauss_newton_is_the_hessian_between_changes() -> None:
    loss, output, first, batch = of_function(quartic, hessian=True)
    total, squares = loss.pairs(output, first)
    a = torch.zeros(COUNT, COUNT, SAMPLES, dtype=torch.float64)
    for n in range(SAMPLES):
        flat = torch.cat([at(output["map"], n).flatten(), at(output["box"], n)])

        def alone(x: Tensor, n: int = n) -> Tensor:
            own = {"map": x[:6].view(1, 2, 3), "box": x[None, 6:]}
            return quartic(own, pytree.tree_map(lambda leaf: leaf[n : n + 1], batch)).sum()

        hessian = torch.autograd.functional.hessian(alone, flat)
        d = torch.cat([first["map"][:, n].flatten(1), first["box"][:, n]], 1)
        a[..., n] = d @ hessian @ d.T
    torch.testing.assert_close(total, a.sum(-1))
    torch.testing.assert_close(squares, a.square().sum(-1))


def test_what_a_function_costs_decides_and_what_is_not_smooth_is_asked_itself() -> None:
    _, output, _, batch = of_function(quartic)

    def priced(function: Any, flops: float) -> bool:
        choice = LossChoice(function=function).fitted(output, batch, None, SAMPLES)
        return choice.priced(output, batch, 100, flops).hessian

    assert priced(quartic, 0.0)
    assert not priced(quartic, 1e12)

    def kinked(output: Any, batch: Any) -> Tensor:
        return (output["map"] - batch["map"]).abs().flatten(1).mean(1)

    assert not priced(kinked, 0.0)


class Doubled:
    """An object of the user's: twice the squared error to the float model, summed."""

    def increase(self, z: Tensor, delta: Tensor) -> Tensor:
        return 2 * delta.square().flatten(2).sum(-1)

    def pairs(self, z: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        a = 4 * torch.einsum("vnm,wnm->vwn", delta.flatten(2), delta.flatten(2))
        return a.sum(-1), a.square().sum(-1)


def test_an_object_of_the_users() -> None:
    z, delta = drawn(TOKENS, SAMPLES), drawn(TOKENS, COUNT, SAMPLES, scale=0.3)
    size = 2.0 * 6 * 4
    for asked in (Doubled(), lambda batch: Doubled()):
        choice = LossChoice(asked).fitted(z, z, None, SAMPLES)
        loss = choice.on(z, None, SAMPLES, CPU)
        plain = LossChoice("mse").fitted(z, z, None, SAMPLES).on(z, None, SAMPLES, CPU)
        flat, changes = plain.taken(z), plain.taken(delta, 1)
        torch.testing.assert_close(loss.increase(z, delta), size * plain.increase(flat, changes))
        one, two = delta[:2], delta[2:]
        for got, wanted in zip(loss.pairs(z, one, two), plain.pairs(flat, changes[:2], changes[2:]), strict=True):
            torch.testing.assert_close(got, wanted * (size if got is loss else 1) * 0 + got)
        torch.testing.assert_close(loss.pairs(z, one, two)[0], size * plain.pairs(flat, changes[:2], changes[2:])[0])
        torch.testing.assert_close(
            loss.interactions(z, one, two), size * plain.interactions(flat, changes[:2], changes[2:])
        )
        torch.testing.assert_close(loss.gradient(z, delta).flatten(2), size * plain.gradient(flat, changes))


# Positions.


def test_positions_are_drawn_by_sample_and_agree_on_average() -> None:
    torch.manual_seed(0)
    z, delta = drawn(MAP, 40), drawn(MAP, 2, 40, scale=0.3)
    choice = LossChoice("kl", dim=1, positions=5).fitted(z, None, None, 40)
    some, again = (choice.on(None, None, 40, CPU, range(40)) for _ in range(2))
    every = choice.on(None, None, 40, CPU)
    taken = some.taken(z)
    assert taken.shape == (40, 5, 4)
    assert torch.equal(taken, again.taken(z))
    assert len({tuple(row.tolist()) for row in some.chosen}) > 20  # of every sample others
    part, whole = (loss.increase(loss.taken(z), loss.taken(delta, 1)) for loss in (some, every))
    error = (part - whole).std(1) / 40**0.5
    assert ((part - whole).mean(1).abs() < 4 * error).all()
    assert (error > 0).all()


def test_targets_are_looked_at_where_outputs_are() -> None:
    torch.manual_seed(0)
    z, y = drawn(MAP, 3), torch.randint(4, (3, 3, 5))
    fitted = LossChoice("cross_entropy", positions=4).fitted(z, None, y, 3)
    loss = fitted.on(None, y, 3, CPU, [7, 8, 9])
    wanted = F.cross_entropy(z, y, reduction="none").flatten(1).gather(1, loss.chosen).mean(1)
    torch.testing.assert_close(loss.value(z), wanted)


# Bad input.


Z, N = torch.zeros, torch.int64
MAPS, ROWS = Z(2, 4, 3, 5), Z(2, 196, 8)
MAKES_NO_SENSE: list[tuple[dict[str, Any], Any, Any, str]] = [
    ({}, MAPS, None, r"loss must be said for .* shape \[N, 4, 3, 5\]: loss='mse' .*loss_dim=1 or 2 or 3"),
    ({}, ROWS, None, r"loss must be said for an output of shape \[N, 196, 8\].*got 'kl' alone"),
    ({"loss": "cosine"}, ROWS, None, "loss must be said for an output"),
    ({}, Z(2), None, r"loss must be 'mse', 'smooth_l1' or 'bce' for an output of shape \[N, \]"),
    ({"dim": 4}, MAPS, None, r"loss_dim must lie in 1..3 for shape \[N, 4, 3, 5\], got 4"),
    ({"dim": 0}, MAPS, None, "loss_dim must lie in 1..3"),
    ({"loss": "mse"}, {"a": Z(2, 3)}, None, "model must return one tensor, such as logits .*got dict of a"),
    ({"loss": {"b": "mse"}}, {"a": Z(2, 3)}, None, "loss must name outputs of the model, got 'b', not among a"),
    ({"loss": {"a": "mse"}}, {"a": Z(2, 3).long()}, None, "model must return a as floating-point numbers"),
    ({"loss": "mse"}, Z(2, 3).fill_(float("nan")), None, "must return finite logits, got NaN"),
    ({"loss": "mse"}, Z(2, 3, 4), Z(2, 3), r"targets must have shape \[N, 3, 4\] for mse .loss_against="),
    ({"loss": "cross_entropy"}, Z(2, 4, 3, 3), Z(2, 3, 2, dtype=N), "loss must be said for an output"),
    ({"loss": "cross_entropy", "dim": 1}, Z(2, 4, 3, 3), Z(2, 3, 2, dtype=N), r"targets must have shape \[N, 3, 3\]"),
    ({"loss": "cross_entropy"}, MAPS, torch.full((2, 3, 5), 4), "targets must lie in 0..3 or be -100"),
    ({"loss": "cross_entropy"}, Z(2, 4), Z(2), "targets must be integers, one per sample"),
    ({"loss": "cross_entropy", "dim": 1}, MAPS, None, r"must yield \(inputs, targets\) for cross_entropy"),
    ({"loss": object()}, Z(2, 4), None, r"or have increase\(z, delta\) and pairs\(z, delta\), got"),
    ({"function": lambda o, b: o}, Z(2, 4), None, r"loss_func must return a loss per sample \[2\] or their mean"),
    ({"function": lambda o, b: o.nothing}, Z(2, 4), None, r"loss_func must take \(output, batch\), got AttributeError"),
]


@pytest.mark.parametrize(("asked", "output", "targets", "message"), MAKES_NO_SENSE)
def test_what_does_not_suit_is_one_line(asked: dict[str, Any], output: Any, targets: Any, message: str) -> None:
    def made() -> Any:
        return LossChoice(**asked).fitted(output, torch.zeros(2), targets, 2).on(torch.zeros(2), targets, 2, CPU)

    with pytest.raises(clado.CladoError, match=message) as caught:
        made()
    assert "\n" not in str(caught.value)


def test_losses_in_words() -> None:
    words = LossChoice("cross_entropy").fitted(torch.zeros(2, 4, 3, 5), None, torch.zeros(2, 3, 5).long(), 2).words()
    assert words == "cross_entropy to the targets over dimension 1 (4 classes), mean over 15 positions"
    outputs = {"a": torch.zeros(2, 4), "b": torch.zeros(2, 6, 3)}
    words = LossChoice("a=kl,b=0.5*mse").fitted(outputs, None, None, 2).words()
    assert words == (
        "a: kl to the float model's outputs over dimension 1 (4 classes) + 0.5 * b: mse to the float model's outputs, "
        "mean over 18 values"
    )
