"""From scores to study.json, and from study.json to docs/evidence.md with its figures: no number is typed by hand."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clado.common import atomic_file

from ..harness import machine
from .measure import BITS, BUDGETS, FEW, REFINED_TO, SAMPLES
from .nets import SPLITS, load_split
from .numbers import MARKS, clustered, compact, table, verdict
from .real_page import SECTIONS, how_many_photographs, interactions_on_real_nets

RESULTS = Path("bench/results/xeon-2core/study.json")
FINISHED, STABLE = (RESULTS.with_name(f"{name}.json") for name in ("finished", "stable"))
PAGE, IMAGES = Path("docs/evidence.md"), Path("docs/images")
RIVALS = ("modelopt gradient", "modelopt kl_div")
ADDITIVE, PAIRS, OURS = "logit: diagonal", "logit: original", "logit: refined, reranked"
SHOWN = {
    "uniform": "uniform",
    "modelopt gradient": "ModelOpt, gradient",
    "modelopt kl_div": "ModelOpt, KL",
    "logit, cross-entropy: diagonal": "diagonal, CE",
    "logit: diagonal": "diagonal, KL",
    "logit: original": "logit",
    "logit: refined, reranked": "logit, refined",
}
NETS = {"vit": "ViT", "resnet": "ResNet", "mobilenet": "MobileNetV2"}
Arrays = dict[str, NDArray[np.float32]]


def write(work: Path, results: Path) -> None:
    """study.json from ``work`` where it holds scores; the page and its figures from study.json."""
    if any((work / "units").glob("*.json")):
        text = compact(collect(work))
        results.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(results) as temporary:
            Path(temporary).write_text(text + "\n")
    study = json.loads(results.read_text())
    figure_of_losses(study, IMAGES / "evidence-loss.svg")
    figure_of_costs(study, IMAGES / "evidence-cost.svg")
    with atomic_file(PAGE) as temporary:
        Path(temporary).write_text(page(study, json.loads(STABLE.read_text())))


def collect(work: Path) -> dict[str, Any]:
    """Everything the page says, with the units it comes from."""
    units = []
    for path in sorted((work / "units").glob("*.json")):
        unit = json.loads(path.read_text())
        for plan in unit["plans"]:
            plan["bits"] = "".join(map(str, plan["bits"]))
        units.append((unit, dict(np.load(path.with_suffix(".npz")))))
    digit = load_split("heldout").digit.numpy()
    versions = {name: importlib.metadata.version(name) for name in ("nvidia-modelopt", "timm", "scikit-learn")}
    cells = []
    for scales in ("tensor", "channel"):
        for net in NETS:
            own = [(u, a) for u, a in units if u["unit"]["net"] == net and u["unit"]["scales"] == scales]
            cells += [cell(net, scales, budget, own, digit) for budget in BUDGETS if own]
    return {
        "benchmark": "study",
        "machine": {**machine(), **versions},
        "settings": {"bits": BITS, "samples": SAMPLES, "few_samples": FEW, "heldout": len(digit)},
        "cells": cells,
        "units": [unit for unit, _ in units],
    }


def cell(net: str, scales: str, budget: float, units: Sequence[tuple[dict, Arrays]], digit: NDArray) -> dict[str, Any]:
    """Mean excess over float of every method on one net, and paired differences between methods.

    A method's excess is averaged over the units (training seeds and sensitivity sets) that have it. Differences are taken per
    held-out sample, averaged over the units that have both methods and over the draws of one digit; their standard error is
    that of the mean over digits.
    """

    def excess(method: str, among: Iterable[tuple[dict, Arrays]]) -> list[NDArray]:
        return [arrays[f"{method}|{budget}"] - arrays["float"] for _, arrays in among]

    def having(*methods: str) -> list[tuple[dict, Arrays]]:
        return [(u, a) for u, a in units if all(f"{m}|{budget}" in a for m in methods)]

    def difference(one: str, other: str) -> dict[str, Any] | None:
        both = having(one, other)
        if not both:
            return None
        per_unit = np.array(excess(one, both)) - np.array(excess(other, both))
        return {**clustered(per_unit.mean(0), digit), "units": len(both), "below": int((per_unit.mean(1) < 0).sum())}

    methods = {}
    for method in sorted({key.split("|")[0] for _, arrays in units for key in arrays} - {"float"}):
        mine = having(method)
        if mine:
            rows = [p for u, _ in mine for p in u["plans"] if p["method"] == method and p["budget"] == budget]
            methods[method] = {
                **clustered(np.mean(excess(method, mine), 0), digit),
                "accuracy": float(np.mean([row["accuracy"] for row in rows])),
                "kl": float(np.mean([row["kl"] for row in rows])),
                "avg_bits": float(np.mean([row["avg_bits"] for row in rows])),
                "units": len(mine),
            }
    rival = min(RIVALS, key=lambda name: methods[name]["mean"])
    pairs = [(name, rival) for name in methods if name not in RIVALS]
    pairs += [(name, ADDITIVE) for name in (PAIRS, OURS) if name in methods]
    pairs += [("logit, cross-entropy: diagonal", ADDITIVE)]
    pairs += [(name, PAIRS) for name in methods if name not in (*RIVALS, ADDITIVE, PAIRS)]
    return {
        "net": net,
        "scales": scales,
        "budget": budget,
        "rival": rival,
        "methods": methods,
        "differences": [
            {"method": one, "to": other, **found} for one, other in pairs if (found := difference(one, other))
        ],
    }


def found_difference(row: dict[str, Any], method: str, other: str) -> dict[str, Any] | None:
    return next((d for d in row["differences"] if d["method"] == method and d["to"] == other), None)


# ---- results to page ---------------------------------------------------------------------------------------------


def page(study: dict[str, Any], stable: dict[str, Any]) -> str:
    parts = [
        introduction(study),
        against_modelopt(study),
        where_interactions_help(study),
        estimators(study),
        choices(study),
        defaults(study),
        finished_plans(),
        interactions_on_real_nets(),
        how_many_photographs(),
        *(section() for path, section in SECTIONS.items() if path.exists()),
        samples_needed(stable),
        limits(study),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def introduction(study: dict[str, Any]) -> str:
    rows = []
    for net, title in NETS.items():
        own = [u for u in study["units"] if u["unit"]["net"] == net]
        floats = {u["unit"]["seed"]: u["float"] for u in own}
        rows.append(
            [
                title,
                str(own[0]["layers"]),
                f"{own[0]['weights']:,}",
                " / ".join(f"{f['loss']:.3f}" for _, f in sorted(floats.items())),
                " / ".join(f"{f['accuracy']:.1%}" for _, f in sorted(floats.items())),
                *(str(sum(u["unit"]["scales"] == s for u in own)) for s in ("tensor", "channel")),
            ]
        )
    bits = ", ".join(map(str, study["settings"]["bits"]))
    digits = {name: part.stop - part.start for name, (part, _) in SPLITS.items()}
    return f"""
