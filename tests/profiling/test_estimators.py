"""The gradient and corrected estimators and users' losses, against their definitions in float64 by plain loops."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import clado
from clado.artifacts import Sensitivity
from clado.graph.capture import capture
from clado.graph.carried import CarriedExecutor
from clado.graph.executor import Executor
from clado.profiling import ESTIMATORS, profile
from clado.profiling.losses import Categorical, UserLoss
from clado.quant import Candidates, Quantizer, Variant
from clado.quant import variants as variants_of
from tests.models import lively, tiny_vit
from tests.profiling.test_profile import net_and_data, plain_loop, relative

BITS = (2, 4)


class OddConvolutions(nn.Module):
    """Stride, dilation, groups, 'same' padding, a linear layer over channels last, and a weight that is also used as a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 6, 3, padding="same", dilation=2, groups=2)
        self.tall = nn.Conv2d(6, 4, (3, 1), stride=(2, 1))
        self.mix = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tall(torch.relu(self.grouped(torch.relu(self.first(x)))))
        x = self.mix(x.permute(0, 2, 3, 1).tanh())
        return self.head((x @ self.mix.weight).relu().mean((1, 2)))


def nets(name: str, samples: int) -> tuple[nn.Module, Tensor, Tensor]:
    if name != "odd":
        return net_and_data(name, samples)
    torch.manual_seed(3)
    return lively(OddConvolutions()).eval(), torch.randn(samples, 1, 8, 8), torch.randint(0, 10, (samples,))


def gradient_by_definition(
    model: nn.Module, sens: Sensitivity, x: Tensor, y: Tensor, loss: str
) -> tuple[NDArray, NDArray]:
    """Mean and standard error of ⟨∇_j ℓ(w + Δ_v) − ∇_j ℓ(w), Δ_w⟩, one sample and one backward at a time, float64."""
    model, x = copy.deepcopy(model).double(), x.double()
    weights = [model.get_parameter(layer.names[0]) for layer in sens.layers]
    clean = [w.detach().clone() for w in weights]
    changes = [sens.quantizer.fake_quant(w.float(), sens.bits).double() - w for w in clean]
    reference = model(x).log_softmax(-1).detach()
    width = len(sens.bits)

    def slopes() -> list[list[Tensor]]:
        found = []
        for n in range(len(x)):
            logs = model(x[n : n + 1]).log_softmax(-1)
            kl = (reference[n].exp() * (reference[n] - logs[0])).sum()
            found.append(torch.autograd.grad(kl if loss == "kl" else -logs[0, y[n]], weights))
        return found

    base = slopes()
    omega = np.zeros((len(x), sens.num_candidates, sens.num_candidates))
    for v in range(sens.num_candidates):
        i, m = divmod(v, width)
        with torch.no_grad():
            weights[i].add_(changes[i][m])
        moved = slopes()
        with torch.no_grad():
            weights[i].copy_(clean[i])
        for n in range(len(x)):
            for j in range(i + 1, len(weights)):
                for k in range(width):
                    value = ((moved[n][j] - base[n][j]) * changes[j][k]).sum().item()
                    omega[n, v, j * width + k] = omega[n, j * width + k, v] = value
    return omega.mean(0), omega.std(0, ddof=1) / len(x) ** 0.5


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
@pytest.mark.parametrize("name", ["vit", "cnn", "odd"])
def test_gradient_equals_its_definition(name: str, loss: str) -> None:
    model, x, y = nets(name, 5)
    options: dict[str, Any] = {
        "estimator": "gradient",
        "loss": loss,
        "quantize_ends": True,
        "batch_size": 3,
        "rounding": "nearest",
        "verbose": False,
    }
    sens = profile(model, [(x, y)], BITS, precision="float64", **options)
    omega, stderr = gradient_by_definition(model, sens, x, y, loss)
    off = ~sens.candidates.same_layer
    assert relative(sens.interaction, omega) < 1e-9
    assert relative(sens.stderr[off], stderr[off]) < 1e-7
    diagonal = profile(model, [(x, y)], BITS, precision="float64", **{**options, "estimator": "diagonal"})
    np.testing.assert_allclose(sens.delta_loss, diagonal.delta_loss, rtol=1e-9, atol=1e-15)
    # float32: rounding of two gradients, relative to the interaction they differ by.
    single = profile(model, [(x, y)], BITS, **options)
    assert relative(single.interaction, omega) < 1e-4


