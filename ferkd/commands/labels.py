"""Commands about labels: label, inspect, verify, plan."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ferkd.commands.parsing import parse
from ferkd.errors import CheckFailed, InputError
from ferkd.regions import RegionPolicy
from ferkd.sources import DataFlag


def label(arguments: Sequence[str]) -> None:
    """Label crops of every photograph in DATA/train with a teacher and store its answers in a folder.

    May be stopped at any moment (also by kill -9) and started again: the finished store is the same, byte for byte. So it is from several
    GPUs and machines that share the disk (on CPUs: with the same OMP_NUM_THREADS): torchrun --nproc-per-node 8 -m ferkd label ...

    Example:
      ferkd label --data photos --teacher timm:resnet50.a1_in1k --out labels --crops 200
    """
    from ferkd.labeling import LabelSettings, label_with_figures

    settings, output = parse(label, LabelSettings, arguments)
    labelled = label_with_figures(settings)
    if output.json and labelled is not None:
        print(json.dumps(labelled.figures))


@dataclasses.dataclass(frozen=True)
class InspectSettings:
    store: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
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

    Example:
      ferkd inspect labels --discard-below 0.1 --calibrate-below 0.3 --data photos --pictures inspected --page inspected.html
    """
    from ferkd.inspection import inspect_store, say_progress
    from ferkd.pages.page import check_page_path, write_page
    from ferkd.pages.store_page import store_page
    from ferkd.quantiles import quantile_line, quantile_policy
    from ferkd.report import confidence_picture, crops_picture, inspection_table
    from ferkd.sources import labelled_photos
    from ferkd.store import LabelStore

    settings, output = parse(inspect, InspectSettings, arguments)
    if settings.data and not (settings.pictures or settings.page):
        raise InputError("--data draws crops on photographs: add --pictures FOLDER or --page FILE.html to say where they go")
    if settings.page:
        check_page_path(settings.page)
    store, policy, quantiles = LabelStore(settings.store), settings.policy, ""
    if settings.thresholds == "quantile":
        policy = quantile_policy(store, policy)
        quantiles = quantile_line(policy, store)
    inspection = inspect_store(store, policy, say_progress(len(store)))
    photos = labelled_photos(settings.data, store) if settings.data else None
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


def verify(arguments: Sequence[str]) -> None:
    """Show the teacher a sample of a store's crops again and compare: photos, preprocessing, pixels, answers. Exit status 1 if it fails.

    --integrity compares the hashes of the store's files and needs neither data nor teacher.

    Example:
      ferkd verify labels --data photos --teacher timm:resnet50.a1_in1k
    """
    from ferkd.verify import VerifySettings
    from ferkd.verify import verify as run_verification

    settings, output = parse(verify, VerifySettings, arguments)
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

    Example:
      ferkd plan --images 1281167 --crops 200 --topk 5 --classes 1000 --rate 3000 --devices 8
    """
    from ferkd.plan import PlanSettings, plan_json, plan_table
    from ferkd.plan import plan as make_plan

    settings, output = parse(plan, PlanSettings, arguments)
    found = make_plan(settings)
    print(json.dumps(plan_json(settings, found)) if output.json else plan_table(settings, found))
