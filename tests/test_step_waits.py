"""A training step on a GPU never waits for it: seen without a GPU, on tensors that only pretend to lie on one.

What would wait is a copy between host and device that is not `non_blocking`, and whatever reads a value or a count back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from photos import tiny_net
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from waits import Waits

from ferkd import ops
from ferkd.data import CropBatch, pixel_rows
from ferkd.distributed import Ranks
from ferkd.meter import Meter
from ferkd.mixing import Mixing
from ferkd.preprocessing import Preprocessing
from ferkd.recipes import TrainConfig
from ferkd.regions import RegionPolicy
from ferkd.step import TrainStep
from ferkd.stream import CropStream, Phase

ROWS, SIZE, CLASSES, K = 16, 32, 10, 5


def step_waits(changes: dict[str, Any]) -> Waits:
    """What one step of training with these settings waits for."""
    policy = RegionPolicy(0.1, 0.3, confidence="target")
    config = TrainConfig(
        batch_size=ROWS, crops_per_image=4, policy=policy, compile="no", mixing=Mixing("selfmix"), optimizer="sgd", **changes
    )
    store = SimpleNamespace(label_codec="half", k=K, classes=CLASSES)
    task: Any = SimpleNamespace(store=store, classes=range(CLASSES), policy=policy, teacher=None)
    ops.choose = lambda *arguments: "cuda"
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model, _ = tiny_net(CLASSES)

        def backward(loss: Tensor) -> None:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)

        # PyTorch's autograd and fused kernels know no pretended tensors; what a step asks of the device around them is what is looked at.
        Tensor.backward = backward
        ranks = Ranks(device=torch.device("cuda"))
        learn, meter = TrainStep(model, Preprocessing(SIZE), config, task, ranks), Meter(ranks)
        learn.optimizer.step = lambda: None
        stream = CropStream(1000, ROWS, [Phase(4, 10)], 0)
        pixels = pixel_rows(torch.zeros(ROWS * SIZE * SIZE * 3, dtype=torch.uint8), SIZE)
        batch = CropBatch(pixels, torch.zeros(ROWS, K, dtype=torch.int32), torch.zeros(ROWS, dtype=torch.int64))
        learn(batch, stream, 0, 0.1, meter)  # what is made once may wait
        with Waits() as waits:
            learn(batch, stream, 1, 0.1, meter)
    return waits


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"nan": "skip", "clip_grad": 1.0, "ema_decay": 0.9}], ids=str)
def test_a_step_on_a_gpu_never_waits_for_it(changes: dict[str, Any]) -> None:
    """In a process of its own: what is patched here, and PyTorch's pretended tensors after several steps, would harm later tests."""
    here = Path(__file__)
    done = subprocess.run(
        [sys.executable, str(here), json.dumps(changes)], capture_output=True, text=True, check=False, cwd=here.parents[1]
    )
    assert done.stdout, done.stderr
    crossed, found = json.loads(done.stdout)
    assert crossed >= 3  # crops, words, ground truth
    assert found == []


def test_what_waits_is_seen() -> None:
    with FakeTensorMode(), Waits() as waits:
        there = torch.zeros(3, device="cuda")
        torch.tensor(0.5, device="cuda")
        there.cpu()
        with pytest.raises(DynamicOutputShapeException):  # a pretended tensor cannot; it is found all the same
            there.nonzero()
        torch.zeros(3).to("cuda", non_blocking=True)
    assert len(waits.found) == 3


if __name__ == "__main__":
    waits = step_waits(json.loads(sys.argv[1]))
    print(json.dumps([waits.crossed, waits.found]), flush=True)
    os._exit(0)
