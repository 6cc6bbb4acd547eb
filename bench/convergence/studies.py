"""The experiments: which methods, on which images and labels, for how many steps, from which seeds; and how tuning chooses.

README.md beside this file says why. Changing an arm here makes new runs and leaves the rows of the old ones alone. What a study takes
over from tuning it reads from the tuning's own rows, by the rules written here, and cannot be made before those are complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from bench.convergence.datasets import Images
from bench.convergence.paired import asks_for_more, paired_difference, spread
from bench.convergence.results import TEN_WAY, read_rows, runs_file
from bench.convergence.settings import FIVE, FKD, FKD_MIX, HARD, ONLINE, SMOOTH, Arm, Method, Recipe, Study, ferkd
from bench.convergence.stores import Labelling, Labels

Thresholds = tuple[float, float]
"""(discard_below, calibrate_below); 0 for none."""


# ---- What tuning chooses ---------------------------------------------------------------------------------------------------------

FINALISTS = 3


class NotTuned(Exception):
    """A study that another one waits for is not complete."""


def held_out(study: str, runs: Iterable[tuple[Arm, int]], results: Path, column: str = "top1_last") -> dict[Arm, float]:
    """The mean top-1 of each arm over its runs. Raises NotTuned when one of them is missing."""
    found = {(row["config"], row["seed"]): float(row[column]) for row in read_rows(runs_file(results, study))}
    by_arm: dict[Arm, list[float]] = {}
    for arm, seed in runs:
        if (arm.config, str(seed)) not in found:
            raise NotTuned(f"waits until {study} is complete")
        by_arm.setdefault(arm, []).append(found[arm.config, str(seed)])
    return {arm: spread(values).mean for arm, values in by_arm.items()}


def grid_and_finalists(study: str, groups: Iterable[tuple[Arm, list[Arm]]], results: Path, column: str = "top1_last") -> Study:
    """A grid from seed 0, and of each group the best FINALISTS again from seeds 1 and 2, beside the group's FKD. `groups`: (FKD, grid)."""
    groups = list(groups)
    first = Study(study, tuple(dict.fromkeys(arm for fkd, grid in groups for arm in (fkd, *grid))), (0,))
    try:
        top1 = held_out(study, first.runs(), results, column)
    except NotTuned:
        return first
    again = [arm for fkd, grid in groups for arm in (fkd, *sorted(grid, key=lambda arm: -top1[arm])[:FINALISTS])]
    return dataclasses.replace(first, again=tuple(dict.fromkeys(again)))


class Chosen(NamedTuple):
    """By confidence and share of wrong ground truth; `primary` is the confidence that is FerKD in the planned comparisons."""

    thresholds: Mapping[tuple[str, float], Thresholds]
    primary: str

    def method(self, confidence: str, images: Images) -> Method:
        return ferkd(confidence, *self.thresholds[confidence, images.wrong])

    def ferkd(self, images: Images) -> Method:
        return self.method(self.primary, images)

    def selfmix(self, images: Images) -> Method:
        return ferkd(self.primary, *self.thresholds[self.primary, images.wrong], name="FerKD + SelfMix", mix="selfmix")


def choose(study: Study, results: Path, column: str = "top1_last") -> Chosen:
    """Among the arms that were run again, the best of each kind; the confidence whose best are better on average over the images."""
    if not study.again:
        raise NotTuned(f"waits until {study.name} is complete")
    again = set(study.again)
    top1 = held_out(study.name, [(arm, seed) for arm, seed in study.runs() if arm in again], results, column)
    best: dict[tuple[str, float], Arm] = {}
    for arm in sorted(top1, key=lambda arm: top1[arm]):
        if arm.method != FKD:
            best[arm.method.policy.confidence, arm.images.wrong] = arm
    thresholds = {key: (arm.method.policy.discard_below, arm.method.policy.calibrate_below) for key, arm in best.items()}
    means = {confidence: spread([top1[best[key]] for key in best if key[0] == confidence]).mean for confidence, _ in best}
    return Chosen(thresholds, max(means, key=lambda confidence: means[confidence]))


