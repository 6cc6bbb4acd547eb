"""The main job on a small dataset in minutes: a teacher, its labels, and students on hard labels, FKD and FerKD, with a table and pictures.

By itself it uses scikit-learn's 8 x 8 digits, each put somewhere on a canvas cluttered with pieces of other digits, so that many
crops hold no digit, or a piece of one: the crops that FerKD's rule is about. Given photographs and a teacher it does the same on those.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ferkd.errors import InputError
from ferkd.inspection import inspect_store
from ferkd.labeling import LabelSettings, label
from ferkd.pages.page import write_page
from ferkd.pages.runs_page import runs_page
from ferkd.pages.store_page import store_page
from ferkd.recipes import TrainConfig, small_images
from ferkd.regions import RegionPolicy
from ferkd.report import confidence_picture, crops_picture, curves_picture, inspection_table
from ferkd.sources import DataFlag, labelled_photos
from ferkd.train import Job, train

TRAIN_IMAGES = 1000
CANVAS = 48


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    out: Path = Path("demo-run")
    """Folder for the dataset, the store, the runs and the pictures."""
    data: DataFlag | None = None
    """Your photographs (train/CLASS/* and val/CLASS/*, wds:DIR or hf:NAME) instead of the digits; needs --teacher."""
    teacher: str | None = None
    """A teacher for your photographs: timm:NAME, torchvision:NAME, run:DIR or python:MODULE:CALLABLE."""
    teacher_weights: Path | None = None
    """Local weights for --teacher."""
    student: str | None = None
    """Default: a small convolutional network for the digits, timm:resnet10t for photographs."""
    image_size: int | None = None
    """The student's input in pixels. Default: 32 for the digits, 96 for photographs."""
    crops: int | None = None
    """Crops to label an image. Default: 40 for the digits, 10 for photographs."""
    epochs: float | None = None
    """Epochs of every student. Default: 20 for the digits, 8 for photographs."""
    seeds: int = 3
    """Students of each kind."""
    policy: RegionPolicy = RegionPolicy(discard_below=0.15, calibrate_below=0.35, confidence="target")

    def __post_init__(self) -> None:
        if (self.data is None) != (self.teacher is None):
            raise InputError("--data and --teacher go together: your photographs and a model that knows their classes")
        for name in ("seeds", "crops", "image_size", "epochs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name}: {value}; give a number above 0")


def run_demo(settings: DemoSettings) -> dict[str, Any]:
    """Do it all and return the table's figures. Everything is left in `settings.out`; what is there already is used again or refused."""
    started = time.perf_counter()
    out = settings.out
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty; remove it or choose another --out, so that the demo's figures are all of one run")
    timings: list[dict[str, Any]] = []
    is_digits = settings.data is None
    size = settings.image_size or (32 if is_digits else 96)
    crops = settings.crops or (40 if is_digits else 10)
    student = settings.student or ("python:ferkd.demo:small_student" if is_digits else "timm:resnet10t")
    recipe = dataclasses.replace(
        small_images(),
        epochs=settings.epochs or (20.0 if is_digits else 8.0),
        image_size=size,
        flip=not is_digits,
        batch_size=64,
        crops_per_image=1,  # for every method, so that they differ in nothing but the label
        eval_every=4.0 if is_digits else 2.0,
        log_every=200,
    )

    if settings.data is None:
        data: str | Path = out / "digits"
        with _step("write the digits", timings):
            write_digits(out / "digits")
        with _step("train a teacher on hard labels", timings):
            config = dataclasses.replace(recipe, epochs=recipe.epochs * 1.2, min_scale=0.35)
            teacher_run = train(Job(data, "python:ferkd.demo:small_teacher", out / "teacher", config, say=_say))
            _say(f"teacher: top-1 {teacher_run['top1']:.2%}")
        teacher = f"run:{out / 'teacher'}"
    else:
        assert settings.teacher is not None
        data, teacher = settings.data, settings.teacher
    with _step(f"label {crops} crops of every image", timings):
        asked = LabelSettings(data, teacher, out / "labels", crops=crops, flip=not is_digits, teacher_weights=settings.teacher_weights)
        store = label(asked)
        assert store is not None
    with _step("inspect the labels", timings):
        counted = inspect_store(store, settings.policy)
        print(inspection_table(counted), flush=True)
        confidence_picture(counted, out / "confidence.png")
        photos = labelled_photos(data, store)
        crops_picture(store, photos, settings.policy, out / "crops.png")
        write_page(out / "labels.html", store_page(store, counted, photos))

    methods: dict[str, tuple[Path | None, TrainConfig]] = {
        "hard labels": (None, recipe),
        "FKD": (store.path, recipe),
        "FerKD": (store.path, dataclasses.replace(recipe, policy=settings.policy)),
    }
    results: dict[str, list[float]] = {method: [] for method in methods}
    runs = []
    for seed in range(settings.seeds):
        for method, (labels, config) in methods.items():
            run = out / "runs" / f"{method.replace(' ', '-')}-seed{seed}"
            with _step(f"train a student: {method}, seed {seed}", timings):
                summary = train(Job(data, student, run, dataclasses.replace(config, seed=seed), labels, say=lambda line: None))
                _say(f"{method}, seed {seed}: top-1 {summary['top1']:.2%}")
            results[method].append(summary["top1"])
            runs.append(run)
    curves_picture(runs, out / "curves.png")
    write_page(out / "report.html", runs_page(runs, store, photos))

    table = comparison(results)
    print("\n" + table)
    print("\n" + "\n".join(f"{entry['seconds']:7.1f} s  {entry['step']}" for entry in timings))
    seconds = time.perf_counter() - started
    print(f"{seconds:7.1f} s  in all; peak memory {_peak_gib():.1f} GiB; table, pictures, pages, labels and runs are in {out}/", flush=True)
    figures = {
        "top1": results,
        "seconds": round(seconds, 1),
        "steps": timings,
        "inspection": counted.as_json(),
        "peak_gib": _peak_gib(),
    }
    (out / "table.txt").write_text(table + "\n")
    (out / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def comparison(results: dict[str, list[float]]) -> str:
    """Mean and standard deviation of each method's last top-1, and of the paired differences (same seed), with what may be said of them.

    A difference is called one only when its mean exceeds twice its standard error and n is at least 3.
    """
    lines = [f"{'method':<14}{'top-1 mean':>12}{'s.d.':>8}{'n':>4}   by seed"]
    for method, values in results.items():
        by_seed = "  ".join(f"{value:.2%}" for value in values)
        lines.append(f"{method:<14}{statistics.mean(values):>12.2%}{_deviation(values):>8.2%}{len(values):>4}   {by_seed}")
    names = list(results)
    for first, second in ((names[2], names[1]), (names[1], names[0])) if len(names) == 3 else ():
        differences = [a - b for a, b in zip(results[first], results[second], strict=True)]
        mean, error = statistics.mean(differences), _deviation(differences) / len(differences) ** 0.5
        clear = len(differences) >= 3 and abs(mean) > 2 * error
        verdict = "a difference beyond the spread" if clear else "no difference beyond the spread"
        lines.append(f"{first} - {second}: {100 * mean:+.2f} points, standard error {100 * error:.2f} (paired by seed): {verdict}")
    return "\n".join(lines)


def write_digits(folder: Path, seed: int = 0) -> None:
    """Write scikit-learn's digits as folder/{train,val}/DIGIT/NNNN.png: 1,000 and 797 pictures of 48 x 48 pixels.

    Each is a digit of 24 to 32 pixels in a random place and colour, on a noisy canvas with six pieces of other digits.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("the demo's digits come from scikit-learn, which is not installed: pip install 'ferkd[demo]'") from error
    from PIL import Image

    digits = load_digits()
    random = np.random.Generator(np.random.Philox(seed))
    pictures = (digits.images / 16.0).astype(np.float32)  # [1797, 8, 8] in [0, 1]
    order = random.permutation(len(pictures))
    for place, index in enumerate(order):
        canvas = random.uniform(0.0, 0.15, (CANVAS, CANVAS, 3)).astype(np.float32)
        for _ in range(6):
            piece = _enlarged(pictures[random.integers(len(pictures))], int(random.integers(16, 26)))
            corner = random.integers(0, 8, 2)
            piece = piece[corner[0] : corner[0] + 8, corner[1] : corner[1] + 8]
            _paint(canvas, piece, random.integers(0, CANVAS - 8, 2), random.uniform(0.3, 0.9, 3))
        digit = _enlarged(pictures[index], int(random.integers(24, 33)))
        _paint(canvas, digit, random.integers(0, CANVAS - len(digit) + 1, 2), random.uniform(0.6, 1.0, 3))
        split = "train" if place < TRAIN_IMAGES else "val"
        path = folder / split / str(digits.target[index]) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((canvas * 255).round().astype(np.uint8)).save(path)


def small_student(num_classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """A residual network of 75,000 parameters for 32-pixel pictures, and how it wants to see them."""
    return _SmallResNet((16, 32, 64), num_classes), {"input_size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def small_teacher(num_classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """The same network, twice as wide."""
    return _SmallResNet((32, 64, 128), num_classes), {"input_size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


class _SmallResNet(nn.Module):
    def __init__(self, widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        self.stages = nn.Sequential(*(_Block(before, after) for before, after in zip((widths[0], *widths), widths, strict=False)))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.stages(self.stem(x)).mean((2, 3))
        logits: Tensor = self.head(features)
        return logits


class _Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        self.shortcut = (
            nn.Identity() if stride == 1 else nn.Sequential(nn.Conv2d(before, after, 1, stride=2, bias=False), nn.BatchNorm2d(after))
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = nn.functional.relu(self.body(x) + self.shortcut(x))
        return out


def _enlarged(picture: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)


def _paint(canvas: np.ndarray, picture: np.ndarray, corner: np.ndarray, colour: np.ndarray) -> None:
    """Lay `picture` [h, w] in [0, 1] over the canvas [H, W, 3] in place, as paint of `colour`."""
    top, left = int(corner[0]), int(corner[1])
    height, width = picture.shape
    window = canvas[top : top + height, left : left + width]
    opacity = picture[: window.shape[0], : window.shape[1], None]
    window[:] = (1 - opacity) * window + opacity * colour.astype(np.float32)


@contextmanager
def _step(name: str, timings: list[dict[str, Any]]) -> Iterator[None]:
    _say(f"[{len(timings) + 1}] {name}")
    before = time.perf_counter()
    yield
    timings.append({"step": name, "seconds": round(time.perf_counter() - before, 2), "peak_gib": round(_peak_gib(), 2)})


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
