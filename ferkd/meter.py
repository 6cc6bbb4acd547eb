"""The figures of a stretch of training steps, summed on the device, and what of its time went where."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ferkd.distributed import Ranks
from ferkd.errors import InputError
from ferkd.loss import LossStats
from ferkd.regions import Region


class Meter:
    """Sums of a stretch of steps, kept on the device so that no step waits for the host; and the time spent waiting and compiling."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.device = ranks, ranks.device
        self.unread_steps, self.unread_skips = 0, torch.zeros((), device=self.device)
        self.judged_steps, self.judged_skips = 0, 0
        self.restart()

    def restart(self) -> None:
        self.loss = torch.zeros((), device=self.device)
        self.correct = torch.zeros((), device=self.device)
        self.regions = torch.zeros(len(Region), device=self.device)
        self.skipped = torch.zeros((), device=self.device)
        self.steps, self.wait, self.compiling, self.started = 0, 0.0, 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For the time that a step waits for its crops."""
        before = time.perf_counter()
        yield
        self.wait += time.perf_counter() - before

    @contextmanager
    def compiles(self, is_first: bool) -> Iterator[None]:
        """For a part of a step; `is_first`: of this kind, so that it is compiled now and no part of the training's speed."""
        before = time.perf_counter()
        yield
        if is_first:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.compiling += time.perf_counter() - before

    def count(self, skipped: Tensor | None) -> None:
        """One step is done; `skipped`: whether its update was left out, 0-dim bool on the device."""
        self.steps += 1
        self.unread_steps += 1
        if skipped is not None:
            self.skipped += skipped
            self.unread_skips += skipped

    def add(self, loss: Tensor, stats: LossStats) -> None:
        self.loss += loss.detach()
        self.correct += stats.correct.sum()
        self.regions += (stats.region[:, None] == torch.arange(len(Region), device=self.device)).sum(0)

    def read(self, batch_size: int) -> dict[str, Any]:
        """The figures since the last reading or evaluation, over all processes, each of which must read; waits for the device.

        `skipped_steps` counts those before an evaluation too.
        """
        rows = self.steps * batch_size
        self.ranks.sum(self.loss).div_(self.ranks.world)
        self.ranks.sum(self.correct)
        self.ranks.sum(self.regions)
        shares = {region.name.lower(): round(count / rows, 6) for region, count in zip(Region, self.regions.tolist(), strict=True)}
        learnt = self.steps - int(self.skipped)
        skipped = int(self.unread_skips)
        self.judged_steps, self.judged_skips = self.judged_steps + self.unread_steps, self.judged_skips + skipped
        self.unread_steps, self.unread_skips = 0, torch.zeros((), device=self.device)
        figures = {
            "loss": float(self.loss) / max(1, learnt),
            "train_top1": float(self.correct) / rows,
            "regions": shares,
        }
        elapsed = time.perf_counter() - self.started - self.compiling
        figures |= {"crops_per_second": rows / max(elapsed, 1e-9), "data_wait": self.wait / max(elapsed, 1e-9)}
        if self.compiling:
            figures["compile_seconds"] = round(self.compiling, 3)
        if skipped:
            figures["skipped_steps"] = skipped
        figures["memory_mib"] = round(memory(self.device), 1)
        self.restart()
        return figures


def memory(device: torch.device) -> float:
    """MiB in use now by this process on a CPU, at most so far on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20
    except OSError:  # not Linux: the most so far, in KiB, or in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def check_loss(line: dict[str, Any], steps: int, step: int, last_good_step: Callable[[], int | None]) -> None:
    """Raises InputError when nothing can be learnt: a loss that is no number, or every crop discarded (stored crops that are discarded
    are never shown)."""
    if line.get("regions", {}).get("discarded") == 1.0:
        raise InputError(
            f"policy: discards every crop of the {steps} steps before step {step:,}; lower discard_below or raise discard_above"
        )
    if not math.isfinite(line["loss"]):
        where = f"within the {steps} steps before step {step:,}"
        raise InputError(f"loss: {line['loss']} {where}; {_kept(last_good_step)}; lower --lr, use --amp none, or try --nan skip")


FEWEST_JUDGED = 20


def check_skipped(meter: Meter, log_every: int, step: int, is_last: bool, last_good_step: Callable[[], int | None]) -> None:
    """Raises InputError when half of the updates, or more, were skipped in a stretch of at least `log_every` and FEWEST_JUDGED steps, or in
    a whole run that is shorter. Stretches do not end with an evaluation, or one lost update beside one would be half of them; a resumed
    run begins a new one."""
    steps, skipped = meter.judged_steps, meter.judged_skips
    if steps < max(log_every, FEWEST_JUDGED) and not (is_last and steps == step):
        return
    meter.judged_steps, meter.judged_skips = 0, 0
    if 2 * skipped >= steps:
        raise InputError(
            f"nan: {skipped} of the {steps} updates before step {step:,} had to be skipped, so nothing is learnt; {_kept(last_good_step)}; "
            "lower --lr or use --amp none"
        )


def _kept(last_good_step: Callable[[], int | None]) -> str:
    safe = last_good_step()
    return "nothing was saved before" if safe is None else f"the checkpoint of step {safe:,} is safe"
