"""The file formats of an export. A new one is one file, which ends with its ``FORMAT``, and one line of ``FORMATS``."""

from __future__ import annotations

from typing import Any

from . import compressed_tensors, onnx, safetensors
from .base import Format, Request

FORMATS: dict[str, Format[Any]] = {
    "safetensors": safetensors.FORMAT,
    "compressed-tensors": compressed_tensors.FORMAT,
    "onnx": onnx.FORMAT,
}
__all__ = ["FORMATS", "Format", "Request"]
