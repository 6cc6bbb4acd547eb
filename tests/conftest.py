"""Set before anything imports ferkd.kernels: whether Triton's kernels are compiled for a GPU or interpreted."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config, items):
    """The kernels for GPUs know no float64 logits: a grid of backends and dtypes has no such case. (That they refuse it has a test.)"""

    def is_possible(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        return params.get("dtype") != torch.float64 or params.get("impl") not in ("triton", "cuda")

    items[:] = [item for item in items if is_possible(item)]


@pytest.fixture(autouse=True)
def _on_the_gpu(request):
    """Tests of the GPU's backends make their tensors on the GPU, where there is one."""
    impl = request.node.callspec.params.get("impl") if hasattr(request.node, "callspec") else None
    if not torch.cuda.is_available() or impl not in ("triton", "cuda"):
        yield
        return
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
