"""The arguments of a question to the solver: nothing else lists them, and reading them needs neither numpy nor scipy."""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..common import Arguments, Check, Line, argument, one_of, require

if TYPE_CHECKING:
    from ..artifacts import Plan
    from .constraints import LinearConstraint, Table


def _objectives() -> tuple[str, ...]:
    from .objectives import NAMES

    return NAMES


def _solvers() -> tuple[str, ...]:
    from .certify import SOLVERS

    return SOLVERS


def _is_plan(value: Any) -> bool:
    from ..artifacts import Plan

    return isinstance(value, Plan)


def _finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral)


def _given_widths(value: Any) -> list[Any]:
    """The widths of all layers, or of some."""
    return list(value.values()) if isinstance(value, Mapping) else [value]


def _groups(value: Any) -> bool:
    return isinstance(value, Collection) and not any(isinstance(group, str) for group in value)


def _wrong_group(value: Any) -> str:
    """The name that stands where a group should, or what is no collection."""
    return repr(next(group for group in value if isinstance(group, str)) if isinstance(value, Collection) else value)


def _read_constraints(value: Any) -> tuple[LinearConstraint, ...]:
    from .constraints import read_constraints

    return tuple(read_constraints(value) if isinstance(value, (str, os.PathLike)) else value)


POSITIVE = Check(lambda value: _finite(value) and value > 0, "be a positive finite number")
WIDTHS = Check(
    lambda value: all(map(_whole, _given_widths(value))),
    "hold whole widths",
    lambda value: repr(next(width for width in _given_widths(value) if not _whole(width))),
)
LAYERS = Check(lambda value: isinstance(value, Mapping), "be {layer: bits, or a scheme's label}")


