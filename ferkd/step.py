"""One training step: crops and labels to the loss, its gradient, the update, the moving average. Nothing in it waits for the device.

Student and loss, forward and backward, are one graph each when compiled (`fullgraph`: a break is an error). The update is PyTorch's
fused optimizer, a kernel or two for all weights, which also skips on the device an update whose gradient is not finite; compiling it
would gain nothing and cost GradScaler's knowledge of it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ferkd.data import CropBatch
from ferkd.distributed import Ranks
from ferkd.errors import InputError
from ferkd.loss import LossStats, ferkd_loss, label_mass
from ferkd.meter import Meter
from ferkd.mixing import MixedRows, draw_mixing, mix_pixels
from ferkd.normalise import Normalise
from ferkd.preprocessing import Preprocessing
from ferkd.recipes import TrainConfig
from ferkd.records import Records
from ferkd.regions import RegionPolicy
from ferkd.stream import CropStream
from ferkd.task import AMP_DTYPE, Task


class Part(NamedTuple):
    """The rows that pass through the student at once, on the device; `answers`: an online teacher's, ids and probabilities [B, k]."""

    batch: CropBatch
    mixed: MixedRows | None
    answers: tuple[Tensor, Tensor] | None


class ForwardPass(nn.Module):
    """uint8 crops and labels to the loss: normalise, mix, student, fused loss. One graph when compiled."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, config: TrainConfig, task: Task, device: torch.device) -> None:
        super().__init__()
        self.model, self.config, self.policy, self.classes = model, config, task.policy, len(task.classes)
        self.record_kind = (task.store.label_codec, task.store.k, task.store.classes) if task.store else None
        self.amp = AMP_DTYPE[config.amp]
        self.normalise = Normalise(preprocessing.input_size, preprocessing.mean, preprocessing.std, device)

    def forward(self, part: Part, upstream: Tensor | None, normalizer: Tensor | None) -> tuple[Tensor, LossStats]:
        config, mixed = self.config, part.mixed
        images = self.normalise(part.batch.pixels)
        if mixed is not None:
            images = mix_pixels(images, mixed)
        if not config.channels_last:
            images = images.contiguous()
        with torch.autocast(images.device.type, dtype=self.amp, enabled=self.amp is not None):
            logits = self.model(images)
        labels, policy = self._labels(part)
        loss, stats = ferkd_loss(
            logits, labels, part.batch.target, policy=policy, temperature=config.temperature, tail=config.tail,
            tau_squared=config.tau_squared, mix=(mixed.partner, mixed.lam) if mixed is not None else None, upstream=upstream,
            normalizer=normalizer, impl=config.impl, stats=True,
        )  # fmt: skip
        return loss, stats

    def mass(self, part: Part) -> Tensor:
        """The labels' mass, summed over the rows: 0-dim float32."""
        labels, policy = self._labels(part)
        mix = (part.mixed.partner, part.mixed.lam) if part.mixed is not None else None
        temperature, tail = self.config.temperature, self.config.tail
        return label_mass(labels, part.batch.target, classes=self.classes, policy=policy, temperature=temperature, tail=tail, mix=mix).sum()

    def _labels(self, part: Part) -> tuple[Records | tuple[Tensor, Tensor], RegionPolicy]:
        if part.answers is not None:
            return part.answers, self.policy
        if self.record_kind and part.batch.words is not None:
            return Records(part.batch.words, *self.record_kind), self.policy
        # The ground truth, softened: the same kernel with k = 1 and a smooth tail.
        certain = torch.full_like(part.batch.target[:, None], 1.0 - self.policy.smoothing, dtype=torch.float32)
        return (part.batch.target[:, None], certain), RegionPolicy()