# Evidence: when interactions matter

Three nets were trained on real digits, their layers quantized to {bits} bits by the plans of every method, and the plans
judged by cross-entropy on images that neither training, nor the sensitivity matrix, nor any choice has seen. This page is
written by `python -m bench.study`; every number comes from `{RESULTS}`
({study["machine"]["device"]}, torch {study["machine"]["torch"]},
ModelOpt {study["machine"]["nvidia-modelopt"]}).

- **Data**: scikit-learn's 8×8 digits doubled to 16×16, turned by up to 15°, scaled by up to 15 %, shifted by up to 1.5 pixels,
  covered with noise, so that the nets err as nets do on real images. {digits["train"]} digits to train, two disjoint sets of
  {digits["sensitivity a"]} for the sensitivities ({study["settings"]["samples"]} images each), {digits["choice"]} to choose among plans,
  {digits["heldout"]} ({study["settings"]["heldout"]} images) to report.
- **Layers**: every Linear and Conv2d but the first convolution and the classifier. Weights only, rounded to the nearest code,
  scales by least squared error.
- **Error bars** are standard errors of paired differences per image, clustered by digit. They cover the held-out images; training
  seeds and sensitivity sets are averaged over, and how many of them agree is said.

{table(["net", "layers", "weights", "loss of the float nets", "accuracy", "runs per tensor", "per channel"], rows)}

