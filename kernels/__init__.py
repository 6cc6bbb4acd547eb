"""Triton kernels, installed as `ferkd.kernels`: what `impl="triton"` runs. Only ferkd.ops imports them, when it runs them."""
