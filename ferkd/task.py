"""What a student is to learn, found out and checked before the first step: its classes, the images it visits, and who labels them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

from ferkd import process
from ferkd.crops import CropSettings
from ferkd.data import (
    CenterViews,
    CropView,
    FreshCrops,
    ImageCrops,
    StoredCrops,
)
from ferkd.distributed import Ranks
from ferkd.errors import InputError
from ferkd.online import OnlineTeacher, check_online_teacher, load_online_teacher
from ferkd.photos import DecodedPhotos, DecodedSource, LabelledPhotos, SplitPhotos, check_same_photos
from ferkd.preprocessing import Preprocessing
from ferkd.progress import print_line
from ferkd.quantiles import quantile_line, quantile_policy
from ferkd.recipes import TrainConfig
from ferkd.regions import Region, RegionPolicy
from ferkd.runs import Resume
from ferkd.sources import Split, check_same_classes, labelled_photos, scan_split
from ferkd.store import LabelStore

AMP_DTYPE = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Job:
    """What to train, on what, and where the results go. `data` holds train/CLASS/* and val/CLASS/*, or is wds:DIR or hf:NAME.

    Labels come from the store `labels`, or from `teacher` (a SPEC) at every step, or from the folders.
    """

    data: str | os.PathLike[str]
    student: str
    out: Path
    config: TrainConfig
    labels: Path | None = None
    pretrained: bool = False
    init: Path | None = None
    resume: bool | Resume = False
    loggers: tuple[str, ...] = ()
    say: Callable[[str], None] = print_line
    teacher: str | None = None
    teacher_weights: Path | None = None
    teacher_input_size: int | None = None
    skip_preflight: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """`classes`: by the student's output. `class_of_val_folder`: int64, the class id of every val folder. `policy`: with thresholds that
    are probabilities, whatever the settings said. `usable`: the images that training visits, of the store or of the folder. `regions`:
    how a store's crops divide under the policy. Labels come from `store`, else from `teacher`, else from the folders."""

    classes: tuple[str, ...]
    class_of_val_folder: np.ndarray
    policy: RegionPolicy
    usable: np.ndarray
    regions: dict[str, int] | None
    val: Split
    train: Split | None
    store: LabelStore | None
    teacher: OnlineTeacher | None
    targets: np.ndarray | None

    @property
    def method(self) -> str:
        """What the settings amount to."""
        return method_name(self.policy, self.store is not None, self.teacher is not None)

    def identity(self) -> dict[str, Any]:
        """What makes a run of this task this run and no other, besides its settings."""
        return {
            "classes": len(self.classes),
            "images": len(self.usable),
            "store": self.store.manifest_sha256 if self.store else None,
            "teacher": self.teacher.loaded.weights_sha256 if self.teacher else None,
            "teacher_input_size": self.teacher.size if self.teacher else None,
            "photos": _identity(self.train) if self.train else None,
        }

    def crops(self, job: Job, view: CropView, threads: int) -> Dataset[ImageCrops]:
        """The crops that training sees, by Visit. Raises StoreError for photographs that are not those that were labelled."""
        config = job.config
        photos: DecodedSource
        if self.store:
            encoded = labelled_photos(job.data, self.store)
            check_same_photos(encoded, self.store)
            photos = LabelledPhotos(encoded, self.store)
        else:
            assert self.train is not None
            photos = SplitPhotos(self.train)
        if config.cache == "decoded":
            photos = DecodedPhotos(photos, self.usable, threads)
        if self.store:
            return StoredCrops(photos, self.store, self.usable, self.policy, view, config.seed)
        teacher_view = CropView(self.teacher.size, self.teacher.loaded.preprocessing.interpolation) if self.teacher else None
        assert self.targets is not None
        return FreshCrops(photos, self.targets, fresh_crops(config), view, teacher_view)

    def views(self, preprocessing: Preprocessing, cached: bool, threads: int) -> Dataset[Any]:
        """The val images as the evaluation sees them; `cached`: decoded now, by so many threads, and kept.

        Raises InputError where they would fill more than half of the free memory.
        """
        views = CenterViews(
            self.val, self.class_of_val_folder, preprocessing.input_size, preprocessing.crop_pct, preprocessing.interpolation
        )
        if not cached:
            return views
        size, free = len(views) * 3 * views.size**2, process.available_memory() // process.local_processes()
        if size > free // 2:
            raise InputError(
                f"cache: {len(views):,} decoded val images fill {size / 2**30:.1f} GiB, more than half of the {free / 2**30:.1f} GiB of "
                "memory that each process can have; train without --cache decoded"
            )
        pixels = torch.empty(len(views), 3, views.size, views.size, dtype=torch.uint8)

        def put(number: int) -> int:
            pixels[number], target, _ = views[number]
            return target

        with ThreadPoolExecutor(threads) as pool:
            targets = list(pool.map(put, range(len(views))))
        return TensorDataset(pixels, torch.tensor(targets), torch.arange(len(views)))


def method_name(policy: RegionPolicy, has_store: bool, has_teacher: bool) -> str:
    """hard labels, FKD (every label trusted) or FerKD (some discarded or calibrated)."""
    if not (has_store or has_teacher):
        return "hard labels"
    rule = "FerKD" if policy.discards or policy.calibrate_below > 0 else "FKD"
    return rule if has_store else f"online {rule}"


def fresh_crops(config: TrainConfig) -> CropSettings:
    """How crops are drawn when there is no store that has them."""
    return CropSettings(config.seed, (config.min_scale, 1.0), flip=config.flip)


def plan_task(job: Job, ranks: Ranks) -> Task:
    """Raises InputError for data, labels and teacher that do not fit each other, CheckFailed for a teacher that fails the preflight."""
    config = job.config
    if job.labels and job.teacher:
        raise InputError("teacher: a store brings its teacher's answers; give either --labels or --teacher")
    if (job.teacher_weights or job.teacher_input_size) and not job.teacher:
        raise InputError("teacher_weights, teacher_input_size: whose? add --teacher SPEC")
    thresholds = config.policy.discards or config.policy.calibrate_below > 0
    if thresholds and not (job.labels or job.teacher):
        raise InputError(
            "discard_below, calibrate_below, discard_above: thresholds are for a teacher's labels; add --labels STORE or --teacher SPEC"
        )
    if not (job.labels or job.teacher) and (config.temperature, config.tail) != (1.0, "smooth"):
        raise InputError(
            "temperature, tail: are for a teacher's labels; leave them out for hard labels, or add --labels STORE or --teacher SPEC"
        )
    if config.thresholds == "quantile" and not job.labels:
        raise InputError("thresholds: quantiles are a store's; add --labels STORE, or give probabilities")
    val = scan_split(job.data, "val")
    if job.labels:
        return _from_store(job, LabelStore(job.labels), val)
    train = scan_split(job.data, "train")
    check_same_classes(train, val)
    if len(train.folders) < 2:
        raise InputError(f"{train}: has only the class {train.folders[0]!r}; a classifier needs at least 2")
    classes, class_of_folder = _in_order(train)
    teacher = None
    if job.teacher:
        amp = AMP_DTYPE[config.amp]
        teacher = load_online_teacher(job.teacher, job.teacher_weights, job.teacher_input_size, config, train, ranks.device, amp)
        classes, class_of_folder = teacher.classes.names, teacher.classes.class_of_folder
        if ranks.is_main and not job.skip_preflight:
            check_online_teacher(teacher, train, val, fresh_crops(config), ranks.device, job.say)
    return Task(
        classes=classes,
        class_of_val_folder=class_of_folder[[train.folders.index(folder) for folder in val.folders]],
        policy=config.policy,
        usable=np.arange(len(train)),
        regions=None,
        val=val,
        train=train,
        store=None,
        teacher=teacher,
        targets=class_of_folder[train.folder_of],
    )


def _identity(train: Split) -> str:
    """Names what a split's images are. A folder's paths do; a dataset's rows are only numbered, and are told apart by their sizes."""
    return train.paths.sha256() if train.photos.kind == "folder" else train.fingerprint()


def _in_order(train: Split) -> tuple[tuple[str, ...], np.ndarray]:
    """The student's classes, and the place of each of the split's among them, int64: in the dataset's own order where it numbers them."""
    order, numbers = np.arange(len(train.folders)), train.numbers
    if numbers is not None:
        order = np.argsort([numbers.of[folder] for folder in train.folders], kind="stable")
    return tuple(train.folders[i] for i in order), np.argsort(order)


def _from_store(job: Job, store: LabelStore, val: Split) -> Task:
    unknown = [folder for folder in val.folders if folder not in store.folders]
    if unknown:
        raise InputError(
            f"{val}: classes {', '.join(unknown[:5])} are not in the store {store.source}, which was labelled with "
            f"{', '.join(list(store.folders)[:5])}...; give the --data that was labelled"
        )
    missing = [folder for folder in store.folders if folder not in val.folders]
    if missing:
        raise InputError(
            f"{val}: lacks the classes {', '.join(missing[:5])} of the store {store.source}; "
            "give val the classes that were labelled, with the same names"
        )
    policy = job.config.policy
    if job.config.thresholds == "quantile":
        policy = quantile_policy(store, policy)
        job.say(quantile_line(policy, store))
    scan = store.scan(policy)
    return Task(
        classes=tuple(store.class_names),
        class_of_val_folder=np.array([store.folders[folder] for folder in val.folders]),
        policy=policy,
        usable=np.flatnonzero(scan.usable),
        regions={region.name.lower(): int(scan.counts[region]) for region in Region},
        val=val,
        train=None,
        store=store,
        teacher=None,
        targets=None,
    )