def extended(study: Study, ours: str, results: Path, column: str = "top1_last") -> Study:
    """The study with ten seeds for every cell in which five say so (see paired.asks_for_more); `ours` is FerKD's name in it.

    A cell: arms that share images, smallest crop and teacher, and the hard labels beside them.
    """
    found = {(row["config"], int(row["seed"])): float(row[column]) for row in read_rows(runs_file(results, study.name))}
    arms: dict[Arm, None] = {}
    for fkd, ferkd_arm in (
        (a, b) for a in study.arms for b in study.arms if a.method == FKD and b.method.name == ours and a.labels == b.labels
    ):
        if all((arm.config, seed) in found for arm in (fkd, ferkd_arm) for seed in FIVE):
            first, second = ({seed: found[arm.config, seed] for seed in FIVE} for arm in (ferkd_arm, fkd))
            difference = paired_difference(first, second)
            if difference is not None and asks_for_more(difference):
                beside = (
                    a for a in study.arms if (a.images, a.min_scale) == (fkd.images, fkd.min_scale) and a.labels in (None, fkd.labels)
                )
                arms |= dict.fromkeys(beside)
    return dataclasses.replace(study, extended=tuple(arms))


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------------------------

CIFAR, CIFAR_WRONG = Images("cifar10"), Images("cifar10", wrong=0.4)
SHORT = Recipe("python:bench.convergence.models:small_student", steps=1500, lr=0.1)
LONG = dataclasses.replace(SHORT, steps=3000)
CROPS_STORED = {0.35: 10, 0.08: 20}
"""Crops of an image: all that were labelled, or those among them that are large enough."""


def cifar_arm(method: Method, recipe: Recipe, images: Images, teacher: str, min_scale: float = 0.35) -> Arm:
    labels = Labels(Labelling(teacher, CIFAR, crops=20, min_scale=0.08), images, CROPS_STORED[min_scale], min_scale)
    return Arm(method, recipe, images, min_scale, labels if method.uses_labels else None)


def tune_rate(results: Path) -> Study:
    """The learning rate, for two methods at once."""
    images = dataclasses.replace(CIFAR, held_out=True)
    arms = [
        cifar_arm(method, dataclasses.replace(SHORT, lr=lr), images, "resnet20") for lr in (0.05, 0.1, 0.2, 0.4) for method in (SMOOTH, FKD)
    ]
    return Study("tune-rate", tuple(arms), (0,))


def rate(results: Path) -> float:
    top1 = held_out("tune-rate", tune_rate(results).runs(), results)
    by_rate: dict[float, list[float]] = {}
    for arm, value in top1.items():
        by_rate.setdefault(arm.recipe.lr, []).append(value)
    return max(by_rate, key=lambda lr: spread(by_rate[lr]).mean)


GRID: dict[str, tuple[Thresholds, ...]] = {
    "max": ((0.5, 0.0), (0.7, 0.0), (0.9, 0.0), (0.0, 0.7), (0.0, 0.9), (0.5, 0.7), (0.5, 0.9), (0.7, 0.9)),
    "target": ((0.01, 0.0), (0.1, 0.0), (0.3, 0.0), (0.0, 0.3), (0.0, 0.7), (0.01, 0.3), (0.1, 0.5), (0.3, 0.7)),
}


def tune_thresholds(results: Path) -> Study:
    recipe = dataclasses.replace(SHORT, lr=rate(results))
    groups = [
        (cifar_arm(FKD, recipe, images, "resnet20"), [cifar_arm(ferkd(name, *at), recipe, images, "resnet20") for at in grid])
        for images in (dataclasses.replace(CIFAR, held_out=True), dataclasses.replace(CIFAR_WRONG, held_out=True))
        for name, grid in GRID.items()
    ]
    return grid_and_finalists("tune-thresholds", groups, results)


def chosen(results: Path) -> Chosen:
    return choose(tune_thresholds(results), results)


