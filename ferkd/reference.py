"""The loss in plain PyTorch: the oracle for the kernels, in any floating dtype and on any device. Made to be read.

A label of row b is a base beta on every class plus increments delta_j = v_j - beta at K class ids i_j; repeated ids add. Its mass
is S = sum v_j + (C - K) beta. With z = x / T and d = z - max z:

    loss = S log(sum exp d) - beta sum d - sum_j delta_j d[i_j]
    d loss / d x[c] = (S softmax(z)[c] - beta - sum_j delta_j [c = i_j]) / T

Source of the label rule: FerKD (arXiv 2312.17473) and FKD (arXiv 2112.01528). csrc/label_math.h and csrc/loss_cpu.cpp say the same
in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ferkd.errors import InputError
from ferkd.records import FIRST_BITS, HALF_ID16_CLASSES, LATER_BITS, id_bits, share_grid
from ferkd.regions import Region, RegionPolicy, confidence_of, region_of, sum_in_order


class Labels(NamedTuple):
    """The labels of B rows in the loss's own terms."""

    mass: Tensor
    """S [B], 0 for a discarded row."""
    base: Tensor
    """beta [B]."""
    ids: Tensor
    """i_j [B, K] int64."""
    deltas: Tensor
    """delta_j [B, K]; 0 where a row has fewer than K pairs."""
    region: Tensor
    """[B] int8, of each row's own label."""


class Answer(NamedTuple):
    """What every backend's op returns. The last three are empty unless statistics were asked for, `grad` unless it was."""

    loss: Tensor
    grad: Tensor
    region: Tensor
    correct: Tensor
    logsumexp: Tensor


def unpack(words: Tensor, codec: str, k: int, classes: int) -> tuple[Tensor, Tensor]:
    """The ids [B, k] int64 and probabilities [B, k] float32 of records' words [B, W] int32; docs/formats.md has the bits."""
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    if codec == "half":
        if classes <= HALF_ID16_CLASSES:
            ids, halves = unsigned & 0xFFFF, unsigned >> 16
        else:
            ids, pairs = unsigned[:, :k], unsigned[:, k:]
            halves = torch.stack([pairs & 0xFFFF, pairs >> 16], dim=2).flatten(1)[:, :k]
        return ids, halves.to(torch.int16).view(torch.float16).float()
    bits = id_bits(classes)
    ids = torch.stack([_field(unsigned, j * bits, bits) for j in range(k)], dim=1)
    probs, left, at = [], torch.ones_like(words[:, 0], dtype=torch.float32), k * bits
    for j in range(k):
        width = FIRST_BITS if j == 0 else LATER_BITS
        code = _field(unsigned, at, width)
        at += width
        lowest, step, _ = share_grid(j, classes)
        logit = torch.tensor(lowest, dtype=torch.float32) + (code - 1).float() * torch.tensor(step, dtype=torch.float32)
        e = torch.exp(-logit)
        r = torch.where(code == 0, 0.0, 1.0 / (1.0 + e))
        probs.append(left * r)
        left = left * torch.where(code == 0, 1.0, e * r)  # 1 - r, with its digits when r is close to 1
    return ids, torch.stack(probs, dim=1)


