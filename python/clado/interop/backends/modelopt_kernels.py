"""NVIDIA ModelOpt: scales by squared error, and forwards that need not be run.

Calibration by squared error quantizes each weight 39 times, by five passes through memory each, where one read of it does. The
forwards of that calibration look at activations that nobody quantizes, and those of ``method="kl_div"`` repeat what the clean one
has computed up to the perturbed layer. What is left in the tool's hands is computed as it always was, so that scores and recipes
keep their bits. That holds for the fake quantization inside the scoring forwards, one in forty of such a call: our kernel's
differs in the last bit (a quotient for a product), and KL divergences at 8 bits are made of last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from .grid import losses, reachable
from .patches import Part, Used
from .prefixes import shared, units

LEAST = 2.0**-24  # magnitudes up to this count as 0 for ModelOpt


def _searching(stock: Callable[..., Any], used: Used) -> Callable[..., Any]:
    """``MseCalibrator.collect``: one read of the weight rates the whole grid."""

    @wraps(stock)
    def collect(self: Any, x: Tensor) -> Any:
        reason = _why_not(self, x)
        if reason:
            used.left[f"scale calibration ({reason})"] += 1
            return stock(self, x)
        used.ours["scale calibration"] += 1
        with torch.no_grad():
            _collect(self, x.detach())

    return collect


def _why_not(calibrator: Any, x: Tensor) -> str:
    from modelopt.torch.quantization.calib.mse import MseCalibrator
    from modelopt.torch.quantization.model_calib import _mse_quant_func
    from modelopt.torch.quantization.nn import TensorQuantizer
    from modelopt.torch.quantization.nn.modules.tensor_quantizer import StaticBlockScaleQuantizer

    call = calibrator._quant_func
    if type(calibrator) is not MseCalibrator or calibrator._error_func is not None:
        return "its own error"
    if not isinstance(call, partial) or call.func is not _mse_quant_func or set(call.keywords) != {"quantizer"}:
        return "its own quantizer"
    quantizer = call.keywords["quantizer"]
    known = type(quantizer) in (TensorQuantizer, StaticBlockScaleQuantizer) and not getattr(quantizer, "_lsq", False)
    plain = known and isinstance(quantizer.num_bits, int) and 2 <= quantizer.num_bits <= 16
    if not plain or quantizer.unsigned or quantizer.backend is not None or quantizer._use_constant_amax:
        return "no plain signed integers"
    if quantizer.pre_quant_scale is not None or quantizer.bias is not None or quantizer.rotate_is_enabled:
        return "scaled, shifted or rotated before"
    if calibrator._axis not in (None, 0, (0,), [0]) or not x.dim() or not x.numel():
        return "scales along another axis"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return "dtype"
    return "" if reachable(x) else "device"


def _collect(calibrator: Any, x: Tensor) -> None:
    from modelopt.torch.quantization.tensor_quant import _tensor_quant

    quantizer = calibrator._quant_func.keywords["quantizer"]
    bits, narrow, whole = quantizer.num_bits, bool(quantizer.narrow_range), calibrator._axis is None
    matrix = x.reshape(1 if whole else x.shape[0], -1)
    candidates = calibrator._generate_candidates(x.device)
    amax = torch.stack([calibrator._compute_candidate_amax(c).float().reshape(-1) for c in candidates])
    high = 2 ** (bits - 1) - 1

    def values(k: int, rows: Tensor, some: Tensor) -> Tensor:
        found: Tensor = _tensor_quant(some, amax[k, rows, None], bits, False, narrow)
        return found

    errors = losses(matrix, _scale(amax, high), -high if narrow else -high - 1, high, values)
    if calibrator._candidates is None:
        calibrator._candidates, calibrator._num_steps = candidates, len(candidates)
        calibrator._losses_sum = [None] * len(candidates)
    sums = calibrator._losses_sum
    for k, loss in enumerate(errors):
        own = loss[0] if whole else loss
        sums[k] = own.clone() if sums[k] is None else sums[k] + own


def _scale(amax: Tensor, high: int) -> Tensor:
    return torch.where(amax <= LEAST, 0.0, amax / high)


_IDLE: ContextVar[bool] = ContextVar("idle", default=False)


def _calibrating(stock: Callable[..., Any], used: Used) -> Callable[..., Any]:
    """``mse_calibrate``: says whether any quantizer that is on looks at activations (ModelOpt asks that for ``max`` only)."""

    @wraps(stock)
    def mse_calibrate(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        from modelopt.torch.quantization.model_calib import _needs_activation_forward_for_max_calib

        before = _IDLE.set(not _needs_activation_forward_for_max_calib(model))
        try:
            return stock(model, *args, **kwargs)
        finally:
            _IDLE.reset(before)

    return mse_calibrate


def _running(stock: Callable[..., Any], used: Used) -> Callable[..., Any]:
    """``_run_func`` of the searchers: batches are drawn, forwards that nobody looks at are left out."""

    @wraps(stock)
    def _run_func(self: Any, func: Any, num_iters: int = 1, desc: str = "") -> Any:
        if not _IDLE.get():
            return stock(self, func, num_iters, desc)

        def nothing(model: nn.Module, data: Any) -> None:
            used.ours["calibration forwards left out"] += 1

        return stock(self, nothing, num_iters, desc)

    return _run_func


def _scoring(stock: Callable[..., Any], used: Used) -> Callable[..., Any]:
    """``estimate_sensitivity_scores`` by KL divergence: forwards start where the perturbed layer stands."""

    @wraps(stock)
    def estimate_sensitivity_scores(self: Any) -> Any:
        from modelopt.torch.opt.utils import named_hparams
        from modelopt.torch.quantization.algorithms import QuantRecipe, QuantRecipeHparam

        recipes = [h for _, h in named_hparams(self.model, unique=True) if isinstance(h, QuantRecipeHparam)]
        recipes = [h for h in recipes if h.is_configurable]
        nothing = QuantRecipe(quant_cfg=None)

        def clean(some: list[Any]) -> bool:
            return all(h.active == nothing for h in some)

        layers = {module for h in recipes for module in h.quant_modules}
        parts = {}
        for unit in units(self.model, layers):
            held = set(unit.modules())
            parts[unit] = partial(clean, [h for h in recipes if held & set(h.quant_modules)])
        with shared(self.model, partial(clean, recipes), parts, used):
            return stock(self)

    return estimate_sensitivity_scores


MSE = "modelopt.torch.quantization.calib.mse"
CALIBRATION = "modelopt.torch.quantization.model_calib"
SEARCH = "modelopt.torch.quantization.algorithms"
QUANTIZER = "modelopt.torch.quantization.tensor_quant"
PARTS = (
    Part(MSE, "MseCalibrator.collect", ("self", "x"), _searching),
    Part(MSE, "MseCalibrator._generate_candidates", ("self", "device")),
    Part(MSE, "MseCalibrator._compute_candidate_amax", ("self", "candidates")),
    Part(CALIBRATION, "_mse_quant_func", ("x", "amax", "quantizer")),
    Part(CALIBRATION, "_needs_activation_forward_for_max_calib", ("model",)),
    Part(
        "modelopt.torch.quantization.mode",
        "MseCalibrateModeDescriptor._calib_func",
        (
            "model",
            "forward_loop",
            "distributed_sync",
            "step_size",
            "start_multiplier",
            "stop_multiplier",
            "fp8_scale_sweep",
            "shared_states",
        ),
        _calibrating,
    ),
    Part(QUANTIZER, "_tensor_quant", ("inputs", "amax", "num_bits", "unsigned", "narrow_range")),
    Part(SEARCH, "_AutoQuantizeBaseSearcher._run_func", ("self", "func", "num_iters", "desc"), _running),
    Part(SEARCH, "AutoQuantizeKLDivSearcher.estimate_sensitivity_scores", ("self",), _scoring),
)
