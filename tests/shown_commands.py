"""Commands that the documents show, run as they stand but for SUBSTITUTES: what cannot be had, or waited for, in a test."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from fkd_files import write_labels
from photos import write_photos
from test_convert_mldr import write_mldr

from ferkd.cli import main

TEACHER = "python:photos:colour_teacher"
SHORT = "--image-size 32 --batch-size 12 --epochs 1 --workers 0"

SUBSTITUTES = {
    "timm:resnet50.a1_in1k": TEACHER,  # its weights are a download
    "--teacher SPEC": f"--teacher {TEACHER}",
    "--teacher OTHER": f"--teacher {TEACHER}",
    "--student resnet18": f"--student resnet18 {SHORT}",  # 100 epochs at 224 px
    "ferkd demo --out demo-run": f"ferkd demo --out demo-run --data photos --teacher {TEACHER} --student python:photos:tiny_net "
    "--image-size 16 --crops 4 --epochs 2 --seeds 1",  # 3 minutes; tests/test_demo.py runs it on its digits
    "SOURCE": "FKD_soft_label_500_crops/imagenet",
    "RUN...": "runs/fkd runs/ferkd",
    "N": "3",
    "OUT": "out",
}


def write_folder(folder: Path) -> Path:
    """What the shown commands name: photographs, stores, other people's labels, runs."""
    write_photos(folder / "photos")
    shutil.copytree(folder / "photos", folder / "imagenet")
    run(f"ferkd label --data {folder / 'photos'} --teacher {TEACHER} --out {folder / 'labels'} --crops 12")
    for name in ("labels-a", "labels-b"):
        shutil.copytree(folder / "labels", folder / name)
    write_labels(folder / "imagenet", folder / "FKD_soft_label_500_crops/imagenet", "dense", classes=3)
    write_mldr(folder / "imagenet", folder / "imagenet_plus_rrc")
    quick = f"--student python:photos:tiny_net --batch-size 12 --epochs 4 --workers 0 --data {folder / 'photos'}"
    for name in ("fkd", "ferkd"):
        run(f"ferkd train --labels {folder / 'labels'} --out {folder / 'runs' / name} {quick}")
    return folder


def run(line: str) -> None:
    """One line of a `ferkd` command, in the present folder. Raises AssertionError when its exit status is not 0."""
    for shown, instead in SUBSTITUTES.items():
        line = " ".join(f" {line} ".replace(f" {shown} ", f" {instead} ").split())
    program, *arguments = shlex.split(line, comments=True)
    assert program == "ferkd", line
    status: object = 0
    try:
        main(arguments)
    except SystemExit as end:
        status = end.code
    assert not status, f"{line}: exit status {status}"
