"""``python -m bench.survey``: how clado takes models of timm, torchvision and transformers; writes docs/models.md.

Each model is built with random weights at a small size in a process of its own: captured as a graph or run by whole forwards,
its layers found, its other weights named, a plan of 4 bits exported and verified in every format. What was measured before is
kept in ``--json``; `--only NAME` measures one again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clado.common import CladoError, atomic_file

RESULTS, PAGE = Path("bench/results/models.json"), Path("docs/models.md")
FORMATS = ("safetensors", "compressed-tensors", "onnx")
SMALL = (
    "test_",
    "atto",
    "femto",
    "pico",
    "nano",
    "micro",
    "xxs",
    "xs",
    "tiny",
    "mini",
    "small",
    "_s",
    "b0",
    "18",
    "26",
    "50",
)
TORCHVISION = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d"),
    *("shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vit_b_32"),
)
_VIT = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 384, "image_size": 96}
_SWIN = {"image_size": 128, "embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]}
_STAGES = {"hidden_sizes": [16, 24, 40, 64], "depths": [1, 1, 2, 1]}
# {model of transformers: (its configuration, options that make it small)}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTForImageClassification": ("ViTConfig", _VIT),
    "DeiTForImageClassificationWithTeacher": ("DeiTConfig", _VIT),
    "BeitForImageClassification": ("BeitConfig", {**_VIT, "use_relative_position_bias": True}),
    "Dinov2ForImageClassification": ("Dinov2Config", {**_VIT, "patch_size": 16}),
    "Dinov2WithRegistersForImageClassification": ("Dinov2WithRegistersConfig", {**_VIT, "use_swiglu_ffn": True}),
    "SwinForImageClassification": ("SwinConfig", {**_SWIN, "window_size": 4}),
    "Swinv2ForImageClassification": ("Swinv2Config", {**_SWIN, "window_size": 4}),
    "ConvNextForImageClassification": ("ConvNextConfig", _STAGES),
    "ConvNextV2ForImageClassification": ("ConvNextV2Config", _STAGES),
    "ResNetForImageClassification": ("ResNetConfig", {**_STAGES, "embedding_size": 16}),
    "RegNetForImageClassification": ("RegNetConfig", {**_STAGES, "embedding_size": 16, "groups_width": 8}),
    "MobileViTForImageClassification": ("MobileViTConfig", {"image_size": 64, "hidden_sizes": [48, 64, 80]}),
    "MobileViTV2ForImageClassification": ("MobileViTV2Config", {"image_size": 64, "width_multiplier": 0.5}),
    "CLIPVisionModel": ("CLIPVisionConfig", {**_VIT, "patch_size": 16}),
    "SiglipVisionModel": ("SiglipVisionConfig", _VIT),
}
TIMEOUT = 1800


def families() -> dict[str, str]:
    """{family of timm: its smallest model, by name}."""
    import timm
    from timm.models import _registry

    own: dict[str, list[str]] = defaultdict(list)
    for name in timm.list_models():
        own[_registry._model_to_module[name]].append(name)

    def rank(name: str) -> tuple[int, int, str]:
        return next((k for k, part in enumerate(SMALL) if part in name), len(SMALL)), len(name), name

    return {family: min(names, key=rank) for family, names in sorted(own.items())}


def build(library: str, name: str) -> tuple[nn.Module, torch.Tensor]:
    """The model in eval mode, and two inputs."""
    torch.manual_seed(0)
    if library == "torchvision":
        import torchvision

        model = torchvision.models.get_model(name, weights=None)
        size = {"inception_v3": 299}.get(name, 224)
        return model.eval(), torch.randn(2, 3, size, size)
    if library == "transformers":
        return build_transformers(name)
    import timm

    model = timm.create_model(name).eval()
    given = model.pretrained_cfg
    channels, side, _ = given["input_size"]
    least = given.get("min_input_size") or (3, 96, 96)
    size = side if given.get("fixed_input_size") else min(side, max(96, least[1]))
    return model, torch.randn(2, channels, size, size)


def build_transformers(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The model as ``--model hf:FOLDER`` builds it, with random weights, and two inputs."""
    import transformers

    from clado.runs import ModelSpec, build_model

    kind, options = TRANSFORMERS[name]
    config = getattr(transformers, kind)(**options)
    with tempfile.TemporaryDirectory() as folder:
        made = getattr(transformers, name)(config)
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)  # drawn around zero by some, and nothing passes
        made.save_pretrained(folder)
        model = build_model(ModelSpec(f"hf:{folder}"))
    size = options.get("image_size", 96)
    return model, torch.randn(2, 3, size, size)


