"""Folders of runs as training leaves them, made up: with any names and settings, whole or damaged."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ferkd.recipes import TrainConfig


def config_json(steps: int = 100, store: str | None = None, config: TrainConfig | None = None, **changes: Any) -> dict[str, Any]:
    """What RunFolder writes."""
    settings = dataclasses.asdict(config or TrainConfig())
    return {
        "pretrained": False, "teacher_spec": None, "policy": settings["policy"], "data": "photos", "labels": "labels" if store else None,
        "init": None, "teacher_weights": None, "student": "resnet18", "steps": steps, "classes": 3, "images": 24, "store": store,
        "teacher": None, "photos": None if store else "f" * 64, "machine": {"torch": "2.14.1", "threads": 2}, "config": settings, **changes,
    }  # fmt: skip


def train_line(step: int, **changes: Any) -> dict[str, Any]:
    share = 0.3 + 0.1 * math.sin(step)
    return {
        "kind": "train", "step": step, "epoch": step / 2, "crops": 12 * step, "seconds": step / 4, "lr": 0.1, "loss": 3 / (1 + step / 20),
        "train_top1": step / 200, "regions": {"discarded": 0.0, "calibrated": share, "kept": 1 - share}, "crops_per_second": 480.0 + step,
        "data_wait": 0.125, "memory_mib": 512.0, **changes,
    }  # fmt: skip


def eval_line(step: int, **changes: Any) -> dict[str, Any]:
    top1 = step / 150
    return {"kind": "eval", "step": step, "epoch": step / 2, "crops": 12 * step, "seconds": step / 4, "top1": top1, "top5": 0.9,
            "top1_folders": top1, "images": 12, "best_top1": top1, **changes}  # fmt: skip


def log_lines(steps: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        found.append(train_line(step))
        if step % 50 == 0:
            found.append(eval_line(step))
    return found


def summary_json(steps: int = 100, **changes: Any) -> dict[str, Any]:
    top1 = steps / 150
    return {
        "student": "resnet18", "method": "FerKD", "steps": steps, "crops": 12 * steps, "seconds": steps / 4, "top1": top1, "top5": 0.9,
        "top1_folders": top1, "best_top1": top1, "val_images": 12, "usable_images": 24,
        "stored_regions": {"discarded": 10, "calibrated": 30, "kept": 60}, "policy": {}, "run": "runs/x", **changes,
    }  # fmt: skip


def write_run(folder: Path, steps: int = 100, summary: dict[str, Any] | None = None, **config: Any) -> Path:
    """A finished run of `steps` steps, logged every 10 and evaluated every 50."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json(steps, **config)))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log_lines(steps)))
    (folder / "summary.json").write_text(json.dumps(summary or summary_json(steps)))
    return folder
