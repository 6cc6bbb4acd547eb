"""What the loss benchmark measures: one step's inputs, and every way of turning them into a loss and its gradient.

Backends are named, never `auto`: a row of the table says what ran, and a backend that cannot run is left out with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from bench.baselines import BASELINES, HARD_LABEL_LOSSES, Baseline, compiled_baselines, liger_hard_labels
from ferkd import Records, RegionPolicy, ferkd_loss, ops
from ferkd.records import LabelCodec, pack_labels

K = 5
POLICY = RegionPolicy(discard_below=0.02, calibrate_below=0.2)
ANOTHER_LOSS = "another loss: hard labels"


@dataclasses.dataclass(frozen=True)
class Problem:
    """The inputs of one step, the same for every variant, all on one device."""

    logits: Tensor
    """[B, C], a leaf that requires its gradient."""
    into: Tensor
    """[B, C]: memory that is there, for the copy."""
    ids: Tensor
    probs: Tensor
    target: Tensor
    half: Tensor
    """The labels as words of the `half` codec."""
    packed: Tensor
    partner: Tensor
    lam: Tensor
    one: Tensor
    """0-dim float32: the gradient that reaches a loss nobody scales."""

    def records(self, codec: LabelCodec = "half") -> Records:
        return Records(self.half if codec == "half" else self.packed, codec, K, self.logits.shape[1])

    def turned(self, rows: int) -> Problem:
        """The same step in other memory, its rows rotated."""
        moved = {name: getattr(self, name).roll(rows, 0) for name in ("ids", "probs", "target", "half", "packed", "partner", "lam")}
        logits = self.logits.detach().roll(rows, 0).requires_grad_()
        return dataclasses.replace(self, logits=logits, into=torch.empty_like(self.into), **moved)


def problem(batch: int, classes: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """A step's inputs. Confidence is uniform in [0, 1]: 2 % of the rows discarded, 18 % calibrated.

    Few are discarded because a discarded row costs ferkd next to nothing.
    """
    generator = torch.Generator().manual_seed(0)
    first_id = torch.randint(classes, (batch, 1), generator=generator)
    stride = torch.randint(1, classes // K + 1, (batch, 1), generator=generator)  # a row's ids differ
    ids = (first_id + stride * torch.arange(K)) % classes
    first = torch.rand(batch, 1, generator=generator)
    probs = torch.cat([first, (1 - first) * torch.minimum(first, 1 - first) * 0.5 ** torch.arange(1, K)], dim=1)
    half, packed = (torch.from_numpy(pack_labels(ids.numpy(), probs.numpy(), codec, classes).view("int32")) for codec in ("half", "packed"))
    labels = {
        "ids": ids,
        "probs": probs,
        "target": torch.randint(classes, (batch,), generator=generator),
        "half": half,
        "packed": packed,
        "partner": torch.randperm(batch, generator=generator),
        "lam": torch.rand(batch, generator=generator),
        "one": torch.ones(()),
    }
    numbers = torch.Generator(device).manual_seed(0)
    logits = torch.empty(batch, classes, dtype=dtype, device=device).normal_(std=2.0, generator=numbers)
    on_device = {name: tensor.to(device) for name, tensor in labels.items()}
    return Problem(logits=logits.requires_grad_(), into=torch.empty_like(logits, requires_grad=False), **on_device)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way of computing a loss and its gradient."""

    name: str
    run: Callable[[Problem], object]
    backend: str = "torch"
    setting: str = "half"
    """How the labels come and what is asked beside the loss: `half` is the plain case."""
    note: str = ""
    capturable: bool = True
    """Whether a CUDA graph can hold it: it never waits for the device."""


def limits(device: torch.device) -> list[Variant]:
    """One read and one write of the logits. `copy` is the limit; `clone` allocates its output as every loss does."""
    copies = [
        Variant("copy", lambda p: p.into.copy_(p.logits.detach())),
        Variant("clone", lambda p: p.logits.detach().clone()),
    ]
    if device.type == "cuda":  # where a copy is the driver's memcpy: what an elementwise kernel reaches
        copies.append(Variant("neg", lambda p: torch.neg(p.logits.detach(), out=p.into)))
    return copies


def ours(device: torch.device, dtype: torch.dtype) -> tuple[list[Variant], dict[str, str]]:
    """`kernel` (the op alone: loss and gradient) and `ferkd` (ferkd_loss and its backward through autograd) of every backend that
    runs here, the one that `auto` takes first; and why the others do not."""
    found, missing = [], {}
    for backend in ("cpu",) if device.type == "cpu" else ("cuda", "triton"):
        reason = ops.why_not(backend, device.type, dtype)
        if reason is not None:
            missing[f"kernel and ferkd, {backend}"] = reason
            continue
        found += [Variant("kernel", kernel(backend), backend), Variant("ferkd", through_ferkd_loss(backend), backend)]
    return found, missing


