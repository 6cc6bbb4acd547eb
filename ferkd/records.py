"""The box and label codecs: a crop's record in a fixed number of bytes. docs/formats.md specifies every bit and has test vectors.

A label is packed once, when a store is written, and unpacked once, inside the loss kernel; `unpack_labels` is the oracle for
those kernels and for readers in other languages.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from ferkd.errors import InputError

if TYPE_CHECKING:
    import torch

LabelCodec = Literal["half", "packed"]
BoxCodec = Literal["stored", "replayed"]

MAX_SIDE = 32_767
"""The longest side of a photo in pixels: what 15 bits of a stored box hold."""

HALF_ID16_CLASSES = 65_536
"""Up to this many classes a `half` label keeps id and float16 in one word."""

FIRST_BITS, FIRST_TOP = 14, 12.0
"""`packed`: the bits of r_1's code and the logit of its highest code."""

LATER_BITS, LATER_TOP = 8, 6.0
"""`packed`: the same for r_2 to r_k."""

_SUM_TOLERANCE = 0.01
# What float16 files and float32 softmax may exceed 1 by, at most; more than that is not a distribution.


@dataclasses.dataclass(frozen=True)
class Records:
    """The labels of B crops as they lie in a store: `words` [B, label_words(codec, k, classes)] int32, contiguous."""

    words: torch.Tensor
    codec: LabelCodec
    k: int
    classes: int

    def __len__(self) -> int:
        return int(self.words.shape[0])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Records:
        """The same labels on another device."""
        return dataclasses.replace(self, words=self.words.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Records:
        """The same labels in pinned memory; a DataLoader with pin_memory=True calls this."""
        return dataclasses.replace(self, words=self.words.pin_memory())


def id_bits(classes: int) -> int:
    """The bits of a class id in a `packed` label: max(1, ceil(log2 classes)), by integer arithmetic."""
    return max(1, (classes - 1).bit_length())


def label_words(codec: LabelCodec, k: int, classes: int) -> int:
    """The 32-bit words of one label. Raises InputError for an unknown codec, classes < 2, k < 1 or k > classes."""
    if codec not in get_args(LabelCodec):
        raise InputError(f"codec: {codec!r} is unknown; choose 'half' or 'packed'")
    if not 2 <= classes <= 1 << 31:
        raise InputError(f"classes: {classes}; a label needs 2 to 2**31 classes")
    if not 1 <= k <= classes:
        raise InputError(f"k: {k} of {classes} classes; choose 1 to {classes}")
    if codec == "half":
        return k if classes <= HALF_ID16_CLASSES else k + (k + 1) // 2
    return -(-(k * id_bits(classes) + FIRST_BITS + LATER_BITS * (k - 1)) // 32)


def crop_bytes(box_codec: BoxCodec, label_codec: LabelCodec, k: int, classes: int) -> int:
    """The bytes of one record, box and label together."""
    if box_codec not in get_args(BoxCodec):
        raise InputError(f"box_codec: {box_codec!r} is unknown; choose 'stored' or 'replayed'")
    return (8 if box_codec == "stored" else 0) + 4 * label_words(label_codec, k, classes)


def pack_labels(ids: npt.NDArray[Any], probs: npt.NDArray[Any], codec: LabelCodec, classes: int) -> npt.NDArray[np.uint32]:
    """Packs the teacher's answers for N crops: ids [N, k] integer, probs [N, k] floating, in any order; [N, W] uint32 comes back.

    They are written in the order of falling probability, ties by lower id. Repeated ids are allowed and mean their sum.
    Raises InputError for shapes that differ, k > classes, ids outside [0, classes), probabilities that are NaN or outside
    [0, 1] and, for `packed`, sums above 1.01 (sums up to there are cut to 1: `packed` cannot hold more).
    """
    ids, probs = np.asarray(ids), np.asarray(probs)
    if ids.ndim != 2 or ids.shape != probs.shape:
        raise InputError(f"ids: shape {ids.shape}, probs: shape {probs.shape}; both must be [crops, k]")
    if ids.dtype.kind not in "iu" or probs.dtype.kind != "f":
        raise InputError(f"ids: {ids.dtype}, probs: {probs.dtype}; give integer ids and floating probabilities")
    n, k = ids.shape
    words = np.zeros((n, label_words(codec, k, classes)), np.uint32)
    if n == 0:
        return words
    if int(ids.min()) < 0 or int(ids.max()) >= classes:
        worst = int(ids.max()) if int(ids.max()) >= classes else int(ids.min())
        raise InputError(f"ids: {worst} is no class; ids run from 0 to {classes - 1}")
    wrong = ~((probs >= 0.0) & (probs <= 1.0))  # so written that NaN is wrong too
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise InputError(f"probs: {probs[row, column]} in row {row}; every probability must be from 0 to 1")
    order = np.lexsort((ids, -probs), axis=1)
    ids = np.take_along_axis(ids, order, 1).astype(np.uint32)
    probs = np.take_along_axis(probs, order, 1)
    if codec == "half":
        halves = probs.astype(np.float16).view(np.uint16).astype(np.uint32)
        if classes <= HALF_ID16_CLASSES:
            words[:] = ids | halves << np.uint32(16)
        else:
            words[:, :k] = ids
            words[:, k:] |= halves[:, 0::2]
            words[:, k : k + k // 2] |= halves[:, 1::2] << np.uint32(16)
        return words
    fields = [(ids[:, j], id_bits(classes)) for j in range(k)]
    fields += [(code, FIRST_BITS if j == 0 else LATER_BITS) for j, code in enumerate(_share_codes(probs.astype(np.float64), classes))]
    at = 0
    for value, bits in fields:  # bits from the lowest; a field may cross into the next word
        shifted = value.astype(np.uint64) << np.uint64(at % 32)
        words[:, at // 32] |= shifted.astype(np.uint32)  # keeps the low 32 bits
        if at % 32 + bits > 32:
            words[:, at // 32 + 1] |= (shifted >> np.uint64(32)).astype(np.uint32)
        at += bits
    return words


def unpack_labels(
    words: npt.NDArray[np.uint32], codec: LabelCodec, k: int, classes: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The ids [N, k] int64 and probabilities [N, k] float32 of packed labels [N, W] uint32, as the kernels decode them.

    Raises InputError for a wrong shape, dtype, codec, k or classes. Ids are returned as found: a damaged word may hold one
    that is >= classes (a store's CRC32 catches that before).
    """
    width = label_words(codec, k, classes)
    words = np.asarray(words)
    if words.ndim != 2 or words.shape[1] != width or words.dtype != np.uint32:
        raise InputError(f"words: {words.dtype} {words.shape}; {codec} labels of k={k}, {classes} classes are uint32 [crops, {width}]")
    if codec == "half":
        if classes <= HALF_ID16_CLASSES:
            ids = words & np.uint32(0xFFFF)
            halves = words >> np.uint32(16)
        else:
            ids = words[:, :k]
            pairs = words[:, k:]
            halves = np.stack([pairs & np.uint32(0xFFFF), pairs >> np.uint32(16)], axis=2).reshape(len(words), 2 * pairs.shape[1])[:, :k]
        return ids.astype(np.int64), halves.astype(np.uint16).view(np.float16).astype(np.float32)
    bits = id_bits(classes)
    ids64 = np.empty((len(words), k), np.int64)
    for j in range(k):
        ids64[:, j] = _field(words, j * bits, bits)
    probs = np.empty((len(words), k), np.float32)
    left = np.ones(len(words), np.float32)
    at = k * bits
    for j in range(k):
        width_j = FIRST_BITS if j == 0 else LATER_BITS
        share, rest = _share(_field(words, at, width_j), j, classes)
        probs[:, j] = left * share
        left = left * rest
        at += width_j
    return ids64, probs


def top_probabilities(words: npt.NDArray[np.uint32], codec: LabelCodec, k: int, classes: int) -> npt.NDArray[np.float32]:
    """The largest probability of each label, [N] float32: the first, in both codecs. A fraction of the work of `unpack_labels`."""
    if codec == "packed":
        share, _ = _share(_field(words, k * id_bits(classes), FIRST_BITS), 0, classes)
        return share
    halves = words[:, 0] >> np.uint32(16) if classes <= HALF_ID16_CLASSES else words[:, k] & np.uint32(0xFFFF)
    top: npt.NDArray[np.float32] = halves.astype(np.uint16).view(np.float16).astype(np.float32)
    return top


def _field(words: npt.NDArray[np.uint32], at: int, bits: int) -> npt.NDArray[np.uint32]:
    """The field of `bits` bits that begins at bit `at` of each label."""
    value: npt.NDArray[np.uint32] = words[:, at // 32] >> np.uint32(at % 32)
    if at % 32 + bits > 32:
        value = value | words[:, at // 32 + 1] << np.uint32(32 - at % 32)
    value &= np.uint32((1 << bits) - 1)
    return value


def share_grid(j: int, classes: int) -> tuple[float, float, int]:
    """The grid of r_(j+1)'s codes: (lowest logit, step, highest code). Code c >= 1 stands for the logit lowest + (c - 1) * step."""
    bits, top = (FIRST_BITS, FIRST_TOP) if j == 0 else (LATER_BITS, LATER_TOP)
    lowest = -math.log(classes)
    codes = (1 << bits) - 1
    return lowest, (top - lowest) / (codes - 1), codes


def _share(code: npt.NDArray[np.uint32], j: int, classes: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """r and 1 - r of a code, in float32. 1 - r is formed as e * r, which keeps its digits when r is close to 1."""
    lowest, step, _ = share_grid(j, classes)
    logit = np.float32(lowest) + (code.astype(np.int32) - 1).astype(np.float32) * np.float32(step)
    e = np.exp(-logit)
    r = np.float32(1) / (np.float32(1) + e)
    none = code == 0
    return np.where(none, np.float32(0), r), np.where(none, np.float32(1), e * r)


def _share_codes(probs: npt.NDArray[np.float64], classes: int) -> list[npt.NDArray[np.uint32]]:
    """The codes of r_1 to r_k for falling probabilities [N, k] float64: r_j = p_j / (1 - sum of the earlier p)."""
    n, k = probs.shape
    sums = probs.sum(axis=1)
    if (sums > 1.0 + _SUM_TOLERANCE).any():
        raise InputError(
            f"probs: a row sums to {sums.max():.4f}; a packed label holds at most 1: give probabilities of one softmax, or use codec 'half'"
        )
    codes: list[npt.NDArray[np.uint32]] = []
    before = np.zeros(n)  # the sum of the earlier p
    left = np.ones(n)  # what the decoder will have left
    first = np.full(n, np.inf)  # the p_1 that the decoder will find
    for j in range(k):
        lowest, step, top = share_grid(j, classes)
        room = 1.0 - before
        with np.errstate(divide="ignore", invalid="ignore"):
            r = np.where(room > 0.0, np.minimum(probs[:, j] / room, 1.0), 0.0)
            code = 1.0 + np.rint((np.log(r) - np.log1p(-r) - lowest) / step)
            # Rounding must not lift p_j above p_1, or a near tie would change the teacher's answer: the highest code that may be used.
            most = np.minimum(first / left * (1.0 - 1e-5), 1.0)
            limit = 1.0 + np.floor((np.log(most) - np.log1p(-most) - lowest) / step)
        code = np.clip(np.minimum(np.clip(code, 1, top), limit), 0, top)
        # r below half of the smallest that a code stands for, 1 / (C + 1), is nearer to none at all.
        code = np.where(r < 0.5 / (classes + 1), 0.0, code)
        codes.append(code.astype(np.uint32))
        share = np.where(code == 0, 0.0, 1.0 / (1.0 + np.exp(-(lowest + (code - 1.0) * step))))
        first = left * share if j == 0 else first
        left = left * (1.0 - share)
        before = before + probs[:, j]
    return codes


def pack_boxes(boxes: npt.NDArray[Any], flips: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint64]:
    """Packs N boxes [N, 4] integer (left, top, width, height in pixels) and flips [N] bool into [N] uint64.

    Raises InputError for other shapes or dtypes, a negative corner, an empty box or one that reaches beyond pixel 32,767.
    """
    boxes, flips = np.asarray(boxes), np.asarray(flips)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or flips.shape != boxes.shape[:1]:
        raise InputError(f"boxes: shape {boxes.shape}, flips: shape {flips.shape}; they must be [crops, 4] and [crops]")
    if boxes.dtype.kind not in "iu" or flips.dtype != np.bool_:
        raise InputError(f"boxes: {boxes.dtype}, flips: {flips.dtype}; give integers and bool")
    b = boxes.astype(np.int64)
    wrong = (b[:, :2] < 0).any(axis=1) | (b[:, 2:] < 1).any(axis=1) | (b[:, :2] + b[:, 2:] > MAX_SIDE).any(axis=1)
    if wrong.any():
        raise InputError(
            f"boxes: {b[np.argmax(wrong)].tolist()} (left, top, width, height) is not inside a photo of up to {MAX_SIDE:,} pixels"
        )
    u = b.astype(np.uint64)
    left, top, width, height = u[:, 0], u[:, 1] << np.uint64(15), u[:, 2] << np.uint64(30), u[:, 3] << np.uint64(45)
    words: npt.NDArray[np.uint64] = left | top | width | height | flips.astype(np.uint64) << np.uint64(60)
    return words


def unpack_boxes(words: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """The boxes [N, 4] int32 (left, top, width, height) and flips [N] bool of packed boxes [N] uint64."""
    fields = (np.asarray(words, np.uint64)[..., None] >> _BOX_SHIFTS & _BOX_MASKS).astype(np.int32)
    return fields[..., :4], fields[..., 4].astype(np.bool_)


_BOX_SHIFTS = np.array([0, 15, 30, 45, 60], np.uint64)
_BOX_MASKS = np.array([0x7FFF] * 4 + [1], np.uint64)
