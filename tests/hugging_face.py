"""Small nets of transformers with random weights, in folders as ``save_pretrained`` writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from clado.runs.hugging_face import _opening
from tests.models import lively, with_statistics

SIZE, CLASSES = 32, 5
_SQUARE = {"height": SIZE, "width": SIZE}
_VIT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_VIT |= {"image_size": SIZE, "patch_size": 8}
_SWIN = {"image_size": SIZE, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}
_MOBILE = {"image_size": SIZE, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 16, 24, 24, 32, 40, 48]}
_HALVES = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 16, 32], "layer_scale_init_value": 0.5}
_RESIDUAL = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}


def _net(name: str, config: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**options))


def _processor(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**options)


_CROPPED = _processor("BitImageProcessor", size={"shortest_edge": 40}, crop_size=_SQUARE)
_RESIZED = _processor("ViTImageProcessor", size=_SQUARE)
_PADDED = _processor("ConvNextImageProcessor", size={"shortest_edge": SIZE}, crop_pct=0.875)
# {name: (model, image processor)} of image classifiers.
CLASSIFIERS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "vit": (_net("ViTForImageClassification", "ViTConfig", **_VIT, num_labels=CLASSES), _RESIZED),
    "deit": (
        _net("DeiTForImageClassificationWithTeacher", "DeiTConfig", **_VIT, num_labels=CLASSES),
        _processor("DeiTImageProcessor", size={"height": 40, "width": 40}, crop_size=_SQUARE),
    ),
    "swin": (_net("SwinForImageClassification", "SwinConfig", **_SWIN, num_labels=CLASSES), _RESIZED),
    "dinov2": (
        _net("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", **_VIT, num_labels=CLASSES),
        _CROPPED,
    ),
    "beit": (
        _net("BeitForImageClassification", "BeitConfig", **_VIT, use_relative_position_bias=True, num_labels=CLASSES),
        _processor("BeitImageProcessor", size=_SQUARE, crop_size=_SQUARE),
    ),
    "convnext": (
        _net("ConvNextForImageClassification", "ConvNextConfig", **_HALVES, image_size=SIZE, num_labels=CLASSES),
        _PADDED,
    ),
    "resnet": (_net("ResNetForImageClassification", "ResNetConfig", **_RESIDUAL, num_labels=CLASSES), _PADDED),
    "mobilevit": (
        _net("MobileViTForImageClassification", "MobileViTConfig", **_MOBILE, num_labels=CLASSES),
        _processor("MobileViTImageProcessor", size={"shortest_edge": 36}, crop_size=_SQUARE),
    ),
}
TOWER = (_net("SiglipVisionModel", "SiglipVisionConfig", **_VIT), _processor("SiglipImageProcessor", size=_SQUARE))


def save(folder: Path, name: str) -> Path:
    """Model and image processor in a folder of that name; "siglip" is a tower without a head."""
    model, processor = {**CLASSIFIERS, "siglip": TOWER}[name]
    torch.manual_seed(0)
    with _opening(name):  # without bars
        made = lively(model())
        for module in made.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.ones_(module.weight)
                module.momentum = None  # the mean of all batches
        with_statistics(made, (3, SIZE, SIZE))
        made.save_pretrained(folder / name)
        processor().save_pretrained(folder / name)
    return folder / name


def images(count: int = 3) -> list[Image.Image]:
    """Images of several shapes."""
    random = np.random.default_rng(0)
    shapes = [(40 + 7 * k, 60 - 5 * k, 3) for k in range(count)]
    return [Image.fromarray(random.integers(0, 256, shape, np.uint8)) for shape in shapes]


def reference(folder: Path) -> Any:
    """The model as transformers itself loads it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with _opening(str(folder)):
        return getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
