"""Drawing a crop, replaying it exactly, and cutting it out of a photo.

Teacher and student both go through `decode` and `take_crop`: that is what makes the student's crop the teacher's crop to the
pixel. The draws use integers only (no sine, no logarithm, no floating rounding), so that every machine draws the same;
docs/formats.md specifies them to the bit. The distribution is torchvision's RandomResizedCrop's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import decimal
import functools
import importlib
import io
import math
import os
import re
import zlib
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import PIL
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from ferkd.errors import InputError
from ferkd.records import MAX_SIDE, unpack_boxes

Interpolation = Literal["bilinear", "bicubic"]

DECODER: dict[str, Any] = {"name": "Pillow", "version": PIL.__version__, "mode": "RGB", "apply_exif": True}
"""How photos become pixels, for a store's manifest."""

RESAMPLER: dict[str, Any] = {"name": "torch.nn.functional.interpolate, uint8, antialias", "version": torch.__version__}
"""How crops are resized, for a store's manifest."""

TRIES = 10
ASPECTS = 1024

_C: Any = None
"""The C++ extension, which draws and unpacks the few boxes of a visit in 2 us; None where it was not built, or is older than this file."""
with contextlib.suppress(ImportError):
    _C = importlib.import_module("ferkd._C")
    _C = _C if hasattr(_C, "draw_crops") else None


@dataclasses.dataclass(frozen=True)
class CropSettings:
    """What crops are drawn: RandomResizedCrop's area share `scale`, aspect `ratio` (width / height), and whether half are flipped.

    Raises InputError for a seed outside 32 bits, a scale outside [0, 1] or of no area, a ratio outside [1/4, 4], or bounds out of order.
    """

    seed: int = 0
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 32:
            raise InputError(f"seed: {self.seed!r}; give a whole number from 0 to 4,294,967,295")
        for name, lowest, highest in (("scale", 0.0, 1.0), ("ratio", 0.25, 4.0)):
            try:
                low, high = (float(bound) for bound in getattr(self, name))
            except (TypeError, ValueError):
                raise InputError(f"{name}: {getattr(self, name)!r}; give two numbers, the lower and the upper bound") from None
            if not lowest <= low <= high <= highest or high == 0.0:
                raise InputError(f"{name}: ({low}, {high}); give two numbers in order, from {lowest:g} to {highest:g}")
            object.__setattr__(self, name, (low, high))  # a list, as JSON gives it, becomes the tuple it stands for

    @functools.cached_property
    def words(self) -> bytes:
        """What csrc/crops.h needs of it, in u64: seed, flip, scale and ratio in fixed point, the aspects and their inverses."""
        scale, ratio = ([round(bound * one) for bound in pair] for pair, one in ((self.scale, 1 << 32), (self.ratio, 1 << 16)))
        aspects, inverses = aspect_table(self.ratio)
        return np.concatenate([np.array([self.seed, self.flip, *scale, *ratio], np.uint64), aspects, inverses]).tobytes()


def philox(counter: npt.NDArray[np.uint64], key: tuple[int, int]) -> npt.NDArray[np.uint64]:
    """Philox4x32-10 (Salmon et al., SC 2011): four random 32-bit words for each counter [..., 4], all held in uint64."""
    low32 = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (counter[..., i] for i in range(4))
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            product1 & low32,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            product0 & low32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


