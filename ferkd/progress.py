"""How a run is seen: log.jsonl always; one live bar on a terminal that has rich, else plain lines; other people's loggers.

The bar and the loggers are conveniences: one that fails is dropped with a line that says so, and training goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ferkd.errors import InputError, one_line
from ferkd.recipes import TrainConfig
from ferkd.runs import RunFolder


def print_line(line: str) -> None:
    """Where a run's lines go unless told otherwise. Only lines that go here may become a live bar."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """What happens to every line of a run: written to log.jsonl, shown to a person, handed to the loggers."""

    def __init__(
        self, run: RunFolder, total_steps: int, batch_size: int, loggers: Sequence[str], config: TrainConfig, enabled: bool = True
    ) -> None:
        """`run`: after load_checkpoint, so that loggers go on where it resumes. `enabled`: False on every process but the first.

        Raises InputError for an unknown logger, a missing package, and a logger that cannot start a new run; when a run is resumed, with
        nobody there to read an error, such a logger is dropped with a warning.
        """
        self.run, self.total_steps, self.batch_size, self.enabled = run, total_steps, batch_size, enabled
        self._bar: _Bar | None = None
        self._may_have_bar = enabled and run.say is print_line and _terminal_with_rich()
        self._loggers: dict[str, Logger] = {}
        if enabled and loggers:
            check_loggers(loggers)
            self._start_loggers(loggers, config)

    def train(self, line: Mapping[str, Any]) -> None:
        """A line of training: step, epoch, lr, loss, crops_per_second, data_wait, regions, and what else is to be logged."""
        if not self.enabled:
            return
        self.run.log(line)
        seconds_left = (self.total_steps - line["step"]) * self.batch_size / max(line["crops_per_second"], 1e-9)
        if not self._show_bar(line, seconds_left):
            self.run.say(train_text(line, self.total_steps, seconds_left))
        self._send(line, "train")

    def eval(self, line: Mapping[str, Any]) -> None:
        """A line of an evaluation: step, top1, top5, perhaps best_top1, and what else is to be logged."""
        if not self.enabled:
            return
        self.run.log(line)
        best = f"  (best {line['best_top1']:.2%})" if "best_top1" in line else ""
        self.run.say(f"step {line['step']:>7,}  val top-1 {line['top1']:7.2%}  top-5 {line['top5']:7.2%}{best}")
        self._send(line, "val")

    def close(self) -> None:
        """End the bar and the loggers; in a `finally`, so that they also know of a run that failed."""
        failed = sys.exc_info()[0] is not None
        if self._bar is not None:
            self._bar.close()
        self._bar, self._may_have_bar = None, False
        for name in list(self._loggers):
            self._guarded(name, lambda logger: logger.close(failed))
        self._loggers.clear()

    def _show_bar(self, line: Mapping[str, Any], seconds_left: float) -> bool:
        """Whether a bar shows the line. It begins with the first line, so that what starting a run prints does not run into it."""
        if not self._may_have_bar:
            return False
        try:
            if self._bar is None:
                self._bar = _Bar(self.total_steps)
            self._bar.show(line, seconds_left)
        except Exception as error:
            if self._bar is not None:
                self._bar.close()
            self._bar, self._may_have_bar = None, False
            self.run.say(f"warning: no progress bar ({one_line(error)}); lines from here on")
        return self._may_have_bar

    def _start_loggers(self, names: Sequence[str], config: TrainConfig) -> None:
        step = self.run.resumed_step
        known = (self.run.read_json("loggers.json") if step is not None else None) or {}
        described = json.loads(json.dumps({**self.run.identity, **dataclasses.asdict(config)}, default=str))
        ids = {}
        for name in dict.fromkeys(names):
            try:
                with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                    logger = LOGGERS[name](self.run, described, known.get(name))
            except Exception as error:
                if step is None:
                    self.close()
                    raise InputError(
                        f"loggers: {name} cannot start ({one_line(error)}); mend that, or leave it out of --loggers"
                    ) from error
                self.run.say(f"warning: {name} cannot start ({one_line(error)}): going on without it; log.jsonl has everything")
            else:
                self._loggers[name] = logger
                ids[name] = logger.id
        self.run.write_json("loggers.json", {**known, **ids})

    def _send(self, line: Mapping[str, Any], group: str) -> None:
        for name in list(self._loggers):
            self._guarded(name, lambda logger: logger.log(line["step"], scalars(line, group)))

    def _guarded(self, name: str, act: Callable[[Logger], None]) -> None:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                act(self._loggers[name])
        except Exception as error:
            del self._loggers[name]
            self.run.say(f"warning: {name} failed ({one_line(error)}): going on without it; log.jsonl has everything")


def train_text(line: Mapping[str, Any], total_steps: int, seconds_left: float) -> str:
    """A line of training for people."""
    return (
        f"step {line['step']:>7,}/{total_steps:,}  epoch {line['epoch']:7.2f}  loss {line['loss']:.4f}  lr {line['lr']:.4g}  "
        f"{line['crops_per_second']:,.0f} crops/s  waiting for data {line['data_wait']:.0%}  "
        f"calibrated {line['regions']['calibrated']:.1%}  {seconds_left / 60:.1f} min left"
        + (f"  (and {line['compile_seconds']:.1f} s of compiling)" if "compile_seconds" in line else "")
        + (f"  ({line['skipped_steps']} updates skipped: gradient not finite)" if "skipped_steps" in line else "")
    )


