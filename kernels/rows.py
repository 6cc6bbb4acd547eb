"""The loss and its gradient: one program a row, logits read once where the row fits registers and twice above that.

    loss = S log(sum exp d) - beta sum d - sum_j delta_j d[i_j],      z = x / T,  d = z - max z
    d loss / d x[c] = (S softmax(z)[c] - beta - sum_j delta_j [c = i_j]) / T

csrc/loss_cpu.cpp says the same in the same order. Sums over classes are float32: each lane adds up at most a few dozen terms, and
the lanes are added in a tree.
"""

# Triton's decorator and the parameters of its functions have no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from .labels import PARTS as _PARTS

PARTS = tl.constexpr(_PARTS)

# How a row of logits and its row of the gradient lie.
ALIGNED = tl.constexpr(0)  # both begin and end on 16 bytes, every row of them
SHIFTED = tl.constexpr(1)  # both begin equally far from 16 bytes, differently from row to row: odd C
PLAIN = tl.constexpr(2)  # anyhow, for instance rows of a wider tensor: one element an access

PAIRS_AT_ONCE = tl.constexpr(16)
ROWS_AT_ONCE = tl.constexpr(512)


@triton.jit
def _log1p(u):
    """log(1 + u) for u >= 0 in float32, relative error 4e-7; tl.log alone loses every digit of a small u."""
    s = u / (2.0 + u)
    t = s * s  # log(1 + u) = 2 atanh s; its series to t^7 for u <= 1, where t <= 1/9
    q = 1 / 15.0
    q = q * t + 1 / 13.0
    q = q * t + 1 / 11.0
    q = q * t + 1 / 9.0
    q = q * t + 1 / 7.0
    q = q * t + 1 / 5.0
    q = q * t + 1 / 3.0
    return tl.where(u <= 1.0, 2.0 * s + 2.0 * s * t * q, tl.log(1.0 + u))  # so written that NaN stays NaN


@triton.jit
def _mass_and_base(row, partner, own, adapted, k, MIXED: tl.constexpr):
    """The row's label after mixing: S = sum w S and beta = sum w beta, float64."""
    mass = tl.load(adapted + row * (2 + k))
    beta = tl.load(adapted + row * (2 + k) + 1)
    if MIXED:
        mass = own * mass + (1.0 - own) * tl.load(adapted + partner * (2 + k))
        beta = own * beta + (1.0 - own) * tl.load(adapted + partner * (2 + k) + 1)
    return mass, beta


@triton.jit
def _pairs(n, row, partner, own, adapted, ids, k, K2: tl.constexpr, MIXED: tl.constexpr):
    """Pairs `n` of the row's label after mixing: K2 places for its own label's, then K2 for its partner's. Returns their ids int32, -1
    at a place without a pair, and their increments w delta float64; both of n's shape."""
    j = n % K2
    label = row
    weight = tl.full(n.shape, 1.0, tl.float64)
    if MIXED:
        label = tl.where(n < K2, row, partner)
        weight = tl.where(n < K2, own, 1.0 - own)
    i = tl.load(ids + label * k + j, mask=j < k, other=-1)
    delta = weight * tl.load(adapted + label * (2 + k) + 2 + j, mask=j < k, other=0.0)
    return i, delta


