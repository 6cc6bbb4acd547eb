"""Is a store what it says? The hashes of its files; and whether the teacher, shown a sample of the stored crops again, says the same.

What was recorded (weights, preprocessing, decoder, resampler) is compared piece by piece. What records cannot know is measured: a changed
photo by its CRC32, other ways of making pixels by the answers. On the machine and with the software that made the store, records come out
the same to the bit; elsewhere they agree within limits that depend on the recorded precision. docs/results.md shows how far apart
legitimate and wrong ways lie.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from ferkd.crops import DECODER, RESAMPLER
from ferkd.devices import choose_device, described_device, repeatable
from ferkd.errors import InputError, StoreError
from ferkd.label_plan import AUTOCAST_DTYPE
from ferkd.process import keep_freed_memory
from ferkd.records import pack_labels
from ferkd.remote import plainly, url_of
from ferkd.sources import DataFlag, Split, check_same_kind, scan_split
from ferkd.store import LabelStore
from ferkd.teacher import LoadedModel, TeacherClasses, choose_classes, load_teacher
from ferkd.verify_sample import Asking, SampledPhoto, divergence, likely_cause, read_sample

SAME_RECORDS = 0.9
"""The share of records that must come out the same to the bit where nothing differs. All do, but for sums taken in another order."""

LIMITS = {"none": (1e-4, 0.99), "tf32": (5e-4, 0.98), "fp16": (1e-3, 0.98), "bf16": (5e-3, 0.94), "others": (5e-2, 0.90)}
"""By the teacher's precision: the largest mean KL and the least agreement of the first answer. `others`: labels converted from those of
other people, who rounded boxes and decoded photos in their own way."""

# Between our pixels and Pillow's, in levels: on average, and the share of values that may be further away than so many. The two round
# between their passes in different order: bilinear that is 2 levels, but bicubic 10 or more at an edge, which clipping makes larger.
PIXELS_MEAN, PIXELS_FAR, PIXELS_FAR_SHARE = 0.1, 4, 1e-3
PIXEL_PHOTOS = 16
CAUSE_PHOTOS = 96
NAMES_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class VerifySettings:
    store: Annotated[Path, tyro.conf.Positional]
    """The label store."""
    data: DataFlag | None = None
    """The dataset that was labelled, as it was given to ferkd label."""
    teacher: str | None = None
    """The teacher that labelled it: timm:NAME, torchvision:NAME, run:DIR or python:MODULE:CALLABLE."""
    samples: int = 1000
    """Crops to show the teacher again, of photos drawn at random."""
    integrity: bool = False
    """Check the hashes of the store's files, and nothing else."""
    every_photo: bool = False
    """Compare the CRC32 of every photo, not only of those in the sample: reads the whole dataset."""
    teacher_weights: Path | None = None
    """Local weights for --teacher."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: the GPU if there is one."""
    seed: int = 0
    """Of the sample."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"samples: {self.samples}; give a whole number of at least 1")
        if self.integrity and (self.data or self.teacher):
            raise InputError("--integrity checks the files' hashes alone; leave --data and --teacher out, or it")
        if not self.integrity and (self.data is None or self.teacher is None):
            raise InputError("give --data DIR and --teacher SPEC, to show the teacher a sample again; or --integrity, for the hashes alone")


@dataclasses.dataclass(frozen=True)
class Check:
    """One question and its answer. `passed` is None where it could not be asked, or where the answer alone says nothing."""

    name: str
    found: str
    wanted: str
    passed: bool | None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found. `measures` are the numbers behind the checks; `cause` is what would explain a failure, where that was found."""

    store: str
    checks: tuple[Check, ...]
    measures: Mapping[str, float]
    cause: str | None = None

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def reasons(self) -> str:
        """Why it failed, in one line."""
        failed = "; ".join(f"{check.name}: {check.found}, wanted {check.wanted}" for check in self.checks if check.passed is False)
        return f"{self.store}: FAIL: {failed}" + (f". Likely cause: {self.cause}" if self.cause else "")

    def table(self) -> str:
        words = {True: "ok", False: "FAILED", None: "-"}
        rows = [("", "check", "found", "wanted"), *((words[c.passed], c.name, c.found, c.wanted) for c in self.checks)]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "measures": dict(self.measures), "verdict": "pass" if self.passed else "fail"}


