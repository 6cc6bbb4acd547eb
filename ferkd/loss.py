"""ferkd_loss and FerKDLoss: the one call a training loop needs.

    loss = ferkd_loss(logits, (ids, probs), target, policy=RegionPolicy(discard_below=0.15, calibrate_below=0.3))
    loss.backward()

The distillation loss against stored top-k labels, adapted at training time by FerKD's rule (arXiv 2312.17473): crops the teacher
is unsure of are discarded or get the softened ground truth, the rest keep the teacher's label. Region, calibration, mask, tail,
temperature, mixing, loss and gradient are computed in one pass over the logits; no [B, C] target exists anywhere.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ferkd import ops, reference
from ferkd.errors import InputError
from ferkd.records import Records, label_words
from ferkd.regions import RegionPolicy

Tail = Literal["smooth", "renorm"]
Reduction = Literal["mean", "sum", "none"]
Impl = Literal["auto", "reference", "cpu", "triton", "cuda"]
Pairs = tuple[Tensor, Tensor]

MAX_K = 64
"""The most stored classes a label may have."""

_LOGITS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_KEEP_ALL = RegionPolicy()


def check_topk(topk: int | None) -> None:
    """Raises InputError for more classes a crop than the loss takes: they would be stored for nothing."""
    if topk is not None and topk > MAX_K:
        raise InputError(f"topk: {topk}, but a student can be trained on at most {MAX_K} classes a crop; choose at most that many")


class LossStats(NamedTuple):
    """What the loss saw on its way, one value a row, not differentiable."""

    region: Tensor
    """[B] int8 of Region values: each row's own label, whatever it was mixed with."""
    correct: Tensor
    """[B] bool: the student's top-1 is the row's own target; the lowest id wins a tie, a row with NaN is never correct."""
    logsumexp: Tensor
    """[B] float32 (float64 for float64 logits): log sum exp of logits / temperature."""


def ferkd_loss(
    logits: Tensor,
    labels: Records | Pairs,
    target: Tensor,
    *,
    policy: RegionPolicy = _KEEP_ALL,
    temperature: float = 1.0,
    tail: Tail = "smooth",
    mix: tuple[Tensor, Tensor] | None = None,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
    normalizer: Tensor | None = None,
    upstream: Tensor | None = None,
    tau_squared: bool = False,
    stats: bool = False,
    validate: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """The soft cross-entropy between a student's logits and stored labels under a region policy.

    logits        [B, C] float32, bfloat16, float16 (float64 with impl "cpu" and "reference"); rows may be strided; C >= 2.
    labels        Records(words, codec, k, classes) as they lie in a store, or (ids [B, k] integer, probs [B, k] floating): the
                  teacher's k most probable classes at temperature 1; repeated ids add; 1 <= k <= 64.
    target        [B] int64: the ground truth.
    temperature   T of logits / T. Labels are tempered to match, (p)^(1/T) renormalised; calibrated ones are not.
    tail          what becomes of 1 - sum(probs): "smooth" spreads it over the other C - k classes, "renorm" divides it away.
    mix           (partner [B] int64 in the batch, lam [B] float32): row b is lam[b] of its own label and 1 - lam[b] of its
                  partner's, each adapted by its own region first. The images are the caller's to mix.
    reduction     "mean" divides the sum by sum S, the labels' mass: 1 a row, 0 for a discarded one, so that discarding does not
                  dilute the mean; 0 when every row is discarded. "sum"; "none" gives [B].
    normalizer    0-dim float32: what "mean" divides by instead. Under DDP, which averages gradients over W ranks: the all-reduced
                  sum of `label_mass` divided by W, so that ranks together equal one process on the union.
    upstream      0-dim float32, a promise: the gradient that will reach this loss, for instance `scaler.scale(ones)` with a
                  GradScaler. The gradient is stored already multiplied by it (float16 needs that: unscaled it underflows) and
                  backward only checks the promise. Compiled code saves a pass over the gradient.
    tau_squared   multiplies the loss by T^2, so that gradients keep their size across temperatures (Hinton et al., 1503.02531).
    stats         returns (loss, LossStats) from the same pass.
    validate      also checks the data (ids, probabilities, targets) on a GPU, which waits for it; on a CPU they are always checked.
    impl          "auto" takes the fastest backend that can run and says once which, on the logger "ferkd".

    Returns the loss in float32 (float64 for float64 logits). Differentiable once, with respect to the logits alone. Raises
    InputError (a ValueError) that names the argument for wrong shapes, dtypes or data and for an `impl` that cannot run.
    """
    k, codec, words_or_ids, probs = _checked_labels(logits, labels)
    batch = logits.shape[0]
    _check_vector("target", target, batch, torch.int64, logits)
    partner, lam = (None, None) if mix is None else _checked_mix(mix, batch, logits)
    if not (isinstance(temperature, (int, float)) and 1e-30 <= temperature <= 1e30):  # beyond, 1 / T or T^2 leave float32
        raise InputError(f"temperature: {temperature!r}; give a number above 0 (from 1e-30 to 1e30)")
    if tail not in ("smooth", "renorm"):
        raise InputError(f"tail: {tail!r} is unknown; choose 'smooth' or 'renorm'")
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"reduction: {reduction!r} is unknown; choose 'mean', 'sum' or 'none'")
    if normalizer is not None:
        if reduction != "mean":
            raise InputError(f"normalizer: given with reduction {reduction!r}; only 'mean' divides by it")
        normalizer = _checked_scalar("normalizer", normalizer, logits)
    if upstream is not None:
        upstream = _checked_scalar("upstream", upstream, logits)
    if not isinstance(policy, RegionPolicy):
        raise InputError(f"policy: {type(policy).__name__}; give a RegionPolicy")

    answer = ops.loss(
        ops.choose(impl, logits.device.type, logits.dtype, logits.device.index),
        logits if logits.stride(1) == 1 else logits.contiguous(),
        words_or_ids,
        probs,
        target.contiguous(),
        partner,
        lam,
        normalizer,
        upstream,
        codec,
        k,
        float(policy.discard_below),
        float(policy.calibrate_below),
        float(policy.discard_above),
        float(policy.smoothing),
        policy.confidence,
        float(temperature),
        tail,
        reduction,
        tau_squared,
        # Never logits.requires_grad: Dynamo reads it False inside torch.func.grad, and the gradient would be zero in silence.
        torch.is_grad_enabled(),
        stats,
        validate,
    )
    if not stats:
        return answer.loss
    return answer.loss, LossStats(answer.region, answer.correct, answer.logsumexp)


