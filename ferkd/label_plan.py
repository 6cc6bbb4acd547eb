"""What a labelling job is, checked before anything runs: its settings, photographs, teacher, device and the store's plan."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ferkd.crops import DECODER, RESAMPLER, CropSettings
from ferkd.devices import choose_device, described_device
from ferkd.errors import InputError
from ferkd.filling import evenly
from ferkd.like import images_of, same_classes
from ferkd.loss import check_topk
from ferkd.process import keep_freed_memory
from ferkd.records import BoxCodec, LabelCodec
from ferkd.remote import refuse_url
from ferkd.sources import DataFlag, Split, check_same_classes, source_of
from ferkd.store import LabelStore, PathTable, StorePlan
from ferkd.teacher import LoadedModel, TeacherClasses, choose_classes, load_teacher

Layout = Literal["exact", "compact"]
CODECS: dict[Layout, tuple[BoxCodec, LabelCodec]] = {"exact": ("stored", "half"), "compact": ("replayed", "packed")}

Autocast = Literal["none", "bf16", "fp16"]
AUTOCAST_DTYPE = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}

CPU_BATCH, GPU_BATCH = 32, 256


@dataclasses.dataclass(frozen=True)
class LabelSettings:
    """What to label, with which teacher, into which store. The same settings go on with a store that was begun."""

    data: DataFlag
    """The dataset: a folder with train/CLASS/*.jpg, and val/CLASS/*.jpg for the preflight; or wds:DIR, tar shards as WebDataset has them
    (DIR/train/*.tar and DIR/val/*.tar, or DIR/*train*.tar and DIR/*val*.tar); or hf:NAME[@REVISION] or hf:DIR, a Hugging Face dataset (its
    columns and splits: hf:NAME?image=COLUMN&label=COLUMN&train=SPLIT&val=SPLIT&config=NAME)."""
    teacher: str
    """timm:NAME, torchvision:NAME, run:DIR (a student trained by ferkd) or python:MODULE:CALLABLE."""
    out: Path
    """The store's folder: new, empty, or one that the same command began."""
    crops: int = 200
    """Crops of each photo."""
    topk: int | None = None
    """The teacher's most probable classes that are kept for each crop. Default: 5, or all of fewer."""
    layout: Layout = "exact"
    """exact: boxes and float16 probabilities as they are; compact: boxes drawn again, probabilities in a few bits."""
    input_size: int | None = None
    """Pixels of the crops shown to the teacher. Default: the teacher's own."""
    classes: Literal["teacher", "folder"] = "teacher"
    """teacher: all of the teacher's classes; folder: only those that have a folder."""
    limit: int | None = None
    """Label only so many photos, spread evenly over the sorted list."""
    dry_run: bool = False
    """Measure for 20 s, say how long it will take and how much it will store, and write nothing."""
    seed: int = 0
    """Of the draws of crops."""
    scale: tuple[float, float] = (0.08, 1.0)
    """A crop's share of the photo's area, from and to."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """A crop's width / height, from and to."""
    flip: bool = True
    """Mirror half of the crops."""
    batch_size: int | None = None
    """Crops that the teacher sees at once; part of the store's identity. Default: 32 on a CPU, 256 on a GPU."""
    teacher_weights: Path | None = None
    """Local weights: .safetensors, or a .pth or training checkpoint of timm's (model_best.pth.tar) that holds no code."""
    skip_preflight: bool = False
    """Label even if the teacher's answers look wrong."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: the GPU if there is one; under torchrun each process takes its own."""
    workers: int | None = None
    """Threads that decode and cut. Default: for a teacher on the CPU 1 (0, which is in between, where it has all of up to 4 cores); else
    this process's share of the cores, at most 16."""
    autocast: Autocast = "none"
    """Run the teacher in bf16 or fp16 where PyTorch deems it safe; recorded in the store."""
    tf32: bool = False
    """Let a GPU round the factors of float32 products to TF32: faster, and recorded in the store."""
    like: Path | None = None
    """Label the very crops of this store, so that ferkd merge can average the two; it decides images, crops and boxes."""

    def __post_init__(self) -> None:
        refuse_url(self.out, "out")
        for name in ("crops", "topk", "limit", "batch_size", "input_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: {value}; give a whole number of at least 1")
        check_topk(self.topk)
        if self.workers is not None and self.workers < 0:
            raise InputError(f"workers: {self.workers}; give a whole number of at least 0")
        if self.layout not in CODECS:
            raise InputError(f"layout: {self.layout!r} is unknown; choose 'exact' or 'compact'")
        if self.autocast not in AUTOCAST_DTYPE:
            raise InputError(f"autocast: {self.autocast!r} is unknown; choose 'none', 'bf16' or 'fp16'")
        if self.like is not None:
            for field in dataclasses.fields(self):
                if field.name in ("crops", "limit", "seed", "scale", "ratio", "flip") and getattr(self, field.name) != field.default:
                    raise InputError(f"{field.name}: --like {self.like} decides it; leave it out")


@dataclasses.dataclass(frozen=True)
class Job:
    """All that labelling needs, checked: which photos, which teacher on which device, and what the store will be."""

    settings: LabelSettings
    train: Split
    val: Split | None
    teacher: LoadedModel
    classes: TeacherClasses
    plan: StorePlan
    device: torch.device
    threads: int
    like: LabelStore | None = None


def plan_job(settings: LabelSettings, local_rank: int = 0, local_world: int = 1) -> Job:
    """Lists the photos, loads the teacher and draws up the store's plan; nothing is written. Raises InputError as label does.

    `local_rank` of `local_world`: which of this machine's processes this is.
    """
    like = None if settings.like is None else LabelStore(settings.like)
    crop_settings = like.crop_settings if like else CropSettings(settings.seed, settings.scale, settings.ratio, settings.flip)
    source = source_of(settings.data)
    train = source.scan("train")
    val = source.scan("val") if source.has("val") else None
    if val is not None:
        check_same_classes(train, val)
    device = choose_device(settings.device, local_rank, local_world)
    if settings.tf32 and device.type == "cpu":
        raise InputError("tf32: the teacher runs on the CPU, and only a GPU has TF32; leave --tf32 out")
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # or pinned memory, streams and a teacher's own tensors belong to the first GPU
    teacher = load_teacher(settings.teacher, settings.teacher_weights, settings.input_size)
    classes = choose_classes(settings.classes, train.folders, teacher, train.numbers)
    if like:
        classes = same_classes(like, classes, train.folders)
    topk = min(5, len(classes.names)) if settings.topk is None else settings.topk
    if topk > len(classes.names):
        raise InputError(f"topk: {topk}, but there are only {len(classes.names):,} classes; choose at most that many")
    teacher.model.to(device)
    classes = classes.to(device)

    chosen = images_of(like, train) if like else np.arange(len(train)) if settings.limit is None else evenly(len(train), settings.limit)
    paths = train.paths if len(chosen) == len(train) else PathTable.from_paths(train.paths[int(i)] for i in chosen)
    box_codec, label_codec = CODECS[settings.layout]
    provenance = _provenance(settings, train, teacher, device)
    if like:
        box_codec = like.box_codec
        provenance |= {"decoder": {**DECODER, "apply_exif": like.exif_applied}, "like": like.manifest_sha256}
    plan = StorePlan(
        paths=paths,
        targets=classes.class_of_folder[train.folder_of[chosen]],
        crops=like.crops if like else settings.crops,
        k=topk,
        class_names=classes.names,
        folders={folder: int(i) for folder, i in zip(train.folders, classes.class_of_folder, strict=True)},
        box_codec=box_codec,
        label_codec=label_codec,
        crop_settings=crop_settings,
        batch_size=settings.batch_size or (CPU_BATCH if device.type == "cpu" else GPU_BATCH),
        temperature=1.0,
        provenance=provenance,
    )
    threads = settings.workers
    if threads is None:
        threads = _threads_beside_a_cpu() if device.type == "cpu" else min(16, max(1, (os.cpu_count() or 1) // local_world))
    return Job(settings, train, val, teacher, classes, plan, device, threads, like)


def _threads_beside_a_cpu() -> int:
    """Threads that decode while the teacher computes on the CPU. Where it has all of few cores, its threads would wait for the one that
    lost its core: on two, 86 % of the bare teacher's rate with such a thread, 95 % without."""
    cores = os.cpu_count() or 1
    return 0 if torch.get_num_threads() >= cores and cores <= 4 else 1


def _provenance(settings: LabelSettings, train: Split, teacher: LoadedModel, device: torch.device) -> dict[str, Any]:
    """Where the labels come from. Nothing that varies from run to run: a resumed store must be the same to the byte."""
    from ferkd import __version__

    return {
        "teacher": {
            "spec": settings.teacher,
            "weights_sha256": teacher.weights_sha256,
            "outputs": teacher.outputs,
            "classes_used": settings.classes,
            "autocast": settings.autocast,
            "tf32": settings.tf32,
        },
        "preprocessing": teacher.preprocessing.as_dict(),
        "decoder": dict(DECODER),
        "resampler": dict(RESAMPLER),
        "device": described_device(device),
        "software": {"python": platform.python_version(), "torch": torch.__version__, "ferkd": __version__},
        "dataset_fingerprint": train.fingerprint(),
        **({"source": source} if (source := train.photos.described()) else {}),
    }
