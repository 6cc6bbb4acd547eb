"""Mixup, CutMix and SelfMix as (partner, lam) per row: pixels are mixed here, labels inside the loss kernel.

Row b becomes lam[b] of itself and 1 - lam[b] of row partner[b]. Mixup blends the whole picture, CutMix pastes a box of the partner,
whose area fixes lam. Partners are rows of the same mix group (a fixed number of consecutive images, so that the same rows pair on any
number of processes); SelfMix takes another crop of the same image. Everything is keyed by (seed, step, global image slot).

The values are those of FKD's code (mixup alpha 0.8, CutMix alpha 1.0, probability 1, switch 0.5, one lambda a batch). SelfMix's own
operator and parameters are not published: it uses the same two operators with these values, which is our choice.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ferkd.errors import InputError

Mix = Literal["none", "mixup", "cutmix", "mixup_cutmix", "selfmix"]


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How rows are mixed.

    `mixup_cutmix` and `selfmix` use CutMix with probability `mix_switch`, else Mixup. `mix_per` draws one lambda (and operator, and
    box) for the whole batch, or one a row. `mix_group` is the number of consecutive images inside which Mixup and CutMix find partners.
    """

    mix: Mix = "none"
    """Mixup, CutMix, either by mix_switch, or SelfMix: either, with another crop of the same image."""
    mixup_alpha: float = 0.8
    """Of the Beta distribution that Mixup's lambda is drawn from."""
    cutmix_alpha: float = 1.0
    """The same for CutMix."""
    mix_probability: float = 1.0
    """How often a batch (or row) is mixed at all."""
    mix_switch: float = 0.5
    """How often by CutMix where both are possible."""
    mix_per: Literal["batch", "row"] = "batch"
    """One lambda for all rows of a batch, or one each."""
    mix_group: int = 16
    """Consecutive images inside which Mixup and CutMix pair rows."""

    def __post_init__(self) -> None:
        if self.mix not in get_args(Mix):
            raise InputError(f"mix: {self.mix!r} is unknown; choose one of {', '.join(get_args(Mix))}")
        if self.mix_per not in ("batch", "row"):
            raise InputError(f"mix_per: {self.mix_per!r} is unknown; choose 'batch' or 'row'")
        for name in ("mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0.0):
                raise InputError(f"{name}: {value} is not a positive number; to switch mixing off use mix='none'")
        for name in ("mix_probability", "mix_switch"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name}: {getattr(self, name)} is not a probability; give a number from 0 to 1")
        if self.mix_group < 1:
            raise InputError(f"mix_group: {self.mix_group} images; give at least 1")


class MixedRows(NamedTuple):
    """One batch's mixing. `box` is (left, top, width, height) in pixels of the student's input; an empty box means Mixup."""

    partner: Tensor  # [B] int64, a row of this batch
    lam: Tensor  # [B] float32, the row's own weight
    box: Tensor  # [B, 4] int64


def draw_mixing(mixing: Mixing, seed: int, step: int, first_slot: int, images: int, crops_per_image: int, size: int) -> MixedRows | None:
    """The mixing of `images` consecutive image slots from `first_slot` on (both multiples of the mix group), at `step`.

    Returns None when nothing is mixed: `mix` is none, or SelfMix with one crop an image. Rows are
    image-major, B = images * crops_per_image.
    The last group may be smaller when the batch is smaller than a group.
    """
    is_self = mixing.mix == "selfmix"
    if mixing.mix == "none" or (is_self and crops_per_image == 1):
        return None
    group = 1 if is_self else min(mixing.mix_group, images)
    if images % group:
        raise InputError(f"mix_group: {group} images do not divide the {images} images of a batch; choose a divisor")
    rows, whole_batch = group * crops_per_image, mixing.mix_per == "batch"
    if whole_batch:
        lam, box = _draw_values(mixing, _generator(seed, step, 0, "values"), 1, size)
    parts = []
    for first in range(0, images, group):
        pairing = _generator(seed, step, first_slot + first, "pairs")
        partner = (np.arange(rows) + pairing.integers(1, rows)) % rows if is_self else pairing.permutation(rows)  # SelfMix: never itself
        if not whole_batch:
            lam, box = _draw_values(mixing, _generator(seed, step, first_slot + first, "values"), rows, size)
        parts.append((partner + first * crops_per_image, np.broadcast_to(lam, rows), np.broadcast_to(box, (rows, 4))))
    partner, lam, box = (np.concatenate(column) for column in zip(*parts, strict=True))
    return MixedRows(
        torch.from_numpy(partner.astype(np.int64)), torch.from_numpy(lam.astype(np.float32)), torch.from_numpy(box.astype(np.int64))
    )


def mix_pixels(images: Tensor, mixed: MixedRows) -> Tensor:
    """Mix normalised pixels [B, 3, H, W] (any floating dtype) with their partners' as `mixed` says. Nothing is read back to the host."""
    height, width = images.shape[-2:]
    left, top, box_width, box_height = (column[:, None, None, None] for column in mixed.box.unbind(1))
    x = torch.arange(width, device=images.device)[None, None, None, :]
    y = torch.arange(height, device=images.device)[None, None, :, None]
    in_box = (x >= left) & (x < left + box_width) & (y >= top) & (y < top + box_height)
    is_mixup = (box_width * box_height == 0) & torch.ones_like(in_box)
    own = torch.where(is_mixup, mixed.lam[:, None, None, None].to(images.dtype), (~in_box).to(images.dtype))
    return own * images + (1 - own) * images[mixed.partner]


_PURPOSE = {"pairs": 0, "values": 1}


def _draw_values(mixing: Mixing, random: np.random.Generator, rows: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """lam [rows] and box [rows, 4] for rows that each draw on their own."""
    is_mixed = random.random(rows) < mixing.mix_probability
    switch = {"mixup": 0.0, "cutmix": 1.0}.get(mixing.mix, mixing.mix_switch)
    is_cutmix = random.random(rows) < switch
    lam = np.where(
        is_cutmix, random.beta(mixing.cutmix_alpha, mixing.cutmix_alpha, rows), random.beta(mixing.mixup_alpha, mixing.mixup_alpha, rows)
    )
    # CutMix (Yun et al. 2019): a box of area 1 - lam around a uniform centre, clipped to the picture; lam is then the area left.
    side = np.round(size * np.sqrt(1.0 - lam)).astype(np.int64)
    centre_x, centre_y = random.integers(0, size, rows), random.integers(0, size, rows)
    left, top = np.maximum(centre_x - side // 2, 0), np.maximum(centre_y - side // 2, 0)
    right, bottom = np.minimum(centre_x - side // 2 + side, size), np.minimum(centre_y - side // 2 + side, size)
    box = np.stack([left, top, np.maximum(right - left, 0), np.maximum(bottom - top, 0)], axis=1)
    box[~(is_cutmix & is_mixed)] = 0
    area_left = 1.0 - box[:, 2] * box[:, 3] / (size * size)
    lam = np.where(is_cutmix, area_left, lam)
    return np.where(is_mixed, lam, 1.0), box


def _generator(seed: int, step: int, slot: int, purpose: str) -> np.random.Generator:
    return np.random.Generator(
        np.random.Philox(key=np.random.SeedSequence((seed, step, slot, _PURPOSE[purpose])).generate_state(2, np.uint64))
    )
