"""Devices an op test runs on: the CPU always, CUDA where there is one, and CUDA by force under CLADO_REQUIRE_GPU=1."""

import os

import torch

import clado_ext

if os.environ.get("CLADO_REQUIRE_GPU") == "1" and not (torch.cuda.is_available() and clado_ext.has_cuda):
    raise RuntimeError("CLADO_REQUIRE_GPU=1, but torch sees no GPU or clado_ext was built without CUDA kernels")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and clado_ext.has_cuda else [])]
SIMD_LEVELS = range(clado_ext.simd_level() + 1)