def verify(settings: VerifySettings) -> Verdict:
    """Checks a store. Raises InputError for wrong use, and for data or a teacher that cannot be had."""
    name, path = plainly(settings.store), settings.store
    if url_of(path) is not None or not (path / "manifest.json").is_file():
        path = LabelStore(path).path  # fetched; or raises, and says what this is instead
    try:
        store = LabelStore(path)
        if settings.integrity:
            store.check_integrity()
            files = len(store.manifest.shards) + 2
            return Verdict(name, (Check("files", f"all {files:,} whole", "the SHA-256 that was written", True),), {})
    except StoreError as error:
        return Verdict(name, (Check("files", str(error), "as they were written", False),), {})
    assert settings.data is not None
    assert settings.teacher is not None
    recorded = _Recorded(store)
    if merged := recorded.of("merged_from"):
        raise InputError(f"{name}: is the average of {len(merged)} stores, which no single teacher says; verify those, or use --integrity")
    device = choose_device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
    split = scan_split(settings.data, "train")
    check_same_kind(split.photos, store)
    teacher = load_teacher(settings.teacher, settings.teacher_weights, recorded.input_size)
    classes = choose_classes(
        "folder" if recorded.teacher.get("classes_used") == "folder" else "teacher", sorted(store.folders), teacher, split.numbers
    )
    checks = [*_recorded_checks(recorded, teacher, classes), _dataset_check(store, split, recorded.of("dataset_fingerprint"))]
    if len(classes.names) != store.classes:
        return Verdict(name, tuple(checks), {})  # its answers cannot be compared with the stored ones

    teacher.model.to(device)
    autocast = AUTOCAST_DTYPE.get(recorded.teacher.get("autocast", "none"))
    asking = Asking(teacher, classes, device, autocast, store.manifest.batch_size, store.exif_applied)
    with repeatable(bool(recorded.teacher.get("tf32")) and device.type == "cuda"):
        found, measures, cause = _sample_checks(store, split, settings, asking, recorded)
    return Verdict(name, (*checks, *found), measures, cause)


# ---- What was recorded


class _Recorded:
    """A store's provenance, of which a converted store may lack any part."""

    def __init__(self, store: LabelStore) -> None:
        self.store = store
        self.all = store.manifest.provenance
        self.teacher = self._dict("teacher")
        self.preprocessing = self._dict("preprocessing")

    def of(self, name: str) -> Any:
        return self.all.get(name)

    def _dict(self, name: str) -> dict[str, Any]:
        value = self.all.get(name)
        return value if isinstance(value, dict) else {}

    @property
    def input_size(self) -> int | None:
        """The size that crops were shown at, which may have been chosen and is no property of the teacher."""
        return self.preprocessing.get("input_size")

    @property
    def precision(self) -> str:
        if not self.preprocessing:
            return "others"
        autocast = self.teacher.get("autocast", "none")
        return str(autocast) if autocast in ("bf16", "fp16") else "tf32" if self.teacher.get("tf32") else "none"

    def is_of_here(self, device: torch.device) -> bool:
        """Whether this machine and this software made the whole store."""
        return (
            self.of("device") == described_device(device)
            and self._dict("software").get("torch") == torch.__version__
            and self.of("decoder") == DECODER
            and self.of("resampler") == RESAMPLER
            and not self.store.manifest.resumed_with
        )


def _recorded_checks(recorded: _Recorded, teacher: LoadedModel, classes: TeacherClasses) -> Iterator[Check]:
    weights = recorded.teacher.get("weights_sha256")
    if weights is None:
        yield Check("teacher's weights", f"SHA-256 {teacher.weights_sha256[:12]}...", "not recorded", None)
    else:
        yield Check(
            "teacher's weights", f"SHA-256 {teacher.weights_sha256[:12]}...", f"{weights[:12]}...", weights == teacher.weights_sha256
        )
    same = recorded.store.class_names == classes.names
    found = f"the same {len(classes.names):,}" if same else f"{len(classes.names):,}, other ones or in another order"
    unnamed = "classes_used" not in recorded.teacher and recorded.store.classes == len(classes.names)
    yield Check("classes", found, f"{recorded.store.classes:,} as stored", None if unnamed and not same else same)
    here, there = teacher.preprocessing.as_dict(), recorded.preprocessing
    others = [key for key in here if key in there and there[key] != here[key]]
    if there:
        found, wanted = (", ".join(f"{key} {_number(values[key])}" for key in others) for values in (here, there))
        yield Check("preprocessing", found or "the same", wanted or "as recorded", not others)
    for name, program in (("decoder", DECODER), ("resampler", RESAMPLER)):
        then = recorded.of(name)
        if isinstance(then, dict) and "name" in then:
            found, wanted = (" ".join(str(value) for key, value in p.items() if key != "apply_exif") for p in (program, then))
            # Of another version the answers decide; another program makes other pixels.
            yield Check(name, found, wanted, True if then == program else None if then["name"] == program["name"] else False)


def _number(value: Any) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in value) + ")" if isinstance(value, (list, tuple)) else str(value)


def _dataset_check(store: LabelStore, split: Split, fingerprint: str | None) -> Check:
    name = "photos, names and sizes"
    if fingerprint is not None and fingerprint == split.fingerprint():
        return Check(name, f"those of the same {len(split):,} files", "as recorded", True)
    here, there = set(split.paths), set(store.paths)
    gone, new = sorted(there - here), len(here - there)
    if gone:
        return Check(name, f"{len(gone):,} gone: {_some(gone)}", "all there", False)
    if fingerprint is not None and not new:
        return Check(name, "a file has another size (--every-photo names it)", "as recorded", False)
    return Check(name, f"all {len(there):,} are there{f', {new:,} are not in the store' if new else ''}; sizes unknown", "all there", None)


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else "")


