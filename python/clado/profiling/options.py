"""The arguments of a profile: nothing else lists them, and reading them needs no torch."""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..common import Arguments, Check, Line, argument, number_list, one_of, require

if TYPE_CHECKING:
    import torch

    from ..graph import ForwardStep
    from ..quant import Candidates, Layer, Quantizer, Scheme
    from .losses import LossChoice, LossFunc

WIDTHS = (2, 4, 8)  # where neither bits nor schemes are given
NEAREST, ROUNDING = "nearest", "compensated"  # what runs have that name none, and what is taken where none is asked for


OLD_NAMES = {"logit": "additive"}  # of estimators, as runs and scripts may still have them


def _estimators() -> tuple[str, ...]:
    from .estimators import ESTIMATORS

    return tuple(ESTIMATORS)


def _estimator(name: Any) -> Any:
    return OLD_NAMES.get(name, name) if isinstance(name, str) else name


def _roundings() -> tuple[str, ...]:
    from ..quant import ROUNDINGS

    return tuple(ROUNDINGS)


def _precisions() -> tuple[str, ...]:
    from ..graph import PRECISIONS

    return (*PRECISIONS, "auto")


def _usable(device: Any) -> bool:
    from ..common import usable

    return usable(device)


def _must_be_usable() -> str:
    from ..common import USABLE

    return USABLE


def _torch_device(device: Any) -> torch.device:
    import torch

    return torch.device(device)


def _whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, numbers.Integral) and least <= int(value) <= most


def _listed(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str)


def _patterns(schemes: Any) -> dict[str, tuple[str, ...]]:
    """{pattern: labels} of what :func:`profile` takes as ``schemes``."""
    from ..quant import INPUTS, Scheme

    kept = {}
    for pattern, given in (schemes if isinstance(schemes, Mapping) else {"*": schemes}).items():
        require(_listed(given), "profile", "schemes", "hold lists of labels such as W4A16", repr(given))
        found = sorted(Scheme.of(scheme) for scheme in given)
        labels = tuple(scheme.label for scheme in found)
        require(0 < len(set(found)) == len(found), "profile", "schemes", "be distinct, at least one of a layer", labels)
        odd = [scheme.label for scheme in found if scheme.input and not 2 <= INPUTS[scheme.input].bits <= 8]
        require(not odd, "profile", "schemes", "round inputs to 2..8 bits, or not at all (A16)", ", ".join(odd))
        kept[str(pattern)] = labels
    require(len(kept) > 0, "profile", "schemes", "hold a list of labels at least", "none")
    return kept


def _positive(value: Any) -> bool:
    return isinstance(value, numbers.Real) and 0 < float(value) < math.inf


COUNT = Check(lambda value: _whole(value, 1, 2**63 - 1), "be a whole number from 1 up", str)


