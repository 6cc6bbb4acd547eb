"""The command line: one small function a command. `python -m ferkd` and `ferkd` are the same.

Exit status: 0 done; 1 a check said no; 2 wrong use or input; 75 saved and stopped on SIGTERM (or Ctrl-C, for train): start the same
command again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from ferkd import __version__
from ferkd.distributed import first_to_say
from ferkd.errors import CheckFailed, InputError, Stopped
from ferkd.recipes import TrainConfig, recipe
from ferkd.regions import RegionPolicy
from ferkd.sources import DataFlag

if TYPE_CHECKING:
    from ferkd.store import LabelStore

Settings = TypeVar("Settings")

COMMANDS = {
    "label": "let a teacher label many crops of every photograph, once",
    "inspect": "show what a store's labels look like, and what thresholds would do",
    "train": "train a student on stored labels, or on hard labels without them",
    "eval": "top-1 and top-5 of trained weights, or of a teacher",
    "verify": "show a store's teacher some of its crops again: does it say the same?",
    "plan": "what labelling would cost: bytes, the teacher's passes, hours",
    "convert": "turn label files of FKD or ml-dr into a store",
    "export": "write a store as files that FKD's training script reads",
    "merge": "average stores over the same crops",
    "report": "one HTML page of training runs, side by side",
    "demo": "the whole way on a small dataset, with a table and pictures",
}


@dataclasses.dataclass(frozen=True)
class Output:
    json: bool = False
    """Print the result as JSON on stdout."""
    debug: bool = False
    """On an error show where it came from."""


def label(arguments: Sequence[str]) -> None:
    """Label crops of every photograph in DATA/train with a teacher and store its answers in a folder.

    May be stopped at any moment (also by kill -9) and started again: the finished store is the same, byte for byte. So it is from several
    GPUs and machines that share the disk: torchrun --nproc-per-node 8 -m ferkd label ...

    Example: ferkd label --data photos --teacher timm:resnet50.a1_in1k --out labels --crops 200
    """
    from ferkd.labeling import LabelSettings, label_with_figures

    settings, output = _parse(label, LabelSettings, arguments)
    labelled = label_with_figures(settings)
    if output.json and labelled is not None:
        print(json.dumps(labelled.figures))


@dataclasses.dataclass(frozen=True)
class InspectSettings:
    store: Annotated[Path, tyro.conf.Positional]
    """The label store."""
    policy: RegionPolicy = RegionPolicy()
    thresholds: Literal["probability", "quantile"] = "probability"
    """Whether thresholds are probabilities or shares of the store's crops: --discard-below 0.1 then means the lowest tenth. Reads the
    store twice."""
    data: DataFlag | None = None
    """The dataset that was labelled, to draw crops on its photographs."""
    pictures: Path | None = None
    """Folder for pictures: the confidence histogram, and with --data the crops."""
    page: Path | None = None
    """File for one self-contained HTML page: the same, and thresholds to be chosen with sliders."""


def inspect(arguments: Sequence[str]) -> None:
    """Count a store's crops by region, confidence and scale under a policy, and what other thresholds would do, before training.

    Example: ferkd inspect labels --discard-below 0.1 --calibrate-below 0.3 --data photos --pictures inspected --page inspected.html
    """
    from ferkd.inspection import inspect_store, say_progress
    from ferkd.pages.page import check_page_path, write_page
    from ferkd.pages.store_page import store_page
    from ferkd.quantiles import quantile_line, quantile_policy
    from ferkd.report import confidence_picture, crops_picture, inspection_table
    from ferkd.sources import labelled_photos
    from ferkd.store import LabelStore

    settings, output = _parse(inspect, InspectSettings, arguments)
    if settings.data and not (settings.pictures or settings.page):
        raise InputError("--data draws crops on photographs: add --pictures FOLDER or --page FILE.html to say where they go")
    if settings.page:
        check_page_path(settings.page)
    store, policy, quantiles = LabelStore(settings.store), settings.policy, ""
    if settings.thresholds == "quantile":
        policy = quantile_policy(store, policy)
        quantiles = quantile_line(policy, store)
    photos = labelled_photos(settings.data, store) if settings.data else None
    inspection = inspect_store(store, policy, say_progress(len(store)))
    written = []
    if settings.pictures:
        written.append(settings.pictures / "confidence.png")
        confidence_picture(inspection, written[-1])
    if settings.pictures and photos:
        written.append(settings.pictures / "crops.png")
        crops_picture(store, photos, policy, written[-1])
    if settings.page:
        written.append(settings.page)
        write_page(settings.page, store_page(store, inspection, photos, quantiles))
    if output.json:
        print(json.dumps({"store": store.source, **inspection.as_json(), "written": [str(path) for path in written]}))
    else:
        answers = f"top {store.k} of {store.classes:,} classes, {store.manifest.crop_bytes} bytes a crop"
        print(f"{store.source}: {len(store):,} images x {store.crops} crops, {answers}")
        if quantiles:
            print(quantiles)
        print(inspection_table(inspection))
        for path in written:
            print(f"wrote {path}")


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
    """Start from these weights (.safetensors, or .pth that holds only tensors)."""
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

    Example: ferkd train --data photos --labels labels --student resnet18 --out runs/ferkd --discard-below 0.1 --calibrate-below 0.3
    """
    from ferkd.task import Job
    from ferkd.train import train as run_training

    name = _flag_value(arguments, "--recipe") or "default"
    chosen = TrainSettings(tyro.MISSING, tyro.MISSING, tyro.MISSING, recipe=name, config=recipe(name))
    arguments = _with_value(_with_value(arguments, "--resume", "auto"), "--compile", "default")
    settings, output = _parse(train, TrainSettings, arguments, default=chosen)
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings) if field.name != "recipe"}
    summary = run_training(Job(**fields))
    if output.json:
        print(json.dumps(summary))
    else:
        print(_summary_table(summary))


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    data: DataFlag
    """Folder with val/CLASS/*; or wds:DIR, tar shards; or hf:NAME, a Hugging Face dataset (see ferkd label --help)."""
    weights: Path | None = None
    """Weights of a ferkd run (.safetensors), or the run's folder."""
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

    Example: ferkd eval --data photos --weights runs/ferkd/last.safetensors
    """
    from ferkd.evaluation import evaluate_model
    from ferkd.teacher import load_run, load_teacher

    settings, output = _parse(evaluate, EvalSettings, arguments, name="eval")
    if settings.weights is not None:
        model = load_run(settings.weights)
    else:
        assert settings.teacher is not None
        model = load_teacher(settings.teacher, settings.teacher_weights, settings.input_size)
    accuracy = evaluate_model(model, settings.data, settings.batch_size, settings.workers)
    if output.json:
        print(json.dumps(accuracy._asdict()))
    else:
        left_out = f"   {accuracy.unreadable:,} could not be read" if accuracy.unreadable else ""
        print(f"{accuracy.images:,} images{left_out}   top-1 {accuracy.top1:.2%}   top-5 {accuracy.top5:.2%}")
        print(f"top-1 among the folders' own classes {accuracy.top1_folders:.2%}")


def verify(arguments: Sequence[str]) -> None:
    """Show the teacher a sample of a store's crops again and compare: photos, preprocessing, pixels, answers. Exit status 1 if it fails.

    --integrity compares the hashes of the store's files and needs neither data nor teacher.

    Example: ferkd verify labels --data photos --teacher timm:resnet50.a1_in1k
    """
    from ferkd.verify import VerifySettings
    from ferkd.verify import verify as run_verification

    settings, output = _parse(verify, VerifySettings, arguments)
    verdict = run_verification(settings)
    if output.json:
        print(json.dumps(verdict.as_dict()))
    else:
        print(verdict.table())
        print(f"{verdict.store}: {'PASS' if verdict.passed else 'FAIL'}")
    if not verdict.passed:
        raise CheckFailed(verdict.reasons())


def plan(arguments: Sequence[str]) -> None:
    """Say what labelling would cost before anything is spent.

    Example: ferkd plan --images 1281167 --crops 200 --topk 5 --classes 1000 --rate 3000 --devices 8
    """
    from ferkd.plan import PlanSettings, plan_json, plan_table
    from ferkd.plan import plan as make_plan

    settings, output = _parse(plan, PlanSettings, arguments)
    found = make_plan(settings)
    print(json.dumps(plan_json(settings, found)) if output.json else plan_table(settings, found))


def convert(arguments: Sequence[str]) -> None:
    """Turn other people's label files into a store. Nothing in them is ever run.

    `ferkd convert fkd --help`, `ferkd convert ml-dr --help`

    Example: ferkd convert fkd FKD_soft_label_500_crops/imagenet labels --data imagenet
    """
    _choose(convert, {"fkd": convert_fkd, "ml-dr": convert_mldr}, arguments)


def convert_fkd(arguments: Sequence[str]) -> None:
    """Turn FKD's files (train/CLASS/IMAGE.tar) into a store. Boxes become those that FKD's training script cuts, to the pixel.

    May be stopped at any moment and started again.

    Example: ferkd convert fkd FKD_soft_label_500_crops/imagenet labels --data imagenet
    """
    from ferkd.filling import to_stderr
    from ferkd.interop.fkd import FkdSettings
    from ferkd.interop.fkd import convert_fkd as run

    settings, output = _parse(convert_fkd, FkdSettings, arguments, name="convert fkd")
    _print_store(run(settings, to_stderr), output)


def convert_mldr(arguments: Sequence[str]) -> None:
    """Turn a reinforced dataset of apple/ml-dr (INDEX.pth.tar) whose augmentation is crop and flip into a store.

    May be stopped at any moment and started again.

    Example: ferkd convert ml-dr imagenet_plus_rrc labels --data imagenet
    """
    from ferkd.filling import to_stderr
    from ferkd.interop.mldr import MlDrSettings
    from ferkd.interop.mldr import convert_mldr as run

    settings, output = _parse(convert_mldr, MlDrSettings, arguments, name="convert ml-dr")
    _print_store(run(settings, to_stderr), output)


def export(arguments: Sequence[str]) -> None:
    """Write a store as other people's label files.

    `ferkd export fkd --help`

    Example: ferkd export fkd labels fkd-labels --discard-below 0.1 --calibrate-below 0.3
    """
    _choose(export, {"fkd": export_fkd}, arguments)


def export_fkd(arguments: Sequence[str]) -> None:
    """Write files that FKD's own training script reads. A policy's discarded crops are left out, calibrated ones softened.

    Example: ferkd export fkd labels fkd-labels --discard-below 0.1 --calibrate-below 0.3 --data photos
    """
    from ferkd.filling import to_stderr
    from ferkd.interop.fkd_export import ExportSettings
    from ferkd.interop.fkd_export import export_fkd as run

    settings, output = _parse(export_fkd, ExportSettings, arguments, name="export fkd")
    exported = run(settings, to_stderr)
    if output.json:
        print(json.dumps({"out": str(settings.out), **exported.as_dict()}))


def merge(arguments: Sequence[str]) -> None:
    """Average stores over the same crops: an ensemble of teachers. `ferkd label --like STORE` makes a second store for it.

    Example: ferkd merge labels-a labels-b labels-both
    """
    from ferkd.filling import to_stderr
    from ferkd.merge import MergeSettings
    from ferkd.merge import merge as run

    settings, output = _parse(merge, MergeSettings, arguments)
    _print_store(run(settings, to_stderr), output)


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

    Example: ferkd report runs/fkd runs/ferkd --out report.html --data photos --labels labels
    """
    from ferkd.pages.page import check_page_path, write_page
    from ferkd.pages.runs_page import runs_page
    from ferkd.sources import labelled_photos
    from ferkd.store import LabelStore

    settings, output = _parse(report, ReportSettings, arguments)
    if not settings.runs:
        raise InputError("give at least one folder of a run")
    check_page_path(settings.out)
    store = LabelStore(settings.labels) if settings.labels else None
    write_page(settings.out, runs_page(settings.runs, store, labelled_photos(settings.data, store) if settings.data and store else None))
    print(json.dumps({"page": str(settings.out)}) if output.json else f"wrote {settings.out}")


