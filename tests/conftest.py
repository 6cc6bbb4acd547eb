"""Set before anything imports ferkd.kernels: whether Triton's kernels are compiled for a GPU or interpreted."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config, items):
    """The kernels for GPUs know no float64 logits: no test of a grid of backends and dtypes has that case."""
    impossible = [
        item
        for item in items
        if hasattr(item, "callspec")
        and item.callspec.params.get("dtype") == torch.float64
        and item.callspec.params.get("impl") in ("triton", "cuda")
    ]
    items[:] = [item for item in items if item not in impossible]