A run is one training seed with one sensitivity set.
"""


def against_modelopt(study: dict[str, Any]) -> str:
    small = [row for row in study["cells"] if row["budget"] <= REFINED_TO]
    gone = [1 - row["methods"][OURS]["mean"] / row["methods"][row["rival"]]["mean"] for row in small]
    found = [found_difference(row, OURS, row["rival"]) for row in small]
    below = sum(d["mean"] < 0 for d in found if d)
    sure = sum(d["mean"] < -2 * d["stderr"] for d in found if d)
    half = sum(share >= 0.5 for share in gone)
    text = f"""
## Beside ModelOpt

Loss over the float net's (nats) at equal bytes. ModelOpt's `auto_quantize` searched the same widths on the same layers with the
same images, its weight quantizers calibrated by squared error like ours; its plans are evaluated with our quantizer. "Excess
gone" compares the last column with the better of ModelOpt's two scorings *in that row*, chosen after the fact, in its favour.

Up to {REFINED_TO} bits, clado's plans (logit, refined, chosen on images set apart) have the lower held-out loss in {below} of {len(small)} rows, in {sure} of them by
more than two standard errors. The share of ModelOpt's excess that is gone is {np.median(gone):.0%} in the median row, {min(gone):.0%} in the
worst, {max(gone):.0%} in the best; at least half is gone in {half} of {len(small)}. **The aim was half everywhere: it is {"met" if half == len(small) else "not met"}.**
`clado.refine` stops where no solution of the program around the plan, near or far, has a lower measured loss; what is left is, as far
as that search can see, what these widths cost under this quantizer at that budget. It would take better rounding or finer scales,
which would help every plan alike.

![Loss over float against average bits](images/evidence-loss.svg)
"""
    for scales in ("tensor", "channel"):
        rows = []
        for row in (r for r in study["cells"] if r["scales"] == scales):
            ours = OURS if OURS in row["methods"] else "logit: reranked"
            against = found_difference(row, ours, row["rival"])
            cells = [f"{row['methods'][name]['mean']:.3f}" if name in row["methods"] else "" for name in SHOWN]
            if OURS not in row["methods"]:
                cells[-1] = f"{row['methods'][ours]['mean']:.3f}*"
            share = 1 - row["methods"][ours]["mean"] / row["methods"][row["rival"]]["mean"]
            verdict = f"{against['mean']:+.3f} ± {against['stderr']:.3f}" if against else ""
            agree = f"{against['below']}/{against['units']}" if against else ""
            rows.append([NETS[row["net"]], f"{row['budget']:g}", *cells, verdict, agree, f"{share:.0%}"])
        if rows:
            head = ["net", "bits", *SHOWN.values(), "minus ModelOpt", "runs below", "excess gone"]
            text += (
                f"\n### One scale per {'tensor' if scales == 'tensor' else 'output channel'}\n\n{table(head, rows)}\n"
            )
    return text + f"\n\\* not refined above {REFINED_TO} bits: re-ranked only.\n\n" + accuracies(study)


def accuracies(study: dict[str, Any]) -> str:
    names = ["uniform", "modelopt gradient", "modelopt kl_div", ADDITIVE, PAIRS, "logit: reranked", OURS]
    rows = [
        [
            NETS[row["net"]],
            row["scales"],
            f"{row['budget']:g}",
            *(f"{row['methods'][n]['accuracy']:.1%}" if n in row["methods"] else "" for n in names),
        ]
        for row in study["cells"]
    ]
    head = ["net", "scales", "bits", *(SHOWN.get(n, "logit, re-ranked") for n in names)]
    return f"### Held-out accuracy\n\n{table(head, rows)}"


def where_interactions_help(study: dict[str, Any]) -> str:
    counts = {name: {"helps": 0, "ties": 0, "hurts": 0} for name in (PAIRS, OURS)}
    rows = []
    for row in study["cells"]:
        cells = [NETS[row["net"]], row["scales"], f"{row['budget']:g}", f"{row['methods'][ADDITIVE]['mean']:.3f}"]
        for name in (PAIRS, OURS):
            found = found_difference(row, name, ADDITIVE)
            if found is None:
                cells += ["", ""]
                continue
            word = verdict(found)
            counts[name][word] += 1
            cells += [f"{found['mean']:+.4f} ± {found['stderr']:.4f}", word]
        rows.append(cells)
    plain, refined = ({k: v for k, v in counts[name].items()} for name in (PAIRS, OURS))
    hurt = [f"{NETS[r['net']]} per {r['scales']} at {r['budget']:g}" for r in study["cells"] if says(r, PAIRS, "hurts")]
    still = [f"{NETS[r['net']]} per {r['scales']} at {r['budget']:g}" for r in study["cells"] if says(r, OURS, "hurts")]
    head = ["net", "scales", "bits", "diagonal", "logit − diagonal", "", "refined − diagonal", ""]
    return f"""
