"""Three nets of different kind, trained here in minutes on real digits made hard enough that quantization shows.

The 8×8 digits of scikit-learn are doubled to 16×16, rotated, scaled, shifted and covered with noise. A split holds digits of its
own; every digit is drawn several times with other distortions, so errors are clustered by digit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample, interpolate

from clado.common import atomic_file
from clado.runs.digits.train import fit

SIDE, CLASSES, NOISE, BATCH = 16, 10, 0.4, 64
# split: (its digits after one fixed shuffle, how often each is drawn)
SPLITS = {
    "train": (slice(0, 800), 1),
    "sensitivity a": (slice(800, 1000), 3),
    "sensitivity b": (slice(1000, 1200), 3),
    "choice": (slice(1200, 1347), 2),
    "heldout": (slice(1347, 1797), 2),
}


@dataclass(frozen=True)
class Digits:
    """Images ``[N, 1, 16, 16]``, labels ``[N]`` and the digit ``[N]`` that each image was drawn from."""

    images: Tensor
    labels: Tensor
    digit: Tensor


@functools.cache
def clean_digits(split: str) -> tuple[Tensor, Tensor]:
    """The split's digits, doubled, in [0, 1]; and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))[SPLITS[split][0]]
    images = torch.from_numpy(data.images[order] / 16.0).float().unsqueeze(1)
    return interpolate(images, size=SIDE, mode="bilinear"), torch.from_numpy(data.target[order]).long()


def load_split(split: str) -> Digits:
    """The same samples at every call."""
    images, labels = clean_digits(split)
    generator = torch.Generator().manual_seed(list(SPLITS).index(split))
    draws = SPLITS[split][1]
    hard = torch.cat([distort(images, generator) for _ in range(draws)])
    return Digits(hard, labels.repeat(draws), torch.arange(len(labels)).repeat(draws))


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turned by up to 15°, scaled by up to 15 %, shifted by up to 1.5 pixels, then noise."""
    count = len(images)
    turn, scale, dx, dy = (torch.rand(4, count, generator=generator) * 2 - 1).unbind()
    angle, size = turn * np.pi / 12, 1 + 0.15 * scale
    cos, sin, shift = angle.cos() * size, angle.sin() * size, 1.5 * 2 / SIDE
    theta = torch.stack([cos, -sin, dx * shift, sin, cos, dy * shift], 1).view(count, 2, 3)
    grid = nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    moved = grid_sample(images, grid, align_corners=False)
    return moved + NOISE * torch.randn(moved.shape, generator=generator)


def vit() -> nn.Module:
    """A ViT deeper than the quickstart's: 10 blocks, width 48, 16 patches."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=SIDE, patch_size=4, in_chans=1, num_classes=CLASSES, embed_dim=48, depth=10, num_heads=3
    )


def resnet() -> nn.Module:
    """A ResNet with batch norm and a deep stem; 4 stages of 2 basic blocks."""
    from timm.models.resnet import BasicBlock, ResNet

    stem = {"stem_type": "deep", "stem_width": 8}  # 16 channels at half the resolution
    model = ResNet(BasicBlock, (2, 2, 2, 2), num_classes=CLASSES, in_chans=1, channels=(16, 24, 32, 48), **stem)
    model.maxpool = nn.Identity()
    return model


def mobilenet() -> nn.Module:
    """A MobileNetV2: inverted residuals, depthwise convolutions, batch norm."""
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    stages = [["ds_r1_k3_s1_c16"], ["ir_r2_k3_s1_e4_c16"], ["ir_r3_k3_s2_e4_c24"], ["ir_r3_k3_s2_e4_c32"]]
    return EfficientNet(
        decode_arch_def(stages), num_classes=CLASSES, in_chans=1, stem_size=16, num_features=96, fix_stem=True
    )


NETS: dict[str, tuple[Callable[[], nn.Module], int, float]] = {  # net: (function, epochs, learning rate)
    "vit": (vit, 150, 1.5e-3),
    "resnet": (resnet, 40, 3e-3),
    "mobilenet": (mobilenet, 50, 3e-3),
}


def train(name: str, seed: int) -> nn.Module:
    """The net after its epochs, every one with fresh distortions."""
    build, epochs, rate = NETS[name]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    model = build()
    images, labels = clean_digits("train")

    def draw() -> tuple[Tensor, Tensor]:
        hard = distort(images, generator)
        return torch.randperm(len(images), generator=generator), hard

    return fit(model, labels, draw, epochs, BATCH, rate, f"train {name} {seed}")


def trained(name: str, seed: int, folder: Path) -> nn.Module:
    """The net from ``folder``, trained first where it is not there."""
    from safetensors.torch import load_file, save_file

    path = folder / f"{name}-{seed}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        model = train(name, seed)
        with atomic_file(path) as temporary:
            save_file(model.state_dict(), temporary)
    model = NETS[name][0]().eval()
    model.load_state_dict(load_file(path))
    return model
