"""What labelling would cost, before anything is spent: bytes, the teacher's passes, hours."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from ferkd.errors import InputError
from ferkd.label_plan import AUTOCAST_DTYPE, CODECS, CPU_BATCH, GPU_BATCH, Autocast, Layout
from ferkd.label_progress import in_bytes
from ferkd.loss import check_topk
from ferkd.process import keep_freed_memory
from ferkd.records import crop_bytes
from ferkd.store import images_a_shard
from ferkd.teacher import answer_logits, load_teacher

PATH_BYTES = 30  # of n02102040/n02102040_10026.JPEG and the like
MEASURE_SECONDS, MEASURE_BATCHES = 5.0, 3


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """What would be labelled. Hours need a rate: given, or measured with a teacher on this machine."""

    images: int
    """Photographs."""
    classes: int
    """The teacher's classes."""
    crops: int = 200
    """Crops of each photo."""
    topk: int | None = None
    """Classes kept for each crop. Default: 5, or all of fewer."""
    layout: Layout = "exact"
    """exact: boxes and float16 probabilities as they are; compact: boxes drawn again, probabilities in a few bits."""
    rate: float | None = None
    """Crops a second that one device labels, as ferkd label says."""
    devices: int = 1
    """Devices that label at the same time."""
    teacher: str | None = None
    """Instead of --rate: measure this model here for 5 s; timm:NAME, torchvision:NAME, run:DIR or python:MODULE:CALLABLE."""
    teacher_weights: Path | None = None
    """Local weights for --teacher."""
    input_size: int | None = None
    """Pixels of the crops shown to --teacher. Default: its own."""
    batch_size: int | None = None
    """Crops that --teacher sees at once. Default: 32 on a CPU, 256 on a GPU."""
    autocast: Autocast = "none"
    """Run --teacher in bf16 or fp16 where PyTorch deems it safe."""

    def __post_init__(self) -> None:
        for name in ("images", "crops", "topk", "devices", "input_size", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: {value}; give a whole number of at least 1")
        check_topk(self.topk)
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise InputError(f"rate: {self.rate}; give crops a second, above 0")
        if self.rate is not None and self.teacher is not None:
            raise InputError("--rate and --teacher: give one of them, the rate or the model to measure")
        if self.teacher is None and (self.teacher_weights or self.input_size or self.batch_size or self.autocast != "none"):
            raise InputError("--teacher-weights, --input-size, --batch-size and --autocast go with --teacher")

    @property
    def kept(self) -> int:
        """Classes kept for each crop."""
        return min(5, self.classes) if self.topk is None else self.topk


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes, passes and hours. `rate` is of one device, in crops a second; `hours` is None without a rate."""

    crops: int
    crop_bytes: int
    label_bytes: int
    index_bytes: int
    store_bytes: int
    shards: int
    teacher_passes: int
    rate: float | None
    devices: int
    hours: float | None


def plan(settings: PlanSettings) -> Plan:
    """Computes the plan; measures first when a teacher is named. Raises InputError for classes and topk that no label can have."""
    box_codec, label_codec = CODECS[settings.layout]
    bytes_a_crop = crop_bytes(box_codec, label_codec, settings.kept, settings.classes)
    crops = settings.images * settings.crops
    index = 32 + 8 * (settings.images + 1) + (16 + PATH_BYTES) * settings.images  # docs/formats.md, index.bin
    rate = measured_rate(settings) if settings.teacher is not None else settings.rate
    return Plan(
        crops=crops,
        crop_bytes=bytes_a_crop,
        label_bytes=crops * bytes_a_crop,
        index_bytes=index,
        store_bytes=crops * bytes_a_crop + index,
        shards=-(-settings.images // images_a_shard(settings.crops * bytes_a_crop, settings.images)),
        teacher_passes=crops,
        rate=rate,
        devices=settings.devices,
        hours=None if rate is None else crops / rate / settings.devices / 3600,
    )


def measured_rate(settings: PlanSettings) -> float:
    """Crops a second of the bare teacher on this machine's device, on noise: at least 3 batches and 5 s, after one to warm up."""
    assert settings.teacher is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    teacher = load_teacher(settings.teacher, settings.teacher_weights, settings.input_size)
    teacher.model.to(device)
    rows, size = settings.batch_size or (CPU_BATCH if device.type == "cpu" else GPU_BATCH), teacher.preprocessing.input_size
    pixels = torch.randint(0, 256, (rows, size, size, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)

    def once() -> None:
        answer_logits(teacher.model, teacher.preprocessing, pixels, AUTOCAST_DTYPE[settings.autocast])
        if device.type == "cuda":
            torch.cuda.synchronize()

    once()
    begun, batches = time.monotonic(), 0
    while batches < MEASURE_BATCHES or time.monotonic() - begun < MEASURE_SECONDS:
        once()
        batches += 1
    return batches * rows / (time.monotonic() - begun)


def plan_table(settings: PlanSettings, found: Plan) -> str:
    """The plan for people."""
    if found.hours is None:
        hours = "give --rate CROPS_A_SECOND, or --teacher SPEC to measure it here"
    else:
        source = "measured, the bare teacher on noise" if settings.teacher else "as given"
        hours = f"{found.hours:,.2f}   at {found.rate:,.1f} crops/s ({source}) x {found.devices} device{'s' * (found.devices > 1)}"
    rows = [
        ("crops", f"{found.crops:,}   ({settings.images:,} images x {settings.crops:,})"),
        ("bytes a crop", f"{found.crop_bytes}   ({settings.layout}, top {settings.kept} of {settings.classes:,})"),
        ("labels", f"{in_bytes(found.label_bytes)} in {found.shards:,} shard{'s' * (found.shards > 1)}"),
        ("index", f"{in_bytes(found.index_bytes)}, about"),
        ("store", in_bytes(found.store_bytes)),
        ("teacher passes", f"{found.teacher_passes:,} crops"),
        ("hours", hours),
    ]
    return "\n".join(f"{name:<15} {value}" for name, value in rows)


def plan_json(settings: PlanSettings, found: Plan) -> dict[str, Any]:
    """The plan for programs: what was asked and what came out."""
    asked = {name: getattr(settings, name) for name in ("images", "classes", "layout", "teacher")}
    return {**asked, "topk": settings.kept, "crops_an_image": settings.crops, **dataclasses.asdict(found)}
