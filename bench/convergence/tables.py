"""The tables, as Markdown, from whatever rows there are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.convergence.paired import LEVEL, Difference, asks_for_more, holm, paired_difference, spread
from bench.convergence.results import TEN_WAY, Row

PLANNED = (("{FerKD}", "FKD"), ("FKD", "hard labels + smoothing"), ("FerKD + SelfMix", "{FerKD}"))
"""First - second; {FerKD} has the confidence that tuning chose, which is also SelfMix's."""

METHODS = (
    "hard labels", "hard labels + smoothing", "FKD", "FKD + Mixup/CutMix", "FerKD (max)", "FerKD (target)", "FerKD + SelfMix",
    "online teacher",
)  # fmt: skip


class Cell(NamedTuple):
    """What is compared with each other: runs that differ in method and seed alone. Hard labels belong to every teacher's cell."""

    source: str
    wrong: float
    min_scale: float
    teacher: str

    def __str__(self) -> str:
        return f"{self.source}, {self.teacher}, {self.wrong:.0%} wrong ground truth, crops from {self.min_scale:g}"


def cells(rows: Iterable[Row]) -> dict[Cell, dict[str, dict[int, Row]]]:
    """cell -> method -> seed -> row, in the rows' order."""
    rows = list(rows)
    found: dict[Cell, dict[str, dict[int, Row]]] = {}
    for row in sorted((row for row in rows if row["teacher"]), key=lambda row: (float(row["wrong"]), row["teacher"])):
        found.setdefault(Cell(row["source"], float(row["wrong"]), float(row["min_scale"]), row["teacher"]), {})
    for cell, methods in found.items():
        for name in METHODS:
            for row in rows:
                same = (row["source"], float(row["wrong"]), float(row["min_scale"])) == cell[:3] and row["teacher"] in ("", cell.teacher)
                if same and row["method"] == name:
                    methods.setdefault(name, {})[int(row["seed"])] = row
    return found


def top1(runs: dict[int, Row], column: str = "top1_last") -> dict[int, float]:
    return {seed: float(row[column]) for seed, row in runs.items()}


def points(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:.2f}"


def signed(difference: Difference) -> str:
    """In points of top-1, with the 95 % interval."""
    interval = "" if math.isnan(difference.half_width) else f" ± {100 * difference.half_width:.2f}"
    return f"{100 * difference.mean:+.2f}{interval}"


def grid(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    body = ["| " + " | ".join(str(value) for value in line) + " |" for line in lines]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body])


def mean_of(runs: dict[int, Row], column: str) -> float:
    values = [float(row[column]) for row in runs.values() if row[column]]
    return sum(values) / len(values) if values else math.nan


def share_of(runs: dict[int, Row], column: str) -> str:
    row = next(iter(runs.values()))
    if not row[column]:
        return ""
    return f"{int(row[column]) / sum(int(row[name]) for name in ('discarded', 'calibrated', 'kept')):.1%}"


def method_table(methods: dict[str, dict[int, Row]], column: str = "top1_last") -> str:
    lines = []
    for name, runs in methods.items():
        mean, deviation, n = spread(list(top1(runs, column).values()))
        lines.append(
            (name, points(mean), points(deviation), n, f"{mean_of(runs, 'cpu_seconds'):.0f}", f"{mean_of(runs, 'usable_images'):,.0f}",
             share_of(runs, "discarded"), share_of(runs, "calibrated"))
        )  # fmt: skip
    return grid(("method", "top-1, last", "s.d.", "n", "CPU s", "usable images", "crops discarded", "calibrated"), lines)


def planned_table(methods: dict[str, dict[int, Row]], column: str = "top1_last") -> str:
    """The three planned comparisons of a cell, Holm-corrected together, and whether the rule asks for more seeds."""
    ours = [runs for name in ("FerKD + SelfMix", "FerKD (target)", "FerKD (max)") if (runs := methods.get(name))]
    primary = next(iter(ours[0].values()))["confidence"] if ours else "target"
    pairs = [tuple(name.format(FerKD=f"FerKD ({primary})") for name in pair) for pair in PLANNED]
    known = [
        (f"{a} - {b}", paired_difference(top1(methods[a], column), top1(methods[b], column))) for a, b in pairs if {a, b} <= methods.keys()
    ]
    there = [(name, difference) for name, difference in known if difference is not None]
    lines = []
    for (name, difference), p in zip(there, holm([difference.p for _, difference in there]), strict=True):
        said = "" if math.isnan(p) or difference.n < 5 else "yes" if p < LEVEL else "no"
        lines.append((name, signed(difference), difference.n, "" if math.isnan(p) else f"{p:.2g}", said))
    table = grid(("planned comparison, paired by seed", "points (95 % interval)", "n", "p, Holm", "a difference"), lines)
    first = there[0][1] if there and there[0][0].startswith("FerKD") else None
    if first is not None and first.n == 5:
        table += f"\n\nBy the rule for more seeds: {'ten' if asks_for_more(first) else 'five are enough'}."
    return table