@functools.lru_cache(maxsize=64)
def aspect_table(ratio: tuple[float, float]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """1,024 aspects width / height spaced evenly in their logarithm, and their inverses, both as 16.16 fixed point [1024] uint64."""
    # decimal's ln and exp are correctly rounded on every machine, which libm's are not.
    with decimal.localcontext(decimal.Context(prec=50, rounding=decimal.ROUND_HALF_EVEN)):
        low, high = (decimal.Decimal(bound).ln() for bound in ratio)
        aspects = [(low + (high - low) * (2 * i + 1) / (2 * ASPECTS)).exp() * 65536 for i in range(ASPECTS)]
        table = np.array([int(aspect.to_integral_value()) for aspect in aspects], np.uint64)
    return table, np.uint64(1 << 32) // table


def isqrt(n: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The whole part of the square root, exact for n up to (2**32 - 2)**2."""
    root = np.sqrt(n.astype(np.float64)).astype(np.uint64)
    root -= root * root > n  # the conversion to float64 may have rounded up to the next square,
    root += (root + np.uint64(1)) * (root + np.uint64(1)) <= n  # or down below this one
    return root


def draw_crops(
    settings: CropSettings, image: int, crops: npt.NDArray[Any], width: int, height: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Draws the crops numbered `crops` [n] of image number `image`: boxes [n, 4] int32 (left, top, width, height) and flips [n] bool.

    A crop depends on the settings, the image's number and size (in pixels) and its own number, on nothing else.
    Raises InputError for sides outside 1 to 32,767 and numbers that do not fit 32 bits.
    """
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise InputError(f"image {image}: {width} x {height} pixels; sides from 1 to {MAX_SIDE:,} can be cropped")
    crops = np.asarray(crops)
    if crops.ndim != 1 or crops.dtype.kind not in "iu":
        raise InputError(f"crops: {crops.dtype} {crops.shape}; give the crops' numbers as whole numbers [n]")
    if (drawn := drawn_quickly(settings, image, crops, 1 << 32, width, height)) is not None:
        return drawn
    if not 0 <= image < 1 << 32 or (len(crops) and not (int(crops.min()) >= 0 and int(crops.max()) < 1 << 32)):
        raise InputError(f"image {image}, crops {crops}: numbers must be from 0 to 4,294,967,295")
    return _draw(settings, image, crops, width, height)


def drawn_quickly(
    settings: CropSettings, image: int, crops: npt.NDArray[Any], below: int, width: int, height: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]] | None:
    """draw_crops by the extension: `crops` are whole numbers [n] from 0 to below - 1. None without it, and for numbers out of range."""
    if _C is None:
        return None
    try:
        made = _C.draw_crops(settings.words, image, crops.astype(np.int64).tobytes(), below, width, height)
    except (ValueError, OverflowError):
        return None
    return _boxes_and_flips(made)


def unpacked_quickly(words: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """records.unpack_boxes, by the extension where it is there."""
    return unpack_boxes(words) if _C is None else _boxes_and_flips(_C.unpack_boxes(words.tobytes()))


def _boxes_and_flips(made: bytearray) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """What the extension makes of n crops: boxes [n, 4] int32, then flips [n]."""
    n = len(made) // 17
    return np.frombuffer(made, np.int32, 4 * n).reshape(n, 4), np.frombuffer(made, np.bool_, n, 16 * n)


def _draw(
    settings: CropSettings, image: int, crops: npt.NDArray[Any], width: int, height: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """draw_crops without the extension: all crops at once, the few of a visit in 200 us."""
    n = len(crops)
    counter = np.zeros((n, TRIES, 4), np.uint64)
    counter[:, :, 0] = crops[:, None]
    counter[:, :, 1] = np.arange(TRIES)
    r = philox(counter, (settings.seed, image))

    shift16, shift32, half = np.uint64(16), np.uint64(32), np.uint64(1 << 15)
    low, high = (round(bound * 2**32) for bound in settings.scale)  # exact but for this rounding: 2**32 is a power of two
    scale = np.uint64(low) + (r[:, :, 0] * np.uint64(high - low) >> shift32)  # 0.32 fixed point
    area = np.uint64(width * height) * scale >> shift16  # 16 fractional bits, below 2**46
    aspects, inverses = aspect_table(settings.ratio)
    index = (r[:, :, 1] >> np.uint64(22)).astype(np.intp)
    w = isqrt(area * aspects[index]) + half >> shift16  # below 2**64: both ratio bounds keep an aspect below 2**18
    h = isqrt(area * inverses[index]) + half >> shift16
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)

    chosen = np.arange(n), fits.argmax(axis=1)  # the first try that fits
    w, h = w[chosen], h[chosen]
    found = fits[chosen]
    boxes = np.empty((n, 4), np.int32)
    boxes[:, 0] = np.where(found, r[:, :, 2][chosen] * (np.uint64(width + 1) - w) >> shift32, 0)
    boxes[:, 1] = np.where(found, r[:, :, 3][chosen] * (np.uint64(height + 1) - h) >> shift32, 0)
    boxes[:, 2], boxes[:, 3] = w, h
    if not found.all():
        boxes[~found] = _centre_crop(settings.ratio, width, height)
    flips = (r[:, 0, 1] & np.uint64(1)).astype(np.bool_) & settings.flip
    return boxes, flips


def _centre_crop(ratio: tuple[float, float], width: int, height: int) -> tuple[int, int, int, int]:
    """The box for a crop whose tries all missed: the largest centred one whose aspect lies within `ratio`."""
    low, high = (round(bound * 65536) for bound in ratio)
    w, h = width, height
    if width << 16 < height * low:
        h = max(1, ((width << 17) + low) // (2 * low))
    elif width << 16 > height * high:
        w = max(1, (height * high + (1 << 15)) >> 16)
    return (width - w) // 2, (height - h) // 2, w, h


class Photo(NamedTuple):
    """A decoded photo: `image` uint8 [3, H, W] and `crc`, the CRC32 of the file's bytes, as a store keeps it."""

    image: Tensor
    crc: int


def photo_crc(data: bytes) -> int:
    """The CRC32 of a photo's bytes, as a store keeps it."""
    return zlib.crc32(data)


def decode(photo: str | os.PathLike[str] | bytes, *, apply_exif: bool = True, name: str | None = None) -> Tensor:
    """Decodes a photo (a path or its bytes) to uint8 [3, H, W], RGB, laid out in memory as [H, W, 3].

    EXIF orientation is applied unless `apply_exif` is False (labels made by others were drawn without). `name` is what errors
    call the photo. Raises InputError for one that cannot be read or decoded, or with a side above 32,767 pixels; its text is the
    same in every run, because a store keeps it as the reason why an image has no labels.
    """
    if isinstance(photo, bytes):
        data, name = photo, name or "a photo"
    else:
        name = name or os.fspath(photo)
        data = _read(photo, name)
    if not data:
        raise InputError(f"{name}: 0 bytes: the file is empty")
    width = height = 0
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if max(width, height) <= MAX_SIDE:  # refused below, before the pixels are decoded
                if apply_exif:
                    PIL.ImageOps.exif_transpose(image, in_place=True)  # in place: else an upright photo would be copied
                pixels = rgb_pixels(image)
    except MemoryError:
        raise
    except PIL.UnidentifiedImageError as error:  # its text holds an address in memory
        raise InputError(f"{name}: not an image that Pillow can decode ({len(data):,} bytes); remove it or replace it") from error
    except Exception as error:  # Pillow's plug-ins raise what they like: OSError, SyntaxError, ValueError, struct.error, IndexError ...
        raise InputError(f"{name}: cannot be decoded: {_ADDRESS.sub('', str(error)) or type(error).__name__}") from error
    if max(width, height) > MAX_SIDE:
        raise InputError(f"{name}: {width} x {height} pixels; sides up to {MAX_SIDE:,} are supported: scale the photo down")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def rgb_pixels(image: PIL.Image.Image) -> npt.NDArray[np.uint8]:
    """The pixels, [H, W, 3]. Of a moving picture the first frame; transparency is dropped, as datasets of photographs are commonly read."""
    if image.mode == "RGB":
        return np.array(image)  # convert() would copy even what is RGB
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow's own conversion cuts 16 bits off at 255: a white picture.
        grey = (np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise InputError(f"pixels of 32 bits (mode {image.mode}), whose black and white nobody names; save it with 8 or 16 bits a channel")
    return np.array(image.convert("RGB"))


_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def _read(path: str | os.PathLike[str], name: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}") from error


def take_crop(image: Tensor, box: Any, flip: bool, size: int, interpolation: Interpolation) -> Tensor:
    """Cuts `box` (left, top, width, height) out of `image` uint8 [3, H, W], resizes it to uint8 [3, size, size], then flips it.

    Fastest where the photo is laid out in memory as [H, W, 3]; so is its crop then.
    Raises InputError for a box that is not inside the image: then the photo is not the one that was labelled.
    """
    left, top, width, height = (int(side) for side in box)
    if left < 0 or top < 0 or width < 1 or height < 1 or left + width > image.shape[2] or top + height > image.shape[1]:
        raise InputError(f"box: {(left, top, width, height)} is not inside the photo of {image.shape[2]} x {image.shape[1]} pixels")
    crop = _resize(image[:, top : top + height, left : left + width], size, size, interpolation)
    return crop.flip(-1) if flip else crop


def center_view(image: Tensor, size: int, crop_pct: float, interpolation: Interpolation) -> Tensor:
    """The view for evaluation: shorter side resized to round(size / crop_pct), then the centre uint8 [3, size, size].

    Raises InputError for a crop_pct outside (0, 1].
    """
    if not 0.0 < crop_pct <= 1.0:
        raise InputError(f"crop_pct: {crop_pct}; give a share above 0 and up to 1")
    height, width = image.shape[1:]
    shorter = round(size / crop_pct)
    if width <= height:
        new_width, new_height = shorter, math.floor(shorter * height / width)
    else:
        new_width, new_height = math.floor(shorter * width / height), shorter
    resized = _resize(image, new_width, new_height, interpolation)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    return resized[:, top : top + size, left : left + size]


def _resize(image: Tensor, width: int, height: int, interpolation: Interpolation) -> Tensor:
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
        raise InputError(f"image: {image.dtype} {tuple(image.shape)}; give uint8 [3, H, W]")
    if interpolation not in get_args(Interpolation):
        raise InputError(f"interpolation: {interpolation!r} is unknown; choose 'bilinear' or 'bicubic'")
    # The batch dimension goes before the rows of a photo laid out as [H, W, 3]: its strides then say channels_last, and the kernel writes
    # its result as it computes it instead of taking it apart into planes, which costs half as much again. The values are the same.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(batch, size=(height, width), mode=interpolation, antialias=True, align_corners=False)[0]
