"""Loss forward + backward beside the ways people compute it without ferkd, and beside a plain copy of the logits.

    python bench/bench_loss.py                      the table of this machine; writes ${OUT:-bench/results}/loss-DEVICE.csv
    pytest bench/bench_loss.py --benchmark-enable    a part of it under pytest-benchmark

What runs is in loss_variants.py, how it is timed in timing.py. Columns of the CSV:

    share_of_limit   the copy's time / the time: 1 is one read and one write of the logits at the speed of a copy in the same run
    gb_per_s         from one read and one write of the logits, whatever a variant really moves
    times_ferkd      the time / that of `ferkd`: ferkd_loss and its backward through eager autograd, by the backend `auto` would take
    graph_ms         GPU: the same call in a replayed CUDA graph, the device's time without the host's; graph_share to the copy's
    peak_mb          MB of memory held beyond the inputs at the worst moment, the gradient included
    launches         GPU: kernels, copies and fills of one call; a CPU has none
    setting          how the labels come or what is asked beside the loss; `half` is the plain case
    others_busy      processors that other processes kept busy meanwhile: with more than a few tenths, medians on a CPU mean little
    note             what makes a row incomparable: the hard-label losses compute something else

On a GPU the inputs rotate through more than twice its L2 cache, so logits come from memory; in training a small batch's would still be in
the cache. On a CPU one set is used again and again and stays in the cache where it fits, as it does in training. On a CPU that others use
too OMP_NUM_THREADS=1 keeps the ratios meaningful: two threads of one loop wait for each other's time slices. glibc is told to keep freed
memory, for all variants alike: page faults of fresh pages would be most of what the larger shapes measure otherwise.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import loss_variants, machine, timing
from bench.loss_variants import Problem, Variant
from ferkd import ops

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


@dataclasses.dataclass(frozen=True)
class Cell:
    """One shape and dtype of the table."""

    batch: int
    classes: int
    dtype: torch.dtype
    compiled: bool = False
    """Whether torch.compile's variants are in it: each compiles for seconds."""
    settings: bool = False
    """Whether ferkd's other settings are in it."""

    def __str__(self) -> str:
        return f"{self.batch}x{self.classes} {name_of(self.dtype)}"


# In the order of importance: what no time is left for is dropped from the end. 1,000 classes with FKD's batch of 1,024 crops and
# ImageNet-21k's 21,841 carry the budgets of docs/design.md; 10 classes and 256 rows show the fixed cost, 1,001 that of rows which
# begin off 16 bytes.
CPU_CELLS = (
    Cell(1024, 1000, FLOAT32, compiled=True, settings=True),
    Cell(256, 21841, FLOAT32, compiled=True),
    Cell(1024, 1000, BFLOAT16, compiled=True),
    Cell(256, 21841, BFLOAT16, compiled=True),
    *(Cell(batch, classes, dtype) for batch, classes in ((256, 1000), (1024, 10), (1024, 1001)) for dtype in (FLOAT32, BFLOAT16, FLOAT16)),
    *(Cell(batch, classes, FLOAT16) for batch, classes in ((1024, 1000), (256, 21841))),
    *(Cell(batch, classes, FLOAT32) for batch, classes in ((64, 1000), (4096, 1000), (1024, 21841))),  # for the picture
)
# bfloat16 is what a GPU trains with: it has the whole grid. 50,257 and 128,256 are GPT-2's and Llama 3's vocabularies: what other
# people's kernels are measured with.
GPU_CELLS = (
    Cell(1024, 1000, BFLOAT16, compiled=True, settings=True),
    Cell(1024, 21841, BFLOAT16, compiled=True, settings=True),
    *(Cell(1024, classes, BFLOAT16) for classes in (1001, 50257, 128256)),
    *(Cell(batch, classes, BFLOAT16) for batch in (256, 4096, 8192) for classes in (1000, 21841)),
    Cell(1024, 1000, FLOAT32, compiled=True),
    Cell(1024, 21841, FLOAT32, compiled=True),
    *(Cell(1024, classes, FLOAT32) for classes in (1001, 50257, 128256)),
    *(Cell(1024, classes, FLOAT16) for classes in (1000, 21841)),
    Cell(4096, 50257, BFLOAT16, compiled=True),
    *(Cell(batch, classes, BFLOAT16) for batch in (4096, 8192) for classes in (1001, 128256)),
    *(Cell(256, classes, BFLOAT16) for classes in (1001, 50257, 128256)),
    Cell(8192, 50257, BFLOAT16),
)
TINY_CELLS = (Cell(64, 100, FLOAT32, settings=True), Cell(64, 101, BFLOAT16))

