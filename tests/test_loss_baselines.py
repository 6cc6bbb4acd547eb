"""The baselines that the benchmarks measure compute the same loss: a comparison of speeds means nothing otherwise."""

import sys
from pathlib import Path

import pytest
import torch
from loss_cases import labels, logits

from ferkd import RegionPolicy, ferkd_loss

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.baselines import BASELINES, hard_labels


@pytest.mark.parametrize("name", BASELINES)
def test_baseline_equals_the_reference(name):
    ids, probs, target = labels(20, 50, 5)
    x = logits(20, 50).requires_grad_()
    policy = RegionPolicy() if name == "fkd" else RegionPolicy(discard_below=0.2, calibrate_below=0.4)
    loss = BASELINES[name](x, ids, probs, target, policy)
    expected = ferkd_loss(x, (ids, probs), target, policy=policy, impl="reference")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    found, wanted = torch.autograd.grad(loss, x) + torch.autograd.grad(expected, x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "fkd"])
def test_baseline_compiles_to_one_graph(name):
    """A graph break would leave part of it eager, and `torch.compile` would look slower than it is."""
    torch._dynamo.reset()
    ids, probs, target = labels(20, 50, 5)
    x, policy = logits(20, 50), RegionPolicy(discard_below=0.2, calibrate_below=0.4)
    run = torch.compile(BASELINES[name], backend="eager", fullgraph=True)
    torch.testing.assert_close(run(x, ids, probs, target, policy), BASELINES[name](x, ids, probs, target, policy))


def test_hard_labels_are_what_is_left_when_every_crop_is_calibrated():
    """PyTorch spreads the smoothing over all classes, ferkd over the others: the same loss for s = smoothing (C - 1) / C."""
    classes = 50
    ids, probs, target = labels(20, classes, 5)
    x = logits(20, classes)
    theirs = RegionPolicy(smoothing=0.1)
    ours = RegionPolicy(calibrate_below=1.0, smoothing=0.1 * (classes - 1) / classes)
    found = hard_labels(x, ids, probs, target, theirs)
    torch.testing.assert_close(found, ferkd_loss(x, (ids, probs), target, policy=ours, impl="reference"), rtol=1e-5, atol=1e-6)
