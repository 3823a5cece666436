"""Images as batches, through the model's own transforms, in an order fixed by a seed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import Tensor, nn

from ..common import CladoError, require
from .models import ModelSpec
from .names import named


def build_data(
    data: str, model: nn.Module, spec: ModelSpec, batch_size: int, seed: int, skip: int = 0, workers: int = 0
) -> Iterable[Any]:
    """Batches of (inputs, targets), or (inputs,) where there are no labels.

    Args:
        data: where the images are:

            - a folder with one subfolder per class; with images outside of these nothing in it is labelled;
            - ``timm:NAME?root=FOLDER&split=SPLIT``: a dataset as timm names them (``torch/cifar10``, ``tfds/…``, ``hfds/…``);
            - ``hf:NAME?split=SPLIT&image=COLUMN&label=COLUMN``: a Hugging Face dataset, by name or by a folder it was saved to;
            - ``package.module:function``: what the function returns, a dataset of (image tensor, label) or a data loader;
            - ``digits:sensitivity`` and the like: the embedded data.
        model: whose transforms are used.
        spec: for the image size.
        batch_size: images per batch.
        seed: fixes which images come first.
        skip: leave out that many first images: those the sensitivities were measured on.
        workers: processes that decode images; they change nothing but the speed.

    Raises:
        CladoError: missing or empty data, an unknown scheme, or a package that is not installed.
    """
    scheme, _, rest = data.partition(":")
    if scheme == "digits":
        from .digits import load_data

        images, labels = load_data(rest)
        return list(zip(images[skip:].split(batch_size), labels[skip:].split(batch_size), strict=True))
    if Path(data).exists() or not rest:
        dataset: Any = _image_folder(data, _transform(model, spec))
    elif scheme in ("timm", "hf"):
        name, _, query = rest.partition("?")
        options = dict(parse_qsl(query))
        dataset = (_timm if scheme == "timm" else _hugging_face)(name, options, _transform(model, spec))
    else:
        dataset = named(
            "data", "data", data, "be a folder, timm:NAME, hf:NAME, digits:SPLIT or package.module:function"
        )()
        if not hasattr(dataset, "__getitem__"):
            require(
                skip == 0, "data", data, "be a dataset with a length for images that were not profiled", "a data loader"
            )
            batches: Iterable[Any] = dataset
            return batches
    require(len(dataset) > 0, "data", "data", "hold images", f"none in {data}")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()[skip:]
    require(len(order) > 0, "data", "folder", f"hold more than the {skip} images the matrix was made of", len(dataset))
    kept = torch.utils.data.Subset(dataset, order)
    return torch.utils.data.DataLoader(kept, batch_size=batch_size, num_workers=workers)


def _transform(model: nn.Module, spec: ModelSpec) -> Any:
    """The model's own evaluation transforms, image to tensor."""
    try:
        from timm.data import create_transform, resolve_data_config
    except ImportError:
        raise CladoError("data: timm must be installed for images, got no module timm (pip install timm)") from None
    arguments = {} if spec.img_size is None else {"img_size": spec.img_size}
    config = resolve_data_config(arguments, model=model, verbose=False)
    return create_transform(**config, is_training=False)


def _image_folder(data: str, transform: Any) -> Any:
    from timm.data import ImageDataset

    require(Path(data).is_dir(), "data", "folder", "be an image folder with one subfolder per class", data)
    dataset: Any = []
    with contextlib.suppress(RuntimeError):  # timm's word for a folder without images
        dataset = ImageDataset(data)
    require(len(dataset) > 0, "data", "folder", "hold images in subfolders, one per class", f"no image in {data}")
    # With images outside of the subfolders timm counts the folder itself as a class.
    return FileImages(dataset.reader, transform, labelled="" not in dataset.reader.class_to_idx)


def _timm(name: str, options: dict[str, str], transform: Any) -> Any:
    from timm.data import ImageDataset, create_dataset

    arguments: dict[str, Any] = {"split": "validation", **options}
    try:
        dataset = create_dataset(name, arguments.pop("root", None), transform=transform, **arguments)
    except Exception as error:  # each reader of timm has its own
        raise CladoError(f"data: timm must be able to open {name}, got {_reason(error)}") from None
    require(hasattr(dataset, "__getitem__"), "data", name, "be a dataset with a length and an order", "a stream")
    return FileImages(dataset.reader, transform) if isinstance(dataset, ImageDataset) else dataset


def _hugging_face(name: str, options: dict[str, str], transform: Any) -> Any:
    try:
        import datasets
    except ImportError:
        message = "data: the package datasets must be installed for hf: data, got no module datasets"
        raise CladoError(f"{message} (pip install datasets)") from None
    split, image, label = (options.pop(k, k) for k in ("split", "image", "label"))
    split = "validation" if split == "split" else split
    try:
        if Path(name).exists():
            loaded = datasets.load_from_disk(name)
            found = loaded[split] if isinstance(loaded, dict) else loaded
        else:
            found = datasets.load_dataset(name, split=split, **options)
        columns = found.column_names
    except Exception as error:  # the hub, the network, and every builder have their own
        raise CladoError(f"data: datasets must be able to open {name}, got {_reason(error)}") from None
    missing = [column for column in (image, label) if column not in columns]
    require(not missing, "data", name, f"have the columns {image} and {label} (?image=…&label=…)", ", ".join(columns))
    return HuggingFaceImages(found, image, label, transform)


class FileImages(torch.utils.data.Dataset[tuple[Any, ...]]):
    """Files of a timm reader as (image tensor, label). What cannot be read raises: timm's own dataset takes the next image.

    Without labels as (image tensor,).
    """

    def __init__(self, reader: Any, transform: Any, labelled: bool = True) -> None:
        self.reader, self.transform, self.labelled = reader, transform, labelled

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        from PIL import Image

        file, label = self.reader[index]
        with file, Image.open(file) as image:  # the reader opens the file and leaves it to us
            inputs = self.transform(image.convert("RGB"))
        return (inputs, -1 if label is None else int(label)) if self.labelled else (inputs,)


class HuggingFaceImages(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Rows of a Hugging Face dataset as (image tensor, label)."""

    def __init__(self, rows: Any, image: str, label: str, transform: Any) -> None:
        self.rows, self.image, self.label, self.transform = rows, image, label, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        return self.transform(row[self.image].convert("RGB")), int(row[self.label])


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
