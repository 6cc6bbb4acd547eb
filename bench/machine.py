"""What the machine at hand is: for the columns of the tables, the names of their files and the headers of reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name as the system tells it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def file_name(device: torch.device) -> str:
    """The device's name as part of a file's: "cpu-amd-epyc", "nvidia-h100-80gb-hbm3"."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return name if device.type == "cuda" else f"cpu-{name}"


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def seconds_of_others() -> float:
    """Processor seconds since boot that went to other processes, the kernel's interrupts and other guests of the host; 0 where unknown.

    A difference of two of them over the wall-clock time tells how quiet the machine was.
    """
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[:8])
    own = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def version(package: str) -> str:
    """An installed package's version, or "" where it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
