"""Triton kernels, installed as `ferkd.kernels`. There are none yet: `impl="triton"` says so."""
