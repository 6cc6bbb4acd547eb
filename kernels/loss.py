"""The op `ferkd::loss_triton`: the loss in two launches, one over the labels and one over the logits.

adapt_labels unpacks every label once, straight from the stored words, and adds up sum S, which a mean must know before it can write
the first gradient. loss_rows then takes a row of logits a program; the last one to finish adds up the rows' losses. (A third launch for
that sum would cost about as much as a whole pass over 1024 x 1000 logits.) Nothing waits for the device, no atomic adds floats, and
nothing depends on which program finishes first, so that the answer is the same every time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ferkd import reference
from ferkd.errors import InputError
from ferkd.records import HALF_ID16_CLASSES, id_bits, label_words, share_grid

from . import labels as label_kernels
from . import rows as row_kernels

ONE_BLOCK_CLASSES = 32_768
"""Rows of up to this many classes are kept in registers between the sums and the gradient."""

LOOP_BLOCK, LOOP_THREADS = 2048, 256
"""Longer rows: elements of a step, and threads. With 8 elements a thread and their sums in about 64 registers, four programs share a
multiprocessor and hide each other's waiting."""

SHIFTED_CLASSES = 512
"""Rows of fewer classes that are not aligned are read element by element: the edges would cost more than wide accesses save."""


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Launch(NamedTuple):
    """One kernel launch: `kernel[grid](**arguments, **options)`."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    options: dict[str, Any]


def loss(
    logits: Tensor,
    labels: Tensor,
    probs: Tensor | None,
    target: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    normalizer: Tensor | None,
    upstream: Tensor | None,
    codec: str,
    k: int,
    discard_below: float,
    calibrate_below: float,
    discard_above: float,
    smoothing: float,
    confidence: str,
    temperature: float,
    tail: str,
    reduction: str,
    tau_squared: bool,
    with_grad: bool,
    stats: bool,
    validate: bool,
) -> reference.Answer:
    """The op; ferkd.ops has the arguments. Float32, bfloat16 or float16 logits."""
    _require_layout(logits, labels, probs, target, partner, lam, normalizer, upstream, codec, k)
    rows, classes = logits.shape
    if logits.device.type == "cpu" or validate:
        ids, stored = (labels, probs) if probs is not None else reference.unpack(labels, codec, k, classes)
        reference.check_data(ids, stored, target, partner, lam, classes)

    counted = rows if stats else 0
    answer = reference.Answer(
        loss=logits.new_empty(rows if reduction == "none" else (), dtype=torch.float32),
        grad=logits.new_empty((rows, classes) if with_grad else 0),
        region=logits.new_empty(counted, dtype=torch.int8),
        correct=logits.new_empty(counted, dtype=torch.bool),
        logsumexp=logits.new_empty(counted, dtype=torch.float32),
    )
    if rows == 0:
        answer.loss.zero_()
        return answer
    run(
        logits.device,
        lambda warp: launches(
            logits, labels, probs, target, partner, lam, normalizer, upstream, answer, codec, k,
            (discard_below, calibrate_below, discard_above, smoothing), confidence, temperature, tail, reduction, tau_squared, warp,
        ),
    )  # fmt: skip
    return answer


def run(device: torch.device, made_for: Callable[[int], Iterable[Launch]]) -> None:
    """Makes the launches for a device, given the threads of its warps, and starts them in order."""
    with contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device):
        for launch in made_for(_warp(device)):
            launch.kernel[(launch.grid,)](**launch.arguments, **launch.options)


@lru_cache
def _warp(device: torch.device) -> int:
    """32 threads on NVIDIA's GPUs, 64 on AMD's data-centre ones."""
    return 32 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).warp_size)  # cpu: Triton's interpreter


def _require_layout(
    logits: Tensor,
    labels: Tensor,
    probs: Tensor | None,
    target: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    normalizer: Tensor | None,
    upstream: Tensor | None,
    codec: str,
    k: int,
) -> None:
    """ferkd/loss.py refuses wrong arguments with better words; here stands what memory is safe by, for calls of the operator itself."""

    def is_row(tensor: Tensor | None, dtype: torch.dtype) -> bool:
        return tensor is not None and tensor.shape == logits.shape[:1] and tensor.dtype == dtype and tensor.is_contiguous()

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise InputError(what)

    require(
        logits.dim() == 2 and logits.shape[1] >= 2 and logits.stride(1) == 1 and logits.dtype in _DTYPES,
        "logits: they must be [B, C] float32, bfloat16 or float16 with C >= 2 and a last stride of 1",
    )
    rows, classes = logits.shape
    require(1 <= k <= min(64, classes), "k: it must be from 1 to 64 and at most C")
    require(codec in ("pairs", "half", "packed"), "codec: it must be pairs, half or packed")
    require((codec == "pairs") == (probs is not None), "probs: given with codec pairs and with no other")
    width = k if codec == "pairs" else label_words(codec, k, classes)  # type: ignore[arg-type]
    word = torch.int64 if codec == "pairs" else torch.int32
    require(
        labels.shape == (rows, width) and labels.dtype == word and labels.is_contiguous(), "labels: wrong shape, dtype or not contiguous"
    )
    require(
        probs is None or (probs.shape == (rows, k) and probs.dtype in (torch.float32, torch.float64) and probs.is_contiguous()),
        "probs: they must be [B, k] float32 or float64 and contiguous",
    )
    require(is_row(target, torch.int64), "target: it must be [B] int64 and contiguous")
    require(
        (partner is None and lam is None) or (is_row(partner, torch.int64) and is_row(lam, torch.float32)),
        "mix: partner and lam come together, [B] and contiguous",
    )
    for scalar in (normalizer, upstream):
        require(scalar is None or (scalar.dim() == 0 and scalar.dtype == torch.float32), "normalizer, upstream: they must be 0-dim float32")
    for tensor in (labels, probs, target, partner, lam, normalizer, upstream):
        require(tensor is None or tensor.device == logits.device, "every tensor must be on the logits' device")


def launches(
    logits: Tensor,
    labels: Tensor,
    probs: Tensor | None,
    target: Tensor,
    partner: Tensor | None,
    lam: Tensor | None,
    normalizer: Tensor | None,
    upstream: Tensor | None,
    answer: reference.Answer,
    codec: str,
    k: int,
    policy: tuple[float, float, float, float],
    confidence: str,
    temperature: float,
    tail: str,
    reduction: str,
    tau_squared: bool,
    warp: int,
) -> tuple[Launch, Launch]:
    """What computes `answer`, whose empty fields are not asked for; at least one row."""
    rows, classes = logits.shape
    double, single, integer = torch.float64, torch.float32, torch.int32
    adapted = logits.new_empty((rows, 2 + k), dtype=double)
    ids = logits.new_empty((rows, k), dtype=integer)
    ticket = logits.new_empty((), dtype=integer)
    adapters = min(label_kernels.PARTS, -(-rows // label_kernels.ROWS))
    parts = logits.new_empty(adapters, dtype=double) if reduction == "mean" and normalizer is None else None
    lowest, first_step, _ = share_grid(0, classes)
    _, later_step, _ = share_grid(1, classes)
    discard_below, calibrate_below, discard_above, smoothing = policy
    over_labels = Launch(
        label_kernels.adapt_labels,
        adapters,
        {
            "labels": labels,
            "probs": probs,
            "target_of": target,
            "partner": partner,
            "lam": lam,
            "adapted": adapted,
            "ids": ids,
            "region_out": answer.region if answer.region.numel() else None,
            "parts": parts,
            "ticket": ticket,
            "rows": rows,
            "k": k,
            "width": labels.shape[1],
            "classes": classes,
            "id_bits": id_bits(classes),
            "lowest": lowest,
            "first_step": first_step,
            "later_step": later_step,
            "discard_below": discard_below,
            "calibrate_below": calibrate_below,
            "discard_above": discard_above,
            "smoothing": smoothing,
            "temperature": temperature,
            "CODEC": _codec(codec, classes),
            "DOUBLE": probs is not None and probs.dtype == torch.float64,
            "BY_TARGET": confidence == "target",
            "RENORM": tail == "renorm",
            "ROWS": label_kernels.ROWS,
        },
        # Nothing is fused to multiply-adds: a decoded probability has the digits that every other decoder gives it.
        {"num_warps": max(1, label_kernels.ROWS // warp), "enable_fp_fusion": False},
    )

    block, threads, is_one_block = block_of(classes)
    is_scalar = reduction != "none"
    over_logits = Launch(
        row_kernels.loss_rows,
        rows,
        {
            "logits": logits,
            "grad": answer.grad if answer.grad.numel() else None,
            "adapted": adapted,
            "ids": ids,
            "target": target,
            "partner": partner,
            "lam": lam,
            "parts": parts,
            "normalizer": normalizer if reduction == "mean" else None,
            "upstream": upstream,
            "row_loss": logits.new_empty(rows, dtype=single) if is_scalar else answer.loss,
            "loss": answer.loss if is_scalar else None,
            "ticket": ticket,
            "correct": answer.correct if answer.correct.numel() else None,
            "logsumexp": answer.logsumexp if answer.logsumexp.numel() else None,
            "stride": logits.stride(0),
            "rows": rows,
            "classes": classes,
            "k": k,
            "parts_count": adapters,
            "temperature": temperature,
            "exponent": math.log2(math.e) / temperature,
            "factor": temperature**2 if tau_squared else 1.0,
            "BLOCK": block,
            "ONE_BLOCK": is_one_block,
            "PLACES": places_of(logits, answer.grad if answer.grad.numel() else None),
            "LANES": 16 // logits.element_size(),
            "K2": 1 << (k - 1).bit_length(),
        },
        {"num_warps": max(1, threads // warp)},
    )
    return over_labels, over_logits


def block_of(classes: int) -> tuple[int, int, bool]:
    """Elements a program takes at once, its threads, and whether that is the whole row.

    8 elements a thread, 16 from 2,048 classes and 32 from 16,384: fewer threads wait at each sum, and registers do not run out.
    """
    if classes > ONE_BLOCK_CLASSES:
        return LOOP_BLOCK, LOOP_THREADS, False
    block = max(32, 1 << (classes - 1).bit_length())
    each = 8 if block <= 1024 else 16 if block <= 8192 else 32
    return block, max(32, block // each), True


def places_of(logits: Tensor, grad: Tensor | None) -> int:
    """How the rows of logits and gradient lie relative to 16 bytes: which accesses loss_rows may make."""
    (rows, classes), size = logits.shape, logits.element_size()
    row_bytes = logits.stride(0) * size if rows > 1 else 0
    is_alike = grad is None or ((logits.data_ptr() - grad.data_ptr()) % 16 == 0 and (row_bytes - classes * size * (rows > 1)) % 16 == 0)
    if is_alike and logits.data_ptr() % 16 == 0 and row_bytes % 16 == 0 and classes * size % 16 == 0:
        return int(row_kernels.ALIGNED.value)
    return int((row_kernels.SHIFTED if is_alike and classes >= SHIFTED_CLASSES else row_kernels.PLAIN).value)


def _codec(codec: str, classes: int) -> int:
    codecs = {"pairs": label_kernels.PAIRS, "half": label_kernels.HALF, "packed": label_kernels.PACKED}
    is_wide = codec == "half" and classes > HALF_ID16_CLASSES
    return int((label_kernels.HALF_WIDE if is_wide else codecs[codec]).value)