def cifar_main(results: Path) -> Study:
    """2 teachers x 2 shares of wrong ground truth, crops of scale 0.35 and more."""
    tuned, recipe, arms = chosen(results), dataclasses.replace(LONG, lr=rate(results)), []
    for images in (CIFAR, CIFAR_WRONG):
        hard = (HARD, SMOOTH) if images == CIFAR else (SMOOTH,)
        arms += [cifar_arm(method, recipe, images, "") for method in hard]
        for teacher in ("resnet20", "resnet56"):
            methods = [FKD, tuned.method("max", images), tuned.method("target", images), tuned.selfmix(images)]
            methods += [FKD_MIX] if images == CIFAR else []
            arms += [cifar_arm(method, recipe, images, teacher) for method in methods]
    return extended(Study("cifar-main", tuple(arms), FIVE), f"FerKD ({tuned.primary})", results)


def cifar_small_crops(results: Path) -> Study:
    """The same with crops from 0.08 on, which the teachers cannot judge."""
    tuned, recipe, arms = chosen(results), dataclasses.replace(LONG, lr=rate(results)), []
    for images in (CIFAR, CIFAR_WRONG):
        arms.append(cifar_arm(SMOOTH, recipe, images, "", 0.08))
        for teacher in ("resnet20", "resnet56"):
            methods = (FKD, tuned.method("max", images), tuned.method("target", images), tuned.selfmix(images))
            arms += [cifar_arm(method, recipe, images, teacher, 0.08) for method in methods]
    return extended(Study("cifar-small-crops", tuple(arms), FIVE), f"FerKD ({tuned.primary})", results)


def convergence(results: Path, images: Images = CIFAR) -> Study:
    """Budgets of 5, 10 and 41 epochs, each with its own cosine; val is read ten times a run, for the curves."""
    methods = (SMOOTH, FKD, chosen(results).ferkd(images))
    arms = [
        cifar_arm(method, dataclasses.replace(LONG, lr=rate(results), steps=steps, evaluations=10), images, "resnet56")
        for steps in (2000, 4000, 16000)
        for method in methods
    ]
    return Study("convergence-wrong" if images.wrong else "convergence", tuple(arms), (0, 1, 2))


def convergence_wrong(results: Path) -> Study:
    return convergence(results, CIFAR_WRONG)


def online(results: Path) -> Study:
    """A teacher that answers at every step, for fresh crops, beside one that answered once: what its time buys."""
    recipe = dataclasses.replace(LONG, lr=rate(results))
    return Study("online", tuple(cifar_arm(method, recipe, CIFAR, "resnet56") for method in (FKD, ONLINE)), (0, 1, 2))


# ---- Ablations: 10,000 images of CIFAR-10, one thing varied at a time from FerKD as tuned ----------------------------------------

FEW, FEW_WRONG = dataclasses.replace(CIFAR, share=0.2), dataclasses.replace(CIFAR_WRONG, share=0.2)


def few_labels(images: Images, teacher: str = "resnet56", crops: int = 32, flags: tuple[str, ...] = (), **more: int | str) -> Labels:
    return Labels(Labelling(teacher, FEW, crops=32, min_scale=0.35, flags=flags), images, crops, 0.35, **more)  # type: ignore[arg-type]