def _field(unsigned: Tensor, at: int, bits: int) -> Tensor:
    """The field of `bits` bits that begins at bit `at` of each label."""
    value = unsigned[:, at // 32] >> (at % 32)
    if at % 32 + bits > 32:
        value = value | unsigned[:, at // 32 + 1] << (32 - at % 32)
    return value & ((1 << bits) - 1)


def adapt(ids: Tensor, probs: Tensor, target: Tensor, *, classes: int, policy: RegionPolicy, temperature: float, tail: str) -> Labels:
    """The labels after their region's rule: ids [B, k] int64, probs [B, k], target [B] int64.

    In float64: 1 - sum cancels for a confident teacher, and tempering by 1/T enlarges the error of what is left.
    """
    dtype = torch.float64
    k = ids.shape[1]
    # From the stored probabilities, before tail mode and tempering.
    region = region_of(confidence_of(ids, probs, target, classes, policy.confidence), policy)

    v = probs.to(dtype)
    sums = sum_in_order(v)
    others = classes - k
    if tail == "renorm":
        region = torch.where(region.eq(Region.KEPT) & (sums == 0), torch.full_like(region, Region.DISCARDED), region)
        v = v / torch.where(sums == 0, 1.0, sums)[:, None]
        beta = torch.zeros_like(sums)
    else:
        beta = (1.0 - sums).clamp_min(0.0) / others if others else torch.zeros_like(sums)

    if temperature != 1.0:  # (v / m)^(1/T), and the tail as C - K equal classes; renormalised
        m = torch.maximum(v.amax(dim=1), beta)
        m = torch.where(m == 0, 1.0, m)
        v, beta = (v / m[:, None]) ** (1.0 / temperature), (beta / m) ** (1.0 / temperature)
        total = sum_in_order(v) + others * beta
        total = torch.where(total == 0, 1.0, total)
        v, beta = v / total[:, None], beta / total
    mass = sum_in_order(v) + others * beta
    deltas = v - beta[:, None]

    # Calibrated: the softened ground truth, one pair; not tempered.
    calibrated = region.eq(Region.CALIBRATED)
    even = policy.smoothing / (classes - 1)
    pair = torch.zeros(k, dtype=dtype, device=ids.device)
    pair[0].fill_(1.0 - policy.smoothing - even)  # an assignment would wait for a GPU
    ids = torch.where(calibrated[:, None], target[:, None], ids)
    deltas = torch.where(calibrated[:, None], pair, deltas)
    beta = torch.where(calibrated, even, beta)
    mass = torch.where(calibrated, 1.0, mass)

    discarded = region.eq(Region.DISCARDED)
    return Labels(
        mass=torch.where(discarded, 0.0, mass),
        base=torch.where(discarded, 0.0, beta),
        ids=ids,
        deltas=torch.where(discarded[:, None], 0.0, deltas),
        region=region,
    )


def mixed(labels: Labels, partner: Tensor, lam: Tensor) -> Labels:
    """Row b as lam[b] of its own label and 1 - lam[b] of partner[b]'s, each already adapted by its own region."""
    own = lam.to(labels.mass.dtype)
    other = 1.0 - own
    return Labels(
        mass=own * labels.mass + other * labels.mass[partner],
        base=own * labels.base + other * labels.base[partner],
        ids=torch.cat([labels.ids, labels.ids[partner]], dim=1),
        deltas=torch.cat([own[:, None] * labels.deltas, other[:, None] * labels.deltas[partner]], dim=1),
        region=labels.region,
    )


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
) -> Answer:
    """The op `ferkd::loss_reference`; ferkd.ops has the arguments. Computes in float64 whatever the logits are, and rounds at the end."""
    classes = logits.shape[1]
    policy = RegionPolicy(discard_below, calibrate_below, discard_above, smoothing, "target" if confidence == "target" else "max")
    ids, probs = (labels, probs) if probs is not None else unpack(labels, codec, k, classes)
    if logits.device.type == "cpu" or validate:
        check_data(ids, probs, target, partner, lam, classes)
    # Where nobody checks (a GPU without validate=True) a wrong id or partner must not reach memory: it makes its row NaN instead.
    astray = ((ids < 0) | (ids >= classes)).any(dim=1) | (target < 0) | (target >= classes)
    own_target = target  # one that is no class is never hit
    ids, target = ids.clamp(0, classes - 1), target.clamp(0, classes - 1)

    label = adapt(ids, probs, target, classes=classes, policy=policy, temperature=temperature, tail=tail)
    label = label._replace(mass=torch.where(astray & (label.mass != 0), torch.nan, label.mass))
    if partner is not None and lam is not None:
        lam = torch.where((partner < 0) | (partner >= len(partner)), torch.nan, lam)
        label = mixed(label, partner.clamp(0, max(len(partner) - 1, 0)), lam)

    z = logits.double() / temperature
    largest = z.amax(dim=1, keepdim=True)
    d = z - largest
    log_sum = d.exp().sum(dim=1).log()

    # Zero-weight terms are left out, never multiplied by zero: a logit may be inf.
    rows = label.mass * log_sum
    rows = rows - torch.where(label.base == 0, 0.0, label.base * d.sum(dim=1))
    rows = rows - torch.where(label.deltas == 0, 0.0, label.deltas * d.gather(1, label.ids)).sum(dim=1)
    discarded = label.mass == 0
    rows = torch.where(discarded, 0.0, rows)

    scale = torch.ones((), dtype=torch.float64, device=logits.device)
    if tau_squared:
        scale = scale * temperature**2
    if reduction == "mean":
        total = label.mass.double().sum() if normalizer is None else normalizer.double()
        scale = torch.where(total == 0, 0.0, scale / total)  # every row discarded: 0, never 0/0
    rows = rows * scale
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    value = (rows if reduction == "none" else rows.sum()).to(wide)

    grad = logits.new_empty(0)
    if with_grad:
        softmax = (d - log_sum[:, None]).exp()
        slope = label.mass[:, None] * softmax - label.base[:, None]
        slope = slope.scatter_add(1, label.ids, -label.deltas)
        slope = slope * (scale / temperature * (1.0 if upstream is None else upstream.double()))
        grad = torch.where(discarded[:, None], 0.0, slope).to(logits.dtype)

    if not stats:
        return Answer(value, grad, logits.new_empty(0, dtype=torch.int8), logits.new_empty(0, dtype=torch.bool), value.new_empty(0))
    ids_C = torch.arange(classes, device=logits.device)
    top1 = torch.where(d == 0, ids_C, classes).amin(dim=1)  # lowest id wins a tie
    return Answer(value, grad, label.region, (top1 == own_target) & ~log_sum.isnan(), (largest[:, 0] + log_sum).to(wide))


def check_data(ids: Tensor, probs: Tensor, target: Tensor, partner: Tensor | None, lam: Tensor | None, classes: int) -> None:
    """Raises InputError, naming the argument and the row.

    For ids and targets outside [0, classes), probabilities and lam that are NaN or outside [0, 1], partners outside the batch.
    """
    span = f"the logits have {classes} classes, 0 to {classes - 1}"
    _refuse(ids, (ids < 0) | (ids >= classes), "labels: class id {}", span)
    _refuse(probs, ~((probs >= 0) & (probs <= 1)), "labels: probability {}", "every probability must be from 0 to 1")
    _refuse(target, (target < 0) | (target >= classes), "target: class id {}", span)
    if partner is not None and lam is not None:
        _refuse(partner, (partner < 0) | (partner >= len(partner)), "mix: partner {}", f"the batch has {len(partner)} rows")
        _refuse(lam, ~((lam >= 0) & (lam <= 1)), "mix: lam {}", "every lam must be from 0 to 1")


def _refuse(values: Tensor, wrong: Tensor, what: str, rule: str) -> None:
    if bool(wrong.any()):
        at = wrong.nonzero()[0]
        raise InputError(f"{what.format(values[tuple(at)].item())} in row {int(at[0])}; {rule}")