## Where interactions help, where they tie

The same single increases (KL), with and without the pairs; "ties" means within two standard errors. Without refinement the
interactions help in {plain["helps"]} rows, tie in {plain["ties"]} and hurt in {plain["hurts"]}{f" ({', '.join(hurt)})" if hurt else ""}: where few bits make large
perturbations, pairs measured around the float net need not hold near the plan. After `clado.refine`, which measures them
again around the plan, they help in {refined["helps"]} rows, tie in {refined["ties"]} and hurt in {refined["hurts"]}{f" ({', '.join(still)})" if still else ""}.

{table(head, rows)}
"""


def says(row: dict[str, Any], method: str, word: str) -> bool:
    found = found_difference(row, method, ADDITIVE)
    return found is not None and verdict(found) == word


def estimators(study: dict[str, Any]) -> str:
    thorough = [u for u in study["units"] if u["entries"]]
    names = (
        "logit",
        "gradient",
        "corrected",
        f"exact, {FEW} samples",
        f"logit, {FEW} samples",
        f"gradient, {FEW} samples",
    )
    costs = []
    for name in names:
        cells = [name if "samples" in name else f"{name}, {SAMPLES} samples"]
        for net in NETS:
            own = [u for u in thorough if u["unit"]["net"] == net and name in u["cost"]]
            if not own:
                cells += [""] * 3
                continue
            per_sample = np.mean([u["cost"][name]["forwards"] / u["cost"][name]["samples"] for u in own])
            seconds = [u["cost"][name]["seconds"] for u in own if u["cost"][name]["seconds"] is not None]
            errors = [u["entries"][name] for u in own if name in u["entries"]]
            cells += [
                f"{per_sample:,.0f}",
                f"{np.mean(seconds):.0f}" if seconds else "",
                f"{np.mean(errors):.2f}" if errors else "0",
            ]
        costs.append(cells)
    for rival in (*RIVALS, "refine, per budget"):
        cells = [SHOWN.get(rival, rival)]
        for net in NETS:
            own = [u["cost"][rival] for u in study["units"] if u["unit"]["net"] == net and rival in u["cost"]]
            forwards = [c["forwards"] / c["samples"] for c in own if c.get("forwards")]
            seconds = np.mean([c["seconds"] for c in own]) if own else np.nan
            cells += [f"{np.mean(forwards):,.0f}" if forwards else "", f"{seconds:.0f}", ""]
        costs.append(cells)
    plain = [f"{name}: original" for name in names]
    rows = []
    for row in study["cells"]:
        if f"exact, {FEW} samples: original" not in row["methods"]:
            continue
        cells = [NETS[row["net"]], row["scales"], f"{row['budget']:g}"]
        for method in plain[1:]:
            found = found_difference(row, method, PAIRS)
            cells.append(f"{found['mean']:+.4f} ± {found['stderr']:.4f}" if found else "")
        rows.append(cells)
    head = ["estimator", *(f"{title}: {what}" for title in NETS.values() for what in ("forwards", "CPU s", "error"))]
    return f"""
