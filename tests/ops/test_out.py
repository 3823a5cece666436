"""``out=`` of every op: the same bits straight into the caller's memory, and one line where it does not fit."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import clado_ext
from clado_ext import FormatScale
from tests.ops.devices import DEVICES, same_bits

BITS = (2, 4)
FORMATS = ("int4", "mxfp4", "nvfp4")
# A few numbers beside seconds of work; one number; autograd's own memory.
WITHOUT = {"iqp_prove", "iqp_search", "packed_columns", "tensor_scale", "straight_through"}


@cache
def calls(device: str = "cpu") -> dict[str, tuple[Any, ...]]:
    """Arguments of every op that has ``out=``: (op and what else a name says, arguments)."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    weight = drawn(4, 3, 11)
    scale, (ranges, zeros) = clado_ext.scale_search(weight, BITS, 7, 5), clado_ext.range_search(weight, BITS, 7, 5)
    codes, scales = clado_ext.quantize(weight, scale, BITS, 7), clado_ext.format_search(weight, FORMATS, 7, 1)
    factor = drawn(2, 33, 33).triu() + 8 * torch.eye(33, device=device)
    logits, delta = drawn(6, 10), drawn(3, 6, 10) / 8
    clean, change = drawn(2, 5), drawn(6, 5) / 8
    return {
        "batched_ce": (logits, delta),
        "carried_add_layer_norm": (clean, change, change),
        "carried_gelu": (clean, change),
        "carried_layer_norm": (clean, change),
        "carried_softmax": (clean, clean.softmax(-1), change),
        "compensate": (weight, factor, clado_ext.scale_search(weight, BITS, -1, 5), BITS),
        "compensate_format": (weight, factor, scales[1]),
        "dequantize": (codes, scale, 7),
        "dequantize half": (codes, scale, 7, torch.float16, torch.ones_like(scale, dtype=torch.int8)),
        "dequantize_formats": (clado_ext.quantize_formats(weight, scales), scales, torch.bfloat16),
        "fake_quant": (weight, scale, BITS, 7),
        "fake_quant strided": (weight.movedim(0, -1).contiguous().movedim(-1, 0), ranges, BITS, 7, zeros),
        "fake_quant_formats": (weight, scales),
        "format_search": (weight, FORMATS, 7, 5),
        "format_search asymmetric": (weight, FORMATS, 7, 5, False),
        "pack": (codes, 4),
        "pairwise_bce": (logits[:, 0], delta[:, :, 0], None, 2),
        "pairwise_ce": (logits, delta, None, 3, delta[:2]),
        "pairwise_mse": (delta,),
        "quantize": (weight, scale, BITS, 7),
        "quantize_formats": (weight, scales),
        "quantize_weight": (weight, BITS, 7, 5),
        "quantize_weight asymmetric": (weight, BITS, 7, 5, False),
        "range_search": (weight, BITS, 7, 5),
        "scale_errors": (weight, scale, -8, 7, 7),
        "scale_search": (weight, BITS, 7, 5),
        "unpack": (clado_ext.pack(codes, 4), 4, codes.shape[-1]),
    }


def op_of(name: str) -> Callable[..., Any]:
    op: Callable[..., Any] = getattr(clado_ext, name.split()[0])
    return op


