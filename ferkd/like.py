"""Labelling another store's crops with another teacher, so that the two stores can be merged."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from ferkd.errors import InputError
from ferkd.sources import Split, check_same_kind
from ferkd.store import LabelStore
from ferkd.teacher import TeacherClasses


def images_of(store: LabelStore, train: Split) -> NDArray[np.int64]:
    """The places in `train` of the store's images, in their order [N]. Raises InputError naming one that is not there."""
    check_same_kind(train.photos, store)
    places = np.empty(len(store), np.int64)
    place, there = 0, len(train)
    for image in range(len(store)):  # both are sorted
        wanted = store.paths.raw(image)
        while place < there and train.paths.raw(place) < wanted:
            place += 1
        if place == there or train.paths.raw(place) != wanted:
            raise InputError(f"{train}: lacks {store.paths[image]}, which {store.source} has labels of; give the dataset that was labelled")
        places[image] = place
    return places


def same_classes(store: LabelStore, classes: TeacherClasses, folders: tuple[str, ...]) -> TeacherClasses:
    """The teacher's classes under the store's names. Raises InputError when they are others, or in another order."""
    if len(classes.names) != store.classes:
        raise InputError(
            f"{store.source}: has {store.classes:,} classes and the teacher {len(classes.names):,}; "
            "labels of different classes cannot be merged (--classes folder keeps the folders' classes alone)"
        )
    mapping = dict(zip(folders, classes.class_of_folder.tolist(), strict=True))
    odd = next((folder for folder, number in mapping.items() if store.folders.get(folder) != number), None)
    if odd is not None:
        raise InputError(f"{store.source}: folder {odd!r} is class {store.folders.get(odd)} in it and {mapping[odd]} to this teacher")
    named = set(mapping.values())
    for number, (mine, theirs) in enumerate(zip(classes.names, store.class_names, strict=True)):
        if mine != theirs and number not in named:
            raise InputError(f"{store.source}: class {number} is {theirs!r} in it and {mine!r} to this teacher")
    return dataclasses.replace(classes, names=store.class_names)


def check_photo(store: LabelStore, image: int, crc: int, name: str) -> None:
    """Raises InputError when a photo that the store has labels of is another file now."""
    entry = store.entry(image)
    if entry.width and entry.photo_crc != crc:
        raise InputError(f"{name}: is not the photo that {store.source} was made of (its bytes changed); restore it")
