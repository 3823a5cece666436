"""Which loss a run has: what was asked for, made fit for the model's output, and from there the loss of any batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...artifacts import Sensitivity
from ...common import CladoError, number_list, require, sample_count
from .base import Loss, changes
from .nest import Nest, Part, field_of, keys_of
from .place import Place, chosen_positions
from .rows import Categorical, Cosine
from .users import ElementCounter, LossFunc, OwnLoss, UserLoss
from .values import Binary, SmoothL1, Squared

OUTPUTS, TARGETS = "outputs", "targets"
IGNORED = -100  # as torch has it
FLOPS_OF_AN_ELEMENT = (
    64  # a value that is written by itself takes as long as so many operations of a matrix product, about
)


class Maker(Protocol):
    def __call__(self, place: Place, targets: Any) -> Loss: ...


@dataclass(frozen=True)
class Named:
    """A line of the registry.

    Attributes:
        makes: {what it compares with, the default without targets last: what makes it}.
        vector: what lies along the dimension that it needs; "": it needs none.
        labels: whether its targets are classes.
    """

    makes: Mapping[str, Maker]
    vector: str = ""
    labels: bool = False


LOSSES: dict[str, Named] = {
    "kl": Named({OUTPUTS: Categorical.against_outputs}, "classes"),
    "cross_entropy": Named({TARGETS: Categorical.against_targets}, "classes", labels=True),
    "bce": Named({TARGETS: Binary.against_targets, OUTPUTS: Binary.against_outputs}),
    "mse": Named({TARGETS: Squared.against_targets, OUTPUTS: Squared.against_outputs}),
    "smooth_l1": Named({TARGETS: SmoothL1.against_targets, OUTPUTS: SmoothL1.against_outputs}),
    "cosine": Named({TARGETS: Cosine.against_targets, OUTPUTS: Cosine.against_outputs}, "values"),
}


@dataclass(frozen=True)
class Term:
    """A named loss of one output.

    Attributes:
        key: of the output; None: all of it.
        shape: of a sample's output; None: not seen yet.
        dim: of the classes; 0: none.
        against: "outputs" of the float model or "targets".
    """

    key: str | None
    name: str
    weight: float = 1.0
    shape: tuple[int, ...] | None = None
    dim: int = 0
    against: str = ""

    @property
    def place(self) -> Place:
        return Place(self.shape or (), self.dim)

    def words(self) -> str:
        wanted = {OUTPUTS: "the float model's outputs", TARGETS: "the targets"}[self.against]
        text = f"{self.name} to {wanted}"
        if self.shape is not None:
            place = self.place
            if self.dim:
                text += f" over dimension {self.dim} ({place.vector:,} {LOSSES[self.name].vector})"
            if place.positions > 1:
                text += f", mean over {place.positions:,} {'positions' if self.dim else 'values'}"
        scale = "" if self.weight == 1 else f"{self.weight:g} * "
        return text if self.key is None else f"{scale}{self.key}: {text}"


@dataclass(frozen=True)
class LossChoice:
    """A loss as it was asked for; :meth:`fitted` to an output it knows dimensions, and gives the loss of a batch.

    Attributes:
        loss: name, {key of an output: name or (name, weight)}, an object with ``increase`` and ``pairs``, or a function of
            the batch that gives one.
        function: ``loss_func(output, batch)`` instead.
        dim: dimension of the output that holds the classes.
        against: "outputs" or "targets"; None: targets where there are some.
        ignore_index: label that counts nothing.
        class_weights: of the cross-entropy with labels; None: all classes alike.
        positions: at most so many positions of a sample are looked at; None: all.
        hessian: whether a function's interactions are by Gauss–Newton.
        op: what is said to need the loss.
        terms: the named losses.
        wide, mean: how the function is asked (:class:`UserLoss`).
        elements: values of a sample's output that it looks at; 0: not seen yet.
    """

    loss: Any = "kl"
    function: LossFunc | None = None
    dim: int | None = None
    against: str | None = None
    ignore_index: int = IGNORED
    class_weights: Sequence[float] | None = None
    positions: int | None = None
    hessian: bool = False
    op: str = "profile"
    terms: tuple[Term, ...] = ()
    wide: bool = False
    mean: bool = False
    elements: int = 0

    @staticmethod
    def of(
        op: str,
        loss: Any = "kl",
        loss_func: LossFunc | None = None,
        loss_dim: int | None = None,
        loss_against: str | None = None,
        ignore_index: int = IGNORED,
        class_weights: Sequence[float] | None = None,
    ) -> LossChoice:
        """From the arguments of a stage."""
        return LossChoice(loss, loss_func, loss_dim, loss_against, ignore_index, class_weights, op=op)

    def __post_init__(self) -> None:
        if self.class_weights is not None:
            weights = number_list(self.class_weights)
            require(weights is not None, self.op, "class_weights", "be a sequence of numbers", repr(self.class_weights))
            object.__setattr__(self, "class_weights", weights)
        if self.named:
            object.__setattr__(self, "terms", self.terms or tuple(self._terms()))
            self._check_class_weights()
            return
        given = {"loss_dim": self.dim, "loss_against": self.against, "class_weights": self.class_weights}
        extra = [name for name, value in {**given, "positions": self.positions}.items() if value is not None]
        require(not extra, self.op, "loss", f"be a named one with {', '.join(extra)}", self.name)

    def _check_class_weights(self) -> None:
        weights = self.class_weights
        if weights is None:
            return
        labelled = sum(LOSSES[term.name].labels for term in self.terms)
        require(labelled == 1, self.op, "class_weights", "go with one cross_entropy", repr(self.name))
        numbers = all(0 <= weight < math.inf for weight in weights) and any(weights)
        require(numbers, self.op, "class_weights", "be numbers from 0 up, one above 0 at least", list(weights))

    @property
    def named(self) -> bool:
        """Whether it is made of losses of the registry."""
        return self.function is None and (isinstance(self.loss, (str, Mapping)))

    @property
    def sees_batch(self) -> bool:
        """Whether it is given the loader's batches as they are."""
        return self.function is not None or self._made_of_batch

    @property
    def _made_of_batch(self) -> bool:
        return (
            not self.named
            and callable(self.loss)
            and (isinstance(self.loss, type) or not hasattr(self.loss, "increase"))
        )

    @property
    def name(self) -> str:
        """As it is kept: a name, ``key=name,key=0.5*name``, or "user"."""
        if not self.named:
            return "user"
        return ",".join(
            ("" if t.key is None else f"{t.key}=") + ("" if t.weight == 1 else f"{t.weight:g}*") + t.name
            for t in self.terms
        )

    @property
    def needs_targets(self) -> bool:
        return any(TARGETS in self._ways(t) and OUTPUTS not in self._ways(t) for t in self.terms)

    @property
    def compares_outputs(self) -> bool:
        """Whether a part of it compares with the float model's outputs, and so is no loss of a model by itself."""
        return any(term.against == OUTPUTS for term in self.terms)

    @property
    def has_values(self) -> bool:
        """Whether it knows a loss, and not increases alone."""
        return self.named or self.function is not None

    @property
    def plain(self) -> bool:
        """Whether it is the KL divergence or cross-entropy of one vector of logits for each sample."""
        only = self.terms[0] if len(self.terms) == 1 else None
        return (
            only is not None
            and only.key is None
            and LOSSES[only.name].vector == "classes"
            and only.place.positions == 1
        )

    def _ways(self, term: Term) -> Sequence[str]:
        return [self.against] if self.against is not None else list(LOSSES[term.name].makes)

    def _terms(self) -> list[Term]:
        given = spelled(self.loss) if isinstance(self.loss, str) else self.loss
        if isinstance(given, str):
            return [self._term(None, given, 1.0)]
        require(len(given) > 0, self.op, "loss", "name an output at least", "none")
        terms = []
        for key, item in given.items():
            name, weight = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, 1.0)
            number = isinstance(weight, (int, float)) and weight > 0
            require(number, self.op, "loss", "have positive weights, as in {'key': ('mse', 0.5)}", repr(weight))
            terms.append(self._term(str(key), name, float(weight)))
        return terms

    def _term(self, key: str | None, name: Any, weight: float) -> Term:
        known = isinstance(name, str) and name in LOSSES
        require(known, self.op, "loss", f"be one of {', '.join(LOSSES)}", repr(name))
        ways = LOSSES[name].makes
        fits = self.against is None or self.against in ways
        require(fits, self.op, "loss_against", f"be {' or '.join(ways)} for {name}", repr(self.against))
        return Term(key, name, weight)

    # Fitted to what the model returns.

    def fitted(self, output: Any, batch: Any, targets: Any, samples: int) -> LossChoice:
        """The same loss, checked against an output of so many samples.

        Raises:
            CladoError: an output or targets that do not suit it.
        """
        if self.named:
            terms = tuple(self._fitted(term, output, targets, samples) for term in self.terms)
            return replace(self, terms=terms, elements=sum(map(self._count, terms)))
        floats = [leaf for leaf in pytree.tree_leaves(output) if changes(leaf)]
        elements = sum(leaf.numel() for leaf in floats) // max(1, samples)
        if self.function is None:
            self._check_object(batch)
            return replace(self, elements=elements)
        mean, wide = self._asked(self.function, output, batch, samples)
        return replace(self, mean=mean, wide=wide, elements=elements)

    def _count(self, term: Term) -> int:
        place = term.place
        return place.vector * min(place.positions, self.positions or place.positions)

    def _asked(self, function: LossFunc, output: Any, batch: Any, samples: int) -> tuple[bool, bool]:
        """(whether a user's function returns the batch's mean, whether it takes float64)."""
        for wide in (True, False):
            loss = UserLoss(function, batch, samples, self.op, wide)
            try:
                mean = loss.returns_mean(output)
                replace(loss, mean=mean).losses(output)
                return mean, wide
            except CladoError:
                if not wide:
                    raise
        raise AssertionError  # one of the two returned or raised

    def priced(self, output: Any, batch: Any, candidates: int, flops: float) -> LossChoice:
        """With a function's interactions by what serves at least cost: the function itself where calling it for all pairs takes
        at most what the forwards do, ``flops`` a sample; beyond that Gauss–Newton, if the function is smooth.

        The cost is counted, not timed, so that the same run has the same bits.
        """
        if self.function is None:
            return self
        samples = sample_count(batch)
        loss = UserLoss(self.function, batch, samples, self.op, self.wide, self.mean)
        with ElementCounter() as counter:
            loss.losses(output)
        by_itself = candidates**2 / 2 * counter.elements / samples * FLOPS_OF_AN_ELEMENT
        return replace(self, hessian=by_itself > flops and loss.curved(output))

    def _check_object(self, batch: Any) -> None:
        made = self._object(batch)
        good = all(callable(getattr(made, name, None)) for name in ("increase", "pairs"))
        must = f"be one of {', '.join(LOSSES)}, {{key: name}}, or have increase(z, delta) and pairs(z, delta)"
        require(good, self.op, "loss", must, repr(self.loss))

    def _object(self, batch: Any) -> Any:
        return self.loss(batch) if self._made_of_batch else self.loss

    def _fitted(self, term: Term, output: Any, targets: Any, samples: int) -> Term:
        own = self._own(term, output)
        targets = _of_key(targets, term.key)
        shape = tuple(own.shape[1:])
        good = own.dim() > 0 and len(own) == samples and own.is_floating_point()
        must = f"return {_named(term)} as floating-point numbers [{samples}, …] for the loss"
        require(good, self.op, "model", must, f"{own.dtype} {tuple(own.shape)}")
        what = "logits" if term.key is None else term.key
        require(bool(torch.isfinite(own).all()), self.op, "model", f"return finite {what}", "NaN or infinity")
        ways = self._ways(term)
        against = ways[0] if len(ways) == 1 or targets is not None else OUTPUTS
        dim = self._dim(term, shape, targets if against == TARGETS else None)
        term = replace(term, shape=shape, dim=dim, against=against)
        place, classes = term.place, LOSSES[term.name].vector == "classes"
        must = "return two classes at least (bce takes single logits)" if classes else "return some values"
        enough = place.positions > 0 and place.vector >= 1 + classes
        require(enough, self.op, "model", must, tuple(own.shape))
        if against == TARGETS:
            self._check_targets(term, self._counting(term), targets)
        return term

    def _own(self, term: Term, output: Any) -> Tensor:
        own = output if term.key is None else field_of(output, term.key)
        if isinstance(own, Tensor):
            return own
        keys = ", ".join(keys_of(output))
        if term.key is not None:
            require(
                False, self.op, "loss", "name outputs of the model", f"{term.key!r}, not among {keys or 'one tensor'}"
            )
        got = f"{type(output).__name__}{f' of {keys}' if keys else ''}"
        must = (
            f"return one tensor, such as logits [N, C], for loss={term.name!r} (others need {{key: loss}}, forward_step to take "
            "one, or loss_func)"
        )
        raise CladoError(f"{self.op}: model must {must}, got {got}")

    def _dim(self, term: Term, shape: tuple[int, ...], targets: Any) -> int:
        """The dimension of classes or vectors; 0 where there is none."""
        if not LOSSES[term.name].vector:
            return 0
        count = len(shape) + 1
        shown = f"shape [N, {', '.join(map(str, shape))}]"
        if self.dim is not None:
            dim = self.dim + count if self.dim < 0 else self.dim
            require(1 <= dim < count, self.op, "loss_dim", f"lie in 1..{count - 1} for {shown}", self.dim)
            return dim
        if count == 2:
            return 1
        if LOSSES[term.name].labels and isinstance(targets, Tensor):
            rest = tuple(targets.shape[1:])
            fits = [d for d in range(1, count) if shape[: d - 1] + shape[d:] == rest]
            if len(fits) == 1:
                return fits[0]
        dims = " or ".join(map(str, range(1, count)))
        must = (
            f"be said for an output of {shown}: loss='mse' or 'smooth_l1' for values and features, 'bce' for masks, 'kl', "
            f"'cross_entropy' or 'cosine' with loss_dim={dims}, or loss_func"
        )
        if count == 1:
            must = f"be 'mse', 'smooth_l1' or 'bce' for an output of {shown}, or loss_func"
        raise CladoError(f"{self.op}: loss must {must}, got {term.name!r} alone")

    # The loss of a batch.

    def on(self, batch: Any, targets: Any, samples: int, device: torch.device, seeds: Any = None) -> Loss:
        """Of a batch on the device and targets on the CPU.

        Args:
            seeds: a number for each sample, which draws its positions; None: all positions count.

        Raises:
            CladoError: targets that do not suit it.
        """
        if self.function is not None:
            return UserLoss(self.function, batch, samples, self.op, self.wide, self.mean, self.hessian)
        if not self.named:
            return OwnLoss(self._object, batch, samples, self.op)
        parts = [(term, self._of_term(term, _of_key(targets, term.key), seeds).moved(device)) for term in self.terms]
        if parts[0][0].key is None:
            return parts[0][1]
        return Nest(tuple(Part(str(term.key), term.weight, loss) for term, loss in parts))

    def blank(self, batch: Any, samples: int, device: torch.device) -> Loss:
        """Of a batch whose targets only have a shape."""
        shapes = {}
        for term in self.terms:
            labels = LOSSES[term.name].labels
            shape = term.place.without_dim if labels else term.shape or ()
            shapes[term.key] = torch.zeros(samples, *shape, dtype=torch.int64 if labels else torch.float32)
        targets = shapes.get(None, shapes)
        return replace(self, ignore_index=IGNORED).on(batch, targets, samples, device, range(samples))

    def _of_term(self, term: Term, targets: Any, seeds: Any) -> Loss:
        place = self._counting(term)
        if self.positions is not None and seeds is not None and place.positions > self.positions:
            place = replace(place, chosen=chosen_positions(place.positions, self.positions, seeds))
        against = term.against or (self.against or next(iter(LOSSES[term.name].makes)))
        labelled = isinstance(targets, Tensor) and targets.dim() == 1 and not targets.is_floating_point()
        if against == TARGETS:
            self._check_targets(term, place, targets)
        elif labelled and self.plain and term.shape is not None:  # labels of other classes are another model's data
            self._check_targets(replace(term, name="cross_entropy"), place, targets)
        return LOSSES[term.name].makes[against](place, targets)

    def _counting(self, term: Term) -> Place:
        """Its place, which knows what labels count."""
        weights = tuple(self.class_weights) if self.class_weights and LOSSES[term.name].labels else None
        if weights is not None and term.shape is not None:
            classes = term.place.vector
            require(len(weights) == classes, self.op, "class_weights", f"be {classes}, one per class", len(weights))
        return replace(term.place, ignore_index=self.ignore_index, class_weights=weights)

    def _check_targets(self, term: Term, place: Place, targets: Any) -> None:
        must = f"yield (inputs, targets) for {term.name} (images: in one subfolder per class)"
        require(isinstance(targets, Tensor), self.op, "data_loader", must, "inputs alone")
        labels = LOSSES[term.name].labels
        wanted, got = place.without_dim if labels else place.shape, tuple(targets.shape[1:])
        kind = f"{targets.dtype} {tuple(targets.shape)}"
        if labels and place.positions == 1:
            whole = targets.dim() == 1 and not targets.is_floating_point()
            require(whole, self.op, "targets", "be integers, one per sample", kind)
        else:
            same = [s for s in got if s != 1] == [s for s in wanted if s != 1]
            hint = (
                ""
                if OUTPUTS not in LOSSES[term.name].makes
                else ' (loss_against="outputs" compares with the float model)'
            )
            must = f"have shape [N{''.join(f', {s}' for s in wanted)}] for {term.name}{hint}"
            require(same, self.op, "targets", must, kind)
        if not labels:
            return
        require(not targets.is_floating_point(), self.op, "targets", "be integers", kind)
        counted = targets if place.positions == 1 else targets[targets != place.ignore_index]
        if counted.numel():
            low, high = int(counted.min()), int(counted.max())
            inside = low >= 0 and high < place.vector
            must = f"lie in 0..{place.vector - 1}" + (
                "" if place.positions == 1 else f" or be {place.ignore_index}, to be ignored"
            )
            require(inside, self.op, "targets", must, f"{low}..{high}")

    # What is said and kept of it.

    def words(self) -> str:
        """In a line."""
        if self.function is not None:
            how = "Gauss–Newton, from Hessian-vector products of it" if self.hessian else "itself on outputs added up"
            name = f"{getattr(self.function, '__module__', '')}.{getattr(self.function, '__qualname__', 'function')}"
            narrow = "" if self.wide else ", in the model's precision, since it takes no float64"
            return f"{name}{narrow}; interactions of additive outputs by {how}"
        if not self.named:
            return f"{type(self.loss).__name__} of the user's"
        some = ""
        if self.positions is not None:
            some = (
                f"; {self.positions:,} of them are looked at, drawn anew for every sample: standard errors count that"
            )
        if self.class_weights is not None:
            some = "; labels count by class_weights" + some
        return " + ".join(term.words() for term in self.terms) + some

    def settings(self) -> dict[str, Any]:
        """What decides the result beside the name, as JSON values; nothing where it is as it was before there was a choice."""
        found = {
            "loss_dim": self.dim,
            "loss_against": self.against,
            "ignore_index": None if self.ignore_index == IGNORED else self.ignore_index,
            "class_weights": None if self.class_weights is None else list(self.class_weights),
            "positions": self.positions,
        }
        return {name: value for name, value in found.items() if value is not None}


