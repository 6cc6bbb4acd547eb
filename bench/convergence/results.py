"""The experiments' rows: one CSV a study, a line a finished run, appended as runs finish and never rewritten."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, str]

RUN_COLUMNS = (
    "study", "config", "seed", "source", "wrong", "share", "held_out", "min_scale", "teacher", "stored_crops", "k", "codec", "method",
    "varied", "discard_below", "calibrate_below", "discard_above", "confidence", "smoothing", "student", "lr", "crops_per_image", "steps",
    "crops", "top1_last", "top1_best", "top5_last", "top1_folders_last", "val_images", "usable_images", "discarded", "calibrated", "kept",
    "wall_seconds", "train_seconds", "cpu_seconds", "attempts", "threads", "jobs", "machine", "cores", "python", "torch", "ferkd", "commit",
    "finished",
)  # fmt: skip
"""`cpu_seconds`: user and system time of the run's processes, start and evaluation included; empty when an attempt's was lost.
`discarded`, `calibrated`, `kept`: stored crops by region. `top1_best` is the last where val is read once."""

TEN_WAY = "top1_folders_last"
"""What Imagenette is tuned by and compared by: accuracy among the folders' ten classes, of the thousand that teacher and student have."""

CURVE_COLUMNS = ("study", "config", "seed", "step", "crops", "seconds", "top1")
"""A run's evaluations, for studies with more than one."""


def runs_file(results: Path, study: str) -> Path:
    return results / f"convergence-{study}.csv"


def curves_file(results: Path, study: str) -> Path:
    return results / f"convergence-{study}-curves.csv"


def read_rows(path: Path) -> list[Row]:
    """The whole lines of a CSV; none when there is no such file. A last line that a kill cut short is not one."""
    if not path.exists():
        return []
    text = path.read_text()
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def append_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds rows to a CSV, which is begun if need be, and waits until they are on the disk. What a kill cut short is cut off.

    Raises ValueError when the file has other columns.
    """
    line = io.StringIO()
    writer = csv.DictWriter(line, columns, lineterminator="\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        file.seek(0)
        text = file.read()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            file.truncate(whole)
        if whole == 0:
            writer.writeheader()
        elif text.split(b"\n", 1)[0].decode() != ",".join(columns):
            raise ValueError(f"{path}: has other columns than this code writes; move it away, or write its rows anew")
        writer.writerows(rows)
        file.write(line.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())
