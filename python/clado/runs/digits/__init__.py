"""A small, really trained vision transformer and its data: scikit-learn's 8x8 digits made harder.

The clean digits are learned to a loss near zero, where no quantization shows. Each image is therefore shifted by up to one pixel
and covered with noise, drawn once per split from a fixed seed, so the net errs as nets do on real images. ``train.py`` made the
weights in ``vit.safetensors``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...common import CladoError, require

# Digits of the data set by split: disjoint, in the data set's own order after one fixed shuffle.
SPLITS = {"train": slice(0, 685), "sensitivity": slice(685, 1197), "heldout": slice(1197, 1797)}
NOISE = 0.3
CLASSES = 10
WEIGHTS = Path(__file__).with_name("vit.safetensors")


def build_model() -> nn.Module:
    """The untrained net: timm's VisionTransformer, 8x8 images, 2x2 patches, width 64, depth 8, 4 heads; 0.4 M parameters."""
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError:
        raise CladoError("digits: timm must be installed, got no module timm (pip install timm)") from None

    return VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=CLASSES, embed_dim=64, depth=8, num_heads=4
    ).eval()


def load_model() -> nn.Module:
    """The trained net in eval mode, float32."""
    from safetensors.torch import load_file

    model = build_model()
    model.load_state_dict(load_file(WEIGHTS))
    return model


def load_data(split: str) -> tuple[Tensor, Tensor]:
    """Images float32 ``[N, 1, 8, 8]`` and labels int64 ``[N]`` of a split: 685 "train", 512 "sensitivity", 600 "heldout".

    Raises:
        CladoError: an unknown split, or scikit-learn is missing.
    """
    require(split in SPLITS, "digits", "split", f"be one of {', '.join(SPLITS)}", repr(split))
    images, labels = clean_digits(split)
    return spoil(images, np.random.default_rng(list(SPLITS).index(split))), labels


def clean_digits(split: str) -> tuple[Tensor, Tensor]:
    """The split's digits as the data set has them, scaled to [0, 1]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise CladoError(
            "digits: scikit-learn must be installed, got no module sklearn (pip install scikit-learn)"
        ) from None
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))[SPLITS[split]]
    images = torch.from_numpy(data.images[order] / 16.0).float().unsqueeze(1)
    return images, torch.from_numpy(data.target[order]).long()


def spoil(images: Tensor, generator: np.random.Generator) -> Tensor:
    """Shift every image by up to one pixel and add noise."""
    shifts = generator.integers(-1, 2, (len(images), 2))
    noise = torch.from_numpy(generator.standard_normal(images.shape)).float()
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    moved = [
        image[:, 1 + dy : 9 + dy, 1 + dx : 9 + dx] for image, (dy, dx) in zip(padded, shifts.tolist(), strict=True)
    ]
    return torch.stack(moved) + NOISE * noise