def ablations(results: Path) -> Study:
    tuned, lr = chosen(results), rate(results)
    arms: list[Arm] = []

    def add(varied: str, method: Method, images: Images = FEW, labels: Labels | None = None, crops_per_image: int = 4) -> None:
        recipe = dataclasses.replace(SHORT, lr=lr, crops_per_image=crops_per_image)
        stored = (labels or few_labels(images)) if method.uses_labels else None
        arms.append(Arm(method, recipe, images, 0.35, stored, varied))

    for images in (FEW, FEW_WRONG):
        base, name = tuned.ferkd(images), tuned.primary
        other = "max" if name == "target" else "target"
        low, middle = tuned.thresholds[name, images.wrong]
        for method in (base, FKD, SMOOTH):
            add("base", method, images)
        add(f"confidence = {other}, as tuned", tuned.method(other, images), images)
        for discard in (0.0, 0.05, 0.2, 0.5):
            for calibrate in (0.0, 0.6):
                if (discard, calibrate) != (0.0, 0.0):
                    add(f"thresholds = discard below {discard:g}, calibrate below {calibrate:g}", ferkd(name, discard, calibrate), images)
        for above in (0.999, 0.99, 0.9):
            if above > max(low, middle):  # or nothing would be left
                add(f"discard above = {above:g}", ferkd(name, low, middle, discard_above=above), images)
        for smoothing in (0.0, 0.3):
            # Where tuning calibrates nothing, smoothing acts on nothing: it is tried with calibration then.
            calibrate = middle or (0.6 if low < 0.6 else (1.0 + low) / 2)
            add(f"smoothing = {smoothing:g}", ferkd(name, low, calibrate, smoothing=smoothing), images)

    base = tuned.ferkd(FEW)
    for k in (1, 3, 10):
        add(f"k = {k}", base, labels=few_labels(FEW, k=k))
    for temperature in (2.0, 4.0):
        add(f"temperature = {temperature:g}", dataclasses.replace(base, temperature=temperature))
    for crops in (4, 8, 16):
        add(f"stored crops = {crops}", base, labels=few_labels(FEW, crops=crops))
    for m in (1, 2, 8):
        add(f"crops an image = {m}", base, crops_per_image=m)
    for method in (FKD, SMOOTH):  # added when the rows above had shown that this matters more than the method
        add("crops an image = 1", method, crops_per_image=1)
    add("label codec = packed", base, labels=few_labels(FEW, codec="packed"))
    for method in (base, FKD):
        add("teacher fed = wrong normalisation", method, labels=few_labels(FEW, "resnet56-unnormalised", flags=("--skip-preflight",)))
        add("teacher fed = 48 px", method, labels=few_labels(FEW, flags=("--skip-preflight", "--input-size", "48")))
    distinct = {arm.config: arm for arm in reversed(arms)}  # where tuning chose what is varied, the base stays
    return Study("ablations", tuple(distinct.values())[::-1], (0, 1, 2))


# ---- Imagenette ------------------------------------------------------------------------------------------------------------------

IMAGENETTE = Images("imagenette")
IMAGENETTE_GRID: dict[str, tuple[Thresholds, ...]] = {
    "max": ((0.1, 0.0), (0.3, 0.0), (0.0, 0.3), (0.1, 0.3), (0.1, 0.5), (0.3, 0.5), (0.0, 0.5), (0.1, 0.7), (0.1, 0.9)),
    "target": ((0.01, 0.0), (0.1, 0.0), (0.0, 0.1), (0.01, 0.1), (0.01, 0.3), (0.1, 0.3), (0.01, 0.6), (0.1, 0.6), (0.1, 0.9)),
}
"""The last three of each were added when the first ones, from one seed, had shown the best at the grid's edge; val was not read yet."""
FOLDERS_GRID: tuple[Thresholds, ...] = ((0.01, 0.0), (0.1, 0.0), (0.0, 0.3), (0.0, 0.6), (0.01, 0.6), (0.1, 0.9))
"""By target, where the teacher answers among the ten folders' classes."""


def photo_recipe(results: Path, steps: int = 1800) -> Recipe:
    """CIFAR-10's, learning rate and all, for a student of the same design: nothing of it is tuned on Imagenette."""
    return dataclasses.replace(LONG, student="python:bench.convergence.models:photo_student", steps=steps, lr=rate(results), image_size=64)


def imagenette_arm(method: Method, recipe: Recipe, images: Images, teacher: str = "lite0") -> Arm:
    labels = Labels(Labelling(teacher, IMAGENETTE, crops=32, min_scale=0.08), images, crops=32, min_scale=0.08)
    return Arm(method, recipe, images, 0.08, labels if method.uses_labels else None)


