"""This process: the memory it frees and shares, and the signals that ask it to stop."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def keep_freed_memory() -> None:
    """Tells glibc to keep a network's activations for the next batch instead of returning them to the system and faulting them in anew.

    A convolutional network on a CPU spends a large part of its time on page faults otherwise. It holds for the whole process.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep what is free at the top


@contextmanager
def stop_when_asked() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM and Ctrl-C only raise a flag, which the loop reads between steps; a second Ctrl-C interrupts at once."""
    asked = False

    def ask(number: int, _: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: whoever runs the loop there keeps its own handlers
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def available_memory() -> int:
    """Bytes that this process can still fill: of the machine, page cache that can be dropped included, and of its container."""
    found = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), found)
    for folder, limit, used in (("", "memory.max", "memory.current"), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # the other version of cgroups, or `max`: no limit
            group = Path(CGROUP, folder)
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cache = int(statistics.get("total_inactive_file", statistics.get("inactive_file", "0")))
            found = min(found, int((group / limit).read_text()) - int((group / used).read_text()) + cache)
    return max(0, found)


def local_processes() -> int:
    """How many processes torchrun has started on this machine, each of which keeps what it loads for itself; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


CGROUP = "/sys/fs/cgroup"  # inside a container its own group is mounted here
SHARED_MEMORY = "/dev/shm"
LARGER = "make /dev/shm larger (docker run --shm-size)"


def free_shared_memory() -> int:
    """Bytes that can still be shared between processes, without a limit where this cannot be told."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return sys.maxsize
    return found.f_bavail * found.f_frsize
