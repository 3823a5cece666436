"""Images as batches, through the model's own transforms, in an order fixed by a seed."""

from __future__ import annotations

import contextlib
import mimetypes
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from torch import Tensor, nn

from ..common import CladoError, is_out_of_memory, require
from .hugging_face import is_hugging_face, load_processor
from .models import ModelSpec
from .names import named

# Files of a folder that are read; other pictures in it are refused by name.
READ = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
OTHER_PICTURES = (
    ".avif",
    ".heic",
    ".heif",
    ".jxl",
    ".jp2",
    ".psd",
    ".dng",
    ".exr",
    ".hdr",
)  # and what mimetypes calls so


def build_data(
    data: str, model: nn.Module, spec: ModelSpec, batch_size: int, seed: int, skip: int = 0, workers: int = 0
) -> Iterable[Any]:
    """Batches of (inputs, targets), or (inputs,) where there are no labels.

    Args:
        data: where the images are:

            - a folder with one subfolder per class; with images outside of these nothing in it is labelled; PNG, JPEG, GIF
              (the first frame), WebP, BMP, TIFF and PNM, of 8 or 16 bits;
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
        CladoError: missing or empty data, pictures of a kind that is not read, an unknown scheme, or a package that is not
            installed. While batches are read: an image that is damaged or of another depth, by its name.
    """
    scheme, _, rest = data.partition(":")
    if scheme == "digits":
        from .digits import load_data

        images, labels = load_data(rest)
        return list(zip(images[skip:].split(batch_size), labels[skip:].split(batch_size), strict=True))
    if os.path.exists(data) or not rest:
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
    if is_hugging_face(spec.model):
        return load_processor(spec.model, spec.img_size)
    try:
        from timm.data import create_transform, resolve_data_config
    except ImportError:
        raise CladoError("data: timm must be installed for images, got no module timm (pip install timm)") from None
    arguments = {} if spec.img_size is None else {"img_size": spec.img_size}
    config = resolve_data_config(arguments, model=model, verbose=False)
    return create_transform(**config, is_training=False)


def _image_folder(data: str, transform: Any) -> Any:
    from timm.data import ImageDataset

    require(os.path.isdir(data), "data", "folder", "be an image folder with one subfolder per class", data)
    dataset: Any = []
    with contextlib.suppress(RuntimeError):  # timm's word for a folder without images
        dataset = ImageDataset(data, input_key=";".join(READ))
    _check_all_taken(data, [path for path, _ in dataset.reader.samples] if len(dataset) > 0 else [])
    require(len(dataset) > 0, "data", "folder", "hold images in subfolders, one per class", f"no image in {data}")
    # With images outside of the subfolders timm counts the folder itself as a class.
    return FileImages(dataset.reader, transform, labelled="" not in dataset.reader.class_to_idx)


def _check_all_taken(folder: str, taken: Sequence[str]) -> None:
    """Raise where a folder holds pictures that a dataset leaves out."""
    known, left = set(taken), list[str]()
    for place, _, files in os.walk(folder, followlinks=True):
        paths = (os.path.join(place, file) for file in files if not file.startswith("."))
        left += [path for path in paths if _is_picture(path) and path not in known]
    if left:  # under other names, perhaps
        known = {os.path.realpath(path) for path in taken}
        left = sorted(path for path in left if os.path.realpath(path) not in known)
    must = f"hold images that are read ({', '.join(kind[1:] for kind in READ)}) and no others"
    require(not left, "data", "folder", must, f"{len(left)} others, such as {left[0] if left else ''}")


def _is_picture(path: str) -> bool:
    kind = os.path.splitext(path)[1].lower()
    return kind in (*READ, *OTHER_PICTURES) or (mimetypes.guess_type(path)[0] or "").startswith("image/")


def _timm(name: str, options: dict[str, str], transform: Any) -> Any:
    from timm.data import ImageDataset, create_dataset
    from timm.data.readers.reader_image_folder import ReaderImageFolder

    arguments: dict[str, Any] = {"split": "validation", **options}
    root = arguments.pop("root", None)
    if "/" not in name and root is not None and os.path.isdir(root):
        arguments.setdefault("input_key", ";".join(READ))
    try:
        dataset = create_dataset(name, root, transform=transform, **arguments)
    except Exception as error:  # each reader of timm has its own
        raise CladoError(f"data: timm must be able to open {name}, got {_reason(error)}") from None
    require(hasattr(dataset, "__getitem__"), "data", name, "be a dataset with a length and an order", "a stream")
    if isinstance(dataset, ImageDataset):
        files = dataset.reader
    elif type(dataset).__name__ == "ImageFolder":  # torchvision's
        files = _Files(dataset.root, dataset.samples)
    else:
        return dataset
    if isinstance(files, (_Files, ReaderImageFolder)):
        _check_all_taken(str(files.root), [path for path, _ in files.samples])
    return FileImages(files, transform)


def _hugging_face(name: str, options: dict[str, str], transform: Any) -> Any:
    try:
        import datasets
    except ImportError:
        message = "data: the package datasets must be installed for hf: data, got no module datasets"
        raise CladoError(f"{message} (pip install datasets)") from None
    split, image, label = (options.pop(k, k) for k in ("split", "image", "label"))
    split = "validation" if split == "split" else split
    try:
        if os.path.exists(name):
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


class _Files:
    """Paths with labels, as timm's readers give them."""

    def __init__(self, root: str, samples: Sequence[tuple[str, int]]) -> None:
        self.root, self.samples = root, samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return open(path, "rb"), label

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.samples[index][0]


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

        with _naming(lambda: self.reader.filename(index, absolute=True)):
            file, label = self.reader[index]
            with file, Image.open(file) as image:  # the reader opens the file and leaves it to us
                inputs = self.transform(_rgb(image))
        return (inputs, -1 if label is None else int(label)) if self.labelled else (inputs,)


class HuggingFaceImages(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Rows of a Hugging Face dataset as (image tensor, label)."""

    def __init__(self, rows: Any, image: str, label: str, transform: Any) -> None:
        self.rows, self.image, self.label, self.transform = rows, image, label, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with _naming(lambda: f"row {index}"):  # datasets decodes while it reads
            row = self.rows[index]
            return self.transform(_rgb(row[self.image])), int(row[self.label])


class _Unread(CladoError):
    """An image that cannot be read, in one line: where another process read it torch makes the error anew from a whole story."""

    def __init__(self, text: str) -> None:
        super().__init__(text.strip().splitlines()[-1].rpartition("_Unread: ")[2])


@contextlib.contextmanager
def _naming(name: Callable[[], str]) -> Iterator[None]:
    """One line with the name of what is read, whatever a file, a decoder or a transform says."""
    try:
        yield
    except CladoError as error:
        raise _Unread(f"{error} of {name()}") from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _Unread(f"data: image must be whole and readable, got {name()} ({_reason(error)})") from None


def _rgb(image: Any) -> Any:
    """Three channels of 8 bits. Of 16 bits PIL keeps grey ones, and cuts them off at 255 where it converts them."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image, np.int64)
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    require(image.mode not in ("I", "F"), "data", "image", "have 8 or 16 bits a channel", f"mode {image.mode}")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
