"""Some of a store's crops, cut again from the photographs that are there now and shown to the teacher again."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from numpy.typing import NDArray
from torch import Tensor

from ferkd.crops import Interpolation, decode, photo_crc, rgb_pixels, take_crop
from ferkd.errors import InputError
from ferkd.preflight import NORMALISATIONS
from ferkd.preprocessing import Preprocessing
from ferkd.records import pack_labels
from ferkd.sources import Photos
from ferkd.store import ImageLabels, LabelStore
from ferkd.teacher import LoadedModel, TeacherClasses, answer_logits

CROPS_A_PHOTO = 4
CAUSE_CROPS = 96
EXPLAINS = 0.1  # another setting explains a difference when this share of it is left

HALF_STEP = 2.0**-12  # of float16 below 1: what is left over is not known better
LEAST = 1e-9  # probability, where the other label says that there is some

PILLOW = {"bilinear": PIL.Image.Resampling.BILINEAR, "bicubic": PIL.Image.Resampling.BICUBIC}


@dataclasses.dataclass(frozen=True)
class SampledPhoto:
    """A photo as it was labelled (`data` has the stored CRC32) and the numbers of the crops to look at."""

    labels: ImageLabels
    crops: NDArray[np.int64]
    data: bytes

    @property
    def words(self) -> NDArray[np.uint32]:
        """The stored labels of these crops, [n, W]."""
        return self.labels.label_words[self.crops]

    def cut(self, size: int, interpolation: Interpolation, apply_exif: bool) -> Tensor:
        """The crops as ferkd makes them, uint8 [n, 3, size, size]. Raises InputError when they cannot be cut out of the photo."""
        photo = decode(self.data, apply_exif=apply_exif, name=self.labels.path)
        return torch.stack([take_crop(photo, box, bool(flip), size, interpolation) for box, flip in zip(*self._boxes(), strict=True)])

    def cut_by_pillow(self, size: int, interpolation: Interpolation, apply_exif: bool) -> Tensor:
        """The same crops by Pillow alone, decoding and resizing; 16-bit greys, which its own conversion makes white, in our way."""
        with PIL.Image.open(io.BytesIO(self.data)) as file:
            photo = PIL.Image.fromarray(rgb_pixels(PIL.ImageOps.exif_transpose(file) if apply_exif else file))
        cut = []
        for (left, top, width, height), flip in zip(*(array.tolist() for array in self._boxes()), strict=True):
            crop = photo.crop((left, top, left + width, top + height)).resize((size, size), PILLOW[interpolation])
            cut.append(np.asarray(PIL.ImageOps.mirror(crop) if flip else crop))
        return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2)

    def _boxes(self) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        return self.labels.boxes(self.crops)


def read_sample(
    store: LabelStore, photos: Photos, samples: int, seed: int, every_photo: bool, changed: list[str], read: Callable[[], object]
) -> Iterator[SampledPhoto]:
    """About `samples` crops, four of each of some photos drawn at random (more of fewer in a small store).

    A photo that is gone, or not the one that was labelled, is put into `changed` instead; with `every_photo` the others are looked at
    as well. `read` is called for each. Raises StoreError for a damaged record.
    """
    random = np.random.default_rng(seed)
    count = min(len(store), math.ceil(samples / min(CROPS_A_PHOTO, store.crops)))
    chosen = set(random.choice(len(store), count, replace=False).tolist())
    each = min(store.crops, math.ceil(samples / count))
    for image in range(len(store)) if every_photo else sorted(chosen):
        entry = store.entry(image)
        if entry.width == 0:
            continue
        read()
        try:
            data = photos.read(entry.path)
        except InputError as error:
            changed.append(f"{entry.path} ({str(error).removeprefix(f'{photos.name(entry.path)}: ')})")
            continue
        if photo_crc(data) != entry.photo_crc:
            changed.append(entry.path)
        elif image in chosen:
            yield SampledPhoto(store.read(image), np.sort(random.choice(store.crops, each, replace=False)), data)


@dataclasses.dataclass(frozen=True)
class Asking:
    """How the teacher is asked: as it was when the store was made, in batches of as many rows."""

    teacher: LoadedModel
    classes: TeacherClasses
    device: torch.device
    autocast: torch.dtype | None
    batch_size: int
    apply_exif: bool

    def answers(self, photos: Iterable[SampledPhoto], how: Preprocessing | None = None) -> Iterator[tuple[NDArray[np.uint32], Tensor]]:
        """Batches of (stored words [b, W], logits [b, C] float32 on the CPU) of the photos' crops, shown by `how` (the teacher's own)."""
        how = how or self.teacher.preprocessing
        words: list[NDArray[np.uint32]] = []
        pixels: list[Tensor] = []
        for photo in photos:
            words.append(photo.words)
            pixels.append(photo.cut(how.input_size, how.interpolation, self.apply_exif))
            if sum(map(len, words)) >= self.batch_size:
                all_words, all_pixels = np.concatenate(words), torch.cat(pixels)
                while len(all_words) >= self.batch_size:
                    yield all_words[: self.batch_size], self._ask(all_pixels[: self.batch_size], how)
                    all_words, all_pixels = all_words[self.batch_size :], all_pixels[self.batch_size :]
                words, pixels = [all_words], [all_pixels]
        rest = sum(map(len, words))
        if rest:
            shown = torch.cat(pixels)
            full = torch.cat([shown, shown[-1:].expand(self.batch_size - rest, -1, -1, -1)])  # a teacher's last bits depend on it
            yield np.concatenate(words), self._ask(full, how)[:rest]

    def _ask(self, pixels: Tensor, how: Preprocessing) -> Tensor:
        pixels = pixels.contiguous(memory_format=torch.channels_last).to(self.device)
        return self.classes.select(answer_logits(self.teacher.model, how, pixels, self.autocast)).cpu()


def divergence(store: LabelStore, words: NDArray[np.uint32], logits: Tensor) -> NDArray[np.float64]:
    """KL divergence [n] of stored labels (words [n, W]) from those that would be stored of new logits [n, C].

    Of the k classes that are stored, and of all others as one. The new probabilities of these classes go through the store's codec as well,
    so that the same answer is no distance away. In the form for weights that need not add up to 1, sum p log(p / q) - p + q, which
    rounding does not make negative.
    """
    ids, stored = store.unpack(words)
    new = np.take_along_axis(torch.softmax(logits, 1).numpy(), ids, 1)
    new_ids, new = store.unpack(pack_labels(ids, new, store.label_codec, store.classes))
    p, q = _by_id(ids, stored), _by_id(new_ids, new)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0.0, p * np.log(p / np.maximum(q, LEAST)), 0.0) - p + q
    return np.asarray(terms.sum(1))


def _by_id(ids: NDArray[np.int64], probs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities [n, k] in the order of their ids, and what is left over behind them: [n, k + 1]."""
    p = np.take_along_axis(probs, np.argsort(ids, axis=1, kind="stable"), 1).astype(np.float64)
    return np.concatenate([p, np.maximum(1.0 - p.sum(1, keepdims=True), HALF_STEP)], axis=1)


