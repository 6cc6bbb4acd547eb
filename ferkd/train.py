"""The training loop, from top to bottom: hard labels, FKD or FerKD, by what it is given.

Without a label store it trains on hard labels and fresh crops. With one it replays stored crops: the default policy trusts every
label (FKD), thresholds make it FerKD. What is random is keyed by (seed, step), so a checkpoint is the step number, the weights and the
optimiser's state, and a resumed run continues exactly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset, TensorDataset

from ferkd.crops import CropSettings
from ferkd.data import (
    CenterViews,
    CropBatch,
    CropStream,
    CropView,
    DecodedPhotos,
    FolderPhotos,
    FreshCrops,
    ImageCrops,
    PhotoFiles,
    PhotoSource,
    StoredCrops,
    StreamSampler,
    check_same_photos,
    keyed_hash,
    loaded,
    plan_phases,
    training_loader,
)  # fmt: skip
from ferkd.distributed import Ranks, StopVote, joined
from ferkd.errors import InputError, Stopped
from ferkd.evaluation import Accuracy, evaluate
from ferkd.folders import Split, check_same_classes, scan_split
from ferkd.loss import LossStats, ferkd_loss, label_mass
from ferkd.mixing import MixedRows, draw_mixing, mix_pixels
from ferkd.progress import Progress, check_loggers, print_line
from ferkd.recipes import TrainConfig
from ferkd.records import Records
from ferkd.regions import Region, RegionPolicy
from ferkd.runs import Resume, RunFolder
from ferkd.store import LabelStore
from ferkd.teacher import Preprocessing, build_model, count_outputs, load_state

AMP_DTYPE = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Job:
    """What to train, on what, and where the results go. `data` holds train/CLASS/* and val/CLASS/*."""

    data: Path
    student: str
    out: Path
    config: TrainConfig
    labels: Path | None = None
    pretrained: bool = False
    init: Path | None = None
    resume: bool | Resume = False
    loggers: tuple[str, ...] = ()
    say: Callable[[str], None] = print_line


def train(job: Job) -> dict[str, Any]:
    """Train a student and return its summary, which is also written to RUN/summary.json.

    RUN then holds config.json, log.jsonl, last.safetensors and best.safetensors (which timm loads), and checkpoint.pt to resume from.
    Raises InputError for what cannot be trained, Stopped after SIGTERM or Ctrl-C (everything saved).
    """
    with joined() as ranks:
        check_loggers(job.loggers)
        if not ranks.is_main:
            job = dataclasses.replace(job, say=lambda line: None)
        try:
            return _train(job, ranks)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{ranks.device}: out of memory ({str(error).splitlines()[0]}); add --accumulate {2 * job.config.accumulate}, "
                "which gives the same gradients in smaller parts, or --amp bf16, or lower --batch-size"
            ) from error


def _train(job: Job, ranks: Ranks) -> dict[str, Any]:
    config, device = job.config, ranks.device
    cores = (os.cpu_count() or 1) // ranks.local_world
    workers = min(8, max(0, cores - 1)) if config.workers is None else config.workers

    # The student, its classes and its input.
    if job.labels is None and (config.policy.discards or config.policy.calibrate_below > 0):
        raise InputError("discard_below, calibrate_below, discard_above: thresholds are for stored labels; add --labels STORE")
    store = LabelStore(job.labels) if job.labels else None
    val = scan_split(job.data, "val")
    train_split = None if store else scan_split(job.data, "train")
    classes, class_of_val_folder = _classes(store, train_split, val)
    torch.manual_seed(config.seed)  # the same seed gives every method the same initial weights
    model, preprocessing = build_model(
        job.student,
        num_classes=len(classes),
        pretrained=job.pretrained,
        drop_path_rate=config.drop_path or None,
        input_size=config.image_size,
    )
    preprocessing = _student_preprocessing(preprocessing, config)
    if job.init:
        load_state(model, job.init)
    outputs = count_outputs(model, preprocessing.input_size, job.student, "--image-size")
    if outputs != len(classes):
        raise InputError(
            f"{job.student}: answers {outputs:,} classes, but the data have {len(classes):,}; make its last layer fit num_classes"
        )
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(device).to(memory_format=layout)
    if config.sync_batchnorm:
        if device.type != "cuda":
            raise InputError("sync_batchnorm: PyTorch's works on GPUs only; train without it here")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)

    # The stream of crops.
    usable, shares = _usable_images(store, train_split, config.policy)
    phases = plan_phases(len(usable), config.batch_size, config.epochs, config.crops_per_image,
                         config.warmup if config.single_crop_warmup else 0.0, config.last_single)  # fmt: skip
    stream = CropStream(len(usable), config.batch_size, phases, config.seed)
    for phase in phases:  # a batch that cannot be shared out or mixed is refused now, not when its phase begins
        images = _images_a_part(config, phase.crops_per_image, ranks.world)
        draw_mixing(config.mixing, config.seed, 0, 0, images, phase.crops_per_image, preprocessing.input_size)
    dataset, val_views = _datasets(job, store, train_split, val, usable, preprocessing, class_of_val_folder, max(1, workers))
    epochs_a_step = config.batch_size / len(usable)

    # What is learnt and what is saved.
    optimizer = _optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True) if config.ema_decay else None
    wrapped = ranks.wrapped(model)
    forward_pass = ForwardPass(wrapped, preprocessing, config, len(classes), store, device)
    forward: Callable[..., tuple[Tensor, LossStats]] = torch.compile(forward_pass) if config.compile else forward_pass
    identity = {"student": job.student, "classes": len(classes), "images": len(usable), "steps": stream.total_steps,
                "store": store.manifest_sha256 if store else None,
                "photos": train_split.paths.sha256() if train_split else None}  # fmt: skip
    paths = {"data": job.data, "labels": job.labels, "init": job.init}
    notes = {"pretrained": job.pretrained, **{name: str(path) if path else None for name, path in paths.items()}}
    run = RunFolder(job.out, config, identity, notes, job.resume, job.say, world_size=ranks.world, writer=ranks.is_main)
    checkpoint = run.load_checkpoint(device)
    step, assessed, best, seconds = 0, 0, -1.0, 0.0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        if ema:
            ema.load_state_dict(checkpoint["ema"])
        step, assessed, best, seconds = (checkpoint[name] for name in ("step", "assessed", "best", "seconds"))
        job.say(f"resuming at step {step:,} of {stream.total_steps:,}")
    if len(set(ranks.gathered(step))) > 1:
        raise InputError(f"{job.out}: the processes see checkpoints of different steps; give all machines the same --out, on a shared disk")
    _set_random_state(checkpoint, ranks, config.seed, step)

    def save_checkpoint() -> None:
        check_loss(float(ranks.sum(meter.loss.clone())), step, config)  # what is saved must be worth going on with
        ranks.share_buffers(model)
        random = ranks.gathered((torch.get_rng_state(), torch.cuda.get_rng_state() if device.type == "cuda" else None))
        state = {"step": step, "assessed": assessed, "best": best, "seconds": seconds, "model": model.state_dict(),
                 "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                 "ema": ema.state_dict() if ema else None, "random": random}  # fmt: skip
        run.save_checkpoint(state)

    def assess(evaluated: nn.Module) -> Accuracy:
        ranks.share_buffers(evaluated)
        return evaluate(evaluated, val_views, preprocessing, class_of_val_folder, device,
                        batch_size=min(128, config.batch_size), workers=config.workers, amp=AMP_DTYPE[config.amp], ranks=ranks)  # fmt: skip

    eval_steps = max(1, round(config.eval_every / epochs_a_step))

    def assessment_is_due() -> bool:
        return step > assessed and (step % eval_steps == 0 or step == stream.total_steps)

    sampler = StreamSampler(stream, step, stream.total_steps, ranks.rank, ranks.world)
    batches = loaded(training_loader(dataset, sampler, workers, pin_memory=device.type == "cuda"))
    meter = Meter(ranks)
    vote = StopVote(ranks)
    accuracy: Accuracy | None = None
    started = time.perf_counter()
    with (
        contextlib.closing(Progress(run, stream.total_steps, config.batch_size, job.loggers, config, ranks.is_main)) as progress,
        stop_when_asked() as stop_asked,
    ):
        while step < stream.total_steps or assessment_is_due():
            stopping = vote(stop_asked())
            if assessment_is_due() or stopping:
                seconds += time.perf_counter() - started
                save_checkpoint()  # evaluating may take long, or meet a broken photograph: what is learnt is safe before
                if stopping:
                    vote.close()
                    raise Stopped(
                        f"stopped at step {step:,} of {stream.total_steps:,}; everything is saved in {job.out}: go on with --resume"
                    )
                evaluated = ema.module if ema else model
                accuracy = assess(evaluated)
                is_best = accuracy.top1 > best
                best, assessed = max(best, accuracy.top1), step
                progress.eval(
                    {
                        "kind": "eval",
                        "step": step,
                        "epoch": round(step * epochs_a_step, 4),
                        "crops": step * config.batch_size,
                        "seconds": round(seconds, 3),
                        **accuracy._asdict(),
                        "best_top1": best,
                    }
                )
                extra = {"step": str(step), "top1": f"{accuracy.top1:.6f}"}
                run.save_weights("last", evaluated, classes, preprocessing, extra)
                if is_best:
                    run.save_weights("best", evaluated, classes, preprocessing, extra)
                save_checkpoint()
                meter.restart()
                started = time.perf_counter()
                continue

            with meter.waiting():
                batch = next(batches)
            rate = config.learning_rate(_epoch(stream, step, epochs_a_step, config))
            for group in optimizer.param_groups:
                group["lr"] = rate
            parts = _parts(batch, stream, step, config, ranks, preprocessing.input_size)

            model.train()
            # The gradient is computed together with the loss, so it must know the scale that backward() will bring.
            upstream = scaler.scale(torch.ones((), device=device)) if scaler.is_enabled() else None
            # A mean divides by the mass of all rows of the step, wherever they are; DDP then averages over the processes.
            normalizer = None
            if len(parts) * ranks.world > 1:
                normalizer = ranks.sum(torch.stack([forward_pass.mass(*part) for part in parts]).sum()) / ranks.world
            for number, part in enumerate(parts):
                with contextlib.nullcontext() if number == len(parts) - 1 else ranks.without_averaging(wrapped):
                    loss, stats = forward(*part, upstream, normalizer)
                    scaler.scale(loss).backward()
                meter.add(loss, stats)
            if config.clip_grad:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if ema:
                ema.update_parameters(model)
            step += 1

            meter.steps += 1
            if step % config.log_every == 0 or step == stream.total_steps:
                line: dict[str, Any] = {
                    "kind": "train",
                    "step": step,
                    "epoch": round(step * epochs_a_step, 4),
                    "crops": step * config.batch_size,
                    "lr": rate,
                }
                line |= meter.read(config.batch_size)
                progress.train(line)
                check_loss(line["loss"], step, config)

    vote.close()
    if accuracy is None:  # resumed after the last step
        accuracy = assess(ema.module if ema else model)
    summary = {
        "student": job.student, "method": method_name(store, config.policy), "steps": step, "crops": step * config.batch_size,
        "seconds": round(seconds, 2), "top1": accuracy.top1, "top5": accuracy.top5, "top1_folders": accuracy.top1_folders,
        "best_top1": best, "val_images": accuracy.images, "usable_images": len(usable), "stored_regions": shares, "run": str(job.out),
    }  # fmt: skip
    run.write_json("summary.json", summary)
    return summary


class ForwardPass(nn.Module):
    """uint8 crops and label words to the loss: normalise, mix, student, fused loss. One graph when compiled."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        config: TrainConfig,
        classes: int,
        store: LabelStore | None,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.model, self.config, self.classes = model, config, classes
        self.record_kind = (store.label_codec, store.k, store.classes) if store else None
        self.amp = AMP_DTYPE[config.amp]
        self.register_buffer("mean", torch.tensor(preprocessing.mean, device=device)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std, device=device)[:, None, None], persistent=False)

    def forward(
        self, batch: CropBatch, mixed: MixedRows | None, upstream: Tensor | None, normalizer: Tensor | None
    ) -> tuple[Tensor, LossStats]:
        config = self.config
        images = (batch.pixels.float() / 255 - self.mean) / self.std
        if mixed is not None:
            images = mix_pixels(images, mixed)
        images = images.contiguous(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
        with torch.autocast(images.device.type, dtype=self.amp, enabled=self.amp is not None):
            logits = self.model(images)
        labels, policy = self._labels(batch)
        loss, stats = ferkd_loss(
            logits, labels, batch.target, policy=policy, temperature=config.temperature, tail=config.tail, tau_squared=config.tau_squared,
            mix=(mixed.partner, mixed.lam) if mixed is not None else None, upstream=upstream, normalizer=normalizer, impl=config.impl,
            stats=True,
        )  # fmt: skip
        return loss, stats

    def mass(self, batch: CropBatch, mixed: MixedRows | None) -> Tensor:
        """The labels' mass, summed over the rows: 0-dim float32."""
        labels, policy = self._labels(batch)
        mix = (mixed.partner, mixed.lam) if mixed is not None else None
        return label_mass(
            labels, batch.target, classes=self.classes, policy=policy, temperature=self.config.temperature, tail=self.config.tail, mix=mix
        ).sum()

    def _labels(self, batch: CropBatch) -> tuple[Records | tuple[Tensor, Tensor], RegionPolicy]:
        if self.record_kind and batch.words is not None:
            return Records(batch.words, *self.record_kind), self.config.policy
        # The ground truth, softened: the same kernel with k = 1 and a smooth tail.
        certain = torch.full_like(batch.target[:, None], 1.0 - self.config.policy.smoothing, dtype=torch.float32)
        return (batch.target[:, None], certain), RegionPolicy()


class Meter:
    """Sums of a stretch of steps, kept on the device so that no step waits for the host, and the time spent waiting for data."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.device = ranks, ranks.device
        self.restart()

    def restart(self) -> None:
        self.loss = torch.zeros((), device=self.device)
        self.correct = torch.zeros((), device=self.device)
        self.regions = torch.zeros(len(Region), device=self.device)
        self.steps, self.wait, self.started = 0, 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.wait += time.perf_counter() - before

    def add(self, loss: Tensor, stats: LossStats) -> None:
        self.loss += loss.detach()
        self.correct += stats.correct.sum()
        self.regions += (stats.region[:, None] == torch.arange(len(Region), device=self.device)).sum(0)

    def read(self, batch_size: int) -> dict[str, Any]:
        """The figures since the last reading, over all processes, each of which must read; waits for the device."""
        rows = self.steps * batch_size
        self.ranks.sum(self.loss).div_(self.ranks.world)
        self.ranks.sum(self.correct)
        self.ranks.sum(self.regions)
        shares = {region.name.lower(): round(count / rows, 6) for region, count in zip(Region, self.regions.tolist(), strict=True)}
        figures = {"loss": float(self.loss) / self.steps, "train_top1": float(self.correct) / rows, "regions": shares}
        elapsed = time.perf_counter() - self.started
        figures |= {"crops_per_second": rows / elapsed, "data_wait": self.wait / elapsed}
        self.restart()
        return figures


def check_loss(loss: float, step: int, config: TrainConfig) -> None:
    """Raises InputError for a loss that is no number: the weights are lost, and must not take the place of earlier ones."""
    if not math.isfinite(loss):
        raise InputError(f"loss: {loss} within the {config.log_every} steps before step {step:,}; lower --lr or use --amp none")


def method_name(store: LabelStore | None, policy: RegionPolicy) -> str:
    """What the settings amount to: hard labels, FKD (every label trusted) or FerKD (some discarded or calibrated)."""
    if store is None:
        return "hard labels"
    return "FerKD" if policy.discards or policy.calibrate_below > 0 else "FKD"


@contextmanager
def stop_when_asked() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM and Ctrl-C only raise a flag, which the loop reads between steps; a second Ctrl-C interrupts at once."""
    asked = False

    def ask(number: int, _: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: whoever runs the loop there keeps its own handlers
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _classes(store: LabelStore | None, train_split: Split | None, val: Split) -> tuple[tuple[str, ...], np.ndarray]:
    """The student's class names by output, and the class id of every val folder."""
    if store is None:
        assert train_split is not None
        check_same_classes(train_split, val)
        if len(train_split.folders) < 2:
            raise InputError(f"{train_split.root}: has only the class folder {train_split.folders[0]!r}; a classifier needs at least 2")
        return train_split.folders, np.arange(len(val.folders))
    unknown = [folder for folder in val.folders if folder not in store.folders]
    if unknown:
        raise InputError(
            f"{val.root}: class folders {', '.join(unknown[:5])} are not in the store {store.path}, which was labelled with "
            f"{', '.join(list(store.folders)[:5])}...; give the --data folder that was labelled"
        )
    missing = [folder for folder in store.folders if folder not in val.folders]
    if missing:
        raise InputError(
            f"{val.root}: lacks the class folders {', '.join(missing[:5])} of the store {store.path}; "
            "give val the class folders that were labelled, with the same names"
        )
    return tuple(store.class_names), np.array([store.folders[folder] for folder in val.folders])


def _student_preprocessing(preprocessing: Preprocessing, config: TrainConfig) -> Preprocessing:
    return dataclasses.replace(preprocessing, crop_pct=config.eval_crop_pct or preprocessing.crop_pct)


def _usable_images(store: LabelStore | None, train_split: Split | None, policy: RegionPolicy) -> tuple[np.ndarray, dict[str, int] | None]:
    """The images that training visits, and how the stored crops divide into regions."""
    if store is None:
        assert train_split is not None
        return np.arange(len(train_split)), None
    scan = store.scan(policy)
    return np.flatnonzero(scan.usable), {region.name.lower(): int(scan.counts[region]) for region in Region}


def _datasets(
    job: Job, store: LabelStore | None, train_split: Split | None, val: Split, usable: np.ndarray,
    preprocessing: Preprocessing, class_of_val_folder: np.ndarray, threads: int,
) -> tuple[Dataset[ImageCrops], Dataset[Any]]:  # fmt: skip
    config = job.config
    view = CropView(preprocessing.input_size, preprocessing.interpolation)
    photos: PhotoSource
    if store:
        check_same_photos(job.data / "train", store)
        photos = PhotoFiles(job.data / "train", store)
    else:
        assert train_split is not None
        photos = FolderPhotos(train_split)
    if config.cache == "decoded":
        photos = DecodedPhotos(photos, usable, threads)
    crops: Dataset[ImageCrops]
    if store:
        crops = StoredCrops(photos, store, usable, config.policy, view, config.seed)
    else:
        assert train_split is not None
        crops = FreshCrops(photos, train_split.folder_of, CropSettings(config.seed, (config.min_scale, 1.0), flip=config.flip), view)
    views: Dataset[Any] = CenterViews(
        val, class_of_val_folder, preprocessing.input_size, preprocessing.crop_pct, preprocessing.interpolation
    )
    if config.cache == "decoded":
        pixels, targets, numbers = zip(*(views[i] for i in range(len(val))), strict=True)
        views = TensorDataset(torch.stack(pixels), torch.tensor(targets), torch.tensor(numbers))
    return crops, views


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": config.weight_decay}]
    if not config.decay_norms_and_biases:
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def _epoch(stream: CropStream, step: int, epochs_a_step: float, config: TrainConfig) -> float:
    """How far training is, in epochs, for the learning rate."""
    epoch = step * epochs_a_step
    if config.lr_step == "pass":
        crops = stream.crops_per_image(step)
        epoch = math.floor(epoch / crops + 1e-9) * crops
    return epoch


def _images_a_part(config: TrainConfig, crops_per_image: int, world: int) -> int:
    """The images of a part: what one process passes through the student at once. Raises InputError when a step cannot be shared out so."""
    images, parts = config.batch_size // crops_per_image, world * config.accumulate
    said = f"{images} images a step, shared out over {world} process(es) in {config.accumulate} part(s) each,"
    if images % parts:
        raise InputError(f"batch_size: {said} are not even; choose a multiple of {parts * crops_per_image} crops")
    group = 1 if config.mixing.mix in ("none", "selfmix") else min(config.mixing.mix_group, images)
    if parts > 1 and images // parts % group:
        raise InputError(
            f"mix_group: {group} images find their partners among each other, but {said} are {images // parts} a part; "
            "choose a divisor of that"
        )
    return images // parts


def _parts(
    batch: CropBatch, stream: CropStream, step: int, config: TrainConfig, ranks: Ranks, size: int
) -> list[tuple[CropBatch, MixedRows | None]]:
    """This process's rows of a step in the parts that pass through the student at once, with their mixing, on the device."""
    crops = stream.crops_per_image(step)
    images = _images_a_part(config, crops, ranks.world)
    parts = []
    for part in range(config.accumulate):
        first_slot = stream.first_slot(step) + (ranks.rank * config.accumulate + part) * images
        mixed = draw_mixing(config.mixing, config.seed, step, first_slot, images, crops, size)
        rows = slice(part * images * crops, (part + 1) * images * crops)
        own = CropBatch(batch.pixels[rows], None if batch.words is None else batch.words[rows], batch.target[rows])
        parts.append(_to_device((own, mixed), ranks.device))
    return parts


def _set_random_state(checkpoint: Mapping[str, Any] | None, ranks: Ranks, seed: int, step: int) -> None:
    """The random state of dropout and its like: each process's own; as it was, if as many processes go on as were stopped."""
    if checkpoint and len(checkpoint["random"]) == ranks.world:
        on_cpu, on_gpu = checkpoint["random"][ranks.rank]
        torch.set_rng_state(on_cpu.cpu())
        if on_gpu is not None and ranks.device.type == "cuda":
            torch.cuda.set_rng_state(on_gpu.cpu())
    elif checkpoint or ranks.world > 1:
        torch.manual_seed(int(keyed_hash(seed, step, ranks.rank)[0] >> np.uint64(1)))


def _to_device(value: Any, device: torch.device) -> Any:
    """The same nested tuples with every tensor on the device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        moved = (_to_device(part, device) for part in value)
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value
