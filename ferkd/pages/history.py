"""What a run's folder says, however little is left of it: a report shows damage, and is never stopped by it."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ferkd.errors import InputError
from ferkd.regions import RegionPolicy
from ferkd.task import method_name

TRAIN_COLUMNS = ("loss", "train_top1", "lr", "crops_per_second", "data_wait", "memory_mib")
EVAL_COLUMNS = ("top1", "top5")
_AXES = ("step", "crops", "seconds")
_REGIONS = ("discarded", "calibrated", "kept")
_POINTS = 400
_LONGEST_LINE, _LARGEST_JSON = 1 << 16, 1 << 22


class Curve:
    """Columns of figures over steps. Past twice `points`, neighbours are averaged two by two: memory and pages stay small.

    `columns` hold float or None; of the axes (step, crops, seconds) the later one of two stays, since a line is about what lies before it.
    """

    def __init__(self, names: tuple[str, ...], points: int = _POINTS) -> None:
        self.columns: dict[str, list[float | None]] = {name: [] for name in (*_AXES, *names)}
        self.points, self.lines_a_point = points, 1
        self._waiting: list[dict[str, float | None]] = []

    def add(self, line: dict[str, float | None]) -> None:
        self._waiting.append(line)
        if len(self._waiting) < self.lines_a_point:
            return
        self._flush()
        if len(self.columns["step"]) == 2 * self.points:
            self.lines_a_point *= 2
            for name, column in self.columns.items():
                pairs = zip(column[::2], column[1::2], strict=True)
                self.columns[name] = [_joined(name, pair) for pair in pairs]

    def finished(self) -> dict[str, list[float | None]]:
        """The columns, for a page: six digits of a figure are enough to draw it."""
        self._flush()
        return {
            name: column if name in _AXES else [None if value is None else float(f"{value:.6g}") for value in column]
            for name, column in self.columns.items()
        }

    def _flush(self) -> None:
        if self._waiting:
            for name, column in self.columns.items():
                column.append(_joined(name, [line.get(name) for line in self._waiting]))
            self._waiting.clear()


def _joined(name: str, values: Any) -> float | None:
    known = [value for value in values if value is not None]
    if name in _AXES:
        return known[-1] if known else None
    return sum(known) / len(known) if known else None


@dataclasses.dataclass
class History:
    """A run as its files tell it. `config` is config.json, `summary` summary.json; both are {} when missing or damaged, as `notes` then
    says. `last_eval` and `last_step` are the log's last word. `train` and `evals` are what charts show."""

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    train: Curve
    evals: Curve
    last_step: float
    last_eval: dict[str, float | None]
    best_top1: float | None
    lost_loss_at: float | None
    largest_memory: float | None
    notes: list[str]

    @property
    def status(self) -> str:
        """finished; or how far it came."""
        if self.summary:
            return "finished"
        steps = number(self.config.get("steps"))
        if steps and self.last_eval.get("step") == steps:
            return "trained to its end, without a summary"
        if self.lost_loss_at is not None:
            return f"stopped: the loss was no number at step {self.lost_loss_at:,.0f}"
        if not self.last_step:
            return "unfinished: nothing logged yet"
        return f"unfinished: step {self.last_step:,.0f}" + (f" of {steps:,.0f}" if steps else "")

    @property
    def method(self) -> str:
        """hard labels, FKD, FerKD; a dash where the folder does not tell."""
        if isinstance(self.summary.get("method"), str):
            return str(self.summary["method"])
        if self.policy is None or not {"store", "teacher"} <= self.config.keys():
            return "–"
        return method_name(self.policy, bool(self.config["store"]), bool(self.config["teacher"]))

    @property
    def settings(self) -> dict[str, str]:
        """Every setting under a dotted name, as text. Thresholds as probabilities stand apart where quantiles were asked for."""
        policy = self.config.get("policy")
        found = dict(flattened({name: value for name, value in self.config.items() if name != "policy"}))
        if policy != _mapping(self.config.get("config")).get("policy"):
            found |= flattened(policy, "thresholds as probabilities")
        return {name.removeprefix("config."): value for name, value in found.items()}

    @property
    def policy(self) -> RegionPolicy | None:
        """The thresholds as probabilities; None where the folder does not tell."""
        policy = self.config.get("policy")
        try:
            return RegionPolicy(**policy) if isinstance(policy, dict) else None
        except (TypeError, InputError):
            return None


