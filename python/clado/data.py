"""Image folders as batches, through the model's own transforms, in an order fixed by a seed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import CladoError, require
from .models import ModelSpec


def build_data(
    data: str, model: nn.Module, spec: ModelSpec, batch_size: int, seed: int, skip: int = 0
) -> Iterable[Any]:
    """Batches of (inputs, targets).

    Args:
        data: an image folder (one subfolder per class), or ``digits:sensitivity`` and the like for the embedded data.
        model: whose transforms are used.
        spec: for the image size.
        batch_size: images per batch.
        seed: fixes which images come first.
        skip: leave out that many first images: those the sensitivities were measured on.

    Raises:
        CladoError: a missing or empty folder.
    """
    if data.startswith("digits:"):
        from .digits import load_data

        images, labels = load_data(data.partition(":")[2])
        return list(zip(images[skip:].split(batch_size), labels[skip:].split(batch_size), strict=True))
    dataset = _image_folder(data, model, spec)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()[skip:]
    require(len(order) > 0, "data", "folder", f"hold more than the {skip} images the matrix was made of", len(dataset))
    return torch.utils.data.DataLoader(torch.utils.data.Subset(dataset, order), batch_size=batch_size)


def _image_folder(data: str, model: nn.Module, spec: ModelSpec) -> Any:
    require(Path(data).is_dir(), "data", "folder", "be an image folder with one subfolder per class", data)
    try:
        from timm.data import ImageDataset, create_transform, resolve_data_config
    except ImportError:
        raise CladoError(
            "data: timm must be installed for image folders, got no module timm (pip install timm)"
        ) from None
    arguments = {} if spec.img_size is None else {"img_size": spec.img_size}
    config = resolve_data_config(arguments, model=model, verbose=False)
    dataset: Any = []
    with contextlib.suppress(RuntimeError):  # timm's word for a folder without images
        dataset = ImageDataset(data, transform=create_transform(**config, is_training=False))
    require(len(dataset) > 0, "data", "folder", "hold images in subfolders, one per class", f"no image in {data}")
    return dataset
