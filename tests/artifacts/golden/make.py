"""Makes a golden set: a matrix, a plan and an export as the present code writes them, and what they say as plain files.

    python -m tests.artifacts.golden.make tests/artifacts/golden/schema2

A set that is committed is never made again: it stands for the files that users have. A new schema gets a folder of its own.
Beside clado's files lie what they must read as, in formats that clado has no part in: ``expected.json`` holds names and numbers,
``expected.safetensors`` the matrix, the weights (bit for bit), inputs, and the outputs of the loaded model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import clado
from tests.record.cases import one_thread
from tests.record.nets import cnn, images

VARIANTS = {"float": None, "rounded": 8}  # the width of the layers' inputs
ARRAYS = ("delta_loss", "matrix", "stderr", "sample_digests")
QUANTIZER = {"group_size": 16, "scale_steps": 20, "symmetric": False}


def make(target: Path, act_bits: int | None) -> None:
    """One variant: profile, solve, export, and the expected values."""
    model, (x, _) = cnn(), images(8)
    sens = clado.profile(
        model,
        [x],
        (2, 3, 8),
        num_samples=8,
        batch_size=3,
        act_bits=act_bits,
        quantize_ends=True,
        verbose=False,
        **QUANTIZER,
    )
    plan = clado.solve(sens, avg_bits=3.5, size_bytes=1200, seed=1)
    target.mkdir(parents=True)
    sens.save(target)
    plan.save(target)
    clado.export(model, plan, target / "export")
    loaded = clado.load(target / "export", model)
    with torch.no_grad():
        outputs = loaded(x)
    tensors = {f"weight.{name}": value.clone() for name, value in loaded.state_dict().items()}
    arrays = {name: torch.from_numpy(getattr(sens, name)).contiguous() for name in ARRAYS}
    save_file({**tensors, **arrays, "inputs": x, "outputs": outputs}, target / "expected.safetensors")
    values = {
        "bits": sens.bits,
        "layers": [[layer.name, layer.kind, layer.shape, layer.macs, layer.names] for layer in sens.layers],
        "quantizer": QUANTIZER,
        "num_samples": sens.num_samples,
        "plan": {
            "bits": plan.bits,
            "status": plan.status,
            "objective": plan.objective,
            "bound": plan.bound,
            "objective_name": plan.objective_name,
            "values": plan.values,
            "usage": plan.usage,
            "size_bytes": plan.size_bytes,
        },
    }
    (target / "expected.json").write_text(json.dumps(values, separators=(",", ":")) + "\n")


def main() -> None:
    with one_thread():
        for name, act_bits in VARIANTS.items():
            make(Path(sys.argv[1]) / name, act_bits)


if __name__ == "__main__":
    main()
