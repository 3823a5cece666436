"""What only a GPU can show: equality with the CPU on small awkward sizes, streams, graphs, other devices.

gpu-check runs this under compute-sanitizer too. Skipped without a GPU unless CLADO_REQUIRE_GPU=1, which fails then.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import clado_ext
from tests.ops.devices import DEVICES, same_bits

pytestmark = pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU and CUDA kernels")

BITS = (2, 5, 8)


def works(device: str) -> dict[str, tuple[Callable[[], Any], bool]]:
    """Small cases by name, the same numbers on every device; True where the bits must agree with the CPU."""
    torch.manual_seed(0)
    weight, codes = torch.randn(5, 1029).to(device), torch.randint(-4, 4, (3, 1027), dtype=torch.int8).to(device)
    logits, delta = 3 * torch.randn(3, 70).to(device), torch.randn(67, 3, 70).to(device)
    target = torch.tensor([0, 69, 5]).to(device)
    halves, long = weight.half(), torch.randn(2, 20_000).to(device)
    # Rows on whole 16 bytes: the wide paths.
    even, even_codes = torch.randn(5, 2080).to(device), torch.randint(-8, 8, (3, 1024), dtype=torch.int8).to(device)
    even_logits, even_delta = 3 * torch.randn(3, 72).to(device), 0.1 * torch.randn(67, 3, 72).to(device)
    importance = torch.rand(5, 1029).square().to(device)
    x, d = torch.randn(6, 40).to(device), 0.1 * torch.randn(18, 40).to(device)
    return {
        "importance": (lambda: clado_ext.range_search(halves, BITS, 33, 9, importance), True),
        "importance_of_long_rows": (lambda: clado_ext.scale_search(long, BITS, -1, 9, long[0].square()), True),
        "quantize_weight_even": (lambda: tuple(clado_ext.quantize_weight(even, BITS, 32, 9)[:3]), True),
        "half_even": (lambda: tuple(clado_ext.quantize_weight(even.half(), (2, 3, 5, 8), -1, 9)[:3]), True),
        "quantize_even": (lambda: clado_ext.quantize(even.bfloat16(), clado_ext.scale_search(even, BITS), BITS), True),
        "bitpack_even": (lambda: clado_ext.unpack(clado_ext.pack(even_codes, 4), 4, 1024), True),
        "batched_ce_even": (lambda: clado_ext.batched_ce(even_logits, even_delta), False),
        "pairwise_ce_even": (lambda: clado_ext.pairwise_ce(even_logits, even_delta), False),
        "pairwise_ce_double": (lambda: clado_ext.pairwise_ce(even_logits.double(), even_delta.double()), False),
        "carried_gelu": (lambda: clado_ext.carried_gelu(x, d), False),
        "carried_layer_norm": (lambda: clado_ext.carried_layer_norm(x, d.bfloat16()), False),
        "carried_add_layer_norm": (lambda: clado_ext.carried_add_layer_norm(x, d, d.bfloat16()), False),
        "carried_softmax": (lambda: clado_ext.carried_softmax(x, x.softmax(-1), d), False),
        "quantize_weight": (lambda: tuple(clado_ext.quantize_weight(weight, BITS, 33, 9)[:3]), True),
        "asymmetric": (lambda: tuple(clado_ext.quantize_weight(halves, BITS, -1, 9, symmetric=False)), True),
        "quantize": (lambda: clado_ext.quantize(weight, clado_ext.scale_search(weight, BITS), BITS), True),
        "scale_errors": (lambda: clado_ext.scale_errors(halves, weight[:, :9].T[:, :, None].abs(), -8, 7), True),
        "scale_errors_of_groups": (
            lambda: clado_ext.scale_errors(weight, importance[None, :, :32] + 0.1, -1, 1, 33),
            True,
        ),
        "bitpack": (lambda: clado_ext.unpack(clado_ext.pack(codes, 3), 3, 1027), True),
        "pack_dim_0": (lambda: clado_ext.pack(codes, 3, 0), True),
        "batched_ce": (lambda: clado_ext.batched_ce(logits, delta, target), False),
        "pairwise_ce": (lambda: clado_ext.pairwise_ce(logits, delta), False),
        "pairwise_ce_rows": (
            lambda: clado_ext.pairwise_ce(even_logits, even_delta, importance[0, :3], 3, even_delta[:9].contiguous()),
            False,
        ),
        "pairwise_bce": (lambda: clado_ext.pairwise_bce(logits.view(-1), delta.view(67, -1), None, 70), False),
        "pairwise_bce_even": (
            lambda: clado_ext.pairwise_bce(even_logits.view(-1), even_delta.view(67, -1), None, 72),
            False,
        ),
        "pairwise_mse": (lambda: clado_ext.pairwise_mse(delta, logits.abs()), False),
        "pairwise_mse_even": (lambda: clado_ext.pairwise_mse(even_delta, None, even_delta[:9].contiguous()), False),
    }


def cpu(x: Any) -> Any:
    return tuple(y.cpu() for y in x) if isinstance(x, tuple) else x.cpu()


@pytest.mark.parametrize("name", list(works("cpu")))
def test_as_on_the_cpu(name: str) -> None:
    (ours, exact), (wanted, _) = works("cuda")[name], works("cpu")[name]
    if exact:
        assert same_bits(cpu(ours()), wanted())
    else:  # float32 rows against double ones: the tolerances of the ops' own tests
        torch.testing.assert_close(cpu(ours()), wanted(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(works("cpu")))
def test_on_another_stream(name: str) -> None:
    run, _ = works("cuda")[name]
    wanted = cpu(run())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = run()
    stream.synchronize()
    assert same_bits(cpu(got), wanted)


@pytest.mark.parametrize("name", list(works("cpu")))
def test_in_a_graph(name: str) -> None:
    run, _ = works("cuda")[name]
    wanted = cpu(run())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(cpu(captured), wanted)


def test_on_a_device_that_is_not_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    weight = torch.randn(4, 50)
    with torch.cuda.device(0):
        got = clado_ext.quantize_weight(weight.to("cuda:1"), BITS)
    assert got.values.device == torch.device("cuda:1")
    assert same_bits(cpu(got.values), clado_ext.quantize_weight(weight, BITS).values)
