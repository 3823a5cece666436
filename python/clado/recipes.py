"""A plan as the configuration of another tool: the public face of the recipes in ``interop``."""

from .interop import modelopt, plain, quanto, torchao, torchao_json

__all__ = ["modelopt", "plain", "quanto", "torchao", "torchao_json"]