class MovingAverage:
    """A copy of the model whose weights and buffers follow it: average += (1 - decay) (value - average) after every step.

    PyTorch's AveragedModel reads its counter back from the device at every step. The first steps use a decay of
    min(decay, (1 + step) / (10 + step)), or the random initial weights would be remembered for 1 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        self._averages, self._values = ([p[i] for p in pairs if p[0].is_floating_point()] for i in (0, 1))
        self._copies, self._counters = ([p[i] for p in pairs if not p[0].is_floating_point()] for i in (0, 1))

    @torch.no_grad()
    def update(self, step: int) -> None:
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._values, weight)
        if self._copies:
            torch._foreach_copy_(self._copies, self._counters)


class TrainStep:
    """A student and all that changes with it: optimizer, gradient scaler, moving average. Calling it does one step."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, config: TrainConfig, task: Task, ranks: Ranks) -> None:
        self.model, self.config, self.task, self.ranks = model.train(), config, task, ranks
        self.size, self.device = preprocessing.input_size, ranks.device
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.average = MovingAverage(model, config.ema_decay) if config.ema_decay else None
        self._forward_pass = ForwardPass(model, preprocessing, config, task, self.device)
        mode = compile_mode(config, ranks)
        self.compiles = mode != "no"
        forward: Any = self._forward_pass
        if self.compiles:  # inside DDP, whose own forward cannot be traced without breaks; it tells the compiler its buckets of gradients
            forward = torch.compile(forward, fullgraph=True, dynamic=False, mode=mode)
        self._forward = ranks.wrapped(forward)
        self._seen: set[Any] = set()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._statistics = [b for b in model.buffers() if b.is_floating_point()]

    @property
    def evaluated(self) -> nn.Module:
        """The model whose accuracy counts and whose weights are saved."""
        return self.average.module if self.average else self.model

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.average.module.state_dict() if self.average else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.module.load_state_dict(state["ema"])

    def __call__(self, batch: CropBatch, stream: CropStream, step: int, rate: float, meter: Meter) -> None:
        """Learn from one step's crops, this process's rows of it; adds loss and statistics to `meter`."""
        config = self.config
        parts = self._parts(batch, stream, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if not self.model.training:  # it was evaluated
            self.model.train()
        statistics = [buffer.clone() for buffer in self._statistics] if config.nan == "skip" else []
        # The gradient is computed together with the loss, so it must know the scale that backward() will bring.
        upstream = self.scaler.scale(torch.ones((), device=self.device)) if self.scaler.is_enabled() else None
        # A mean divides by the mass of all rows of the step, wherever they are; DDP then averages over the processes.
        normalizer = None
        if len(parts) * self.ranks.world > 1:
            mass = torch.stack([self._forward_pass.mass(part) for part in parts]).sum()
            normalizer = self.ranks.sum(mass) / self.ranks.world
        seen: list[tuple[Tensor, LossStats]] = []
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            averaging = contextlib.nullcontext() if last else self.ranks.without_averaging(self._forward)
            is_new = self._is_new(part)
            with averaging, meter.compiles(is_new):
                known = part, upstream, normalizer
                loss, stats = self._compiled(is_new, *known) if self.compiles else self._forward(*known)
                self.scaler.scale(loss).backward()
            seen.append((loss.detach(), stats))
        is_lost = self._update(statistics)
        for loss, stats in seen:
            meter.add(loss if is_lost is None else torch.where(is_lost, 0.0, loss), stats)
        meter.count(is_lost)
        if self.average:
            self.average.update(step)

    def _compiled(self, is_new: bool, *arguments: Any) -> tuple[Tensor, LossStats]:
        """The compiled forward pass; `is_new`: of a part that is the first of its kind. Raises InputError where it cannot be one graph."""
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        torch.compiler.cudagraph_mark_step_begin()
        answer: tuple[Tensor, LossStats]
        try:
            try:
                answer = self._forward(*arguments)
            except FailOnRecompileLimitHit:
                if not is_new:  # the student itself asks for another graph again and again
                    raise
                torch.compiler.reset()  # the graphs of this process's earlier trainings, of which it keeps so many and no more
                answer = self._forward(*arguments)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            said = "it asks for another graph again and again"
            if isinstance(error, TorchDynamoException):
                said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise InputError(
                f"compile: the student cannot be compiled as one graph ({said}); train it with --compile no, or mend it: "
                "TORCH_LOGS=graph_breaks,recompiles says where"
            ) from error
        return answer

    def _update(self, statistics: Sequence[Tensor]) -> Tensor | None:
        """Change the weights. Returns, under nan = skip, whether that was left out: 0-dim bool, on the device."""
        config, is_lost = self.config, None
        if config.clip_grad or config.nan == "skip":
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
            if config.clip_grad:
                torch.nn.utils.clip_grads_with_norm_(self._parameters, config.clip_grad, norm)
            if config.nan == "skip":
                is_lost = ~norm.isfinite()
                # What GradScaler tells a fused optimizer; it tells it itself where it is in use.
                if not self.scaler.is_enabled():
                    self.optimizer.grad_scale, self.optimizer.found_inf = None, is_lost.float()  # type: ignore[attr-defined]
                # BatchNorm has taken the lost step's activations into its running statistics.
                for buffer, before in zip(self._statistics, statistics, strict=True):
                    buffer.copy_(torch.where(is_lost, before, buffer))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return is_lost

    def _is_new(self, part: Part) -> bool:
        """Whether a part is the first of its kind, so that it is compiled now."""
        if not self.compiles:
            return False
        kind = (part.batch.pixels.shape, part.mixed is None)
        is_new = kind not in self._seen
        self._seen.add(kind)
        return is_new

    def _parts(self, batch: CropBatch, stream: CropStream, step: int) -> list[Part]:
        """This process's rows of a step in the parts that pass through the student at once, with their mixing and labels, on the device."""
        config, ranks = self.config, self.ranks
        crops = stream.crops_per_image(step)
        images = images_a_part(config, crops, ranks.world)
        parts = []
        for number in range(config.accumulate):
            first_slot = stream.first_slot(step) + (ranks.rank * config.accumulate + number) * images
            mixed = draw_mixing(config.mixing, config.seed, step, first_slot, images, crops, self.size)
            rows = batch.rows(slice(number * images * crops, (number + 1) * images * crops))
            own, mixed = _to_device((rows, mixed), self.device)
            answers = None
            if self.task.teacher:
                answers = self.task.teacher(own.pixels if own.teacher_pixels is None else own.teacher_pixels)
            parts.append(Part(own._replace(teacher_pixels=None), mixed, answers))
        return parts


def compile_mode(config: TrainConfig, ranks: Ranks) -> str:
    """torch.compile's mode, or `no`. Raises InputError for a mode that cannot be."""
    if config.sync_batchnorm and ranks.world > 1:
        if config.compile not in ("auto", "no"):
            raise InputError(f"compile: {config.compile} cannot trace PyTorch's SyncBatchNorm; train without one of the two")
        return "no"
    if config.compile == "auto":
        return "default" if ranks.device.type == "cuda" else "no"
    return config.compile


def images_a_part(config: TrainConfig, crops_per_image: int, world: int) -> int:
    """The images of a part: what one process passes through the student at once. Raises InputError when a step cannot be shared out so."""
    images, parts = config.batch_size // crops_per_image, world * config.accumulate
    said = f"{images} images a step, shared out over {world} process(es) in {config.accumulate} part(s) each,"
    if images % parts:
        raise InputError(f"batch_size: {said} are not even; choose a multiple of {parts * crops_per_image} crops")
    group = 1 if config.mixing.mix in ("none", "selfmix") else min(config.mixing.mix_group, images)
    if parts > 1 and images // parts % group:
        raise InputError(
            f"mix_group: {group} images find their partners among each other, but {said} are {images // parts} a part; "
            "choose a divisor of that"
        )
    return images // parts


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW over the weights that want a gradient, fused into a kernel or two."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": config.weight_decay}]
    if not config.decay_norms_and_biases:
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    if config.momentum:
        # PyTorch's fused SGD takes unset memory for its momentum when the very first update is skipped (seen in 2.11 to 2.14): fp16 often
        # begins so. Zeros make the first update what it would be without.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _to_device(value: Any, device: torch.device) -> Any:
    """The same nested tuples with every tensor on the device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        moved = (_to_device(part, device) for part in value)
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value
