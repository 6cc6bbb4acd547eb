"""Writing a store: what identifies the job, who holds it, what is missing, and the whole at the end.

It can be killed at any moment and started again. A store appears whole or not at all: its manifest is written last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ferkd.crops import CropSettings
from ferkd.durable import JobLock, lock_token, naming_file, sync_folder, write_whole
from ferkd.errors import InputError, StoreError
from ferkd.manifest import (
    FORMAT,
    INDEX_HEADER,
    INDEX_MAGIC,
    VERSION,
    PathTable,
    Shard,
    file_sha256,
    read_manifest,
    read_sealed,
    sealed_json,
)
from ferkd.records import BoxCodec, LabelCodec, crop_bytes
from ferkd.remote import refuse_url
from ferkd.shards import ROW, UNIT_IMAGES, LabelledImage, ShardRows, ShardWriter, shard_file

if TYPE_CHECKING:
    from ferkd.store import LabelStore

SHARD_BYTES = 64 << 20
SHARDS = 256


def images_a_shard(image_bytes: int, images: int) -> int:
    """The images of a full shard, in whole units of 64: as many as fit 64 MiB, but of `images` so few that there are up to 256 shards,
    since shards are what processes that label together share out. It depends on nothing but the job, as a store's bytes must.
    """
    by_size = SHARD_BYTES // image_bytes // UNIT_IMAGES * UNIT_IMAGES
    by_count = -(-images // (SHARDS * UNIT_IMAGES)) * UNIT_IMAGES
    return max(UNIT_IMAGES, min(by_size, by_count))


@dataclasses.dataclass(frozen=True, eq=False)
class StorePlan:
    """All that identifies a labelling job. Two plans that differ in more than device and software versions make different stores.

    `targets` [N] integer: the ground truth of each image, in the order of `paths`. `folders`: class folder name -> class id.
    `provenance` is JSON-able and holds teacher, preprocessing, software, decoder, resampler, device and the dataset's fingerprint;
    differences in `device`, `software` and in the versions of `decoder` and `resampler` only warn on resuming.
    Raises InputError for values that cannot be.
    """

    paths: PathTable
    targets: npt.NDArray[Any]
    crops: int
    k: int
    class_names: Sequence[str]
    folders: Mapping[str, int]
    box_codec: BoxCodec
    label_codec: LabelCodec
    crop_settings: CropSettings
    batch_size: int
    temperature: float
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        classes = len(self.class_names)
        crop_bytes(self.box_codec, self.label_codec, self.k, classes)
        targets = np.asarray(self.targets)
        if targets.shape != (len(self.paths),) or targets.dtype.kind not in "iu":
            raise InputError(f"targets: {targets.dtype} {targets.shape}; give one class id for each of the {len(self.paths):,} images")
        if int(targets.min()) < 0 or int(targets.max()) >= classes:
            raise InputError(f"targets: {int(targets.min())} to {int(targets.max())}; class ids run from 0 to {classes - 1}")
        for name, highest in (("crops", 1 << 32), ("batch_size", 1 << 32)):
            if not 1 <= getattr(self, name) < highest:
                raise InputError(f"{name}: {getattr(self, name)}; give a whole number of at least 1")
        try:
            json.dumps(self.provenance, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"provenance: cannot be written as JSON: {error}") from error

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def image_bytes(self) -> int:
        return self.crops * crop_bytes(self.box_codec, self.label_codec, self.k, self.classes)

    @property
    def shard_images(self) -> int:
        return images_a_shard(self.image_bytes, len(self.paths))

    def job(self) -> dict[str, Any]:
        """The plan as the manifest's first keys, in JSON's own types."""
        job = {
            "format": FORMAT,
            "version": VERSION,
            "images": len(self.paths),
            "crops": self.crops,
            "k": self.k,
            "classes": self.classes,
            "box_codec": self.box_codec,
            "label_codec": self.label_codec,
            "crop_settings": dataclasses.asdict(self.crop_settings),
            "temperature": float(self.temperature),
            "batch_size": self.batch_size,
            "shard_images": self.shard_images,
            "dataset": {
                "paths_sha256": self.paths.sha256(),
                "targets_sha256": hashlib.sha256(np.ascontiguousarray(self.targets, "<u4").data).hexdigest(),
            },
            "provenance": self.provenance,
            "class_names": list(self.class_names),
            "folders": dict(sorted(self.folders.items())),
        }
        plain: dict[str, Any] = json.loads(json.dumps(job))
        return plain


class StoreWriter:
    """Writes a store, or goes on with one that was begun: units of 64 images, then whole shards, then index and manifest.

    Everything written is safe when the call returns; a kill at any moment loses one unit at most, and the finished store is the same
    to the byte. A shard that is missing or short in a finished store is written anew. Other processes may write shards of the same job
    (see `joined_shards`) while this one holds the store's lock.

    Raises StoreError when `out` holds something else or another labelling job (it names what differs), when another labeller is at
    work on it, and when nothing can be written (disk full, read-only). Use it as a context manager, or call close().
    """

    def __init__(self, out: str | os.PathLike[str], plan: StorePlan) -> None:
        refuse_url(out, "out")
        self.path, self.plan = Path(out), plan
        self._job = plan.job()
        self._resumed_with: list[str] = []
        self._shards = ShardWriter(self.path, plan, _job_key(self._job))
        with naming_file(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise StoreError(f"{self.path}: is a file; give a folder")
            known = {"lock", "shards", "policies", "job.json", "manifest.json", "index.bin"}
            if self.path.is_dir() and not {"job.json", "manifest.json"} & set(os.listdir(self.path)):
                others = sorted(name for name in os.listdir(self.path) if name not in known and not name.endswith(".tmp"))
                if others:
                    raise StoreError(f"{self.path}: holds {others[0]!r} and is not a store; give a new or empty folder")
            (self.path / "shards").mkdir(parents=True, exist_ok=True)
        self._lock = JobLock(self.path / "lock")
        self._shards.held_by = self._lock.token  # one that was suspended for long may have lost it to another job
        try:
            self._resume()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the store free for others. What is written stays."""
        self._shards.close()
        self._lock.release()

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: the store has its manifest."""
        return (self.path / "manifest.json").exists()

    @property
    def token(self) -> str:
        """What names this run of the job to processes that join it."""
        return self._lock.token

    def _resume(self) -> None:
        job_file, manifest_file = self.path / "job.json", self.path / "manifest.json"
        if manifest_file.exists():
            content = read_sealed(manifest_file, "label into another folder")
            differences = self._compare(content, manifest_file)
            self._resumed_with = content["resumed_with"]
            if all(self._shards.is_whole(shard) for shard in range(self._shards.shards)):
                self._clean()
                return
            self._resumed_with = sorted({*content["resumed_with"], *differences})
            self._unfinish()
        elif job_file.exists():
            content = read_sealed(job_file, "delete the folder and label again")
            differences = self._compare(content, job_file)
            self._job["provenance"] = content["provenance"]
            self._resumed_with = content["resumed_with"]
            self.note(differences)
        else:
            self._write_job()
        for shard in range(self._shards.shards):
            if not self._shards.is_done(shard) and self._shards.next_image(shard) > self._shards.range(shard)[1]:
                self._shards.finish_shard(shard)  # killed between the last unit and the whole shard

    def _write_job(self) -> None:
        write_whole(self.path / "job.json", [sealed_json({**self._job, "resumed_with": self._resumed_with})])

    def note(self, differences: Iterable[str]) -> None:
        """Notes in what the machines of later runs, or of processes that join, differ from the first: part of the finished manifest."""
        noted = sorted({*self._resumed_with, *differences})
        if noted != self._resumed_with and not self.finished:
            self._resumed_with = noted
            self._write_job()

    def _compare(self, found: Mapping[str, Any], file: Path) -> list[str]:
        differences = _compare_jobs(found, self._job, file)
        if differences:
            warnings.warn(
                f"{self.path}: was begun with other hardware or software ({'; '.join(text for text in differences.values())}); "
                "the labels will agree closely, not to the bit",
                stacklevel=4,
            )
        return list(differences)

    # -- What there is to do

    def missing(self) -> list[tuple[int, int, int]]:
        """What is left, in order: (shard, the first image that is not safe yet, the shard's last image)."""
        if self.finished:
            return []
        shards = self._shards
        return [(i, shards.next_image(i), shards.range(i)[1]) for i in range(shards.shards) if not shards.is_done(i)]

    def write_unit(self, shard: int, images: Sequence[LabelledImage], first: int | None = None) -> None:
        """Appends the shard's next images: see ShardWriter."""
        self._shards.write_unit(shard, images, first)

    def finish_shard(self, shard: int) -> None:
        """Turns a shard whose units are all written into its file: see ShardWriter."""
        self._shards.finish_shard(shard)

    # -- The whole store

    def finish(self, failed: Mapping[str, str] | None = None) -> LabelStore:
        """Writes index and manifest when every shard is there, clears up, and opens the store.

        `failed` (path -> reason) replaces the reasons that were given with the units. Raises InputError when shards are missing.
        """
        if not self.finished:
            todo = self.missing()
            if todo:
                raise InputError(
                    f"{self.path}: {len(todo)} of {self._shards.shards} shards are not labelled yet; write them before finish()"
                )
            paths = self.plan.paths
            shards = []
            all_rows = []
            reasons: dict[str, str] = {}
            for shard in range(self._shards.shards):
                rows, failures, sha256 = self._shards.read_rows(shard)
                all_rows.append(rows)
                reasons.update({paths[int(image)]: reason for image, reason in failures.items()})
                images = len(rows) // ROW.size
                shards.append(dataclasses.asdict(Shard(shard_file(shard), images, images * self.plan.image_bytes, sha256.hex())))
            reasons.update({path: reason for path, reason in (failed or {}).items() if path in reasons})
            head = INDEX_HEADER.pack(INDEX_MAGIC, VERSION, ROW.size, len(paths), int(paths.offsets[-1]))
            offsets = np.ascontiguousarray(paths.offsets, "<u8").tobytes()
            digest, size = hashlib.sha256(), 0

            def index() -> Iterator[bytes]:
                nonlocal size
                for chunk in (head, offsets, *all_rows, *paths.chunks()):
                    digest.update(chunk)
                    size += len(chunk)
                    yield chunk

            write_whole(self.path / "index.bin", index())
            content = {**self._job, "resumed_with": self._resumed_with, "shards": shards}
            content["index"] = dataclasses.asdict(Shard("index.bin", len(paths), size, digest.hexdigest()))
            content["failed"] = dict(sorted(reasons.items()))
            write_whole(self.path / "manifest.json", [sealed_json(content)])
            self._clean()
        self.close()
        from ferkd.store import LabelStore  # which offers this module's classes, too

        return LabelStore(self.path)

    def _clean(self) -> None:
        """Removes what only labelling needs."""
        with naming_file(self.path):
            for name in os.listdir(self.path / "shards"):
                if name.endswith((".rows", ".part", ".tmp")):
                    (self.path / "shards" / name).unlink()
            for name in ("job.json", "job.json.tmp", "index.bin.tmp", "manifest.json.tmp"):
                (self.path / name).unlink(missing_ok=True)

    def _unfinish(self) -> None:
        """Makes a finished store with damaged shards one that is being labelled and lacks just these."""
        manifest = read_manifest(self.path)
        index = self.path / "index.bin"
        if not index.exists() or file_sha256(index) != manifest.index.sha256:
            raise StoreError(
                f"{index}: is missing or damaged, so that the other shards cannot be kept; fetch it again, or label into another folder"
            )
        data = index.read_bytes()
        rows_at = INDEX_HEADER.size + 8 * (manifest.images + 1)
        numbers = {path: self.plan.paths.index_of(path) for path in manifest.failed}
        self._job["provenance"] = dict(manifest.provenance)
        self._write_job()
        for shard, described in enumerate(manifest.shards):
            if not self._shards.is_whole(shard):
                self._shards.file(shard, ".rows").unlink(missing_ok=True)
                continue
            first, last = self._shards.range(shard)
            rows = data[rows_at + ROW.size * first : rows_at + ROW.size * (last + 1)]
            failures = {str(numbers[path]): reason for path, reason in manifest.failed.items() if first <= numbers[path] <= last}
            self._shards.write_rows(shard, ShardRows(rows, failures, bytes.fromhex(described.sha256)))
        with naming_file(self.path):
            (self.path / "manifest.json").unlink()
            sync_folder(self.path)


def joined_shards(out: str | os.PathLike[str], plan: StorePlan, token: str) -> tuple[ShardWriter, list[str]]:
    """For a process that joins a job which another one holds: a writer for the shards it is given, and in what its machine differs.

    `token` is the holder's StoreWriter.token. Raises StoreError when the folder is not the one that the holder writes to, or when the two
    were given different settings, data or teachers.
    """
    path = Path(out)
    if lock_token(path / "lock") != token:
        raise StoreError(f"{path}: is not the folder that process 0 writes to; every machine must see the same --out, on a disk they share")
    job = plan.job()
    differences = _compare_jobs(read_sealed(path / "job.json", "delete the folder and label again"), job, path / "job.json")
    return ShardWriter(path, plan, _job_key(job), held_by=token), list(differences)


def _job_key(job: Mapping[str, Any]) -> int:
    """Marks the units of a job: the same for all who work at it, whatever their machines."""
    settings = json.dumps({key: value for key, value in job.items() if key != "provenance"}, sort_keys=True)
    return int.from_bytes(hashlib.sha256(settings.encode()).digest()[:8], "little")


def _compare_jobs(found: Mapping[str, Any], wanted: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Compares a job found in `file` with the one wanted: StoreError for a difference. Those that only warn are returned, as they are noted
    in a manifest (with this job's value), each with its text for people.
    """
    told = {}
    for name, there, here in _differences(found, wanted):
        text = f"{name}: {_short(here)} here, {_short(there)} there"
        if name.split(".")[:2] in (["provenance", "device"], ["provenance", "software"]) or name in (
            "provenance.decoder.version",
            "provenance.resampler.version",
        ):
            told[f"{name}: {_short(here)}"] = text
        elif name.startswith("dataset."):
            raise StoreError(f"{file}: is of another dataset ({name.split('_')[0].removeprefix('dataset.')} differ); choose another --out")
        elif name == "provenance.dataset_fingerprint":
            raise StoreError(
                f"{file}: was begun with other photographs (a name or a size has changed since); restore them, or choose another --out"
            )
        else:
            raise StoreError(f"{file}: another labelling job: {text}; use the same settings, or choose another --out")
    return told


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The settings in which two jobs differ, as (dotted name, found, wanted); keys that only `found` has at its top are not the plan's."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in wanted if not name else sorted({*found, *wanted}):
            yield from _differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted:
        yield name, found, wanted


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
