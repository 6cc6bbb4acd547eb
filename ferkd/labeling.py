"""Teacher + photographs -> store: every photo is decoded once, its crops drawn and shown to the teacher, its k best answers kept.

A store depends on the dataset, the teacher, the settings, the batch size and the machine's kind, never on when the work was broken off,
nor on how many processes did it. label_plan.py says what is to be done, label_batches.py how a photo becomes labels, label_crew.py who does
it, label_progress.py what people are told.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ferkd.devices import cores_for_decoding, repeatable
from ferkd.filling import to_stderr
from ferkd.label_batches import label_images
from ferkd.label_crew import Crew, Task, joined_crew
from ferkd.label_plan import Job, LabelSettings, plan_job
from ferkd.label_progress import Progress, Rate, describe, duration, in_bytes, summary, summary_lines
from ferkd.preflight import preflight
from ferkd.shards import UNIT_IMAGES, LabelledImage, ShardWriter
from ferkd.store import LabelStore, StoreWriter
from ferkd.store_writing import joined_shards

__all__ = ["Job", "LabelSettings", "Labelled", "label", "label_with_figures", "plan_job"]

STOP_SECONDS = 20.0  # what finishing a unit may take after SIGTERM; schedulers kill half a minute after it
SEEN_SECONDS = 60.0  # until what another machine wrote is seen on a network's disk


class Labelled(NamedTuple):
    """A finished store (None after a dry run), and what came of it in figures (see label_progress.summary)."""

    store: LabelStore | None
    figures: dict[str, Any]


def label(settings: LabelSettings, say: Callable[[str], None] = to_stderr) -> LabelStore | None:
    """label_with_figures without the figures."""
    labelled = label_with_figures(settings, say)
    return labelled.store if labelled else None


def label_with_figures(settings: LabelSettings, say: Callable[[str], None] = to_stderr) -> Labelled | None:
    """Labels settings.data/train into the store settings.out, or goes on where it was broken off. A dry run brings figures alone.

    Under torchrun all processes share the work; the first returns what came of it, the others None. `say` gets every line meant for
    people, in the first process alone. Raises InputError for wrong settings, data or teacher, and when the teacher answers NaN; CheckFailed
    when the preflight refuses; StoreError for a store that is another's, in use or cannot be written; Stopped on SIGTERM or Ctrl-C,
    everything so far being safe, and when another process stopped or failed. A photo that cannot be decoded is recorded as failed and
    named at the end, and stops nothing.
    """
    with joined_crew() as crew:
        if not crew.leads:
            say = _nothing
            logging.getLogger("ferkd").setLevel(logging.ERROR)
        job = plan_job(settings, crew.local_rank, crew.local_world)
        for line in describe(job, crew.world):
            say(line)
        if crew.leads:
            begun = any((settings.out / name).exists() for name in ("job.json", "manifest.json"))
            if settings.skip_preflight or (begun and not settings.dry_run):
                say("preflight: skipped" if settings.skip_preflight else "preflight: not repeated, since this store was begun already")
            else:
                _check_teacher(job, say)
        with repeatable(settings.tf32), cores_for_decoding(job.device), _stopping(crew.stop):
            if settings.dry_run:
                figures = _measure(job, crew, say)
                return Labelled(None, figures) if crew.leads else None
            if crew.leads:
                return _lead(job, crew, say)
            _follow(job, crew)
            return None


def _nothing(line: str) -> None:
    pass


def _check_teacher(job: Job, say: Callable[[str], None]) -> None:
    """The preflight, told to the user; raises CheckFailed when it refuses."""
    report = preflight(
        job.teacher,
        job.classes,
        job.train,
        job.val,
        job.plan.crop_settings,
        device=job.device,
        batch_size=job.plan.batch_size,
    )
    say(f"preflight: the teacher recognises {report.top1:.1%} of {report.images:,} images of {report.source}")
    say(
        f"preflight: it agrees with the folder on {report.agreement:.1%} of {report.crops:,} crops, mean confidence {report.confidence:.1%}"
    )
    for band in report.bands:
        say(
            f"  crops of {band.low:4.0%} to {band.high:4.0%} of the photo: agreement {band.agreement:6.1%}, "
            f"confidence {band.confidence:6.1%}, {band.crops} crops"
        )
    for warning in report.warnings:
        say(f"preflight: WARNING: {warning}")
    report.require()


def _measure(job: Job, crew: Crew, say: Callable[[str], None]) -> dict[str, Any]:
    """A dry run: labels for 20 s or 3 % of the work, throws the answers away and says, and returns, what the whole would take."""
    total = len(job.plan.paths) * job.plan.crops
    rate = Rate()

    def on_crops(count: int) -> None:
        rate.at(rate.done + count)
        if rate.measured(total) or crew.stop.is_set():
            raise _MeasuredEnough

    last = min(len(job.plan.paths), job.plan.shard_images) - 1
    with contextlib.suppress(_MeasuredEnough):
        for _ in label_images(job, [Task(0, 0, last)], on_crops):
            pass
    together, size = crew.summed(rate.per_second()), len(job.plan.paths) * job.plan.image_bytes
    say(
        f"dry run: {together:,.0f} crops/s, so {total:,} crops take {duration(total / together)} ({total / together / 3600:.2f} h) "
        f"and {in_bytes(size)}; nothing was written"
    )
    return {"dry_run": True, "crops": total, "crops_per_second": together, "hours": total / together / 3600, "label_bytes": size}


class _MeasuredEnough(Exception):
    """Ends a dry run."""


# ---- The work


def _lead(job: Job, crew: Crew, say: Callable[[str], None]) -> Labelled:
    """The first process: holds the store, labels with the others, waits for the last of them and finishes the store."""
    out = job.settings.out
    with StoreWriter(out, job.plan) as writer:
        todo = [Task(*task) for task in writer.missing()]
        if not todo:
            say(f"{out}: is complete already" if writer.finished else f"{out}: all shards are there")
        images = sum(task.last - task.first + 1 for task in todo)
        if images < len(job.plan.paths):
            say(f"{len(job.plan.paths) - images:,} of {len(job.plan.paths):,} photos are labelled already")
        for difference in crew.lead(writer.token, todo):
            say(f"another process has {difference}: the labels will agree closely with one machine's, not to the bit")
            writer.note([difference])
        crew.begin()
        progress = Progress(images * job.plan.crops, say)
        _work(job, crew, writer, todo, lambda: progress.at(crew.crops))
        crew.wait(todo, lambda: progress.at(crew.crops))
        if not crew.all_finished(todo):
            raise crew.ending(_stopped_text(job, crew, progress.total))
        seconds = time.monotonic() - progress.rate.started
        deadline = time.monotonic() + SEEN_SECONDS
        while crew.world > 1 and writer.missing() and time.monotonic() < deadline:
            time.sleep(1.0)
        store = writer.finish()
    progress.end_line()
    figures = summary(store, progress.total, seconds)
    for line in summary_lines(store, figures):
        say(line)
    return Labelled(store, figures)


def _follow(job: Job, crew: Crew) -> None:
    """Any other process: labels the shards that it is given."""
    shards: list[ShardWriter] = []

    def look(token: str) -> list[str]:
        writer, differences = joined_shards(job.settings.out, job.plan, token)
        shards.append(writer)
        return differences

    todo = crew.enlist(look)
    if not todo:
        return
    with contextlib.closing(shards[0]) as writer:
        _work(job, crew, writer, todo, lambda: None)
    if crew.stop.is_set():
        raise crew.ending(_stopped_text(job, crew, sum(task.last - task.first + 1 for task in todo) * job.plan.crops))


def _work(job: Job, crew: Crew, writer: StoreWriter | ShardWriter, todo: Sequence[Task], on_news: Callable[[], None]) -> None:
    """Labels shards, one after the other, as long as there is one and nobody stops."""
    total = sum(task.last - task.first + 1 for task in todo) * job.plan.crops
    rate = Rate()
    for tasks in crew.turns(todo):
        _write_shards(job, crew, writer, tasks, rate, total, on_news)


def _write_shards(
    job: Job, crew: Crew, writer: StoreWriter | ShardWriter, tasks: Iterator[Task], rate: Rate, total: int, on_news: Callable[[], None]
) -> None:
    """Labels what shards lack, in units that are safe as soon as they are written. When asked to stop, raises Stopped within a shard and
    returns after it.
    """
    begun: collections.deque[Task] = collections.deque()  # what is left of the shard that is being written, and those taken ahead
    unit: list[LabelledImage] = []

    def taken() -> Iterator[Task]:
        for task in tasks:
            begun.append(task)
            yield task

    def on_crops(count: int) -> None:
        crew.count(count)
        rate.at(rate.done + count)
        on_news()
        left = (_unit_images(begun[0]) - len(unit)) * job.plan.crops
        if crew.stop.is_set() and left > STOP_SECONDS * rate.per_second():
            raise crew.ending(_stopped_text(job, crew, total))

    for image in label_images(job, taken(), on_crops):
        unit.append(image)
        if len(unit) < _unit_images(begun[0]):
            continue
        shard, first, last = begun[0]
        writer.write_unit(shard, unit, first)
        begun[0] = Task(shard, first + len(unit), last)
        unit = []
        if begun[0].first > last:
            writer.finish_shard(shard)
            crew.count_finished()
            begun.popleft()
            if crew.stop.is_set():
                return
        elif crew.stop.is_set():
            raise crew.ending(_stopped_text(job, crew, total))


def _unit_images(task: Task) -> int:
    """The photos of a shard's next unit."""
    return min(UNIT_IMAGES, task.last + 1 - task.first)


def _stopped_text(job: Job, crew: Crew, total: int) -> str:
    return f"stopped after {crew.crops_now():,} of {total:,} crops; start the same command again to go on with {job.settings.out}"


@contextlib.contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """Within the block SIGTERM and Ctrl-C only ask to stop; a second Ctrl-C interrupts at once. Elsewhere than in the main thread signals
    are the caller's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
