"""The rival: Brevitas, weights only, the same layers at one width, by the same photographs.

Needs ``pip install brevitas accelerate``. Its flow for vision models: batch norms merged, scales per channel by squared error;
then nothing, GPTQ, or learned rounding layer by layer (every weight up or down, by squared error of the layer's output and a
term that makes it decide); at last its correction of biases. It has no search; layers that are not named stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..harness import quiet

BATCH = 16
METHODS = ("nearest", "gptq", "learned")


def quantized(
    plain: nn.Module, images: Tensor, names: Collection[str], bits: int, method: str, steps: int = 0
) -> nn.Module:
    """Brevitas' net.

    Args:
        plain: a net that torch.fx can trace (``mct.padded``).
        images: the calibration set.
        names: modules that get weights of ``bits`` bits.
        method: one of ``METHODS``.
        steps: of learning in each layer, of a batch.
    """
    from brevitas.graph.calibrate import bias_correction_mode
    from brevitas.graph.gptq import gptq_mode
    from brevitas.graph.quantize import preprocess_for_quantize

    batches = images.split(BATCH)
    with quiet():
        net = preprocess_for_quantize(plain, relu6_to_relu=False, merge_bn=True).eval()
        net = _at_width(net, names, bits)
        with torch.no_grad():
            net(batches[0])  # a quantizer finds its scales at the first forward
        if method == "learned":
            _learn(net, images, steps)
        with torch.no_grad():
            if method == "gptq":
                with gptq_mode(net, act_order=True, use_quant_activations=False) as gptq:
                    for _ in range(gptq.num_layers):
                        for batch in batches:
                            gptq.model(batch)
                        gptq.update()
            with bias_correction_mode(net):
                for batch in batches:
                    net(batch)
    return net.eval()


def weights(net: nn.Module) -> list[Tensor]:
    """Of every quantized layer of its net, as its forward uses them."""
    return [module.quant_weight().value.detach() for module in net.modules() if hasattr(module, "quant_weight")]


def _at_width(net: nn.Module, names: Collection[str], bits: int) -> nn.Module:
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.nn import QuantConv2d, QuantLinear
    from brevitas.quant import Int8WeightPerChannelFloatMSE

    weight = Int8WeightPerChannelFloatMSE.let(bit_width=bits, narrow_range=False)
    settings: dict[str, Any] = {"weight_quant": weight, "return_quant_tensor": False}
    layers = {nn.Conv2d: (QuantConv2d, settings), nn.Linear: (QuantLinear, settings)}
    others = [name for name, module in net.named_modules() if type(module) in layers and name not in names]
    return layerwise_quantize(net, layers, name_blacklist=others)


def _learn(net: nn.Module, images: Tensor, steps: int) -> None:
    """Its defaults for vision models, with larger batches and steps of Adam, fewer of them, in full precision."""
    from brevitas_examples.common.learned_round import learned_round_args as arguments
    from brevitas_examples.common.learned_round.learned_round_method import LearnedRoundArgs
    from brevitas_examples.common.learned_round.learned_round_trainer import LearnedRoundTrainer, get_blocks
    from brevitas_examples.imagenet_classification.ptq import learned_round_utils as vision

    losses = [
        arguments.LossArgs("round_reg", {"max_count": steps}),
        arguments.LossArgs("mse", {"reduction": "none", "dim": 1}),
    ]
    training = arguments.TrainingArgs(
        [arguments.OptimizerArgs("learned_round", "Adam", lr=1e-2)],
        batch_size=BATCH,
        iters=steps,
        losses_args=losses,
        use_best_model=False,
        use_amp=False,
    )
    handler = arguments.HandlerSpec("learned_round", LearnedRoundArgs("hard_sigmoid"))
    LearnedRoundTrainer(arguments.TrainerConfig(training, [handler])).train(
        model=net,
        model_forward=vision.vision_forward,
        block_forward=vision.vision_block_forward,
        data_loader=DataLoader([(image, 0) for image in images], batch_size=BATCH),
        cache=vision.CacheVision(),
        get_blocks_fn=lambda model: get_blocks(model, vision.is_layer),
        keep_gpu=True,
    )
