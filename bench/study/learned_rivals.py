"""``python -m bench.study.learned_rivals PHOTOGRAPHS mct``: learned rounding of others on EfficientNet-Lite0, at one width.

Weights alone, per channel, symmetric; the first convolution and the classifier stay float. Prints the KL to the float net and
the agreement of the top class on the first 400 held-out photographs, and the seconds. Needs `model-compression-toolkit` for
``mct``, `brevitas` and `accelerate` for ``brevitas``; they do not install beside each other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .photographs import load_photographs
from .real_nets import load_net

FLOAT = ("conv_stem", "classifier")
BATCH = 16


def plain(net: nn.Module, images: Tensor) -> nn.Module:
    """The same function of images of this size in torch's own layers: batch norms folded, paddings written out."""
    calls: list[tuple[str, nn.Module, torch.Size]] = []
    named = [(name, module) for name, module in net.named_modules() if not list(module.children()) or "bn" in name]
    hooks = [
        module.register_forward_pre_hook(
            lambda _, x, name=name, module=module: calls.append((name, module, x[0].shape))
        )
        for name, module in named
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
    ]
    with torch.inference_mode():
        net(images[:1])
    for hook in hooks:
        hook.remove()
    for (name, conv, shape), (norm_name, norm, _) in zip(calls[::2], calls[1::2], strict=True):
        assert isinstance(conv, nn.Conv2d), name
        assert isinstance(norm, nn.BatchNorm2d), norm_name
        folded = nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
        own = nn.Conv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, groups=conv.groups
        )  # type: ignore[arg-type]
        own.load_state_dict(folded.state_dict())
        net.set_submodule(name, padded(own, shape) if type(conv) is not nn.Conv2d else own)
        net.set_submodule(norm_name, norm.act)
    return net.eval()