def demo(arguments: Sequence[str]) -> None:
    """Train a small teacher, label, inspect, and compare hard labels, FKD and FerKD; on digits, or on your photographs.

    Example: ferkd demo --out demo-run
    """
    from ferkd.demo import DemoSettings, run_demo

    settings, output = _parse(demo, DemoSettings, arguments)
    result = run_demo(settings)
    if output.json:
        print(json.dumps(result))


FUNCTIONS: dict[str, Callable[[Sequence[str]], None]] = {
    "label": label,
    "inspect": inspect,
    "train": train,
    "eval": evaluate,
    "verify": verify,
    "plan": plan,
    "convert": convert,
    "export": export,
    "merge": merge,
    "report": report,
    "demo": demo,
}


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: ferkd COMMAND ...\n\nKnowledge distillation of image classifiers from stored teacher labels.\n")
        print("\n".join(f"  {name:<9} {what}" for name, what in COMMANDS.items()))
        print("\n`ferkd COMMAND --help` explains each, with an example.")
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(__version__)
        return
    if arguments[0] not in FUNCTIONS:
        print(f"ferkd: {arguments[0]!r} is no command; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    try:
        FUNCTIONS[arguments[0]](arguments[1:])
    except BrokenPipeError:  # `ferkd inspect STORE | head` has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, CheckFailed, Stopped, OSError, RuntimeError, KeyboardInterrupt) as error:
        # PyTorch tells of a killed loader process by a bare RuntimeError, from a signal handler: wherever the program happens to be.
        lost_worker = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
        if "--debug" in arguments or (isinstance(error, RuntimeError) and not lost_worker):
            raise
        status = {CheckFailed: 1, Stopped: 75, KeyboardInterrupt: 130}.get(type(error), 2)
        text = " ".join(str(error).split())
        if isinstance(error, KeyboardInterrupt):
            text = "interrupted"
        elif isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        elif lost_worker:
            text = f"workers: {text} Did memory, or /dev/shm, run out? Use fewer --workers"
        if first_to_say(text):
            print(f"ferkd {arguments[0]}: {text}", file=sys.stderr)
        sys.exit(status)


def _parse(
    command: Callable[..., Any],
    settings: type[Settings],
    arguments: Sequence[str],
    name: str | None = None,
    default: Settings | None = None,
) -> tuple[Settings, Output]:
    """Settings and output flags from the command line. Nested dataclasses give plain flags: --discard-below, without --config.policy."""

    def both(settings, output=Output()):  # type: ignore[no-untyped-def]
        return settings, output

    both.__annotations__ = {"settings": settings, "output": Output}  # tyro reads them at run time
    if default is not None:
        both.__defaults__ = (default, Output())
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            parsed: tuple[Settings, Output] = tyro.cli(
                both, args=list(arguments), prog=f"ferkd {name or command.__name__}", description=cleandoc(command.__doc__ or ""),
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )  # fmt: skip
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise InputError(_unboxed(box.getvalue())) from None
    return parsed


def _choose(command: Callable[..., Any], formats: dict[str, Callable[[Sequence[str]], None]], arguments: Sequence[str]) -> None:
    """Runs the function of the format named first."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: ferkd {command.__name__} {{{','.join(formats)}}} ...\n\n{cleandoc(command.__doc__ or '')}")
    elif not arguments or arguments[0] not in formats:
        raise InputError(f"{arguments[0] if arguments else 'no format'!r}: name the format first: {', '.join(formats)}")
    else:
        formats[arguments[0]](arguments[1:])


def _print_store(store: LabelStore, output: Output) -> None:
    """A new store as JSON, if that was asked for; people were told on the way."""
    if output.json:
        failed = len(store.manifest.failed)
        summary = {"images": len(store), "crops": len(store) * store.crops, "classes": store.classes, "k": store.k, "failed": failed}
        print(json.dumps({"store": str(store.path), **summary}))


def _unboxed(text: str) -> str:
    """The words of an error that tyro framed for the terminal."""
    lines = [line.strip("╭╮╰╯│┌┐└┘─ ") for line in text.splitlines()]
    words = " ".join(line for line in lines if line.strip("-"))
    words = re.sub(r"^Value error Error parsing settings[.\w]*: ", "", words)
    words = re.sub(r"^(Unrecognized options|Missing argument|Invalid choice|Required options) (?=\w)", "", words)
    return re.sub(r"\.?\s*For full helptext, (?:see|run) (.*--help)$", r"; \1 explains", words)


def _flag_value(arguments: Sequence[str], flag: str) -> str | None:
    """The value of one flag, read before the others because they take their defaults from it."""
    for place, argument in enumerate(arguments):
        if argument == flag and place + 1 < len(arguments):
            return arguments[place + 1]
        if argument.startswith(flag + "="):
            return argument.removeprefix(flag + "=")
    return None


def _with_value(arguments: Sequence[str], flag: str, value: str) -> list[str]:
    """The same with a value after a flag that stands alone."""
    result: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        result += [argument, value] if argument == flag and following.startswith("--") else [argument]
    return result


def _summary_table(summary: dict[str, Any]) -> str:
    rows = [
        ("student", summary["student"]), ("labels", summary["method"]), ("steps", f"{summary['steps']:,} ({summary['crops']:,} crops)"),
        ("time", f"{summary['seconds']:.1f} s"), ("top-1, last", f"{summary['top1']:.2%}"), ("top-1, best", f"{summary['best_top1']:.2%}"),
        ("top-5, last", f"{summary['top5']:.2%}"), ("val images", f"{summary['val_images']:,}"), ("run", summary["run"]),
    ]  # fmt: skip
    return "\n".join(f"{name:<13} {value}" for name, value in rows)


if __name__ == "__main__":
    main()
