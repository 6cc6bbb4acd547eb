"""How long a call takes, what memory it needs and how many kernels it launches: on a CPU and on a GPU.

A call is a function of nothing. Callers rotate input sets inside it (`turns`), so that no cache flatters it more than they mean.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read once, by the first profiler: it tells of missing GPUs otherwise

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

Key = TypeVar("Key", bound=Hashable)
Input = TypeVar("Input")
Call = Callable[[], object]

LEAST_ROUNDS = 5


def turns(run: Callable[[Input], object], inputs: Sequence[Input]) -> Call:
    """A call that hands `run` the next of the inputs, round and round."""
    if len(inputs) == 1:
        return lambda: run(inputs[0])
    following = itertools.cycle(inputs)
    return lambda: run(next(following))


def cpu_seconds(calls: Mapping[Key, Call], seconds: float, block: int = 4) -> dict[Key, list[float]]:
    """Wall-clock seconds of each call, in blocks of the same call that take turns, so that a change of the machine's mood meets all of
    them. A block's first call is not counted: it finds the caches as another kind left them.
    """
    times: dict[Key, list[float]] = {key: [] for key in calls}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < LEAST_ROUNDS or time.perf_counter() < end:
        rounds += 1
        for key, call in calls.items():
            call()
            for _ in range(1, block):
                start = time.perf_counter()
                call()
                times[key].append(time.perf_counter() - start)
    return times


AHEAD_CYCLES = 8_000_000
"""Clock cycles, some 5 ms: longer than the host needs to queue a block of calls."""


def gpu_seconds(calls: Mapping[Key, Call], seconds: float, block: int = 20) -> dict[Key, list[float]]:
    """Seconds of each call between two events on the device, in blocks of the same call that take turns.

    Before a block the device is kept busy for some milliseconds, so that the host is ahead as it is in training and its own time is not
    measured. Where it falls behind all the same (a call of many small launches), the gaps are part of the time; `graph_seconds` shows
    the device's own.
    """
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(block)]
    times: dict[Key, list[float]] = {key: [] for key in calls}
    end = time.perf_counter() + seconds
    while True:
        for key, call in calls.items():
            torch.cuda._sleep(AHEAD_CYCLES)
            for start, stop in events:
                start.record()
                call()
                stop.record()
            torch.cuda.synchronize()
            times[key] += [start.elapsed_time(stop) * 1e-3 for start, stop in events]
        if time.perf_counter() > end:
            return times


def graph_seconds(call: Call, calls: int, replays: int = 10) -> float:
    """Seconds of one call when a CUDA graph of `calls` of them is replayed: the device's time without the host's.

    Raises what the capture raises, for instance RuntimeError where a call waits for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # lazy initialisation on a stream other than the default one, as capturing needs it
        for _ in range(3):
            call()
        # A capture that fails leaves allocator (PyTorch 2.11) and current stream as they were within it: what would fail does so here.
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    own = torch.cuda.current_stream()
    own.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
    except BaseException:
        torch.cuda.set_stream(own)
        raise
    graph.replay()
    times: list[float] = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3 / calls)
    return statistics.median(times)


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most memory a call holds at a time beyond what was there before, its result included.

    Counted by PyTorch's allocators: on a GPU its own tally, on a CPU the allocations that torch.profiler records, in their order.
    What a kernel takes from the system by itself is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()  # kept until the recording ends: freeing it is not part of the call
    del result
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    steps = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return int(max(itertools.accumulate(steps, initial=0)))


def launches(call: Call) -> int:
    """What one call starts on the GPU: kernels, copies and fills, as torch.profiler counts them.

    Profiling leaves hooks in the process that make later launches dearer: measure times first.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in recorded.events() if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    return len(on_device)
