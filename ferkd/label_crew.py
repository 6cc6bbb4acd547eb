"""Several processes that label one store, as torchrun starts them. They share the store's folder and a key-value store, and nothing else.

    torchrun --nproc-per-node 8 -m ferkd label ...

Rank 0 leads: it holds the store's lock, says what is missing, speaks to people and finishes the store. The others enlist with it. Shards
are handed out one by one by a counter in torchrun's rendezvous store, so that nobody ever waits for a slower process; only the leader
stays until the last shard is there.

A process that dies ends the job. torchrun ends the others in any case; from outside nobody can tell a dead process from a slow one; and two
writers of one shard are what must never be. Nothing is lost but the units that were being computed: the same command goes on, with any
number of processes, and `torchrun --max-restarts N` gives it again by itself.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ferkd.errors import InputError, Stopped

POLL_S = 0.1
BEAT_S = 2.0
SILENT_S = 60.0
START_S = 1800.0  # until every process has enlisted: the slowest may read the dataset's folder and its teacher over a network
STORE_S = 60.0


class Task(NamedTuple):
    """A shard, or what is left of it: photos `first` to `last`."""

    shard: int
    first: int
    last: int


class Crew:
    """This process among the `world` that label a store; alone, all of it is plain counting.

    `stop` is set when this process is asked to stop, and when another one stopped, failed or fell silent.
    """

    def __init__(self, store: Store | None = None, rank: int = 0, world: int = 1, local_rank: int = 0, local_world: int = 1) -> None:
        self.rank, self.world, self.local_rank, self.local_world = rank, world, local_rank, local_world
        self.stop = threading.Event()
        self._store = store
        # Entries of earlier processes may still be in torchrun's store, so that none is looked up by its rank alone.
        self._id = secrets.token_hex(8)
        self._job = ""  # the job's token, before all keys of the work
        self._watched: dict[
            int, str
        ] = {}  # rank -> id of the processes whose silence ends the work: all for the leader, the leader for them
        self._lost: str | None = None  # why the others cannot be reached any more
        self._here = self._told = self._elsewhere = 0  # crops
        self._alone = {"handed out": 0, "finished": 0}  # tasks, where there is no store to count them
        self._closed = threading.Event()
        if store is not None:
            self._put(f"process/{rank}", {"id": self._id})
            self._thread = threading.Thread(target=self._beat, name="crew", daemon=True)
            self._thread.start()

    @property
    def leads(self) -> bool:
        """Whether this is the process that holds the store's lock and speaks."""
        return self.rank == 0

    # ---- Before the work

    def lead(self, job: str, todo: Sequence[tuple[int, int, int]]) -> list[str]:
        """Tells the others what there is to do and waits until each has enlisted: in what their machines differ from this one.

        `job` names the job. Raises Stopped with its reason when a process cannot take part, InputError when one does not come.
        """
        self._job = job
        differences: set[str] = set()
        started = time.monotonic()
        ordered: set[str] = set()
        while self._store is not None and len(self._watched) < self.world - 1:
            for rank in range(1, self.world):
                process = self._process(rank)
                if process is None or rank in self._watched:
                    continue
                if process not in ordered:
                    ordered.add(process)
                    self._put(f"order/{process}", {"job": job, "todo": [list(task) for task in todo]})
                if (answer := self._get(f"enlisted/{process}")) is not None:
                    differences.update(answer["differences"])
                    self._watched[rank] = process
            self._pause(started, {*range(1, self.world)} - {*self._watched})
        return sorted(differences)

    def begin(self) -> None:
        """The leader lets the work begin."""
        if self._store is not None:
            self._put(f"{self._job}/begin", {})

    def enlist(self, look: Callable[[str], list[str]]) -> list[Task]:
        """Waits for the leader's list of tasks. If there are any, `look` is given the job's token, looks at the store's folder and tells in
        what this machine differs.
        """
        started = time.monotonic()
        while (order := self._get(f"order/{self._id}")) is None:
            self._process(0)
            self._pause(started, {0})
        if (leader := self._process(0)) is not None:
            self._watched[0] = leader
        self._job = order["job"]
        self._put(f"enlisted/{self._id}", {"differences": look(self._job) if order["todo"] else []})
        while self._get(f"{self._job}/begin") is None:
            self._pause(started, {0})
        return [Task(*task) for task in order["todo"]]

    def summed(self, value: float) -> float:
        """The sum of all processes' values, for the leader; a process's own for the others."""
        if self._store is None:
            return value
        self._put(f"value/{self._id}", {"value": value})
        values: dict[int, float] = {self.rank: value}
        started = time.monotonic()
        while self.leads and len(values) < self.world:
            for rank in range(1, self.world):
                process = self._process(rank)
                if process is not None and (answer := self._get(f"value/{process}")) is not None:
                    values[rank] = answer["value"]
            self._pause(started, {*range(self.world)} - {*values})
        return sum(values.values())

    def _pause(self, started: float, missing: set[int]) -> None:
        if self.stop.wait(POLL_S):
            raise self.ending("stopped before the work began; start the same command again")
        if missing and time.monotonic() - started > START_S:
            raise InputError(
                f"torchrun: process {min(missing)} has not come within {START_S / 60:.0f} minutes; "
                "look at its machine, then start the same command again"
            )

    def _process(self, rank: int) -> str | None:
        """The id of the process of a rank, None as long as it is not there. Raises Stopped when it says that it failed."""
        process = self._get(f"process/{rank}")
        if process is None:
            return None
        if "failure" in process:
            raise Stopped(process["failure"])
        return str(process["id"])

    # ---- The work

    def turns(self, todo: Sequence[Task]) -> Iterator[Iterator[Task]]:
        """The tasks that fall to this process, each to whoever asks first. Those of a turn may be asked for while the one before is still
        worked on. Before the next turn all of them must be finished.
        """
        while not self.stop.is_set() and (number := self._tasks("handed out", 1) - 1) < len(todo):
            yield self._turn(todo, number)

    def _turn(self, todo: Sequence[Task], number: int) -> Iterator[Task]:
        while number < len(todo):
            yield todo[number]
            # The last tasks, one for each process, go to whoever is free: a slow process would let them wait.
            if self.stop.is_set() or len(todo) - self._tasks("handed out", 0) < self.world:
                return
            number = self._tasks("handed out", 1) - 1

    def count_finished(self) -> None:
        """One more task is finished here."""
        self._tasks("finished", 1)

    def all_finished(self, todo: Sequence[Task]) -> bool:
        """Whether every task is finished, whoever had it."""
        return self._tasks("finished", 0) >= len(todo)

    def _tasks(self, what: str, more: int) -> int:
        """How many tasks are handed out or finished, with so many more."""
        if self._store is not None:
            return self._add(f"{self._job}/{what}", more)
        self._alone[what] += more
        return self._alone[what]

    def count(self, crops: int) -> None:
        """So many more crops were labelled here."""
        self._here += crops

    @property
    def crops(self) -> int:
        """The crops labelled by all processes, the others' as of some seconds ago."""
        return self._here + self._elsewhere

    def crops_now(self) -> int:
        """The same, asked anew where that is possible."""
        with contextlib.suppress(InputError):
            if self._store is not None and self._lost is None:
                self._tell_crops()
        return self.crops

    def wait(self, todo: Sequence[Task], meanwhile: Callable[[], None]) -> None:
        """The leader, out of work, waits for the others' last tasks, or until it is to stop."""
        while not self.stop.is_set() and not self.all_finished(todo):
            meanwhile()
            self.stop.wait(POLL_S)

    # ---- The end

    def ending(self, text: str) -> Exception:
        """What to raise when `stop` is set: the reason of the process that was the first to stop, which is `text` if it is this one."""
        if self._lost is not None:
            return InputError(self._lost)
        return Stopped(self._first_reason(text))

    def _first_reason(self, text: str) -> str:
        if self._store is None or not self._job:
            return text
        try:
            return str(self._store.compare_set(f"{self._job}/end", "", text).decode())
        except RuntimeError:  # the others are gone, and with them whom it could be told
            return text

    def close(self, error: BaseException | None = None) -> None:
        """Leaves the crew. The others learn of an error, and stop."""
        if self._store is None or self._closed.is_set():
            return
        self._closed.set()
        with contextlib.suppress(RuntimeError, InputError):
            if error is not None and self._lost is None:
                reason = str(error) or type(error).__name__
                if self._job:
                    self._first_reason(reason)
                elif not isinstance(error, Stopped):
                    self._put(f"process/{self.rank}", {"id": self._id, "failure": reason})
            elif self._job:
                self._tell_crops()
                self._put(f"left/{self._id}", {})
        self._thread.join(BEAT_S)

    # ---- The rendezvous store

    def _beat(self) -> None:
        """Every two seconds: says that this process lives, counts what all have done, looks whether one has stopped or fallen silent."""
        heard: dict[str, tuple[int, float]] = {}
        while not self._closed.wait(BEAT_S):
            try:
                self._add(f"beats/{self._id}", 1)
                if not self._job:
                    continue
                self._tell_crops()
                if self._get_text(f"{self._job}/end") is not None:
                    self.stop.set()
                for rank, process in list(self._watched.items()):
                    beats, now = self._add(f"beats/{process}", 0), time.monotonic()
                    before, since = heard.setdefault(process, (beats, now))
                    if beats != before:
                        heard[process] = beats, now
                    elif now - since > SILENT_S and self._get(f"left/{process}") is None:
                        raise InputError(_lost(f"process {rank} has not been heard of for {SILENT_S:.0f} s"))
            except InputError as error:
                self._lost = str(error)
                self.stop.set()
                return

    def _tell_crops(self) -> None:
        news = self._here - self._told
        self._told += news
        self._elsewhere = self._add(f"{self._job}/crops", news) - self._told

    def _put(self, key: str, value: dict[str, Any]) -> None:
        with _asking():
            assert self._store is not None
            self._store.set(key, json.dumps(value))

    def _get(self, key: str) -> Any:
        """What was put there, None as long as nothing was: never waits."""
        text = self._get_text(key)
        return None if text is None else json.loads(text)

    def _get_text(self, key: str) -> bytes | None:
        with _asking():
            assert self._store is not None
            return bytes(self._store.get(key)) if self._store.check([key]) else None

    def _add(self, key: str, number: int) -> int:
        with _asking():
            assert self._store is not None
            return int(self._store.add(key, number))


def _lost(why: str) -> str:
    return f"torchrun: {why}; what is labelled so far is kept: start the same command again to go on"


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.distributed's errors are RuntimeErrors
        raise InputError(_lost(f"its rendezvous cannot be reached any more ({' '.join(str(error).split())[:200]})")) from error


@contextlib.contextmanager
def joined_crew() -> Iterator[Crew]:
    """This process in torchrun's crew while the block lasts; alone without torchrun.

    Raises InputError for a WORLD_SIZE that is not torchrun's doing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Crew()
        return
    try:
        rank, world, local_rank, local_world = (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    except (KeyError, ValueError) as error:
        raise InputError(f"WORLD_SIZE: set, but {error} is not; start several processes with torchrun") from None
    with _asking():
        store, _, _ = next(rendezvous("env://", timeout=datetime.timedelta(seconds=STORE_S)))
    prefix = f"ferkd label, attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    crew = Crew(PrefixStore(prefix, store), rank, world, local_rank, local_world)
    try:
        yield crew
    except BaseException as error:
        crew.close(error)
        raise
    crew.close()
