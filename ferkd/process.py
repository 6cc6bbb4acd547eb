"""This process: the memory it frees and shares, and the signals that ask it to stop."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


SHARED_MEMORY = "/dev/shm"
LARGER = "make /dev/shm larger (docker run --shm-size)"


def free_shared_memory() -> int:
    """Bytes that can still be shared between processes, without a limit where this cannot be told."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return sys.maxsize
    return found.f_bavail * found.f_frsize
