"""ferkd's crops and labels for a training loop of your own: one object that yields batches, keyed by (seed, step)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ferkd import process
from ferkd.crops import Interpolation
from ferkd.data import CropBatch, CropView, StoredCrops, loaded, training_loader
from ferkd.errors import InputError
from ferkd.mixing import MixedRows, Mixing, draw_mixing
from ferkd.photos import DecodedPhotos, DecodedSource, LabelledPhotos, check_same_photos
from ferkd.records import Records
from ferkd.regions import RegionPolicy
from ferkd.sources import labelled_photos
from ferkd.store import LabelStore
from ferkd.stream import CropStream, StreamSampler, plan_phases


class CropLoader:
    """Batches of stored crops with their labels, image-major, `crops_per_image` of each of batch_size / crops_per_image images.

        loader = CropLoader("photos", "labels", size=224, batch_size=256, epochs=100, policy=policy)
        for step, batch in enumerate(loader):
            loss = ferkd_loss(student(normalise(batch.pixels)), loader.records(batch), batch.target, policy=policy)

    Crops that `policy` discards are never decoded; give the loss the same policy. The order is a pure function of (seed, step): iterating
    goes on from `first_step`, so that a resumed run sees what it would have seen. One epoch is as many crops as there are usable images
    (FKD's counting); the last `single_crop_epochs` take one crop an image (default: crops_per_image of them, at most a quarter of all).
    `rank` of `world_size` processes gets its share of every step; batch_size counts the crops of all. `workers`: loader processes, default
    one a core but one, at most 8, shared out over torchrun's processes. `cache` keeps every decoded photograph in shared memory.

    `data` is what `--data` takes: a folder, wds:DIR or hf:NAME (docs/sources.md).

    Raises InputError for settings that do not fit each other or the store, StoreError for photographs that are not those labelled.
    """

    def __init__(
        self,
        data: str | os.PathLike[str],
        labels: str | os.PathLike[str] | LabelStore,
        *,
        size: int,
        batch_size: int,
        epochs: float,
        crops_per_image: int = 4,
        single_crop_epochs: float | None = None,
        policy: RegionPolicy = RegionPolicy(),
        interpolation: Interpolation = "bilinear",
        seed: int = 0,
        first_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int | None = None,
        cache: bool = False,
    ) -> None:
        self.store = labels if isinstance(labels, LabelStore) else LabelStore(labels)
        encoded = labelled_photos(data, self.store)
        check_same_photos(encoded, self.store)
        self.usable = np.flatnonzero(self.store.scan(policy).usable)
        cores = (os.cpu_count() or 1) // process.local_processes()
        if not 0 <= rank < world_size:
            raise InputError(f"rank: {rank} is not one of {world_size} processes; give a number from 0 to world_size - 1")
        self.workers = min(8, max(0, cores - 1)) if workers is None else workers
        single = min(crops_per_image, epochs / 4) if single_crop_epochs is None else single_crop_epochs
        images = max(1, len(self.usable))
        self._stream = CropStream(len(self.usable), batch_size, plan_phases(images, batch_size, epochs, crops_per_image, 0.0, single), seed)
        if not 0 <= first_step <= self._stream.total_steps:
            raise InputError(f"first_step: {first_step} is not one of the {self._stream.total_steps:,} steps of {epochs:g} epochs")
        photos: DecodedSource = LabelledPhotos(encoded, self.store)
        if cache:
            photos = DecodedPhotos(photos, self.usable, max(1, self.workers))
        self._crops = StoredCrops(photos, self.store, self.usable, policy, CropView(size, interpolation), seed)
        self._sampler = StreamSampler(self._stream, first_step, self._stream.total_steps, rank, world_size)
        self.epochs_a_step, self.seed, self.size = batch_size / images, seed, size

    def __len__(self) -> int:
        """The steps that iterating yields."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[CropBatch]:
        """CropBatches: pixels uint8 [B, 3, S, S], label words int32 [B, W], target int64 [B]; pinned where there is a GPU."""
        return loaded(training_loader(self._crops, self._sampler, self.workers, pin_memory=torch.cuda.is_available()))

    def crops_per_image(self, step: int) -> int:
        """How many crops of each image a step's batch holds: 1 in the last epochs."""
        return self._stream.crops_per_image(step)

    def draw_mixing(self, step: int, mixing: Mixing) -> MixedRows | None:
        """Partners, weights and boxes for a step's batch, as `ferkd train` draws them, keyed by (seed, step); None when nothing is mixed.

        They are for mix_pixels(pixels, mixed) and ferkd_loss(..., mix=(mixed.partner, mixed.lam)), on the CPU. Raises InputError for a mix
        group that does not divide this process's images of a step.
        """
        crops, sampler = self.crops_per_image(step), self._sampler
        images = self._stream.batch_size // crops // sampler.world
        return draw_mixing(mixing, self.seed, step, self._stream.first_slot(step) + sampler.rank * images, images, crops, self.size)

    def records(self, batch: CropBatch, device: torch.device | str | None = None) -> Records:
        """A batch's labels as ferkd_loss takes them, moved to `device`."""
        words = batch.words
        assert isinstance(words, Tensor)  # a store has labels
        if device is not None:
            words = words.to(device, non_blocking=True)
        return Records(words, self.store.label_codec, self.store.k, self.store.classes)
