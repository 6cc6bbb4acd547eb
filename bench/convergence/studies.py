"""The experiments as plain data: which methods, on which images and labels, for how many steps, from which seeds.

README.md beside this file says why. A run is named by its arm (everything but the seed) and its seed; changing an arm here makes
new runs and leaves the rows of the old ones alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator

from bench.convergence.datasets import Images
from bench.convergence.stores import Labelling, Labels
from ferkd.regions import RegionPolicy


@dataclasses.dataclass(frozen=True)
class Teacher:
    spec: str
    weights: str | None = None
    """A file below the test data."""
    flags: tuple[str, ...] = ("--autocast", "bf16", "--batch-size", "128")
    """How `ferkd label` runs it."""


RESNET56 = "cifar10-teachers/resnet56-4bfd9763.th"
TEACHERS = {
    "resnet20": Teacher("python:bench.convergence.models:resnet20", "cifar10-teachers/resnet20-12fca82f.th"),
    "resnet56": Teacher("python:bench.convergence.models:resnet56", RESNET56),
    "resnet56-unnormalised": Teacher("python:bench.convergence.models:resnet56_unnormalised", RESNET56),
    "lite0": Teacher("python:lite0_teacher:make", flags=("--autocast", "bf16", "--batch-size", "32")),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How every method of a study trains its student: the budget is `steps` x `batch_size` crops. Nothing is left to ferkd's defaults."""

    student: str
    steps: int
    lr: float
    weight_decay: float = 5e-4
    batch_size: int = 128
    crops_per_image: int = 4
    single_crop_share: float = 0.25
    """The share of the steps, at the end, that take one crop an image."""
    warmup_share: float = 0.05
    image_size: int = 32
    amp: str = "bf16"
    evaluations: int = 1
    """How often val is read, evenly over the run; the last time at its end."""


