"""Stores that lie elsewhere: http(s)://, s3://, gs:// and whatever else fsspec knows, and hf://datasets/OWNER/NAME on the Hugging Face Hub.

A store is fetched whole, once, into a local cache, and is read there like any other. Not shard by shard as it is used: training reads every
shard in its first pass, in random order, and a policy's first use reads all of them; half a store would only move the wait, and the errors
of a network, into the middle of a run. The manifest comes first; its seal, and the size and SHA-256 it gives of every file, decide what
is accepted, so that neither a damaged nor a half-fetched store is taken for a whole one. The cache is addressed by the manifest's hash:
a store that was changed at its source is another entry, and the same store from two places is one.

fsspec, and the package that a kind of address needs, are imported only when there is such an address.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ferkd.durable import NO_SUCH_CALL, cache_folder, sync_folder
from ferkd.errors import InputError, StoreError, one_line
from ferkd.manifest import Manifest, Shard, file_sha256, read_manifest

DOWNLOADS = 4
ATTEMPTS = 4
WAIT_S = 1.0
"""Before the second attempt; twice as long before each further one."""
SAY_S = 5.0
SILENCE_S = 60.0
"""How long a web server may send nothing. A file as a whole may take any time: aiohttp's own limit of 300 s cuts shards off a slow line."""

_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/+(.*)", re.DOTALL)
_EXTRAS = {"http": "remote", "https": "remote", "hf": "hub", "s3": "s3", "s3a": "s3"}


def url_of(path: str | os.PathLike[str]) -> str | None:
    """The address that `path` is, or None for a path on this machine. pathlib makes one slash of two: that is mended."""
    found = _URL.fullmatch(os.fspath(path))
    if found is None:
        return None
    scheme, rest = found[1].lower(), found[2].rstrip("/")
    return f"{scheme}://{'/' if scheme in ('file', 'local') else ''}{rest}"


def shown(url: str) -> str:
    """The address without user name, password and query, as messages, logs and configurations have it."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def plainly(path: str | os.PathLike[str]) -> str:
    """A path or address as messages and records have it."""
    url = url_of(path)
    return os.fspath(path) if url is None else shown(url)


def refuse_url(path: str | os.PathLike[str], flag: str) -> None:
    """Raises InputError where something that is to be written has an address elsewhere."""
    if (url := url_of(path)) is not None:
        raise InputError(
            f"{flag}: {shown(url)} is not on this machine; write into a local folder and copy it when it is finished "
            "(hf upload OWNER/NAME FOLDER --repo-type dataset; aws s3 sync FOLDER s3://...; rsync)"
        )


def is_cached(path: Path) -> bool:
    """Whether a file or folder is of a store that was fetched."""
    return path.is_relative_to(cache_folder() / "stores")


def fetched(url: str) -> Path:
    """The local folder of the store at `url`, fetched if it is not there yet. One process fetches, others on this machine wait for it.

    Where the address cannot be reached, the copy that was fetched from it last is used, which is said aloud.
    Raises StoreError, which names the address, for anything that is not a whole store there, for a network that keeps failing, and for a
    cache without room; what was fetched by then is kept.
    """
    place = _Place(url)
    cache = cache_folder()
    pointer = cache / "urls" / hashlib.sha256(place.name.encode()).hexdigest()[:32]
    with _naming_cache(cache):
        pointer.parent.mkdir(parents=True, exist_ok=True)
        (cache / "stores").mkdir(exist_ok=True)
    try:
        text = place.read("manifest.json")
    except _Unreachable as error:
        kept = _last_fetched(cache, pointer)
        if kept is None:
            raise StoreError(str(error)) from error
        _say(f"{error}; using the copy that was fetched before, {kept}")
        return kept
    with tempfile.TemporaryDirectory() as aside:
        (Path(aside) / "manifest.json").write_bytes(text)
        try:
            manifest = read_manifest(Path(aside))
        except StoreError as error:
            raise StoreError(str(error).replace(aside, place.name)) from error
    folder = cache / "stores" / manifest.sha256[:32]
    if not _is_whole(folder, manifest):
        with _naming_cache(folder), _alone(folder.with_name(f"{folder.name}.lock"), place.name):
            if not _is_whole(folder, manifest):
                folder.mkdir(exist_ok=True)
                _fetch(place, manifest, folder)
                _put(folder / "manifest.json", text)  # last: only a whole store has one
    with _naming_cache(cache):
        _put(pointer, folder.name.encode())
    return folder


class _Unreachable(Exception):
    """Nobody answered: not the store's fault."""