@dataclass(frozen=True)
class Options(Arguments):
    """The arguments of :func:`profile`, checked."""

    op: ClassVar[str] = "profile"

    bits: tuple[int, ...] = argument(
        None,
        "candidate bit-widths of every layer, each in 2..8; None: 2, 4 and 8, unless ``schemes`` are given.",
        Line("--bits", "widths", "Candidate widths; 2,4,8 when left out."),
        check=Check(lambda value: isinstance(value, Iterable), "be a sequence of widths", str),
        kept=lambda value: tuple(sorted(value)),
        takes="Sequence[int] | None",
        setting="bits",
    )
    _: KW_ONLY
    schemes: dict[str, tuple[str, ...]] | None = argument(
        None,
        "instead of ``bits``: labels such as ``W4A16``, ``W8A8`` or ``FP8`` (docs/howto/schemes.md has all), or {pattern: "
        "labels} for layers whose lists differ; the first fnmatch pattern that fits a layer's name counts, and every layer needs "
        "one. What a scheme makes of its layer's input is part of the candidate: the matrix holds the loss of rounding inputs, "
        "and its interactions.",
        Line(
            "--schemes",
            "schemes",
            "Instead of --bits: candidate schemes, such as W2A16,W4A8,FP8; or PATTERN=LABELS for the layers that fit, repeated.",
        ),
        check=Check(_listed, "be labels such as W4A16, or {pattern: labels}"),
        kept=_patterns,
        takes="Sequence[str] | Mapping[str, Sequence[str]] | None",
        setting="schemes",
    )
    estimator: str = argument(
        "additive",
        '"additive" (all interactions from single perturbations, as if changes of the output added: in closed form under the '
        'named losses; its old name "logit" is the same), "exact" (every pair by a forward: the paper), "diagonal" '
        '(no interactions), "gradient" (the upstream layer perturbed, the downstream one linearised: one backward per '
        'candidate), "corrected" (additive on all samples, and the exact residual on ``exact_samples`` of them).',
        Line("--estimator", "text", "additive (or logit), gradient, corrected, exact, diagonal."),
        check=Check(lambda name: _estimator(name) in _estimators(), lambda: f"be one of {', '.join(_estimators())}"),
        kept=_estimator,
        setting="estimator",
    )
    loss: Any = argument(  # checked beside loss_func, in whose presence it is "user"
        "kl",
        '"kl" to the float model\'s outputs (needs no targets), "cross_entropy" (the paper), "bce" (logits of yes and no), '
        '"mse", "smooth_l1" (½ e² of errors up to 1, |e| − ½ beyond) or "cosine"; {key: name} or {key: (name, weight)} '
        "for several outputs, found by key, name or place; or an object with ``increase(z, delta)``, ``[S, N]`` of changes "
        "``[S, N, …]``, and ``pairs(z, delta)``, the sums over samples of interactions and of their squares, ``[S, S]`` each (or "
        "a function of the batch that gives such an object). A sample's loss is its mean over positions or values. Outputs "
        "other than ``[N, C]`` need one that is named with them in mind.",
        Line(
            "--loss", "loss", "kl, cross_entropy, bce, mse, smooth_l1, cosine, or for several outputs a=kl,b=0.5*mse."
        ),
        takes="str | Mapping[str, Any] | Any",
        setting="loss",
    )
    loss_dim: int | None = argument(
        None,
        'dimension of the output that holds the classes ("kl", "cross_entropy") or a feature ("cosine"), counted with the '
        "samples as dimension 0. None: 1 for ``[N, C]``, and where targets leave no choice.",
        Line("--loss-dim", "whole", "Dimension of the output that holds the classes, 1 in [N, C, H, W]."),
        check=Check(lambda value: _whole(value, -64, 64), "be a dimension", str),
        kept=operator.index,
    )
    loss_against: str | None = argument(
        None,
        'what the loss compares with: "targets" of the batch, or "outputs" of the float model. None: targets where the batch has '
        "some, except for the KL.",
        Line("--loss-against", "text", "targets, or outputs of the float model; targets where there are some."),
        check=Check(lambda value: value in ("outputs", "targets"), "be outputs or targets"),
    )
    ignore_index: int = argument(
        -100,
        "targets that count nothing, as of pixels that nobody labelled.",
        Line("--ignore-index", "whole", "Targets that count nothing."),
        check=Check(lambda value: _whole(value, -(2**63), 2**63 - 1), "be a whole number", str),
        kept=operator.index,
    )
    class_weights: Sequence[float] | None = argument(
        None,
        "of the cross-entropy with labels: a position's loss is multiplied by the number of its label's class (and divided by "
        "how many positions count, not by the sum of these numbers).",
        Line("--class-weights", "numbers", "What each class counts in the cross-entropy, such as 1,1,2.5."),
        check=Check(lambda value: number_list(value) is not None, "be a sequence of numbers"),
        kept=number_list,
    )
    positions: int | None = argument(
        None,
        "of a large output at most so many positions (values, where the loss takes each by itself) are looked at, others for "
        "every sample, drawn by its content. Standard errors count what that adds to the noise.",
        Line("--positions", "count", "Look at so many random positions of every image, where outputs are large."),
        check=COUNT,
        kept=operator.index,
    )
    loss_func: LossFunc | None = argument(
        None,
        "instead of ``loss``, ``loss_func(output, batch)``: a loss per sample ``[n]``, or the batch's mean (then called sample "
        "by sample); for models of any output. Additive interactions are those of the function on outputs that are added up, or "
        "by Gauss–Newton where that would cost more than the forwards. Differentiable in the output for "
        '"gradient", twice for Gauss–Newton.',
        Line("--loss-func", "function", "Instead of --loss: your function(output, batch), a loss per sample."),
        setting="loss",
    )
    forward_step: ForwardStep | None = argument(
        None,
        "``forward_step(model, batch)`` runs the model; None: ``model(inputs)``.",
        Line("--forward-step", "function", "Your function(model, batch) that runs the model on a batch."),
        setting="forward_step",
    )
    precision: str = argument(
        "float32",
        '"float32" (TF32 off), "float64", or with the differences to the clean forward carried through the graph '
        '(docs/numerics.md) "tf32" or "bfloat16" matrix products. The latter are probed against float64 on a few layers and '
        'samples; the errors are in ``info["probe"]``, and where they exceed the sampling noise the run is float32, with a '
        'warning. "auto" takes bfloat16 for "additive" and "diagonal" where the device has matrix units for it (measured: 1.9 '
        "times float32 on a Xeon with AMX), else float32. Losses and sums are float64 always.",
        Line("--precision", "text", "float32, tf32, bfloat16, float64 or auto."),
        check=one_of(_precisions),
        setting="precision",
    )
    num_samples: int = argument(
        1024,
        "how many samples of the loader to use; fewer are taken, with a warning, when it ends early.",
        Line("--nsamples", "count", "Images of the sensitivity set; ask for more later.", default=512),
        check=COUNT,
        kept=operator.index,
    )
    until_stable: float | None = argument(
        None,
        "end before ``num_samples`` where more samples would hardly change the plans: when two checks in a row find those of "
        "``avg_bits`` to be, for all the noise tells, at most this share of their predicted loss increase off the best (two "
        "standard errors; 0.1: 10 %). Checks are made at 8, 12, 16, 24, 32, … chunks, of 64 samples or more; chunks are a 64th "
        "of ``num_samples`` at most, where ``batch_size`` is not given. Samples must come in random order. To be given from the "
        "first sample of a run on; prolonged, it may have another share, or none.",
        Line("--until-stable", "share", "End once the plans of --avg-bits are so near the best; 0.1 without a number."),
        check=Check(lambda value: _positive(value) and value < 1, "lie between 0 and 1"),
        kept=float,
    )
    avg_bits: tuple[float, ...] | None = argument(
        None,
        "of the plans that ``until_stable`` looks at; None: an eighth, a quarter and half of the way from the least to the most "
        "average bits of the candidates.",
        Line("--avg-bits", "numbers", "Of the plans that --until-stable looks at, separated by commas."),
        check=Check(
            lambda value: _listed(value) and bool(value) and all(map(_positive, value)), "hold positive numbers"
        ),
        kept=lambda value: tuple(sorted({float(bits) for bits in value})),
        takes="Sequence[float] | None",
    )
    exact_samples: int | None = argument(
        None,
        'for "corrected": samples (rounded up to whole chunks) on which every pair is evaluated; None: an eighth.',
        "an eighth serves; `clado solve --correct` pays for the pairs that a plan takes",
        check=COUNT,
        kept=operator.index,
        setting="exact_samples",
    )
    group_size: int = argument(  # this one and the next two are checked by the quantizer that they make
        -1,
        "-1 one scale per output channel, 0 one per tensor, g > 0 one per g inputs.",
        Line("--group-size", "group", "-1 per channel, 0 per tensor, g inputs per scale."),
        setting="quantizer",
    )
    scale_steps: int = argument(
        95,
        "shrink factors tried per scale (95: the paper's code; 1: absmax).",
        "the paper's number serves",
        setting="quantizer",
    )
    symmetric: bool = argument(
        True,
        "codes are steps around zero; False adds a zero point to every scale.",
        Line("--asymmetric", "unless", "A zero point with every scale."),
        setting="quantizer",
    )
    rounding: str | None = argument(
        None,
        '"compensated" (every column of a weight makes up for the errors of those before it, by the second moments of the '
        'layer\'s input on the first ``moment_samples``; GPTQ, arXiv 2210.17323), or "nearest" (every weight by itself, as in '
        "the paper). The weights that all these samples decide are kept with the matrix, and are those that every later stage "
        'applies and exports. None: "compensated", or what the run in ``output_dir`` began with.',
        Line("--rounding", "text", "How weights are rounded, compensated or nearest; compensated when left out."),
        check=one_of(_roundings),
    )
    moment_samples: int | None = argument(
        None,
        "samples whose second moments decide the rounding, read before the run: the first of ``data_loader``, or of "
        "``moment_data``; None: all, 1,024 at most, or as many as an interrupted run in ``output_dir``. With more samples later "
        "the weights stay those of the first ones.",
        Line("--moment-samples", "count", "Images that decide the rounding; all, at most 1,024, when left out."),
        check=COUNT,
        kept=operator.index,
    )
    moment_data: Iterable[Any] | None = argument(
        None,
        "batches like those of ``data_loader``, whose samples decide the rounding instead of its first ones. Weights fit what "
        "they were rounded for better than anything else, and losses measured there are too low, of some layers more than of "
        "others; losses of other samples make better plans (docs/evidence.md).",
        "the command corrects losses instead, by --cross-validated",
    )
    cross_validated: bool | None = argument(
        None,
        "multiply losses of samples that decided the rounding by how much larger each weight's layer loss is on samples that did "
        "not (two halves, each rounded for by itself and tried on the other; no forward more). None: as the run in "
        "``output_dir`` or ``rounded_as`` began, else wherever it rounds by 32 samples or more of its own.",
        Line(
            "--cross-validated/--no-cross-validated",
            "either",
            "Correct losses for the images that weights were rounded by; so from 32 images on when left out.",
        ),
        check=Check(lambda value: isinstance(value, bool), "be True or False"),
    )
    rounded_as: Path | None = argument(
        None,
        "run directory whose rounded weights are measured, instead of making them from these samples: so runs over different "
        "samples can be merged. That run may still be under way.",
        Line("--rounded-as", "folder", "Measure the rounded weights of this run, so that both can be merged."),
        check=Check(lambda value: isinstance(value, (str, os.PathLike)) and str(value) != "", "be a folder"),
        kept=Path,
        takes="str | os.PathLike[str] | None",
    )
    act_bits: int | None = argument(
        None,
        "also round the inputs of all layers to so many bits, on per-tensor asymmetric ranges calibrated on the first "
        "``act_samples``; the loss is then measured from the float weights under rounded inputs, and what rounding the inputs "
        "costs is in no entry (``schemes`` such as W4A8 have it in). None: weights only.",
        Line("--act-bits", "count", "Also round the layers' inputs, to so many bits; weights only when left out."),
        check=Check(lambda value: _whole(value, 2, 8), "be None or lie in 2..8", str),
        kept=operator.index,
        setting="act_bits",
    )
    act_samples: int | None = argument(
        None,
        "samples that calibrate the ranges, read before the run; None: all, 1,024 at most (the paper's number), or as many as an "
        "interrupted run in ``output_dir``.",
        Line(
            "--act-samples",
            "count",
            "Images that calibrate the ranges of inputs; all, at most 1,024, when left out.",
        ),
        check=COUNT,
        kept=operator.index,
        setting="act_samples",
    )
    ignore: tuple[str, ...] = argument(
        (),
        "layers to keep in float: fnmatch patterns, or regular expressions after ``re:``.",
        Line("--ignore", "several", "Layers to keep in float: pattern, or re:regex. May be repeated."),
        check=Check(_listed, "be a sequence of patterns"),
        kept=tuple,
        takes="Sequence[str]",
    )
    quantize_ends: bool = argument(
        False,
        "also quantize a first convolution and the classifier.",
        Line("--quantize-ends", "switch", "Also quantize the first convolution and the classifier."),
    )
    batch_size: int | None = argument(
        None,
        "samples of a chunk: they are measured together and kept together; None chooses by the size of the activations, or what "
        "an interrupted run in ``output_dir`` chose.",
        Line("--batch-size", "count", "Samples of a chunk, the unit that is kept; chosen when left out."),
        check=COUNT,
        kept=operator.index,
        setting="batch_size",
    )
    max_memory: int | None = argument(
        None,
        "bytes of weights, variants and live values on the device that must not be exceeded: fewer samples, and then fewer "
        "perturbations, advance together. None: what is free on a GPU. A chunk that runs out of memory all the same is measured "
        "again in halves. On a CPU freed memory is then returned to the system at once, so that the process keeps to it; without "
        "a cap it may grow by a few times its live values.",
        Line("--max-memory", "GiB", "GiB of weights, their variants and live values that must not be exceeded."),
        check=COUNT,
        kept=operator.index,
    )
    device: torch.device | None = argument(
        None,
        "where to run; None: where the model is.",
        Line("--device", "text", "cpu or cuda; where the model is when left out."),
        check=Check(_usable, _must_be_usable, str),
        kept=_torch_device,
        takes="str | torch.device | None",
        setting="device",
    )
    seed: int = argument(
        0,
        "fixes torch's generator while ``data_loader`` is read, so that a shuffling loader gives the same samples.",
        Line("--seed", "seed", "Which images come first."),
        check=Check(lambda value: _whole(value, -(2**63), 2**64 - 1), "be a whole number of 64 bits", str),
        kept=operator.index,
    )
    output_dir: Path | None = argument(
        None,
        "run directory; the result is saved there, chunk by chunk: the same call after an interruption goes on to the same bits, "
        "after the end it loads the result. A directory of another run is refused.",
        Line("--output-dir", "folder", "Run directory to write, or to go on with.", required=True),
        check=Check(lambda value: isinstance(value, (str, os.PathLike)) and str(value) != "", "be a folder"),
        kept=Path,
        takes="str | os.PathLike[str] | None",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_candidates()
        self._check_loss()
        self._check_precision()
        self._check_rounding()
        self._check_stable()
        _ = self.quantizer  # refuses what it cannot be

    def _check_candidates(self) -> None:
        """Either bits or schemes; what is given as neither holds no bits."""
        from ..quant import check_bits

        if self.schemes is None:
            object.__setattr__(self, "bits", WIDTHS if self.bits is None else self.bits)
            check_bits(self.bits)
            return
        object.__setattr__(self, "bits", self.bits or ())
        require(not self.bits, "profile", "bits", "be left out with schemes", self.bits)
        require(
            self.act_bits is None, "profile", "act_bits", "be left out with schemes (it goes with bits)", self.act_bits
        )

    def _check_loss(self) -> None:
        if self.loss_func is not None:
            object.__setattr__(self, "loss", "user")
        _ = self.loss_choice

    @property
    def loss_choice(self) -> LossChoice:
        """Which loss."""
        from .losses import LossChoice

        how = (self.loss_dim, self.loss_against, self.ignore_index, self.class_weights, self.positions)
        return LossChoice(self.loss, self.loss_func, *how, op=self.op)

    def _check_precision(self) -> None:
        from ..graph import LOW_PRECISIONS
        from .estimators import ESTIMATORS

        must = "be float32 or float64 for the gradient estimator (a backward carries no differences)"
        carries = ESTIMATORS[self.estimator].carries or self.precision not in LOW_PRECISIONS
        require(carries, "profile", "precision", must, repr(self.precision))

    def _check_rounding(self) -> None:
        from ..quant import ROUNDINGS

        if self.rounding is not None and not ROUNDINGS[self.rounding].needs_moments:
            for name in ("moment_samples", *self._decided_by):
                given = getattr(self, name)
                shown = type(given).__name__ if name == "moment_data" else given
                require(given is None, "profile", name, f"be left out with {self.rounding} rounding", shown)
        one, *others = self._decided_by or [""]
        require(not others, "profile", one, f"be left out with {', '.join(others)}", "both")

    @property
    def _decided_by(self) -> list[str]:
        """What was asked for that says which samples decide the weights, or asks something of them."""
        asked = {
            "moment_data": self.moment_data,
            "cross_validated": self.cross_validated or None,
            "rounded_as": self.rounded_as,
        }
        return [name for name, given in asked.items() if given is not None]

    def _check_stable(self) -> None:
        from .estimators import ESTIMATORS

        if self.until_stable is None:
            must = "be left out without until_stable"
            require(self.avg_bits is None, "profile", "avg_bits", must, self.avg_bits)
            return
        usable = [name for name, known in ESTIMATORS.items() if not known.residual]
        must = f"be one of {', '.join(usable)} with until_stable (exact pairs of the first samples alone say nothing of more)"
        require(self.estimator in usable, "profile", "estimator", must, self.estimator)

    def of_run(self, known: dict[str, Any]) -> Options:
        """With the rounding that a run has: as asked for, else as it began with, else the one that serves best.

        ``known``: settings of the run that ``output_dir`` holds, empty without one.
        """
        began = known.get("rounding", NEAREST) if known else ROUNDING
        asked = self.moment_samples is not None or len(self._decided_by) > 0
        return replace(self, rounding=self.rounding or (ROUNDING if asked else began))

    @property
    def quantizer(self) -> Quantizer:
        """How the weights are quantized."""
        from ..quant import Quantizer

        return Quantizer(self.group_size, self.scale_steps, self.symmetric)

    @property
    def functions(self) -> dict[str, Any]:
        """The user's own functions, and an object that is the loss, by argument."""
        own = {"forward_step": self.forward_step, "loss_func": self.loss_func}
        if self.loss_func is None and not self.loss_choice.named:
            own["loss"] = self.loss
        return {name: function for name, function in own.items() if function is not None}

    def _loss_setting(self) -> Any:
        """The name of the loss, or a digest of the user's code."""
        from ..common import code_digest, digest

        if self.loss_func is not None:
            return code_digest(self.loss_func)
        choice = self.loss_choice
        if choice.named:
            return choice.name
        kind = type(self.loss)
        own = [code_digest(getattr(kind, name, None)) for name in ("increase", "pairs", "__call__")]
        return code_digest(self.loss) if hasattr(self.loss, "__code__") else f"{kind.__qualname__} {digest(own)[:16]}"

    def candidates(self, layers: Sequence[Layer]) -> Candidates:
        """What is measured on these layers.

        Raises:
            CladoError: ``schemes`` without a pattern for one of them, or with one for none.
        """
        from ..quant import Candidates, candidates_of

        same = self._of_every_layer()
        return candidates_of(layers, self.schemes or {}) if same is None else Candidates.uniform(layers, same)

    @property
    def rounds_inputs(self) -> bool:
        """Whether some candidate rounds its layer's input, as its scheme says."""
        from ..quant import Scheme

        return any(Scheme.of(label).input for labels in (self.schemes or {}).values() for label in labels)

    def _of_every_layer(self) -> list[Scheme] | None:
        """The schemes that all layers have, None where their lists may differ."""
        from ..quant import KEPT, Scheme

        if self.schemes is None:
            return [Scheme.of(bits, self.act_bits or KEPT) for bits in self.bits]
        return [Scheme.of(label) for label in self.schemes["*"]] if list(self.schemes) == ["*"] else None

    def settings(self, **found: Any) -> dict[str, Any]:
        """What decides the result, as JSON values by name.

        ``found``: what a run found for settings that may be left open: exact_samples, batch_size, act_samples, device, and
        moment_samples and the digest of the weights where rounding needs moments.
        """
        from ..common import code_digest
        from ..quant import all_plain

        stated: dict[str, Any] = {
            "loss": self._loss_setting(),
            "estimator": {new: old for old, new in OLD_NAMES.items()}.get(self.estimator, self.estimator),
            "forward_step": code_digest(self.forward_step),
            "quantizer": self.quantizer.to_json(),
            "device": None if self.device is None else self.device.type,
            "schemes": None if self.schemes is None else list(map(list, self.schemes.items())),  # their order counts
        }
        names = dict.fromkeys(about.setting for about in self.about().values() if about.setting)
        stated = {name: stated[name] if name in stated else getattr(self, name) for name in names} | found
        stated |= self.loss_choice.settings()  # nothing where it is as it was before there was a choice
        if self.rounding != NEAREST:  # what no setting says is nearest, as it was before there was another
            stated["rounding"] = self.rounding or ROUNDING
        same = self._of_every_layer()
        if same is not None and (self.schemes is None or all_plain(same)):
            stated["bits"] = tuple(scheme.bits for scheme in same)
            del stated["schemes"]  # one list for all is what bits are short for
        return stated
