"""The ways in which people compute this loss without ferkd: one table, shared by the tests and the benchmarks.

Every baseline takes (logits [B, C], ids [B, k] int64, probs [B, k], target [B] int64, policy) and returns the mean loss, with the
gradient through autograd. All but FKD's follow the region policy, at temperature 1 with a smooth tail.

HARD_LABEL_LOSSES look at the target alone. They compute another loss and stand beside the table as a yardstick: what people pay today
for the plainest loss there is, unfused (PyTorch's) and fused (Liger-Kernel's).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ferkd.regions import Region, RegionPolicy, confidence_of, region_of

Baseline = Callable[[Tensor, Tensor, Tensor, Tensor, RegionPolicy], Tensor]


def dense_labels(ids: Tensor, probs: Tensor, classes: int) -> Tensor:
    """[B, C]: the stored probabilities at their classes, the rest spread evenly over the other C - k (ids of a row differ)."""
    k = ids.shape[1]
    share = (1.0 - probs.sum(dim=1, keepdim=True)).clamp_min(0.0) / max(classes - k, 1)
    return share.expand(-1, classes).clone().scatter_(1, ids, probs)


def fkd(logits: Tensor, ids: Tensor, probs: Tensor, target: Tensor, policy: RegionPolicy) -> Tensor:
    """FKD's way: a dense label from the top-k, log_softmax, a batched matrix product of rows. It knows no regions.

    Kinder than FKD's loader, which builds the dense labels in Python workers: here the whole batch is scattered at once.
    """
    soft = dense_labels(ids, probs.float(), logits.shape[1])
    log_probs = F.log_softmax(logits.float(), dim=1)
    return -torch.bmm(soft.unsqueeze(1), log_probs.unsqueeze(2)).mean()


def eager_dense(logits: Tensor, ids: Tensor, probs: Tensor, target: Tensor, policy: RegionPolicy) -> Tensor:
    """A dense label adapted by region, then PyTorch's cross_entropy with probabilities as the target."""
    classes = logits.shape[1]
    region = region_of(confidence_of(ids, probs, target, classes, policy.confidence), policy)
    soft = dense_labels(ids, probs.float(), classes)
    hard = torch.full_like(soft, policy.smoothing / (classes - 1)).scatter_(1, target[:, None], 1.0 - policy.smoothing)
    soft = torch.where(region.eq(Region.CALIBRATED)[:, None], hard, soft)
    rows = F.cross_entropy(logits.float(), soft, reduction="none")
    alive = region.ne(Region.DISCARDED)
    return torch.where(alive, rows, 0.0).sum() / alive.sum().clamp_min(1)


def eager_sparse(logits: Tensor, ids: Tensor, probs: Tensor, target: Tensor, policy: RegionPolicy) -> Tensor:
    """No dense label: logsumexp, a mean over classes and k gathered logits, weighted by row."""
    classes, k = logits.shape[1], ids.shape[1]
    region = region_of(confidence_of(ids, probs, target, classes, policy.confidence), policy)
    calibrated = region.eq(Region.CALIBRATED)[:, None]
    v = probs.float()
    beta = (1.0 - v.sum(dim=1, keepdim=True)).clamp_min(0.0) / max(classes - k, 1)
    deltas = v - beta
    even = policy.smoothing / (classes - 1)
    first = torch.zeros(k, device=logits.device)
    first[0].fill_(1.0 - policy.smoothing - even)  # an assignment would wait for a GPU
    ids = torch.where(calibrated, target[:, None], ids)
    deltas = torch.where(calibrated, first, deltas)
    beta = torch.where(calibrated, even, beta)[:, 0]
    x = logits.float()
    log_probs_at_ids = x.gather(1, ids) - torch.logsumexp(x, dim=1, keepdim=True)
    log_probs_sum = x.sum(dim=1) - classes * torch.logsumexp(x, dim=1)
    rows = -(deltas * log_probs_at_ids).sum(dim=1) - beta * log_probs_sum
    alive = region.ne(Region.DISCARDED)
    return torch.where(alive, rows, 0.0).sum() / alive.sum().clamp_min(1)


def hard_labels(logits: Tensor, ids: Tensor, probs: Tensor, target: Tensor, policy: RegionPolicy) -> Tensor:
    """PyTorch's cross_entropy with the ground truth softened as the policy would: another loss, no teacher in it."""
    return F.cross_entropy(logits, target, label_smoothing=policy.smoothing)


def liger_hard_labels() -> tuple[Baseline | None, str]:
    """Liger-Kernel's fused cross_entropy of hard labels with label smoothing, or None; and why it is missing.

    It writes the gradient over the logits, so that a second call reads what the first wrote, and it waits for the device in every
    forward (`.item()` of the number of rows).
    """
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        return None, f"not importable ({error})"
    if not torch.cuda.is_available():
        return None, "its kernels need a GPU"

    def liger(logits: Tensor, ids: Tensor, probs: Tensor, target: Tensor, policy: RegionPolicy) -> Tensor:
        loss: Tensor = liger_cross_entropy(logits, target, label_smoothing=policy.smoothing)
        return loss

    return liger, ""


BASELINES: dict[str, Baseline] = {"fkd": fkd, "eager_dense": eager_dense, "eager_sparse": eager_sparse}
HARD_LABEL_LOSSES: dict[str, Baseline] = {"hard_labels": hard_labels}


def compiled_baselines() -> dict[str, Baseline]:
    """torch.compile of the dense and the sparse form, each as one graph; it compiles for every new shape, which takes seconds."""
    return {
        "compiled_dense": torch.compile(eager_dense, dynamic=False, fullgraph=True),
        "compiled_sparse": torch.compile(eager_sparse, dynamic=False, fullgraph=True),
    }
