"""Weights that are rounded with the help of data, before they are measured: one clean pass over the first samples of the set.

What comes out is kept: a run that goes on, is prolonged or is merged has the weights of the samples they were made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ..artifacts import Sensitivity, read_rounded, rounded_name, save_held
from ..common import CladoError, progress_bar, require, weights_digest
from ..graph import Runner, Use
from ..quant import ROUNDINGS, Candidates, Quantizer, Rounded, optimism, round_weights
from .checkpoint import recorded
from .distributed import Ranks
from .options import Options
from .reader import Reader, all_finite
from .samples import SampleStream, sample_digests

MOMENT_SAMPLES, TOGETHER = 1024, 16  # samples at most; of a pass: sums depend on it in their last bits


def needs_moments(rounding: str | None) -> bool:
    return rounding is not None and ROUNDINGS[rounding].needs_moments


def moment_stream(stream: SampleStream, options: Options) -> SampleStream:
    """The samples that decide the rounding: those of ``moment_data``, where there is any, else the run's own."""
    if options.moment_data is None:
        return stream
    count = options.moment_samples or MOMENT_SAMPLES
    found = SampleStream(options.moment_data, count, options.seed, "moment_data", stream)
    found.peek()
    return found


def held_already(model: nn.Module, candidates: Candidates, options: Options, known: dict[str, Any]) -> Rounded | None:
    """The weights of the run that ``rounded_as`` names, or those that an earlier call of this run kept; None: to be made.

    Args:
        known: settings of the run that ``output_dir`` holds.

    Raises:
        CladoError: they are missing, damaged, or those of another model or other options.
    """
    if options.rounded_as is not None:
        others = _of_run(options.rounded_as, model, candidates, options)
        return replace(others, optimism={}) if options.cross_validated is False else others
    found = _kept_in(options.output_dir, known.get("rounded"))
    same = found is not None and options.moment_samples in (None, len(found.sample_digests))
    if not same or found is None:
        return None
    began, asked = bool(found.optimism), options.cross_validated
    must = "be as the run in output_dir began"
    require(asked in (None, began), "profile", "cross_validated", must, f"{asked} after {began}")
    return found


def halved_at(samples: int, options: Options) -> int:
    """Where the samples that decide are halved to cross-validate their weights, between two passes; 0: they are not.

    Raises:
        CladoError: it was asked for, and they are too few.
    """
    asked, enough = options.cross_validated, samples >= 2 * TOGETHER
    require(enough or not asked, "profile", "cross_validated", f"have {2 * TOGETHER} samples at least", samples)
    wanted = asked is not False and options.moment_data is None
    return samples // (2 * TOGETHER) * TOGETHER if wanted and enough else 0


def _of_run(folder: Path, model: nn.Module, candidates: Candidates, options: Options) -> Rounded:
    """The rounded weights of another run's directory, which may still be under way."""
    found = _kept_in(folder, recorded(folder).get("rounded"))
    found = found or Sensitivity.load(folder).rounded
    if found is None:
        must = "be a run whose weights were rounded by data"
        raise CladoError(f"profile: rounded_as must {must}, got {folder}, whose were rounded to the nearest code")
    must = "be a run of the same"
    lacking = [
        f"no {scheme.label} of {layer.name}"
        for layer, scheme in candidates.pairs
        if not found.has(layer.name, scheme.number)
    ]
    for what, same, other in (
        ("model", found.weights == weights_digest(model), "other weights"),
        ("rounding", found.rounding == options.rounding, found.rounding),
        ("quantizer", found.quantizer == options.quantizer, found.quantizer),
        ("candidates", not lacking, lacking[:1]),
    ):
        require(same, "profile", "rounded_as", f"{must} {what}", f"{folder}, which has {other}")
    return found


def _kept_in(folder: Path | None, digest: str | None) -> Rounded | None:
    """The weights that an interrupted run, or a finished one, has in its directory; None where there are none."""
    path = None if folder is None or digest is None else folder / rounded_name(digest)
    return None if path is None or not path.exists() else read_rounded(path)


def made_from(
    model: nn.Module,
    runner: Runner,
    candidates: Candidates,
    stream: SampleStream,
    reader: Reader,
    options: Options,
    samples: int,
    cut: int,
    verbose: bool,
) -> Rounded:
    """The weights of all candidates, rounded on the moments of the first samples, and how optimistic losses of these are, found
    with two halves that part at ``cut``, where that is not 0; on every rank the same.

    Every rank reads all these samples and keeps the moments of its share of the layers: sums do not depend on how many ranks
    there are, and no rank holds all.

    Raises:
        CladoError: moments that are not finite, data that fails, labels that are no classes.
    """
    ranks = Ranks(reader.device)
    mine = shares(candidates, ranks.world)[ranks.rank]
    moments, early, digests = second_moments(runner, stream, reader, samples, mine, verbose, cut)
    own = Candidates(tuple(candidates.layers[k] for k in mine), tuple(candidates.schemes[k] for k in mine))
    steps = (3 if cut else 1) * len(mine)
    with progress_bar("round", steps, "layers", verbose) as show:
        count = iter(range(1, steps + 1))

        def rounded(moments: dict[str, Tensor], digests: Tensor) -> Rounded:
            how = options.quantizer, str(options.rounding)
            return round_weights(model, own, *how, moments, digests, lambda: show(next(count)))

        found = rounded(moments, digests)
        if cut:
            for name, total in moments.items():  # what the second half added
                total -= early[name]
                total.diagonal(dim1=1, dim2=2).clamp_(min=0.0)
            halves = (early, rounded(early, digests[:cut])), (moments, rounded(moments, digests[cut:]))
            found = replace(found, optimism=optimism(model, own, *halves))
    return found if ranks.world == 1 else _joined(found, ranks)