class FerKDLoss(nn.Module):
    """ferkd_loss with its settings fixed: `FerKDLoss(policy)(logits, labels, target, mix=..., normalizer=..., upstream=...)`."""

    def __init__(
        self,
        policy: RegionPolicy = _KEEP_ALL,
        *,
        temperature: float = 1.0,
        tail: Tail = "smooth",
        reduction: Reduction = "mean",
        tau_squared: bool = False,
        stats: bool = False,
        validate: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.policy = policy
        self.temperature = temperature
        self.tail: Tail = tail
        self.reduction: Reduction = reduction
        self.tau_squared = tau_squared
        self.stats = stats
        self.validate = validate
        self.impl: Impl = impl

    def forward(
        self,
        logits: Tensor,
        labels: Records | Pairs,
        target: Tensor,
        *,
        mix: tuple[Tensor, Tensor] | None = None,
        normalizer: Tensor | None = None,
        upstream: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LossStats]:
        """As ferkd_loss."""
        return ferkd_loss(
            logits,
            labels,
            target,
            policy=self.policy,
            temperature=self.temperature,
            tail=self.tail,
            mix=mix,
            reduction=self.reduction,
            impl=self.impl,
            normalizer=normalizer,
            upstream=upstream,
            tau_squared=self.tau_squared,
            stats=self.stats,
            validate=self.validate,
        )

    def extra_repr(self) -> str:
        return f"{self.policy}, temperature={self.temperature}, tail={self.tail!r}, reduction={self.reduction!r}, impl={self.impl!r}"


def label_mass(
    labels: Records | Pairs,
    target: Tensor,
    *,
    classes: int,
    policy: RegionPolicy = _KEEP_ALL,
    temperature: float = 1.0,
    tail: Tail = "smooth",
    mix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """S of every row, [B] float32: what reduction "mean" sums and divides by. Needs only the labels, so that ranks can add theirs up
    before the loss:

        total = label_mass(labels, target, classes=C, policy=policy).sum()
        dist.all_reduce(total)
        loss = ferkd_loss(logits, labels, target, policy=policy, normalizer=total / dist.get_world_size())
    """
    if isinstance(labels, Records):
        if labels.classes != classes:
            raise InputError(f"labels: made for {labels.classes} classes, but classes is {classes}")
        ids, probs = reference.unpack(labels.words, labels.codec, labels.k, labels.classes)
    else:
        ids, probs = labels[0].long(), _computed(labels[1])
    _check_vector("target", target, len(ids), torch.int64, ids)  # one row of it would be broadcast over all
    if mix is not None:
        mix = _checked_mix(mix, len(ids), ids)
    label = reference.adapt(ids, probs, target, classes=classes, policy=policy, temperature=temperature, tail=tail)
    return (label if mix is None else reference.mixed(label, *mix)).mass.float()


# ------------------------------------------------------------------------------------------------ checks at the door


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _computed(probs: Tensor) -> Tensor:
    """Probabilities in the precision regions are decided in: float32, or float64 as they are."""
    return (probs if probs.dtype == torch.float64 else probs.float()).contiguous()


def _checked_labels(logits: Tensor, labels: Records | Pairs) -> tuple[int, str, Tensor, Tensor | None]:
    """(k, codec, words or ids, probabilities) of labels that fit the logits."""
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise InputError(f"logits: {_shape(logits) if isinstance(logits, Tensor) else type(logits).__name__}; give a [B, C] tensor")
    if logits.dtype not in _LOGITS:
        raise InputError(f"logits: {_shape(logits)}; give float32, bfloat16, float16 or float64")
    batch, classes = logits.shape
    if classes < 2:
        raise InputError(f"logits: {_shape(logits)}; a loss needs at least 2 classes")
    if isinstance(labels, Records):
        words = labels.words
        if not isinstance(words, Tensor):
            raise InputError(f"labels: words {type(words).__name__}; give an int32 tensor")
        if labels.classes != classes:
            raise InputError(
                f"labels: made for {labels.classes} classes, but the logits have {classes}; use a student with the store's classes"
            )
        _check_k(labels.k, classes)
        width = label_words(labels.codec, labels.k, classes)
        if words.dim() != 2 or words.shape[1] != width or words.dtype != torch.int32:
            raise InputError(
                f"labels: words {_shape(words)}; {labels.codec} labels of k={labels.k}, {classes} classes are [B, {width}] int32"
            )
        if words.shape[0] != batch:
            raise InputError(f"labels: {words.shape[0]} rows, but the logits have {batch}")
        _check_device("labels", words, logits)
        return labels.k, labels.codec, words.contiguous(), None
    if not isinstance(labels, (tuple, list)) or len(labels) != 2:
        raise InputError(f"labels: {type(labels).__name__}; give Records or a pair (ids [B, k], probs [B, k])")
    ids, probs = labels
    if not isinstance(ids, Tensor) or not isinstance(probs, Tensor):
        raise InputError(f"labels: ids {type(ids).__name__}, probs {type(probs).__name__}; give tensors [B, k]")
    if ids.dim() != 2 or ids.shape != probs.shape:
        raise InputError(f"labels: ids {_shape(ids)}, probs {_shape(probs)}; both must be [B, k]")
    if ids.is_floating_point() or ids.dtype == torch.bool or not probs.is_floating_point():
        raise InputError(f"labels: ids {_shape(ids)}, probs {_shape(probs)}; give integer ids and floating probabilities")
    if ids.shape[0] != batch:
        raise InputError(f"labels: {ids.shape[0]} rows, but the logits have {batch}")
    _check_k(ids.shape[1], classes)
    _check_device("labels", ids, logits)
    _check_device("labels", probs, logits)
    _check_constant("labels: probs", probs)
    return ids.shape[1], "pairs", ids.long().contiguous(), _computed(probs)


def _check_k(k: int, classes: int) -> None:
    if not 1 <= k <= min(MAX_K, classes):
        raise InputError(f"labels: k = {k} with {classes} classes; choose 1 to {min(MAX_K, classes)}")


def _checked_mix(mix: tuple[Tensor, Tensor], batch: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(mix, (tuple, list)) or len(mix) != 2:
        raise InputError(f"mix: {type(mix).__name__}; give a pair (partner [B] int64, lam [B] float32)")
    partner, lam = mix
    _check_vector("mix: partner", partner, batch, torch.int64, logits)
    _check_vector("mix: lam", lam, batch, torch.float32, logits)
    _check_constant("mix: lam", lam)
    return partner.contiguous(), lam.contiguous()


def _check_vector(name: str, tensor: Tensor, batch: int, dtype: torch.dtype, logits: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name}: {type(tensor).__name__}; give a [{batch}] {str(dtype).removeprefix('torch.')} tensor")
    if tensor.dim() != 1 or tensor.dtype != dtype or tensor.shape[0] != batch:
        raise InputError(f"{name}: {_shape(tensor)}; with {batch} rows of logits it must be [{batch}] {str(dtype).removeprefix('torch.')}")
    _check_device(name, tensor, logits)


def _checked_scalar(name: str, tensor: Tensor, logits: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.numel() != 1 or tensor.dim() != 0 or tensor.dtype != torch.float32:
        found = _shape(tensor) if isinstance(tensor, Tensor) else repr(tensor)
        raise InputError(f"{name}: {found}; give a 0-dim float32 tensor")
    _check_device(name, tensor, logits)
    _check_constant(name, tensor)
    return tensor


def _check_constant(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise InputError(f"{name}: requires a gradient, but the loss is differentiable with respect to the logits alone; detach it")


def _check_device(name: str, tensor: Tensor, logits: Tensor) -> None:
    if tensor.device != logits.device:
        raise InputError(f"{name}: on {tensor.device}, but the logits are on {logits.device}; move it there")
