"""The loss benchmark's table as a picture: time and share of the limit against the number of classes and of rows.

    python bench/plot_loss.py                              this machine's table in ${OUT:-bench/results}, the picture beside it
    python bench/plot_loss.py bench/results/loss-*.csv      any tables

One dtype, one batch for the sweep over classes and one number of classes for the sweep over batches: those with the most shapes in the
table. Log axes. Variants that compute another loss are dotted.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import machine

Row = dict[str, str]

STYLES = {  # variant: (colour, line width); the order of the legend
    "copy": ("black", 1.5),
    "kernel": ("tab:red", 2.2),
    "ferkd": ("tab:orange", 2.2),
    "ferkd_compiled": ("gold", 1.8),
    "compiled_sparse": ("tab:blue", 1.2),
    "compiled_dense": ("tab:cyan", 1.2),
    "eager_dense": ("tab:green", 1.2),
    "eager_sparse": ("tab:olive", 1.2),
    "fkd": ("tab:purple", 1.2),
    "hard_labels": ("tab:gray", 1.2),
    "liger": ("tab:pink", 1.2),
}
MARKERS = {"triton": "^", "cuda": "s"}


def most_shapes(rows: list[Row], column: str, over: str) -> str:
    """The value of `column` with the most values of `over`; the earlier in the table wins a tie."""
    values = list(dict.fromkeys(row[column] for row in rows))
    return max(values, key=lambda value: len({row[over] for row in rows if row[column] == value}))


def lines(rows: list[Row], over: str) -> dict[tuple[str, str], list[Row]]:
    """(variant, backend): its rows in the order of `over`, in the legend's order; of the other settings only ferkd_compiled's."""
    found: dict[tuple[str, str], list[Row]] = {}
    for variant in STYLES:
        for row in rows:
            if row["variant"] == variant and (row["setting"] == "half" or variant == "ferkd_compiled"):
                found.setdefault((variant, row["backend"]), []).append(row)
    return {key: sorted(line, key=lambda row: int(row[over])) for key, line in found.items()}


def draw(rows: list[Row], axes: tuple[Axes, Axes], over: str) -> None:
    """Time above, share of the limit below; a graph's replay of our kernels dashed, where there is one."""
    for (variant, backend), line in lines(rows, over).items():
        colour, width = STYLES[variant]
        at = [int(row[over]) for row in line]
        name = variant if backend in ("torch", "inductor") else f"{variant} ({backend})"
        if line[0]["note"]:
            name += ", another loss"
        style: dict[str, Any] = {"color": colour, "linewidth": width, "marker": MARKERS.get(backend, "o"), "markersize": 4, "label": name}
        dots = ":" if line[0]["note"] else "-"
        axes[0].plot(at, [float(row["median_ms"]) for row in line], dots, **style)
        axes[1].plot(at, [float(row["share_of_limit"]) for row in line], dots, **style)
        if variant == "kernel" and all(row["graph_ms"] for row in line):
            style |= {"linewidth": 1.0, "label": f"{name} in a graph"}
            axes[0].plot(at, [float(row["graph_ms"]) for row in line], "--", **style)
            axes[1].plot(at, [float(row["graph_share"]) for row in line], "--", **style)


def plot(path: Path) -> Path:
    """The picture of one CSV, written beside it."""
    with open(path, newline="") as file:
        table = list(csv.DictReader(file))
    dtype = most_shapes([row | {"shape": f"{row['batch']}x{row['classes']}"} for row in table], "dtype", "shape")
    table = [row for row in table if row["dtype"] == dtype]
    batch, classes = most_shapes(table, "batch", "classes"), most_shapes(table, "classes", "batch")

    figure, axes = plt.subplots(2, 2, figsize=(12, 8), sharex="col", layout="constrained")
    of_batch = [row for row in table if row["batch"] == batch]
    of_classes = [row for row in table if row["classes"] == classes]
    draw(of_batch, (axes[0, 0], axes[1, 0]), "classes")
    draw(of_classes, (axes[0, 1], axes[1, 1]), "batch")
    axes[0, 0].set_title(f"{int(batch):,} rows")
    axes[0, 1].set_title(f"{int(classes):,} classes")
    axes[1, 0].set_xlabel("classes")
    axes[1, 1].set_xlabel("rows")
    for above, below in axes.T:
        above.set_ylabel("forward + backward, ms")
        below.set_ylabel("share of the limit (copy / time)")
        for axis in (above, below):
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if axis is below else (1.0,)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(True, which="major", alpha=0.4)
    for axis, over, rows in ((axes[1, 0], "classes", of_batch), (axes[1, 1], "batch", of_classes)):
        measured = sorted({int(row[over]) for row in rows})
        apart = [at for i, at in enumerate(measured) if i == 0 or at > 1.2 * measured[i - 1]]  # 1,000 stands for 1,001 too
        axis.set_xticks(apart, [f"{at:,}" for at in apart])
        axis.xaxis.set_minor_locator(NullLocator())
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False)
    facts = table[0]
    busy = max(float(row["others_busy"]) for row in table)
    threads = f"{facts['threads']} thread" + ("s" if facts["threads"] != "1" else "")
    others = f"; other processes kept up to {busy:.1f} processors busy" if busy >= 0.3 else ""
    figure.suptitle(f"{facts['device']}, {dtype}, k = {facts['k']}, torch {facts['torch']}, {threads}{others}")
    to = path.with_suffix(".png")
    figure.savefig(to, dpi=100)
    plt.close(figure)
    with Image.open(to) as picture:  # few colours: a third of the bytes
        picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(to, optimize=True)
    return to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="*")
    here = Path(os.environ.get("OUT") or Path(__file__).parent / "results") / f"loss-{machine.file_name(machine.device())}.csv"
    for path in parser.parse_args().csv or [here]:
        print(f"wrote {plot(path)}")


if __name__ == "__main__":
    main()
