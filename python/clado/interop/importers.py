"""Scores that other tools measured, as a :class:`Sensitivity`. Pickles are read without running any of their code."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifacts import Sensitivity
from ..common import CladoError, require
from ..quant import Candidates, Layer, Scheme
from .unpickle import existing, load_inert, load_restricted, value_of

Sizes = Mapping[str, int]
Widths = Sequence[Sequence[int]]  # per layer


def read_scores(path: str | os.PathLike[str]) -> Sensitivity:
    """Additive scores: loss increases of single layers, no interactions. Layers may have different widths.

    Args:
        path: CSV with the columns ``layer,numel,bits,delta_loss`` (and ``macs``, where BitOps matter), or JSON
            ``{layer: {"numel": n, "delta_loss": {bits: nats}}}``.

    Raises:
        CladoError: no such file, other content, or a layer without scores.
    """
    source = existing(path)
    scores: dict[str, dict[int, float]] = {}
    sizes: dict[str, int] = {}
    macs: dict[str, int] = {}
    try:
        text = source.read_text(encoding="utf-8")
        if source.suffix.lower() == ".json":
            for name, row in json.loads(text).items():
                sizes[name], macs[name] = int(row["numel"]), int(row.get("macs", 0))
                scores[name] = {int(bits): float(value) for bits, value in row["delta_loss"].items()}
        else:
            for row in csv.DictReader(text.splitlines()):
                name = row["layer"]
                sizes[name], macs[name] = int(row["numel"]), int(row.get("macs") or 0)
                known = scores.setdefault(name, {})
                require(int(row["bits"]) not in known, "import", f"layer {name}", "have one score a width", row["bits"])
                known[int(row["bits"])] = float(row["delta_loss"])
    except CladoError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CladoError(
            f"import: path must be CSV layer,numel,bits,delta_loss or JSON "
            f'{{layer: {{"numel", "delta_loss"}}}}, got {source} ({type(error).__name__}: {error})'
        ) from None
    return _additive(scores, sizes, macs)


def read_matrix(path: str | os.PathLike[str], layers: str | os.PathLike[str]) -> Sensitivity:
    """A sensitivity matrix G made elsewhere.

    Args:
        path: ``.npy``, ``.npz``, ``.safetensors`` or ``.pt`` with G ``[V, V]``: 2ΔL on the diagonal, Ω off it; alone, or
            under the name ``G`` with an optional ``stderr`` beside it.
        layers: JSON ``{"layers": [[name, numel], …], "bits": [2, 4, 8]}`` in candidate order (layer-major, bits ascending);
            a layer of other widths names them itself: ``[name, numel, [4, 8]]``.

    Raises:
        CladoError: missing or foreign files, or a matrix that :meth:`Sensitivity.from_matrix` refuses.
    """
    source = existing(path)
    try:
        if source.suffix == ".safetensors":
            from safetensors.numpy import load_file

            arrays = dict(load_file(source))
        elif source.suffix in (".pt", ".pth"):
            import torch

            held = torch.load(source, map_location="cpu", weights_only=True)
            arrays = {n: t.double().numpy() for n, t in (held if isinstance(held, dict) else {"G": held}).items()}
        else:
            read = np.load(source, allow_pickle=False)
            arrays = {"G": read} if isinstance(read, np.ndarray) else dict(read)
    except Exception as error:  # whatever the readers make of a foreign file
        raise CladoError(
            f"import: path must be a whole .npy, .npz, .safetensors or .pt file, got {source} ({type(error).__name__})"
        ) from None
    stderr = arrays.pop("stderr", None)
    require("G" in arrays or len(arrays) == 1, "import", "path", "hold a matrix named G", sorted(arrays))
    matrix = arrays.get("G", next(iter(arrays.values())))
    try:
        order = json.loads(existing(layers).read_text(encoding="utf-8"))
        rows = [(*row, order["bits"]) if len(row) == 2 else row for row in order["layers"]]
        names = [(str(name), int(numel)) for name, numel, _ in rows]
        widths = [[int(b) for b in bits] for *_, bits in rows]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CladoError(
            f'import: layers must be JSON {{"layers": [[name, numel]], "bits": []}}, got {layers} ({error})'
        ) from None
    return Sensitivity.from_matrix(np.asarray(matrix, np.float64), names, stderr=stderr, schemes=widths)


def read_clado(path: str | os.PathLike[str], sizes: Sizes) -> Sensitivity:
    """A matrix of CLADO's public code: ``{"Ltilde": [V, V], "layer_index": {"<layer>(a, w)bits": row}}``.

    Ltilde holds the loss increase of one layer on the diagonal and of two layers together off it. Layers may have different
    widths. One activation width is read; files that mix several are refused. Only arrays and plain containers are built.

    Args:
        path: the pickle, or what ``torch.save`` made of the same (``.pt``), with arrays or tensors in it.
        sizes: {layer: weights}.

    Raises:
        CladoError: anything else in the pickle, a matrix that does not fit the index, or a layer without a size.
    """
    source = existing(path)
    try:
        held = load_restricted(source)
        joint, index = np.asarray(value_of(held["Ltilde"]), dtype=np.float64), dict(held["layer_index"])
        order = sorted(index, key=index.__getitem__)
        parts = [re.fullmatch(r"(.+)\((\d+), (\d+)\)bits", name) for name in order]
        sound = (
            joint.shape == (len(order), len(order))
            and all(parts)
            and [index[n] for n in order] == list(range(len(order)))
        )
    except CladoError:
        raise
    except Exception as error:  # a broken pickle can raise anything
        raise CladoError(f"import: path must be an Ltilde pickle, got {source} ({type(error).__name__})") from None
    require(bool(np.isfinite(joint).all()), "import", "Ltilde", "be finite", "NaN or infinity")
    require(sound, "import", "layer_index", "name every row once as <layer>(a, w)bits", f"{joint.shape}, {order[:2]}")
    schemes = [(m[1], int(m[2]), int(m[3])) for m in parts if m is not None]
    require(len({a for _, a, _ in schemes}) == 1, "import", "path", "hold one activation width", "several")
    places: dict[str, dict[int, int]] = {}
    for row, (name, _, width) in enumerate(schemes):
        own = places.setdefault(name, {})
        require(width not in own, "import", f"layer {name}", "have one row a width", width)
        own[width] = row
    rows = [own[width] for own in places.values() for width in sorted(own)]
    joint = joint[np.ix_(rows, rows)]
    return _from_joint((joint + joint.T) / 2, _sized(list(places), sizes), [sorted(own) for own in places.values()])


def read_modelopt(path: str | os.PathLike[str]) -> Sensitivity:
    """Scores of NVIDIA ModelOpt's ``auto_quantize``, from the search state it saves as its ``checkpoint``.

    Each searched group becomes a layer; formats count by their effective bits, those beyond 2..8 (no quantization)
    are left out, and so are groups that have no others. Groups may have different formats. The file is read as data: every
    class in it becomes an inert record, none of its code runs.

    Args:
        path: the search state, a torch file.

    Raises:
        CladoError: another file, or formats of one group with equal bits.
    """
    source = existing(path)
    try:
        scores, sizes = {}, {}
        for group, row in load_inert(source)["candidate_stats"].items():
            widths = [16 * float(recipe.state["compression"]) for recipe in row["formats"]]
            kept = [(round(w), float(s)) for w, s in zip(widths, row["scores"], strict=True) if 2 <= round(w) <= 8]
            require(len(dict(kept)) == len(kept), "import", f"group {group}", "have formats of distinct widths", kept)
            name = group.removesuffix(".quant_recipe")
            if kept:
                scores[name] = dict(kept)
                sizes[name] = round(float(row["uncompressed_cost"]) / float(row["cost_weight"]))
    except CladoError:
        raise
    except Exception as error:  # a broken or foreign file can raise anything
        raise CladoError(
            f"import: path must be a search state saved by ModelOpt's auto_quantize, got {source} ({type(error).__name__})"
        ) from None
    return _additive(scores, sizes)


def read_sizes(path: str | os.PathLike[str]) -> dict[str, int]:
    """{layer: weights} from JSON.

    Raises:
        CladoError: no such file, or other content.
    """
    source = existing(path)
    try:
        return {str(name): int(numel) for name, numel in json.loads(source.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise CladoError(f"import: layers must be JSON {{layer: weights}}, got {source} ({error})") from None


def _additive(scores: Mapping[str, Mapping[int, float]], sizes: Sizes, macs: Sizes | None = None) -> Sensitivity:
    require(len(scores) > 0, "import", "path", "hold at least one layer", "none")
    for name, row in scores.items():
        require(len(row) > 0, "import", f"layer {name}", "have at least one score", "none")
        require(all(map(math.isfinite, row.values())), "import", f"layer {name}", "have finite scores", dict(row))
    widths = [sorted(row) for row in scores.values()]
    diagonal = np.array([row[b] for row, own in zip(scores.values(), widths, strict=True) for b in own])
    layers = [Layer(n, "linear", (1, sizes[n]), (macs or {}).get(n, 0), (n,)) for n in _sized_names(scores, sizes)]
    unknown = np.diag(np.full(len(diagonal), np.nan))  # of ΔL; that there are no interactions is given
    return Sensitivity.from_matrix(np.diag(2 * diagonal), layers, stderr=unknown, schemes=widths)


def _from_joint(joint: NDArray[np.float64], layers: list[tuple[str, int]], widths: Widths) -> Sensitivity:
    """From ``[V, V]``: a candidate's loss increase on the diagonal, that of two layers together off it."""
    single = np.diag(joint)
    matrix = joint - single[:, None] - single[None, :]
    known = tuple(Layer(name, "linear", (1, numel), 0) for name, numel in layers)
    matrix[Candidates(known, tuple(tuple(map(Scheme.of, own)) for own in widths)).same_layer] = 0
    np.fill_diagonal(matrix, 2 * single)
    return Sensitivity.from_matrix(matrix, known, schemes=widths)


def _sized(layers: list[str], sizes: Sizes) -> list[tuple[str, int]]:
    return [(name, sizes[name]) for name in _sized_names(layers, sizes)]


def _sized_names(layers: Any, sizes: Sizes) -> list[str]:
    names = list(layers)
    missing = [name for name in names if name not in sizes]
    require(not missing, "import", "layers", "give every layer its number of weights", f"none for {missing[:3]}")
    wrong = [name for name in names if sizes[name] <= 0]
    require(not wrong, "import", "layers", "have at least one weight", wrong[:3])
    return names
