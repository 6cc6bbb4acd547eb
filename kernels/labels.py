"""What stored labels become before the logits are looked at. csrc/label_math.h says the same in the same order, for one row; here a
program takes ROWS rows, one in each lane.

A label is a base beta on every class plus increments delta_j = v_j - beta at class ids i_j; repeated ids add. Its mass is
S = sum v_j + (C - K) beta.
"""

# Triton's decorator and the parameters of its functions have no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

DISCARDED = tl.constexpr(0)
CALIBRATED = tl.constexpr(1)
KEPT = tl.constexpr(2)

# How a label's pairs lie in memory.
PAIRS = tl.constexpr(0)
HALF = tl.constexpr(1)
HALF_WIDE = tl.constexpr(2)  # `half` above 65,536 classes
PACKED = tl.constexpr(3)

FIRST_BITS = tl.constexpr(14)
LATER_BITS = tl.constexpr(8)

ROWS = 128
"""Rows of a program."""

PARTS = 64
"""Sum S is left in at most this many parts, one of each program, for whoever divides by it to add up."""


# ------------------------------------------------------------------------------------------------ the codecs


@triton.jit
def _word(words, at, present):
    """Word `at` of each row, zero-extended: [ROWS] int64."""
    return tl.load(words + at, mask=present, other=0).to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def _bit_field(words, at, bits, present):
    """The field of `bits` < 32 bits that begins at bit `at` of each row's label: [ROWS] int64."""
    word = at // 32
    shift = at % 32
    low = _word(words, word, present)
    high = _word(words, word + 1, present & (shift + bits > 32))
    return ((low | (high << 32)) >> shift) & ((1 << bits) - 1)


@triton.jit
def _id(labels, row, j, present, k, width, id_bits, CODEC: tl.constexpr):
    """The id of pair j of each row: [ROWS] int64."""
    words = labels + row * width
    if CODEC == HALF:
        i = _word(words, j, present) & 0xFFFF
    elif CODEC == PACKED:
        i = _bit_field(words, j * id_bits, id_bits, present)
    elif CODEC == HALF_WIDE:
        i = _word(words, j, present)
    else:
        i = tl.load(words + j, mask=present, other=0)
    return i


@triton.jit
def _half(words, j, present, k, CODEC: tl.constexpr):
    """The float16 of pair j of each row, widened: [ROWS] float32."""
    bits = _bit_field(words, 32 * j + 16 if CODEC == HALF else 32 * k + 16 * j, 16, present)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _packed_share(words, j, present, k, id_bits, lowest, first_step, later_step):
    """r_j and 1 - r_j of each row, the latter with its digits when r_j is close to 1: [ROWS] float32."""
    begin = k * id_bits
    is_first = j == 0
    at = tl.where(is_first, begin, begin + FIRST_BITS + LATER_BITS * (j - 1))
    code = _bit_field(words, at, tl.where(is_first, FIRST_BITS, LATER_BITS), present)
    logit = lowest + (code - 1).to(tl.float32) * tl.where(is_first, first_step, later_step)
    e = tl.exp(-logit.to(tl.float64)).to(tl.float32)  # Triton's float32 exp is 1e-6 off at these logits
    r = tl.math.div_rn(tl.full(e.shape, 1.0, tl.float32), 1.0 + e)
    return tl.where(code == 0, 0.0, r), tl.where(code == 0, 1.0, e * r)


# ------------------------------------------------------------------------------------------------ region, mass, label


