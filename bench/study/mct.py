"""The rival: Sony's MCT, weights only, of the same widths on the same layers and photographs.

Needs ``pip install model-compression-toolkit``. Its search (mixed precision by the distance of inner outputs) and its rounding:
by squared error with its correction of biases, or by gradients (its GPTQ: soft rounding by squared errors of inner outputs,
unweighted); or layers held at given widths, without search. It has no layer without quantization: those that are not searched
here are held at eight bits, which cost next to nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clado.artifacts import Sensitivity

from ..harness import quiet

BATCH = 16


def quantized(
    model: nn.Module,
    images: Tensor,
    bits: Sequence[int],
    held: Mapping[str, int],
    target: float | None = None,
    epochs: int = 0,
) -> tuple[nn.Module, float | None]:
    """MCT's net and the bytes of its weights, where it was given a target.

    Args:
        images: the representative dataset.
        bits: that a layer chooses among, beside 8.
        held: {module: its bits, whatever the search says}.
        target: bytes of all weights; None: no search.
        epochs: of learning; 0: none.
    """
    import model_compression_toolkit as mct
    from model_compression_toolkit.core.common.network_editors.node_filters import NodeNameScopeFilter

    def batches() -> Iterator[list[Any]]:
        for batch in images.split(BATCH):
            yield [batch]

    model = padded_first(model, images[:1])
    widths = mct.core.BitWidthConfig()
    for module, width in held.items():
        (name,) = (n for n, m in model.named_modules() if n in (module, f"{module}.1") and hasattr(m, "weight"))
        widths.set_manual_weights_bit_width(NodeNameScopeFilter(name.replace(".", "_")), width, "weight")
    search = mct.core.MixedPrecisionQuantizationConfig() if target else None
    core = mct.core.CoreConfig(mixed_precision_config=search, bit_width_config=widths)
    utilization = mct.core.ResourceUtilization(target) if target else None
    settings: dict[str, Any] = {
        "core_config": core,
        "target_platform_capabilities": _platform(sorted({*bits, 8}, reverse=True)),
    }
    with quiet():
        if epochs:
            # Its weights by second derivatives were not done after eleven minutes here; without them it is its plain loss.
            plain = {"use_hessian_based_weights": False, "use_hessian_sample_attention": False}
            learning = mct.gptq.get_pytorch_gptq_config(epochs, gradual_activation_quantization=False, **plain)
            run: Callable[..., Any] = mct.gptq.pytorch_gradient_post_training_quantization
            net, info = run(model, batches, utilization, gptq_config=learning, **settings)
        else:
            net, info = mct.ptq.pytorch_post_training_quantization(model, batches, utilization, **settings)
    return net, info.final_resource_utilization.weights_memory if target else None


def weights(net: nn.Module) -> list[Tensor]:
    """Of every layer of its net, as its forward uses them."""
    wrapped = [module for module in net.modules() if hasattr(module, "get_quantized_weights")]
    return [weight for module in wrapped for weight in module.get_quantized_weights().values()]


def padded(model: nn.Module, sens: Sensitivity, example: Tensor) -> tuple[nn.Module, dict[str, str]]:
    """:func:`padded_first`, and {searched layer: its module there}."""
    plain = padded_first(model, example)
    modules = dict(plain.named_modules())
    return plain, {n: n if hasattr(modules[n], "weight") else f"{n}.1" for n in (layer.name for layer in sens.layers)}


def padded_first(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy whose convolutions with "same" padding, which torch.fx cannot trace, have it written out for that size of image."""
    from timm.layers import Conv2dSame
    from timm.layers.padding import get_same_padding

    model = copy.deepcopy(model)
    sizes: dict[str, Sequence[int]] = {}
    found = {name: module for name, module in model.named_modules() if isinstance(module, Conv2dSame)}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: sizes.__setitem__(name, args[0].shape[-2:]))
        for name, module in found.items()
    ]
    with torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()
    for name, conv in found.items():
        height, width = map(get_same_padding, sizes[name], conv.kernel_size, conv.stride, conv.dilation)
        around = (width // 2, width - width // 2, height // 2, height - height // 2)
        plain = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            0,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
        )
        plain.load_state_dict(conv.state_dict())
        model.set_submodule(name, nn.Sequential(nn.ZeroPad2d(around), plain))
    return model.eval()


def _platform(bits: Sequence[int]) -> Any:
    """Layers with weights at one of these widths, symmetric per channel; outputs as they are."""
    import model_compression_toolkit as mct
    from model_compression_toolkit.target_platform_capabilities.constants import KERNEL_ATTR, WEIGHTS_N_BITS
    from model_compression_toolkit.target_platform_capabilities.schema import mct_current_schema as schema

    known = mct.get_target_platform_capabilities()
    weighted = {"Conv", "DepthwiseConv2D", "ConvTranspose", "FullyConnected"}

    def options(given: Any, name: str) -> Any:
        if given is None:
            return None
        if name not in weighted:
            return given.clone_and_edit(enable_activation_quantization=False)
        base = given.base_config.clone_and_edit(enable_activation_quantization=False)
        widths = [base.clone_and_edit(attr_to_edit={KERNEL_ATTR: {WEIGHTS_N_BITS: width}}) for width in bits]
        return schema.QuantizationConfigOptions(quantization_configurations=tuple(widths), base_config=widths[0])

    def name_of(one: Any) -> str:
        return getattr(one.name, "value", one.name)

    sets = tuple(
        schema.OperatorsSet(name=name_of(one), qc_options=options(one.qc_options, name_of(one)))
        for one in known.operator_set
    )
    return schema.TargetPlatformCapabilities(
        default_qco=options(known.default_qco, ""),
        operator_set=sets,
        fusing_patterns=(),
        name="weights",
        add_metadata=False,
    )
