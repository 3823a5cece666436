"""``python -m bench.study train|measure|page``: when interactions matter, what each estimator costs; see docs/evidence.md.

`train` trains the nets (fixed seeds), `measure` profiles, plans and scores, `page` writes study.json, the figures and
docs/evidence.md. Each step skips what is there, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

from . import page
from .measure import SCALES, Unit, measure
from .nets import NETS, trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("train", "measure", "page", "all"), nargs="?", default="all")
    parser.add_argument("--work", type=Path, default=Path("build/study"), help="nets, profiles and scores")
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--samples", default="a,b", help="sensitivity sets")
    parser.add_argument("--scales", default=",".join(SCALES))
    parser.add_argument("--json", type=Path, help="where `page` writes the results", default=page.RESULTS)
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    if options.step in ("train", "all"):
        for net, seed in itertools.product(options.nets.split(","), seeds):
            trained(net, seed, options.work / "nets")
    if options.step in ("measure", "all"):
        split = (options.samples.split(","), seeds, options.scales.split(","), options.nets.split(","))
        for samples, seed, scales, net in itertools.product(*split):
            unit, start = Unit(net, seed, samples, scales), time.perf_counter()
            measure(unit, options.work)
            print(f"{unit.name}: {time.perf_counter() - start:.0f} s", flush=True)
    if options.step in ("page", "all"):
        page.write(options.work, options.json)


if __name__ == "__main__":
    main()
