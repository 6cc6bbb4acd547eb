"""The online teacher: it answers for every fresh crop while the student trains. In the same loop, to compare stored labels with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ferkd.crops import CropSettings
from ferkd.errors import InputError
from ferkd.normalise import Normalise
from ferkd.preflight import preflight
from ferkd.recipes import TrainConfig
from ferkd.sources import Split
from ferkd.teacher import LoadedModel, TeacherClasses, choose_classes, load_teacher


@dataclasses.dataclass
class OnlineTeacher:
    """A teacher on the training device. Called with uint8 crops [B, 3, S, S] of its own input size, it answers as `ferkd label` would
    have: the ids [B, k] int64 and probabilities [B, k] float32 of its k most probable classes, most probable first."""

    loaded: LoadedModel
    classes: TeacherClasses
    k: int
    normalise: Normalise
    amp: torch.dtype | None

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), torch.autocast(pixels.device.type, dtype=self.amp, enabled=self.amp is not None):
            logits = self.classes.select(self.loaded.model(self.normalise(pixels))).float()
        top = logits.softmax(1).topk(self.k)
        return top.indices, top.values

    @property
    def size(self) -> int:
        return self.loaded.preprocessing.input_size


def load_online_teacher(
    spec: str,
    weights: Path | None,
    input_size: int | None,
    config: TrainConfig,
    train: Split,
    device: torch.device,
    amp: torch.dtype | None,
) -> OnlineTeacher:
    """Raises InputError as load_teacher does, for folders that are none of its classes, and for more answers than classes."""
    loaded = load_teacher(spec, weights, input_size)
    classes = choose_classes(config.teacher_classes, train.folders, loaded, train.numbers).to(device)
    topk = min(5, len(classes.names)) if config.topk is None else config.topk
    if topk > len(classes.names):
        raise InputError(f"topk: {topk}, but the teacher has only {len(classes.names):,} classes; choose at most that many")
    loaded.model.to(device).to(memory_format=torch.channels_last)
    preprocessing = loaded.preprocessing
    return OnlineTeacher(loaded, classes, topk, Normalise(preprocessing.input_size, preprocessing.mean, preprocessing.std, device), amp)


def check_online_teacher(
    teacher: OnlineTeacher, train: Split, val: Split, crops: CropSettings, device: torch.device, say: Callable[[str], None]
) -> None:
    """What `ferkd label` asks before it labels: is this teacher plausible on these photographs? Raises CheckFailed when it is not."""
    report = preflight(teacher.loaded, teacher.classes, train, val, crops, device=device)
    say(
        f"preflight: the teacher recognises {report.top1:.1%} of {report.images:,} images of {report.source} "
        f"and agrees with the folder on {report.agreement:.1%} of {report.crops:,} crops"
    )
    for warning in report.warnings:
        say(f"preflight: WARNING: {warning}")
    report.require()
