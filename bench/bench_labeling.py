"""How fast `ferkd label` is beside the bare teacher, which bounds it.

    python bench/bench_labeling.py                            writes ${OUT:-bench/results}/labeling-DEVICE.csv
    python bench/bench_labeling.py --teacher python:bench_labeling:resnet50 --crops 200 --autocast bf16        on a GPU

bare: the network alone, on the same batches, normalised, as they lie on the device. labelling: reading, decoding, cutting and resizing the
crops in threads, normalising, the network, softmax and top k, packing, and writing the units to disk. cutting: the photographs' part
alone. They take turns in one process, a unit of photographs each; `of_bare` is the median of the turns' ratios. On a CPU that others use
as well, give OMP_NUM_THREADS=1: threads that wait for each other are what suffers most.

Without --data the photographs are those of FERKD_TEST_DATA/imagenette-mini-224, or, where there are none, made up: 500 x 375, as JPEG.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import machine
from ferkd.devices import cores_for_decoding, repeatable
from ferkd.label_batches import _cut_photos, label_images
from ferkd.label_crew import Task
from ferkd.label_plan import AUTOCAST_DTYPE, Job, LabelSettings, plan_job
from ferkd.shards import UNIT_IMAGES
from ferkd.store import StoreWriter

ROOT = Path(__file__).resolve().parents[1]


def resnet50() -> tuple[nn.Module, dict[str, object]]:
    """An untrained teacher: what it says does not matter to the time."""
    import timm

    return timm.create_model("resnet50", pretrained=False), {"input_size": 224}


def made_up(folder: Path, photos: int) -> Path:
    """Smooth random photographs with some noise, which decode about as fast as real ones."""
    random = np.random.default_rng(0)
    (folder / "train/n01440764").mkdir(parents=True)
    for number in range(photos):
        coarse = PIL.Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8)).resize((500, 375), PIL.Image.Resampling.BICUBIC)
        pixels = np.clip(np.asarray(coarse) + random.normal(0, 12, (375, 500, 3)), 0, 255).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"train/n01440764/{number:05d}.jpg", quality=90)
    return folder


def turns(job: Job, writer: StoreWriter, photos: int) -> dict[str, Callable[[int], object]]:
    """The variants as functions of the turn's number; each handles the same number of crops."""
    crops, batch = photos * job.plan.crops, job.plan.batch_size

    def task(turn: int) -> Task:
        return Task(turn, turn * photos, (turn + 1) * photos - 1)

    how, model = job.teacher.preprocessing, job.teacher.model
    pixels = torch.cat([cut.pixels for _, _, cut in _cut_photos(job, [task(0)]) if cut.pixels is not None]).permute(0, 3, 1, 2)
    rows = torch.arange(-(-crops // batch) * batch) % len(pixels)
    # Laid out as labelling's crops are, pixel by pixel, which many networks prefer.
    batches: list[Tensor] = [
        how.normalise(pixels[some].to(job.device)).contiguous(memory_format=torch.channels_last) for some in rows.split(batch)
    ]
    autocast = AUTOCAST_DTYPE[job.settings.autocast]

    def bare(_: int) -> None:
        with torch.inference_mode(), torch.autocast(job.device.type, autocast, enabled=autocast is not None):
            for shown in batches:
                model(shown)
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)

    def labelling(turn: int) -> None:
        writer.write_unit(turn, list(label_images(job, [task(turn)], lambda _: None)))
        writer.finish_shard(turn)

    def cutting(turn: int) -> None:
        for _ in _cut_photos(job, [task(turn)]):
            pass

    return {"bare": bare, "labelling": labelling, "cutting": cutting}


def main() -> None:
    sys.path[1:1] = [str(ROOT / "tests"), str(ROOT / "bench")]  # where the teachers are
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with train/CLASS/*")
    parser.add_argument("--teacher", default="python:lite0_teacher:make")
    parser.add_argument("--crops", type=int, default=10)
    parser.add_argument("--turns", type=int, default=6, help=f"units of {UNIT_IMAGES} photographs for each variant; the first warms up")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--autocast", choices=["none", "bf16", "fp16"], default="none")
    parser.add_argument("--tf32", action="store_true")
    options = parser.parse_args()
    photos = (options.turns + 1) * UNIT_IMAGES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        test_data = Path(os.environ.get("FERKD_TEST_DATA", "/nonexistent")) / "imagenette-mini-224"
        data = options.data or (test_data if test_data.is_dir() else made_up(folder / "photos", photos))
        settings = LabelSettings(data, options.teacher, folder / "store", crops=options.crops, limit=photos, workers=options.workers,
                                 batch_size=options.batch_size, autocast=options.autocast, tf32=options.tf32)  # fmt: skip
        job = plan_job(settings)
        assert job.plan.shard_images == UNIT_IMAGES
        available = len(job.plan.paths) // UNIT_IMAGES
        crops = UNIT_IMAGES * job.plan.crops
        print(
            f"{machine.device_name(job.device)}, torch {torch.__version__}, {options.teacher} at {job.teacher.preprocessing.input_size} px"
        )
        print(f"{options.crops} crops a photograph, batches of {job.plan.batch_size}, {job.threads} threads decode, {data}")
        times: dict[str, list[float]] = {}
        others, started = machine.seconds_of_others(), time.perf_counter()
        with StoreWriter(folder / "store", job.plan) as writer, repeatable(options.tf32), cores_for_decoding(job.device):
            variants = turns(job, writer, UNIT_IMAGES)
            random = np.random.default_rng(0)
            for turn in range(min(options.turns + 1, available)):
                for variant in random.permutation(list(variants)).tolist():
                    begun = time.perf_counter()
                    variants[variant](turn)
                    if turn:
                        times.setdefault(variant, []).append(time.perf_counter() - begun)
        busy = (machine.seconds_of_others() - others) / (time.perf_counter() - started)
        rows = []
        print(f"\n{'':<10} {'crops/s':>9} {'p20':>9} {'p80':>9} {'of bare':>8}     other processes kept {busy:.2f} processors busy")
        for variant, seconds in times.items():
            rate = [crops / s for s in seconds]
            of_bare = statistics.median(bare / other for bare, other in zip(times["bare"], seconds, strict=True))
            p20, median, p80 = np.percentile(rate, [20, 50, 80])
            print(f"{variant:<10} {median:>9.1f} {p20:>9.1f} {p80:>9.1f} {of_bare:>8.3f}")
            rows.append({
                "variant": variant, "crops_per_s": f"{median:.1f}", "p20": f"{p20:.1f}", "p80": f"{p80:.1f}", "of_bare": f"{of_bare:.3f}",
                "turns": len(seconds), "teacher": options.teacher, "crops": options.crops, "batch": job.plan.batch_size,
                "threads": job.threads, "autocast": options.autocast, "tf32": options.tf32,
                "device": machine.device_name(job.device), "torch": torch.__version__,
                "others_busy": f"{max(busy, 0.0):.2f}",
            })  # fmt: skip
        out = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
        out.mkdir(parents=True, exist_ok=True)
        file_name = out / f"labeling-{machine.file_name(job.device)}.csv"
        with open(file_name, "w", newline="") as file:
            table = csv.DictWriter(file, fieldnames=list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    print(f"\nwrote {file_name}")


if __name__ == "__main__":
    main()
