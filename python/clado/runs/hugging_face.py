"""Models of images from transformers, by folder or by name of the hub, with the image processor that lies beside them."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..common import CladoError, require

PREFIX = "hf:"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_log = logging.getLogger(__name__)


def is_hugging_face(model: str) -> bool:
    """Whether a model's name is ``hf:FOLDER`` or ``hf:owner/name``."""
    return model.startswith(PREFIX)


def absolute(model: str) -> str:
    """The name that means the same model in any working directory."""
    source = model.removeprefix(PREFIX)
    return f"{PREFIX}{os.path.abspath(source)}" if is_hugging_face(model) and os.path.isdir(source) else model


def load_model(
    model: str,
    num_classes: int | None = None,
    img_size: int | None = None,
    state: dict[str, Tensor] | None = None,
) -> nn.Module:
    """The module under transformers' own names of layers, in eval mode; classifiers return their logits.

    Nothing but safetensors is read, and no code that comes with the weights is run.

    Args:
        model: ``hf:FOLDER`` as ``save_pretrained`` writes it, or ``hf:owner/name``.
        num_classes: of the head, which is drawn anew where the stored one has others, the same at every call.
        img_size: of the images, where the model can interpolate its position embeddings.
        state: weights to take instead of the stored ones, under any names that transformers reads.

    Raises:
        CladoError: transformers is not installed; no configuration, no weights, damaged ones or ones that do not fit; a model
            that takes more than images.
    """
    transformers, source = _transformers(), _source(model)
    with _opening(source):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        stored = getattr(config, "quantization_config", None)
        require(stored is None, "model", "weights", "be float", f"quantized ones in {source}")
        kind = _kind(transformers, config)
        classifies = kind in _classifiers(transformers, config)
        if num_classes is not None:
            must = "be left out: the model does not classify images"
            require(classifies, "model", "num_classes", must, kind.__name__)
            require(num_classes > 0, "model", "num_classes", f"be positive for {PREFIX} models", num_classes)
            config.num_labels = num_classes
        if state is None and os.path.isdir(source):
            must = f"hold {WEIGHTS[0]} (or --checkpoint name the weights)"
            held = ", ".join(sorted(os.listdir(source))[:5])
            require(_holds(source, WEIGHTS), "model", "folder", must, f"{held} in {source}")
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(0)
            found, told = kind.from_pretrained(
                source if state is None else None,
                state_dict=state,
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are told below
                output_loading_info=True,
            )
    _check_loaded(found, told, source if state is None else "the checkpoint", num_classes)
    return _of_images(found.eval(), classifies, img_size)


class ImageProcessor:
    """The image processor of a model as a function from an image to its tensor ``[3, H, W]``."""

    def __init__(self, processor: Any, sizes: Mapping[str, Any]) -> None:
        self.processor, self.sizes = processor, sizes

    def __call__(self, image: Any) -> Tensor:
        found: Tensor = self.processor(images=image, return_tensors="pt", **self.sizes)["pixel_values"][0]
        return found


def load_processor(model: str, img_size: int | None = None) -> ImageProcessor:
    """What makes a model's inputs of images, as its folder or the hub has it.

    Args:
        model: ``hf:FOLDER`` or ``hf:owner/name``.
        img_size: side of what the model gets; a crop keeps its share of the resized image.

    Raises:
        CladoError: no image processor, or one that does not make tensors ``[3, H, W]`` of one size.
    """
    transformers, source = _transformers(), _source(model)
    if os.path.isdir(source):
        must = f"hold {PROCESSORS[0]} (AutoImageProcessor's save_pretrained writes it), or --data be a function"
        require(_holds(source, PROCESSORS), "data", "folder of the model", must, f"none in {source}")
    with _opening(source, "data"):
        processor = transformers.AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        made = ImageProcessor(processor, {} if img_size is None else _sizes(processor, img_size))
        _check_processor(made, source)
    return made


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        message = f"model: transformers must be installed for {PREFIX} models, got no module transformers"
        raise CladoError(f"{message} (pip install clado[hf])") from None
    return transformers


def _source(model: str) -> str:
    """A folder, or a name of the hub."""
    source = model.removeprefix(PREFIX)
    if os.path.isdir(source):
        require(_holds(source, ("config.json",)), "model", "folder", "hold config.json of transformers", source)
        return source
    parts = source.split("/")
    named = len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~") and not os.path.exists(source)
    require(named, "model", "name", "be hf:FOLDER of a folder that is there, or hf:owner/name", repr(model))
    return source


def _holds(folder: str, names: tuple[str, ...]) -> bool:
    return any(os.path.isfile(os.path.join(folder, name)) for name in names)