def read_run(path: Path) -> History:
    """Reads a run's folder line by line. Raises InputError when there is no such folder, or nothing of a run in it."""
    names = ("config.json", "log.jsonl", "summary.json")
    if not path.is_dir():
        what = "is a file" if path.exists() else "no such folder"
        raise InputError(f"{path}: {what}; give the --out folders of ferkd train")
    if not any((path / name).exists() for name in names):
        raise InputError(f"{path}: holds none of {', '.join(names)}, so it is no run; give the --out folders of ferkd train")
    notes: list[str] = []
    config = _read_json(path / "config.json", notes, "its settings are unknown")
    summary = _read_json(path / "summary.json", notes, "its last evaluation stands in for it", may_be_missing=True)
    history = History(path, config, summary, Curve(TRAIN_COLUMNS + _REGIONS), Curve(EVAL_COLUMNS, 1000), 0, {}, None, None, None, notes)
    damaged = 0
    last = {"train": 0.0, "eval": -1.0}
    for line in _log_lines(path / "log.jsonl", notes):
        kind, step = (line.get("kind"), number(line.get("step"))) if line is not None else (None, None)
        if line is None or step is None or kind not in ("train", "eval") or step <= last[kind]:
            damaged += 1
            continue
        last[kind] = step
        (_add_train if kind == "train" else _add_eval)(history, line, step)
    if damaged:
        notes.append(f"log.jsonl: {damaged:,} {'line is' if damaged == 1 else 'lines are'} damaged or out of order and left out")
    history.last_step = max(last.values())
    return history


def _add_train(history: History, line: Mapping[str, Any], step: float) -> None:
    figures = {name: number(line.get(name)) for name in (*_AXES, *TRAIN_COLUMNS)}
    regions = _mapping(line.get("regions"))
    if isinstance(line.get("loss"), float) and figures["loss"] is None and history.lost_loss_at is None:
        history.lost_loss_at = step
    if figures["memory_mib"] is not None:
        history.largest_memory = max(history.largest_memory or 0.0, figures["memory_mib"])
    history.train.add({**figures, **{name: number(regions.get(name)) for name in _REGIONS}})


def _add_eval(history: History, line: Mapping[str, Any], step: float) -> None:
    figures = {name: number(line.get(name)) for name in (*_AXES, *EVAL_COLUMNS)}
    history.last_eval = figures
    if figures["top1"] is not None:
        history.best_top1 = max(history.best_top1 or 0.0, figures["top1"])
    history.evals.add(figures)


def number(value: Any) -> float | None:
    """A finite number, or None for whatever else stands there."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def flattened(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """The leaves of nested JSON objects under dotted names."""
    if isinstance(value, dict) and value and depth < 8:
        for key, part in value.items():
            yield from flattened(part, f"{name}.{key}" if name else str(key), depth + 1)
    else:
        yield name, "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _open_file(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise OSError(errno.EINVAL, "is no file")
    return open(path, "rb")


def _read_json(path: Path, notes: list[str], meaning: str, may_be_missing: bool = False) -> dict[str, Any]:
    try:
        with _open_file(path) as file:
            found = json.loads(file.read(_LARGEST_JSON))
        if isinstance(found, dict):
            return found
        what = "holds no settings"
    except FileNotFoundError:
        if may_be_missing:
            return {}
        what = "is missing"
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        what = "is damaged"
    notes.append(f"{path.name} {what}: {meaning}")
    return {}


def _log_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any] | None]:
    """Every line of a log, None for one that is no JSON object. The half of a last line that a kill leaves is noted."""
    try:
        file = _open_file(path)
    except FileNotFoundError:
        notes.append("log.jsonl is missing: no curves")
        return
    except OSError as error:
        notes.append(f"log.jsonl cannot be read ({error.strerror}): no curves")
        return
    with file:
        try:
            for text, whole in _bounded_lines(file):
                found = None
                try:
                    found = json.loads(text)
                except (ValueError, RecursionError):
                    if not whole:
                        notes.append("log.jsonl: the last line is cut short, as a kill leaves it")
                        return
                yield found if isinstance(found, dict) else None
        except OSError as error:
            notes.append(f"log.jsonl cannot be read to its end ({error.strerror})")


def _bounded_lines(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """Lines, and whether each has its end; of one that is too long to be a log's, one piece without meaning."""
    while text := file.readline(_LONGEST_LINE):
        if len(text) < _LONGEST_LINE or text.endswith(b"\n"):
            if text.strip():
                yield text, text.endswith(b"\n")
            continue
        while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
            pass
        yield b"too long", True
