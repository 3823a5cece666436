"""Models by name: timm's, transformers', or a function of the user's own; weights from a hub or a local file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common import CladoError, require
from . import hugging_face
from .names import named

_HUB = "hf-hub:"


@dataclass(frozen=True)
class ModelSpec:
    """How a model is built; kept in the run directory so that later stages find it again.

    Attributes:
        model: a timm name (``hf-hub:owner/name`` too), ``hf:FOLDER`` or ``hf:owner/name`` of transformers, "digits" (the
            embedded net), or ``package.module:function`` that returns a module.
        checkpoint: local weights, ``.safetensors`` or a torch file of tensors alone.
        pretrained: timm's own weights: True from its hub, or a local folder or file of them. Unlike a checkpoint they may have
            another number of classes, and names of the original release.
        num_classes, img_size: as timm takes them; as :func:`hugging_face.load_model` does.
    """

    model: str
    checkpoint: str | None = None
    pretrained: bool | str = False
    num_classes: int | None = None
    img_size: int | None = None

    def to_json(self) -> dict[str, Any]:
        """What builds the same model from any working directory."""
        local = {name: getattr(self, name) for name in ("checkpoint", "pretrained")}
        return {
            **asdict(self),
            "model": hugging_face.absolute(self.model),
            **{name: os.path.abspath(path) for name, path in local.items() if isinstance(path, str)},
        }

    @property
    def random(self) -> bool:
        """Whether nothing gives weights to timm's net."""
        named = self.model == "digits" or (":" in self.model and not self.model.startswith(_HUB))
        return not (named or self.pretrained or self.checkpoint)


def build_model(spec: ModelSpec) -> nn.Module:
    """The module in eval mode with its weights; those that timm draws are the same at every call.

    Raises:
        CladoError: an unknown name, a function that fails, or a checkpoint that does not fit.
    """
    if spec.model == "digits":
        from .digits import load_model

        model = load_model()
    elif hugging_face.is_hugging_face(spec.model):
        must = "be left out: the weights lie with the model"
        require(not spec.pretrained, "model", "pretrained", must, spec.pretrained)
        state = None if spec.checkpoint is None else _read_state(Path(spec.checkpoint))
        return hugging_face.load_model(spec.model, spec.num_classes, spec.img_size, state)
    elif ":" in spec.model and not spec.model.startswith(_HUB):
        model = _own(spec.model)
    else:
        model = _timm(spec)
    if spec.checkpoint is not None:
        load_checkpoint(model, spec.checkpoint)
    return model.eval()


def load_checkpoint(model: nn.Module, path: str) -> None:
    """Load weights strictly; nothing is changed unless everything fits."""
    state = _read_state(Path(path))
    wanted = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    missing, unexpected = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    shaped = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    if missing or unexpected or shaped:
        reasons = [
            f"{len(names)} {what} ({names[0]})"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shaped))
            if names
        ]
        raise CladoError(f"model: checkpoint must fit the model, got {', '.join(reasons)} in {path}")
    model.load_state_dict(state)


def _own(name: str) -> nn.Module:
    model: nn.Module = named("model", "name", name)()
    require(isinstance(model, nn.Module), "model", name, "return a torch module", type(model).__name__)
    return model


def _timm(spec: ModelSpec) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise CladoError(
            "model: timm must be installed for models by name, got no module timm (pip install timm)"
        ) from None
    if not spec.model.startswith(_HUB) and not timm.is_model(spec.model):
        close = timm.list_models(f"*{spec.model.split('_')[0]}*")[:3]
        hint = f" (there are {', '.join(close)}, …)" if close else ""
        raise CladoError(
            f"model: name must be a timm model, package.module:function or digits, got {spec.model!r}{hint}"
        )
    options: dict[str, Any] = {
        k: v for k, v in (("num_classes", spec.num_classes), ("img_size", spec.img_size)) if v is not None
    }
    name = spec.model
    if isinstance(spec.pretrained, str):
        name, overlay = _local(spec.model, Path(spec.pretrained))
        options |= overlay
    try:
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(0)
            try:
                return timm.create_model(name, pretrained=bool(spec.pretrained), **options)
            except TypeError:
                options.pop("img_size", None)  # convolutional nets take any size and no such argument
                torch.default_generator.manual_seed(0)
                return timm.create_model(name, pretrained=bool(spec.pretrained), **options)
    except Exception as error:  # what a hub that cannot be reached raises depends on the hub
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CladoError(
            f"model: timm must be able to build {spec.model}, got {type(error).__name__}: {reason}"
        ) from None


def _local(model: str, path: Path) -> tuple[str, dict[str, Any]]:
    """timm's name and options for weights in a local folder as a hub holds it, or in a file."""
    config = path / "config.json"
    if config.is_file():
        try:
            held = json.loads(config.read_text())["architecture"]
        except (ValueError, KeyError, TypeError) as error:
            raise CladoError(f"model: pretrained must hold a timm config.json, got {config} ({error!r})") from None
        require(held == model.split(".")[0], "model", "pretrained", f"hold weights of {model}", held)
        return f"local-dir:{path}", {}
    known = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
    file = path if path.is_file() else next(iter(known), None)
    must = "be a file, or a folder with model.safetensors or pytorch_model.bin"
    require(file is not None, "model", "pretrained", must, path)
    assert file is not None
    return model, {"pretrained_cfg_overlay": {"state_dict": _read_state(file), "source": ""}}


def _read_state(path: Path) -> dict[str, Tensor]:
    require(path.is_file(), "model", "checkpoint", "be a file", path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has exceptions of its own for damaged files
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CladoError(f"model: checkpoint must be a file of tensors alone, got {path} ({reason})") from None
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    tensors = isinstance(state, Mapping) and all(isinstance(v, Tensor) for v in state.values())
    require(tensors, "model", "checkpoint", "hold tensors by name", type(state).__name__)
    return dict(state)