## What each estimator costs, and buys

Forwards per sample (multiply-adds in units of one forward of the net), CPU seconds on one thread of a shared machine, capture
and quantization included, and the relative Frobenius error of all interactions against `exact` on its {FEW} samples (other rows with
{SAMPLES} samples: sampling error included).

{table(head, costs)}

![Held-out loss against cost](images/evidence-cost.svg)

{sharper(study)} Mean change of the excess over float
relative to the plain `logit` plan, at 2.25 and 2.5 bits / at 3, 3.5 and 4 bits, on the runs that measured all of them:

{table(["estimator", "original", "clipped", "shrunk", "re-ranked"], tamed(study, names))}

Pairs at 2 bits are large and of both signs; the program adds up those that pay, and what it predicts for many layers at once need not
be there when measured. Clipping the negative eigenvalues, or measuring a few plans, takes most of the harm away.

Held-out loss of the plain plans minus that of `logit`'s ({SAMPLES} samples), row by row:

{table(["net", "scales", "bits", *(m.removesuffix(": original") for m in plain[1:])], rows)}
"""


def sharper(study: dict[str, Any]) -> str:
    """On which nets plans of the exact matrix are worse than those of the closed form."""
    changes = {
        title: mean_change(
            {"cells": [row for row in study["cells"] if row["net"] == net]},
            f"exact, {FEW} samples: original",
            PAIRS,
            3.0,
            4.0,
        )
        for net, title in NETS.items()
    }
    said = ", ".join(f"{title} {change:+.0%}" for title, change in changes.items() if np.isfinite(change))
    return (
        f"Better entries need not give better plans: from 3 bits up the plain plans of `exact` change the excess by {said}. "
        "Where it rises much, something must tame the matrix."
    )


def tamed(study: dict[str, Any], names: Sequence[str]) -> list[list[str]]:
    """Mean relative change by estimator and objective over the cells where `exact` was measured."""
    cells = [row for row in study["cells"] if f"exact, {FEW} samples: original" in row["methods"]]
    part = {"cells": cells}
    rows = []
    for name in names:
        line = [name if "samples" in name else f"{name}, {SAMPLES} samples"]
        for how in ("original", "clipped", "shrunk", "reranked"):
            method = f"{name}: {how}"
            known = any(method in row["methods"] for row in cells) and method != PAIRS
            changes = [mean_change(part, method, PAIRS, *span) for span in ((2.25, 2.5), (3.0, 4.0))]
            line.append(" / ".join(f"{value:+.0%}" for value in changes) if known else ("0" if method == PAIRS else ""))
        rows.append(line)
    return rows


def choices(study: dict[str, Any]) -> str:
    """Objectives, losses, re-ranking and refinement, each against the plain logit plan."""
    names = {
        "logit: clipped": "clipped eigenvalues",
        "logit: shrunk": "shrunk by standard error",
        "logit, cross-entropy: original": "cross-entropy instead of KL",
        "logit: reranked": "re-ranked (KL, images set apart)",
        "logit: refined": "refined (KL, sensitivity set)",
        OURS: "refined, then re-ranked",
    }
    rows = []
    for method, title in names.items():
        cells = [title]
        for budget in BUDGETS:
            found = [found_difference(row, method, PAIRS) for row in study["cells"] if row["budget"] == budget]
            known = [d for d in found if d]
            if not known:
                cells.append("")
                continue
            words = [verdict(d) for d in known]
            mean = np.mean([d["mean"] for d in known])
            cells.append(f"{mean:+.4f} ({words.count('helps')}/{words.count('ties')}/{words.count('hurts')})")
        rows.append(cells)
    return f"""
## Which loss, which objective, and what choosing by the true loss buys

Mean difference of the held-out loss to the plain `logit` plan (KL, original matrix) over nets and scales, and in brackets in how
many of them it helps / ties / hurts by more than two standard errors:

