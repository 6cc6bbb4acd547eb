"""Commands about students: train, eval, report, demo."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ferkd.commands.parsing import flag_value, parse, with_value
from ferkd.errors import InputError
from ferkd.recipes import TrainConfig, recipe
from ferkd.sources import DataFlag


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    data: DataFlag
    """Folder with train/CLASS/* and val/CLASS/*; or wds:DIR, tar shards; or hf:NAME, a Hugging Face dataset (see ferkd label --help)."""
    student: str
    """timm:NAME (or just NAME), torchvision:NAME or python:MODULE:CALLABLE."""
    out: Path
    """Folder for the run: weights, log, checkpoint."""
    labels: Path | None = None
    """The label store; without it the student learns from hard labels."""
    recipe: str = "default"
    """Named settings that the other flags change."""
    teacher: str | None = None
    """Instead of labels, a teacher that answers for every crop while the student trains: timm:NAME, torchvision:NAME, run:DIR or
    python:MODULE:CALLABLE. Much slower; to compare with."""
    teacher_weights: Path | None = None
    """Local weights for --teacher."""
    teacher_input_size: int | None = None
    """Pixels, square, at which --teacher looks. Default: its own."""
    skip_preflight: bool = False
    """Train even if the --teacher's answers look wrong."""
    pretrained: bool = False
    """Start from the library's pretrained weights."""
    init: Path | None = None
    """Start from these weights (.safetensors, or a .pth or training checkpoint of timm's that holds no code). Those of another number of
    classes are taken but for the last layer."""
    resume: Literal["never", "auto", "must"] = "never"
    """A run in --out: `never` refuses it, `auto` (or --resume alone) goes on with it if there is one, `must` refuses to begin one."""
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where figures go besides the run's own log."""
    config: TrainConfig = TrainConfig()


def train(arguments: Sequence[str]) -> None:
    """Train a student. Without --labels on hard labels (softened by --smoothing); with them FKD; with thresholds FerKD. --teacher asks
    a teacher at every step instead.

    SIGTERM or Ctrl-C saves and stops with exit status 75; the same command with --resume goes on.

    --recipe NAME gives the settings that the other flags then change: default, small_images, fkd_resnet50, fkd_vit, ferkd_resnet50,
    ferkd_vit.

    Example:
      ferkd train --data photos --labels labels --student resnet18 --out runs/ferkd --discard-below 0.1 --calibrate-below 0.3
    """
    from ferkd.task import Job
    from ferkd.train import train as run_training

    name = flag_value(arguments, "--recipe") or "default"
    chosen = TrainSettings(tyro.MISSING, tyro.MISSING, tyro.MISSING, recipe=name, config=recipe(name))
    arguments = with_value(with_value(arguments, "--resume", "auto"), "--compile", "default")
    settings, output = parse(train, TrainSettings, arguments, default=chosen)
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings) if field.name != "recipe"}
    summary = run_training(Job(**fields))
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes the first speaks
        return
    if output.json:
        print(json.dumps(summary))
    else:
        print(_summary_table(summary))


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    data: DataFlag
    """Folder with val/CLASS/*; or wds:DIR, tar shards; or hf:NAME, a Hugging Face dataset (see ferkd label --help)."""
    weights: Path | None = None
    """Weights of a ferkd run (.safetensors), or the run's folder: its best.safetensors, which was chosen on val, else last.safetensors."""
    teacher: str | None = None
    """Instead of weights, a model: timm:NAME, torchvision:NAME, run:DIR or python:MODULE:CALLABLE."""
    teacher_weights: Path | None = None
    """Local weights for --teacher."""
    input_size: int | None = None
    """Pixels, square. Default: the model's own."""
    batch_size: int = 64
    workers: int | None = None
    """Loader processes. Default: one a core but one, at most 8."""

    def __post_init__(self) -> None:
        if (self.weights is None) == (self.teacher is None):
            raise InputError("give either --weights FILE of a ferkd run or --teacher SPEC")
        if self.weights is not None and (self.teacher_weights is not None or self.input_size is not None):
            raise InputError(
                "--teacher-weights and --input-size go with --teacher; for a run at another size, --teacher run:DIR --input-size PX"
            )
        if self.batch_size < 1:
            raise InputError(f"batch_size: {self.batch_size}; give a whole number of at least 1")
        if self.workers is not None and self.workers < 0:
            raise InputError(f"workers: {self.workers}; give a whole number of at least 0")
        if self.input_size is not None and self.input_size < 1:
            raise InputError(f"input_size: {self.input_size}; give a whole number of at least 1")


def evaluate(arguments: Sequence[str]) -> None:
    """Top-1 and top-5 on DATA/val.

    Example:
      ferkd eval --data photos --weights runs/ferkd/last.safetensors
    """
    from ferkd.evaluation import evaluate_model
    from ferkd.teacher import load_run, load_teacher

    settings, output = parse(evaluate, EvalSettings, arguments, name="eval")
    if settings.weights is not None:
        model = load_run(settings.weights)
    else:
        assert settings.teacher is not None
        model = load_teacher(settings.teacher, settings.teacher_weights, settings.input_size)
    accuracy = evaluate_model(model, settings.data, settings.batch_size, settings.workers)
    if output.json:
        print(json.dumps({"model": model.spec, **accuracy._asdict()}))
    else:
        print(model.spec.removeprefix("run:") + ("   (the run's best, chosen on val)" if model.spec.endswith("/best.safetensors") else ""))
        left_out = f"   {accuracy.unreadable:,} could not be read" if accuracy.unreadable else ""
        print(f"{accuracy.images:,} images{left_out}   top-1 {accuracy.top1:.2%}   top-5 {accuracy.top5:.2%}")
        print(f"top-1 among the folders' own classes {accuracy.top1_folders:.2%}")


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs (the --out of ferkd train), finished or not."""
    out: Path = Path("report.html")
    """The page. One that is there is replaced."""
    data: DataFlag | None = None
    """The dataset that was labelled, to show photographs with their crops; goes with --labels."""
    labels: Path | None = None
    """The store that runs learnt from."""

    def __post_init__(self) -> None:
        if (self.data is None) != (self.labels is None):
            raise InputError("--data and --labels go together: photographs, and the store whose crops are shown on them")


def report(arguments: Sequence[str]) -> None:
    """Write one self-contained HTML page about runs: curves, regions, speed, what differs between their settings.

    Example:
      ferkd report runs/fkd runs/ferkd --out report.html --data photos --labels labels
    """
    from ferkd.pages.page import check_page_path, write_page
    from ferkd.pages.runs_page import runs_page
    from ferkd.sources import labelled_photos
    from ferkd.store import LabelStore

    settings, output = parse(report, ReportSettings, arguments)
    if not settings.runs:
        raise InputError("give at least one folder of a run")
    check_page_path(settings.out)
    store = LabelStore(settings.labels) if settings.labels else None
    write_page(settings.out, runs_page(settings.runs, store, labelled_photos(settings.data, store) if settings.data and store else None))
    print(json.dumps({"page": str(settings.out)}) if output.json else f"wrote {settings.out}")


def demo(arguments: Sequence[str]) -> None:
    """Train a small teacher, label, inspect, and compare hard labels, FKD and FerKD; on digits, or on your photographs.

    Example:
      ferkd demo --out demo-run
    """
    from ferkd.demo import DemoSettings, run_demo

    settings, output = parse(demo, DemoSettings, arguments)
    result = run_demo(settings)
    if output.json:
        print(json.dumps(result))


def _summary_table(summary: dict[str, Any]) -> str:
    rows = [
        ("student", summary["student"]), ("labels", summary["method"]), ("steps", f"{summary['steps']:,} ({summary['crops']:,} crops)"),
        ("time", f"{summary['seconds']:.1f} s"), ("top-1, last", f"{summary['top1']:.2%}"), ("top-1, best", f"{summary['best_top1']:.2%}"),
        ("top-5, last", f"{summary['top5']:.2%}"), ("val images", f"{summary['val_images']:,}"), ("run", summary["run"]),
    ]  # fmt: skip
    return "\n".join(f"{name:<13} {value}" for name, value in rows)
