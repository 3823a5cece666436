"""The nets the tests run on: seeded, small, in eval mode, with realistic running statistics."""

from __future__ import annotations

import random
from collections.abc import Sequence

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from clado import Layer, Plan, Quantizer
from clado.common import weights_digest

Shape = tuple[int, int, int]


def tiny_vit() -> tuple[nn.Module, Shape]:
    """A ViT of two blocks, ten classes; and its input shape."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=2)
    return lively(model).eval(), (1, 8, 8)


class SmallCNN(nn.Module):
    """Batch norm, residuals, in-place activations, a depthwise convolution and one weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.act = nn.ReLU(inplace=True)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        for conv, norm in zip(self.body, self.norms, strict=True):
            x = self.act(norm(conv(x))) + x
        x = self.act(self.depthwise(x)).mean((2, 3))
        return self.head(self.act(self.second(self.act(self.first(x)))))


def small_cnn() -> tuple[nn.Module, Shape]:
    """:class:`SmallCNN` after a few batches in train mode."""
    torch.manual_seed(0)
    return with_statistics(lively(SmallCNN()), (1, 8, 8)), (1, 8, 8)


def timm_model(name: str) -> tuple[nn.Module, Shape]:
    """A timm model with random weights at a small image size, ten classes."""
    torch.manual_seed(0)
    size = 64
    sized = {"img_size": size} if any(part in name for part in ("vit", "deit", "swin")) else {}
    model = timm.create_model(name, pretrained=False, num_classes=10, **sized)
    lively(model)
    return with_statistics(model, (3, size, size)), (3, size, size)


def lively(model: nn.Module) -> nn.Module:
    """Weights large enough that every branch changes the logits, as in a trained net: initial values hide them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
            elif parameter.abs().max() < 1e-2:
                parameter.normal_(0.0, 0.3)
    return model


def with_statistics(model: nn.Module, shape: Shape) -> nn.Module:
    """Running statistics as after training, then eval mode."""
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        model.train()
        with torch.no_grad():
            for _ in range(4):
                model(torch.randn(8, *shape))
    return model.eval()


def random_plan(model: nn.Module, quantizer: Quantizer, bits: Sequence[int] = range(2, 9), seed: int = 0) -> Plan:
    """Every Linear and Conv2d weight at a random width; weights that share storage are one layer."""
    choose = random.Random(seed)
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            names.setdefault(id(module.weight), []).append(f"{path}.weight")
    layers = []
    for shared in names.values():
        shape = tuple(model.get_parameter(shared[0]).shape)
        kind = "linear" if len(shape) == 2 else "conv2d"
        layers.append(Layer(shared[0].removesuffix(".weight"), kind, shape, 0, tuple(shared)))
    chosen = {layer.name: choose.choice(list(bits)) for layer in layers}
    fingerprint = {"weights": weights_digest(model)}
    return Plan(tuple(layers), chosen, "given", quantizer=quantizer, fingerprint=fingerprint)
