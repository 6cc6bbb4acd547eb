"""Teachers of a few parameters that know grey levels, for python:tiny_teachers:NAME; some make the mistakes that a preflight must find."""

import os
import time

import torch
from torch import Tensor, nn

import ferkd.store_writing

LEVELS = 8
GREYS = [round(20 + 215 * i / (LEVELS - 1)) for i in range(LEVELS)]
HALF = {"input_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}


class GreyTeacher(nn.Module):
    """Class i is the i-th grey level. Wants (x - 0.5) / 0.5; `sharpness` is how sure it is."""

    def __init__(self, sharpness: float = 400.0) -> None:
        super().__init__()
        self.levels = nn.Parameter(torch.tensor(GREYS) / 255)
        self.sharpness = sharpness

    def brightness(self, x: Tensor) -> Tensor:
        return (x * 0.5 + 0.5).mean((1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return -self.sharpness * (self.brightness(x)[:, None] - self.levels) ** 2


class SizedGreyTeacher(GreyTeacher):
    """Adds up instead of averaging: right at 16 px only."""

    def brightness(self, x: Tensor) -> Tensor:
        return (x * 0.5 + 0.5).sum((1, 2, 3)) / (3 * 16 * 16)


def grey() -> tuple[nn.Module, dict]:
    return GreyTeacher(), HALF


def grey_bicubic() -> tuple[nn.Module, dict]:
    return GreyTeacher(), {**HALF, "interpolation": "bicubic"}


def grey_with_softmax() -> tuple[nn.Module, dict]:
    return nn.Sequential(GreyTeacher(), nn.Softmax(1)), HALF


def grey_with_log_softmax() -> tuple[nn.Module, dict]:
    return nn.Sequential(GreyTeacher(), nn.LogSoftmax(1)), HALF


def vague() -> tuple[nn.Module, dict]:
    return GreyTeacher(20.0), HALF


def vague_by_name() -> tuple[nn.Module, dict]:
    return GreyTeacher(20.0), {**HALF, "classes": [f"g{i}" for i in range(LEVELS)]}


def wrong_normalisation() -> tuple[nn.Module, dict]:
    return GreyTeacher(), {**HALF, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def permuted() -> tuple[nn.Module, dict]:
    names = [f"g{i}" for i in range(LEVELS)]
    return GreyTeacher(), {**HALF, "classes": names[3:] + names[:3]}


class BlindTeacher(GreyTeacher):
    """Sees the noise alone."""

    def forward(self, x: Tensor) -> Tensor:
        return 5 * (x - x.mean((1, 2, 3), keepdim=True)).flatten(1)[:, :LEVELS] * self.levels.sign()


def blind() -> tuple[nn.Module, dict]:
    return BlindTeacher(), HALF


def sized() -> tuple[nn.Module, dict]:
    return SizedGreyTeacher(), HALF


def overconfident() -> tuple[nn.Module, dict]:
    """Sure of itself, and blind to all but the brightest half of the levels."""
    teacher = GreyTeacher(1e6)
    with torch.no_grad():
        teacher.levels[:3] += 10
    return teacher, HALF


class SlowGreyTeacher(GreyTeacher):
    """Takes FERKD_TEST_SECONDS for a batch."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(float(os.environ.get("FERKD_TEST_SECONDS", "0")))
        return super().forward(x)


def slow() -> tuple[nn.Module, dict]:
    """With FERKD_TEST_SHARDS the store has about so many."""
    ferkd.store_writing.SHARDS = int(os.environ.get("FERKD_TEST_SHARDS", ferkd.store_writing.SHARDS))
    return SlowGreyTeacher(), HALF


def nine() -> tuple[nn.Module, dict]:
    """A teacher with a class more."""
    teacher = GreyTeacher()
    teacher.levels = nn.Parameter(torch.cat([teacher.levels, torch.ones(1)]))
    return teacher, {**HALF, "classes": [*(f"g{i}" for i in range(LEVELS)), "more"]}


def odd_names() -> tuple[nn.Module, dict]:
    """Classes of odd names, one for each level."""
    return GreyTeacher(), {
        **HALF,
        "classes": ["Größe (klein)", "a b", "a.b.c", "e\u0301te\u0301", "n01440764_fish.v2", "quote'\"s", "ひらがな", "100%"],
    }
