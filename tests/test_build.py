"""What setup.py decides and says, and what the built modules ask of the Python and torch they meet."""

import importlib
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import setuptools
import torch

from ferkd import ops

ROOT = Path(__file__).resolve().parents[1]
BUILT = [name for name, absent in (("_C", ops._NO_CPU), ("_C_cuda", ops._NO_CUDA)) if absent is None]


@pytest.fixture
def run_setup(monkeypatch, capsys):
    """Runs setup.py with the given environment up to the call of setup(); returns that call's arguments and what was said."""

    def run(**environment):
        for name in ("FERKD_EXT", "FERKD_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CUDA_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        called = {}
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: called.update(arguments))
        monkeypatch.chdir(ROOT)
        # cpp_extension looks for CUDA_HOME when it is first imported
        monkeypatch.delitem(sys.modules, "torch.utils.cpp_extension", raising=False)
        runpy.run_path(str(ROOT / "setup.py"))
        return called, capsys.readouterr().err

    return run


def nvcc(folder, release):
    """A folder with an nvcc that names this release and does nothing else."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcudart.so").touch()
    script = folder / "bin" / "nvcc"
    script.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {release}, V{release}.1"\n')
    script.chmod(0o755)
    return str(folder)


def test_ferkd_ext_0_builds_nothing_and_says_so(run_setup):
    called, said = run_setup(FERKD_EXT="0")
    assert called["ext_modules"] == []
    assert "FERKD_EXT=0: no extension is built; ferkd_loss has only its `reference` backend" in said


def test_everything_that_pages_are_made_of_is_shipped(run_setup):
    called, _ = run_setup(FERKD_EXT="0")
    assert "ferkd.pages" in called["packages"]
    patterns = called["package_data"]["ferkd.pages"]
    for file in (ROOT / "ferkd" / "pages").iterdir():
        assert file.suffix == ".py" or file.is_dir() or any(file.match(pattern) for pattern in patterns), file


def test_ferkd_cuda_0_builds_the_cpu_part_alone(run_setup):
    called, said = run_setup(FERKD_CUDA="0")
    assert [module.name for module in called["ext_modules"]] == ["ferkd._C"]
    assert "building the CPU part alone: FERKD_CUDA=0" in said


def test_without_nvcc_the_cpu_part_is_built_alone_with_the_reason(run_setup, tmp_path, monkeypatch):
    if torch.version.cuda is None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
    called, said = run_setup(CUDA_HOME=str(tmp_path))
    assert [module.name for module in called["ext_modules"]] == ["ferkd._C"]
    assert f"building the CPU part alone: nvcc was not found in {tmp_path}/bin (CUDA_HOME)" in said
    with pytest.raises(SystemExit, match="FERKD_CUDA=1, but the CUDA part cannot be built: nvcc was not found"):
        run_setup(CUDA_HOME=str(tmp_path), FERKD_CUDA="1")


def test_a_torch_without_cuda_or_an_nvcc_of_another_major_is_the_reason(run_setup, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    _, said = run_setup(CUDA_HOME=nvcc(tmp_path / "old", "12.4"))
    assert "nvcc is CUDA 12.4 and torch is CUDA 13.0: their major versions must agree" in said
    monkeypatch.setattr(torch.version, "cuda", None)
    _, said = run_setup(CUDA_HOME=nvcc(tmp_path / "new", "13.1"))
    assert "building the CPU part alone: this torch is built without CUDA" in said


def test_with_nvcc_both_parts_are_built_with_or_without_a_gpu(run_setup, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    home = nvcc(tmp_path, "13.1")
    for given, used in (("", "8.0;9.0+PTX"), ("9.0a", "9.0a")):
        called, said = run_setup(CUDA_HOME=home, TORCH_CUDA_ARCH_LIST=given)
        assert [module.name for module in called["ext_modules"]] == ["ferkd._C", "ferkd._C_cuda"]
        assert used in said
        assert all(module.py_limited_api for module in called["ext_modules"])


def test_without_torch_or_with_a_wrong_switch_there_is_one_clear_line(run_setup, monkeypatch):
    with pytest.raises(SystemExit, match="FERKD_EXT: 'no' is neither 0 nor 1"):
        run_setup(FERKD_EXT="no")
    with pytest.raises(SystemExit, match="FERKD_CUDA: 'auto' is neither 0 nor 1"):
        run_setup(FERKD_CUDA="auto")
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"setuptools 65.5.0 is too old; run .*pip install 'setuptools>=80'"):
        run_setup()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: pytest.fail("went on without torch"))
    with pytest.raises(SystemExit, match=r"building needs an importable torch .*: install torch >= 2.11, then `pip install --no-build-iso"):
        runpy.run_path(str(ROOT / "setup.py"))


def test_the_kernels_folder_is_installed_as_ferkd_kernels(run_setup):
    called, _ = run_setup(FERKD_EXT="0")
    assert called["package_dir"] == {"ferkd.kernels": "kernels"}
    assert {"ferkd", "ferkd.kernels"} <= set(called["packages"])


def test_flags_keep_numbers_and_threads_as_they_are(run_setup):
    flags = run_setup(FERKD_CUDA="0")[0]["ext_modules"][0].extra_compile_args["cxx"]
    assert {"-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"} <= set(flags)
    assert not {"-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-fopenmp", "-march=native"} & set(flags)


@pytest.mark.skipif(not BUILT, reason="no extension module is built")
def test_modules_are_abi3_and_leave_subnormals_on():
    for name in BUILT:
        assert importlib.import_module(f"ferkd.{name}").__file__.endswith(".abi3.so")
    assert np.float32(1e-40) * np.float32(0.5) > 0


def offered_by_torch_2_11():
    """The C functions that the installed headers declare to an extension which targets torch 2.11."""
    from torch.utils.cpp_extension import include_paths

    shim = "torch/csrc/inductor/aoti_torch"
    headers = (f"{shim}/c/shim.h", f"{shim}/generated/c_shim_aten.h", "torch/csrc/stable/c/shim.h")
    source = "".join(f"#include <{header}>\n" for header in headers)
    flags = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY", "-DUSE_CUDA", *(f"-I{path}" for path in include_paths())]
    command = ["g++", "-std=c++20", "-E", "-P", "-x", "c++", *flags, "-"]
    text = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", text))


OF_THE_LIMITED_API = {"PyModule_Create2", "_PyArg_ParseTuple_SizeT", "PyByteArray_FromStringAndSize", "PyByteArray_AsString"}
OF_THE_LIMITED_API |= {"PyErr_SetString", "PyExc_ValueError"}  # all of them since Python 3.2


@pytest.mark.skipif(not BUILT, reason="no extension module is built")
@pytest.mark.skipif(not (shutil.which("nm") and shutil.which("g++")), reason="needs nm and g++")
def test_modules_ask_for_nothing_that_python_3_10_or_torch_2_11_lack():
    offered = offered_by_torch_2_11()
    assert "torch_parallel_for" in offered
    assert "torch_library_def_with_tags" not in offered, "that is 2.12's: the header's sections were not told apart"
    for name in BUILT:
        path = importlib.import_module(f"ferkd.{name}").__file__
        lines = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout.splitlines()
        wanted = {line.split()[-1].split("@")[0] for line in lines}
        assert {symbol for symbol in wanted if re.match(r"(aoti_)?torch_", symbol)} <= offered
        assert {symbol for symbol in wanted if re.match(r"_?Py", symbol)} <= OF_THE_LIMITED_API
        # No C++ of torch's: it changes from release to release.
        assert not {symbol for symbol in wanted if re.search(r"N?K?(2at|3c10|5torch|5caffe2)", symbol) and symbol.startswith("_Z")}
        assert not {symbol for symbol in wanted if symbol.startswith(("GOMP_", "omp_", "__kmpc"))}, "a second thread pool"
