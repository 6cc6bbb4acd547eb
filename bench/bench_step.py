"""The training step beside the bare model, and the memory of a long run.

    python bench/bench_step.py                                  writes ${OUT:-bench/results}/loop-DEVICE.csv
    python bench/bench_step.py --model resnet50 --batch 256 --amp bf16      on a GPU
    python bench/bench_step.py --long 10000                     a whole run of so many steps; writes long-run-DEVICE.csv

bare: forward, cross-entropy of hard labels, backward and the fused SGD on float32 pictures that lie on the device: what a model costs
whatever trains it. loop: ferkd's own step (ferkd/step.py) on uint8 crops and label words of a store: normalising, mixing (--mix), student,
FerKD's fused loss with statistics, backward, update, the meter's sums. loss: ferkd_loss with its gradient and backward on logits of the
same shape. All three take turns in one process, with the same model, layout, precision and memory allocator; no loader is in it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import loss_variants, machine
from bench.loss_variants import POLICY, K
from bench.profile_step import student
from bench.timing import cpu_seconds
from ferkd import Records, ferkd_loss
from ferkd.data import CropBatch, pixel_rows
from ferkd.distributed import Ranks
from ferkd.meter import Meter
from ferkd.mixing import Mixing
from ferkd.preprocessing import Preprocessing
from ferkd.process import keep_freed_memory
from ferkd.recipes import TrainConfig
from ferkd.step import TrainStep
from ferkd.stream import CropStream, Phase
from ferkd.task import AMP_DTYPE, Job, Task

CROPS = 4


def calls(settings: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], object]]:
    """bare, loop and loss as functions of nothing that each do one step."""
    batch, size, classes = settings.batch, settings.size, settings.classes
    config = TrainConfig(batch_size=batch, crops_per_image=CROPS, policy=POLICY, amp=settings.amp, compile=settings.compile,
                         mixing=Mixing(settings.mix), lr=0.01)  # fmt: skip
    p = loss_variants.problem(batch, classes, torch.float32, device)

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return student(settings.model, classes).to(device).to(memory_format=torch.channels_last)

    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    amp = AMP_DTYPE[settings.amp]

    def forward(images: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            return F.cross_entropy(model(images), target)

    compiled = settings.compile not in ("no", "auto") or (settings.compile == "auto" and device.type == "cuda")
    run = torch.compile(forward, fullgraph=True, dynamic=False) if compiled else forward

    def bare() -> None:
        model.train()
        run(images, p.target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    store = SimpleNamespace(label_codec="half", k=K, classes=classes)
    task = cast(Task, SimpleNamespace(store=store, classes=range(classes), policy=POLICY, teacher=None))
    ranks = Ranks(device=device)
    learn = TrainStep(fresh(), Preprocessing(size), config, task, ranks)
    stream = CropStream(100_000, batch, [Phase(CROPS, 10**9)], 0)
    pixels = pixel_rows(torch.randint(0, 256, (batch * size * size * 3,), dtype=torch.uint8), size)
    crops = CropBatch(pixels, p.half.cpu(), p.target.cpu())
    if device.type == "cuda":
        crops = CropBatch(crops.pixels.pin_memory(), p.half.cpu().pin_memory(), crops.target.pin_memory())
    meter = Meter(ranks)
    step = 0

    def loop() -> None:
        nonlocal step
        learn(crops, stream, step, 0.01, meter)
        step += 1

    logits = torch.randn(batch, classes, device=device, dtype=amp or torch.float32).requires_grad_()

    def loss() -> None:
        labels = Records(p.half, "half", K, classes)
        value, _ = ferkd_loss(logits, labels, p.target, policy=POLICY, stats=True)
        value.backward()
        logits.grad = None

    def waited(call: Callable[[], object]) -> Callable[[], object]:
        def timed() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return timed

    return {name: waited(call) for name, call in (("bare", bare), ("loop", loop), ("loss", loss))}


def long_run(steps: int) -> list[dict[str, Any]]:
    """The training lines of a whole run on made-up pictures: loaders, mixing, evaluations, checkpoints, a moving average and all."""
    from PIL import Image

    from ferkd.train import train

    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        for split, count in (("train", 200), ("val", 20)):
            for label in range(4):
                (data / split / f"class{label}").mkdir(parents=True)
                for number in range(count):
                    picture = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                    Image.fromarray(picture).save(data / split / f"class{label}" / f"{number}.png")
        config = TrainConfig(
            epochs=steps * 32 / 800, batch_size=32, crops_per_image=CROPS, workers=1, image_size=32, eval_every=40.0, log_every=100,
            ema_decay=0.999, mixing=Mixing("mixup_cutmix", mix_group=4), lr=0.01, impl="auto",
        )  # fmt: skip
        out = Path(folder) / "run"
        train(Job(data, "python:bench.bench_step:small", out, config, say=lambda line: None))
        return [line for text in (out / "log.jsonl").read_text().splitlines() if (line := json.loads(text))["kind"] == "train"]


def spread(seconds: list[float]) -> str:
    """The 20th and the 80th percentile, in ms."""
    tenths = statistics.quantiles(seconds, n=10)
    return f"{tenths[1] * 1e3:.3f} {tenths[7] * 1e3:.3f}"


def small(num_classes: int) -> tuple[nn.Module, dict[str, object]]:
    """The student of the long run."""
    return student("tiny", num_classes), {"input_size": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--amp", choices=list(AMP_DTYPE), default="none")
    parser.add_argument("--mix", default="none")
    parser.add_argument("--compile", default="auto", help="as of ferkd train")
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring")
    parser.add_argument("--long", type=int, metavar="STEPS", help="instead: the memory of a run of so many steps")
    settings = parser.parse_args()
    device = machine.device()
    folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    identity = ("model", "batch", "size", "classes", "amp", "mix")
    if settings.long:
        lines = long_run(settings.long)
        path = folder / f"long-run-{machine.file_name(device)}.csv"
        shown = [line for line in lines if line["step"] in {100, 500, 1000} or line["step"] % 1000 == 0]
        columns = ("step", "memory_mib", "crops_per_second", "data_wait")
        table: list[dict[str, Any]] = [{name: line[name] for name in columns} for line in shown]
    else:
        if device.type == "cpu":
            keep_freed_memory()
        measured = calls(settings, device)
        for call in measured.values():  # compiling takes a minute, whose processes would count as the machine's other work
            call()
        before, started = machine.seconds_of_others(), time.perf_counter()
        times = cpu_seconds(measured, settings.seconds, block=3)
        medians = {name: statistics.median(each) for name, each in times.items()}
        path = folder / f"loop-{machine.file_name(device)}.csv"
        quiet = (machine.seconds_of_others() - before) / (time.perf_counter() - started)
        table = [
            {
                **{name: getattr(settings, name) for name in identity},
                **{f"{name}_ms": round(median * 1e3, 3) for name, median in medians.items()},
                "loop_speed": round(medians["bare"] / medians["loop"], 4),
                "loss_share": round(medians["loss"] / medians["bare"], 5),
                **{f"{name}_p20_p80": spread(each) for name, each in times.items()},
                "blocks": len(times["bare"]),
                "threads": torch.get_num_threads(),
                "others_busy": round(quiet, 2),
                "torch": torch.__version__,
                "device": machine.device_name(device),
            }
        ]
        if path.exists():
            with open(path, newline="") as file:
                others = [row for row in csv.DictReader(file) if any(row[name] != str(table[0][name]) for name in identity)]
            table = [*others, *table]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[-1]))
        writer.writeheader()
        writer.writerows(table)
    for row in table:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
