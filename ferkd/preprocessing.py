"""What a model wants to be shown: its size, its normalisation, its interpolation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from ferkd.crops import Interpolation
from ferkd.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a model wants to be shown: square RGB images of `input_size` pixels, (x / 255 - mean) / std for each channel.

    `crop_pct` is the share of the shorter side that a centre view shows.
    Raises InputError when a value is of the wrong kind or outside what makes sense.
    """

    input_size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Interpolation = "bilinear"
    crop_pct: float = 0.875

    def __post_init__(self) -> None:
        if not isinstance(self.input_size, int) or isinstance(self.input_size, bool) or not 1 <= self.input_size <= 4096:
            raise InputError(f"input_size: {self.input_size!r} is not a number of pixels from 1 to 4,096")
        for name in ("mean", "std"):
            value = getattr(self, name)
            numbers = isinstance(value, (tuple, list)) and len(value) == 3 and all(isinstance(v, (int, float)) for v in value)
            if not numbers or not np.isfinite(value).all():
                raise InputError(f"{name}: {value!r} is not three numbers (red, green, blue; of pixels in [0, 1])")
            object.__setattr__(self, name, tuple(float(v) for v in value))
        if min(self.std) <= 0 or max(self.std) > 16 or max(self.mean) > 16:
            raise InputError(f"mean {self.mean}, std {self.std}: give them for pixels in [0, 1] (those of 0..255 divided by 255)")
        if self.interpolation not in get_args(Interpolation):
            raise InputError(f"interpolation: {self.interpolation!r} is unknown; choose one of {', '.join(get_args(Interpolation))}")
        if not isinstance(self.crop_pct, (int, float)) or not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct: {self.crop_pct!r} is not a share of the shorter side above 0 and up to 1")

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of as_dict; missing keys take the defaults. Raises InputError on an unknown key."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InputError(f"preprocessing: unknown key(s) {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 of the same shape, memory layout and device."""
        scale, shift = _scale_and_shift(self.mean, self.std, pixels.device)
        return pixels.to(torch.float32).mul_(scale).add_(shift)


@functools.lru_cache(maxsize=64)
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 [1, 3, 1, 1] each, kept on the device: a copy for every batch would make the host wait for the GPU."""
    with torch.inference_mode(False):  # or what is kept could not be used outside of it
        mean64, std64 = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        scale, shift = (values.float().view(1, 3, 1, 1).to(device) for values in (1.0 / (255.0 * std64), -mean64 / std64))
    return scale, shift