def design_tables(rows: Iterable[Row], column: str = "top1_last") -> str:
    parts = []
    for cell, methods in cells(rows).items():
        parts += [f"### {cell}", method_table(methods, column), planned_table(methods, column)]
    return "\n\n".join(parts)


def ten_way_tables(rows: Sequence[Row]) -> str:
    """The design's tables by accuracy among the folders' classes, and each method's among all the classes that the teacher has."""
    parts = [design_tables(rows, TEN_WAY)]
    for cell, methods in cells(rows).items():
        parts += [f"### {cell}, among all the teacher's classes (description)", method_table(methods)]
    return "\n\n".join(parts)


def tuning_table(rows: Sequence[Row], by: Sequence[str], column: str = "top1_last") -> str:
    """The mean held-out top-1 by the columns `by`, the best of each method and share of wrong ground truth in bold."""
    groups: dict[tuple[str, ...], dict[int, float]] = {}
    for row in rows:
        groups.setdefault((row["wrong"], row["method"], *(row[name] for name in by)), {})[int(row["seed"])] = float(row[column])
    best = {key[:2]: max(means(groups, key[:2])) for key in groups}
    lines = []
    for key, values in sorted(groups.items()):
        mean = spread(list(values.values())).mean
        shown = f"**{points(mean)}**" if (len(values), mean) == best[key[:2]] else points(mean)
        lines.append((f"{float(key[0]):.0%}", *key[1:], shown, len(values)))
    return grid(("wrong", "method", *by, "held-out top-1", "n"), lines)


def means(groups: dict[tuple[str, ...], dict[int, float]], start: tuple[str, ...]) -> list[tuple[int, float]]:
    """(seeds, mean) of the groups that begin so: those with the most seeds are the ones that were run again."""
    return [(len(values), spread(list(values.values())).mean) for key, values in groups.items() if key[: len(start)] == start]


def ablation_tables(rows: Sequence[Row]) -> str:
    """One table for each thing that was varied, "NAME = VALUE" in the column `varied`, beside the rows that vary nothing ("base")."""
    names = list(dict.fromkeys(row["varied"].partition(" = ")[0] for row in rows if " = " in row["varied"]))
    parts = []
    for name in names:
        varied = [row for row in rows if row["varied"].partition(" = ")[0] == name]
        mine = varied + [row for row in rows if row["varied"] == "base" and row["wrong"] in {other["wrong"] for other in varied}]
        groups: dict[tuple[str, str, str], dict[int, Row]] = {}
        for row in mine:
            groups.setdefault((row["wrong"], row["varied"], row["method"]), {})[int(row["seed"])] = row
        base = {key[0]: runs for key, runs in groups.items() if key[1] == "base" and key[2].startswith("FerKD")}
        lines = []
        for (wrong, setting, method), runs in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] != "base", item[0])):
            mean, deviation, n = spread(list(top1(runs).values()))
            against = paired_difference(top1(runs), top1(base[wrong])) if wrong in base and runs is not base[wrong] else None
            lines.append(
                (f"{float(wrong):.0%}", method, setting, points(mean), points(deviation), n, signed(against) if against else "",
                 share_of(runs, "discarded"), share_of(runs, "calibrated"))
            )  # fmt: skip
        head = ("wrong", "method", "varied", "top-1, last", "s.d.", "n", "against base FerKD", "discarded", "calibrated")
        parts += [f"### {name}", grid(head, lines)]
    return "\n\n".join(parts)


def budget_table(rows: Sequence[Row]) -> str:
    """Accuracy by budget: each a run of its own with its own cosine."""
    groups: dict[tuple[int, str], dict[int, Row]] = {}
    for row in rows:
        groups.setdefault((int(row["crops"]), row["method"]), {})[int(row["seed"])] = row
    lines = []
    for (crops, method), runs in sorted(groups.items(), key=lambda item: (item[0][0], METHODS.index(item[0][1]))):
        mean, deviation, n = spread(list(top1(runs).values()))
        fkd = groups.get((crops, "FKD"))
        against = paired_difference(top1(runs), top1(fkd)) if fkd and method != "FKD" else None
        lines.append(
            (f"{crops:,}", method, points(mean), points(deviation), n, points(spread(list(top1(runs, 'top1_best').values())).mean),
             signed(against) if against else "", f"{mean_of(runs, 'cpu_seconds'):.0f}")
        )  # fmt: skip
    return grid(("crops", "method", "top-1, last", "s.d.", "n", "best", "against FKD", "CPU s"), lines)
