"""The training loop, from top to bottom: hard labels, FKD, FerKD or an online teacher, by what it is given.

Without a label store it trains on hard labels and fresh crops, or on what an online teacher says of them. With one it replays stored
crops: the default policy trusts every label (FKD), thresholds make it FerKD. What is random is keyed by (seed, step), so a checkpoint
is the step number, the weights and the optimiser's state, and a resumed run continues exactly.

What is learnt from is found in task.py, one step in step.py, its figures in meter.py, the files of a run in runs.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ferkd.data import CropView, batches_memory, loaded, training_loader
from ferkd.distributed import Ranks, StopVote, joined, with_synchronised_batchnorm
from ferkd.errors import InputError, Stopped
from ferkd.evaluation import Accuracy, evaluate
from ferkd.meter import Meter, check_loss, check_skipped
from ferkd.mixing import draw_mixing
from ferkd.preprocessing import Preprocessing
from ferkd.process import keep_freed_memory, stop_when_asked
from ferkd.progress import Progress, check_loggers
from ferkd.recipes import TrainConfig
from ferkd.remote import plainly
from ferkd.runs import RunFolder, held
from ferkd.specs import count_outputs
from ferkd.step import TrainStep, images_a_part
from ferkd.stream import CropStream, StreamSampler, keyed_hash, plan_phases
from ferkd.task import AMP_DTYPE, Job, Task, plan_task
from ferkd.teacher import build_model
from ferkd.weights import load_state

__all__ = ["Job", "train"]


def train(job: Job) -> dict[str, Any]:
    """Train a student and return its summary, which is also written to RUN/summary.json.

    RUN then holds config.json, log.jsonl, last.safetensors and best.safetensors (which timm loads), and checkpoint.pt to resume from.
    Raises InputError for what cannot be trained, CheckFailed for an online teacher that looks wrong, Stopped after SIGTERM or Ctrl-C
    (everything saved).
    """
    with joined() as ranks, contextlib.ExitStack() as until_the_end:
        check_loggers(job.loggers)
        if not ranks.is_main:
            job = dataclasses.replace(job, say=lambda line: None)
        if ranks.device.type == "cpu":
            keep_freed_memory()
        try:
            return _train(job, ranks, until_the_end)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{ranks.device}: out of memory ({str(error).splitlines()[0]}); add --accumulate {2 * job.config.accumulate}, "
                "which gives the same gradients in smaller parts, or --amp bf16, or lower --batch-size"
            ) from error


def _train(job: Job, ranks: Ranks, until_the_end: contextlib.ExitStack) -> dict[str, Any]:
    config, device = job.config, ranks.device
    cores = (os.cpu_count() or 1) // ranks.local_world
    workers = min(8, max(0, cores - 1)) if config.workers is None else config.workers

    # What is learnt, from what, in which order.
    task = plan_task(job, ranks)
    model, preprocessing = _student(job, task, ranks)
    phases = plan_phases(len(task.usable), config.batch_size, config.epochs, config.crops_per_image,
                         config.warmup if config.single_crop_warmup else 0.0, config.last_single)  # fmt: skip
    stream = CropStream(len(task.usable), config.batch_size, phases, config.seed)
    for phase in phases:  # a batch that cannot be shared out or mixed is refused now, not when its phase begins
        images = images_a_part(config, phase.crops_per_image, ranks.world)
        draw_mixing(config.mixing, config.seed, 0, 0, images, phase.crops_per_image, preprocessing.input_size)
    dataset = task.crops(job, CropView(preprocessing.input_size, preprocessing.interpolation), max(1, workers))
    val_views = task.views(preprocessing, config.cache == "decoded", max(1, workers))
    epochs_a_step = config.batch_size / len(task.usable)

    # Where it was broken off, if it was.
    learn = TrainStep(model, preprocessing, config, task, ranks)
    if ranks.is_main:
        until_the_end.enter_context(held(job.out))
    run = _run_folder(job, task, stream, ranks)
    checkpoint = run.load_checkpoint(device)
    step, assessed, best, seconds = 0, 0, -1.0, 0.0
    if checkpoint:
        learn.load_state_dict(checkpoint)
        step, assessed, best, seconds = (checkpoint[name] for name in ("step", "assessed", "best", "seconds"))
        job.say(f"resuming at step {step:,} of {stream.total_steps:,}")
    if len(set(ranks.gathered(step))) > 1:
        raise InputError(f"{job.out}: the processes see checkpoints of different steps; give all machines the same --out, on a shared disk")
    _set_random_state(checkpoint, ranks, config.seed, step)
    del checkpoint  # or its copy of the weights would stay on the device

    def save_checkpoint() -> None:
        lost = {"loss": float(ranks.sum(meter.loss.clone()))}
        check_loss(lost, meter.steps, step, run.last_good_step)  # what is saved must be worth going on with
        ranks.share_buffers(model)
        random = ranks.gathered((torch.get_rng_state(), torch.cuda.get_rng_state() if device.type == "cuda" else None))
        run.save_checkpoint({"step": step, "assessed": assessed, "best": best, "seconds": seconds, "random": random, **learn.state_dict()})

    eval_rows = min(128, max(1, config.batch_size // ranks.world))

    def assess() -> Accuracy:
        ranks.share_buffers(learn.evaluated)
        return evaluate(learn.evaluated, val_views, preprocessing, task.class_of_val_folder, device,
                        batch_size=eval_rows, workers=workers, prefetch=1, amp=AMP_DTYPE[config.amp], ranks=ranks)  # fmt: skip

    eval_steps = max(1, round(config.eval_every / epochs_a_step))

    def assessment_is_due() -> bool:
        return step > assessed and (step % eval_steps == 0 or step == stream.total_steps)

    sampler = StreamSampler(stream, step, stream.total_steps, ranks.rank, ranks.world)
    # Training's batches wait in shared memory while an evaluation has its own there.
    reserve = batches_memory(workers, eval_rows, preprocessing.input_size)
    batches = loaded(training_loader(dataset, sampler, workers, pin_memory=device.type == "cuda", reserve=reserve))
    meter = Meter(ranks)
    vote = StopVote(ranks)
    accuracy: Accuracy | None = None
    unreadable: set[str] = set()
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
                accuracy = assess()
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
                run.save_weights("last", learn.evaluated, task.classes, preprocessing, extra)
                if is_best:
                    run.save_weights("best", learn.evaluated, task.classes, preprocessing, extra)
                save_checkpoint()
                meter.restart()
                started = time.perf_counter()
                continue

            with meter.waiting():
                batch = next(batches)
            for problem in set(batch.unreadable) - unreadable:
                job.say(f"warning: {problem}; another photograph takes its place")
            unreadable.update(batch.unreadable)
            rate = config.learning_rate(_epoch(stream, step, epochs_a_step, config))
            learn(batch, stream, step, rate, meter)
            step += 1
            if step % config.log_every == 0 or step == stream.total_steps:
                line = {
                    "kind": "train",
                    "step": step,
                    "epoch": round(step * epochs_a_step, 4),
                    "crops": step * config.batch_size,
                    "seconds": round(seconds + time.perf_counter() - started, 3),
                    "lr": rate,
                }
                steps = meter.steps
                line |= meter.read(config.batch_size)
                progress.train(line)
                check_loss(line, steps, step, run.last_good_step)
                check_skipped(meter, config.log_every, step, step == stream.total_steps, run.last_good_step)

    vote.close()
    if accuracy is None:  # resumed after the last step
        accuracy = assess()
    summary = {
        "student": job.student, "method": task.method, "steps": step, "crops": step * config.batch_size, "seconds": round(seconds, 2),
        "top1": accuracy.top1, "top5": accuracy.top5, "top1_folders": accuracy.top1_folders, "best_top1": best,
        "val_images": accuracy.images, "usable_images": len(task.usable), "stored_regions": task.regions,
        "policy": dataclasses.asdict(task.policy), "unreadable": sorted(set().union(*ranks.gathered(unreadable))), "run": str(job.out),
    }  # fmt: skip
    run.write_json("summary.json", summary)
    return summary


def _student(job: Job, task: Task, ranks: Ranks) -> tuple[nn.Module, Preprocessing]:
    """The model to train, on its device, and how it sees pictures. The same seed gives every method the same initial weights."""
    config = job.config
    torch.manual_seed(config.seed)
    model, preprocessing = build_model(
        job.student,
        num_classes=len(task.classes),
        pretrained=job.pretrained,
        drop_path_rate=config.drop_path or None,
        input_size=config.image_size,
    )
    preprocessing = dataclasses.replace(
        preprocessing,
        crop_pct=config.eval_crop_pct or preprocessing.crop_pct,
        interpolation=config.interpolation or preprocessing.interpolation,
    )
    if job.init and (said := load_state(model, job.init, new_last_layer=True)):
        job.say(said)
    outputs = count_outputs(model, preprocessing.input_size, job.student, "--image-size")
    if outputs != len(task.classes):
        raise InputError(
            f"{job.student}: answers {outputs:,} classes, but the data have {len(task.classes):,}; make its last layer fit num_classes"
        )
    if ranks.device.type == "cuda" and config.amp == "none":
        job.say("the student computes in float32; --amp bf16 takes less time where a GPU has tensor cores")
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(ranks.device).to(memory_format=layout)
    if config.sync_batchnorm:
        if ranks.device.type != "cuda":
            raise InputError("sync_batchnorm: PyTorch's works on GPUs only; train without it here")
        model = with_synchronised_batchnorm(model)
    return model, preprocessing


def _run_folder(job: Job, task: Task, stream: CropStream, ranks: Ranks) -> RunFolder:
    identity = {"student": job.student, "steps": stream.total_steps, **task.identity()}
    labels = plainly(job.labels) if job.labels else None
    paths = {"data": job.data, "labels": labels, "init": job.init, "teacher_weights": job.teacher_weights}
    notes = {"pretrained": job.pretrained, "teacher_spec": job.teacher, "policy": dataclasses.asdict(task.policy),
             **{name: str(path) if path else None for name, path in paths.items()}}  # fmt: skip
    return RunFolder(job.out, job.config, identity, notes, job.resume, job.say, world_size=ranks.world, writer=ranks.is_main)


def _epoch(stream: CropStream, step: int, epochs_a_step: float, config: TrainConfig) -> float:
    """How far training is, in epochs, for the learning rate."""
    epoch = step * epochs_a_step
    if config.lr_step == "pass":
        number, within = stream.phase_at(step)  # every phase begins a pass of its own
        crops = stream.phases[number].crops_per_image
        epoch = (step - within) * epochs_a_step + math.floor(within * epochs_a_step / crops + 1e-9) * crops
    return epoch


def _set_random_state(checkpoint: Mapping[str, Any] | None, ranks: Ranks, seed: int, step: int) -> None:
    """The random state of dropout and its like: each process's own; as it was, if as many processes go on as were stopped."""
    if checkpoint and len(checkpoint["random"]) == ranks.world:
        on_cpu, on_gpu = checkpoint["random"][ranks.rank]
        torch.set_rng_state(on_cpu.cpu())
        if on_gpu is not None and ranks.device.type == "cuda":
            torch.cuda.set_rng_state(on_gpu.cpu())
    elif checkpoint or ranks.world > 1:
        torch.manual_seed(int(keyed_hash(seed, step, ranks.rank)[0] >> np.uint64(1)))
