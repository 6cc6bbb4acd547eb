"""Accuracy: what counts as the model's answer, on made-up answers."""

import numpy as np
import pytest
import torch
from torch import nn

from ferkd.evaluation import evaluate
from ferkd.preprocessing import Preprocessing


class Answers(nn.Module):
    """Answers image i, whose pixels are all i, with row i of a table."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.as_tensor(logits, dtype=torch.float32)

    def forward(self, pixels):
        return self.logits[(pixels[:, 0, 0, 0] * 255).round().long()]


def accuracy(logits, targets, folder_classes):
    views = [(torch.full((3, 4, 4), i, dtype=torch.uint8), target, i) for i, target in enumerate(targets)]
    seen = Preprocessing(input_size=4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="bilinear", crop_pct=1.0)
    return evaluate(Answers(logits), views, seen, np.array(folder_classes), torch.device("cpu"), batch_size=3, workers=0)


def test_against_argmax_and_sorting():
    logits = np.random.default_rng(0).permutation(40 * 12).reshape(40, 12)
    targets, folders = np.arange(40) % 12, np.arange(12)
    found = accuracy(logits, targets.tolist(), folders)
    order = np.argsort(-logits, axis=1)
    assert found.top1 == found.top1_folders == np.mean(order[:, 0] == targets)
    assert found.top5 == np.mean((order[:, :5] == targets[:, None]).any(1))
    assert (found.images, found.unreadable) == (40, 0)
    some = np.array([1, 4, 7])
    among = accuracy(logits, (chosen := some[np.arange(40) % 3]).tolist(), some)
    assert among.top1_folders == np.mean(some[logits[:, some].argmax(1)] == chosen) > among.top1


def test_of_equal_answers_the_first_class_is_meant_everywhere():
    """bfloat16 logits are often equal; so an image could be right among all classes and wrong among the folders' few."""
    rows = np.array([[0, 2, 2, 1], [0, 2, 2, 1], [1, 1, 1, 1]])
    assert accuracy(rows, [1, 2, 0], [0, 1, 2, 3])[:3] == (pytest.approx(2 / 3), 1.0, pytest.approx(2 / 3))
    logits = np.random.default_rng(1).integers(0, 4, (200, 30))
    folders = np.array([3, 9, 20, 28])
    found = accuracy(logits, folders[np.arange(200) % 4].tolist(), folders)
    assert found.top1 == np.mean(logits.argmax(1) == folders[np.arange(200) % 4])
    assert found.top1 <= found.top1_folders


def test_an_answer_that_is_not_a_number_is_never_right():
    rows = np.full((4, 8), np.nan)
    rows[3] = np.arange(8)
    rows[3, 0] = np.nan
    assert accuracy(rows, [0, 1, 2, 7], np.arange(8))[:3] == (0.0, 0.0, 0.0)