class _Place:
    """An address's file system, and errors that name it without its secrets."""

    def __init__(self, url: str) -> None:
        self.name = shown(url)
        parts = urllib.parse.urlsplit(url)
        scheme = parts.scheme
        if parts.query or parts.fragment:
            raise StoreError(f"{self.name}: an address with a query names one file; give the store's folder")
        self._secret = parts.netloc.rpartition("@")[0]
        extra = _EXTRAS.get(scheme, "remote")
        try:
            import fsspec

            self.files, self.root = fsspec.core.url_to_fs(url, **_patience(scheme))
        except ImportError as error:
            raise StoreError(
                f"{self.name}: a store elsewhere needs a package that is not installed ({one_line(error)}); pip install 'ferkd[{extra}]'"
            ) from error
        except Exception as error:
            raise StoreError(f"{self.name}: no such kind of address, or not one of a folder ({self._words(error)})") from error

    def read(self, file: str) -> bytes:
        return bytes(self._tried(file, lambda path: self.files.cat_file(path)))

    def get(self, file: str, to: Path) -> None:
        self._tried(file, lambda path: self.files.get_file(path, str(to)))

    def _tried(self, file: str, act: Callable[[str], Any]) -> Any:
        """act(path), again after a while when that may help."""
        path = f"{self.root.rstrip('/')}/{file}"
        attempts = 2 if self.name.startswith("hf:") else ATTEMPTS  # the Hub's file system itself tries a broken connection six times
        for attempt in range(attempts):
            try:
                return act(path)
            except FileNotFoundError as error:
                hidden = " (if it is private or gated: hf auth login)" if self.name.startswith("hf:") else ""  # both look the same
                raise StoreError(
                    f"{self.name}: has no {file}: this is not a whole store of labels; give the folder that ferkd label wrote{hidden}"
                ) from error
            except Exception as error:
                if isinstance(error, MemoryError):
                    raise
                status = _status(error)
                if isinstance(error, OSError) and _is_of_this_machine(error):
                    raise
                if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ == "NoCredentialsError":
                    raise StoreError(
                        f"{self.name}: access to {file} was refused ({self._words(error)}); log in as the service has it "
                        "(hf auth login, aws configure)"
                    ) from error
                text = f"{self.name}: {file} cannot be fetched ({self._words(error)}); start the same command again to go on"
                if status is not None and 400 <= status < 500 and status not in (408, 429):
                    raise StoreError(text) from error  # an answer, and a no
                if attempt == attempts - 1:
                    raise _Unreachable(text) from error
                time.sleep(WAIT_S * 2**attempt)
        raise AssertionError

    def _words(self, error: BaseException) -> str:
        words = one_line(error) or type(error).__name__
        return words.replace(self._secret, "...") if self._secret else words


def _patience(scheme: str) -> dict[str, Any]:
    """What fsspec's file system of this kind is to be told about waiting."""
    if scheme not in ("http", "https"):
        return {}
    import aiohttp

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)}}


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error is about: aiohttp's errors have it themselves, the Hub's in their response."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_of_this_machine(error: OSError) -> bool:
    """Whether it is the cache's disk that failed: waiting does not help."""
    here = str(cache_folder())
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) or str(error.filename or "").startswith(here)


def _fetch(place: _Place, manifest: Manifest, folder: Path) -> None:
    """The index and the shards that `folder` lacks, each checked before it gets its name."""
    missing = [file for file in (manifest.index, *manifest.shards) if not _has(folder, file)]
    size = sum(file.bytes for file in missing)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise StoreError(
            f"{folder}: {place.name} needs {size / 2**20:,.1f} MiB here and {free / 2**20:,.1f} MiB are free; make room, or "
            "set FERKD_CACHE to a folder on a larger disk"
        )
    _say(f"{place.name}: fetching {len(missing):,} files, {size / 2**20:,.1f} MiB, into {folder}")
    told, done, guard, stop = time.monotonic(), 0, threading.Lock(), threading.Event()

    def one(file: Shard) -> None:
        nonlocal told, done
        if stop.is_set():
            return
        _fetch_one(place, file, folder)
        with guard:
            done += file.bytes
            if time.monotonic() - told > SAY_S:
                told = time.monotonic()
                _say(f"{place.name}: {done / 2**20:,.1f} of {size / 2**20:,.1f} MiB")

    with ThreadPoolExecutor(DOWNLOADS) as pool:
        for result in [pool.submit(one, file) for file in missing]:
            try:
                result.result()
            except _Unreachable as error:
                stop.set()
                raise StoreError(str(error)) from error
            except BaseException:
                stop.set()
                raise


def _fetch_one(place: _Place, file: Shard, folder: Path) -> None:
    part = folder / f"{file.file}.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(ATTEMPTS):
        place.get(file.file, part)
        if (size := part.stat().st_size) == file.bytes and file_sha256(part) == file.sha256:
            break
        if size >= file.bytes or attempt == ATTEMPTS - 1:  # what is short may have been cut by the network
            part.unlink()
            what = f"{size:,} bytes instead of {file.bytes:,}" if size != file.bytes else "its SHA-256 is another"
            raise StoreError(
                f"{place.name}/{file.file}: is not the file that the store's manifest names ({what}): damaged there, or "
                "changed while it was fetched; start again, and if it stays so, upload the store again"
            )
        time.sleep(WAIT_S * 2**attempt)
    with open(part, "rb+") as written:
        os.fsync(written.fileno())
    os.replace(part, folder / file.file)
    sync_folder(part.parent)


def _has(folder: Path, file: Shard) -> bool:
    with contextlib.suppress(OSError):
        return os.stat(folder / file.file).st_size == file.bytes
    return False


def _is_whole(folder: Path, manifest: Manifest) -> bool:
    return (folder / "manifest.json").is_file() and all(_has(folder, file) for file in (manifest.index, *manifest.shards))


def _last_fetched(cache: Path, pointer: Path) -> Path | None:
    try:
        folder = cache / "stores" / pointer.read_text()
        return folder if _is_whole(folder, read_manifest(folder)) else None
    except (OSError, ValueError):
        return None


def _put(path: Path, text: bytes) -> None:
    """A small file, whole or not at all."""
    fd, aside = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    with open(fd, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


@contextlib.contextmanager
def _alone(lock: Path, name: str) -> Iterator[None]:
    """Held by one process at a time; the kernel frees it when that one dies."""
    with open(lock, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"{name}: another process is fetching it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_SUCH_CALL:
                raise
            _say(f"{name}: {lock.parent} has no locks, so let one process fetch it alone, or set FERKD_CACHE to a local folder")
        yield


@contextlib.contextmanager
def _naming_cache(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{error.filename or folder}: the cache of stores cannot be written ({error.strerror or one_line(error)}); make room or "
            "make it writable, or set FERKD_CACHE to another folder. What was fetched so far is kept"
        ) from error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