def _kind(transformers: Any, config: Any) -> Any:
    """The class that the configuration names, or the one for image classification; models that take more than images raise."""
    named = (config.architectures or [None])[0]
    kind = getattr(transformers, named, None) if named else None
    if kind is None:
        known = _classifiers(transformers, config) or _several(transformers.MODEL_MAPPING.get(type(config), None))
        kind = known[0] if known else None
    takes = _several(getattr(kind, "input_modalities", None))  # of some models of images the default, "text"
    first = getattr(kind, "main_input_name", None)
    got = getattr(kind, "__name__", named or config.model_type)
    got += f" of {first} ({' and '.join(takes)})" if first else ""
    must = "be that of a model of pixel_values alone (of others, save the vision tower)"
    require(first == "pixel_values" and len(takes) == 1, "model", "name", must, got)
    return kind


def _classifiers(transformers: Any, config: Any) -> tuple[Any, ...]:
    """The classes that classify images with such a configuration."""
    return _several(transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None))


def _several(found: Any) -> tuple[Any, ...]:
    """None, one or several as a tuple."""
    return tuple(found) if isinstance(found, (tuple, list)) else () if found is None else (found,)


def _check_loaded(model: nn.Module, told: Mapping[str, Any], source: str, num_classes: int | None) -> None:
    """Raise where weights are missing or do not fit, but for a head of another number of classes; say what is drawn or unused."""
    shaped = {name for name, *_ in told["mismatched_keys"]}
    drawn = sorted({*told["missing_keys"], *shaped})
    state, body = model.state_dict(), f"{model.base_model_prefix}."
    head = {name for name in drawn if not name.startswith(body) and state[name].shape[:1] == (num_classes,)}
    strange = [name for name in drawn if name not in head]
    what = f"{len(strange)} missing or of another shape ({strange[0]})" if strange else ""
    require(not strange, "model", "weights", f"fit {type(model).__name__}", f"{what} in {source}")
    if drawn:
        _log.warning("model: %s are random: %s has no head of %d classes", ", ".join(drawn), source, num_classes)
    unused = sorted(told["unexpected_keys"])
    if unused:
        kind = type(model).__name__
        _log.warning("model: %d weights of %s have no place in %s (%s)", len(unused), source, kind, unused[0])


def _of_images(model: nn.Module, classifies: bool, img_size: int | None) -> nn.Module:
    """The same module with a forward of ``pixel_values``; of a classifier it returns the logits.

    The class is replaced and nothing is wrapped, so that layers keep the names that transformers reads them by.
    """
    kind: Any = type(model)
    resized = img_size is not None and "interpolate_pos_encoding" in inspect.signature(kind.forward).parameters
    options = {"interpolate_pos_encoding": True} if resized else {}

    def forward(self: nn.Module, pixel_values: Tensor, **more: Any) -> Any:
        output = kind.forward(self, pixel_values, **{**options, **more})
        return output.logits if classifies else output

    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return model


def _sizes(processor: Any, img_size: int) -> dict[str, Any]:
    """The processor's own arguments for another size."""
    own = {name: dict(getattr(processor, name, None) or {}) for name in ("size", "crop_size")}
    own = {name: {edge: n for edge, n in size.items() if n is not None} for name, size in own.items()}
    crops = bool(own["crop_size"]) and bool(getattr(processor, "do_center_crop", False))
    last = own["crop_size"] if crops else own["size"]
    square = len(set(last.values())) == 1
    require(square, "data", "img_size", "be left out unless the image processor makes squares", last)
    old = next(iter(last.values()))
    return {
        name: {edge: round(n * img_size / old) for edge, n in own[name].items()}
        for name in (("size", "crop_size") if crops else ("size",))
        if own[name]
    }


def _check_processor(made: ImageProcessor, source: str) -> None:
    """Raise unless images of every shape become tensors of one shape."""
    from PIL import Image

    shapes = [tuple(made(Image.new("RGB", size)).shape) for size in ((96, 64), (64, 96))]
    sound = shapes[0] == shapes[1] and len(shapes[0]) == 3
    require(sound, "data", "image processor", f"make tensors [3, H, W] of one size, in {source}", shapes)


@contextmanager
def _opening(source: str, op: str = "model") -> Iterator[None]:
    """Without what transformers prints meanwhile; whatever it raises is one line."""
    theirs: Any = _transformers().utils.logging
    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    trees = logging.getLogger("torch.utils._pytree")  # says what it thinks of a torchao that transformers imports
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    trees.addFilter(_never)
    try:
        yield
    except CladoError:
        raise
    except Exception as error:  # what a hub, a parser or a model's own code raises differs
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
        where = source if os.path.isdir(source) else f"{source} (no folder of that name)"
        raise CladoError(f"{op}: transformers must be able to open {where}, got {reason}") from None
    finally:
        trees.removeFilter(_never)
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def _never(record: logging.LogRecord) -> bool:
    return False