def each(given: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Tensors in tuples and lists, changed."""
    if isinstance(given, (tuple, list)):
        parts = [each(part, change) for part in given]
        return type(given)(*parts) if hasattr(given, "_fields") else type(given)(parts)
    return change(given) if isinstance(given, Tensor) else given


def tensors(given: Any) -> list[Tensor]:
    found: list[Tensor] = []
    each(given, lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
    return found


def garbage(like: Tensor) -> Tensor:
    return torch.full_like(like, torch.nan if like.is_floating_point() else 77)


def misaligned(like: Tensor) -> Tensor:
    """Contiguous, but one element after where an allocator begins."""
    return garbage(like.new_empty(like.numel() + 1))[1:].view(like.shape)


def written(name: str, result: Any) -> Any:
    """What an op writes of its result: all but what a FormatScale takes from elsewhere."""
    return [to._replace(tensor_scale=None) for to in result] if name.startswith("format_search") else result


def test_every_op_has_it_or_is_named() -> None:
    public = {name for name in clado_ext.__all__ if inspect.isfunction(getattr(clado_ext, name))}
    assert {
        name for name in public if "out" in inspect.signature(getattr(clado_ext, name)).parameters
    } == public - WITHOUT
    assert {name.split()[0] for name in calls()} == public - WITHOUT


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(calls()))
def test_the_same_bits_in_the_callers_memory(name: str, device: str) -> None:
    op, given = op_of(name), calls(device)[name]
    wanted = written(name, op(*given))
    for memory in (garbage, misaligned):
        out = each(wanted, memory)
        versions = [x._version for x in tensors(out)]
        got = written(name, op(*given, out=out))
        assert all(x is y for x, y in zip(tensors(got), tensors(out), strict=True))
        assert same_bits(tuple(tensors(out)), tuple(tensors(wanted)))
        assert all(x._version > before for x, before in zip(tensors(out), versions, strict=True))
    with torch.inference_mode():
        out = each(wanted, garbage)
        op(*given, out=out)
        assert same_bits(tuple(tensors(out)), tuple(tensors(wanted)))


@pytest.mark.parametrize("name", list(calls()))
def test_what_does_not_fit_is_one_line(name: str) -> None:
    op, given = op_of(name), calls()[name]
    good = op(*given)
    count = len(tensors(written(name, good)))

    def changed(k: int, change: Callable[[Tensor], Tensor]) -> Any:
        """The k-th tensor of the result, another."""
        numbers = iter(range(100))
        return each(written(name, good), lambda x: change(x) if next(numbers) == k else x)

    wrong: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.new_empty((*x.shape, 2)),
        lambda x: x.to(torch.int16),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: x.to("meta"),
    ]
    for k in range(count):
        for change in wrong:
            with pytest.raises(
                ValueError, match=rf"^{name.split()[0]}: out(\[\d\])? must be contiguous .*, got [^\n]*$"
            ):
                op(*given, out=changed(k, change))
        if tensors(written(name, good))[k].is_floating_point() and not name.startswith("dequantize"):
            with pytest.raises(ValueError, match="out must not require gradients"):
                op(*given, out=changed(k, lambda x: x.clone().requires_grad_()))
    with pytest.raises(ValueError, match=rf"^{name.split()[0]}: out must be [^\n]*$"):
        op(*given, out="memory")


def test_all_kinds_in_one_graph() -> None:
    kinds = ("pack", "fake_quant", "format_search", "dequantize")  # a tensor, two, lists of them, by torch's own ops
    given = {name: calls()[name] for name in kinds}
    wanted = {name: written(name, op_of(name)(*given[name])) for name in given}
    outs = {name: each(wanted[name], garbage) for name in given}

    def filled(outs: dict[str, Any]) -> list[Tensor]:
        later = []
        for name, arguments in given.items():
            op_of(name)(*arguments, out=outs[name])
            later.append(tensors(outs[name])[0].double() + 1)
        return later

    later = torch.compile(filled, fullgraph=True, backend="aot_eager")(outs)
    for one, name in zip(later, given, strict=True):
        assert same_bits(tuple(tensors(outs[name])), tuple(tensors(wanted[name]))), name
        assert same_bits(one, tensors(wanted[name])[0].double() + 1), name


@pytest.mark.parametrize("name", ["fake_quant", "format_search", "pack"])
def test_ops_are_well_formed(name: str) -> None:
    weight, scale, codes = calls()["fake_quant"][0], calls()["fake_quant"][1], calls()["pack"][0]
    values, sqerr = clado_ext.fake_quant(weight, scale, BITS, 7)
    none = torch.empty(0, dtype=torch.int8)
    scales = [to.scale for to in clado_ext.format_search(weight, FORMATS[:2], 7, 5)]
    given: dict[str, tuple[Any, ...]] = {
        "fake_quant": (weight, scale, None, list(BITS), 7, values, sqerr),
        "format_search": (weight, list(FORMATS[:2]), 7, 5, True, None, None, scales, [none, none.clone()]),
        "pack": (codes, 4, clado_ext.pack(codes, 4)),
    }
    torch.library.opcheck(getattr(torch.ops.clado, f"{name}_into").default, given[name])


def test_codes_along_another_dimension_have_none() -> None:
    codes = calls()["pack"][0]
    with pytest.raises(ValueError, match="pack: out must be None where dim is not -1"):
        clado_ext.pack(codes, 4, 0, torch.empty(1))


def test_as_many_formats_as_places() -> None:
    weight = calls()["format_search"][0]
    with pytest.raises(ValueError, match="format_search: out must be 3 FormatScale, got 1"):
        clado_ext.format_search(weight, FORMATS, out=[FormatScale("int4", torch.empty(4, 1))])
