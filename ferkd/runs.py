"""The files of a training run: settings, log, checkpoints, weights. Each appears whole or not at all.

A checkpoint is PyTorch's own file, which torch.load reads, followed by a seal: step, length and SHA-256. torch.load alone takes a
flipped bit for a weight.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import platform
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast, get_args

import torch
from torch import Tensor, nn

import ferkd
from ferkd.durable import JobLock, sync_folder
from ferkd.errors import InputError
from ferkd.preprocessing import Preprocessing
from ferkd.recipes import TrainConfig
from ferkd.remote import refuse_url
from ferkd.weights import RUN_WEIGHTS, save_weights

Resume = Literal["never", "auto", "must"]

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"
_MAGIC = b"FERKDRUN"
_SEAL_HEAD = struct.Struct("<8sQQ")  # magic, step, bytes before the seal; then the SHA-256 of those bytes and of these
_SEAL_SIZE = _SEAL_HEAD.size + hashlib.sha256().digest_size


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Within the block no other training may use the run's folder, which is made if need be. Raises InputError where one does already."""
    refuse_url(path, "out")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
    lock = JobLock(path / "lock", "another ferkd train")
    try:
        yield
    finally:
        lock.release()


class RunFolder:
    """The files of a run. Each appears whole or not at all.

    Of two checkpoints, checkpoint.pt and checkpoint-previous.pt, one is whole at every moment; the second is of an earlier step.
    """

    # May change between a stop and its resumption. `compile` may too, but is a machine fact: it changes the last bits.
    UNIMPORTANT = frozenset({"workers", "cache", "log_every", "eval_every", "compile"})

    def __init__(
        self,
        path: Path,
        config: TrainConfig,
        identity: Mapping[str, Any],
        notes: Mapping[str, Any],
        resume: bool | Resume,
        say: Callable[[str], None],
        *,
        world_size: int = 1,
        writer: bool = True,
    ) -> None:
        """`identity`: what, besides the settings, makes this run this run (JSON values). `notes`: what config.json should also say.
        `resume`: `never` refuses a folder that holds a run, `auto` (or True) goes on if there is a checkpoint, `must` refuses without one.
        `writer`: False on every process but the first; such a folder loads, and whatever is written or said is dropped.

        Raises InputError for what `resume` refuses, and when the folder cannot be made.
        """
        refuse_url(path, "out")
        self.path, self.writer = path, writer
        self.resume = _resume_mode(resume)
        self.say: Callable[[str], None] = say if writer else lambda line: None
        self.resumed_step: int | None = None
        self._newest: int | None = None  # the step of a checkpoint.pt that is known to be whole
        settings = dataclasses.asdict(config)
        self.identity = {**identity, **{name: value for name, value in settings.items() if name not in self.UNIMPORTANT}}
        self.machine = {
            "ferkd": ferkd.__version__,
            "torch": torch.__version__,
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "compile": config.compile,
            "world_size": world_size,
        }
        if not writer:
            return
        weights = any((path / name).exists() for name in RUN_WEIGHTS)
        if self.resume == "never" and (weights or self._checkpoints()):
            raise InputError(f"{path}: holds a run already; add --resume to go on with it, or choose another --out")
        if self.resume == "must" and not self._checkpoints():
            raise InputError(f"{path}: holds no checkpoint to resume from; check --out, or leave out --resume must to start a run")
        if weights and not self._checkpoints():
            raise InputError(f"{path}: holds the weights of a run, but no checkpoint to go on from; choose another --out")
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name in (CHECKPOINT, "log.jsonl", "config.json", "loggers.json", "summary.json", *RUN_WEIGHTS):
                for left_by_a_kill in path.glob(f".{name}*.tmp"):
                    left_by_a_kill.unlink()
            if not self._checkpoints():
                (path / "log.jsonl").unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
        if not self._checkpoints():
            self.write_json("config.json", {**notes, **identity, "machine": self.machine, "config": settings})

    def _checkpoints(self) -> list[Path]:
        """Those that exist, newest first."""
        return [path for name in (CHECKPOINT, PREVIOUS) if (path := self.path / name).exists()]

    def load_checkpoint(self, device: torch.device) -> dict[str, Any] | None:
        """The state to resume from, or None to start at the beginning. A damaged newest checkpoint gives way to the previous one.

        Raises InputError for a checkpoint of another model or other settings, and when none is whole.
        """
        if self.resume == "never":
            return None
        found = self._checkpoints()
        if not found:
            if self.resume == "must":
                raise InputError(f"{self.path}: holds no checkpoint to resume from; check --out")
            self.say(f"{self.path}: no checkpoint yet, so starting at the beginning")
            return None
        damages = []
        for path in found:
            try:
                step = sealed_step(path)
                break
            except (OSError, ValueError) as error:
                damages.append(f"{path}: is no whole checkpoint ({error})")
        else:
            raise InputError(f"{'; '.join(damages)}; copy it from elsewhere, or start again with another --out")
        if path.name == PREVIOUS:
            why = damages[0] if damages else f"{self.path / CHECKPOINT}: is missing"
            self.say(f"warning: {why}; going on from {PREVIOUS}, step {step:,}")
        try:
            saved = torch.load(path, map_location=device, weights_only=True)
            identity, machine, state = json.loads(saved["identity"]), json.loads(saved["machine"]), saved["state"]
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # torch.load raises many kinds
            text = " ".join(str(error).split())
            raise InputError(f"{path}: is whole, but cannot be read by PyTorch {torch.__version__} ({text})") from error
        mine = json.loads(json.dumps(self.identity))
        for name in sorted(mine.keys() | identity.keys()):
            if mine.get(name) != identity.get(name):
                raise InputError(
                    f"{path}: was made with {name} = {identity.get(name)!r}, this command says {mine.get(name)!r}; "
                    "resume with the same settings, or choose another --out"
                )
        for name, value in self.machine.items():
            if machine.get(name) != value:
                self.say(
                    f"warning: resuming with {name} {value} what was begun with {machine.get(name)}: results may differ in the last bits"
                )
        self.resumed_step = step
        if path.name == CHECKPOINT:
            self._newest = step
        if self.writer:
            self._forget_log_after(state["step"], state["assessed"])
        return dict(state)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write the state of a run, which has `step`, `model` and perhaps `ema`. What is there stays until this one is safe.

        Raises InputError, and leaves what is there alone, for weights that are no numbers and when it cannot be written.
        """
        if not self.writer:
            return
        step = int(state["step"])
        for part in ("model", "ema"):
            if lost := _not_finite(state.get(part) or {}):
                good = self.last_good_step()
                what_is_safe = "nothing was saved before" if good is None else f"the checkpoint of step {good:,} is safe"
                raise InputError(
                    f"{self.path / CHECKPOINT}: {lost} is not finite at step {step:,}, so not saved; {what_is_safe}; lower --lr"
                )
        saved = {"identity": json.dumps(self.identity), "machine": json.dumps(self.machine), "state": state}
        # A second checkpoint of one step takes the place of the first: it would leave no earlier one to return to. One that may be
        # damaged never takes the previous one's place.
        keep = self._newest is not None and self._newest != step
        self._newest = None
        self._write(CHECKPOINT, lambda file: _save_sealed(saved, step, file), PREVIOUS if keep else None)
        self._newest = step

    def last_good_step(self) -> int | None:
        """The step of the newest whole checkpoint, by the files themselves; None when there is none."""
        for path in self._checkpoints():
            with contextlib.suppress(OSError, ValueError):
                return sealed_step(path)
        return None

    def save_weights(
        self, which: str, model: nn.Module, classes: tuple[str, ...], preprocessing: Preprocessing, extra: dict[str, str]
    ) -> None:
        if self.writer:
            save_weights(self.path / f"{which}.safetensors", model, self.identity["student"], classes, preprocessing, extra)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        data = (json.dumps(value, indent=2) + "\n").encode()
        if self.writer:
            self._write(name, lambda file: file.write(data))

    def read_json(self, name: str) -> Any:
        """What write_json wrote, None when there is no such file or it is no JSON."""
        try:
            return json.loads((self.path / name).read_bytes())
        except (OSError, ValueError):
            return None

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
            data = "".join(kept).encode()
            self._write("log.jsonl", lambda file: file.write(data))

    def _write(self, name: str, fill: Callable[[BinaryIO], object], keep: str | None = None) -> None:
        """The file appears whole or not at all, also after a power cut. `keep`: the name under which the present one stays."""
        temporary = self.path / f".{name}.tmp"
        with self._naming(name):
            try:
                with open(temporary, "wb") as file:
                    fill(file)
                    file.flush()
                    os.fsync(file.fileno())
                if keep:
                    os.replace(self.path / name, self.path / keep)
                os.replace(temporary, self.path / name)
                sync_folder(self.path)
            except BaseException:
                with contextlib.suppress(OSError):  # half a file would only keep the disk full
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


class _HashedFile:
    """The file that torch.save writes into. An error waits until it is done: coming through PyTorch's C++ it would be another one."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.size = file, hashlib.sha256(), 0
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self.hash.update(data)
                self.file.write(data)
                self.size += size
            except BaseException as error:
                self.error = error
        return size

    def flush(self) -> None:
        pass


