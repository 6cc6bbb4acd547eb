"""Files that are there whole or not at all, also after a kill or a power cut, and the lock of a job that writes them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ferkd.errors import StoreError


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Turns an OSError of writing into a StoreError that names the file and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = ""
            with contextlib.suppress(OSError):
                free = f" ({shutil.disk_usage(path.parent).free:,} bytes free)"
            what = f"the disk is full{free}; free some space"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            what = f"cannot be written ({error.strerror}); make the folder writable or choose another --out"
        else:
            what = f"cannot be written ({error.strerror or error})"
        raise StoreError(f"{path}: {what}. What was labelled so far is safe: run the same command again to go on") from error


def cache_folder() -> Path:
    """Where fetched stores and indices of tars are kept: $FERKD_CACHE, else $XDG_CACHE_HOME/ferkd, else ~/.cache/ferkd."""
    if chosen := os.environ.get("FERKD_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ferkd"


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


NO_SUCH_CALL = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What file systems answer that have no locks (Lustre without `-o flock`, NFS without its lock service, some of FUSE's)."""


def sync_folder(folder: Path) -> None:
    """Makes a folder's list of names safe, where the file system can: some refuse (CIFS), and their renames are what they are."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, *NO_SUCH_CALL):
            raise
    finally:
        os.close(fd)


def write_whole(path: Path, chunks: Iterable[bytes]) -> None:
    """Writes a file so that it is there whole or not at all, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with naming_file(path):
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                for chunk in chunks:
                    write_all(fd, chunk)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except OSError:
            with contextlib.suppress(OSError):  # half a file would only keep the disk full
                temporary.unlink()
            raise


_HEARTBEAT_S = 10.0
_STALE_S = 60.0


class JobLock:
    """One labelling job holds a store: flock on this machine; for others, which may not see it, host, pid and a heartbeat.

    `token` stands in the file as long as the lock is held, and names the job to processes that join it. Where the file system has no locks,
    host, pid and heartbeat are all there is, and two jobs begun within the same moment are told apart by the token at their first write.
    """

    def __init__(self, path: Path, who: str = "another labeller") -> None:
        self._path = path
        self._fd = -1
        self._pid = os.getpid()
        self.token = secrets.token_hex(8)
        host = socket.gethostname()
        with naming_file(path):
            locked = True
            while True:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno in NO_SUCH_CALL:
                        locked = False
                        break
                    holder = _holder(os.pread(fd, 4096, 0))
                    os.close(fd)
                    if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                        raise
                    raise StoreError(
                        f"{path.parent}: {who} is at work on it ({holder['pid']} on {holder['host']}); let it finish, or stop it first"
                    ) from None
                try:
                    if os.fstat(fd).st_ino == os.stat(path).st_ino:
                        break
                except FileNotFoundError:
                    pass
                os.close(fd)  # its holder removed it just now: the lock is on a file that has no name any more
        self._fd = fd
        try:
            self._check_unseen(host, locked)
            text = json.dumps({"host": host, "pid": os.getpid(), "job": self.token}).encode()
            with naming_file(path):
                os.ftruncate(fd, 0)
                os.pwrite(fd, text, 0)
                os.fsync(fd)
        except BaseException:
            os.close(fd)
            self._fd = -1
            raise
        self._ended = threading.Event()
        threading.Thread(target=self._beat, args=(fd, self._ended), name="store lock", daemon=True).start()
        _held.add(self)

    def _check_unseen(self, host: str, locked: bool) -> None:
        """Refuses a lock whose heartbeat is fresh and whose holder flock may not have shown: another machine's, since flock may not reach
        across a network file system; and this one's, if it runs, where there is no flock (not `locked`)."""
        holder = _holder(os.pread(self._fd, 4096, 0))
        if holder["host"] is None or (holder["host"] == host and (locked or not _runs(holder["number"]))):
            return
        last = os.fstat(self._fd).st_mtime
        probe = self._path.with_name("lock.tmp")  # the file system's own clock, which may differ from ours
        with naming_file(probe):
            probe.touch()
            now = probe.stat().st_mtime
            probe.unlink(missing_ok=True)
        if now - last < _STALE_S:
            raise StoreError(
                f"{self._path.parent}: {holder['pid']} on {holder['host']} was at work on it {now - last:.0f} s ago; "
                "let it finish or stop it; "
                f"if it is dead, start again in {_STALE_S - (now - last):.0f} s"
            )

    @staticmethod
    def _beat(fd: int, ended: threading.Event) -> None:
        while not ended.wait(_HEARTBEAT_S):
            with contextlib.suppress(OSError):  # a full or vanished disk is told where something is written
                os.utime(fd)

    def release(self) -> None:
        if self._fd < 0 or os.getpid() != self._pid:
            return
        self._ended.set()
        if lock_token(self._path) == self.token:  # else another job took it over, as that of one that did not beat
            with contextlib.suppress(OSError):
                self._path.unlink()
        os.close(self._fd)
        self._fd = -1

    def forget(self) -> None:
        """In a forked child: lets go of the file, or the child (a loader's worker) would go on holding the lock of a killed parent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


_held: weakref.WeakSet[JobLock] = weakref.WeakSet()


def _forget_locks() -> None:
    for lock in list(_held):
        lock.forget()


os.register_at_fork(after_in_child=_forget_locks)


def lock_token(path: Path) -> str | None:
    """The token of the job that holds a lock, or held it last; None when there is none."""
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return holder.get("job") if isinstance(holder, dict) else None


def _holder(text: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        holder = json.loads(text)
        if isinstance(holder, dict):
            return {"host": holder.get("host"), "pid": f"process {holder.get('pid')}", "number": holder.get("pid")}
    return {"host": None, "pid": "a process", "number": None}


def _runs(pid: Any) -> bool:
    """Whether a process of this number is there, other than this one."""
    if not isinstance(pid, int) or pid in (0, os.getpid()):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is there, and another user's
        pass
    return True