def imagenette_tune(results: Path) -> Study:
    recipe, images = photo_recipe(results, steps=900), dataclasses.replace(IMAGENETTE, held_out=True)
    fkd = imagenette_arm(FKD, recipe, images)
    grids = ((fkd, [imagenette_arm(ferkd(name, *at), recipe, images) for at in grid]) for name, grid in IMAGENETTE_GRID.items())
    return grid_and_finalists("imagenette-tune", grids, results, TEN_WAY)


def imagenette_chosen(results: Path) -> Chosen:
    return choose(imagenette_tune(results), results, TEN_WAY)


def imagenette_tune_folders(results: Path) -> Study:
    recipe, images = photo_recipe(results, steps=900), dataclasses.replace(IMAGENETTE, held_out=True)
    fkd, *ours = (
        imagenette_arm(method, recipe, images, "lite0-folders") for method in (FKD, *(ferkd("target", *at) for at in FOLDERS_GRID))
    )
    return grid_and_finalists("imagenette-tune-folders", [(fkd, ours)], results, TEN_WAY)


def imagenette(results: Path) -> Study:
    """Labels of the teacher's 1,000 classes, and, when that is tuned too, of the ten that have a folder."""
    tuned, recipe = imagenette_chosen(results), photo_recipe(results)
    ours = (tuned.method("max", IMAGENETTE), tuned.method("target", IMAGENETTE), tuned.selfmix(IMAGENETTE))
    arms = [imagenette_arm(method, recipe, IMAGENETTE) for method in (SMOOTH, FKD, *ours, FKD_MIX)]
    with contextlib.suppress(NotTuned):
        among_folders = choose(imagenette_tune_folders(results), results, TEN_WAY).method("target", IMAGENETTE)
        arms += [imagenette_arm(method, recipe, IMAGENETTE, "lite0-folders") for method in (FKD, among_folders)]
    return extended(Study("imagenette", tuple(arms), FIVE), f"FerKD ({tuned.primary})", results, TEN_WAY)


# ---- On a GPU: the same question with students and budgets that a CPU cannot have ------------------------------------------------

RESNET18 = Recipe("timm:resnet18", steps=2400, lr=0.2, weight_decay=5e-5, batch_size=256, image_size=128)


def gpu_imagenette(results: Path, recipe: Recipe = RESNET18, seeds: tuple[int, ...] = FIVE) -> Study:
    """The planned comparisons at 128 px: 614,400 crops a run, 65 for each image, so that each stored one is seen twice."""
    tuned = imagenette_chosen(results)
    ours = (tuned.ferkd(IMAGENETTE), tuned.selfmix(IMAGENETTE))
    name = f"gpu-imagenette-{recipe.student.partition(':')[2]}"
    return Study(name, tuple(imagenette_arm(method, recipe, IMAGENETTE) for method in (SMOOTH, FKD, *ours)), seeds)


def gpu_imagenette_resnet50(results: Path) -> Study:
    return gpu_imagenette(results, dataclasses.replace(RESNET18, student="timm:resnet50"), (0, 1, 2))


STUDIES: dict[str, Callable[[Path], Study]] = {
    "tune-rate": tune_rate,
    "tune-thresholds": tune_thresholds,
    "cifar-main": cifar_main,
    "ablations": ablations,
    "online": online,
    "cifar-small-crops": cifar_small_crops,
    "convergence": convergence,
    "imagenette-tune": imagenette_tune,
    "imagenette-tune-folders": imagenette_tune_folders,
    "imagenette": imagenette,
    "convergence-wrong": convergence_wrong,
}
"""By name, in the order of their worth: what the runner does without being told which. Each is made from the results' folder."""

GPU_STUDIES: dict[str, Callable[[Path], Study]] = {
    "gpu-imagenette-resnet18": gpu_imagenette,
    "gpu-imagenette-resnet50": gpu_imagenette_resnet50,
}
"""Done only when named; bench/gpu.sh convergence names them, after imagenette-tune."""
ALL_STUDIES = STUDIES | GPU_STUDIES
