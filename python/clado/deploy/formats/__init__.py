"""The file formats of an export, one module each: a writer, the bytes it will take, and a check by a consumer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...quant import Layer
from . import compressed_tensors, onnx, safetensors
from .request import Request


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        write: fills a folder; returns the bytes written of packed codes with their scales, and of what stays float.
        predict: the same two numbers from shapes alone, before anything is quantized.
        verify: runs a consumer on a written folder and compares; returns what held, in one line, or raises CladoError.
        kept: layers of the plan that have no place in the format and stay float.
    """

    write: Callable[[Request, Path], tuple[int, int]]
    predict: Callable[[Request], tuple[int, int]]
    verify: Callable[[Request, Path], str]
    kept: Callable[[Request], list[Layer]] = lambda _: []


FORMATS: dict[str, Format] = {
    "safetensors": Format(safetensors.write, safetensors.predict, safetensors.verify),
    "compressed-tensors": Format(
        compressed_tensors.write, compressed_tensors.predict, compressed_tensors.verify, compressed_tensors.kept
    ),
    "onnx": Format(onnx.write, onnx.predict, onnx.verify),
}
__all__ = ["FORMATS", "Format", "Request"]