def test_gradient_takes_at_most_two_forwards_per_candidate() -> None:
    model, x, _ = net_and_data("vit")
    sens = profile(model, [x], estimator="gradient", verbose=False)
    assert sens.info["forward_equivalents"] <= 2.0 * sens.num_candidates
    assert sens.info["forward_equivalents"] == pytest.approx(sens.info["expected_forward_equivalents"], rel=0.15)


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
def test_corrected_is_the_closed_form_plus_the_residual_of_some_samples(loss: str) -> None:
    model, x, y = net_and_data("vit", 20)

    def run(estimator: str, rows: slice, **more: Any) -> Sensitivity:
        data = [(x[rows], y[rows])]
        how: dict[str, Any] = {"precision": "float64", "batch_size": 4, "rounding": "nearest", "verbose": False}
        return profile(model, data, BITS, estimator=estimator, loss=loss, **how, **more)

    sens = run("corrected", slice(None), exact_samples=6)  # two chunks of four
    some = slice(0, 8)
    wanted = run("logit", slice(None)).interaction + run("exact", some).interaction - run("logit", some).interaction
    assert relative(sens.interaction, wanted) < 1e-6  # pairwise_ce accumulates float64 samples in its own order
    assert (
        relative(run("corrected", slice(None), exact_samples=20).interaction, run("exact", slice(None)).interaction)
        < 1e-6
    )

    # Var[mean of a over 20 + mean of r over 8], the 8 being among the 20, from every sample alone.
    double = copy.deepcopy(model).double()
    executor = Executor(capture(double, x[:2].double()))
    executor.self_test(x[:2].double())
    candidates = Candidates.uniform(executor.layers, BITS)
    variants = variants_of(model, candidates, sens.quantizer, x.device, torch.float64)
    with torch.no_grad():
        ones = [
            ESTIMATORS["corrected"].run(
                executor,
                variants,
                x[k : k + 1].double(),
                Categorical(target=None if loss == "kl" else y[k : k + 1, None]),
                lambda: None,
            )
            for k in range(20)
        ]
    closed = np.stack([one.pair.numpy() for one in ones])
    rest = np.stack([one.residual.numpy() for one in ones[:8]])
    spread, spread_rest = closed.std(0, ddof=1), rest.std(0, ddof=1)
    covariance = ((closed[:8] - closed[:8].mean(0)) * (rest - rest.mean(0))).sum(0) / 7
    covariance = covariance.clip(
        -spread * spread_rest, spread * spread_rest
    )  # eight samples may say more than is possible
    variance = spread**2 / 20 + spread_rest**2 / 8 + 2 * covariance / 20
    upper = np.triu(~sens.candidates.same_layer)
    assert relative(sens.stderr[upper], np.sqrt(np.maximum(variance, 0))[upper]) < 1e-6


def kl_to(reference: Tensor) -> Any:
    def loss(output: Tensor, batch: Any) -> Tensor:
        logs = output.log_softmax(-1)
        rows = reference[batch["index"]].to(output.dtype)
        return (rows.exp() * (rows - logs)).sum(-1)

    return loss


