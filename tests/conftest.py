"""Set before anything imports ferkd.kernels: whether Triton's kernels are compiled for a GPU or interpreted."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