# As of adapt_labels. On AMD a pointer that Triton knows to lie within 2 GB is also taken apart, and the promise of its alignment lost.
@triton.jit(
    do_not_specialize=[
        "logits", "grad", "adapted", "ids", "target", "partner", "lam", "parts", "normalizer", "upstream", "row_loss", "loss", "ticket",
        "correct", "logsumexp", "stride", "rows", "classes", "k", "parts_count",
    ]
)  # fmt: skip
def loss_rows(
    logits, grad, adapted, ids, target, partner, lam, parts, normalizer, upstream, row_loss, loss, ticket, correct, logsumexp,
    stride: tl.int64, rows: tl.int32, classes: tl.int32, k: tl.int32, parts_count: tl.int32,
    temperature: tl.float32, exponent: tl.float32, factor: tl.float32,
    BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr, PLACES: tl.constexpr, LANES: tl.constexpr, K2: tl.constexpr,
):  # fmt: skip
    """Row tl.program_id(0) of the batch.

    logits      [B, C] float32, bfloat16 or float16, rows `stride` elements apart
    grad        [B, C] out, contiguous, of the logits' dtype; None when no gradient is wanted
    adapted     [B, 2 + k] float64 and ids [B, k] int32: the labels, from adapt_labels
    target      [B] int64, used for `correct`
    partner     [B] int64, lam [B] float32: None without mix
    parts       [parts_count] float64: parts of sum S, which a mean divides by; None otherwise
    normalizer  0-dim float32: what a mean divides by instead, or None
    upstream    0-dim float32 that multiplies the gradient, or None
    row_loss    [B] float32 out
    loss        0-dim float32 out: the sum over row_loss, which the last program to finish takes; None for reduction "none"
    ticket      int32, 0 at the launch: how many programs have finished
    correct     [B] bool and logsumexp [B] float32 out; None without statistics
    exponent    1 / (T ln 2)
    factor      T^2 with tau_squared, else 1
    BLOCK       elements of a lane-parallel step; ONE_BLOCK: it holds the whole row
    PLACES      ALIGNED, SHIFTED or PLAIN; LANES: elements in 16 bytes
    K2          the power of two at or above k
    """
    MIXED: tl.constexpr = lam is not None
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * stride

    # The row is a head of less than 16 bytes, a body on 16-byte boundaries and a tail: Triton would read a misaligned row element by
    # element. Head and tail are the edges, one small masked vector.
    head = 0
    body = classes
    if PLACES != PLAIN:
        if PLACES == SHIFTED:
            size: tl.constexpr = 16 // LANES
            beyond = ((x.to(tl.int64) % 16) // size).to(tl.int32)
            head = tl.minimum((LANES - beyond) % LANES, classes)
        body = (classes - head) // LANES * LANES
    # The promises that let Triton read and write 16 bytes at once are made about values computed here: of an argument of another function,
    # or of x + 0, they would be forgotten.
    if PLACES == ALIGNED:
        x_body = tl.multiple_of(x, 16)
    elif PLACES == SHIFTED:
        x_body = tl.multiple_of(x + head, 16)
    else:
        x_body = x
    at = tl.arange(0, BLOCK)
    lane = tl.arange(0, 2 * LANES)
    edge = tl.where(lane < LANES, lane, head + body + lane - LANES)
    is_edge = tl.where(lane < LANES, lane < head, edge < classes)

    if PLACES == SHIFTED:
        z_edge = tl.load(x + edge, mask=is_edge, other=float("-inf")).to(tl.float32)
    z = tl.load(x_body + at, mask=at < body, other=float("-inf")).to(tl.float32)

    # The label after mixing, while the logits are on their way. Where registers are scarce, the pairs come later.
    other = row
    own = tl.full([], 1.0, tl.float64)
    if MIXED:
        own = tl.load(lam + row).to(tl.float64)
        other = tl.load(partner + row)
        is_astray = (other < 0) | (other >= rows)  # where nobody checks, the row is NaN
        own = tl.where(is_astray, float("nan"), own)
        other = tl.where(is_astray, 0, other)
    mass, beta = _mass_and_base(row, other, own, adapted, k, MIXED)
    is_discarded = mass == 0.0
    mass_32 = mass.to(tl.float32)
    beta_32 = beta.to(tl.float32)
    N: tl.constexpr = 2 * K2 if MIXED else K2
    EARLY: tl.constexpr = ONE_BLOCK and BLOCK <= 8192
    if EARLY:
        i, delta = _pairs(tl.arange(0, N), row, other, own, adapted, ids, k, K2, MIXED)
    scale = factor * 1.0
    if normalizer is not None:
        total_S = tl.load(normalizer)
        scale = tl.where(total_S == 0.0, 0.0, factor / total_S)  # every row discarded: 0, never 0/0
    elif parts is not None:
        part = tl.arange(0, PARTS)
        total_S = tl.sum(tl.load(parts + part, mask=part < parts_count, other=0.0), axis=0).to(tl.float32)
        scale = tl.where(total_S == 0.0, 0.0, factor / total_S)

    # Pass 1: the largest logit m and, relative to it, the sums over classes. The largest logits are counted apart: a confident row's
    # exp d are one 1 and many tiny numbers, and added to the 1 in float32 they would vanish.
    #   rest     sum of the exp d below 1
    #   largest  how many exp d are 1
    #   sum_d    sum of x - max x, which is T d
    if ONE_BLOCK:
        m = tl.max(z, axis=0)
        if PLACES == SHIFTED:
            m = tl.maximum(m, tl.max(z_edge, axis=0))
        d = z - m
        sum_d = tl.sum(tl.where(at < body, d, 0.0), axis=0)
        if correct is not None:
            top1 = tl.min(tl.where(d == 0.0, head + at, classes), axis=0)
        e = tl.exp2(d * exponent)  # from here on d is not needed, and its registers are free
        rest = tl.sum(tl.where(e == 1.0, 0.0, e), axis=0)  # so written that NaN reaches the sum
        largest = tl.sum(tl.where(e == 1.0, 1.0, 0.0), axis=0)
    else:
        # Every lane keeps a largest and sums of its own, so that no step of the loop waits for another lane.
        m_lane = z
        rest_lane = tl.zeros([BLOCK], tl.float32)
        largest_lane = tl.full([BLOCK], 1.0, tl.float32)
        sum_d_lane = tl.zeros([BLOCK], tl.float32)
        top1_lane = head + at
        seen = 1.0
        for begin in range(BLOCK, body, BLOCK):
            present = begin + at < body
            z = tl.load(x_body + begin + at, mask=present, other=float("-inf")).to(tl.float32)
            is_higher = z > m_lane
            is_equal = z == m_lane
            d = tl.where(is_equal, 0.0, z - m_lane)  # -inf equals -inf
            e = tl.exp2(-tl.abs(d) * exponent)
            rest_lane = tl.where(is_higher, (rest_lane + largest_lane) * e, rest_lane + tl.where(is_equal, 0.0, e))
            largest_lane = tl.where(is_higher, 1.0, largest_lane + tl.where(is_equal, 1.0, 0.0))
            sum_d_lane += tl.where(is_higher, -seen * d, tl.where(present, d, 0.0))
            if correct is not None:
                top1_lane = tl.where(is_higher, head + begin + at, top1_lane)
            m_lane = tl.where(is_higher, z, m_lane)
            seen += 1.0
        m = tl.max(m_lane, axis=0)
        if PLACES == SHIFTED:
            m = tl.maximum(m, tl.max(z_edge, axis=0))
        d = m_lane - m
        is_equal = d == 0.0
        rest = tl.sum(tl.where(is_equal, rest_lane, (rest_lane + largest_lane) * tl.exp2(d * exponent)), axis=0)
        rest += m - m  # NaN for an infinite largest, as d of one block is
        largest = tl.sum(tl.where(is_equal, largest_lane, 0.0), axis=0)
        count = ((body - at + BLOCK - 1) // BLOCK).to(tl.float32)  # how many logits the lane has seen
        sum_d = tl.sum(sum_d_lane + tl.where(is_equal, 0.0, count * d), axis=0)
        if correct is not None:
            top1 = tl.min(tl.where(is_equal, top1_lane, classes), axis=0)
    if PLACES == SHIFTED:
        d_edge = z_edge - m
        e_edge = tl.exp2(d_edge * exponent)
        rest += tl.sum(tl.where(e_edge == 1.0, 0.0, e_edge), axis=0)
        largest += tl.sum(tl.where(e_edge == 1.0, 1.0, 0.0), axis=0)
        sum_d += tl.sum(tl.where(is_edge, d_edge, 0.0), axis=0)
        if correct is not None:
            top1 = tl.minimum(top1, tl.min(tl.where(d_edge == 0.0, edge, classes), axis=0))
    log_sum = _log1p(rest + (largest - 1.0))
    if correct is not None:
        tl.store(logsumexp + row, m / temperature + log_sum)
        tl.store(correct + row, ((top1 == tl.load(target + row)) & (log_sum == log_sum)).to(tl.int8))

    # Pass 2: the gradient of the base.
    if grad is not None:
        grad_scale = scale / temperature
        if upstream is not None:
            grad_scale *= tl.load(upstream)
        slope = mass_32 / (rest + largest) * grad_scale
        offset = beta_32 * grad_scale
        to = grad + row * classes
        if PLACES == ALIGNED:
            to_body = tl.multiple_of(to, 16)
        elif PLACES == SHIFTED:
            to_body = tl.multiple_of(to + head, 16)
        else:
            to_body = to
        T: tl.constexpr = grad.dtype.element_ty
        if ONE_BLOCK:
            tl.store(to_body + at, tl.where(is_discarded, 0.0, e * slope - offset).to(T), mask=at < body)
        else:
            for begin in range(0, body, BLOCK):
                z = tl.load(x_body + begin + at, mask=begin + at < body, other=float("-inf")).to(tl.float32)
                e = tl.exp2((z - m) * exponent)
                tl.store(to_body + begin + at, tl.where(is_discarded, 0.0, e * slope - offset).to(T), mask=begin + at < body)
        if PLACES == SHIFTED:
            tl.store(to + edge, tl.where(is_discarded, 0.0, e_edge * slope - offset).to(T), mask=is_edge)

    # The row's loss. Zero-weight terms are left out, never multiplied by zero: a logit may be inf.
    if not EARLY:
        i, delta = _pairs(tl.arange(0, N), row, other, own, adapted, ids, k, K2, MIXED)
    d_pair = tl.load(x + i, mask=i >= 0, other=0.0).to(tl.float32) - m
    value = mass_32 * log_sum
    value -= tl.where(beta_32 == 0.0, 0.0, beta_32 * (sum_d / temperature))
    value -= tl.sum(tl.where(delta == 0.0, 0.0, delta.to(tl.float32) * (d_pair / temperature)), axis=0)
    tl.store(row_loss + row, tl.where(is_discarded, 0.0, value * scale))

    # The gradient at the pairs' ids, each written once more with the total of all pairs that share its id: formed in float64, since on a
    # confident row it is a small difference, and rounded only once.
    if grad is not None:
        total = tl.zeros([N], tl.float64)
        AT_ONCE: tl.constexpr = N if N < PAIRS_AT_ONCE else PAIRS_AT_ONCE
        for first in range(0, N, AT_ONCE):
            i_too, delta_too = _pairs(first + tl.arange(0, AT_ONCE), row, other, own, adapted, ids, k, K2, MIXED)
            total += tl.sum(tl.where(i[:, None] == i_too[None, :], delta_too[None, :], 0.0), axis=1)
        mass, beta = _mass_and_base(row, other, own, adapted, k, MIXED)
        softmax = mass / (rest.to(tl.float64) + largest.to(tl.float64))
        e_pair = tl.exp2(d_pair * exponent).to(tl.float64)
        at_pair = ((e_pair * softmax - beta - total) * grad_scale).to(tl.float32)
        tl.debug_barrier()  # another thread wrote the base there: first that, then this
        tl.store(to + i, tl.where(is_discarded, 0.0, at_pair).to(T), mask=i >= 0)

    # The scalar: the last program to finish adds up the rows' losses, always in the same order.
    if loss is not None:
        tl.debug_barrier()
        if tl.atomic_add(ticket, 1, sem="acq_rel") == rows - 1:
            sum_lanes = tl.zeros([ROWS_AT_ONCE], tl.float64)
            for begin in range(0, rows, ROWS_AT_ONCE):
                b = begin + tl.arange(0, ROWS_AT_ONCE)
                sum_lanes += tl.load(row_loss + b, mask=b < rows, other=0.0, cache_modifier=".cg").to(tl.float64)
            tl.store(loss, tl.sum(sum_lanes, axis=0).to(tl.float32))
