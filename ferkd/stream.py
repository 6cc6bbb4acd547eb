"""The order of training: one endless stream, a pure function of (seed, step).

A pass visits every usable image once in an order keyed by (seed, pass), and a visit takes the next crops of a walk over the image's
surviving crops, in an order keyed by (seed, image). So the stream's whole state is the step number, whatever the number of loader workers
or processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from ferkd.errors import InputError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def keyed_hash(*words: int | np.ndarray) -> npt.NDArray[np.uint64]:
    """64 well-mixed bits for each tuple of non-negative integers (arrays broadcast): splitmix64's finaliser over each word in turn."""
    state: npt.NDArray[np.uint64] = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        for word in words:
            state = (state ^ np.asarray(word, np.uint64)) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def permuted(positions: np.ndarray, size: int, *key: int, inverse: bool = False) -> np.ndarray:
    """The entries at `positions` of a permutation of range(size) named by `key`; with `inverse`, the positions of entries.

    A four-round Feistel network on the smallest even number of bits, walked until the value is inside the range: no memory and no
    start-up cost, so that a pass over 14 million images begins as fast as one over 14.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    rounds = range(3, -1, -1) if inverse else range(4)

    def network(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = value >> shift, value & mask
        for r in rounds:
            if inverse:
                left, right = right ^ (keyed_hash(*key, r, left) & mask), left
            else:
                left, right = right, left ^ (keyed_hash(*key, r, right) & mask)
        joined: npt.NDArray[np.uint64] = (left << shift) | right
        return joined

    values = network(np.asarray(positions, np.uint64))
    while (outside := values >= size).any():
        values[outside] = network(values[outside])
    return values.astype(np.int64)


def crop_order(size: int, seed: int, image: int) -> np.ndarray:
    """The order, int64 [size], in which an image's surviving crops are walked."""
    return in_order(keyed_hash(seed, image, np.arange(size)))


def in_order(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """The order that the keyed hashes of a walk's places give it."""
    return np.argsort(hashes, kind="stable")


# ------------------------------------------------------------------------------------------------------------------- the stream


class Phase(NamedTuple):
    """A stretch of training that takes the same number of crops from every image it visits."""

    crops_per_image: int
    steps: int


class Visit(NamedTuple):
    """One image slot of a step: image `image` (an index into the usable images) shows crops walk, walk + 1, ... of its walk."""

    image: int
    walk: int
    crops: int


def plan_phases(images: int, batch_size: int, epochs: float, crops_per_image: int, single_first: float, single_last: float) -> list[Phase]:
    """Split `epochs` (one epoch = `images` crops, FKD's counting) into phases of one and of `crops_per_image` crops an image.

    The first `single_first` and the last `single_last` epochs take one crop an image, as FKD does for ViT's warm-up and at the end.
    """
    total = max(1, round(epochs * images / batch_size))
    if crops_per_image == 1:
        return [Phase(1, total)]
    last = min(total, round(single_last * images / batch_size))
    first = min(total - last, round(single_first * images / batch_size))
    phases = [Phase(1, first), Phase(crops_per_image, total - first - last), Phase(1, last)]
    return [phase for phase in phases if phase.steps] or [Phase(1, total)]


class CropStream:
    """Which images, and where on their walks, every step shows: a pure function of the step.

    `images` usable images, `batch_size` crops a step over all processes. Steps beyond the last phase go on as in that phase.
    Raises InputError when the batch is not a multiple of a phase's crops an image.
    """

    def __init__(self, images: int, batch_size: int, phases: Sequence[Phase], seed: int) -> None:
        if images < 1:
            raise InputError("no usable image: the policy discards every crop of every image; lower discard_below or raise discard_above")
        for phase in phases:
            if batch_size % phase.crops_per_image:
                raise InputError(
                    f"batch_size: {batch_size} crops are no multiple of {phase.crops_per_image} crops an image; "
                    "make it one (FKD: 1024 = 256 x 4)"
                )
        self.images, self.batch_size, self.phases, self.seed = images, batch_size, list(phases), seed
        self.total_steps = sum(phase.steps for phase in phases)

    def phase_at(self, step: int) -> tuple[int, int]:
        """The number of the phase that `step` belongs to, and how many steps of it came before."""
        for number, phase in enumerate(self.phases[:-1]):
            if step < phase.steps:
                return number, step
            step -= phase.steps
        return len(self.phases) - 1, step

    def crops_per_image(self, step: int) -> int:
        return self.phases[self.phase_at(step)[0]].crops_per_image

    def first_slot(self, step: int) -> int:
        """The global number of the step's first image slot, counted from the start of training."""
        number, within = self.phase_at(step)
        earlier = sum(phase.steps * (self.batch_size // phase.crops_per_image) for phase in self.phases[:number])
        return earlier + within * (self.batch_size // self.phases[number].crops_per_image)

    def visits(self, step: int) -> list[Visit]:
        """The step's image slots in order, batch_size / crops_per_image of them."""
        number, within = self.phase_at(step)
        crops = self.phases[number].crops_per_image
        slots_a_step = self.batch_size // crops
        slots = within * slots_a_step + np.arange(slots_a_step)
        first_pass = sum(self._passes(phase) for phase in self.phases[:number])  # every phase begins a pass of its own
        passes, positions = first_pass + slots // self.images, slots % self.images
        images = np.empty(slots_a_step, np.int64)
        for a_pass in np.unique(passes):
            in_pass = passes == a_pass
            images[in_pass] = permuted(positions[in_pass], self.images, self.seed, int(a_pass))
        walk = self._walked_before(number, images) + (passes - first_pass) * crops
        return [Visit(int(image), int(start), crops) for image, start in zip(images, walk, strict=True)]

    def _passes(self, phase: Phase) -> int:
        """How many passes, the last perhaps broken off, a phase begins."""
        return -(-phase.steps * (self.batch_size // phase.crops_per_image) // self.images)

    def _walked_before(self, number: int, images: np.ndarray) -> np.ndarray:
        """How many crops of each image the phases before `number` took. A broken-off pass took crops of its first images only."""
        walked = np.zeros(len(images), np.int64)
        first_pass = 0
        for phase in self.phases[:number]:
            whole, rest = divmod(phase.steps * (self.batch_size // phase.crops_per_image), self.images)
            walked += whole * phase.crops_per_image
            if rest:
                position = permuted(images, self.images, self.seed, first_pass + whole, inverse=True)
                walked += np.where(position < rest, phase.crops_per_image, 0)
            first_pass += self._passes(phase)
        return walked


class StreamSampler(Sampler[list[Visit]]):
    """Yields one process's share of each step's visits from `first_step` on, without end. All crops of an image stay on one rank."""

    def __init__(self, stream: CropStream, first_step: int, last_step: int, rank: int = 0, world: int = 1) -> None:
        for phase in stream.phases:
            slots = stream.batch_size // phase.crops_per_image
            if slots % world:
                raise InputError(f"batch_size: {slots} images a step cannot be shared evenly by {world} processes; choose a multiple")
        self.stream, self.first_step, self.last_step, self.rank, self.world = stream, first_step, last_step, rank, world

    def __iter__(self) -> Iterator[list[Visit]]:
        for step in range(self.first_step, self.last_step):
            visits = self.stream.visits(step)
            share = len(visits) // self.world
            yield visits[self.rank * share : (self.rank + 1) * share]

    def __len__(self) -> int:
        return self.last_step - self.first_step