@dataclasses.dataclass(frozen=True)
class Method:
    """What the student learns from: hard labels softened by the policy's smoothing, or stored labels under the policy."""

    name: str
    uses_labels: bool = True
    policy: RegionPolicy = RegionPolicy()
    mix: str = "none"
    temperature: float = 1.0

    def flags(self) -> list[str]:
        policy = self.policy
        flags = ["--smoothing", f"{policy.smoothing:g}", "--mix", self.mix, "--temperature", f"{self.temperature:g}", "--tail", "smooth"]
        if self.uses_labels:
            for name in ("discard_below", "calibrate_below", "discard_above"):
                flags += [f"--{name.replace('_', '-')}", f"{getattr(policy, name):g}"]
            flags += ["--confidence", policy.confidence]
        return flags + (["--tau-squared"] if self.temperature != 1.0 else [])


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train, apart from the seed. `labels` is None for hard labels, which draw fresh crops of at least `min_scale`."""

    method: Method
    recipe: Recipe
    images: Images
    min_scale: float
    labels: Labels | None = None
    varied: str = ""
    """What an ablation varies, and the value: "k = 3"."""

    def __post_init__(self) -> None:
        assert (self.labels is not None) == self.method.uses_labels, self.method.name
        assert self.labels is None or (self.labels.images, self.labels.min_scale) == (self.images, self.min_scale)

    @property
    def config(self) -> str:
        """12 hexadecimal digits that name all of it, by what ferkd is told: for the CSV's column and the run's folder."""
        recipe = dataclasses.asdict(self.recipe)
        told = [recipe, self.method.flags(), self.images.name, self.min_scale, self.labels.name if self.labels else None]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Study:
    name: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    again: tuple[Arm, ...] = ()
    """Those that are run once more, from seeds 1 and 2: what tuning chooses among."""

    def runs(self) -> Iterator[tuple[Arm, int]]:
        """Every method has its first seed before any has its second."""
        yield from ((arm, seed) for seed in self.seeds for arm in self.arms)
        yield from ((arm, seed) for seed in (1, 2) for arm in self.again)


# ---- The methods -----------------------------------------------------------------------------------------------------------------

HARD = Method("hard labels", uses_labels=False, policy=RegionPolicy(smoothing=0.0))
SMOOTH = Method("hard labels + smoothing", uses_labels=False)
FKD = Method("FKD")
FKD_MIX = Method("FKD + Mixup/CutMix", mix="mixup_cutmix")


def ferkd(confidence: str, discard_below: float, calibrate_below: float, name: str = "", mix: str = "none", **more: float) -> Method:
    policy = RegionPolicy(discard_below, calibrate_below, confidence=confidence, **more)  # type: ignore[arg-type]
    return Method(name or f"FerKD ({confidence})", policy=policy, mix=mix)


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------------------------

CIFAR, CIFAR_WRONG = Images("cifar10"), Images("cifar10", wrong=0.4)
STUDENT = "python:bench.convergence.models:small_student"
CROPS_STORED = {0.35: 10, 0.08: 20}
"""Crops of an image: all that were labelled, or those among them that are large enough."""


def cifar_labels(teacher: str, images: Images, min_scale: float, **more: int | str) -> Labels:
    labelling = Labelling(teacher, CIFAR, crops=20, min_scale=0.08)
    return Labels(labelling, images, CROPS_STORED[min_scale], min_scale, **more)  # type: ignore[arg-type]


def cifar_arm(method: Method, recipe: Recipe, images: Images, teacher: str, min_scale: float = 0.35) -> Arm:
    return Arm(method, recipe, images, min_scale, cifar_labels(teacher, images, min_scale) if method.uses_labels else None)


# Tuning sees the held-out tenth of train alone, with shorter runs. First the learning rate, for two methods at once.
SHORT = Recipe(STUDENT, steps=1500, lr=0.1)
CIFAR_TUNING, CIFAR_WRONG_TUNING = dataclasses.replace(CIFAR, held_out=True), dataclasses.replace(CIFAR_WRONG, held_out=True)


def tune_rate() -> Study:
    arms = [
        cifar_arm(method, dataclasses.replace(SHORT, lr=lr), CIFAR_TUNING, "resnet20")
        for lr in (0.05, 0.1, 0.2, 0.4)
        for method in (SMOOTH, FKD)
    ]
    return Study("tune-rate", tuple(arms), seeds=(0,))


RATE = 0.2

# Then the thresholds: (discard_below, calibrate_below), 0 for none.
GRID = {
    "max": ((0.5, 0.0), (0.7, 0.0), (0.9, 0.0), (0.0, 0.7), (0.0, 0.9), (0.5, 0.7), (0.5, 0.9), (0.7, 0.9)),
    "target": ((0.01, 0.0), (0.1, 0.0), (0.3, 0.0), (0.0, 0.3), (0.0, 0.7), (0.01, 0.3), (0.1, 0.5), (0.3, 0.7)),
}


# The best three of each from seed 0, FKD besides, by confidence and share of wrong ground truth.
FINALISTS: dict[tuple[str, float], tuple[tuple[float, float], ...]] = {}


def tune_thresholds() -> Study:
    recipe = dataclasses.replace(SHORT, lr=RATE)
    first, again = [], []
    for images in (CIFAR_TUNING, CIFAR_WRONG_TUNING):
        arms = {(name, at): ferkd(name, *at) for name, grid in GRID.items() for at in grid}
        first += [cifar_arm(method, recipe, images, "resnet20") for method in (FKD, *arms.values())]
        best = [arms[name, at] for (name, wrong), finalists in FINALISTS.items() for at in finalists if wrong == images.wrong]
        again += [cifar_arm(method, recipe, images, "resnet20") for method in ((FKD, *best) if best else ())]
    return Study("tune-thresholds", tuple(first), (0,), tuple(again))


# What tuning chose; the tables of the two studies show it. Thresholds by confidence and share of wrong ground truth.
CHOSEN: dict[tuple[str, float], tuple[float, float]] = {}
PRIMARY = "target"


def chosen(confidence: str, images: Images) -> Method:
    return ferkd(confidence, *CHOSEN[confidence, images.wrong])


def selfmix(images: Images) -> Method:
    return ferkd(PRIMARY, *CHOSEN[PRIMARY, images.wrong], name="FerKD + SelfMix", mix="selfmix")


LONG = Recipe(STUDENT, steps=3000, lr=RATE)
FIVE = (0, 1, 2, 3, 4)


def cifar_main() -> Study:
    """2 teachers x 2 shares of wrong ground truth, crops of scale 0.35 and more."""
    arms = []
    for images in (CIFAR, CIFAR_WRONG):
        hard = (HARD, SMOOTH) if images == CIFAR else (SMOOTH,)
        arms += [cifar_arm(method, LONG, images, "") for method in hard]
        for teacher in ("resnet20", "resnet56"):
            methods = [FKD, chosen("max", images), chosen("target", images), selfmix(images)]
            methods += [FKD_MIX] if images == CIFAR else []
            arms += [cifar_arm(method, LONG, images, teacher) for method in methods]
    return Study("cifar-main", tuple(arms), FIVE)


def cifar_small_crops() -> Study:
    """The same with crops from 0.08 on, which the teachers cannot judge."""
    arms = []
    for images in (CIFAR, CIFAR_WRONG):
        arms.append(cifar_arm(SMOOTH, LONG, images, "", 0.08))
        for teacher in ("resnet20", "resnet56"):
            arms += [cifar_arm(method, LONG, images, teacher, 0.08) for method in (FKD, chosen(PRIMARY, images), selfmix(images))]
    return Study("cifar-small-crops", tuple(arms), FIVE)


def convergence(images: Images = CIFAR) -> Study:
    """Budgets of 5, 10 and 41 epochs, each with its own cosine; val is read ten times a run, for the curves."""
    arms = [
        cifar_arm(method, dataclasses.replace(LONG, steps=steps, evaluations=10), images, "resnet56")
        for steps in (2000, 4000, 16000)
        for method in (SMOOTH, FKD, chosen(PRIMARY, images))
    ]
    return Study("convergence-wrong" if images.wrong else "convergence", tuple(arms), (0, 1, 2))


def convergence_wrong() -> Study:
    return convergence(CIFAR_WRONG)


# Ablations: 10,000 images, one thing varied at a time from FerKD as tuned.
FEW, FEW_WRONG = Images("cifar10", share=0.2), Images("cifar10", wrong=0.4, share=0.2)


def few_labels(images: Images, teacher: str = "resnet56", crops: int = 32, flags: tuple[str, ...] = (), **more: int | str) -> Labels:
    return Labels(Labelling(teacher, FEW, crops=32, min_scale=0.35, flags=flags), images, crops, 0.35, **more)  # type: ignore[arg-type]


def ablations() -> Study:
    arms: list[Arm] = []

    def add(varied: str, method: Method, images: Images = FEW, labels: Labels | None = None, **recipe: int) -> None:
        stored = (labels or few_labels(images)) if method.uses_labels else None
        arms.append(Arm(method, dataclasses.replace(SHORT, lr=RATE, **recipe), images, 0.35, stored, varied))  # type: ignore[arg-type]

    for images in (FEW, FEW_WRONG):
        base, other = chosen(PRIMARY, images), chosen("max" if PRIMARY == "target" else "target", images)
        low, middle = base.policy.discard_below, base.policy.calibrate_below
        for method in (base, FKD, SMOOTH):
            add("base", method, images)
        add(f"confidence = {other.policy.confidence}, as tuned", other, images)
        for discard in (0.0, 0.05, 0.2, 0.5):
            for calibrate in (0.0, 0.6):
                if (discard, calibrate) != (0.0, 0.0):
                    add(
                        f"thresholds = discard below {discard:g}, calibrate below {calibrate:g}", ferkd(PRIMARY, discard, calibrate), images
                    )
        for above in (0.999, 0.99, 0.9):
            add(f"discard above = {above:g}", ferkd(PRIMARY, low, middle, discard_above=above), images)
        for smoothing in (0.0, 0.3):
            # Where tuning calibrates nothing, smoothing acts on nothing: it is tried with calibration then.
            add(f"smoothing = {smoothing:g}", ferkd(PRIMARY, low, middle or max(low, 0.6), smoothing=smoothing), images)

    base = chosen(PRIMARY, FEW)
    for k in (1, 3, 10):
        add(f"k = {k}", base, labels=few_labels(FEW, k=k))
    for temperature in (2.0, 4.0):
        add(f"temperature = {temperature:g}", dataclasses.replace(base, temperature=temperature))
    for crops in (4, 8, 16):
        add(f"stored crops = {crops}", base, labels=few_labels(FEW, crops=crops))
    for m in (1, 2, 8):
        add(f"crops an image = {m}", base, crops_per_image=m)
    add("label codec = packed", base, labels=few_labels(FEW, codec="packed"))
    for method in (base, FKD):
        add("teacher fed = wrong normalisation", method, labels=few_labels(FEW, "resnet56-unnormalised", flags=("--skip-preflight",)))
        add("teacher fed = 48 px", method, labels=few_labels(FEW, flags=("--skip-preflight", "--input-size", "48")))
    return Study("ablations", tuple({arm.config: arm for arm in reversed(arms)}.values())[::-1], (0, 1, 2))


# ---- Imagenette ------------------------------------------------------------------------------------------------------------------

IMAGENETTE, IMAGENETTE_TUNING = Images("imagenette"), Images("imagenette", held_out=True)
RESNET10T = Recipe("timm:resnet10t", steps=1800, lr=0.1, weight_decay=5e-5, image_size=64)
IMAGENETTE_GRID = {
    "max": ((0.1, 0.0), (0.3, 0.0), (0.0, 0.3), (0.1, 0.3), (0.1, 0.5), (0.3, 0.5)),
    "target": ((0.01, 0.0), (0.1, 0.0), (0.0, 0.1), (0.01, 0.1), (0.01, 0.3), (0.1, 0.3)),
}
IMAGENETTE_CHOSEN: dict[str, tuple[float, float]] = {}


def imagenette_arm(method: Method, recipe: Recipe, images: Images) -> Arm:
    labels = Labels(Labelling("lite0", IMAGENETTE, crops=32, min_scale=0.08), images, crops=32, min_scale=0.08)
    return Arm(method, recipe, images, 0.08, labels if method.uses_labels else None)


def imagenette_tune() -> Study:
    recipe = dataclasses.replace(RESNET10T, steps=900)
    grid = [ferkd(confidence, *thresholds) for confidence in IMAGENETTE_GRID for thresholds in IMAGENETTE_GRID[confidence]]
    return Study("imagenette-tune", tuple(imagenette_arm(method, recipe, IMAGENETTE_TUNING) for method in (FKD, *grid)), (0,))


def imagenette() -> Study:
    tuned = {confidence: ferkd(confidence, *thresholds) for confidence, thresholds in IMAGENETTE_CHOSEN.items()}
    mixed = ferkd(PRIMARY, *IMAGENETTE_CHOSEN[PRIMARY], name="FerKD + SelfMix", mix="selfmix")
    methods = (SMOOTH, FKD, tuned["max"], tuned["target"], mixed, FKD_MIX)
    return Study("imagenette", tuple(imagenette_arm(method, RESNET10T, IMAGENETTE) for method in methods), FIVE)


STUDIES: dict[str, Callable[[], Study]] = {make.__name__.replace("_", "-"): make for make in (tune_rate, tune_thresholds)}
"""By name, in the order of their worth: what the runner does without being told which."""
