"""Every path of a GPU loss kernel once, small and checked against the reference: what compute-sanitizer watches.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python3 bench/sanitize_loss.py

Without PyTorch's cache every tensor is an allocation of its own, so that a write beyond one is seen. Nothing but the loss runs on the
device: inputs are made on the CPU and results compared there. Classes and strides are odd ones, so that rows begin off 16 bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import loss_variants, machine
from bench.loss_variants import POLICY, Problem
from ferkd import ferkd_loss, ops
from ferkd.loss import Impl

ROWS = 7
CLASSES = (10, 1000, 1001, 21841, 131073)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PADDING = 3  # elements between rows
SETTINGS: dict[str, dict[str, Any]] = {
    "half": {},
    "packed, stats": {"stats": True},
    "mixed, temperature": {"temperature": 2.0, "tau_squared": True, "mix": True},
    "pairs, renorm, rows": {"tail": "renorm", "reduction": "none"},
}


def arguments(setting: str, p: Problem) -> dict[str, Any]:
    """A setting's arguments for ferkd_loss, beside the logits."""
    given: dict[str, Any] = {"labels": p.records(), "target": p.target, "policy": POLICY} | SETTINGS[setting]
    if "packed" in setting:
        given["labels"] = p.records("packed")
    if "pairs" in setting:
        given["labels"] = (p.ids, p.probs)
    if "mix" in given:
        given["mix"] = (p.partner, p.lam)
    return given


def loss_and_gradient(logits: torch.Tensor, given: dict[str, Any], impl: Impl) -> tuple[torch.Tensor, torch.Tensor]:
    """On the CPU, whatever device they came from."""
    leaf = logits.detach().requires_grad_()
    answer = ferkd_loss(leaf, impl=impl, **given)
    loss = answer[0] if isinstance(answer, tuple) else answer
    (gradient,) = torch.autograd.grad(loss, leaf, torch.full(loss.shape, 0.5).to(loss.device))  # not 1: the scaling kernel runs too
    return loss.detach().cpu(), gradient.cpu()


def padded(logits: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same rows on the device with a stride longer than a row."""
    rows, classes = logits.shape
    wide = torch.zeros(rows, classes + PADDING, dtype=logits.dtype)
    wide[:, :classes] = logits
    return wide.to(device)[:, :classes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impl", default="", help="the backend; else the first that runs here")
    settings = parser.parse_args()
    device = machine.device()
    candidates: tuple[Impl, ...] = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    impl: Impl | None = settings.impl or next((impl for impl in candidates if ops.why_not(impl, device.type) is None), None)
    if impl is None:
        raise SystemExit("; ".join(f"{impl}: {ops.why_not(impl, device.type)}" for impl in candidates))

    checked = 0
    for classes, dtype, setting in itertools.product(CLASSES, DTYPES, SETTINGS):
        p = loss_variants.problem(ROWS, classes, dtype, torch.device("cpu"))
        fields = {field.name: getattr(p, field.name) for field in dataclasses.fields(p) if field.name not in ("logits", "into")}
        there = dataclasses.replace(p, **{name: tensor.to(device) for name, tensor in fields.items()})
        for logits in (p.logits.detach().to(device), padded(p.logits.detach(), device)):
            found = loss_and_gradient(logits, arguments(setting, there), impl)
            wanted = loss_and_gradient(p.logits, arguments(setting, p), "reference")
            torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-4)
            # twice the coarsest rounding: this looks for wrong memory, the tests for wrong digits
            torch.testing.assert_close(found[1].float(), wanted[1].float(), rtol=2.0**-6, atol=1e-4)
            checked += 1
    print(f"{impl} on {machine.device_name(device)}: {checked} cases agree with the reference")


if __name__ == "__main__":
    main()