def loss_arguments(sens: Sensitivity) -> dict[str, Any]:
    """How a stage is asked for the loss that a matrix was measured under: ``loss``, ``loss_func``, ``loss_dim`` and so on.

    In another process than the one that measured, a user's own loss is not among them.
    """
    options = {k: v for k, v in sens.provenance.loss_options.items() if k != "positions"}
    own = {name: sens.functions[name] for name in ("loss", "loss_func") if name in sens.functions}
    named = {} if own or sens.provenance.loss in (None, "user") else {"loss": sens.provenance.loss}
    return {**options, **named, **own}


def spelled(text: str) -> Any:
    """A name, or {key: (name, weight)} of ``key=name,key=0.5*name``."""
    if "=" not in text:
        return text
    found: dict[str, Any] = {}
    for item in text.split(","):
        key, _, name = item.partition("=")
        weight, star, rest = name.partition("*")
        try:
            found[key.strip()] = (rest.strip(), float(weight)) if star else name.strip()
        except ValueError:
            found[key.strip()] = name
    return found


def _of_key(targets: Any, key: str | None) -> Any:
    """The targets of an output: those of its key, or the ones that all share."""
    return targets if key is None or isinstance(targets, Tensor) or targets is None else field_of(targets, key)


def _named(term: Term) -> str:
    return "its output" if term.key is None else term.key
