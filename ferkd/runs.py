"""The files of a training run: settings, log, checkpoint, weights. Each appears whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ferkd
from ferkd.errors import InputError
from ferkd.recipes import TrainConfig
from ferkd.teacher import RUN_WEIGHTS, Preprocessing, save_weights


class RunFolder:
    """The files of a run. Each appears whole or not at all."""

    UNIMPORTANT = frozenset({"workers", "cache", "log_every", "eval_every"})  # may change between a stop and its resumption

    def __init__(
        self,
        path: Path,
        config: TrainConfig,
        identity: Mapping[str, Any],
        notes: Mapping[str, Any],
        resume: bool,
        say: Callable[[str], None],
        writer: bool = True,
    ) -> None:
        """`identity`: what, besides the settings, makes this run this run (JSON values). `notes`: what config.json should also say.

        Raises InputError when the folder holds a run and `resume` is False, or cannot be made.
        """
        self.path, self.resume, self.say, self.writer = path, resume, say, writer
        settings = dataclasses.asdict(config)
        self.identity = {**identity, **{name: value for name, value in settings.items() if name not in self.UNIMPORTANT}}
        self.machine = {
            "ferkd": ferkd.__version__,
            "torch": torch.__version__,
            "processor": _processor(),
            "threads": torch.get_num_threads(),
        }
        if not resume and any((self.path / name).exists() for name in ("checkpoint.pt", *RUN_WEIGHTS)):
            raise InputError(f"{path}: holds a run already; add --resume to go on with it, or choose another --out")
        if not writer:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.checkpoint.exists():
                (self.path / "log.jsonl").unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
        if not self.checkpoint.exists():
            self.write_json("config.json", {**notes, **identity, "machine": self.machine, "config": settings})

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    def load_checkpoint(self, device: torch.device) -> dict[str, Any] | None:
        """The state to resume from, or None to start at the beginning. Refuses the checkpoint of another model or other settings."""
        if not self.resume:
            return None
        if not self.checkpoint.exists():
            self.say(f"{self.path}: no checkpoint yet, so starting at the beginning")
            return None
        try:
            saved = torch.load(self.checkpoint, map_location=device, weights_only=True)
            identity, machine, state = json.loads(saved["identity"]), json.loads(saved["machine"]), saved["state"]
        except Exception as error:  # torch.load raises many kinds for a damaged file
            raise InputError(f"{self.checkpoint}: is no whole checkpoint ({type(error).__name__}); delete it to start again") from error
        mine = json.loads(json.dumps(self.identity))
        for name in sorted(mine.keys() | identity.keys()):
            if mine.get(name) != identity.get(name):
                raise InputError(
                    f"{self.checkpoint}: was made with {name} = {identity.get(name)!r}, this command says {mine.get(name)!r}; "
                    "resume with the same settings, or choose another --out"
                )
        for name, value in self.machine.items():
            if machine.get(name) != value:
                self.say(
                    f"warning: resuming with {name} {value} what was begun with {machine.get(name)}: results may differ in the last bits"
                )
        if self.writer:
            self._forget_log_after(state["step"], state["assessed"])
        return dict(state)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        if not self.writer:
            return
        buffer = io.BytesIO()
        torch.save({"identity": json.dumps(self.identity), "machine": json.dumps(self.machine), "state": state}, buffer)
        self._write("checkpoint.pt", buffer.getvalue())

    def save_weights(
        self, which: str, model: nn.Module, classes: tuple[str, ...], preprocessing: Preprocessing, extra: dict[str, str]
    ) -> None:
        if self.writer:
            save_weights(self.path / f"{which}.safetensors", model, self.identity["student"], classes, preprocessing, extra)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        if self.writer:
            self._write(name, (json.dumps(value, indent=2) + "\n").encode())

    def log(self, line: Mapping[str, Any]) -> None:
        if not self.writer:
            return
        with self._naming("log.jsonl"), open(self.path / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def _forget_log_after(self, step: int, assessed: int) -> None:
        """Drop the lines of steps, and of evaluations after step `assessed`, that the interruption lost: they will be done again."""
        log = self.path / "log.jsonl"
        if log.exists():
            kept = []
            for text in log.read_text().splitlines():
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    continue  # the line that was being written
                if line["step"] <= (assessed if line["kind"] == "eval" else step):
                    kept.append(text + "\n")
            self._write("log.jsonl", "".join(kept).encode())

    def _write(self, name: str, data: bytes) -> None:
        temporary = self.path / f".{name}.tmp"
        with self._naming(name):
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path / name)
            except OSError:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Turns an OSError of writing into an InputError that names the file and says what to do."""
        try:
            yield
        except OSError as error:
            cure = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make its folder writable"
            raise InputError(f"{self.path / name}: cannot be written ({error.strerror}); {cure} and go on with --resume") from error


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