def padded(conv: nn.Conv2d, shape: torch.Size) -> nn.Module:
    """The convolution after the padding that TensorFlow calls "same"."""
    total = [
        max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip(shape[2:], conv.stride, conv.kernel_size, strict=True)
    ]
    (top, left), conv.padding = (t // 2 for t in total), (0, 0)
    return nn.Sequential(nn.ZeroPad2d((left, total[1] - left, top, total[0] - top)), conv)


def mct(net: nn.Module, images: Tensor, bits: int, steps: int) -> nn.Module:
    """Sony's Model Compression Toolkit: gradient-based rounding of the whole net, its own settings."""
    import model_compression_toolkit as toolkit
    from model_compression_toolkit.core.common.network_editors import actions, node_filters
    from model_compression_toolkit.target_platform_capabilities.schema import mct_current_schema as schema
    from model_compression_toolkit.target_platform_capabilities.tpc_models.qnnpack_tpc.v1_0 import tpc

    base, _, rest = tpc.get_op_quantization_configs()
    kernel = base.attr_weights_configs_mapping["kernel_attr"].clone_and_edit(
        weights_n_bits=bits, weights_per_channel_threshold=True
    )
    mapping = {**base.attr_weights_configs_mapping, "kernel_attr": kernel}
    base = base.clone_and_edit(enable_activation_quantization=False).clone_and_edit(
        attr_weights_configs_mapping=mapping
    )
    one = schema.QuantizationConfigOptions(quantization_configurations=(base,))
    names = ("CONV", "DEPTHWISE_CONV", "FULLY_CONNECTED")
    sets = [schema.OperatorsSet(name=getattr(schema.OperatorSetNames, n), qc_options=one) for n in names]
    rest = schema.QuantizationConfigOptions(
        quantization_configurations=(rest.clone_and_edit(enable_activation_quantization=False),)
    )
    platform = schema.TargetPlatformCapabilities(default_qco=rest, operator_set=tuple(sets), add_metadata=False)
    as_float = actions.ChangeCandidatesWeightsQuantConfigAttr(attr_name="weight", enable_weights_quantization=False)
    types = node_filters.NodeTypeFilter(nn.Conv2d) | node_filters.NodeTypeFilter(nn.Linear)
    edits = [
        toolkit.core.network_editor.EditRule(filter=types & node_filters.NodeNameScopeFilter(name), action=as_float)
        for name in FLOAT
    ]
    core = toolkit.core.CoreConfig(debug_config=toolkit.core.DebugConfig(network_editor=edits))

    def batches() -> Iterator[list[Tensor]]:
        for batch in images.split(BATCH):
            yield [batch]

    epochs = max(1, steps * BATCH // len(images))
    config = (
        toolkit.gptq.get_pytorch_gptq_config(  # its weights of samples and layers cost a hundred passes of all images
            epochs,
            use_hessian_based_weights=False,
            use_hessian_sample_attention=False,
            gradual_activation_quantization=False,
        )
    )
    quantize = toolkit.gptq.pytorch_gradient_post_training_quantization
    return quantize(net, batches, core_config=core, gptq_config=config, target_platform_capabilities=platform)[0]


def brevitas(net: nn.Module, images: Tensor, bits: int, steps: int) -> nn.Module:
    """Brevitas' learned rounding, layer after layer on inputs of the layers rounded already, as in its example."""
    from brevitas.graph.calibrate import bias_correction_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.nn import QuantConv2d
    from brevitas.quant import Int8WeightPerChannelFloatMSE
    from brevitas_examples.common.learned_round import learned_round_args as settings
    from brevitas_examples.common.learned_round.learned_round_method import LearnedRoundArgs
    from brevitas_examples.common.learned_round.learned_round_trainer import LearnedRoundTrainer, get_blocks
    from brevitas_examples.imagenet_classification.ptq import learned_round_utils as vision

    layer = {"weight_quant": Int8WeightPerChannelFloatMSE, "weight_bit_width": bits, "return_quant_tensor": False}
    kept = [name for name, _ in net.named_modules() if name.startswith(FLOAT)]
    net = layerwise_quantize(net, {nn.Conv2d: (QuantConv2d, layer)}, kept)
    batches = [(part, None) for part in images.split(BATCH)]
    training = settings.TrainingArgs(
        optimizers_args=[settings.OptimizerArgs("learned_round", "Adam", 1e-3, {})],
        batch_size=1,
        iters=steps,
        losses_args=[
            settings.LossArgs("round_reg", {"max_count": steps}),
            settings.LossArgs("mse", {"reduction": "none", "dim": 1}),
        ],
        use_best_model=False,
        use_amp=False,
    )
    handler = settings.HandlerSpec("learned_round", LearnedRoundArgs("hard_sigmoid", {}))
    trainer = LearnedRoundTrainer(settings.TrainerConfig(training, [handler]))
    layers = partial(get_blocks, block_check_fn=vision.is_layer)
    cache = vision.CacheVision()
    trainer.train(net, vision.vision_forward, vision.vision_block_forward, batches, cache, layers)
    with torch.no_grad(), bias_correction_mode(net):
        for part, _ in batches:
            net(part)
    return net


RIVALS: dict[str, Callable[[nn.Module, Tensor, int, int], nn.Module]] = {"mct": mct, "brevitas": brevitas}


def score(clean: Tensor, net: nn.Module, images: Tensor) -> tuple[float, float, float]:
    """KL from the float net's outputs, its standard error, and the agreement of the top class."""
    p, out = clean.log_softmax(1), outputs(net, images)
    kl = (p.exp() * (p - out.log_softmax(1))).sum(1)
    return kl.mean().item(), (kl.std() / len(kl) ** 0.5).item(), (out.argmax(1) == p.argmax(1)).double().mean().item()


def outputs(net: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([net(part).double() for part in images.split(50)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, help="folder written by bench.study.photographs")
    parser.add_argument("rival", choices=list(RIVALS))
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--steps", type=int, default=160, help="of the rival, over the net or per layer")
    options = parser.parse_args()
    torch.manual_seed(0)
    net, mean, std = load_net("lite0")
    held = load_photographs(options.photographs, "heldout", mean, std)[:400]
    images = load_photographs(options.photographs, "sensitivity", mean, std)[: options.images]
    clean = outputs(net, held)
    net = plain(net, images)
    print("folded: KL {:.6f}".format(*score(clean, net, held)))
    start = time.perf_counter(), time.process_time()
    net = RIVALS[options.rival](net, images, options.bits, options.steps)
    wall, process = time.perf_counter() - start[0], time.process_time() - start[1]
    kl, error, agreement = score(clean, net.eval(), held)
    print(
        f"{options.rival}: KL {kl:.4f} ± {error:.4f}, agreement {agreement:.3f}, {wall:.0f} s, {process:.0f} s of processor"
    )


if __name__ == "__main__":
    main()
