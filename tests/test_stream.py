"""The endless stream of image slots: every image once a pass, walks that do not repeat, and a state that is only the step."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferkd.errors import InputError
from ferkd.stream import CropStream, Phase, StreamSampler, Visit, crop_order, permuted, plan_phases


@given(size=st.integers(1, 3000), key=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_keyed_permutation_is_one_and_its_inverse_undoes_it(size: int, key: int) -> None:
    positions = np.arange(size)
    entries = permuted(positions, size, key, 5)
    assert np.array_equal(np.sort(entries), positions)
    assert np.array_equal(permuted(entries, size, key, 5, inverse=True), positions)


def test_keyed_permutations_look_random() -> None:
    size = 1000
    perms = np.stack([permuted(np.arange(size), size, seed, 0) for seed in range(200)])
    assert len({perm.tobytes() for perm in perms}) == 200
    # The entry at a place is uniform: its mean over 200 keys has standard error 289 / sqrt(200) = 20.
    assert abs(perms[:, 0].mean() - 499.5) < 90
    assert abs(perms[:, 500].mean() - 499.5) < 90
    steps = np.abs(np.diff(perms, axis=1)).mean()
    assert abs(steps - size / 3) < 10  # neighbours in time are strangers: E|x - y| = n/3


def test_crop_orders_are_permutations_that_differ_by_image_and_seed() -> None:
    assert np.array_equal(np.sort(crop_order(200, 0, 1)), np.arange(200))
    assert not np.array_equal(crop_order(200, 0, 1), crop_order(200, 0, 2))
    assert not np.array_equal(crop_order(200, 0, 1), crop_order(200, 1, 1))


def test_a_pass_visits_every_image_once() -> None:
    stream = CropStream(images=30, batch_size=24, phases=[Phase(4, 10)], seed=0)  # 6 images a step, 5 steps a pass
    for a_pass in range(2):
        seen = [visit.image for step in range(5 * a_pass, 5 * a_pass + 5) for visit in stream.visits(step)]
        assert sorted(seen) == list(range(30))
    first = [visit.image for step in range(5) for visit in stream.visits(step)]
    second = [visit.image for step in range(5, 10) for visit in stream.visits(step)]
    assert first != second


def walks(stream: CropStream, steps: int) -> dict[int, list[int]]:
    taken: dict[int, list[int]] = defaultdict(list)
    for step in range(steps):
        for visit in stream.visits(step):
            taken[visit.image] += range(visit.walk, visit.walk + visit.crops)
    return taken


@given(
    images=st.integers(1, 40),
    slots=st.integers(1, 12),
    crops=st.sampled_from([1, 2, 4]),
    steps=st.tuples(st.integers(0, 15), st.integers(1, 20), st.integers(0, 15)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_no_crop_of_a_walk_is_skipped_or_repeated_over_all_phases(
    images: int, slots: int, crops: int, steps: tuple[int, int, int], seed: int
) -> None:
    """Even when a phase ends in the middle of a pass: each image's walk goes 0, 1, 2, ... without a gap."""
    phases = [Phase(1, steps[0]), Phase(crops, steps[1]), Phase(1, steps[2])]
    stream = CropStream(images, slots * crops, [phase for phase in phases if phase.steps], seed)
    for taken in walks(stream, stream.total_steps).values():
        assert taken == list(range(len(taken)))


def test_images_weigh_the_same() -> None:
    stream = CropStream(images=13, batch_size=8, phases=[Phase(4, 100)], seed=1)
    counts = Counter(visit.image for step in range(100) for visit in stream.visits(step))
    assert len(counts) == 13
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_state_is_the_step() -> None:
    phases = [Phase(4, 7), Phase(1, 3)]
    whole = list(StreamSampler(CropStream(17, 8, phases, 3), 0, 10))
    resumed = list(StreamSampler(CropStream(17, 8, phases, 3), 6, 10))
    assert whole[6:] == resumed


def test_ranks_share_each_step_in_order() -> None:
    phases = [Phase(2, 6)]
    whole = list(StreamSampler(CropStream(17, 8, phases, 3), 0, 6))
    parts = [list(StreamSampler(CropStream(17, 8, phases, 3), 0, 6, rank, 2)) for rank in range(2)]
    assert whole == [first + second for first, second in zip(*parts, strict=True)]


def test_steps_beyond_the_plan_go_on_as_the_last_phase() -> None:
    stream = CropStream(10, 4, [Phase(2, 3), Phase(1, 2)], 0)
    assert [visit.crops for visit in stream.visits(50)] == [1] * 4


def test_global_slots_are_consecutive_over_phases() -> None:
    stream = CropStream(10, 8, [Phase(1, 2), Phase(4, 3), Phase(1, 2)], 0)
    assert [stream.first_slot(step) for step in range(7)] == [0, 8, 16, 18, 20, 22, 30]


def test_epochs_are_counted_in_crops_as_fkd_counts_them() -> None:
    # 1,000 images, 4 crops an image, 300 epochs: 300,000 crops, of which the last 4 epochs take single crops.
    phases = plan_phases(images=1000, batch_size=100, epochs=300, crops_per_image=4, single_first=0, single_last=4)
    assert phases == [Phase(4, 2960), Phase(1, 40)]
    stream = CropStream(1000, 100, phases, 0)
    visits = [visit for step in range(stream.total_steps) for visit in stream.visits(step)]
    assert Counter(visit.image for visit in visits) == dict.fromkeys(range(1000), 74 + 4)  # 296 epochs are 74 passes of 4 crops
    vit = plan_phases(images=1000, batch_size=100, epochs=300, crops_per_image=4, single_first=5, single_last=4)
    assert vit == [Phase(1, 50), Phase(4, 2910), Phase(1, 40)]


def test_short_trainings_have_at_least_one_step() -> None:
    assert plan_phases(10, 100, 0.01, 4, 0, 4) == [Phase(4, 1)] or plan_phases(10, 100, 0.01, 4, 0, 4) == [Phase(1, 1)]


def test_visits_are_plain_numbers() -> None:
    visit = CropStream(5, 4, [Phase(2, 1)], 0).visits(0)[0]
    assert type(visit) is Visit
    assert all(type(value) is int for value in visit)


def test_wrong_batches_are_refused() -> None:
    with pytest.raises(InputError, match="10 crops are no multiple of 4"):
        CropStream(5, 10, [Phase(4, 1)], 0)
    with pytest.raises(InputError, match="no usable image"):
        CropStream(0, 8, [Phase(4, 1)], 0)
    with pytest.raises(InputError, match="3 images a step cannot be shared evenly by 2"):
        StreamSampler(CropStream(5, 12, [Phase(4, 1)], 0), 0, 1, 0, 2)