def _save_sealed(value: Any, step: int, file: BinaryIO) -> None:
    hashed = _HashedFile(file)
    try:
        torch.save(value, cast(BinaryIO, hashed))
    finally:
        if hashed.error is not None:
            raise hashed.error
    head = _SEAL_HEAD.pack(_MAGIC, step, hashed.size)
    hashed.hash.update(head)
    file.write(head + hashed.hash.digest())


def sealed_step(path: Path) -> int:
    """The step of a checkpoint, every byte of which was checked. Raises ValueError saying what is wrong, or OSError."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < _SEAL_SIZE:
            raise ValueError(f"{size:,} bytes")
        file.seek(size - _SEAL_SIZE)
        head, digest = file.read(_SEAL_HEAD.size), file.read()
        magic, step, length = _SEAL_HEAD.unpack(head)
        if magic != _MAGIC or length != size - _SEAL_SIZE:
            raise ValueError(f"{size:,} bytes, without the seal that ends one: it was cut short, or is another file")
        file.seek(0)
        seen, chunk, left = hashlib.sha256(), bytearray(1 << 20), length
        while left:
            count = file.readinto(memoryview(chunk)[: min(left, len(chunk))])
            if not count:
                raise ValueError("it became shorter while it was read")
            seen.update(memoryview(chunk)[:count])
            left -= count
        seen.update(head)
        if seen.digest() != digest:
            raise ValueError("its SHA-256 differs from the one written at its end: bits have changed")
    return int(step)


def _not_finite(tensors: Mapping[str, Any]) -> str | None:
    """The name of a tensor that holds NaN or +infinity; -infinity is what attention masks are made of. Waits for the device once."""
    floating = {name: t for name, t in tensors.items() if isinstance(t, Tensor) and t.is_floating_point() and t.numel()}
    if not floating:
        return None
    finite = torch.stack([torch.isfinite(t.detach().max()) for t in floating.values()]).tolist()
    return next((name for name, good in zip(floating, finite, strict=True) if not good), None)


def _resume_mode(resume: bool | str) -> Resume:
    if isinstance(resume, bool):
        return "auto" if resume else "never"
    if resume not in get_args(Resume):
        raise InputError(f"resume: {resume!r}; choose one of {', '.join(get_args(Resume))}")
    return cast(Resume, resume)


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
