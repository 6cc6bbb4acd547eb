"""Decoded photographs by image number: those that a store's labels were made from, those of a split, or all of them kept in memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ferkd import process
from ferkd.crops import decode
from ferkd.errors import InputError, StoreError
from ferkd.process import LARGER
from ferkd.sources import Photos, Split, read_photo
from ferkd.store import LabelStore


class DecodedSource(Protocol):
    """Where decoded photographs come from: a source, or memory."""

    def __call__(self, image: int) -> Tensor:
        """The photograph as uint8 [3, H, W]."""


class LabelledPhotos:
    """Reads and decodes a store's photographs, and refuses one that is not the one that was labelled."""

    def __init__(self, photos: Photos, store: LabelStore) -> None:
        self.photos, self.store = photos, store

    def __call__(self, image: int) -> Tensor:
        entry = self.store.entry(image)
        photo = read_photo(self.photos, entry.path, apply_exif=self.store.exif_applied)
        if photo.crc != entry.photo_crc:
            raise StoreError(
                f"{self.photos.name(entry.path)}: not the photograph that was labelled (its bytes changed); restore the file, "
                "or label the dataset again into a new store"
            )
        return photo.image


class SplitPhotos:
    """Reads and decodes the photographs of a split that has no labels."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __call__(self, image: int) -> Tensor:
        path, photos = self.split.paths[image], self.split.photos
        return decode(photos.read(path), name=photos.name(path))


class DecodedPhotos:
    """All photographs decoded once into one shared block of memory, for `--cache decoded`.

    Each process of torchrun's keeps its own. Raises InputError when they would fill more than half of the memory that is free, or more than
    there is of shared memory, shared out over torchrun's processes. One that cannot be read raises its error when it is asked for.
    """

    def __init__(self, source: DecodedSource, images: Sequence[int] | np.ndarray, threads: int) -> None:
        self.errors: dict[int, InputError] = {}

        def decoded(image: int) -> Tensor:
            try:
                return source(image)
            except InputError as error:
                self.errors[image] = error
                return torch.empty(3, 0, 0, dtype=torch.uint8)

        processes = process.local_processes()
        free, shared = process.available_memory() // processes, process.free_shared_memory() // processes
        its_share = f" that each of {processes} processes can have" if processes > 1 else ""
        self.slot = {int(image): slot for slot, image in enumerate(images)}
        photos: list[Tensor] = []
        size = 0
        with ThreadPoolExecutor(threads) as pool:
            for photo in pool.map(decoded, (int(image) for image in images)):
                size += photo.numel()
                photos.append(photo)
                if size > free // 2:
                    raise InputError(
                        f"cache: {len(photos):,} of {len(images):,} decoded photographs already fill {size / 2**30:.1f} GiB, "
                        f"more than half of the {free / 2**30:.1f} GiB of free memory{its_share}; train without --cache decoded"
                    )
                if size > shared:
                    raise InputError(
                        f"cache: {len(photos):,} of {len(images):,} decoded photographs already fill {size / 2**20:,.0f} MiB, "
                        f"/dev/shm has {shared / 2**20:,.0f} MiB free{its_share}; {LARGER}, or train without --cache decoded"
                    )
        self.shapes = [tuple(photo.shape[1:]) for photo in photos]
        self.ends = np.cumsum([0] + [photo.numel() for photo in photos])
        self.block = torch.empty(size, dtype=torch.uint8)
        try:
            self.block.share_memory_()  # one copy for all loader workers
        except RuntimeError as error:
            raise InputError(
                f"cache: {size / 2**20:,.0f} MiB of decoded photographs do not fit into shared memory; {LARGER}, "
                "or train without --cache decoded"
            ) from error
        for photo, start, end in zip(photos, self.ends[:-1], self.ends[1:], strict=True):
            self.block[start:end] = photo.permute(1, 2, 0).reshape(-1)

    def __call__(self, image: int) -> Tensor:
        if image in self.errors:
            raise self.errors[image]
        slot = self.slot[image]
        height, width = self.shapes[slot]
        photo: Tensor = self.block[self.ends[slot] : self.ends[slot + 1]].view(height, width, 3)
        return photo.permute(2, 0, 1)


def check_same_photos(photos: Photos, store: LabelStore, samples: int = 16) -> None:
    """Refuse photographs that are not those the store's labels were made from, by `samples` spread over it.

    Raises StoreError naming the first photograph that is missing or different. Every photograph is checked again when it is read.
    """
    labelled = LabelledPhotos(photos, store)
    for image in sorted({round(i) for i in np.linspace(0, len(store) - 1, samples)}):
        entry = store.entry(image)
        if entry.width == 0:
            continue  # could not be read when it was labelled
        if entry.path not in photos:
            raise StoreError(
                f"{store.source}: labelled {entry.path}, which is not in {photos}: deleted since, or is this the store of another dataset? "
                "Restore the photograph, or give the --data that was labelled"
            )
        labelled(image)
