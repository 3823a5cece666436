"""The sensitivity matrix with its error bars, as one file without pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common import CladoError, atomic_file, data_digest, read_safetensors, refused, require
from ..quant import KEPT, ActivationRanges, Candidates, Layer, Quantizer, Rounded, RoundedBy, Scheme, candidates_of
from .optimism import OPTIMISM, optimism_in_words, optimism_of
from .provenance import Provenance
from .rounded_file import Held, RoundedFile, held_weights, save_held

SCHEMA = 3
MATRIX_FILE = "sensitivity.safetensors"
Schemes = Sequence[Scheme | str | int] | Mapping[str, Sequence[Scheme | str | int]]
_TENSORS = ("delta_loss", "interaction", "stderr", "sample_digests")


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Loss increases of every candidate and every pair of candidates, averaged over the sensitivity set.

    Attributes:
        candidates: V candidates, layer-major.
        delta_loss: ``[V]`` float64, single loss increase ΔL, in ``provenance.unit``.
        interaction: ``[V, V]`` float64, symmetric Ω; zero within a layer and on the diagonal.
        stderr: ``[V, V]`` float64, standard error of ΔL on the diagonal and of Ω off it; NaN where unknown.
        num_samples: size of the sensitivity set.
        quantizer: the settings under which the weights were perturbed.
        provenance: how it was measured, as far as later stages decide by it.
        notes: work in forward-equivalents, seconds, warnings: what is worth knowing beside.
        fingerprint: digests of weights, data and settings; empty for matrices from elsewhere.
        sample_digests: ``[num_samples]`` int64, one per sample in order; empty for matrices from elsewhere.
        activations: ranges of the layers' inputs, where the base or the candidates round them; None: nothing does.
        held: the weights that ``provenance.rounding`` made, or the file that holds them; None: nearest rounding.
        functions: {"forward_step", "loss_func": the user's own that it was measured with}, in the process that measured it: files
            hold no code.
    """

    candidates: Candidates
    delta_loss: NDArray[np.float64]
    interaction: NDArray[np.float64]
    stderr: NDArray[np.float64]
    num_samples: int = 0
    quantizer: Quantizer = field(default_factory=Quantizer)
    provenance: Provenance = field(default_factory=Provenance)
    notes: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, str] = field(default_factory=dict)
    sample_digests: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    activations: ActivationRanges | None = None
    held: Held = field(default=None, repr=False)
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        size = self.num_candidates
        for name, shape in (("delta_loss", (size,)), ("interaction", (size, size)), ("stderr", (size, size))):
            array = getattr(self, name)
            require(array.shape == shape, "sensitivity", name, f"have shape {shape}", array.shape)
            require(array.dtype == np.float64, "sensitivity", name, "be float64", array.dtype)
        counted = type(self.num_samples) is int and self.num_samples >= 0
        require(counted, "sensitivity", "num_samples", "be a whole number", repr(self.num_samples))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """L layers in the order the network runs them."""
        return self.candidates.layers

    @property
    def bits(self) -> tuple[int, ...]:
        """The weights' bit-widths that occur, ascending."""
        return self.candidates.bits

    @property
    def rounded(self) -> Rounded | None:
        """The weights as they were measured; None for nearest rounding.

        Raises:
            CladoError: they are not at hand, or damaged.
        """
        return held_weights(self.held, self.provenance.rounding, "sensitivity")

    @property
    def searched_share(self) -> float | None:
        """Share of the model's weights that the layers hold; None where others were not counted: scores from elsewhere."""
        known = self.provenance
        if not known.known or known.float_weights.keys() != known.float_layers.keys():
            return None
        searched = self.candidates.numel
        return searched / (searched + sum(self.provenance.float_weights.values()))

    @property
    def in_float(self) -> str:
        """What stayed float, in words; empty where nothing did."""
        return self.provenance.in_float(self.candidates.numel)

    @property
    def num_candidates(self) -> int:
        """V."""
        return len(self.candidates)

    @property
    def info(self) -> dict[str, Any]:
        """All that is known of how it was measured: provenance and notes; notes alone for scores from elsewhere."""
        if not self.provenance.known:
            return dict(self.notes)
        known = self.provenance.to_json()
        known["dropped"] = [[layer, _bits_of(Scheme.of(label), label)] for layer, label in self.provenance.dropped]
        known["corrected_pairs"] = [list(pair) for pair in self.provenance.corrected_pairs]
        return {**known, **self.notes}

    @property
    def matrix(self) -> NDArray[np.float64]:
        """G: ``[V, V]`` with 2ΔL on the diagonal and Ω off it; ½ xᵀGx is the predicted loss increase of a one-hot x."""
        matrix: NDArray[np.float64] = self.interaction.copy()
        np.fill_diagonal(matrix, 2 * self.delta_loss)
        return matrix

    @property
    def measured(self) -> NDArray[np.bool_]:
        """``[V]`` mask of the candidates whose losses are finite: all but dropped ones."""
        return np.isfinite(self.delta_loss)

    def activations_of(self, choice: Mapping[str, Scheme | str | int]) -> ActivationRanges | None:
        """The ranges that a plan of this choice needs; None: none."""
        if self.activations is None:
            return None
        flat, taken = self.candidates.flat, self.candidates.indices(choice)
        return self.activations.chosen({layer.name: flat[v] for layer, v in zip(self.layers, taken, strict=True)})

    def index(self, layer: str, scheme: Scheme | str | int) -> int:
        """Row of candidate (layer, scheme): a scheme, its label, or the weight's bits."""
        return self.candidates.index(layer, scheme)

    def one_hot(self, choice: Mapping[str, Scheme | str | int]) -> NDArray[np.float64]:
        """x of a choice {layer: scheme} that names every layer."""
        return self.candidates.one_hot(choice)

    def predict(self, choice: Mapping[str, Scheme | str | int]) -> float:
        """Predicted loss increase ½ xᵀGx of a choice {layer: scheme}."""
        taken = self.candidates.indices(choice)
        # Entries of dropped candidates are NaN: only those that are meant count.
        return float(0.5 * self.matrix[np.ix_(taken, taken)].sum())

    @staticmethod
    def from_matrix(
        matrix: NDArray[np.float64],
        layers: Sequence[tuple[str, int] | Layer],
        bits: Sequence[int] = (2, 4, 8),
        stderr: NDArray[np.float64] | None = None,
        quantizer: Quantizer | None = None,
        schemes: Schemes | Sequence[Sequence[Scheme | str | int]] | None = None,
    ) -> Sensitivity:
        """Wrap scores from elsewhere.

        Args:
            matrix: G, ``[V, V]``, symmetric: 2ΔL on the diagonal, Ω off it.
            layers: (name, numel) pairs or :class:`Layer` in candidate order.
            bits: ascending bit-widths of every layer.
            stderr: ``[V, V]`` standard errors as in :class:`Sensitivity`; None when unknown.
            schemes: instead of ``bits``: schemes of every layer, {pattern: schemes}, or a list of them for each layer.

        Raises:
            CladoError: wrong shape, non-finite or asymmetric entries, nonzero entries inside a layer.
        """
        given = np.asarray(matrix, dtype=np.float64)
        known = tuple(
            item if isinstance(item, Layer) else Layer(item[0], "linear", (1, int(item[1])), 0) for item in layers
        )
        candidates = _candidates(known, bits if schemes is None else schemes)
        size = len(candidates)
        require(given.shape == (size, size), "from_matrix", "matrix", f"have shape {(size, size)}", given.shape)
        require(bool(np.isfinite(given).all()), "from_matrix", "matrix", "be finite", "NaN or infinity")
        scale = np.abs(given).max(initial=0.0)
        require(
            bool(np.abs(given - given.T).max(initial=0.0) <= 1e-9 * scale),
            "from_matrix",
            "matrix",
            "be symmetric",
            "an asymmetric one",
        )
        interaction = (given + given.T) / 2
        np.fill_diagonal(interaction, 0.0)
        inside = candidates.same_layer
        require(
            not interaction[inside].any(),
            "from_matrix",
            "matrix",
            "be zero between candidates of one layer",
            "other values",
        )
        errors = np.full((size, size), np.nan) if stderr is None else np.asarray(stderr, dtype=np.float64)
        require(
            np.array_equal(errors, errors.T, equal_nan=True),
            "from_matrix",
            "stderr",
            "be symmetric",
            "an asymmetric one",
        )
        return Sensitivity(candidates, np.diag(given) / 2, interaction, errors, quantizer=quantizer or Quantizer())

    @staticmethod
    def merge(parts: Sequence[Sensitivity]) -> Sensitivity:
        """What one run over the samples of all parts, in this order, would have given, to rounding.

        Means are weighted by samples; squared deviations are pooled (Chan, Golub and LeVeque 1983).

        Args:
            parts: results of :func:`clado.profile` over disjoint samples, same model and settings.

        Raises:
            CladoError: nothing to merge, parts of different runs, or samples that are in more than one part.
        """
        require(len(parts) > 0, "merge", "parts", "be at least one sensitivity", "none")
        first = parts[0]
        for part in parts:
            for name in ("candidates", "quantizer"):
                same = getattr(part, name) == getattr(first, name)
                require(same, "merge", "parts", f"have the same {name}", "others")
            known = part.num_samples > 0 and len(part.sample_digests) == part.num_samples
            require(
                known, "merge", "parts", "come from clado.profile", f"one of {len(part.sample_digests)} known samples"
            )
            _check_rounding(part.provenance.rounding, first.provenance.rounding)
            for name in ("weights", "settings"):
                same = part.fingerprint.get(name) == first.fingerprint.get(name)
                require(same, "merge", "parts", f"be of the same {name}", "others")
            alone = not part.provenance.corrected_pairs
            require(alone, "merge", "parts", "be merged before clado.correct, not after", "corrected pairs")
        digests = np.concatenate([part.sample_digests for part in parts])
        shared = sum(len(np.unique(part.sample_digests)) for part in parts) - len(np.unique(digests))
        require(shared == 0, "merge", "parts", "be of disjoint samples", f"{shared} samples in common")
        total = len(digests)
        counts = np.array([part.num_samples for part in parts], np.float64)[:, None, None]
        means = np.stack([part._mean for part in parts])
        mean = (means * counts).sum(0) / total
        deviation = (np.stack([part._deviation for part in parts]) + counts * (means - mean) ** 2).sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            stderr = np.sqrt(deviation / (total - 1.0) / total) if total > 1 else np.full_like(mean, np.nan)
        stderr[first.candidates.same_layer & ~np.eye(len(stderr), dtype=bool)] = 0.0
        loss = np.diag(mean).copy()
        np.fill_diagonal(mean, 0.0)
        work = sum(part.notes.get("forward_equivalents", 0.0) * part.num_samples for part in parts) / total
        notes = {
            **first.notes,
            "forward_equivalents": work,
            "seconds": sum(part.notes.get("seconds", 0.0) for part in parts),
            "warnings": list(dict.fromkeys(w for part in parts for w in part.notes.get("warnings", []))),
            "merged": [part.num_samples for part in parts],
        }
        if any(OPTIMISM in part.notes for part in parts):
            factors = optimism_of(first.candidates, first.rounded, digests)
            notes[OPTIMISM] = optimism_in_words(first.candidates, factors)
        dropped = tuple(dict.fromkeys(pair for part in parts for pair in part.provenance.dropped))
        return replace(
            first,
            delta_loss=loss,
            interaction=mean,
            stderr=stderr,
            num_samples=total,
            provenance=replace(first.provenance, dropped=dropped, stability=None),
            notes=notes,
            fingerprint={**first.fingerprint, "data": data_digest(digests)},
            sample_digests=digests,
        )

    @property
    def _mean(self) -> NDArray[np.float64]:
        """``[V, V]``: ΔL on the diagonal, Ω off it."""
        mean: NDArray[np.float64] = self.interaction.copy()
        np.fill_diagonal(mean, self.delta_loss)
        return mean

    @property
    def _deviation(self) -> NDArray[np.float64]:
        """``[V, V]``: squared deviations from :attr:`_mean`, summed over samples."""
        count = self.num_samples
        return np.zeros_like(self.stderr) if count == 1 else self.stderr**2 * (count * (count - 1.0))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``path`` (a file, or a run directory) whole or not at all; returns the file."""
        from safetensors.numpy import save

        target = _file(path)
        with refused(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        save_held(self.held, target.parent)
        header = {
            "schema": SCHEMA,
            "layers": [asdict(layer) for layer in self.layers],
            "schemes": [[scheme.label for scheme in schemes] for schemes in self.candidates.schemes],
            "num_samples": self.num_samples,
            "quantizer": self.quantizer.to_json(),
            "provenance": self.provenance.to_json(),
            "notes": self.notes,
            "fingerprint": self.fingerprint,
            "activations": self.activations.to_json() if self.activations else {},
        }
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in _TENSORS}
        with atomic_file(target) as temporary:
            temporary.write_bytes(save(tensors, {"clado.sensitivity": json.dumps(header)}))
        return target

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Sensitivity:
        """Read a file or a run directory.

        Raises:
            CladoError: missing, truncated, foreign or of another schema.
        """
        from safetensors import SafetensorError

        with refused(Path(path), "be readable"):
            source = _file(path)
            require(source.is_file(), "load", "path", "be a sensitivity file or a run directory that holds one", source)
        try:
            metadata, tensors = read_safetensors(source)
            header = json.loads(metadata.get("clado.sensitivity", "null"))
            require(isinstance(header, dict), "load", "path", "be a clado sensitivity file", source)
            schema = header.get("schema")
            require(schema in (1, 2, SCHEMA), "load", "schema", f"be 1 to {SCHEMA}", schema)
            header = _of_schema_1(header) if schema == 1 else header
            arrays = {name: tensors[name].numpy() for name in _TENSORS if name in tensors}
            layers = tuple(Layer.from_json(item, "load", "sensitivity file") for item in header["layers"])
            provenance = Provenance.from_json(header["provenance"])
            return Sensitivity(
                _candidates(layers, header["schemes"]),
                **arrays,
                num_samples=header["num_samples"],
                quantizer=Quantizer(**header["quantizer"]),
                provenance=provenance,
                notes=header["notes"],
                fingerprint=header["fingerprint"],
                activations=ActivationRanges.from_json(header["activations"]),
                held=None if provenance.rounding is None else RoundedFile(source.parent, provenance.rounding),
            )
        except CladoError:
            raise
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            raise CladoError(f"load: path must be a whole clado sensitivity file, got {source} ({error})") from None


def _bits_of(scheme: Scheme, label: str) -> int | str:
    """Bits where they say it all, else the label."""
    return scheme.bits if scheme.plain else label


def _check_rounding(own: RoundedBy | None, first: RoundedBy | None) -> None:
    """Raise unless a part has the weights of the first one."""
    how = "rounded_as, or --rounded-as, of" if first is not None else "rounding nearest, or --rounding nearest, as"
    must = f"have the same rounded weights (profile the later ones with {how} the first)"
    shown = ["nearest rounding" if by is None else str(by) for by in (own, first)]
    got = "others" if shown[0] == shown[1] else f"{shown[0]} after {shown[1]}"
    require(own == first, "merge", "parts", must, got)


def _candidates(layers: tuple[Layer, ...], schemes: Any) -> Candidates:
    """From one list of schemes, {pattern: schemes}, or a list for each layer."""
    nested = len(schemes) > 0 and all(isinstance(item, (list, tuple)) for item in schemes)
    if isinstance(schemes, Mapping) or not nested:
        return candidates_of(layers, schemes)
    return Candidates(layers, tuple(tuple(map(Scheme.of, own)) for own in schemes))


def _of_schema_1(header: dict[str, Any]) -> dict[str, Any]:
    """A header of schema 1 as one of schema 2: the same integer widths for every layer, all in ``info``."""
    activations = header.get("activations", {})
    inputs = activations["bits"] if activations else KEPT
    labels = [Scheme.of(bits, inputs).label for bits in header["bits"]]
    info = dict(header["info"])
    known = {name: info.pop(name, None) for name in ("estimator", "loss", "precision")}
    dropped = [[layer, Scheme.of(bits, inputs).label] for layer, bits in info.pop("dropped", [])]
    lists = {"float_layers": info.pop("float_layers", {}), "corrected_pairs": info.pop("corrected_pairs", [])}
    return {
        **header,
        "schemes": [labels] * len(header["layers"]),
        "provenance": {**known, **lists, "dropped": dropped},
        "notes": info,
        "activations": activations,
    }


def _file(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    return target / MATRIX_FILE if os.path.isdir(target) or not target.suffix else target
