"""``python -m bench.study.stable``: how many samples `until_stable` saves, and whether the plans stood.

Each net is profiled with one tolerance after the other, the strictest last, and then to the last sample. At every stop the plans
are compared with those of all samples: by a matrix of held-out images, and by the loss on them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

import clado
from clado.artifacts import Plan, Sensitivity

from ..harness import machine
from .measure import cpu_seconds, divergence
from .nets import CLASSES, Digits, load_split, trained
from .numbers import clustered, compact
from .page import STABLE

TOLERANCES = (0.3, 0.2, 0.1, 0.05)
BUDGETS = (2.5, 3.0, 4.0)
SMALL_SIDE = 48


@dataclass(frozen=True)
class Net:
    """A net, what its images become first, how many samples it is given at most, and its widths."""

    title: str
    build: Callable[[Path], nn.Module]
    prepared: Callable[[Tensor], Tensor]
    samples: int
    bits: tuple[int, ...]


def small_vit(folder: Path) -> nn.Module:
    """timm's vit_small_patch16_224 on small images, with random weights so large that every branch counts."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", img_size=SMALL_SIDE, num_classes=CLASSES)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
    return model.eval()


def enlarged(images: Tensor) -> Tensor:
    """Of three channels and the side that :func:`small_vit` takes."""
    return interpolate(images, size=SMALL_SIDE, mode="bilinear").expand(-1, 3, -1, -1).contiguous()


NETS = {
    **{
        name: Net(title, partial(lambda name, folder: trained(name, 0, folder), name), Tensor.clone, 1024, (2, 3, 4, 8))
        for name, title in (("vit", "ViT"), ("resnet", "ResNet"), ("mobilenet", "MobileNetV2"))
    },
    "vit_small": Net("ViT-S/16, random weights", small_vit, enlarged, 256, (2, 4, 8)),
}


def sensitivity_set() -> Tensor:
    """The images of both sensitivity sets of the study, shuffled."""
    images = torch.cat([load_split(f"sensitivity {part}").images for part in "ab"])
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


class Judge:
    """Held-out KL to the float net, image by image."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model, images
        self.float = self._logits(model)
        self.known: dict[tuple[str, ...], Tensor] = {}

    @torch.no_grad()
    def _logits(self, model: nn.Module) -> Tensor:
        return torch.cat([model(part) for part in self.images.split(128)]).double()

    def loss(self, plan: Plan) -> Tensor:
        key = tuple(plan.schemes.values())
        if key not in self.known:
            self.known[key] = divergence(self.float, self._logits(clado.apply(self.model, plan)))
        return self.known[key]


def measure(name: str, work: Path) -> dict[str, Any]:
    """One net: how far every tolerance went, and what its plans are worth."""
    net, folder = NETS[name], work / "stable" / name
    shutil.rmtree(folder, ignore_errors=True)
    model, heldout = net.build(work / "nets"), load_split("heldout")
    images = net.prepared(sensitivity_set()[: net.samples])
    judge = Judge(model, net.prepared(heldout.images))
    others = [judge.images[: net.samples]]
    fresh = clado.profile(model, others, net.bits, rounding="nearest", output_dir=work / "fresh" / name, verbose=False)
    stops: dict[float | None, Sensitivity] = {}
    spent, seconds, checks = 0.0, 0.0, 0.0
    for tolerance in (*TOLERANCES, None):
        asked = {} if tolerance is None else {"until_stable": tolerance, "avg_bits": BUDGETS}
        with cpu_seconds() as used:
            stops[tolerance] = clado.profile(
                model, [images], net.bits, rounding="nearest", output_dir=folder, verbose=False, **asked
            )
        notes = stops[tolerance].notes
        spent, seconds, checks = spent + used(), seconds + notes["seconds"], checks + notes.get("check_seconds", 0.0)
        print(f"{name}: {tolerance}: {stops[tolerance].provenance.stability}", flush=True)
    whole = stops.pop(None)
    plans = {k: clado.solve(whole, avg_bits=bits, solver="heuristic") for k, bits in enumerate(BUDGETS)}
    rows = []
    for tolerance, sens in stops.items():
        found = sens.provenance.stability
        assert found is not None
        for k, bits in enumerate(BUDGETS):
            plan = clado.solve(sens, avg_bits=bits, solver="heuristic")
            rows.append(
                {
                    "tolerance": tolerance,
                    "reached": found.reached,
                    "samples": sens.num_samples,
                    "budget": bits,
                    "regret": found.regrets[k],
                    **against(plan, plans[k], fresh, judge, heldout),
                }
            )
    return {
        "net": net.title,
        "candidates": whole.num_candidates,
        "samples": whole.num_samples,
        "chunk": whole.notes["batch_size"],
        "cpu_seconds": spent,
        "check_share": checks / seconds,
        "rows": rows,
    }


def against(plan: Plan, best: Plan, fresh: Sensitivity, judge: Judge, heldout: Digits) -> dict[str, Any]:
    """A plan beside that of all samples, by the matrix of held-out images and by the loss on them."""
    own, other = (fresh.predict(p.schemes) for p in (plan, best))
    one, two = judge.loss(plan), judge.loss(best)
    return {
        "layers_differ": sum(plan.schemes[name] != scheme for name, scheme in best.schemes.items()),
        "predicted": own / other - 1,
        "heldout_loss": two.mean().item(),
        "heldout": clustered((one - two).numpy(), heldout.digit.numpy()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/study"), help="nets and profiles")
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--json", type=Path, help="where the results go", default=STABLE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        "benchmark": "stable",
        "machine": machine(),
        "settings": {"tolerances": TOLERANCES, "budgets": BUDGETS, "heldout": len(load_split("heldout").labels)},
        "nets": [measure(name, options.work) for name in options.nets.split(",")],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(compact(json.loads(json.dumps(results))) + "\n")


if __name__ == "__main__":
    main()
