"""The label and box codecs keep what they promise, and docs/formats.md's vectors hold."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ferkd.errors import InputError
from ferkd.records import Records, crop_bytes, label_words, pack_boxes, pack_labels, top_probabilities, unpack_boxes, unpack_labels

BOTH = pytest.mark.parametrize("codec", ["half", "packed"])


def softmax_answers(rows, classes, k, seed=0):
    """Teacher answers from flat to certain: ids [rows, k], float32 probabilities [rows, k], falling."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, classes)) * rng.uniform(0.1, 6.0, size=(rows, 1))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    ids = np.argsort(-p, axis=1)[:, :k]
    return ids, np.take_along_axis(p, ids, 1).astype(np.float32)


def decode_packed_by_the_page(words, k, classes):
    """docs/formats.md's decoder with Python's integers and float64, one label."""
    bits = sum(int(word) << 32 * i for i, word in enumerate(words))

    def field(width):
        nonlocal bits
        value, bits = bits & ((1 << width) - 1), bits >> width
        return value

    n = max(1, math.ceil(math.log2(classes)))
    ids = [field(n) for _ in range(k)]
    left, probs = 1.0, []
    for j in range(k):
        code, top, highest = (field(14), 16383, 12.0) if j == 0 else (field(8), 255, 6.0)
        x = -math.log(classes) + (code - 1) * (highest + math.log(classes)) / (top - 1)
        r = 1 / (1 + math.exp(-x)) if code else 0.0
        probs.append(left * r)
        left *= 1 - r
    assert bits == 0, "the padding is zero"
    return ids, probs


def divergence(p, q, classes):
    """KL(p || q) of rows with their tails, in nats."""
    p, q = p.astype(np.float64), q.astype(np.float64)
    kl = (p * np.log(p / np.maximum(q, 1e-12))).sum(axis=1)
    if p.shape[1] < classes:
        tail_p, tail_q = (np.maximum(1 - x.sum(axis=1), 1e-9) for x in (p, q))
        kl += tail_p * np.log(tail_p / tail_q)
    return kl


VECTORS = [
    ("half", 1000, [7, 999, 0], [0.5, 0.25, 0.125], "07000038 e7030034 00000030", [0.5, 0.25, 0.125]),
    ("half", 70000, [65536, 7, 69999], [0.5, 0.25, 0.125], "00000100 07000000 6f110100 00380034 00300000", [0.5, 0.25, 0.125]),
    ("packed", 1000, [7, 999, 0], [0.5, 0.25, 0.125], "079c0f80 d8959808", [0.50000095, 0.25043491, 0.12499936]),
    (
        "packed",
        1000,
        [1, 999, 2, 3, 4],
        [0.9, 0.05, 0.02, 0.01, 0.0],
        "019c2fc0 0004487b 89817b00",
        [0.90003020, 0.05007197, 0.01998795, 0.00987171, 0.0],
    ),
    (
        "packed",
        1000,
        [3, 4, 5, 6, 7],
        [0.2] * 5,
        "03105080 0107c44a 737b88cc",
        [0.20002076, 0.19761959, 0.19880767, 0.19700147, 0.19993323],
    ),
    ("packed", 2, [1, 0], [0.75, 0.25], "2524ff00", [0.74993080, 0.24945092]),
    ("packed", 2, [0], [1.0], "fe7f0000", [0.99999380]),
]


@pytest.mark.parametrize(("codec", "classes", "ids", "probs", "text", "decoded"), VECTORS)
def test_labels_have_the_bytes_that_the_format_page_says(codec, classes, ids, probs, text, decoded):
    words = pack_labels(np.array([ids]), np.array([probs], np.float32), codec, classes)
    assert words.astype("<u4").tobytes() == bytes.fromhex(text)
    found_ids, found = unpack_labels(words, codec, len(ids), classes)
    assert found_ids.tolist() == [ids]
    np.testing.assert_allclose(found[0], decoded, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("codec", "k", "classes", "words"),
    [
        ("half", 5, 1000, 5),
        ("half", 5, 65536, 5),
        ("half", 5, 65537, 8),
        ("packed", 5, 1000, 3),
        ("packed", 1, 2, 1),
        ("packed", 64, 262144, 53),
    ],
)
def test_the_width_of_a_label(codec, k, classes, words):
    assert label_words(codec, k, classes) == words


