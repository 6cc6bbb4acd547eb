"""The figures, as PNG of less than 200 kB."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.convergence.results import Row
from bench.convergence.tables import METHODS, cells, top1

COLOURS = dict(zip(METHODS, ("#adb5bd", "#5c6b73", "#30638e", "#7fb2d9", "#edae49", "#d1495b", "#8f2d56", "#2e933c"), strict=True))


def methods_picture(rows: Sequence[Row], path: Path, column: str = "top1_last") -> Path:
    """Top-1 at the last step by method, a panel a cell: every seed, and mean ± standard deviation."""
    found = cells(rows)
    across = min(2, max(1, len(found)))
    down = -(-len(found) // across) or 1
    figure = Figure(figsize=(4.2 * across, 2.7 * down), dpi=110)
    panels = np.ravel(figure.subplots(down, across, squeeze=False))
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    for axes, (cell, methods) in zip(panels, found.items(), strict=False):
        for place, (name, runs) in enumerate(methods.items()):
            values = [100 * value for value in top1(runs, column).values()]
            axes.plot(values, [place] * len(values), "o", markersize=3, alpha=0.5, color=COLOURS[name])
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            axes.errorbar(statistics.fmean(values), place, xerr=deviation, fmt="|", markersize=12, capsize=3, color=COLOURS[name])
        axes.set_yticks(range(len(methods)), list(methods), fontsize=7)
        axes.invert_yaxis()
        axes.set_title(f"teacher {cell.teacher}, {cell.wrong:.0%} wrong ground truth", fontsize=9)
        axes.set_xlabel("top-1 at the last step, %", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(axis="x", linewidth=0.4)
    return _save(figure, path)


def curves_picture(rows: Sequence[Row], curves: Sequence[Row], path: Path) -> Path:
    """Top-1 against crops seen and against processor time: the largest budget's curve with its band over seeds, and where the runs of
    every budget end (mean and standard deviation). A row of panels for each share of wrong ground truth."""
    shares = sorted({row["wrong"] for row in rows}, key=float)
    figure = Figure(figsize=(9.0, 3.4 * len(shares)), dpi=110)
    for (by_crops, by_time), wrong in zip(figure.subplots(len(shares), 2, sharey="row", squeeze=False), shares, strict=True):
        mine = [row for row in rows if row["wrong"] == wrong]
        largest = max(int(row["crops"]) for row in mine)
        for name in METHODS:
            runs = [row for row in mine if row["method"] == name]
            if not runs:
                continue
            costs = [float(row["cpu_seconds"]) / int(row["crops"]) for row in runs if row["cpu_seconds"]]
            second_a_crop = statistics.fmean(costs) if costs else float("nan")
            for axes, scale in ((by_crops, 1e-6), (by_time, second_a_crop / 60)):
                _curve(axes, name, [row for row in runs if int(row["crops"]) == largest], curves, scale)
                _ends(axes, name, runs, scale)
        by_crops.set_xlabel("million crops seen")
        by_time.set_xlabel("minutes of one core (start and evaluations included)")
        by_crops.set_ylabel("top-1 on val, %")
        by_crops.set_title(f"{float(wrong):.0%} wrong ground truth", fontsize=9)
        for axes in (by_crops, by_time):
            axes.grid(linewidth=0.4)
        by_crops.legend(fontsize=7, frameon=False, loc="lower right")
    return _save(figure, path)


def _curve(axes: Axes, name: str, runs: Sequence[Row], curves: Sequence[Row], scale: float) -> None:
    keys = {(row["config"], row["seed"]) for row in runs}
    by_crops: dict[int, list[float]] = {}
    for point in curves:
        if (point["config"], point["seed"]) in keys:
            by_crops.setdefault(int(point["crops"]), []).append(100 * float(point["top1"]))
    if not by_crops:
        return
    crops = sorted(by_crops)
    mean = np.array([statistics.fmean(by_crops[c]) for c in crops])
    deviation = np.array([statistics.stdev(by_crops[c]) if len(by_crops[c]) > 1 else 0.0 for c in crops])
    x = np.array(crops) * scale
    axes.plot(x, mean, linewidth=1.2, color=COLOURS[name], label=name)
    axes.fill_between(x, mean - deviation, mean + deviation, color=COLOURS[name], alpha=0.2, linewidth=0)


def _ends(axes: Axes, name: str, runs: Sequence[Row], scale: float) -> None:
    for crops in sorted({int(row["crops"]) for row in runs}):
        values = [100 * float(row["top1_last"]) for row in runs if int(row["crops"]) == crops]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        axes.errorbar(crops * scale, statistics.fmean(values), yerr=deviation, fmt="o", markersize=4, capsize=3, color=COLOURS[name])


def why_picture(rows: Sequence[Row], path: Path) -> Path:
    """How often the teacher is right by band of confidence, and how many crops lie there: a line a store."""
    figure = Figure(figsize=(9.0, 6.0), dpi=110)
    panels = figure.subplots(2, 2, sharex=True)
    colours: dict[tuple[str, str], str] = {}
    for column, confidence in enumerate(("max", "target")):
        right, share = panels[:, column]
        mine = [row for row in rows if row["by"] == "confidence" and row["confidence"] == confidence]
        for key in dict.fromkeys((row["store"], row["teacher"], row["wrong"], row["min_scale"]) for row in mine):
            points = [row for row in mine if row["store"] == key[0]]
            x = [float(row["group"][:4]) + 0.025 for row in points]
            crops = sum(int(row["crops"]) for row in points)
            label = f"{key[1]}, {float(key[2]):.0%} wrong, from {key[3]}"
            colour = colours.setdefault((key[1], key[3]), f"C{len(colours)}")
            style = {"marker": ".", "linewidth": 1.0, "color": colour, "linestyle": "--" if float(key[2]) else "-"}
            right.plot(x, [100 * float(row["teacher_true"]) for row in points], label=label, **style)
            share.semilogy(x, [100 * int(row["crops"]) / crops for row in points], **style)
        right.set_title(f"confidence: {'the largest probability' if confidence == 'max' else 'of the ground truth'}", fontsize=9)
        right.set_ylabel("teacher right, %")
        share.set_ylabel("share of crops, %")
        share.set_xlabel("confidence")
        for axes in (right, share):
            axes.grid(linewidth=0.4)
    named: set[str] = set()
    for axes in panels[0]:  # the second column names what the first one lacks
        lines = [line for line in axes.get_lines() if line.get_label() not in named]
        named |= {str(line.get_label()) for line in lines}
        if lines:
            axes.legend(handles=lines, fontsize=6, frameon=False)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path)
    return path
