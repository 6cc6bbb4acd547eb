"""The stored gradient times the upstream gradient, in place: one launch, which ends at once where the one factor of all rows is 1.

What `ferkd::scale_` runs on a GPU where the CUDA part is not built.
"""

# Triton's decorator and the parameters of its functions have no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from .loss import Launch, run

BLOCK, THREADS, PROGRAMS = 2048, 256, 2048
"""Elements of a step, threads of a program, and the most programs: enough to fill any GPU, few enough to end at once."""


def scale_(grad: Tensor, upstream: Tensor) -> None:
    """grad [B, C] contiguous float32, bfloat16 or float16, times upstream, 0-dim or [B] float32; formed in float32, rounded once."""
    if grad.numel():
        run(grad.device, lambda warp: [launch(grad, upstream, warp)])


def launch(grad: Tensor, upstream: Tensor, warp: int) -> Launch:
    """What scales a gradient of at least one element on a GPU whose warps have `warp` threads."""
    return Launch(
        scale_elements,
        min(PROGRAMS, -(-grad.numel() // BLOCK)),
        {
            "grad": grad,
            "upstream": upstream.contiguous(),  # the gradient of a sum over rows is an expanded scalar
            "elements": grad.numel(),
            "classes": grad.shape[1],
            "ONE_PER_ROW": upstream.dim() == 1,
            "IS_ALIGNED": grad.data_ptr() % 16 == 0,
            "LANES": 16 // grad.element_size(),
            "BLOCK": BLOCK,
        },
        {"num_warps": max(1, THREADS // warp)},
    )


@triton.jit(do_not_specialize=["grad", "upstream", "elements", "classes"])
def scale_elements(
    grad, upstream, elements: tl.int64, classes: tl.int64,
    ONE_PER_ROW: tl.constexpr, IS_ALIGNED: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Elements of grad [elements] times upstream, a scalar or one factor for each `classes` of them; LANES elements are 16 bytes."""
    T: tl.constexpr = grad.dtype.element_ty
    if not ONE_PER_ROW:
        factor = tl.load(upstream)
        if factor == 1.0:
            return
    body = elements // LANES * LANES  # so that a step's mask never parts 16 bytes
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for begin in range(first, body, tl.num_programs(0).to(tl.int64) * BLOCK):
        start = grad + begin
        if IS_ALIGNED:
            start = tl.multiple_of(start, 16)
        at = tl.arange(0, BLOCK)
        present = at < body - begin
        if ONE_PER_ROW:
            factor = tl.load(upstream + (begin + at) // classes, mask=present, other=1.0)
        value = tl.load(start + at, mask=present, other=0.0).to(tl.float32) * factor
        tl.store(start + at, value.to(T), mask=present)
    if first == 0:  # the tail, of less than 16 bytes
        at = body + tl.arange(0, LANES)
        if ONE_PER_ROW:
            factor = tl.load(upstream + at // classes, mask=at < elements, other=1.0)
        value = tl.load(grad + at, mask=at < elements, other=0.0).to(tl.float32) * factor
        tl.store(grad + at, value.to(T), mask=at < elements)
