"""The classes of a source that has them written beside its images, as texts or as numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ferkd.classes import ClassNumbers

DIGITS = 9  # a number of more is no class index


def classes_of(labels: Sequence[str], label_of: NDArray[np.int32]) -> tuple[tuple[str, ...], NDArray[np.int32], ClassNumbers | None]:
    """Split's `folders`, `folder_of` and `numbers`, of labels as they are written and the index into these of every image [N].

    Where all labels are numbers, these are class indices, however they are written (7, 007); otherwise all are names.
    """
    all_numbers = all(label.isascii() and label.isdigit() and len(label) <= DIGITS for label in labels)
    names = [str(int(label)) for label in labels] if all_numbers else list(labels)
    folders = tuple(sorted(set(names)))
    place = {name: i for i, name in enumerate(folders)}
    folder_of = np.array([place[name] for name in names], np.int32)[label_of]
    if not all_numbers:
        return folders, folder_of, None
    return folders, folder_of, ClassNumbers({name: int(name) for name in folders}, max(map(int, folders)) + 1, bare=True)
