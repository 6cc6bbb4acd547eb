"""From the experiments' rows to tables and figures; whatever rows there are.

python -m bench.convergence.analyse       bench/results/convergence-*.csv -> convergence.md and convergence-*.png beside them
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.convergence import figures
from bench.convergence.results import TEN_WAY, Row, curves_file, read_rows, runs_file
from bench.convergence.studies import ALL_STUDIES, NotTuned
from bench.convergence.tables import ablation_tables, budget_table, design_tables, grid, ten_way_tables, tuning_table

THRESHOLDS = ("discard_below", "calibrate_below")


def why_section(rows: Sequence[Row]) -> str:
    """A table for each store and policy, by region and by scale (bands of confidence are in the figure)."""
    parts = []
    for key in dict.fromkeys((row["store"], row["confidence"], row["discard_below"], row["calibrate_below"]) for row in rows):
        mine = [
            r for r in rows if (r["store"], r["confidence"], r["discard_below"], r["calibrate_below"]) == key and r["by"] != "confidence"
        ]
        crops = {by: sum(int(row["crops"]) for row in mine if row["by"] == by) for by in ("region", "scale")}
        lines = [
            (row["by"], row["group"], f"{int(row['crops']) / crops[row['by']]:.1%}",
             *(f"{float(row[name]):.1%}" for name in ("teacher_true", "teacher_as_told", "told_true", "mean_max")))
            for row in mine
        ]  # fmt: skip
        head = ("by", "group", "share of crops", "teacher right", "teacher agrees with the folder", "folder right", "mean largest p")
        parts += [f"### {key[0]}, {key[1]}, discard below {key[2]}, calibrate below {key[3]}", grid(head, lines)]
    return "\n\n".join(parts)


SECTIONS: dict[str, tuple[str, Callable[[Sequence[Row]], str]]] = {
    "tune-rate": ("Tuning: learning rate", lambda rows: tuning_table(rows, ("lr",))),
    "tune-thresholds": ("Tuning: thresholds", lambda rows: tuning_table(rows, THRESHOLDS)),
    "cifar-main": ("CIFAR-10, main design", design_tables),
    "online": ("An online teacher beside stored labels", budget_table),
    "cifar-small-crops": ("CIFAR-10, crops the teachers cannot judge", design_tables),
    "ablations": ("Ablations, 10,000 images", ablation_tables),
    "convergence": ("Budgets", budget_table),
    "convergence-wrong": ("Budgets, 40 % wrong ground truth", budget_table),
    "imagenette-tune": (
        "Tuning: thresholds on Imagenette, ten-way accuracy",
        lambda rows: tuning_table(rows, THRESHOLDS, TEN_WAY),
    ),
    "imagenette-tune-folders": (
        "Tuning: thresholds on Imagenette, the teacher's answers among the folders' classes",
        lambda rows: tuning_table(rows, THRESHOLDS, TEN_WAY),
    ),
    "imagenette": ("Imagenette, ten-way accuracy", ten_way_tables),
    "gpu-imagenette-resnet18": ("Imagenette at 128 px, ResNet-18, ten-way accuracy", ten_way_tables),
    "gpu-imagenette-resnet50": ("Imagenette at 128 px, ResNet-50, ten-way accuracy", ten_way_tables),
}


def report(results: Path) -> str:
    """All tables, as Markdown."""
    parts = ["# The experiments' tables\n\nMade by `python -m bench.convergence.analyse`; the design is in bench/convergence/README.md."]
    for name, make in ALL_STUDIES.items():
        rows = read_rows(runs_file(results, name))
        try:
            known = {(arm.config, str(seed)) for arm, seed in make(results).runs()}
        except NotTuned:
            continue
        mine = [row for row in rows if (row["config"], row["seed"]) in known]
        if not mine:
            continue
        title, table = SECTIONS[name]
        machines = ", ".join(sorted({f"{row['machine']} ({row['cores']} cores), torch {row['torch']}" for row in mine}))
        parts.append(f"## {title}\n\n`{name}`: {len(mine)} of {len(known)} runs, on {machines}.\n\n{table(mine)}")
        if len(rows) > len(mine):
            parts.append(f"({len(rows) - len(mine)} rows are of settings that the study no longer has.)")
    why = read_rows(results / "convergence-why.csv")
    if why:
        parts.append(f"## Why: the stores under the rule\n\n{why_section(why)}")
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parents[1] / "results", help="folder of the CSVs")
    results: Path = parser.parse_args().results
    (results / "convergence.md").write_text(report(results))
    written = [results / "convergence.md"]
    for study in ("cifar-main", "cifar-small-crops", "imagenette", "gpu-imagenette-resnet18", "gpu-imagenette-resnet50"):
        if rows := read_rows(runs_file(results, study)):
            column = TEN_WAY if "imagenette" in study else "top1_last"
            written.append(figures.methods_picture(rows, results / f"convergence-{study}.png", column))
    studies = ("convergence", "convergence-wrong")
    if rows := [row for study in studies for row in read_rows(runs_file(results, study))]:
        curves = [row for study in studies for row in read_rows(curves_file(results, study))]
        written.append(figures.curves_picture(rows, curves, results / "convergence.png"))
    if rows := read_rows(results / "convergence-why.csv"):
        written.append(figures.why_picture(rows, results / "convergence-why.png"))
    for path in written:
        print(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
