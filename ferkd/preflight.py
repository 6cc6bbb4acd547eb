"""Shows a teacher a few images before it is shown all of them: was it given what it was trained on?

A teacher fed with the wrong normalisation, the wrong size or a permuted list of classes labels a million crops without complaint.
What is wrong is found by trying the usual mistakes, not by guessing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ferkd.classes import ELSEWHERE_SHARE, elsewhere_line
from ferkd.crops import CropSettings, center_view, draw_crops, take_crop
from ferkd.errors import CheckFailed, InputError
from ferkd.photos import SplitPhotos
from ferkd.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from ferkd.sources import Split
from ferkd.teacher import LoadedModel, TeacherClasses, answer_logits

PREFLIGHT_IMAGES = 256
PREFLIGHT_CROPS = 500
PREFLIGHT_FOLDERS = 64  # at most, so that a folder has several images and its usual answer can be seen
PREFLIGHT_LEAST = 64  # images that a slow teacher is shown, however long it takes
SCALE_BANDS = (0.0, 0.15, 0.3, 0.5, 0.75, 1.0)

PLAUSIBLE_SHARE = 0.25  # of the way from guessing (1 / C) to perfect
BETTER_POINTS = 0.03  # an alternative must gain this much...
BETTER_SIGMAS = 3.0  # ...and this many standard errors over the same images
ORDER_POINTS = 0.2  # each folder's usual answer must explain this much more than the class list does
ORDER_DISTINCT = 0.9  # ...and nearly all of these answers must differ, or it is a bad teacher rather than a permuted list
OVERCONFIDENT_POINTS = 0.15
BAND_LEAST = 30  # crops in a band before it is judged

NORMALISATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "ImageNet's mean and std": (IMAGENET_MEAN, IMAGENET_STD),
    "(x - 127) / 128, nearly the same as mean 0.5 and std 0.5": ((127 / 255,) * 3, (128 / 255,) * 3),
    "pixels in [0, 1] (mean 0, std 1)": ((0.0,) * 3, (1.0,) * 3),
    "pixels in 0..255 (mean 0, std 1/255)": ((0.0,) * 3, (1 / 255,) * 3),
}
SIZES = (32, 64, 128, 224, 384)


@dataclasses.dataclass(frozen=True)
class Band:
    """Crops whose share of the photo's area is above `low` and up to `high`: how often the teacher agrees, and how sure it is."""

    low: float
    high: float
    crops: int
    agreement: float
    confidence: float


@dataclasses.dataclass(frozen=True)
class Alternative:
    """Another setting that was tried: `top1` with it and `given` with the teacher's own, on the same images; `sigmas` between the two."""

    kind: Literal["normalisation", "input size", "class order"]
    setting: str
    top1: float
    given: float
    sigmas: float


@dataclasses.dataclass(frozen=True)
class PreflightReport:
    """What the preflight found. `top1` of `images` centre views of `source`, at least `limit` being plausible; shares from 0 to 1.

    `agreement`, `confidence` and `elsewhere` are of `crops` crops; `elsewhere`: the share of the probability that goes to classes that have
    no folder.
    `refusal` is why one should not label, None when all is well; `warnings` are worth a look.
    """

    source: str
    images: int
    top1: float
    limit: float
    crops: int
    agreement: float
    confidence: float
    elsewhere: float
    bands: tuple[Band, ...]
    alternatives: tuple[Alternative, ...]
    warnings: tuple[str, ...]
    refusal: str | None
    seconds: float

    def require(self) -> None:
        """Raises CheckFailed when the preflight refuses."""
        if self.refusal is not None:
            raise CheckFailed(self.refusal)