@pytest.mark.parametrize("estimator", ["diagonal", "gradient", "exact"])
def test_a_users_loss_gives_what_the_same_built_in_loss_gives(estimator: str) -> None:
    model, x, _ = net_and_data("vit", 6)
    with torch.no_grad():
        reference = copy.deepcopy(model).double()(x.double()).log_softmax(-1)
    loss = kl_to(reference)
    options: dict[str, Any] = {"estimator": estimator, "precision": "float64", "batch_size": 4, "verbose": False}
    wanted = profile(model, [x], BITS, **options)
    batches = [
        {"image": part, "index": index} for part, index in zip(x.split(3), torch.arange(6).split(3), strict=True)
    ]
    for function in (loss, lambda output, batch: loss(output, batch).mean()):  # per sample, and a mean asked one by one
        got = profile(
            model, batches, BITS, loss_func=function, forward_step=lambda m, batch: m(batch["image"]), **options
        )
        assert relative(got.delta_loss, wanted.delta_loss) < 1e-8
        np.testing.assert_allclose(
            got.interaction, wanted.interaction, rtol=0, atol=1e-7 * np.abs(wanted.interaction).max()
        )
        np.testing.assert_allclose(np.diag(got.stderr), np.diag(wanted.stderr), rtol=1e-6)
        assert got.info["loss"] == "user"


class TwoHeads(nn.Module):
    """Boxes and a map from one trunk, as a dictionary: no classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(1, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.boxes, self.map = nn.Linear(4, 4), nn.Conv2d(4, 1, 1)

    def forward(self, image: Tensor, gain: Tensor) -> dict[str, Any]:
        x = torch.relu(self.body(torch.relu(self.trunk(image)) * gain[:, None, None, None]))
        return {"boxes": self.boxes(x.mean((2, 3))), "map": self.map(x), "stride": 1}


@pytest.mark.parametrize("estimator", ["diagonal", "gradient", "exact"])
def test_models_of_several_inputs_and_outputs(estimator: str) -> None:
    torch.manual_seed(0)
    model = lively(TwoHeads()).eval()
    batch = {
        "image": torch.randn(5, 1, 6, 6),
        "gain": torch.rand(5) + 0.5,
        "boxes": torch.randn(5, 4),
        "map": torch.randn(5, 1, 6, 6),
    }

    def loss(output: dict[str, Any], batch: dict[str, Tensor]) -> Tensor:
        return (output["boxes"] - batch["boxes"]).square().sum(-1) + (output["map"] - batch["map"]).abs().mean(
            (1, 2, 3)
        )

    def step(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return model(batch["image"], batch["gain"])

    options: dict[str, Any] = {"loss_func": loss, "forward_step": step, "quantize_ends": True, "verbose": False}
    options["rounding"] = "nearest"
    sens = profile(model, [batch], BITS, estimator=estimator, precision="float64", **options)
    assert [layer.name for layer in sens.layers] == ["trunk", "body", "boxes", "map"]

    double = copy.deepcopy(model).double()
    inputs = {name: value.double() for name, value in batch.items()}
    weights = [double.get_parameter(layer.names[0]) for layer in sens.layers]
    clean = [w.detach().clone() for w in weights]
    variants = [sens.quantizer.fake_quant(w.float(), BITS).double() for w in clean]

    @torch.no_grad()
    def value(choice: dict[int, int]) -> float:
        for k, m in choice.items():
            weights[k].copy_(variants[k][m])
        result = loss(step(double, inputs), inputs).mean().item()
        for k in choice:
            weights[k].copy_(clean[k])
        return result

    single = np.array([value({v // 2: v % 2}) for v in range(8)]) - value({})
    np.testing.assert_allclose(sens.delta_loss, single, rtol=1e-9)
    if estimator == "exact":
        omega = np.array(
            [
                [
                    value({v // 2: v % 2, w // 2: w % 2}) - value({}) - single[v] - single[w] if v // 2 != w // 2 else 0
                    for w in range(8)
                ]
                for v in range(8)
            ]
        )
        assert relative(sens.interaction, omega) < 1e-9


def test_gradient_of_a_loss_that_the_last_layers_do_not_reach() -> None:
    torch.manual_seed(0)
    model = lively(TwoHeads()).eval()
    batch = {"image": torch.randn(5, 1, 6, 6), "gain": torch.rand(5) + 0.5}
    sens = profile(
        model,
        [batch],
        BITS,
        estimator="gradient",
        quantize_ends=True,
        loss_func=lambda output, _: output["boxes"].square().sum(-1),
        forward_step=lambda m, b: m(b["image"], b["gain"]),
        verbose=False,
    )
    assert [layer.name for layer in sens.layers][-1] == "map"
    assert np.abs(sens.interaction[-2:]).max() == 0
    assert np.abs(sens.interaction).max() > 0


def test_exact_in_float32_loses_nothing_to_second_differences() -> None:
    """The closed form plus the residual: 8-bit pairs are right too, which differences of float32 losses are not."""
    model, x, y = net_and_data("vit")
    sens = profile(model, [x], (4, 8), estimator="exact", batch_size=7, rounding="nearest", verbose=False)
    with torch.no_grad():
        _, omega = plain_loop(model, sens, x, y, "kl")
    eight = np.ix_(np.arange(1, sens.num_candidates, 2), np.arange(1, sens.num_candidates, 2))
    # float32 logit changes of an 8-bit perturbation are right to 3e-4 (docs/numerics.md), the residual to a few percent.
    assert relative(sens.interaction[eight], omega[eight]) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"estimator": "logits"},
            "estimator must be one of diagonal, additive, gradient, corrected, exact, got 'logits'",
        ),
        (
            {"loss_func": lambda output, batch: output},
            r"loss_func must return a loss per sample \[2\] or their mean, got",
        ),
        (
            {"data_loader": [{"x": torch.zeros(2, 1, 8, 8), "y": torch.zeros(3)}]},
            "yield nests of tensors of one length",
        ),
        ({"data_loader": [["cat.png"]]}, "must yield tensors or"),
        ({"data_loader": [torch.zeros(2, 1, 8, 8), (torch.zeros(2, 1, 8, 8),)]}, "yield batches of one structure"),
    ],
)
def test_bad_losses_and_batches_are_named(change: dict[str, Any], message: str) -> None:
    model, x, _ = net_and_data("vit", 4)
    arguments = {
        "data_loader": [x],
        "estimator": "exact",
        "loss_func": lambda out, _: out.sum(-1),
        "bits": BITS,
        **change,
    }
    with pytest.raises(clado.CladoError, match=message):
        profile(model, verbose=False, **arguments)


class HostCopies(TorchDispatchMode):
    """Notes the operators that give the host what lies on a CUDA device: for each of them it would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if "cuda" in devices and isinstance(out, Tensor) and out.device.type == "cpu":
            self.found.append(str(func))
        return out


