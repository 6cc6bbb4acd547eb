"""The picture of the loss benchmark: which rows of a table it shows, and that it stays small."""

import csv
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import plot_loss

COLUMNS = ("batch", "classes", "k", "dtype", "variant", "backend", "setting", "median_ms", "share_of_limit", "graph_ms", "graph_share")


def row(batch, classes, variant, backend="torch", dtype="float32", setting="half", ms=1.0, graph="", note=""):
    values = (batch, classes, 5, dtype, variant, backend, setting, ms, 0.5, graph, graph and 0.9)
    facts = {"device": "a device", "torch": "2", "threads": "1", "others_busy": "0.00", "note": note}
    return {column: str(value) for column, value in zip(COLUMNS, values, strict=True)} | facts


def test_lines_are_sorted_and_hold_the_plain_setting_and_the_compiled_loss():
    rows = [
        row(8, 1000, "ferkd", "cpu"),
        row(8, 10, "ferkd", "cpu"),
        row(8, 10, "ferkd", "cpu", setting="packed"),
        row(8, 10, "ferkd_compiled", "cpu", setting="upstream"),
        row(8, 10, "copy"),
    ]
    found = plot_loss.lines(rows, "classes")
    assert list(found) == [("copy", "torch"), ("ferkd", "cpu"), ("ferkd_compiled", "cpu")]
    assert [line["classes"] for line in found["ferkd", "cpu"]] == ["10", "1000"]


def test_the_sweeps_are_the_longest_of_the_table():
    rows = [row(8, 10, "copy"), row(8, 20, "copy"), row(16, 20, "copy"), row(8, 10, "copy", dtype="float16")]
    assert plot_loss.most_shapes(rows, "batch", "classes") == "8"
    assert plot_loss.most_shapes(rows, "classes", "batch") == "20"


def test_the_picture_of_a_gpu_table_is_small(tmp_path):
    path = tmp_path / "loss-x.csv"
    sizes = [(b, c) for b in (256, 1024, 4096, 8192) for c in (1000, 1001, 21841, 50257, 128256)]
    rows = []
    for b, c in sizes:
        for variant, backend in [(name, backend) for name in plot_loss.STYLES for backend in ("cuda", "triton")]:
            note = "another loss" if variant in ("hard_labels", "liger") else ""
            rows.append(row(b, c, variant, backend, ms=b * c * 1e-6 * (1 + len(variant)), graph=b * c * 1e-6, note=note))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    picture = plot_loss.plot(path)
    assert picture == tmp_path / "loss-x.png"
    assert picture.stat().st_size < 200_000