{table(["change", *(f"{b:g} bits" for b in BUDGETS)], rows)}
"""


def mean_change(study: dict[str, Any], method: str, other: str, low: float, high: float) -> float:
    """Mean relative change of the excess over cells within a range of budgets."""
    rows = [
        r for r in study["cells"] if low <= r["budget"] <= high and method in r["methods"] and other in r["methods"]
    ]
    ratios = []
    for row in rows:
        found = found_difference(row, method, other)
        if found:
            ratios.append(found["mean"] / row["methods"][other]["mean"])
    return float(np.mean(ratios)) if ratios else float("nan")


def defaults(study: dict[str, Any]) -> str:
    def change(method: str, low: float, high: float, other: str = PAIRS) -> str:
        return f"{mean_change(study, method, other, low, high):+.0%}"

    tight, loose = (2.25, 2.5), (3.0, 3.5)
    return f"""
## Which defaults follow

Mean change of the excess over float, relative to the plain `logit` plan unless said, at 2.25 and 2.5 bits / at 3 and 3.5 bits:

- **Estimator `logit`** (stays): `gradient` {change("gradient: original", *tight)} / {change("gradient: original", *loose)}, `corrected`
  {change("corrected: original", *tight)} / {change("corrected: original", *loose)}, `exact` on {FEW} samples {change(f"exact, {FEW} samples: original", *tight)} / {change(f"exact, {FEW} samples: original", *loose)}, at the costs above.
  Whoever takes one of these should clip or re-rank.
- **Interactions** (stay): against the diagonal alone, {change(PAIRS, *tight, ADDITIVE)} / {change(PAIRS, *loose, ADDITIVE)}; refined
  {change(OURS, *tight, ADDITIVE)} / {change(OURS, *loose, ADDITIVE)}.
- **Loss `kl`** (stays): cross-entropy gives {change("logit, cross-entropy: original", *tight)} / {change("logit, cross-entropy: original", *loose)}; for additive scores, diagonal by
  cross-entropy against diagonal by KL, {change("logit, cross-entropy: diagonal", *tight, ADDITIVE)} / {change("logit, cross-entropy: diagonal", *loose, ADDITIVE)}.
- **Objective `original`** (stays, under `logit`): clipping gives {change("logit: clipped", *tight)} / {change("logit: clipped", *loose)}, shrinking {change("logit: shrunk", *tight)} / {change("logit: shrunk", *loose)}.
- **Choosing by the true loss**: re-ranking gives {change("logit: reranked", *tight)} / {change("logit: reranked", *loose)}; refining first
  {change(OURS, *tight)} / {change(OURS, *loose)}. So re-rank where there are images to spare, and refine (`clado.refine`, `clado solve --refine`) at 2.5 bits
  and below; above, refining gains a few per cent at most.
