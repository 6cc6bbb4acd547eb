"""Which class of a model a class of the dataset means: by name, by WordNet id, by number, or by order."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import re
from collections.abc import Mapping, Sequence

from ferkd.errors import InputError

log = logging.getLogger(__name__)

# The ImageNet variants that a number of outputs identifies, by timm's names. Within each, class index = place in its list of WordNet ids.
IMAGENET_VARIANTS = {
    1000: "imagenet-1k",
    11221: "imagenet-21k-miil",
    11821: "imagenet-12k",
    21841: "imagenet-22k",
    21842: "imagenet-22k-ms",
    21843: "imagenet-21k-goog",
}

_WORDNET_ID = re.compile(r"(n\d{8})(?!\d)")


@dataclasses.dataclass(frozen=True)
class ClassNumbers:
    """A dataset's own numbers of its classes: `of` each that occurs, of `count` (tar shards: the highest and one). `bare`: numbers are all
    it has, and the names are these numbers."""

    of: Mapping[str, int]
    count: int
    bare: bool


def class_mapping(
    folders: Sequence[str], teacher_classes: Sequence[str] | None, outputs: int, numbers: ClassNumbers | None = None
) -> dict[str, int]:
    """Which class index of a model with `outputs` classes each class of a dataset (each folder) means.

    In this order: (1) a folder named exactly like one of `teacher_classes` (names by class index); (2) ImageNet: a folder whose name
    begins with a WordNet id (n02102040, n04507155_umbrella) means that class, when `teacher_classes` are WordNet ids or, for a teacher
    with no such names, when `outputs` is that of an ImageNet variant; (3) in a dataset that numbers as many classes as there are outputs,
    the number, unless both have names, which then disagree; (4) with no names and no numbers at all and as many outputs as folders, the
    sorted order of the folders. (3) and (4) are said aloud.

    Raises InputError when a folder has no class or two folders mean the same one.
    """
    if teacher_classes is not None and len(teacher_classes) != outputs:
        raise InputError(f"classes: the teacher names {len(teacher_classes):,} classes but has {outputs:,} outputs; name every output once")
    index_of = _unique_index(teacher_classes or ())
    mapping = {folder: index_of[folder] for folder in folders if folder in index_of}

    rest = [folder for folder in folders if folder not in mapping]
    if rest and any(_WORDNET_ID.match(folder) for folder in rest):
        index_of_id = _wordnet_index(teacher_classes, outputs)
        for folder in rest:
            found = _WORDNET_ID.match(folder)
            if found and found[1] in index_of_id:
                mapping[folder] = index_of_id[found[1]]

    if not mapping and numbers is not None and numbers.count == outputs and (numbers.bare or teacher_classes is None):
        log.warning("The dataset numbers its %d classes: taking them to be the teacher's, by number. The preflight checks this.", outputs)
        mapping = {folder: numbers.of[folder] for folder in folders}
    if not mapping and numbers is None and teacher_classes is None and outputs == len(folders):
        log.warning(
            "The teacher does not name its %d classes: taking them to be the folders in sorted order (%s). The preflight checks this.",
            outputs,
            some(sorted(folders)),
        )
        mapping = {folder: i for i, folder in enumerate(sorted(folders))}

    unknown = [folder for folder in folders if folder not in mapping]
    if unknown:
        known = f"it knows {some(list(teacher_classes))}" if teacher_classes else "it does not name its classes"
        numbered = "" if numbers is None else f" The dataset numbers {numbers.count:,} classes."
        raise InputError(
            f"class folders without a class of the teacher ({len(unknown):,} of {len(folders):,}): {some(unknown)}. The teacher has "
            f"{outputs:,} outputs and {known}.{numbered} Rename the folders to the teacher's classes (for an ImageNet teacher: WordNet ids "
            "such as n02102040), or let a python:MODULE:CALLABLE teacher return {'classes': [folder names by class index]}"
        )
    folder_of_class: dict[int, str] = {}
    for folder, index in mapping.items():
        if index in folder_of_class:
            raise InputError(f"class folders {folder_of_class[index]!r} and {folder!r} both mean the teacher's class {index}; merge them")
        folder_of_class[index] = folder
    return {folder: mapping[folder] for folder in folders}


def wordnet_ids(outputs: int) -> list[str]:
    """The WordNet ids, by class index, of the ImageNet variant that has this many classes (a key of IMAGENET_VARIANTS)."""
    try:
        timm_data = importlib.import_module("timm.data")
    except ImportError as error:
        raise InputError("ImageNet's list of classes comes with timm, which is not installed; pip install 'ferkd[timm]'") from error
    return list(timm_data.ImageNetInfo(IMAGENET_VARIANTS[outputs]).label_names())


def _unique_index(names: Sequence[str]) -> dict[str, int]:
    """name -> index, without the names that occur twice (ImageNet's English names have two "crane"s): those identify nothing."""
    index_of: dict[str, int] = {}
    twice = set()
    for i, name in enumerate(names):
        if name in index_of:
            twice.add(name)
        index_of[name] = i
    return {name: i for name, i in index_of.items() if name not in twice}


def _wordnet_index(teacher_classes: Sequence[str] | None, outputs: int) -> dict[str, int]:
    named = [_WORDNET_ID.match(name) for name in teacher_classes or ()]
    if named and any(named):
        return _unique_index([found[1] if found else "" for found in named])
    if outputs in IMAGENET_VARIANTS:
        return _unique_index(wordnet_ids(outputs))
    return {}


ELSEWHERE_SHARE = 0.1
"""From so much of the probability on classes that have no folder on, it is worth a warning."""


def elsewhere_line(share: float, with_folder: int, classes: int) -> str:
    """For people: how much of a teacher's probability goes to classes that have no folder, and from a tenth on what to do about it."""
    without = classes - with_folder
    said = f"{share:.0%} of the teacher's probability goes to the {without:,} of its {classes:,} classes that have no folder"
    if share < ELSEWHERE_SHARE:
        return said
    return f"{said}; --classes folder (an online teacher: --teacher-classes folder) asks it among the other {with_folder:,} alone"


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of a list of names, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown
