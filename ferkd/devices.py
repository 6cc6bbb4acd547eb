"""The device a teacher runs on: which one, what it is called, and how it computes so that its answers can be had again."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from typing import Any

import torch

from ferkd.errors import InputError


def choose_device(name: str | None, local_rank: int = 0, local_world: int = 1) -> torch.device:
    """The device called `name` (cpu, cuda, cuda:N); None is this process's own GPU, or the CPU where there is none.

    Raises InputError for a device that is not there, and for more processes on this machine than it has GPUs.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        name = "cuda" if gpus else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device: {name!r} is none; give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device: {name!r} is not supported; give cpu, cuda or cuda:N")
    if device.type == "cuda":
        if (device.index or 0) >= gpus:
            raise InputError(f"device: {name}, but PyTorch sees {gpus} GPUs; give another, or cpu")
        if local_world > 1 and ":" in name:
            raise InputError(f"device: {name} for {local_world} processes of this machine; leave --device out, and each takes its own GPU")
        if local_world > gpus:
            raise InputError(f"torchrun: {local_world} processes for the {gpus} GPUs here; lower --nproc-per-node")
        if ":" not in name:
            device = torch.device("cuda", local_rank)
    return device


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name as the system tells it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def described_device(device: torch.device) -> dict[str, Any]:
    """What a store records of the device that labelled. A CPU's sums depend on how many threads share them, in their last bits."""
    threads = {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
    return {"type": device.type, "name": device_name(device), **threads}


@contextlib.contextmanager
def repeatable(tf32: bool) -> Iterator[None]:
    """Within the block cuDNN computes the same way every time, and float32 products are rounded to TF32 only where `tf32` asks for it."""
    backends, name = torch.backends, "allow_tf32"
    wanted: bool | str = tf32
    before: bool | str
    try:
        before = backends.cuda.matmul.allow_tf32
    except RuntimeError:  # it was set by its newer name, which PyTorch does not let anybody mix with the older
        name, wanted, before = "fp32_precision", "tf32" if tf32 else "ieee", backends.cuda.matmul.fp32_precision
    with backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32):
        setattr(backends.cuda.matmul, name, wanted)
        try:
            yield
        finally:
            setattr(backends.cuda.matmul, name, before)


@contextlib.contextmanager
def cores_for_decoding(device: torch.device) -> Iterator[None]:
    """Within the block, where the teacher is on a GPU, every new thread computes alone: each that decodes would else start a team of
    OpenMP threads of its own, one for every core."""
    before = torch.get_num_threads()
    if device.type == "cuda":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.set_num_threads(before)
