"""Builds ferkd's two extension modules; everything else about the package is in pyproject.toml.

    python setup.py build_ext --inplace          or          pip install --no-build-isolation -e .

`ferkd._C` is the CPU part and `ferkd._C_cuda` the CUDA part. Both are abi3 modules on PyTorch's stable ABI: one build serves every
Python >= 3.10 and every torch >= 2.11 (`_C_cuda`: of the same CUDA major). They only implement operators whose schemas ferkd/ops.py
defines, so a module that is absent takes away a backend and nothing else.

Environment:
    FERKD_EXT=0             builds no extension at all: the `reference` backend only
    FERKD_CUDA=0|1          0 leaves the CUDA part out; 1 makes it an error when it cannot be built (default: built when it can be)
    TORCH_CUDA_ARCH_LIST    GPU architectures to compile for (default: the GPUs present, or 8.0;9.0+PTX without one)
    MAX_JOBS                compilers that run at the same time
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import find_packages, setup

CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fopenmp-simd",  # `omp simd` only: -fopenmp would bring a second thread pool beside PyTorch's
    "-fno-math-errno",
    "-fno-trapping-math",  # never -ffast-math: linked into a .so it turns off subnormals for the whole process, and it breaks NaN
    "-fvisibility=hidden",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",  # GCC 12 warns about its own intrinsics
]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]  # nothing newer than torch 2.11, nothing unstable
ARCHITECTURES_WITHOUT_A_GPU = "8.0;9.0+PTX"


def say(line: str) -> None:
    print(f"ferkd: {line}", file=sys.stderr, flush=True)


def switch(name: str) -> "bool | None":
    """The environment variable as on, off or not given."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}: {value!r} is neither 0 nor 1")
    return None if value == "" else value == "1"


def why_no_cuda() -> "str | None":
    """Why the CUDA part cannot be built here, or None when it can. A GPU is not needed to compile for one."""
    import torch

    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return f"nvcc was not found {f'in {home}/bin (CUDA_HOME)' if home else '(put it on PATH or set CUDA_HOME)'}"
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=True).stderr
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{nvcc} does not run ({error})"
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        return f"{nvcc} --version names no release"
    if release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is CUDA {release[1]}.{release[2]} and torch is CUDA {torch.version.cuda}: their major versions must agree"
    if not home:
        # The nvcc on PATH may be a script or a link that lies nowhere near its libraries; nvcc itself knows where they are.
        top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
        home = str(Path(top[1]).resolve() if top else Path(nvcc).resolve().parents[1])
        os.environ["CUDA_HOME"] = home  # read by torch.utils.cpp_extension when it is imported
    if not any(Path(home, library, "libcudart.so").exists() for library in ("lib64", "lib")):
        return f"{home} has no libcudart.so (the CUDA toolkit's runtime development files)"
    return None


def extensions() -> "tuple[list, dict]":
    """The extension modules to build here and the command that builds them."""
    if int(setuptools.__version__.split(".")[0]) < 80:  # --no-build-isolation does not look at build-system.requires
        raise SystemExit(f"ferkd: setuptools {setuptools.__version__} is too old; run `{sys.executable} -m pip install 'setuptools>=80'`")
    if switch("FERKD_EXT") is False:
        say("FERKD_EXT=0: no extension is built; ferkd_loss has only its `reference` backend")
        return [], {}
    try:
        import torch
    except ModuleNotFoundError as error:
        # Not named in build-system.requires on purpose: an isolated build would fetch a second, different torch.
        raise SystemExit(
            f"ferkd: building needs an importable {error.name} in this Python ({sys.executable}): "
            "install torch >= 2.11, then `pip install --no-build-isolation -e .`"
        ) from None
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 11):
        raise SystemExit(f"ferkd: torch {torch.__version__} is too old; building needs torch >= 2.11")

    wanted = switch("FERKD_CUDA")
    reason = "FERKD_CUDA=0" if wanted is False else why_no_cuda()
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    sanitizers = os.environ.get("FERKD_SANITIZE")  # gcc's: "address,undefined" (see Makefile)
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"] if sanitizers else []
    modules = [
        CppExtension(
            "ferkd._C",
            ["csrc/bindings.cpp", "csrc/loss_cpu.cpp"],
            depends=["csrc/arguments.h", "csrc/crops.h", "csrc/label_math.h", "csrc/loss_cpu.h"],
            py_limited_api=True,
            extra_compile_args={"cxx": CXX_FLAGS + STABLE_ABI + sanitize},
            extra_link_args=sanitize[:1],
        )
    ]
    if reason is None:
        if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
            os.environ["TORCH_CUDA_ARCH_LIST"] = ARCHITECTURES_WITHOUT_A_GPU  # cpp_extension fails when it finds neither list nor GPU
        say(f"building the CPU and CUDA parts (CUDA {torch.version.cuda}, {os.environ.get('TORCH_CUDA_ARCH_LIST', 'the GPUs present')})")
        modules.append(
            CUDAExtension(
                "ferkd._C_cuda",
                ["csrc/bindings_cuda.cpp", "csrc/loss_cuda.cu"],
                depends=["csrc/arguments.h", "csrc/label_math.h", "csrc/loss_cuda.h", "csrc/simt.h"],
                py_limited_api=True,
                extra_compile_args={
                    "cxx": [*CXX_FLAGS, *STABLE_ABI, "-DUSE_CUDA"],
                    "nvcc": ["-O3", "-std=c++20", "--expt-relaxed-constexpr", *STABLE_ABI, "-DUSE_CUDA"],
                },
            )
        )
    elif wanted:
        raise SystemExit(f"ferkd: FERKD_CUDA=1, but the CUDA part cannot be built: {reason}")
    else:
        say(f"building the CPU part alone: {reason}")
    return modules, {"build_ext": BuildExtension}


ext_modules, cmdclass = extensions()
setup(
    packages=[*find_packages(include=["ferkd", "ferkd.*"]), "ferkd.kernels"],
    package_dir={"ferkd.kernels": "kernels"},
    package_data={"ferkd": ["py.typed"], "ferkd.pages": ["*.css", "*.js"]},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
