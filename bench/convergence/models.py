"""The networks of the experiments, for `python:bench.convergence.models:NAME`: CIFAR's teachers, and the small student.

The teachers are He et al.'s CIFAR ResNets with parameter-free shortcuts; their weights come with --teacher-weights. Their pixels are
normalised with ImageNet's mean and standard deviation, as they were trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Described = tuple[nn.Module, dict[str, Any]]


def resnet20() -> Described:
    return CifarResNet(blocks=3), _as_trained()


def resnet56() -> Described:
    return CifarResNet(blocks=9), _as_trained()


def resnet56_unnormalised() -> Described:
    """The mistake of feeding a teacher pixels in [-1, 1] instead of what it was trained on."""
    return CifarResNet(blocks=9), {**_as_trained(), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def small_student(num_classes: int) -> Described:
    """A residual network of 75,290 parameters for 32-pixel pictures whose first convolution halves them: cheap enough for many runs."""
    seen = {
        "input_size": 32,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }
    return CifarResNet(blocks=1, first_stride=2, classes=num_classes), seen


def photo_student(num_classes: int) -> Described:
    """The same with twice the channels, for 64-pixel photographs: 425,736 parameters with 1,000 classes, 48 million multiplications a crop.

    timm's ResNet-10-T takes about 2.7 times as long a step (compiled, bfloat16, one core of a busy Xeon), over a third of that in its
    last stage, whose maps are 2 x 2 pixels here.
    """
    seen = {"input_size": 64, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bilinear", "crop_pct": 1.0}
    return CifarResNet(blocks=1, widths=(32, 64, 128), first_stride=2, classes=num_classes), seen


def _as_trained() -> dict[str, Any]:
    return {"input_size": 32, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bilinear", "crop_pct": 1.0, "classes": CIFAR10}


class CifarResNet(nn.Module):
    """6 * blocks + 2 layers in three stages; a shortcut that changes shape drops every second pixel and pads channels with zeros.

    The parts are named as the teachers' weight files name them.
    """

    def __init__(self, blocks: int, widths: tuple[int, int, int] = (16, 32, 64), first_stride: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, first_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[0], blocks, stride=1)
        self.layer2 = _stage(widths[0], widths[1], blocks, stride=2)
        self.layer3 = _stage(widths[1], widths[2], blocks, stride=2)
        self.linear = nn.Linear(widths[2], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        features = functional.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


def _stage(before: int, after: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_Block(before, after, stride), *(_Block(after, after, 1) for _ in range(blocks - 1)))


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.more_channels = stride, after - before

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.more_channels:
            half = self.more_channels // 2
            # Every second pixel. As a slice, its gradient would lose channels_last, and a fifth of a training step with it.
            x = functional.pad(functional.max_pool2d(x, 1, self.stride), (0, 0, 0, 0, half, self.more_channels - half))
        return torch.relu(x + residual)
