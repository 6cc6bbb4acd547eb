"""The CUDA kernels' own source, compiled for the CPU over tests/simt_emulated.h: an implementation of ferkd::loss_cuda on CPU tensors."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

from ferkd import ops

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "csrc" / name for name in ("loss_cuda.cu", "bindings_cuda.cpp")]
HEADERS = [*(ROOT / "csrc" / name for name in ("arguments.h", "label_math.h", "loss_cuda.h", "simt.h")), ROOT / "tests" / "simt_emulated.h"]


@functools.cache
def load() -> str | None:
    """Builds (once for these sources and this torch) and loads it; why that cannot be done here, or None."""
    if shutil.which("g++") is None:
        return "emulating the CUDA kernels needs g++"
    seal = hashlib.sha256(torch.__version__.encode())
    for path in (*SOURCES, *HEADERS, Path(__file__)):
        seal.update(path.read_bytes())
    library = ROOT / "build" / "cuda_on_cpu" / f"{seal.hexdigest()[:16]}.so"
    if not library.exists():
        home = Path(torch.__file__).parent
        library.parent.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w", "-DFERKD_SIMT_EMULATED"]
        command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]
        command += [f"-I{home / 'include'}", f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}"]
        command += ["-x", "c++", *map(str, SOURCES), "-x", "none", "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the CUDA kernels do not compile for the CPU:\n{done.stderr[-4000:]}")
        os.replace(part, library)
    torch.ops.load_library(str(library))

    real = ops.why_not

    def why_not(impl: str, device: str, dtype: torch.dtype = torch.float32, index: int | None = None) -> str | None:
        if impl == "cuda" and device == "cpu" and dtype != torch.float64:
            return None
        return real(impl, device, dtype, index)

    ops.why_not = why_not
    return None