Key = tuple[str, str, str]
Row = dict[str, Any]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def key_of(variant: Variant) -> Key:
    return variant.name, variant.backend, variant.setting


def variants(cell: Cell, device: torch.device, *, compiled: bool) -> tuple[list[Variant], dict[str, str]]:
    """Everything one cell measures; and what is missing from it, with the reason."""
    ours, missing = loss_variants.ours(device, cell.dtype)
    others, more_missing = loss_variants.others()
    backends = [variant.backend for variant in ours if variant.name == "ferkd"]
    found = [*loss_variants.limits(device), *ours, *others]
    if cell.settings and backends:
        found += loss_variants.ours_in_other_settings(backends[0])
    if cell.compiled and compiled:
        found += loss_variants.compiled(backends)
    return found, missing | more_missing


def input_sets(cell: Cell, device: torch.device) -> list[Problem]:
    """On a GPU as many as fill its L2 cache twice over, else one."""
    first = loss_variants.problem(cell.batch, cell.classes, cell.dtype, device)
    if device.type == "cpu":
        return [first]
    cache = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    sets = 1 + min(cache // (first.logits.numel() * first.logits.element_size()), 255)
    return [first, *(first.turned(i) for i in range(1, sets))]


def warmed(found: list[Variant], sets: list[Problem], missing: dict[str, str]) -> dict[Key, Callable[[], object]]:
    """The variants as calls that have run and compiled; one that fails goes to `missing` with its error, the others stay."""
    calls = {}
    for variant in found:
        call = timing.turns(variant.run, sets)
        try:
            for _ in range(3):
                call()
            if sets[0].logits.is_cuda:
                torch.cuda.synchronize()
        except Exception as error:
            missing[" ".join(key_of(variant))] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            continue
        calls[key_of(variant)] = call
    return calls


def measure(cell: Cell, device: torch.device, seconds: float, *, compiled: bool) -> tuple[list[Row], dict[str, str]]:
    """The cell's rows, in about that many seconds, compiling included; and what is missing from it."""
    end = time.perf_counter() + seconds
    found, missing = variants(cell, device, compiled=compiled)
    sets = input_sets(cell, device)
    calls = warmed(found, sets, missing)
    peaks = {key: timing.peak_bytes(call, device) for key, call in calls.items()}
    clock = timing.cpu_seconds if device.type == "cpu" else timing.gpu_seconds
    started, others = time.perf_counter(), machine.seconds_of_others()
    times = clock(calls, max(end - started, 0.2))
    others_busy = (machine.seconds_of_others() - others) / (time.perf_counter() - started)
    graphs: dict[Key, float] = {}
    if device.type == "cuda":
        for variant in found:
            key = key_of(variant)
            if key in calls and variant.capturable:
                try:
                    # Of all sets: replays of a few would find them in the L2 cache.
                    graphs[key] = timing.graph_seconds(calls[key], max(len(sets), 2))
                except Exception as error:
                    missing["graph_ms of " + " ".join(key)] = str(error).strip().splitlines()[0]

    medians = {key: statistics.median(values) for key, values in times.items()}
    copy, copy_graph = ("copy", "torch", "half"), graphs.get(("copy", "torch", "half"))
    neg = ("neg", "torch", "half")  # on a GPU the least kernel that moves the same bytes
    ferkd = next((key for key in medians if key[0] == "ferkd"), None)
    traffic = 2 * sets[0].logits.numel() * sets[0].logits.element_size()
    rows = []
    for variant in found:
        key = key_of(variant)
        if key not in medians:
            continue
        p20, p80 = (statistics.quantiles(times[key], n=5)[i] for i in (0, 3))
        rows.append(
            {
                "batch": cell.batch,
                "classes": cell.classes,
                "k": loss_variants.K,
                "dtype": name_of(cell.dtype),
                "variant": variant.name,
                "backend": variant.backend,
                "setting": variant.setting,
                "median_ms": f"{medians[key] * 1e3:.4f}",
                "p20_ms": f"{p20 * 1e3:.4f}",
                "p80_ms": f"{p80 * 1e3:.4f}",
                "gb_per_s": f"{traffic / medians[key] / 1e9:.2f}",
                "share_of_limit": f"{medians[copy] / medians[key]:.3f}",
                "times_ferkd": f"{medians[key] / medians[ferkd]:.3f}" if ferkd else "",
                "graph_ms": f"{graphs[key] * 1e3:.4f}" if key in graphs else "",
                "graph_share": f"{copy_graph / graphs[key]:.3f}" if copy_graph and key in graphs else "",
                "share_of_kernel": f"{medians[neg] / medians[key]:.3f}" if neg in medians else "",
                "graph_share_of_kernel": f"{graphs[neg] / graphs[key]:.3f}" if neg in graphs and key in graphs else "",
                "peak_mb": f"{peaks[key] / 1e6:.3f}",
                "launches": "",
                "calls": len(times[key]),
                "others_busy": f"{max(others_busy, 0.0):.2f}",
                **facts(device),
                "note": variant.note,
            }
        )
    return rows, missing


def facts(device: torch.device) -> Row:
    return {
        "threads": torch.get_num_threads(),
        "isa": ops.cpu_isa() if ops.why_not("cpu", "cpu") is None else "",
        "torch": torch.__version__,
        "triton": machine.version("triton"),
        "device": machine.device_name(device),
    }


def count_launches(cells: list[Cell], rows: list[Row], device: torch.device, seconds: float, *, compiled: bool) -> None:
    """Fills in the column `launches`, after everything was timed, because profiling makes launches dearer for the rest of the process."""
    end = time.perf_counter() + seconds
    by_key = {(row["batch"], row["classes"], row["dtype"], row["variant"], row["backend"], row["setting"]): row for row in rows}
    for cell in cells:
        if time.perf_counter() > end:
            return
        found, missing = variants(cell, device, compiled=compiled)
        calls = warmed(found, [loss_variants.problem(cell.batch, cell.classes, cell.dtype, device)], missing)
        for key, call in calls.items():
            row = by_key.get((cell.batch, cell.classes, name_of(cell.dtype), *key))
            if row is not None:
                row["launches"] = timing.launches(call)


SHOWN = {  # column of the printed table: (its heading, its width)
    "median_ms": ("median ms", 9), "p20_ms": ("p20", 9), "p80_ms": ("p80", 9), "gb_per_s": ("GB/s", 8), "share_of_limit": ("limit", 6),
    "times_ferkd": ("xferkd", 7), "graph_ms": ("graph", 8), "peak_mb": ("peak MB", 9), "calls": ("calls", 6), "others_busy": ("others", 6),
}  # fmt: skip


def print_heading() -> None:
    print(f"{'shape':>11} {'dtype':>8} {'variant':<33}", *(f"{heading:>{width}}" for heading, width in SHOWN.values()))


def print_rows(rows: list[Row]) -> None:
    for row in rows:
        name = f"{row['variant']} {row['backend']} {row['setting'] if row['setting'] != 'half' else ''}"
        figures = (f"{row[column]:>{width}}" for column, (_, width) in SHOWN.items())
        print(f"{row['batch']:>4}x{row['classes']:<6} {row['dtype']:>8} {name:<33}", *figures, flush=True)


def print_summary(rows: list[Row]) -> None:
    """One line a cell: what the budgets of docs/design.md ask, shares of the limit (and of the least kernel) and how many times the others
    take."""
    print(f"\n{'shape':>11} {'dtype':>8}  copy ms; share of the limit (in a graph; of a kernel that copies, in a graph); times ferkd")
    for cell in dict.fromkeys((row["batch"], row["classes"], row["dtype"]) for row in rows):
        plain = [row for row in rows if (row["batch"], row["classes"], row["dtype"]) == cell and row["setting"] in ("half", "upstream")]
        figures = [f"copy {next(row['median_ms'] for row in plain if row['variant'] == 'copy')};"]
        for row in plain:
            if row["variant"] in ("kernel", "ferkd", "ferkd_compiled") and (row["variant"] == "ferkd_compiled") == (
                row["setting"] != "half"
            ):
                graph = f" ({float(row['graph_share']):.2f}; {row['graph_share_of_kernel'] or '-'})" if row["graph_share"] else ""
                figures.append(f"{row['variant']} {row['backend']} {float(row['share_of_limit']):.2f}{graph}")
        figures[-1] += ";"
        others = (row for row in plain if row["variant"] in OTHERS_SHOWN and row["times_ferkd"])
        figures += [f"{OTHERS_SHOWN[row['variant']]} x{float(row['times_ferkd']):.1f}" for row in others]
        print(f"{cell[0]:>4}x{cell[1]:<6} {cell[2]:>8} ", " ".join(figures))


def write_rows(path: Path, rows: list[Row]) -> None:
    """The table, whole or as it was."""
    aside = path.with_suffix(".tmp")
    with open(aside, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    aside.replace(path)


OTHERS_SHOWN = {"fkd": "fkd", "eager_dense": "dense", "compiled_sparse": "compiled", "hard_labels": "hard", "liger": "liger"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=200.0, help="for the whole table, compiling included; what does not fit is dropped"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out the torch.compile variants")
    parser.add_argument("--tiny", action="store_true", help="two tiny shapes, to try the benchmark itself")
    settings = parser.parse_args()
    device = machine.device()
    if device.type == "cpu":
        try:  # it comes with what decodes photographs and loads weights, which a machine for kernels may lack
            from ferkd.process import keep_freed_memory
        except ImportError as error:
            print(f"freed memory goes back to the system, and page faults are measured with the rest: {error}")
        else:
            keep_freed_memory()
    cells = list(TINY_CELLS if settings.tiny else CPU_CELLS if device.type == "cpu" else GPU_CELLS)
    compiled = not settings.no_compile

    folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"loss-{machine.file_name(device)}.csv"
    print(", ".join(f"{name} {value}" for name, value in facts(device).items()))
    print_heading()
    rows: list[Row] = []
    missing: dict[str, str] = {}
    measured = []
    end = time.perf_counter() + settings.seconds * (0.85 if device.type == "cuda" else 1.0)
    for i, cell in enumerate(cells):
        left = end - time.perf_counter()
        if left <= 0.0:
            missing[f"{cell} and what follows it"] = f"the {settings.seconds:.0f} s are over"
            break
        weights = [3.0 if other.compiled and compiled else 1.0 for other in cells[i:]]
        try:
            cell_rows, cell_missing = measure(cell, device, left * weights[0] / sum(weights), compiled=compiled)
        except RuntimeError as error:  # out of memory, for one: the other cells are worth having
            missing[str(cell)] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            continue
        print_rows(cell_rows)
        rows += cell_rows
        missing |= cell_missing
        measured.append(cell)
        write_rows(path, rows)  # after each cell: whoever ends this early has what was measured
    if device.type == "cuda" and rows:
        count_launches(measured, rows, device, settings.seconds * 0.15, compiled=compiled)
        write_rows(path, rows)
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}")
    if not rows:
        raise SystemExit("nothing could be measured")
    print(f"wrote {path}")
    print_summary(rows)


@pytest.mark.parametrize("variant", ["copy", "kernel", "ferkd", "fkd", "eager_dense", "eager_sparse", "hard_labels"])
@pytest.mark.parametrize("cell", [*CPU_CELLS[:4], Cell(1024, 1000, FLOAT16), Cell(256, 21841, FLOAT16)], ids=str)
def test_loss(benchmark: Any, cell: Cell, variant: str) -> None:
    device = machine.device()
    found, _ = variants(cell, device, compiled=False)
    run = next((candidate.run for candidate in found if candidate.name == variant), None)
    if run is None:
        pytest.skip(f"{variant} has no backend here")
    inputs = loss_variants.problem(cell.batch, cell.classes, cell.dtype, device)

    def call() -> None:
        run(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark(call)


if __name__ == "__main__":
    main()
