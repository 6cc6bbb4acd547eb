"""Every setting of a training run in one frozen dataclass, and named settings as plain functions that return one.

`ferkd train --recipe NAME` starts from a recipe; flags then change single settings. The resolved settings are saved with the run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

from ferkd.crops import Interpolation
from ferkd.errors import InputError
from ferkd.mixing import Mixing
from ferkd.regions import RegionPolicy


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a student is trained. One epoch is as many crops as there are usable images (FKD's counting); batches are counted in crops."""

    epochs: float = 100.0
    """Length of training; one epoch is as many crops as there are usable images."""
    batch_size: int = 256
    """Crops a step, over all processes."""
    crops_per_image: int = 4
    """m: crops taken from one decoded photograph. Fewer cost more decoding; in batches of 128 they learnt better (docs/results.md)."""
    single_crop_epochs: float | None = None
    """The last epochs, which take one crop an image. Default: m, as FKD does, but at most a quarter of all."""
    single_crop_warmup: bool = False
    """Whether the warm-up epochs take one crop an image (FKD's ViT recipe)."""

    image_size: int | None = None
    """Pixels, square. Default: what the student was made for."""
    eval_crop_pct: float | None = None
    """Evaluation shows the middle image_size pixels after resizing the shorter side to image_size / this. Default: the student's own."""
    interpolation: Interpolation | None = None
    """How crops are resized, in training and evaluation. Default: the student's own way."""
    min_scale: float = 0.08
    """Smallest area of a fresh crop, as a share of the photograph; for training without labels."""
    flip: bool = True
    """Whether half of the fresh crops are mirrored; for training without labels (stored crops know)."""

    policy: RegionPolicy = RegionPolicy()
    thresholds: Literal["probability", "quantile"] = "probability"
    """Whether the policy's thresholds are probabilities or shares of the store's crops: discard_below 0.1 then means the lowest tenth."""
    topk: int | None = None
    """Answers kept of an online teacher (--teacher); a store brings its own. Default: 5, or all of fewer."""
    teacher_classes: Literal["teacher", "folder"] = "teacher"
    """Of an online teacher: learn all of its classes, or only the folders'."""
    mixing: Mixing = Mixing()
    temperature: float = 1.0
    """T: students' logits are divided by it and stored labels softened to match."""
    tail: Literal["smooth", "renorm"] = "smooth"
    """What becomes of the probability that is not stored: spread evenly over the other classes, or divided away."""
    tau_squared: bool = False
    """Multiply the loss by T^2, so that gradients keep their size."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float = 0.1
    """The highest learning rate, for this batch size: nothing is rescaled behind your back."""
    weight_decay: float = 1e-4
    """Of every weight, or only of matrices and filters: see the next."""
    decay_norms_and_biases: bool = True
    """Whether weight decay acts on vectors too (normalisation and biases)."""
    momentum: float = 0.9
    """Of SGD."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up. Default: a twentieth of all."""
    min_lr: float = 0.0
    """The rate at the end of the cosine."""
    lr_step: Literal["step", "pass"] = "step"
    """`pass` holds the rate constant while the images are visited once, as FKD's epoch counter does."""
    accumulate: int = 1
    """Parts in which a process passes its share of a step through the student: less memory, the same gradients (but for BatchNorm)."""
    sync_batchnorm: bool = False
    """BatchNorm over the crops of all processes (GPUs only); otherwise over each process's own."""
    clip_grad: float | None = None
    """Largest norm of the gradient."""
    drop_path: float = 0.0
    """Stochastic depth of a timm student."""
    ema_decay: float | None = None
    """Decay a step of a moving average of the weights, which is then what is evaluated and saved."""

    amp: Literal["none", "bf16", "fp16"] = "none"
    """Mixed precision of the student; fp16 scales its gradients."""
    channels_last: bool = True
    """Memory layout of pixels and weights; the fast one for convolutions."""
    compile: Literal["auto", "no", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "auto"
    """torch.compile student and loss, forward and backward, without graph breaks: `no`, or a mode of torch.compile's (--compile alone:
    default). `auto`: on a GPU; on a CPU it is slower. reduce-overhead and max-autotune record CUDA graphs."""
    nan: Literal["stop", "skip"] = "stop"
    """What becomes of a gradient that is not finite: training stops, or that update is skipped and counted."""
    impl: Literal["auto", "cuda", "triton", "cpu", "reference"] = "auto"
    """Backend of the loss; a named one that cannot run refuses."""
    workers: int | None = None
    """Loader processes. Default: one a core but one, at most 8."""
    cache: Literal["none", "decoded"] = "none"
    """`decoded` keeps every decoded photograph in shared memory, once for each process of torchrun's."""
    seed: int = 0
    """Of initial weights, order of images and crops, and mixing."""

    eval_every: float = 10.0
    """Epochs between evaluations and checkpoints; the end is always evaluated."""
    log_every: int = 50
    """Steps between lines of the log."""

    def __post_init__(self) -> None:
        for name in ("epochs", "lr", "temperature", "eval_every"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"{name}: {getattr(self, name)} is not a positive number")
        for name in ("batch_size", "crops_per_image", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is less than 1")
        if not (math.isfinite(self.warmup) and self.warmup >= 0):
            raise InputError(f"warmup_epochs: {self.warmup_epochs} is not a number of at least 0")
        for name in ("weight_decay", "min_lr", "momentum"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"{name}: {getattr(self, name)} is not a number of at least 0")
        if self.batch_size % self.crops_per_image:
            raise InputError(
                f"batch_size: {self.batch_size} crops are no multiple of crops_per_image {self.crops_per_image}; "
                "make it one (FKD: 1024 = 256 x 4)"
            )
        if self.warmup > self.epochs:
            raise InputError(f"warmup_epochs: {self.warmup_epochs} are more than the {self.epochs} epochs of training")
        if self.min_lr > self.lr:
            raise InputError(f"min_lr: {self.min_lr} is above lr {self.lr}")
        if not 0.0 < self.min_scale <= 1.0:
            raise InputError(f"min_scale: {self.min_scale} is not a share of the photograph's area; give a number above 0, at most 1")
        if self.eval_crop_pct is not None and not 0.0 < self.eval_crop_pct <= 1.0:
            raise InputError(f"eval_crop_pct: {self.eval_crop_pct} is not a share; give a number above 0, at most 1")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise InputError(f"ema_decay: {self.ema_decay} is not between 0 and 1")
        if self.image_size is not None and self.image_size < 1:
            raise InputError(f"image_size: {self.image_size} pixels; give at least 1")
        if self.single_crop_epochs is not None and not self.single_crop_epochs >= 0:
            raise InputError(f"single_crop_epochs: {self.single_crop_epochs} is not a number of at least 0")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise InputError(f"clip_grad: {self.clip_grad} is not a positive number")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise InputError(f"betas: {self.betas}; give two numbers of at least 0 and below 1")
        if not 0.0 <= self.drop_path < 1.0:
            raise InputError(f"drop_path: {self.drop_path}; give a probability of at least 0 and below 1")
        if self.compile in ("reduce-overhead", "max-autotune") and self.accumulate > 1:
            raise InputError(
                f"compile: {self.compile} records CUDA graphs, whose gradients the next part of a step would overwrite; "
                "use accumulate 1, or --compile default"
            )
        if self.topk is not None and self.topk < 1:
            raise InputError(f"topk: {self.topk}; give a whole number of at least 1")
        if self.workers is not None and self.workers < 0:
            raise InputError(f"workers: {self.workers}; give a whole number of at least 0")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"seed: {self.seed}; give a whole number from 0 to 4,294,967,295")

    @property
    def warmup(self) -> float:
        """Epochs of warm-up, resolved."""
        return self.epochs / 20 if self.warmup_epochs is None else self.warmup_epochs

    @property
    def last_single(self) -> float:
        """The last epochs that take one crop an image, resolved."""
        return min(self.crops_per_image, self.epochs / 4) if self.single_crop_epochs is None else self.single_crop_epochs

    def learning_rate(self, epoch: float) -> float:
        """The rate after `epoch` epochs' worth of crops: linear warm-up from lr / 100, then a cosine down to min_lr."""
        if epoch < self.warmup:
            return self.lr * max(0.01, epoch / self.warmup)
        progress = min(1.0, (epoch - self.warmup) / max(self.epochs - self.warmup, 1e-9))
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def default() -> TrainConfig:
    """A start for photographs of any kind: SGD, cosine, 4 crops an image."""
    return TrainConfig(weight_decay=5e-5, decay_norms_and_biases=False)


def small_images() -> TrainConfig:
    """CIFAR-like pictures of at most 64 pixels, where a small batch and the whole picture at evaluation do best."""
    return TrainConfig(epochs=60.0, batch_size=128, weight_decay=5e-4, eval_crop_pct=1.0, cache="decoded", decay_norms_and_biases=False)


def fkd_resnet50() -> TrainConfig:
    """FKD's ResNet-50 recipe: SGD 0.1, momentum 0.9, weight decay 1e-4, 300 epochs of cosine without warm-up, 1,024 = 256 x 4 crops a
    step, bilinear crops, the middle 224 pixels of 256 at evaluation."""
    return TrainConfig(
        epochs=300.0, batch_size=1024, crops_per_image=4, lr=0.1, weight_decay=1e-4, warmup_epochs=0.0, lr_step="pass", image_size=224,
        interpolation="bilinear", eval_crop_pct=0.875, amp="bf16",
    )  # fmt: skip


def fkd_vit() -> TrainConfig:
    """FKD's ViT recipe: AdamW 0.002, weight decay 0.05, 5 warm-up epochs of one crop an image, down to 1e-5, drop-path 0.1."""
    return TrainConfig(
        epochs=300.0, batch_size=1024, crops_per_image=4, optimizer="adamw", lr=0.002, weight_decay=0.05, warmup_epochs=5.0,
        single_crop_warmup=True, min_lr=1e-5, lr_step="pass", drop_path=0.1, image_size=224, interpolation="bilinear", eval_crop_pct=0.875,
        decay_norms_and_biases=False, amp="bf16",
    )  # fmt: skip


def ferkd_resnet50() -> TrainConfig:
    """FKD's ResNet-50 recipe with FerKD's rule. The paper's thresholds are not published: these are placeholders of ours, so inspect your
    store and choose (`ferkd inspect`)."""
    return dataclasses.replace(fkd_resnet50(), policy=RegionPolicy(discard_below=0.05, calibrate_below=0.15, confidence="max"))


def ferkd_vit() -> TrainConfig:
    """FKD's ViT recipe with FerKD's rule, and the same placeholders as ferkd_resnet50."""
    return dataclasses.replace(fkd_vit(), policy=ferkd_resnet50().policy)


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe for recipe in (default, small_images, fkd_resnet50, fkd_vit, ferkd_resnet50, ferkd_vit)
}


def recipe(name: str) -> TrainConfig:
    """The settings of a named recipe. Raises InputError for an unknown name."""
    if name not in RECIPES:
        raise InputError(f"recipe: {name!r} is unknown; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()