def shares(candidates: Candidates, world: int) -> list[list[int]]:
    """The layers whose moments each rank keeps, the largest first dealt in turn; every rank has one at least."""
    sizes = [layer.numel // layer.shape[0] for layer in candidates.layers]
    order = sorted(range(len(sizes)), key=lambda k: -sizes[k])
    return [sorted(order[rank::world]) or [order[0]] for rank in range(world)]


def second_moments(
    runner: Runner,
    stream: SampleStream,
    reader: Reader,
    samples: int,
    layers: Sequence[int],
    verbose: bool,
    cut: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """{layer: Σ x xᵀ ``[G, K, K]``} over the first samples and over those before ``cut``, and digests of all."""
    totals: dict[int, Tensor] = {}
    early: dict[int, Tensor] = {}
    wanted, digests, broken = set(layers), [], ""

    def see(layer: int, use: Use, x: Tensor) -> None:
        if layer in wanted:
            if layer not in totals:
                groups, inputs = use.sides
                totals[layer] = x.new_zeros(groups, inputs, inputs)
            use.add_moments(x, totals[layer])

    with progress_bar("moments", samples, "samples", verbose) as show:
        done = 0
        for part in stream.early(samples, TOGETHER):
            inputs = reader.checked(part)
            digests.append(sample_digests(part))
            runner.inputs(reader.moved(inputs), see)
            first, done = done, done + len(digests[-1])
            if not broken and not all_finite(inputs):
                broken = f"NaN or infinity among samples {first}..{done - 1}"
            show(done)
            if done == cut:
                early = {k: total.clone() for k, total in totals.items()}
    finite = not broken or all(bool(torch.isfinite(total).all()) for total in totals.values())
    require(finite, "profile", stream.name, "yield finite numbers", broken)
    named, before = ({runner.layers[k].name: total for k, total in own.items()} for own in (totals, early))
    return named, before, torch.cat(digests)


@dataclass(frozen=True)
class MomentWork:
    """What moments take before a run.

    Attributes:
        samples: how many they are of.
        forwards: of a sample, in forward-equivalents.
        nbytes: of all layers' moments.
    """

    samples: int
    forwards: float
    nbytes: int

    @staticmethod
    def of(runner: Runner, example: Any, samples: int, itemsize: int, validated: bool) -> MomentWork:
        """Found by a pass over two samples that are not summed; ``itemsize`` of the dtype that they are measured in; where they
        are ``validated``, those of half of the samples are kept beside."""
        sides: dict[int, tuple[int, int]] = {}
        runner.inputs(example, lambda layer, use, x: sides.update({layer: use.sides}))
        runner.work = 0.0
        layers = runner.layers
        forward = sum(layer.macs for layer in layers)
        products = sum(layers[k].macs * groups * inputs / layers[k].shape[0] for k, (groups, inputs) in sides.items())
        nbytes = (2 if validated else 1) * sum(groups * inputs**2 * itemsize for groups, inputs in sides.values())
        return MomentWork(samples, runner.forward_share * (1 + products / forward), nbytes)


def kept_bytes(candidates: Candidates, quantizer: Quantizer, samples: int) -> int:
    """Of the file of all candidates' weights, at most: a few hundred bytes of header for each of its tensors."""
    tensors = sum(len(scheme.number.stored(layer.shape, quantizer)) for layer, scheme in candidates.pairs)
    names = max(len(layer.name) for layer in candidates.layers)
    return int(candidates.stored_bytes(quantizer).sum()) + 8 * samples + (tensors + 8) * (names + 192)


def _joined(own: Rounded, ranks: Ranks) -> Rounded:
    """The parts of all ranks, which travel as files do."""
    with TemporaryDirectory() as folder:
        sent = save_held(own, Path(folder))
        assert sent is not None
        parts, place = [], Path(folder) / "part"
        for data in ranks.everyone(sent.read_bytes()):
            place.write_bytes(data)
            parts.append(read_rounded(place))
    return replace(
        own,
        shapes={name: shape for part in parts for name, shape in part.shapes.items()},
        packed={key: held for part in parts for key, held in part.packed.items()},
        damped={name: share for part in parts for name, share in part.damped.items()},
        dead={name: count for part in parts for name, count in part.dead.items()},
        optimism={name: own for part in parts for name, own in part.optimism.items()},
    )