def measure(library: str, name: str, formats: tuple[str, ...]) -> dict[str, Any]:
    """What happens to one model; an error is told in its own line."""
    import clado
    from clado.artifacts import Plan
    from clado.graph import open_runner
    from clado.quant import Quantizer, folded

    started = time.perf_counter()
    model, x = build(library, name)
    found: dict[str, Any] = {"size": x.shape[-1]}
    try:
        whole = folded(model)
        runner = open_runner(whole, x)
    except CladoError as error:
        return {**found, "error": str(error)}
    weights = {n: p.numel() for n, p in whole.named_parameters() if p.dim() > 1}
    searched = {n for layer in runner.layers for n in layer.names}
    found |= {
        "layers": len(runner.layers),
        "graph": runner.note is None,
        "note": runner.note,
        "share": sum(weights[n] for n in weights.keys() & searched) / sum(weights.values()),
        "skipped": dict(sorted(runner.skipped.items())),
        "silent": sorted(
            n for n in weights.keys() - searched if not any(n == s or n.startswith(f"{s}.") for s in runner.skipped)
        ),
    }
    plan = Plan(
        runner.layers, {layer.name: "W4A16" for layer in runner.layers}, "given", quantizer=Quantizer(scale_steps=1)
    )
    for form in formats:
        with tempfile.TemporaryDirectory() as folder:
            options = {"example": x} if form == "onnx" else {}
            try:
                clado.export(whole, plan, Path(folder) / "out", form, **options)
                found[form] = clado.verify(whole, plan, Path(folder) / "out", form, **options)
            except CladoError as error:
                found[form] = f"not: {error}"
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def apart(library: str, name: str, formats: tuple[str, ...]) -> dict[str, Any]:
    """:func:`measure` in a process of its own; a traceback is its last line."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "bench.survey",
        "--one",
        library,
        name,
        "--formats",
        ",".join(formats),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return {"traceback": f"more than {TIMEOUT} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        known: dict[str, Any] = json.loads(lines[-1])
        return known
    return {"traceback": (done.stderr.strip().splitlines() or ["killed"])[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--only", help="a model to measure again")
    parser.add_argument("--formats", default=",".join(FORMATS), help="to export and verify in")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    formats = tuple(part for part in options.formats.split(",") if part)
    if options.one:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(*options.one, formats)))
        return
    known: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    wanted = [("timm", family, name) for family, name in families().items()]
    wanted += [("torchvision", name, name) for name in TORCHVISION]
    wanted += [("transformers", name, name) for name in TRANSFORMERS]
    for library, family, name in wanted:
        key = f"{library}/{family}"
        named = options.only in (name, family)
        if not named and (options.only or known.get(key, {}).get("model") == name):
            continue
        known[key] = {"model": name, **apart(library, name, formats)}
        print(key, {k: v for k, v in known[key].items() if k not in ("skipped",)}, flush=True)
        with atomic_file(options.json) as temporary:
            Path(temporary).write_text(
                "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in known.items()) + "\n}\n"
            )
    missing = [name for library, family, name in wanted if f"{library}/{family}" not in known]
    with atomic_file(options.page) as temporary:
        Path(temporary).write_text(page(known, missing))


def page(known: dict[str, Any], missing: Sequence[str]) -> str:
    """The table of all models, and the names of those that were not tried yet."""
    ran = [row for row in known.values() if "layers" in row]
    graphs = sum(row["graph"] for row in ran)
    out = [
        "# Models",
        "",
        "Written by `python -m bench.survey`: a small model of every family of timm, and models of torchvision and transformers "
        "(small configurations), random weights.",
        f"{len(ran)} of {len(known)} go through, {graphs} of them as a graph; the others by whole forwards, which cost more.",
        *([f"Not tried yet: {', '.join(missing)}."] if missing else []),
        "",
        "| model | input | runs as | layers | weights searched | left in float | exported and verified |",
        "| --- | ---: | --- | ---: | ---: | --- | --- |",
    ]
    for key, row in known.items():
        if "layers" not in row:
            out.append(
                f"| {key.partition('/')[0]}: {row['model']} | | {row.get('error') or row.get('traceback')} | | | | |"
            )
            continue
        reasons: dict[str, int] = defaultdict(int)
        for why in row["skipped"].values():
            reasons[why] += 1
        left = "; ".join(f"{count} × {why}" if count > 1 else why for why, count in reasons.items())
        verified = ", ".join(form for form in FORMATS if form in row and not row[form].startswith("not: "))
        cells = [
            f"{key.partition('/')[0]}: {row['model']}",
            f"{row['size']}²",
            "graph" if row["graph"] else "whole forwards",
            str(row["layers"]),
            f"{row['share']:.1%}",
            left.replace("|", "\\|"),
            verified,
        ]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main()