def ours_in_other_settings(backend: str) -> list[Variant]:
    """What each extra costs, one at a time, end to end through autograd."""
    settings: dict[str, Callable[[Problem], dict[str, object]]] = {
        "packed": lambda p: {"labels": p.records("packed")},
        "pairs": lambda p: {"labels": (p.ids, p.probs)},
        "mix": lambda p: {"mix": (p.partner, p.lam)},
        "temperature 2": lambda p: {"temperature": 2.0},
        "stats": lambda p: {"stats": True},
        "normalizer": lambda p: {"normalizer": p.one},
        "upstream": lambda p: {"upstream": p.one},
    }
    return [Variant("ferkd", through_ferkd_loss(backend, extras), backend, setting) for setting, extras in settings.items()]


def others() -> tuple[list[Variant], dict[str, str]]:
    """The ways without ferkd, the hard-label losses after them; and why Liger-Kernel's is missing where it is."""
    found = [Variant(name, through_autograd(loss)) for name, loss in BASELINES.items()]
    found += [Variant(name, through_autograd(loss), note=ANOTHER_LOSS) for name, loss in HARD_LABEL_LOSSES.items()]
    liger, reason = liger_hard_labels()
    if liger is None:
        return found, {"liger": reason}
    note = f"{ANOTHER_LOSS}; overwrites the logits; waits for the device"
    return [*found, Variant("liger", through_autograd(liger), "triton", note=note, capturable=False)], {}


def compiled(backends: list[str]) -> list[Variant]:
    """torch.compile of the baselines and of ferkd_loss, each one graph of static shapes, fresh: they compile when first run."""
    torch._dynamo.reset()
    found = [Variant("ferkd_compiled", through_compiled_ferkd_loss(backend), backend, "upstream") for backend in backends]
    return found + [Variant(name, through_autograd(loss), "inductor") for name, loss in compiled_baselines().items()]


def kernel(backend: str) -> Callable[[Problem], object]:
    """The raw op on a step's inputs, its arguments by the schema's names: no autograd, no checks in Python."""
    op = getattr(torch.ops.ferkd, f"loss_{backend}").default
    fixed = {
        "probs": None, "partner": None, "lam": None, "normalizer": None, "upstream": None, "codec": "half", "k": K,
        "discard_below": POLICY.discard_below, "calibrate_below": POLICY.calibrate_below, "discard_above": POLICY.discard_above,
        "smoothing": POLICY.smoothing, "confidence": POLICY.confidence, "temperature": 1.0, "tail": "smooth", "reduction": "mean",
        "tau_squared": False, "with_grad": True, "stats": False, "validate": False,
    }  # fmt: skip
    names = [argument.name for argument in op._schema.arguments]
    if names[:2] != ["logits", "labels"] or names[3] != "target":
        raise RuntimeError(f"the schema of ferkd::loss_{backend} begins with {names[:4]}")
    probs, *rest = (fixed[name] for name in names[2:] if name != "target")
    return lambda p: op(p.logits.detach(), p.half, probs, p.target, *rest)


def through_ferkd_loss(backend: str, extras: Callable[[Problem], dict[str, object]] = lambda p: {}) -> Callable[[Problem], object]:
    def run(p: Problem) -> object:
        arguments = {"labels": p.records(), "target": p.target, "policy": POLICY, "impl": backend} | extras(p)
        answer = ferkd_loss(p.logits, **arguments)  # type: ignore[arg-type]
        return torch.autograd.grad(answer[0] if isinstance(answer, tuple) else answer, p.logits)

    return run


def through_compiled_ferkd_loss(backend: str) -> Callable[[Problem], object]:
    @torch.compile(fullgraph=True, dynamic=False)
    def loss(logits: Tensor, words: Tensor, target: Tensor, upstream: Tensor) -> Tensor:
        labels = Records(words, "half", K, logits.shape[1])
        return ferkd_loss(logits, labels, target, policy=POLICY, impl=backend, upstream=upstream)  # type: ignore[arg-type, return-value]

    return lambda p: torch.autograd.grad(loss(p.logits, p.half, p.target, p.one), p.logits)


def through_autograd(loss: Baseline) -> Callable[[Problem], object]:
    return lambda p: torch.autograd.grad(loss(p.logits, p.ids, p.probs, p.target, POLICY), p.logits)