def preflight(
    teacher: LoadedModel,
    classes: TeacherClasses,
    train: Split,
    val: Split | None,
    crops: CropSettings,
    *,
    device: torch.device | None = None,
    batch_size: int = 32,
    seconds: float = 30.0,
) -> PreflightReport:
    """Shows the teacher some images before it is shown all: is it plausible that it was given what it was trained on?

    Measures top-1 on the centre views of about 256 images of `val` (of `train` where there is none), and agreement with the folder and
    mean confidence on 500 of the crops that would be stored. Then tries what usually goes wrong, on the same images: other
    normalisations, the model's own input size (other sizes too, when it does badly), and whether each folder's usual answer is another
    class than the class list says.

    Refuses when top-1 is not a quarter of the way from guessing to perfect (within two standard errors), when another normalisation
    gains 3 points and 3 standard errors, when the folders' usual answers explain 20 points more than the class list, or when it answers
    probabilities instead of logits. Warns when
    confidence exceeds agreement by 15 points, over all crops or in a band of crop scale, and when a tenth of the probability goes to
    classes that have no folder, which a student would learn instead of those that have one.

    A slow teacher is shown fewer images, 64 at the least, to keep to `seconds`. Raises InputError when it answers NaN or when no
    image can be read.
    """
    run = _Preflight(teacher, classes, device or torch.device("cpu"), batch_size, time.monotonic(), seconds)
    split = val if val is not None else train
    source = "val" if val is not None else "train images (there is no val)"
    size = teacher.preprocessing.input_size

    chosen = _spread_over_folders(split, PREFLIGHT_IMAGES)
    views, shown = run.views(split, chosen, size)
    targets = classes.class_of_folder[split.folder_of[shown]]
    logits = run.logits(views, teacher.preprocessing, share=0.25)
    are_probabilities = bool((logits >= 0).all() and ((logits.double().sum(1) - 1).abs() < 1e-2).all())
    views, shown, targets = views[: len(logits)], shown[: len(logits)], targets[: len(logits)]
    right = run.answers(logits) == targets
    top1 = float(right.mean())
    options = len(classes.names)
    limit = 1 / options + PLAUSIBLE_SHARE * (1 - 1 / options)
    implausible = top1 + 2 * math.sqrt(limit * (1 - limit) / len(shown)) < limit

    cut, crop_targets, scales = run.crops(train, crops, size)
    crop_logits = run.logits(cut, teacher.preprocessing, share=0.3)
    cut, crop_targets, scales = cut[: len(crop_logits)], crop_targets[: len(crop_logits)], scales[: len(crop_logits)]
    crop_right = run.answers(crop_logits) == crop_targets
    probs = torch.softmax(classes.select(crop_logits), 1)
    confidence = probs.amax(1).double().numpy()
    here = np.unique(classes.class_of_folder)
    elsewhere = 0.0 if len(here) == options else max(0.0, 1 - float(probs[:, torch.from_numpy(here)].double().sum(1).mean()))
    bands = tuple(
        Band(low, high, int(inside.sum()), float(crop_right[inside].mean()), float(confidence[inside].mean()))
        for low, high in itertools.pairwise(SCALE_BANDS)
        if (inside := (scales > low) & (scales <= high)).any()
    )

    tried: list[Alternative] = []
    if order := _class_order(run, logits.argmax(1).numpy(), split.folder_of[shown], right, train.folders):
        tried.append(order)
    if order is None or not _significant(order):
        # A robust teacher loses only a few points to a wrong normalisation, more of them on crops: where another one is not clearly worse
        # on some images and crops, all are shown to make it certain.
        some = (PREFLIGHT_IMAGES if not run.late(0.5) else PREFLIGHT_LEAST) // 2
        pixels, rights = (torch.cat([views[:some], cut[:some]]), np.concatenate([right[:some], crop_right[:some]]))
        wanted = np.concatenate([targets[:some], crop_targets[:some]])
        now = teacher.preprocessing
        others = [
            _compare("normalisation", name, rights, run.answers(run.logits(pixels, other)) == wanted)
            for name in NORMALISATIONS
            if not _nearly_the_same(other := _normalised(now, name), now)
        ]
        best = max(others, key=lambda alternative: alternative.top1 - alternative.given)
        if best.sigmas > -1 and not (implausible and _significant(best)):
            other = _normalised(now, best.setting)
            better = np.concatenate([run.answers(run.logits(views, other)) == targets, run.answers(run.logits(cut, other)) == crop_targets])
            others[others.index(best)] = _compare("normalisation", best.setting, np.concatenate([right, crop_right]), better)
        tried += others
        sizes = [own] if (own := teacher.own_size) is not None and own != size else []
        sizes += [other_size for other_size in SIZES if implausible and other_size not in (size, own)]
        for other_size in sizes:
            if run.late(1.0):
                break
            with contextlib.suppress(RuntimeError, AssertionError, ValueError):  # a model of one size only
                resized, _ = run.views(split, shown[:PREFLIGHT_LEAST], other_size)
                answers = run.answers(run.logits(resized, now))
                tried.append(_compare("input size", f"{other_size} px", right[: len(answers)], answers == targets[: len(answers)]))

    warnings = [f"{', '.join(teacher.assumed)}: not given by {teacher.spec}, assumed {_assumptions(teacher)}"] if teacher.assumed else []
    agreement, sure = float(crop_right.mean()), float(confidence.mean())
    refusal = _verdict(top1, limit, len(shown), source, options, implausible, tried, teacher)
    if are_probabilities:  # before all else: it explains flat labels, and answers that go elsewhere
        refusal = (
            f"{teacher.spec}: answers probabilities, where logits are wanted: its labels would be nearly flat; "
            "take off its last softmax, or return their logarithm"
        )
    if refusal is None:
        warnings += _overconfident(agreement, sure, bands)
        warnings += [elsewhere_line(elsewhere, len(here), options)] if elsewhere >= ELSEWHERE_SHARE else []
        warnings += [
            f"at {other.setting} the teacher gets {other.top1:.1%} of the same images right, at {size} px {other.given:.1%}"
            for other in tried
            if other.kind == "input size" and _significant(other)
        ]
    return PreflightReport(
        source, len(shown), top1, limit, len(crop_right), agreement, sure, elsewhere, bands, tuple(tried), tuple(warnings), refusal,
        run.elapsed(),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Preflight:
    """Showing pixels to the teacher while watching the clock."""

    teacher: LoadedModel
    classes: TeacherClasses
    device: torch.device
    batch_size: int
    started: float
    seconds: float

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def late(self, share: float) -> bool:
        return self.elapsed() > share * self.seconds

    def views(self, split: Split, images: NDArray[np.int64], size: int) -> tuple[Tensor, NDArray[np.int64]]:
        """Centre views uint8 [n, 3, size, size] of those images that can be read, and which these are."""
        how, photos = self.teacher.preprocessing, SplitPhotos(split)

        def view(image: int) -> Tensor | None:
            try:
                return center_view(photos(image), size, how.crop_pct, how.interpolation)
            except InputError:
                return None  # labelling lists the photographs that it cannot read

        with ThreadPoolExecutor(2) as pool:
            found = [(seen, image) for seen, image in zip(pool.map(view, images.tolist()), images, strict=True) if seen is not None]
        if not found:
            raise InputError(f"{split}: none of {len(images):,} images can be decoded ({split.paths[int(images[0])]}, ...)")
        return torch.stack([seen for seen, _ in found]), np.array([image for _, image in found])

    def crops(self, split: Split, settings: CropSettings, size: int) -> tuple[Tensor, NDArray[np.int64], NDArray[np.float64]]:
        """About 500 of the crops that would be stored: pixels, the class ids of their folders, and their shares of the photo's area."""
        images = _evenly(len(split), min(len(split), PREFLIGHT_CROPS // 2))
        each = -(-PREFLIGHT_CROPS // len(images))
        photos = SplitPhotos(split)

        def cut(image: int) -> list[tuple[Tensor, int, float]]:
            try:
                photo = photos(image)
            except InputError:
                return []
            height, width = photo.shape[1:]
            boxes, flips = draw_crops(settings, image, np.arange(each), width, height)
            how = self.teacher.preprocessing.interpolation
            return [
                (take_crop(photo, box, bool(flip), size, how), image, box[2] * box[3] / (width * height))
                for box, flip in zip(boxes.tolist(), flips, strict=True)
            ]

        # In an order that is even at every length, since a slow teacher is shown only the first of them.
        order = np.random.default_rng(0).permutation(images)
        with ThreadPoolExecutor(2) as pool:
            found = [crop for some in pool.map(cut, order.tolist()) for crop in some][:PREFLIGHT_CROPS]
        if not found:
            raise InputError(f"{split}: none of {len(images):,} images can be decoded ({split.paths[int(images[0])]}, ...)")
        targets = self.classes.class_of_folder[split.folder_of[[image for _, image, _ in found]]]
        return torch.stack([crop for crop, _, _ in found]), targets, np.array([scale for _, _, scale in found])

    def logits(self, pixels: Tensor, preprocessing: Preprocessing, share: float | None = None) -> Tensor:
        """All outputs [n, outputs] float32 on the CPU; of fewer images when these took more than `share` of the time allowed."""
        began, parts, done = self.elapsed(), [], 0
        for part in torch.split(pixels, self.batch_size):
            parts.append(answer_logits(self.teacher.model, preprocessing, part.to(self.device)).cpu())
            done += len(part)
            if share is not None and done >= PREFLIGHT_LEAST and self.elapsed() - began > share * self.seconds:
                break
        logits = torch.cat(parts)
        # Under another normalisation a teacher may overflow; then it is merely wrong.
        if preprocessing == self.teacher.preprocessing and not logits.isfinite().all():
            raise InputError(f"{self.teacher.spec}: answers NaN or infinity to the dataset's images; are its weights broken?")
        return logits

    def answers(self, logits: Tensor) -> NDArray[np.int64]:
        """The most probable class ids [n]."""
        return self.classes.select(logits).argmax(1).numpy()


def _evenly(count: int, wanted: int) -> NDArray[np.int64]:
    """`wanted` of range(count), spread evenly."""
    return np.arange(wanted, dtype=np.int64) * count // wanted


def _spread_over_folders(split: Split, wanted: int) -> NDArray[np.int64]:
    """About `wanted` images, the same number from each of at most PREFLIGHT_FOLDERS folders, one of each folder after the other."""
    folders = _evenly(len(split.folders), min(len(split.folders), PREFLIGHT_FOLDERS))
    each = -(-wanted // len(folders))
    by_folder = []
    for folder in folders:
        members = np.flatnonzero(split.folder_of == folder)
        by_folder.append(members[_evenly(len(members), min(len(members), each))])
    rounds = (members[i] for i in range(each) for members in by_folder if i < len(members))
    return np.fromiter(itertools.islice(rounds, wanted), np.int64)


def _normalised(preprocessing: Preprocessing, name: str) -> Preprocessing:
    mean, std = NORMALISATIONS[name]
    return dataclasses.replace(preprocessing, mean=mean, std=std)


def _nearly_the_same(a: Preprocessing, b: Preprocessing) -> bool:
    return max(abs(x - y) for x, y in zip((*a.mean, *a.std), (*b.mean, *b.std), strict=True)) < 0.01


def _compare(
    kind: Literal["normalisation", "input size", "class order"], setting: str, given: NDArray[np.bool_], other: NDArray[np.bool_]
) -> Alternative:
    """McNemar: of the images on which the two differ, how many more are right with the other, in standard errors."""
    won, lost = int((other & ~given).sum()), int((given & ~other).sum())
    return Alternative(kind, setting, float(other.mean()), float(given.mean()), (won - lost) / math.sqrt(max(won + lost, 1)))


def _significant(alternative: Alternative) -> bool:
    least = ORDER_POINTS if alternative.kind == "class order" else BETTER_POINTS
    return alternative.top1 - alternative.given >= least and alternative.sigmas >= BETTER_SIGMAS


def _class_order(
    run: _Preflight, answers: NDArray[np.int64], folder_of: NDArray[np.int32], right: NDArray[np.bool_], folders: Sequence[str]
) -> Alternative | None:
    """How many images get the answer that the other images of their folder mostly get: high for a good teacher whatever its class list.

    None when that says nothing about the list: too few images a folder, or several folders that get the same answer.
    """
    columns = run.classes.columns
    usual = np.zeros(len(answers), bool)
    judged = np.zeros(len(answers), bool)
    moved: list[str] = []
    usual_ids: list[int] = []
    for folder in np.unique(folder_of):
        members = np.flatnonzero(folder_of == folder)
        if len(members) < 3:
            continue
        ids, counts = np.unique(answers[members], return_counts=True)
        for i in members:
            others = counts - (ids == answers[i])  # leaving the image itself out, or few images would explain themselves
            usual[i] = answers[i] == ids[others.argmax()]
        judged[members] = True
        usual_ids.append(int(ids[counts.argmax()]))
        kept = int(run.classes.class_of_folder[folder])
        given = int(columns[kept]) if columns is not None else kept
        if usual_ids[-1] != given:
            moved.append(f"{folders[folder]!r} is listed as class {given} but mostly answered as {usual_ids[-1]}")
    if not usual_ids or len(set(usual_ids)) < ORDER_DISTINCT * len(usual_ids):
        return None
    return _compare("class order", "; ".join(moved[:3]) or "as listed", right[judged], usual[judged])


def _overconfident(agreement: float, confidence: float, bands: Sequence[Band]) -> list[str]:
    def text(where: str, right: float, sure: float) -> str:
        return f"{where} the teacher is {sure:.0%} sure on average but agrees with the folder on {right:.0%}"

    warnings = []
    if confidence - agreement > OVERCONFIDENT_POINTS:
        warnings.append(text("on crops", agreement, confidence))
    for band in bands:
        if band.crops >= BAND_LEAST and band.confidence - band.agreement > OVERCONFIDENT_POINTS:
            where = f"on crops of {band.low:.0%} to {band.high:.0%} of the photo ({band.crops} crops)"
            advice = "; consider a larger lower --scale" if band.high <= 0.5 else ""
            warnings.append(text(where, band.agreement, band.confidence) + advice)
    return warnings


def _assumptions(teacher: LoadedModel) -> str:
    values = teacher.preprocessing.as_dict()
    return ", ".join(f"{key} {values[key]}" for key in teacher.assumed)


def _verdict(
    top1: float, limit: float, images: int, source: str, options: int, implausible: bool, tried: Sequence[Alternative], teacher: LoadedModel
) -> str | None:
    better = [alternative for alternative in tried if _significant(alternative)]
    if not implausible:
        better = [alternative for alternative in better if alternative.kind != "input size"]
    if not better and not implausible:
        return None
    text = f"preflight: {teacher.spec} recognises {top1:.1%} of {images:,} images of {source}"
    if implausible:
        text += f"; of a teacher of {options:,} classes at least {limit:.0%} is expected"
    if not better:
        names = ", ".join(dict.fromkeys(alternative.kind for alternative in tried))
        return text + f". No other setting tried explains it ({names}): are these its weights? --skip-preflight labels all the same"
    cause = max(better, key=lambda alternative: alternative.top1 - alternative.given)
    figures = f"{cause.top1:.1%} instead of {cause.given:.1%}"
    if cause.kind == "class order":
        found = f"each folder's most frequent answer explains {figures} ({cause.setting}); correct the teacher's list of classes"
    elif cause.kind == "normalisation":
        now = teacher.preprocessing
        shown = f"now mean {_round(now.mean)}, std {_round(now.std)}"
        found = f"with {cause.setting} it gets {figures} on images and crops ({shown}); correct its mean and std"
    else:
        found = f"at {cause.setting} it gets {figures} (now {teacher.preprocessing.input_size} px); give --input-size or correct input_size"
    return f"{text}. Likely cause: {cause.kind}: {found}, or label all the same with --skip-preflight"


def _round(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in values) + ")"