"""


def finished_plans() -> str:
    """What ships, beside ModelOpt's plans under the best of its roundings."""
    found = json.loads(FINISHED.read_text())
    rows, shares = [], []
    for cell in found["cells"]:
        methods, against = cell["methods"], cell["minus_rival"]["learned"]
        rival, ours = methods[cell["rival"]], methods["learned"]
        excess = rival["mean"] > 2 * rival["stderr"]  # else there is nothing to be gone
        shares += [1 - ours["mean"] / rival["mean"]] if excess else []
        rows.append(
            [
                NETS[cell["net"]],
                cell["scales"],
                f"{cell['budget']:g}",
                cell["rival"].removeprefix("modelopt "),
                *(f"{methods[name]['mean']:.4f}" for name in (cell["rival"], "planned", "compensated", "learned")),
                f"{against['mean']:+.4f} ± {against['stderr']:.4f}",
                f"{shares[-1]:.0%}" if excess else "",
                f"{rival['right']:.1%} / {ours['right']:.1%}",
            ]
        )
    differences = [cell["minus_rival"]["learned"] for cell in found["cells"]]
    below = sum(d["mean"] < 0 for d in differences)
    sure = sum(d["mean"] < -2 * d["stderr"] for d in differences)
    seconds = np.mean([cell["methods"]["learned"]["seconds"] for cell in found["cells"]])
    units = sorted({cell["units"] for cell in found["cells"]})
    head = ["net", "scales", "bits", "ModelOpt's best", "its excess", "planned", "finished in order", "learned"]
    head += ["minus ModelOpt", "excess gone", "accuracy, both"]
    return f"""
## What ships: better rounding, beside ModelOpt's best

The same nets, images and widths under the rounding that ships: profiled and planned under compensated rounding ("planned"), then
finished in the order of the forward, then by learning ({seconds:.0f} s of one core per plan). ModelOpt's plans of both scorings are
rounded by each algorithm that it has for integer weights of such nets (squared error, GPTQ for linear layers) and run in its own
quantizers; a row shows the best of its four, chosen after the fact, in its favour. Excess of held-out cross-entropy over the float
net's (nats), {" or ".join(map(str, units))} run(s) per row: one training seed and one sensitivity set each, so the errors cover the
held-out images alone. `python -m bench.study.finished` writes `{FINISHED}`.

The finished plans lie below ModelOpt's best in {below} of {len(rows)} rows, in {sure} by more than two standard errors. Where its excess is
beyond two standard errors ({len(shares)} rows), at least half of it is gone in {sum(share >= 0.5 for share in shares)} (median {np.median(shares):.0%}, worst {min(shares):.0%}).

{table(head, rows)}
"""


def samples_needed(stable: dict[str, Any]) -> str:
    """What ``until_stable`` saves, and what its plans are worth beside those of all samples."""
    rows, plans = [], dict[tuple[Any, ...], dict[str, Any]]()
    for net in stable["nets"]:
        for tolerance in stable["settings"]["tolerances"]:
            own = [row for row in net["rows"] if row["tolerance"] == tolerance]
            cells = [f"{max(row['regret'] for row in own):.0%}"]
            if own[0]["reached"]:
                plans |= {(net["net"], row["samples"], row["budget"]): row for row in own}
                cells.append(", ".join(f"{row['predicted']:+.1%}" for row in own))
                cells.append(
                    ", ".join(
                        f"{row['heldout']['mean'] / row['heldout_loss']:+.1%}" + MARKS[verdict(row["heldout"])]
                        for row in own
                    )
                )
            else:
                cells += ["", ""]
            share = 1 - own[0]["samples"] / net["samples"]
            rows.append([net["net"], f"{tolerance:.0%}", f"{own[0]['samples']:,}", f"{share:.0%}", *cells])
    ended = list(plans.values())
    within = sum(row["predicted"] <= row["regret"] for row in ended)
    same = sum(row["layers_differ"] == 0 for row in ended)
    words = [verdict(row["heldout"]) for row in ended]
    change = [row["heldout"]["mean"] / row["heldout_loss"] for row in ended]
    shares = ", ".join(f"{net['check_share']:.0%}" for net in stable["nets"])
    budgets = ", ".join(f"{budget:g}" for budget in stable["settings"]["budgets"])
    head = [
        "net",
        "tolerance",
        "samples",
        "saved",
        "bound",
        f"matrix of others: {budgets} bits",
        f"held out: {budgets} bits",
    ]
    return f"""
## How many samples plans need

`clado.profile(..., until_stable=tolerance)` on the same nets (seed 0, one scale per channel, nearest rounding, the images of both
sensitivity sets shuffled, {stable["nets"][0]["samples"]:,} at most), and on timm's vit_small_patch16_224 with random weights and small images ({stable["nets"][-1]["samples"]} at
most). A run ends once the plans of {budgets} bits are at most the tolerance off the best for all that the noise tells. They are
set beside the plans of all samples: "bound" is the largest that the run said, "matrix of others" the change of the predicted loss by a matrix of held-out
images, "held out" that of the loss itself (KL) on {stable["settings"]["heldout"]} of them, ▲ and ▼ where it exceeds two standard errors. Runs that did not end early
are given without plans. Numbers from `{STABLE}`.

{table(head, rows)}

Of the {len(ended)} plans of runs that ended early, {same} have the plan of all samples; by the matrix of other images {within} lost no more than was said. On held-out images
{words.count("ties")} tie with the plans of all samples, {words.count("hurts")} are worse and {words.count("helps")} better, by {np.mean(change):+.1%} on average: the bound is on what the noise hides from the matrix,
and the matrix does not know the loss of a whole plan so well. Where a few per cent count, more samples still pay, and so does re-ranking. The checks
took {shares} of the time of these runs of seconds; at as many candidates they cost the same where a forward takes a thousand times longer.
"""