@dataclass(frozen=True)
class SolveOptions(Arguments):
    """The arguments of :func:`solve`, checked as far as that goes without the matrix.

    Their groups: budget, inverse (least use instead of least loss), limit (which candidates may be taken), aim, effort.
    """

    op: ClassVar[str] = "solve"

    avg_bits: float | None = argument(
        None,
        "upper bound on Σ bits·weights / Σ weights.",
        Line("--avg-bits", "number", "Bits per weight, codes alone."),
        check=POSITIVE,
        group="budget",
    )
    size_mb: float | None = argument(
        None,
        "upper bound on the exported bytes of the layers (codes and scales) in MiB (2**20 bytes).",
        Line("--size-mb", "number", "MiB of packed codes and scales."),
        check=POSITIVE,
        group="budget",
    )
    size_bytes: float | None = argument(
        None,
        "the same in bytes.",
        Line("--size-bytes", "number", "Bytes of packed codes and scales."),
        check=POSITIVE,
        group="budget",
    )
    bitops: float | None = argument(
        None,
        "upper bound on Σ macs · bits of the weight · bits of the input, for one sample.",
        Line("--bitops", "number", "Sum of macs x bits x act-bits for one sample."),
        check=POSITIVE,
        group="budget",
    )
    latency_ms: float | None = argument(
        None,
        "upper bound on the sum of ``latency``.",
        Line("--latency-ms", "number", "Sum of the --latency table."),
        check=Check(_finite, "have a finite limit"),
        group="budget",
    )
    _: KW_ONLY
    latency: Table | str | os.PathLike[str] | None = argument(
        None,
        "{layer: {bits, or a scheme's label: ms}}, or a file that :func:`clado.solver.read_latency` reads.",
        Line("--latency", "text", "Table of ms for --latency-ms: CSV of `clado latency`, or JSON."),
        group="budget",
    )
    act_bits: int | None = argument(
        None,
        "width of the inputs in ``bitops``; None: that of each candidate's scheme, 32 where inputs stay float.",
        Line("--act-bits", "count", "Width of inputs in --bitops; as the matrix has them when left out."),
        check=Check(lambda value: _whole(value) and 1 <= value <= 32, "lie in 1..32", str),
        kept=operator.index,
        group="budget",
    )
    constraints: tuple[LinearConstraint, ...] = argument(
        (),
        "linear constraints of your own, or a file that :func:`clado.solver.read_constraints` reads.",
        Line("--constraints", "text", "JSON {name: {limit, coefficients: {layer: {scheme: number}}}} of your own."),
        check=Check(lambda value: isinstance(value, (Collection, os.PathLike)), "be LinearConstraints or a file"),
        kept=_read_constraints,
        takes="Sequence[LinearConstraint] | str | os.PathLike[str]",
        group="budget",
    )
    max_loss_increase: float | None = argument(
        None,
        "the inverse question: of all plans whose predicted loss increase (nats, under ``objective``) is at most this one, the "
        "one that takes least of ``minimize``.",
        Line(
            "--max-loss-increase",
            "number",
            "The inverse question: least --minimize whose predicted increase is so small.",
        ),
        check=Check(_finite, "be a finite number of nats"),
        group="inverse",
    )
    minimize: str | None = argument(
        None,
        'what ``max_loss_increase`` makes least: "avg_bits", "size_mb", "size_bytes", "bitops" or "latency_ms"; None: '
        '"size_bytes".',
        Line("--minimize", "text", "avg_bits, size_mb, size_bytes, bitops or latency_ms; size_bytes when left out."),
        check=one_of(lambda: SolveOptions.positional()),
        group="inverse",
    )
    objective: str = argument(
        "original",
        '"original", "clipped", "shrunk" or "diagonal"; see :func:`clado.solver.objectives.objective_matrix`.',
        Line("--objective", "text", "original, clipped, shrunk or diagonal."),
        check=one_of(_objectives, lambda: f"be one of {_objectives()}"),
        group="aim",
    )
    pin: Mapping[str, int | str] | None = argument(
        None,
        "{layer: bits, or a scheme's label such as ``W4A16``} that must be taken.",
        Line("--pin", "layer", "Keep a layer at a width, or at a scheme such as W4A16. May be repeated."),
        check=LAYERS,
        group="limit",
    )
    forbid: Mapping[str, int | str | Sequence[int | str]] | None = argument(
        None,
        "{layer: bits or label, or several} that must not be taken.",
        Line("--forbid", "layers", "Leave a width, or a scheme, out. May be repeated."),
        check=LAYERS,
        group="limit",
    )
    min_bits: int | Mapping[str, int] | None = argument(
        None,
        "least bits, for all layers or {layer: bits}.",
        Line("--min-bits", "count", "Least bits of every layer."),
        check=WIDTHS,
        group="limit",
    )
    max_bits: int | Mapping[str, int] | None = argument(
        None,
        "most bits, likewise.",
        Line("--max-bits", "count", "Most bits of every layer."),
        check=WIDTHS,
        group="limit",
    )
    shared_layers: Sequence[Sequence[str]] = argument(
        (),
        "groups of layer names that take the same bits.",
        Line("--shared", "groups", "Layers that take the same bits. May be repeated."),
        check=Check(_groups, "hold groups of layer names", _wrong_group),
        group="limit",
    )
    start: Plan | None = argument(
        None,
        "a plan to begin with, where it is feasible; the answer is never worse.",
        "a command of the command line begins anew",
        check=Check(_is_plan, "be a Plan"),
        group="aim",
    )
    time_limit: float = argument(
        60.0,
        "seconds of wall time.",
        Line("--time-limit", "positive", "Seconds."),
        check=Check(lambda value: _finite(value) and value > 0, "be positive seconds", str),
        group="effort",
    )
    gap: float = argument(
        0.0,
        "stop once the relative gap is proven to be at most this: objective − bound over the larger of |objective| and the sum "
        "of the magnitudes of the single increases.",
        Line("--gap", "number", "Stop once this relative gap is proven."),
        check=Check(lambda value: _finite(value) and value >= 0, "be non-negative", str),
        group="effort",
    )
    threads: int = argument(
        1,
        "of the dense linear algebra behind the bound; one is fastest up to a few hundred candidates. The search tree runs on "
        "torch's threads (torch.set_num_threads, OMP_NUM_THREADS), with the same result at any number of them.",
        Line(
            "--threads",
            "count",
            "Of the linear algebra behind the bound; OMP_NUM_THREADS are those of the search tree.",
        ),
        check=Check(lambda value: _whole(value) and value >= 1, "be a whole number from 1 up", str),
        kept=operator.index,
        group="effort",
    )
    seed: int = argument(
        0,
        "of everything random; the same call gives the same plan unless the time limit ended it.",
        Line("--seed", "seed", "Of everything random."),
        check=Check(_whole, "be a whole number", str),
        kept=operator.index,
        group="effort",
    )
    solver: str = argument(
        "auto",
        '"bnb" (heuristics, semidefinite bound, native branch and bound), "scip" (SCIP in place of the last), "heuristic" '
        '(heuristics and bound only), "auto" (SCIP where nothing interacts, else bnb: SCIP on what bnb left open after its time '
        "was never seen to lower the gap).",
        Line("--solver", "text", "auto, bnb, scip or heuristic."),
        check=one_of(_solvers, lambda: f"be one of {_solvers()}"),
        group="effort",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        timed = self.latency_ms is None or self.latency is not None
        require(timed, self.op, "latency", "be given with latency_ms", self.latency)
        asked = self.minimize is None or self.max_loss_increase is not None
        require(asked, self.op, "minimize", "come with max_loss_increase", repr(self.minimize))
        timed = self.minimize != "latency_ms" or self.latency is not None
        require(timed, self.op, "latency", "be given to minimize latency_ms", self.latency)

    @property
    def minimized(self) -> str | None:
        """What is made least; None where the loss is."""
        return None if self.max_loss_increase is None else self.minimize or SIZE


SIZE = "size_bytes"
AXES = SolveOptions.positional()  # budgets that one number says
BUDGETS = SolveOptions.group("budget")
INVERSE = SolveOptions.group("inverse")


def least_loss_only(op: str, arguments: Mapping[str, Any]) -> None:
    """Refuse the inverse question where plans of least loss are chosen among."""
    given = [name for name in INVERSE if arguments.get(name) is not None]
    require(not given, op, "arguments", f"leave {' and '.join(INVERSE)} to solve", " and ".join(given))