@triton.jit
def _divided(a, b):
    """a / b as IEEE rounds it: Triton's own float32 division does not."""
    if a.dtype == tl.float32:
        return tl.math.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _summary(
    labels, probs, row, target, present, v_out, id_out, k, width, classes, id_bits, lowest, first_step, later_step,
    CODEC: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """What a label's region and mass follow from, pair by pair in stored order; KEEP leaves ids and probabilities in id_out and v_out.

    The sums in P run in the probabilities' own precision, so that every backend places the same probabilities in the same region to
    the last bit. Returns [ROWS] each: sum P, on_target P, largest P, exact float64 (the sum: a confident teacher's 1 - sum cancels),
    found (the target is among the ids), astray (an id is outside the classes; a wrong id must not reach memory, and is clamped).
    """
    sum_P = tl.zeros([ROWS], P)
    on_target = tl.zeros([ROWS], P)
    largest = tl.full([ROWS], float("-inf"), P)
    exact = tl.zeros([ROWS], tl.float64)
    found = tl.zeros([ROWS], tl.int1)
    astray = tl.zeros([ROWS], tl.int1)
    left = tl.full([ROWS], 1.0, tl.float32)
    for j in range(k):
        i = _id(labels, row, j, present, k, width, id_bits, CODEC)
        if CODEC == PAIRS:
            p = tl.load(probs + row * k + j, mask=present, other=0.0)
        elif CODEC == PACKED:
            r, rest = _packed_share(labels + row * width, j, present, k, id_bits, lowest, first_step, later_step)
            p = left * r
            left = left * rest
        else:
            p = _half(labels + row * width, j, present, k, CODEC)
        astray = astray | (i < 0) | (i >= classes)
        i = tl.minimum(tl.maximum(i, 0), classes - 1)
        sum_P += p
        exact += p.to(tl.float64)
        on_target += tl.where(i == target, p, 0.0)
        found = found | (i == target)
        largest = tl.maximum(largest, p, propagate_nan=tl.PropagateNan.ALL)
        if KEEP:
            tl.store(v_out + j, p.to(tl.float64), mask=present)
            tl.store(id_out + j, i.to(tl.int32), mask=present)
    return sum_P, on_target, largest, exact, found, astray


@triton.jit
def _region_of(
    sum_P, on_target, largest, found, k, classes, discard_below, calibrate_below, discard_above,
    BY_TARGET: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The region of each label, from the stored probabilities: before tail mode and tempering. [ROWS] int8."""
    confidence = largest
    if BY_TARGET:
        left = 1.0 - sum_P
        share = _divided(tl.where(left < 0.0, 0.0, left), tl.full([ROWS], tl.maximum(classes - k, 1), P))
        confidence = tl.where(found, on_target, share)
    region = tl.where(confidence < tl.full([ROWS], calibrate_below, P), CALIBRATED, KEPT)
    is_outside = (confidence < tl.full([ROWS], discard_below, P)) | (confidence > tl.full([ROWS], discard_above, P))
    return tl.where(is_outside, DISCARDED, region).to(tl.int8)  # last: discarding wins


@triton.jit
def _mass_of(region, exact, astray, k, classes, temperature, RENORM: tl.constexpr):
    """S of each label: what its increments and base sum to. Tempering renormalises to 1 whatever is not nothing. [ROWS] float64.

    Where nobody checks the data, a label with an id outside the classes has the mass NaN, and so has everything computed from it.
    """
    if RENORM:
        mass = tl.where(exact == 0.0, 0.0, 1.0 + 0.0 * exact)
    else:
        mass = tl.where((classes > k) & (exact < 1.0), 1.0, exact)
        if temperature != 1.0:
            mass = tl.where(mass == 0.0, 0.0, 1.0 + 0.0 * mass)  # NaN stays NaN
    mass = tl.where(region == KEPT, mass, tl.where(region == CALIBRATED, 1.0, 0.0))
    return tl.where(astray & (mass != 0.0), float("nan"), mass)


@triton.jit
def _power(x, power):
    """x^power for x >= 0, in float64: 1e-60 to the power 1/20 is 1e-3, in float32 it would be 0."""
    return tl.exp2(tl.log2(x) * power)


# What Triton would otherwise compile again for: numbers that are 1 or multiples of 16, addresses, tensors beyond 2 GB.
@triton.jit(
    do_not_specialize=[
        "labels", "probs", "target_of", "partner", "lam", "adapted", "ids", "region_out", "parts", "ticket",
        "rows", "k", "width", "classes", "id_bits",
    ]
)  # fmt: skip
def adapt_labels(
    labels, probs, target_of, partner, lam, adapted, ids, region_out, parts, ticket,
    rows: tl.int32, k: tl.int32, width: tl.int32, classes: tl.int32, id_bits: tl.int32,
    lowest: tl.float32, first_step: tl.float32, later_step: tl.float32,
    discard_below: tl.float64, calibrate_below: tl.float64, discard_above: tl.float64, smoothing: tl.float64, temperature: tl.float64,
    CODEC: tl.constexpr, DOUBLE: tl.constexpr, BY_TARGET: tl.constexpr, RENORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The labels after their own region's rule, before mixing, and sum S after it.

    labels      [B, width] int32 words or int64 ids, probs [B, k] float32 or float64 or None, target_of [B] int64
    partner     [B] int64, lam [B] float32, or both None
    adapted     [B, 2 + k] float64 out: S, beta, delta_1 to delta_k. In float64: a confident teacher's 1 - sum cancels, and so does
                its gradient against the student's softmax
    ids         [B, k] int32 out
    region_out  [B] int8 out, or None
    parts       [number of programs] float64 out: parts of sum S; None where nobody divides by it
    ticket      int32 out: 0
    """
    P: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    if tl.program_id(0) == 0:
        tl.store(ticket, 0)
    sum_S = tl.zeros([ROWS], tl.float64)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        present = row < rows
        target = tl.load(target_of + row, mask=present, other=0)
        is_astray = (target < 0) | (target >= classes)
        target = tl.minimum(tl.maximum(target, 0), classes - 1)
        delta_out = adapted + row * (2 + k) + 2
        id_out = ids + row * k
        sum_P, on_target, largest, exact, found, astray = _summary(
            labels, probs, row, target, present, delta_out, id_out, k, width, classes, id_bits, lowest, first_step, later_step,
            CODEC, P, ROWS, True,
        )  # fmt: skip
        region = _region_of(sum_P, on_target, largest, found, k, classes, discard_below, calibrate_below, discard_above, BY_TARGET, P, ROWS)
        if RENORM:
            region = tl.where((region == KEPT) & (exact == 0.0), DISCARDED, region)
        mass = _mass_of(region, exact, astray | is_astray, k, classes, temperature, RENORM)

        # Kept: v and the tail.
        others = (classes - k).to(tl.float64)
        if RENORM:
            divisor = tl.where(exact == 0.0, 1.0, exact)
            beta = tl.zeros([ROWS], tl.float64)
        else:
            divisor = tl.full([ROWS], 1.0, tl.float64)
            left = 1.0 - exact
            beta = tl.where((left < 0.0) | (classes == k), 0.0, left) / tl.maximum(others, 1.0)
        tl.debug_barrier()  # the lanes that read v may not be those that wrote it
        if temperature != 1.0:  # (v / m)^(1/T), and the tail as C - K equal classes; renormalised
            m = tl.maximum(beta, largest.to(tl.float64) / divisor)
            m = tl.where(m == 0.0, 1.0, m)
            beta = _power(beta / m, 1.0 / temperature)
            total = others * beta
            for j in range(k):
                v = _power(tl.load(delta_out + j, mask=present, other=0.0) / divisor / m, 1.0 / temperature)
                total += v
                tl.store(delta_out + j, v, mask=present)
            divisor = tl.where(total == 0.0, 1.0, total)
            beta = beta / divisor
            tl.debug_barrier()

        # Calibrated: the softened ground truth, one pair; not tempered.
        is_calibrated = region == CALIBRATED
        even = smoothing / (classes - 1).to(tl.float64)
        softened = 1.0 - smoothing - even
        beta = tl.where(is_calibrated, even, beta)
        is_discarded = region == DISCARDED
        for j in range(k):
            delta = tl.load(delta_out + j, mask=present, other=0.0) / divisor - beta
            delta = tl.where(is_calibrated, tl.where(j == 0, softened, 0.0), delta)
            tl.store(delta_out + j, tl.where(is_discarded, 0.0, delta), mask=present)
            tl.store(id_out + j, target.to(tl.int32), mask=present & is_calibrated)
        tl.store(adapted + row * (2 + k), mass, mask=present)
        tl.store(adapted + row * (2 + k) + 1, tl.where(is_discarded, 0.0, beta), mask=present)
        if region_out is not None:
            tl.store(region_out + row, region, mask=present)

        if parts is not None and lam is not None:  # another program may not have adapted the partner yet, so its mass is found here
            own = tl.load(lam + row, mask=present, other=1.0).to(tl.float64)
            other = tl.load(partner + row, mask=present, other=0)
            own = tl.where((other < 0) | (other >= rows), float("nan"), own)
            other = tl.where((other < 0) | (other >= rows), 0, other)
            target = tl.load(target_of + other, mask=present, other=0)
            is_astray = (target < 0) | (target >= classes)
            target = tl.minimum(tl.maximum(target, 0), classes - 1)
            sum_P, on_target, largest, exact, found, astray = _summary(
                labels, probs, other, target, present, delta_out, id_out, k, width, classes, id_bits, lowest, first_step, later_step,
                CODEC, P, ROWS, False,
            )  # fmt: skip
            region = _region_of(
                sum_P, on_target, largest, found, k, classes, discard_below, calibrate_below, discard_above, BY_TARGET, P, ROWS
            )
            mass = own * mass + (1.0 - own) * _mass_of(region, exact, astray | is_astray, k, classes, temperature, RENORM)
        sum_S += tl.where(present, mass, 0.0)
    if parts is not None:
        tl.store(parts + tl.program_id(0), tl.sum(sum_S))
