"""`make sanitize` tests the build it means to test."""

from __future__ import annotations

import subprocess

import pytest
import torch  # noqa: F401  (the extension needs its libraries)

_C = pytest.importorskip("ferkd._C")


@pytest.mark.skipif("sanitize" not in _C.__file__, reason="not under `make sanitize`")
def test_the_extension_is_the_sanitized_one() -> None:
    symbols = subprocess.run(["nm", "-D", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "__asan_report_load" in symbols
    assert "__ubsan_handle" in symbols