def likely_cause(store: LabelStore, photos: list[SampledPhoto], asking: Asking) -> str | None:
    """Which of the usual mistakes would explain the stored labels, tried on a few crops; None when none of them does."""
    few, crops = [], 0
    for photo in photos:
        few.append(photo)
        crops += len(photo.crops)
        if crops >= CAUSE_CROPS:
            break

    def distance(how: Preprocessing | None, asked: Asking = asking) -> float:
        found = [divergence(store, words, logits) for words, logits in asked.answers(few, how)]
        return float(np.concatenate(found).mean())

    own = asking.teacher.preprocessing
    other: Interpolation = "bilinear" if own.interpolation == "bicubic" else "bicubic"
    ways: dict[str, tuple[Preprocessing | None, Asking]] = {
        f"normalisation: {name}": (dataclasses.replace(own, mean=mean, std=std), asking) for name, (mean, std) in NORMALISATIONS.items()
    }
    ways[f"interpolation: {other}"] = (dataclasses.replace(own, interpolation=other), asking)
    ways["EXIF orientation: " + ("not applied" if asking.apply_exif else "applied")] = (
        None,
        dataclasses.replace(asking, apply_exif=not asking.apply_exif),
    )
    given = distance(None)
    tried: dict[str, float] = {}
    for name, (how, asked) in ways.items():
        try:
            tried[name] = distance(how, asked)
        except InputError:  # a box outside a photo that is turned
            continue
    best = min(tried, key=lambda name: tried[name])
    if tried[best] > EXPLAINS * given:
        return None
    return f"the labels were made with {best} (KL {tried[best]:.1e} instead of {given:.1e})"
