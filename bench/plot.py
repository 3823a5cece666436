"""Share of the ceiling by size, one line per op, dtype and number of threads."""

from __future__ import annotations

import argparse
from collections import defaultdict

from .compare import rows_of


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench plot", description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--out", default="share.svg", help="svg, png or pdf by its ending")
    options = parser.parse_args(arguments)

    try:
        import matplotlib

        rows = rows_of(options.file)
    except ImportError:
        parser.error("a plot needs matplotlib: pip install clado[bench]")
    except ValueError as error:
        parser.error(str(error))
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = defaultdict(list)
    for (op, _, dtype, threads), row in rows.items():
        lines[op, dtype, threads].append((row["bytes"] / 2**20, row["share_of_ceiling"]))
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for (op, dtype, threads), points in sorted(lines.items()):
        points.sort()
        label = f"{op} {dtype}" + (f", {threads} threads" if threads else "")
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="MiB read and written", ylabel="share of the measured ceiling", ylim=(0, None))
    axes.legend(fontsize="small", ncols=2)
    try:
        figure.savefig(options.out)
    except (OSError, ValueError) as error:
        parser.error(f"out must be an svg, png or pdf file that can be written, got {options.out}: {error}")
    print(options.out)
    return 0
