"""uint8 pixels to what a model expects, on whatever device they are: the first thing in every forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """(pixels / 255 - mean) / std: uint8 [B, 3, S, S] to float32 of the same shape, laid out as channels_last.

    Pixels that lie in memory as photographs do ([B, S, S, 3]) are read as rows of 3 S numbers, with mean and std repeated along them: a
    row is long enough for vector instructions, three channels are not. On a CPU it takes a quarter of the time of broadcasting [3, 1, 1].
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float], device: torch.device | None = None) -> None:
        super().__init__()
        mean64, std64 = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * std64)).float().repeat(size).to(device), persistent=False)
        self.register_buffer("shift", (-mean64 / std64).float().repeat(size).to(device), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        batch, channels, height, width = pixels.shape
        rows = pixels.permute(0, 2, 3, 1).reshape(batch * height, width * channels).float()
        image: Tensor = rows.mul_(self.scale).add_(self.shift).view(batch, height, width, channels)
        return image.permute(0, 3, 1, 2)