# Without "gradient": autograd on a CUDA tensor asks for the device itself. Weights without data have an address all the same,
# which tells them apart where differences of weights are kept; torch warns of it.
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("estimator", ["diagonal", "additive", "corrected", "exact", "user loss"])
def test_nothing_is_read_back_while_a_chunk_is_measured(estimator: str, precision: str) -> None:
    """On tensors without data, which need no GPU; reading a value of one of them raises."""
    model, shape = tiny_vit()
    x = torch.randn(2, *shape)
    captured = capture(model, x)
    variants = variants_of(model, Candidates.uniform(captured.layers, BITS), Quantizer(), x.device, x.dtype)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad(), HostCopies() as copies:

        def on_gpu(leaf: Any) -> Any:
            return fake.from_tensor(leaf).to("cuda") if isinstance(leaf, Tensor) else leaf

        moved = replace(captured, constants={node: on_gpu(value) for node, value in captured.constants.items()})
        carried = precision == "bfloat16"
        executor = CarriedExecutor(moved, precision) if carried else Executor(moved)
        executor._flops, executor._forward_flops = [1.0] * len(executor._flops), 1.0
        weights = [[Variant(on_gpu(variant.weight)) for variant in own] for own in variants]
        batch = on_gpu(x)
        loss: Any = Categorical()
        if estimator == "user loss":
            estimator, loss = "exact", UserLoss(lambda output, batch: output.square().sum(-1), batch, 2)
        copies.found.clear()
        sums = ESTIMATORS[estimator].run(executor, weights, batch, loss, lambda: None)
        assert copies.found == []
        assert sums.pair.device.type == sums.loss.device.type == "cuda"
        assert sums.cpu().pair.device.type == "cpu"
        assert len(copies.found) > 0