# ---- What the teacher says


def _sample_checks(
    store: LabelStore, split: Split, settings: VerifySettings, asking: Asking, recorded: _Recorded
) -> tuple[list[Check], dict[str, float], str | None]:
    """Shows the teacher the sample: checks, measures, and the likely cause of a failure."""
    changed: list[str] = []
    counter = itertools.count()
    kept: list[SampledPhoto] = []

    def sample() -> Iterator[SampledPhoto]:
        for photo in read_sample(
            store, split.photos, settings.samples, settings.seed, settings.every_photo, changed, lambda: next(counter)
        ):
            if len(kept) < CAUSE_PHOTOS:
                kept.append(photo)
            yield photo

    kl, first, same = [], [], []
    try:
        for words, logits in asking.answers(sample()):
            if not bool(torch.isfinite(logits).all()):
                return [Check("answers", "NaN or infinite", "numbers", False)], {}, None
            ids, _ = store.unpack(words)
            kl.append(divergence(store, words, logits))
            first.append(logits.argmax(1).numpy() == ids[:, 0])
            new_probs, new_ids = torch.softmax(logits, 1).topk(store.k, dim=1)
            same.append((pack_labels(new_ids.numpy(), new_probs.numpy(), store.label_codec, store.classes) == words).all(1))
    except StoreError as error:
        return [Check("records", str(error), "the CRC32 that was written", False)], {}, None
    read = next(counter)
    checks = [
        Check(
            "photos' CRC32", f"{len(changed):,} of {read:,} changed{': ' + _some(changed) if changed else ''}", "none changed", not changed
        )
    ]
    if not kl:
        return [*checks, Check("answers", "there was no photo to show", "a sample", False)], {}, None
    measures = {"photos": float(read), **_figures(np.concatenate(kl), np.concatenate(first), np.concatenate(same))}
    pixels = _pixels_check(kept[:PIXEL_PHOTOS], asking, measures)
    answers = list(_answer_checks(measures, recorded, asking.device))
    failed = any(check.passed is False for check in answers)
    return [*checks, pixels, *answers], measures, likely_cause(store, kept, asking) if failed else None


def _figures(kl: NDArray[np.float64], first: NDArray[np.bool_], same: NDArray[np.bool_]) -> dict[str, float]:
    return {
        "crops": float(len(kl)),
        "kl_mean": float(kl.mean()),
        "kl_largest": float(kl.max()),
        "first_answer_agrees": float(first.mean()),
        "same_records": float(same.mean()),
    }


def _pixels_check(photos: list[SampledPhoto], asking: Asking, measures: dict[str, float]) -> Check:
    """Whether decoding and resizing do here what Pillow does; no store says what they did elsewhere."""
    how = asking.teacher.preprocessing
    differences = []
    for photo in photos:
        ours = photo.cut(how.input_size, how.interpolation, asking.apply_exif)
        theirs = photo.cut_by_pillow(how.input_size, how.interpolation, asking.apply_exif)
        differences.append((ours.short() - theirs.short()).abs().flatten())
    levels = torch.cat(differences)
    mean, far, most = float(levels.double().mean()), float((levels > PIXELS_FAR).double().mean()), int(levels.max())
    measures |= {"pixels_mean": mean, "pixels_far": far, "pixels_largest": float(most)}
    found = f"mean {mean:.3f} levels, {far:.2%} above {PIXELS_FAR}, largest {most}"
    wanted = f"mean at most {PIXELS_MEAN}, {PIXELS_FAR_SHARE:.1%} above {PIXELS_FAR}"
    return Check("pixels, beside Pillow's", found, wanted, mean <= PIXELS_MEAN and far <= PIXELS_FAR_SHARE)


def _answer_checks(measures: Mapping[str, float], recorded: _Recorded, device: torch.device) -> Iterator[Check]:
    most, least = LIMITS[recorded.precision]
    same, kl, first = (measures[name] for name in ("same_records", "kl_mean", "first_answer_agrees"))
    here = recorded.is_of_here(device)
    found = f"{same:.1%} of {measures['crops']:,.0f} the same to the bit"
    wanted = f"at least {SAME_RECORDS:.0%}, on the machine that made them" if here else "any, on another machine or with other software"
    yield Check("records", found, wanted, same >= SAME_RECORDS if here else None)
    found = f"mean {kl:.1e}, largest {measures['kl_largest']:.1e}"
    yield Check("KL, stored from new", found, f"mean at most {most:.1e}", kl <= most)
    yield Check("first answer agrees", f"{first:.2%}", f"at least {least:.0%}", first >= least)
