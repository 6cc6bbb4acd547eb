"""What the loss costs inside one training step: a ResNet-50 of 224 pixels, compiled, with ferkd_loss and with PyTorch's cross_entropy.

    python bench/profile_step.py                          writes ${OUT:-bench/results}/step-DEVICE.csv and prints the ten dearest kernels
    python bench/profile_step.py --model tiny --eager      to try the script itself, on a CPU too

The step: bfloat16 autocast, channels_last, student and loss in one graph of torch.compile, backward, SGD with momentum. ferkd_loss
gets `upstream=` and `normalizer=`, as a loop would that knows them. Images lie on the device: no loader is measured. Step times come
from steps without the profiler; kernels and their times from three profiled steps. "Kernels of the loss" are what runs under a
ferkd:: op, and whatever has the loss in its name (torch.compile names fused kernels after what is in them: such a kernel may hold
other work too, so for cross_entropy the figure is an upper bound). On a CPU the "kernels" are PyTorch's ops and their own time, and what
torch.compile fused into one is not told apart.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import loss_variants, machine
from bench.loss_variants import POLICY, K, Problem
from ferkd import Records, ferkd_loss
from ferkd.loss import label_mass

NAMED_AFTER_A_LOSS = re.compile(r"ferkd|log_softmax|nll_loss|cross_entropy")
WARM_UP, PROFILED = 5, 3
Step = Callable[[], object]


def student(name: str, classes: int) -> nn.Module:
    """A model by name, from timm or else from torchvision; `tiny` is two convolutions."""
    if name == "tiny":
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes)
        )
    try:
        import timm
    except ImportError:
        import torchvision

        model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes)
    else:
        model = timm.create_model(name, num_classes=classes)
    return model


def training_step(loss_name: str, p: Problem, images: Tensor, model_name: str, *, compiled: bool) -> Step:
    """A function of nothing that does one whole step."""
    device = images.device
    torch.manual_seed(0)
    model = student(model_name, p.logits.shape[1]).to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    normalizer = label_mass(p.records(), p.target, classes=p.logits.shape[1], policy=POLICY).sum()

    def forward(images: Tensor, words: Tensor, target: Tensor, upstream: Tensor, normalizer: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(images)
            if loss_name == "hard_labels":
                return F.cross_entropy(logits, target, label_smoothing=POLICY.smoothing)
            labels = Records(words, "half", K, logits.shape[1])
            loss = ferkd_loss(logits, labels, target, policy=POLICY, upstream=upstream, normalizer=normalizer)
            assert isinstance(loss, Tensor)  # no statistics were asked for
        return loss

    run = torch.compile(forward, fullgraph=True, dynamic=False) if compiled else forward

    def step() -> None:
        loss = run(images, p.half, p.target, p.one, normalizer)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def step_seconds(step: Step, device: torch.device, seconds: float) -> list[float]:
    """Wall-clock seconds of single steps, each waited for: at least five of them."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def profiled(step: Step, device: torch.device) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """(every kernel, the loss's kernels) of the profiled steps, as (name, milliseconds)."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as recorded:
        for _ in range(PROFILED):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    events = recorded.events()
    if device.type == "cpu":
        kernels = [(event.name, event.self_cpu_time_total / 1e3) for event in events]
        return kernels, [kernel for kernel in kernels if NAMED_AFTER_A_LOSS.search(kernel[0])]
    kernels = [
        (event.name, event.time_range.elapsed_us() / 1e3)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    under_ops = list(launched_by(events))
    others = {name for name, _ in under_ops}
    return kernels, under_ops + [kernel for kernel in kernels if NAMED_AFTER_A_LOSS.search(kernel[0]) and kernel[0] not in others]


def launched_by(events: Iterable[Any], *, inside: bool = False) -> Iterable[tuple[str, float]]:
    """The kernels launched under ops named ferkd::, each once."""
    for event in events:
        ours = event.name.startswith("ferkd::")
        if inside or (ours and not has_ferkd_above(event)):
            yield from ((kernel.name, kernel.duration / 1e3) for kernel in event.kernels)
            yield from launched_by(event.cpu_children, inside=True)


def has_ferkd_above(event: Any) -> bool:
    above = event.cpu_parent
    while above is not None:
        if above.name.startswith("ferkd::"):
            return True
        above = above.cpu_parent
    return False


def print_dearest(kernels: list[tuple[str, float]], count: int = 10) -> None:
    totals: dict[str, list[float]] = {}
    for name, ms in kernels:
        totals.setdefault(name, []).append(ms)
    whole = sum(ms for _, ms in kernels)
    for name, each in sorted(totals.items(), key=lambda item: -sum(item[1]))[:count]:
        print(f"  {sum(each) / PROFILED:>9.4f} ms  {sum(each) / whole:>6.1%}  x{len(each) / PROFILED:<6g} {name[:80]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=5.0, help="of timed steps for each loss")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    settings = parser.parse_args()
    device = machine.device()
    p = loss_variants.problem(settings.batch, settings.classes, torch.bfloat16, device)
    images = torch.randn(settings.batch, 3, settings.size, settings.size, device=device).to(memory_format=torch.channels_last)
    folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{machine.file_name(device)}.csv"

    rows: list[dict[str, Any]] = []
    for loss_name in ("ferkd", "hard_labels"):
        torch._dynamo.reset()
        started = time.perf_counter()
        step = training_step(loss_name, p, images, settings.model, compiled=not settings.eager)
        for _ in range(WARM_UP):
            step()
        warm_up = time.perf_counter() - started
        times = step_seconds(step, device, settings.seconds)
        kernels, of_loss = profiled(step, device)
        p20, median, p80 = (statistics.quantiles(times, n=10)[i] for i in (1, 4, 7))
        all_ms, loss_ms = (sum(ms for _, ms in part) / PROFILED for part in (kernels, of_loss))
        rows.append(
            {
                "loss": loss_name,
                "step_ms": f"{median * 1e3:.3f}",
                "p20_ms": f"{p20 * 1e3:.3f}",
                "p80_ms": f"{p80 * 1e3:.3f}",
                "steps": len(times),
                "kernels": f"{len(kernels) / PROFILED:g}",
                "kernels_ms": f"{all_ms:.4f}",
                "loss_kernels": f"{len(of_loss) / PROFILED:g}" if of_loss else "",
                "loss_ms": f"{loss_ms:.4f}" if of_loss else "",
                "loss_share": f"{loss_ms / all_ms:.5f}" if of_loss else "",
                "model": settings.model,
                "batch": settings.batch,
                "size": settings.size,
                "classes": settings.classes,
                "compiled": not settings.eager,
                "torch": torch.__version__,
                "triton": machine.version("triton"),
                "device": machine.device_name(device),
            }
        )
        with open(path, "w", newline="") as file:  # at once: compiling the second may outlast the time there is
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        spread = f"p20 {p20 * 1e3:.3f}, p80 {p80 * 1e3:.3f}, {len(times)} steps, warm-up {warm_up:.0f} s"
        of_it = f"{len(of_loss) / PROFILED:g}, {loss_ms:.4f} ms, {loss_ms / all_ms:.2%} of it" if of_loss else "not told apart"
        print(f"{loss_name}: step {median * 1e3:.3f} ms ({spread})")
        print(f"  {len(kernels) / PROFILED:g} kernels, {all_ms:.4f} ms; the loss's {of_it}", flush=True)
        print_dearest(kernels)
        if of_loss:
            print("  of the loss:")
            print_dearest(of_loss, 5)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
