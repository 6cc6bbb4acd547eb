"""What an experiment is made of: teachers, recipes, methods, arms, studies; plain data.

A run is named by its arm (everything but the seed) and its seed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator

from bench.convergence.datasets import Images
from bench.convergence.stores import Labels
from ferkd.regions import RegionPolicy


@dataclasses.dataclass(frozen=True)
class Teacher:
    spec: str
    weights: str | None = None
    """A file below the test data."""
    flags: tuple[str, ...] = ("--autocast", "bf16", "--batch-size", "128")
    """How `ferkd label` runs it."""


LITE0 = Teacher("python:lite0_teacher:make", flags=("--autocast", "bf16", "--batch-size", "32"))
RESNET56 = "cifar10-teachers/resnet56-4bfd9763.th"
TEACHERS = {
    "resnet20": Teacher("python:bench.convergence.models:resnet20", "cifar10-teachers/resnet20-12fca82f.th"),
    "resnet56": Teacher("python:bench.convergence.models:resnet56", RESNET56),
    "resnet56-unnormalised": Teacher("python:bench.convergence.models:resnet56_unnormalised", RESNET56),
    "lite0": LITE0,
    "lite0-folders": dataclasses.replace(LITE0, flags=(*LITE0.flags, "--classes", "folder")),
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
    """What the student learns from: hard labels softened by the policy's smoothing, stored labels under the policy, or a teacher online."""

    name: str
    uses_labels: bool = True
    policy: RegionPolicy = RegionPolicy()
    mix: str = "none"
    temperature: float = 1.0
    online: str = ""
    """A teacher that is asked for every fresh crop instead."""

    def flags(self) -> list[str]:
        policy = self.policy
        flags = ["--smoothing", f"{policy.smoothing:g}", "--mix", self.mix, "--temperature", f"{self.temperature:g}", "--tail", "smooth"]
        if self.uses_labels:
            for name in ("discard_below", "calibrate_below", "discard_above"):
                flags += [f"--{name.replace('_', '-')}", f"{getattr(policy, name):g}"]
            flags += ["--confidence", policy.confidence]
        if self.online:
            flags += ["--teacher", TEACHERS[self.online].spec, "--topk", "5", "--skip-preflight"]
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


FIVE, EXTENSION = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)


@dataclasses.dataclass(frozen=True)
class Study:
    name: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    again: tuple[Arm, ...] = ()
    """Those that are run once more, from seeds 1 and 2: what tuning chooses among."""
    extended: tuple[Arm, ...] = ()
    """Those that the rule for more seeds asks for: they have EXTENSION too."""

    def runs(self) -> Iterator[tuple[Arm, int]]:
        """Every method has its first seed before any has its second."""
        yield from ((arm, seed) for seed in self.seeds for arm in self.arms)
        yield from ((arm, seed) for seed in (1, 2) for arm in self.again)
        yield from ((arm, seed) for seed in EXTENSION for arm in self.extended)


# ---- The methods -----------------------------------------------------------------------------------------------------------------

HARD = Method("hard labels", uses_labels=False, policy=RegionPolicy(smoothing=0.0))
SMOOTH = Method("hard labels + smoothing", uses_labels=False)
FKD = Method("FKD")
ONLINE = Method("online teacher", uses_labels=False, online="resnet56")
FKD_MIX = Method("FKD + Mixup/CutMix", mix="mixup_cutmix")


def ferkd(confidence: str, discard_below: float, calibrate_below: float, name: str = "", mix: str = "none", **more: float) -> Method:
    policy = RegionPolicy(discard_below, calibrate_below, confidence=confidence, **more)  # type: ignore[arg-type]
    return Method(name or f"FerKD ({confidence})", policy=policy, mix=mix)
