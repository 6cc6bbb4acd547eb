"""Loss forward + backward beside the ways people compute it without ferkd, and beside a plain copy of the logits.

    python bench/bench_loss.py                     interleaves all variants, prints a table, writes ${OUT:-bench/results}/loss-cpu.csv
    pytest bench/bench_loss.py --benchmark-enable   the same variants under pytest-benchmark

GB/s is computed from one read and one write of the logits, whatever a variant really moves; `of copy` is the median time divided by
the copy's. `copy` writes into memory that is there, `clone` allocates its output as every loss does. `kernel` is the op alone (loss and
gradient), `ferkd` is ferkd_loss and its backward through autograd. On a machine that others use too, OMP_NUM_THREADS=1 keeps the
ratios meaningful: two threads of one loop wait for each other's time slices. glibc is told to keep freed memory, for all variants alike:
otherwise page faults of fresh pages, whose price depends on what else the machine does, are most of what the larger shapes measure.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.baselines import BASELINES, compiled_baselines
from ferkd import Records, RegionPolicy, ferkd_loss, ops
from ferkd.labeling import keep_freed_memory
from ferkd.records import pack_labels

SHAPES = ((256, 1000), (1024, 1000), (256, 21841))  # a small and FKD's own batch of ImageNet-1k crops; ImageNet-21k
DTYPES = (torch.float32, torch.bfloat16)
K = 5
POLICY = RegionPolicy(discard_below=0.02, calibrate_below=0.2)


def problem(batch: int, classes: int, dtype: torch.dtype) -> dict[str, Any]:
    """Logits and labels of one step, the same for every variant; confidence uniform in [0, 1]: 2 % of the rows discarded, 18 % calibrated.

    Few are discarded because a discarded row costs ferkd next to nothing.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(batch, classes, generator=generator).topk(K).indices
    first = torch.rand(batch, 1, generator=generator)
    probs = torch.cat([first, (1 - first) * torch.minimum(first, 1 - first) * 0.5 ** torch.arange(1, K)], dim=1)
    words = torch.from_numpy(pack_labels(ids.numpy(), probs.numpy(), "half", classes).view("int32"))
    return {
        "logits": (torch.randn(batch, classes, generator=generator) * 2).to(dtype).requires_grad_(),
        "ids": ids,
        "probs": probs,
        "target": torch.randint(classes, (batch,), generator=generator),
        "records": Records(words, "half", K, classes),
    }


def variants(p: dict[str, Any], *, compiled: bool = True) -> dict[str, Callable[[], object]]:
    """Every variant as a function of nothing that does one forward and backward."""
    logits, ids, probs, target = p["logits"], p["ids"], p["probs"], p["target"]
    plain = logits.detach()
    into = torch.empty_like(plain)

    def through_autograd(loss: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(logits, ids, probs, target, POLICY), logits)

    arguments = [plain, p["records"].words, None, target, None, None, None, None, "half", K]
    arguments += [POLICY.discard_below, POLICY.calibrate_below, POLICY.discard_above, POLICY.smoothing, POLICY.confidence]
    arguments += [1.0, "smooth", "mean", False, True, False, False]
    table: dict[str, Callable[[], object]] = {
        "copy": lambda: into.copy_(plain),
        "clone": lambda: plain.clone(),
        "kernel": lambda: torch.ops.ferkd.loss_cpu(*arguments),
        "ferkd": lambda: torch.autograd.grad(ferkd_loss(logits, p["records"], target, policy=POLICY, impl="cpu"), logits),
    }
    baselines = BASELINES | (compiled_baselines() if compiled else {})
    return table | {name: through_autograd(loss) for name, loss in baselines.items()}


def interleaved(table: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, the variants taking turns, so that a change of the machine's mood meets all of them."""
    for run in table.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in table}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["copy"]) < 15:
        for name, run in table.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each shape and dtype, after warming up")
    parser.add_argument("--no-compile", action="store_true", help="leave out the torch.compile variants")
    parser.add_argument("--only", default="", help="comma-separated variants, copy always among them")
    settings = parser.parse_args()
    keep_freed_memory()
    only = set(filter(None, settings.only.split(","))) | {"copy"}

    rows = []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {ops.cpu_isa()}, {processor()}")
    print(f"{'shape':>10} {'dtype':>8} {'variant':>15} {'median ms':>10} {'p20':>8} {'p80':>8} {'GB/s':>6} {'of copy':>8} {'calls':>6}")
    for batch, classes in SHAPES:
        for dtype in DTYPES:
            torch._dynamo.reset()
            p = problem(batch, classes, dtype)
            table = variants(p, compiled=not settings.no_compile)
            if len(only) > 1:
                table = {name: run for name, run in table.items() if name in only}
            times = interleaved(table, settings.seconds)
            traffic = 2 * p["logits"].numel() * p["logits"].element_size()
            copy = statistics.median(times["copy"])
            for name, seconds in times.items():
                median = statistics.median(seconds)
                p20, p80 = (statistics.quantiles(seconds, n=5)[i] for i in (0, 3))
                name_of_dtype = str(dtype).removeprefix("torch.")
                rows.append(
                    {
                        "batch": batch, "classes": classes, "k": K, "dtype": name_of_dtype, "variant": name,
                        "median_ms": f"{median * 1e3:.4f}", "p20_ms": f"{p20 * 1e3:.4f}", "p80_ms": f"{p80 * 1e3:.4f}",
                        "gb_per_s": f"{traffic / median / 1e9:.2f}", "of_copy": f"{median / copy:.3f}", "calls": len(seconds),
                        "threads": torch.get_num_threads(), "isa": ops.cpu_isa(), "torch": torch.__version__, "processor": processor(),
                    }
                )  # fmt: skip
                print(
                    f"{batch:>4}x{classes:<5} {name_of_dtype:>8} {name:>15} {median * 1e3:>10.3f} {p20 * 1e3:>8.3f} {p80 * 1e3:>8.3f} "
                    f"{traffic / median / 1e9:>6.2f} {median / copy:>8.2f} {len(seconds):>6}",
                    flush=True,
                )
    folder = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "loss-cpu.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {folder / 'loss-cpu.csv'}")


def processor() -> str:
    """The processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


@pytest.mark.parametrize("variant", ["copy", "kernel", "ferkd", *BASELINES])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_loss(benchmark: Any, shape: tuple[int, int], dtype: torch.dtype, variant: str) -> None:
    benchmark(variants(problem(*shape, dtype), compiled=False)[variant])


if __name__ == "__main__":
    main()