def limits(study: dict[str, Any]) -> str:
    return """
## What this does not show

Nets of 50,000 to 300,000 weights on 16×16 images stand in for ImageNet models here: rankings are a lead, not a law
([ImageNet recipe](imagenet.md)). Training seeds are few, and plans share held-out images, so rows are not independent. Costs were
taken on a machine that others used at the same time; forwards are exact, seconds are not.

Repeat it: `pip install nvidia-modelopt` beside `make dev`, then `python -m bench.study` (about 50 minutes of
CPU time; it goes on where it was stopped).
"""


# ---- figures -----------------------------------------------------------------------------------------------------


def figure_of_losses(study: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    present = [s for s in ("tensor", "channel") if any(row["scales"] == s for row in study["cells"])]
    figure = Figure(figsize=(10, 3.2 * len(present)), layout="constrained")
    axes = figure.subplots(len(present), len(NETS), squeeze=False, sharex=True)
    for row, scales in zip(axes, present, strict=True):
        for axis, (net, title) in zip(row, NETS.items(), strict=True):
            cells = [c for c in study["cells"] if c["net"] == net and c["scales"] == scales]
            for method, label in SHOWN.items():
                if method == "uniform":
                    continue
                points = [(c["budget"], c["methods"][method]) for c in cells if method in c["methods"]]
                style = {"lw": 2.2, "marker": "o"} if method == OURS else {"lw": 1, "marker": "."}
                if points:
                    heights, errors = [m["mean"] for _, m in points], [m["stderr"] for _, m in points]
                    axis.errorbar([b for b, _ in points], heights, errors, label=label, **style)
            axis.set(title=f"{title}, one scale per {scales}", yscale="log")
    for axis in axes[-1]:
        axis.set_xlabel("bits per weight")
    axes[0, 0].set_ylabel("held-out loss over float (nats)")
    axes[0, 0].legend(fontsize=8)
    save(figure, path)


def figure_of_costs(study: dict[str, Any], path: Path) -> None:
    """Estimators: forwards per run against the mean excess of their plans relative to the diagonal's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, len(NETS), squeeze=False)
    names = (
        "logit",
        "gradient",
        "corrected",
        f"exact, {FEW} samples",
        f"logit, {FEW} samples",
        f"gradient, {FEW} samples",
    )
    for axis, (net, title) in zip(axes[0], NETS.items(), strict=True):
        thorough = [u for u in study["units"] if u["entries"] and u["unit"]["net"] == net]
        for name in names:
            costs, ratios = [], []
            for unit in thorough:
                loss = {(p["method"], p["budget"]): p["loss"] - unit["float"]["loss"] for p in unit["plans"]}
                costs.append(unit["cost"][name]["forwards"])
                ratios += [loss[f"{name}: original", b] / loss[ADDITIVE, b] for b in BUDGETS if b <= REFINED_TO]
            if costs:
                axis.scatter(np.mean(costs), np.exp(np.mean(np.log(ratios))), label=name, zorder=3)
        axis.axhline(1, lw=1, color="gray")
        axis.set(title=title, xscale="log", xlabel="forwards of one sample")
    axes[0, 0].set_ylabel("excess, diagonal = 1 (geometric mean)")
    next(axis for axis in axes[0][::-1] if axis.collections).legend(fontsize=7)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "clado", "svg.fonttype": "none"}):  # the same data give the same file
        figure.savefig(path, metadata={"Date": None})
