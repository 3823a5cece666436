"""Brevitas: scales of weights by squared error, over its grid.

Each of the 20 candidates runs the whole quantizer, ten passes through memory, where one read of the weight rates all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .grid import losses, reachable
from .patches import Part, Used


def _searching(stock: Callable[..., Any], used: Used) -> Callable[..., Any]:
    """``MSE.mse_search``: one read of the weight rates the whole grid."""

    @wraps(stock)
    def mse_search(self: Any, x: Tensor) -> Any:
        reason = _why_not(self, x)
        if reason:
            used.left[f"scale search ({reason})"] += 1
            return stock(self, x)
        used.ours["scale search"] += 1
        with torch.no_grad():
            return _search(self, x.detach())

    return mse_search


def _why_not(search: Any, x: Tensor) -> str:
    from brevitas.core.function_wrapper import Identity, RoundSte, TensorClamp, TensorClampSte
    from brevitas.core.function_wrapper.shape import OverOutputChannelView, OverTensorView
    from brevitas.core.quant.delay import _NoDelay
    from brevitas.core.quant.int import RescalingIntQuant
    from brevitas.core.quant.int_base import IntQuant
    from brevitas.core.scaling import ParameterFromStatsFromParameterScaling
    from brevitas.core.zero_point import ZeroZeroPoint
    from brevitas.proxy.parameter_quant import WeightQuantProxyFromInjector

    if search.search_method != "grid" or search.bipolar_search:
        return "another search"
    proxy: Any = getattr(search.proxy_forward, "__self__", None)
    if type(proxy) is not WeightQuantProxyFromInjector or proxy.export_mode or not proxy.is_quant_enabled:
        return "no weight"
    whole = proxy.tensor_quant
    if type(whole) is not RescalingIntQuant or type(whole.int_quant) is not IntQuant:
        return "no plain integers"
    inner = whole.int_quant
    rounds = type(inner.float_to_int_impl) is RoundSte and type(inner.tensor_clamp_impl) in (
        TensorClamp,
        TensorClampSte,
    )
    plain = rounds and type(inner.delay_wrapper.delay_impl) is _NoDelay and type(inner.input_view_impl) is Identity
    if not plain or type(whole.zero_point_impl) is not ZeroZeroPoint:
        return "no plain integers"
    scaling = whole.scaling_impl
    if type(scaling) is not ParameterFromStatsFromParameterScaling or len(proxy.tracked_parameter_list) != 1:
        return "shared or learned scales"
    view = search.input_view_shape_impl
    rows = type(view) is OverOutputChannelView and type(view.permute_impl) is Identity and search.stats_reduce_dim == 1
    if not rows and not (type(view) is OverTensorView and search.stats_reduce_dim is None):
        return "scales along another axis"
    if x.dtype != torch.float32 or not x.numel():
        return "dtype"
    return "" if reachable(x) else "device"


def _search(search: Any, x: Tensor) -> Tensor:
    whole = search.proxy_forward.__self__.tensor_quant
    init = search.mse_init_op(search.input_view_shape_impl(x)).detach()
    base = search.mse_base_op(init)
    left, right = torch.minimum(base, init), torch.maximum(base, init)
    steps = torch.linspace(1.0 / (search.num - 1), 1.0, search.num - 1)
    candidates = [left, *((left + (right - left) * step).detach() for step in steps)]
    bit_width = whole.msb_clamp_bit_width_impl()
    low, high = (int(f(bit_width)) for f in (whole.int_quant.min_int, whole.int_quant.max_int))
    matrix = x.reshape(1 if search.stats_reduce_dim is None else x.shape[0], -1)
    scales = _scales(search, whole, x, candidates, bit_width).expand(-1, len(matrix))

    def values(k: int, rows: Tensor, some: Tensor) -> Tensor:
        zero = whole.zero_point_impl(some, scales[0], bit_width)
        found: Tensor = whole.int_quant(scales[k, rows, None], zero, bit_width, some)
        return found

    errors = losses(matrix, scales, low, high, values)
    best, least = candidates[0], errors[0].view(init.shape)
    for candidate, row in zip(candidates[1:], errors[1:], strict=True):  # as the tool has it
        loss = row.view(init.shape)
        best = torch.where(loss < least, candidate, best)
        least = torch.min(loss, least)
    search.internal_candidate = best
    search.restore_offload_param()
    chosen: Tensor = best
    return chosen


def _scales(search: Any, whole: Any, x: Tensor, candidates: list[Tensor], bit_width: Tensor) -> Tensor:
    """The scales that the tool makes of its candidates, with its bounds and restrictions: ``[S, N]``, or ``[S, 1]``."""
    scales = []
    search.set_local_loss_mode(True)
    try:
        for candidate in candidates:
            search.internal_candidate = candidate
            scales.append(whole.scaling_impl(x, whole.int_scaling_impl(bit_width)).detach().reshape(-1))
    finally:
        search.set_local_loss_mode(False)
    return torch.stack(scales)


STATS = "brevitas.core.stats.stats_op"
PARTS = (
    Part(STATS, "MSE.mse_search", ("self", "x"), _searching),
    Part(STATS, "MSE.evaluate_loss", ("self", "x", "candidate")),
    Part(STATS, "mse_grid_search", ("xl", "xr", "loss_fn", "num_iter")),
    Part("brevitas.core.quant.int_base", "IntQuant.forward", ("self", "scale", "zero_point", "bit_width", "x")),
)