def scalars(line: Mapping[str, Any], group: str) -> dict[str, float]:
    """The numbers of a line under their names for loggers: train/loss, train/top1, train/regions/kept, val/top1."""
    found: dict[str, float] = {}
    for key, value in line.items():
        name = f"{group}/{key.removeprefix(f'{group}_')}"
        if isinstance(value, Mapping):
            found |= scalars(value, name)
        elif key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
    return found


# ---- On a terminal -------------------------------------------------------------------------------------------------------------


def _terminal_with_rich() -> bool:
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb" or os.environ.get("CI"):
        return False
    return importlib.util.find_spec("rich") is not None


class _Bar:
    """One bar with a line of figures below it. Drawn when there is a new line and by no thread: loaders fork."""

    def __init__(self, total_steps: int) -> None:
        from rich.console import Console
        from rich.live import Live

        self.total_steps = total_steps
        # Lines that are printed meanwhile appear above the bar; what goes into a file stays out of it.
        self.live = Live(console=Console(stderr=True), auto_refresh=False, redirect_stdout=sys.stdout.isatty())
        self.live.start()

    def show(self, line: Mapping[str, Any], seconds_left: float) -> None:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        top = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None, None):
            top.add_column(ratio=ratio, no_wrap=True)
        top.add_row(
            f"step {line['step']:,}/{self.total_steps:,}",
            ProgressBar(self.total_steps, line["step"]),
            f"epoch {line['epoch']:.2f}",
            f"{seconds_left / 60:.1f} min left",
        )
        regions = "  ".join(f"{name} {share:.1%}" for name, share in reversed(line["regions"].items()))
        figures = (
            f"loss {line['loss']:.4f}  lr {line['lr']:.4g}  {line['crops_per_second']:,.0f} crops/s  "
            f"waiting for data {line['data_wait']:.0%}  {regions}"
        )
        self.live.update(Group(top, Text(figures, no_wrap=True, overflow="ellipsis")), refresh=True)

    def close(self) -> None:
        with contextlib.suppress(Exception):  # a terminal that went away
            self.live.stop()


# ---- Other people's loggers ----------------------------------------------------------------------------------------------------


class Logger(Protocol):
    """Made of (run, settings, the id that its earlier part had, or None)."""

    id: str | None

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Into RUN/tensorboard. What was logged after the step that a run resumes from is struck out."""

    def __init__(self, run: RunFolder, settings: Mapping[str, Any], known: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id: str | None = None
        step = 0 if run.resumed_step is None else run.resumed_step + 1
        self.writer: Any = SummaryWriter(str(run.path / "tensorboard"), purge_step=step)
        if run.resumed_step is None:
            self.writer.add_text("config", "```json\n" + json.dumps(settings, indent=2) + "\n```", 0)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a kill loses nothing

    def close(self, failed: bool) -> None:
        self.writer.close()


class WandB:
    """Project $WANDB_PROJECT, else ferkd. Steps that are done again after a kill are a metric of their own, so wandb takes them."""

    def __init__(self, run: RunFolder, settings: Mapping[str, Any], known: str | None) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ferkd"), name=run.path.resolve().name, id=known, resume="allow" if known else None,
            dir=str(run.path), config=dict(settings), allow_val_change=True, settings=wandb.Settings(console="off", quiet=True),
        )  # fmt: skip
        self.id: str | None = self.run.id
        for names in ("train/*", "val/*"):
            self.run.define_metric(names, step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self.run.log({**scalars, "step": step})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Trackio:
    """Project $TRACKIO_PROJECT, else ferkd. Trackio finds a run by its name: a few letters after the folder's make it the only one."""

    def __init__(self, run: RunFolder, settings: Mapping[str, Any], known: str | None) -> None:
        import trackio

        self.trackio: Any = trackio
        self.run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "ferkd"), name=known or f"{run.path.resolve().name}-{secrets.token_hex(3)}",
            resume="allow" if known else "never", config=dict(settings), embed=False,
        )  # fmt: skip
        self.id: str | None = self.run.name

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self.run.log(dict(scalars), step=step)

    def close(self, failed: bool) -> None:
        self.trackio.finish()  # the run's own method would leave it to be finished, and talked of, again when the program ends


LOGGERS: dict[str, Callable[[RunFolder, Mapping[str, Any], str | None], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def check_loggers(names: Sequence[str]) -> None:
    """Raises InputError for an unknown logger and for one whose package is missing. Cheap: imports nothing."""
    for name in names:
        if name not in LOGGERS:
            raise InputError(f"loggers: {name!r} is unknown; choose among {', '.join(LOGGERS)}")
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # wandb leaves folders called wandb about, which look like packages
            raise InputError(f"loggers: {name} is not installed; pip install 'ferkd[{name}]', or leave it out of --loggers")