def test_bytes_a_crop_of_the_two_layouts():
    assert crop_bytes("stored", "half", 5, 1000) == 28
    assert crop_bytes("replayed", "packed", 5, 1000) == 12


@st.composite
def answers(draw):
    classes = draw(st.sampled_from([2, 3, 10, 1000, 1024, 65536, 65537, 262144]))
    k = draw(st.integers(1, min(classes, 64)))
    rows = draw(st.integers(0, 4))
    ids = draw(st.lists(st.integers(0, classes - 1), min_size=rows * k, max_size=rows * k))
    weights = draw(st.lists(st.floats(0, 1, width=32), min_size=rows * (k + 1), max_size=rows * (k + 1)))
    w = np.array(weights, np.float64).reshape(rows, k + 1) + 1e-12
    p = (w / w.sum(axis=1, keepdims=True))[:, :k].astype(np.float32)
    return classes, np.array(ids, np.int64).reshape(rows, k), p


@settings(max_examples=200, deadline=None)
@given(answers())
def test_half_keeps_every_id_and_every_probability_to_float16(answer):
    classes, ids, p = answer
    found_ids, found = unpack_labels(pack_labels(ids, p, "half", classes), "half", ids.shape[1], classes)
    for row in range(len(ids)):
        wanted = sorted(zip(ids[row].tolist(), p[row].tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
        assert found_ids[row].tolist() == [i for i, _ in wanted]
        assert found[row].tolist() == [float(np.float16(q)) for _, q in wanted]


@settings(max_examples=200, deadline=None)
@given(answers())
def test_packed_keeps_ids_never_exceeds_one_and_decodes_as_the_page_says(answer):
    classes, ids, p = answer
    k = ids.shape[1]
    words = pack_labels(ids, p, "packed", classes)
    found_ids, found = unpack_labels(words, "packed", k, classes)
    order = np.lexsort((ids, -p), axis=1)
    assert (found_ids == np.take_along_axis(ids, order, 1)).all()
    assert (found.sum(axis=1, dtype=np.float64) <= 1 + 1e-6).all()
    assert (found <= found[:, :1]).all(), "the teacher's first answer stays the first"
    for row in range(len(ids)):
        page_ids, page = decode_packed_by_the_page(words[row], k, classes)
        assert page_ids == found_ids[row].tolist()
        np.testing.assert_allclose(found[row], page, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("classes", "k"), [(1000, 5), (10, 5), (70000, 5), (1000, 64)])
def test_packed_costs_next_to_nothing_in_kl(classes, k):
    ids, p = softmax_answers(200 if classes > 10_000 else 1000, classes, k)
    _, found = unpack_labels(pack_labels(ids, p, "packed", classes), "packed", k, classes)
    kl = divergence(p, found, classes)
    assert kl.mean() < 1e-4
    assert kl.max() < 2e-3, "a share above sigmoid(6) = 0.9975 is cut to that, which costs most"
    assert abs(found[:, 0] - p[:, 0]).max() < 2e-4


@BOTH
def test_the_order_in_which_answers_come_does_not_matter(codec):
    ids, p = softmax_answers(100, 50, 6)
    p[:, 2] = p[:, 3]  # a tie
    shuffle = np.random.default_rng(1).permutation(6)
    assert (pack_labels(ids[:, shuffle], p[:, shuffle], codec, 50) == pack_labels(ids, p, codec, 50)).all()


@BOTH
@pytest.mark.parametrize(("classes", "k"), [(2, 2), (1000, 5), (70000, 4)])
def test_the_top_probability_is_the_largest_that_unpacking_finds(codec, classes, k):
    ids, p = softmax_answers(50, classes, k)
    words = pack_labels(ids, p, codec, classes)
    assert (top_probabilities(words, codec, k, classes) == unpack_labels(words, codec, k, classes)[1].max(axis=1)).all()


@BOTH
def test_a_tie_puts_the_lower_id_first(codec):
    found, _ = unpack_labels(pack_labels(np.array([[9, 4]]), np.array([[0.4, 0.4]], np.float32), codec, 10), codec, 2, 10)
    assert found.tolist() == [[4, 9]]


@BOTH
def test_certain_teachers_stay_certain(codec):
    p = np.array([[0.99999, 0.5e-5], [1.0, 0.0], [0.9999999, 1e-8]], np.float32)
    _, found = unpack_labels(pack_labels(np.array([[0, 1]] * 3), p, codec, 1000), codec, 2, 1000)
    assert (found[:, 0] > 0.99998).all()
    assert (found[:, 0] <= 1).all()


@BOTH
@pytest.mark.parametrize(
    ("ids", "probs", "says"),
    [
        ([[0, 5]], [[0.5, 0.1]], "ids: 5 is no class; ids run from 0 to 4"),
        ([[0, -1]], [[0.5, 0.1]], "ids: -1 is no class"),
        ([[0, 1]], [[0.5, np.nan]], "probs: nan in row 0"),
        ([[0, 1]], [[1.5, 0.1]], "probs: 1.5 in row 0"),
        ([[0, 1]], [[0.5, -0.1]], "probs: -0.1"),
        ([[0, 1, 2, 3, 4, 0]], [[0.1] * 6], "k: 6 of 5 classes"),
        ([[0.0, 1.0]], [[0.5, 0.1]], "ids: float64"),
        ([[0, 1]], [[0.5]], "ids: shape"),
    ],
)
def test_wrong_answers_are_refused(codec, ids, probs, says):
    with pytest.raises(InputError, match=says):
        pack_labels(np.array(ids), np.array(probs), codec, 5)


def test_packed_refuses_what_is_not_a_distribution_and_half_takes_it():
    ids, p = np.array([[0, 1]]), np.array([[0.9, 0.9]])
    with pytest.raises(InputError, match=r"sums to 1\.8"):
        pack_labels(ids, p, "packed", 5)
    assert pack_labels(ids, p, "half", 5).shape == (1, 2)


def test_words_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r"packed labels of k=5, 1000 classes are uint32 \[crops, 3\]"):
        unpack_labels(np.zeros((2, 5), np.uint32), "packed", 5, 1000)


def test_unknown_codecs_are_refused():
    with pytest.raises(InputError, match="codec: 'dense' is unknown"):
        label_words("dense", 5, 10)
    with pytest.raises(InputError, match="box_codec: 'none' is unknown"):
        crop_bytes("none", "half", 5, 10)


@given(
    st.lists(st.tuples(st.integers(0, 30000), st.integers(0, 30000), st.integers(1, 2767), st.integers(1, 2767), st.booleans()), max_size=5)
)
def test_boxes_come_back_as_they_were(rows):
    boxes = np.array([row[:4] for row in rows], np.int64).reshape(-1, 4)
    flips = np.array([row[4] for row in rows], np.bool_)
    found, found_flips = unpack_boxes(pack_boxes(boxes, flips))
    assert (found == boxes).all()
    assert (found_flips == flips).all()


def test_boxes_have_the_bytes_that_the_format_page_says():
    words = pack_boxes(np.array([[1, 2, 3, 4], [63, 45, 112, 101], [0, 0, 32767, 32767]]), np.array([True, False, True]))
    assert words[:2].astype("<u8").tobytes().hex() == "010001c0008000103f8016001ca00c00"
    assert struct.pack("<Q", int(words[2])) == ((32767 << 30 | 32767 << 45 | 1 << 60).to_bytes(8, "little"))


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 0, 0, 5), (0, 0, 5, 0), (1, 0, 32767, 5), (0, 32767, 1, 1)])
def test_boxes_outside_every_photo_are_refused(box):
    with pytest.raises(InputError, match="is not inside a photo"):
        pack_boxes(np.array([box]), np.array([False]))


def test_records_move_with_their_description():
    records = Records(torch.zeros(4, 3, dtype=torch.int32), "packed", 5, 1000)
    moved = records.to("cpu")
    assert (len(moved), moved.codec, moved.k, moved.classes) == (4, "packed", 5, 1000)
