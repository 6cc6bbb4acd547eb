"""What is the Triton kernels' own: how they read rows, rows longer than a block, data nobody checks, launches that ask the device nothing.

The loss's tests at large run on them too (tests/loss_cases.py); here they run in Triton's interpreter, on a machine without a GPU.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loss_cases import POLICY, assert_close, labels, logits, oracle
from torch.utils._python_dispatch import TorchDispatchMode

from ferkd import Records, Region, RegionPolicy, ferkd_loss, ops, reference
from ferkd.records import pack_labels

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        torch.cuda.is_available() or ops.why_not("triton", "cpu") is not None, reason="needs Triton's interpreter, which a GPU turns off"
    ),
]
if ops.why_not("triton", "cpu") is None:
    from ferkd.kernels import labels as label_kernels
    from ferkd.kernels import loss as kernels
    from ferkd.kernels import rows as row_kernels
    from ferkd.kernels import scale

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def short_blocks(monkeypatch):
    """Rows of more than 600 classes are read twice, in steps of 256."""
    monkeypatch.setattr(kernels, "ONE_BLOCK_CLASSES", 600)
    monkeypatch.setattr(kernels, "LOOP_BLOCK", 256)


def loss_and_gradient(x, pairs, target, impl="triton", **settings):
    x = x.detach().requires_grad_()
    answer = ferkd_loss(x, pairs, target, impl=impl, **settings)
    loss, *stats = answer if isinstance(answer, tuple) else (answer,)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0], *stats


def inside(x, before, stride):
    """x as rows of a wider tensor that holds NaN everywhere else, `before` elements from its beginning."""
    batch, classes = x.shape
    wide = torch.full((before + batch * stride + 16,), math.nan, dtype=x.dtype)
    view = wide[before : before + batch * stride].view(batch, stride)[:, :classes]
    view.copy_(x)
    return view


# ---------------------------------------------------------------------------------------------- where rows lie


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [513, 514, 516, 520, 1001], ids=str)
@pytest.mark.parametrize("is_long", [False, True], ids=["one block", "two passes"])
def test_rows_of_any_alignment_are_read_to_their_last_element_and_not_beyond(is_long, classes, dtype, monkeypatch):
    if is_long:
        monkeypatch.setattr(kernels, "ONE_BLOCK_CLASSES", 500)
        monkeypatch.setattr(kernels, "LOOP_BLOCK", 256)
    batch, lanes = 5, 16 // torch.empty((), dtype=dtype).element_size()
    ids, probs, target = labels(batch, classes, 3)
    ids[:, 0] = torch.tensor([0, classes - 1, 1, classes - 2, lanes])  # pairs in head and tail
    x = logits(batch, classes, dtype)
    expected = oracle(x, ids, probs, target, policy=RegionPolicy())[:2]
    for before, stride in [(0, classes), (1, classes), (3, classes + 5), (0, -(-classes // lanes) * lanes)]:
        assert_close(*loss_and_gradient(inside(x, before, stride), (ids, probs), target), *expected, dtype)


def test_wide_accesses_wherever_logits_and_gradient_allow_them():
    def places(classes, dtype=torch.float32, before=0, stride=None, grad=True, batch=4):
        x = inside(torch.zeros(batch, classes, dtype=dtype), before, stride or classes)
        return kernels.places_of(x, torch.empty(batch, classes, dtype=dtype) if grad else None)

    aligned, shifted, plain = (place.value for place in (row_kernels.ALIGNED, row_kernels.SHIFTED, row_kernels.PLAIN))
    assert places(1000) == places(1000, torch.bfloat16) == aligned
    assert places(1000, stride=1024) == places(16, stride=32) == aligned
    assert places(1001) == places(1001, torch.float16) == places(1004, torch.bfloat16) == shifted
    assert places(1001, stride=1001 + 4) == shifted
    assert places(1001, stride=1004) == plain  # rows of the logits are aligned, those of the gradient are not
    assert places(1001, stride=1004, grad=False) == shifted
    assert places(1000, before=1) == plain
    assert places(1000, before=1, grad=False) == shifted
    assert places(101) == plain  # short: the edges would cost more


# ---------------------------------------------------------------------------------------------- rows longer than a block


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_equal_the_oracle_with_every_region_mixed(dtype, short_blocks):
    batch, classes = 24, 1301
    ids, probs, target = labels(batch, classes, 4)
    rule = {"policy": POLICY, "mix": (torch.arange(batch).roll(5), torch.linspace(0, 1, batch)), "temperature": 1.7}
    x = logits(batch, classes, dtype)
    assert_close(*loss_and_gradient(x, (ids, probs), target, **rule), *oracle(x, ids, probs, target, **rule)[:2], dtype)


@pytest.mark.parametrize("at", [0, 1, 255, 256, 511, 1000, 1279, 1280, 1299, 1300])
def test_the_largest_logit_of_a_long_row_may_be_anywhere_and_the_lowest_id_wins_a_tie(at, short_blocks):
    x = logits(4, 1301)
    x[1:, at] = 20.0
    x[2, min(at + 300, 1300)] = 20.0
    x[3, max(at - 300, 0)] = 20.0
    ids, probs = torch.full((4, 1), at), torch.full((4, 1), 0.9)
    target = torch.full((4,), at)
    loss, gradient, stats = loss_and_gradient(x, (ids, probs), target, stats=True)
    assert_close(loss, gradient, *oracle(x, ids, probs, target, policy=RegionPolicy())[:2], x.dtype)
    assert stats.correct.tolist() == [False, True, True, at == 0]
    torch.testing.assert_close(stats.logsumexp, torch.logsumexp(x, dim=1))


def test_masked_classes_and_infinities_in_long_rows(short_blocks):
    x = logits(6, 1301)
    x[0, :300] = -math.inf  # whole lanes begin without a finite logit
    x[1, 100:] = -math.inf  # and end without one
    x[2, 1300] = math.nan
    x[3, 0] = math.inf
    x[4, :] = -math.inf
    ids, probs, target = torch.full((6, 1), 50), torch.ones(6, 1), torch.full((6,), 50)
    ids[0] = target[0] = 1000
    loss, gradient, stats = loss_and_gradient(x, (ids, probs), target, reduction="none", tail="renorm", stats=True)
    assert loss.isnan().tolist() == [False, False, True, True, True, False]
    assert gradient.isnan().any(dim=1).tolist() == [False, False, True, True, True, False]
    for row, kept in ((0, slice(300, None)), (1, slice(None, 100))):
        expected = torch.logsumexp(x[row, kept].double(), 0) - x[row, ids[row, 0]]
        assert loss[row].item() == pytest.approx(expected.item(), rel=2e-6)
        torch.testing.assert_close(gradient[row, kept].sum().item(), 0.0, rtol=0, atol=1e-6)
    assert not gradient[0, :300].any()
    assert not gradient[1, 100:].any()
    assert not stats.correct[2:5].any()
    assert ferkd_loss(x[:1], (ids[:1], probs[:1] * 0.5), target[:1], impl="triton") == math.inf  # the tail's share of a class at -inf


def test_a_confident_long_row_keeps_its_digits(short_blocks):
    x = torch.zeros(2, 1301)
    x[0, 3], x[1, 1290] = 18.5, 21.0
    ids, probs = torch.tensor([[3], [1290]]), torch.tensor([[0.99999], [0.999999]])
    found = loss_and_gradient(x, (ids, probs), ids[:, 0], reduction="none")
    expected = oracle(x, ids, probs, ids[:, 0], policy=RegionPolicy(), reduction="none")
    torch.testing.assert_close(found[0].double(), expected[0], rtol=2e-6, atol=0)
    for row, truth, logit in zip(found[1].double(), expected[1], x.double(), strict=True):
        torch.testing.assert_close(row, truth, rtol=2e-6, atol=1e-6 * (1.0 - torch.softmax(logit, 0).max().item()))


# ---------------------------------------------------------------------------------------------- labels


def test_an_id_that_the_pairs_of_both_labels_share_gets_the_total():
    ids = torch.tensor([[5, 5, 7], [7, 5, 0]])
    probs = torch.tensor([[0.4, 0.3, 0.2], [0.6, 0.2, 0.1]])
    target, mix = torch.tensor([5, 7]), (torch.tensor([1, 0]), torch.tensor([0.3, 0.8]))
    for dtype in DTYPES:
        x = logits(2, 12, dtype)
        expected = oracle(x, ids, probs, target, policy=RegionPolicy(), mix=mix)[:2]
        assert_close(*loss_and_gradient(x, (ids, probs), target, mix=mix), *expected, dtype)


def test_sixty_four_pairs_mixed_with_sixty_four(short_blocks):
    batch, classes, k = 6, 700, 64
    ids, probs, target = labels(batch, classes, k)
    ids[:, 32:] = ids[:, :32]  # every id twice in its own label
    mix = (torch.arange(batch).flip(0), torch.linspace(0, 1, batch))
    x = logits(batch, classes)
    expected = oracle(x, ids, probs, target, policy=RegionPolicy(), mix=mix)[:2]
    assert_close(*loss_and_gradient(x, (ids, probs), target, mix=mix), *expected, x.dtype)


def test_the_mass_of_many_rows_is_the_sum_of_all_programs_parts(monkeypatch):
    monkeypatch.setattr(label_kernels, "ROWS", 1)  # more rows than 64 programs take in one step
    batch = 70
    ids, probs, target = labels(batch, 11, 3)
    for mix in (None, (torch.arange(batch).roll(9), torch.linspace(0, 1, batch))):
        rule = {"policy": POLICY, "mix": mix}
        x = logits(batch, 11)
        assert_close(*loss_and_gradient(x, (ids, probs), target, **rule), *oracle(x, ids, probs, target, **rule)[:2], x.dtype)


def test_thresholds_of_float64_probabilities_are_compared_in_float64():
    at = 0.3  # not a float32
    above = math.nextafter(at, 1.0)
    probs = torch.tensor([[at], [above]], dtype=torch.float64)
    ids = torch.zeros(2, 1, dtype=torch.int64)

    def regions(policy):
        return ferkd_loss(logits(2, 4), (ids, probs), ids[:, 0], policy=policy, impl="triton", stats=True)[1].region.tolist()

    assert regions(RegionPolicy(discard_below=at)) == [Region.KEPT, Region.KEPT]
    assert regions(RegionPolicy(discard_below=above)) == [Region.DISCARDED, Region.KEPT]
    assert regions(RegionPolicy(discard_above=at)) == [Region.KEPT, Region.DISCARDED]
    assert regions(RegionPolicy(calibrate_below=above, confidence="target")) == [Region.CALIBRATED, Region.KEPT]


def test_packed_probabilities_decode_to_the_digits_of_the_reference():
    batch, classes, k = 40, 1000, 5
    ids, probs, target = labels(batch, classes, k)
    words = torch.from_numpy(pack_labels(ids.numpy(), probs.numpy(), "packed", classes).view("int32"))
    found_ids, found_probs = reference.unpack(words, "packed", k, classes)
    x = logits(batch, classes)
    found = loss_and_gradient(x, Records(words, "packed", k, classes), target, reduction="none")
    expected = loss_and_gradient(x, (found_ids, found_probs), target, reduction="none")
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=1e-8)


# ---------------------------------------------------------------------------------------------- data nobody checks


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("tail", ["smooth", "renorm"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("confidence", ["max", "target"])
def test_wrong_data_that_nobody_checks_make_their_rows_what_the_reference_makes_them(confidence, temperature, tail, is_mixed, monkeypatch):
    """On a GPU without validate=True: NaN in the rows concerned, no memory touched beyond the logits, discarded rows still nothing."""
    monkeypatch.setattr(reference, "check_data", lambda *_: None)
    batch, classes = 12, 20
    ids, probs, target = labels(batch, classes, 3)
    x = logits(batch, classes)
    ids[1, 2], ids[2, 0], ids[3, 1] = classes, -1, 2**40
    target[4], target[5] = classes, -100
    probs[6, 1], probs[7, 0], probs[8, 0] = math.nan, 1.5, -0.25
    ids[0, 0] = -7  # row 0's confidence is low: discarded
    mix = None
    if is_mixed:
        partner = torch.arange(batch).roll(2)
        partner[9], partner[10] = batch, -1
        mix = (partner, torch.linspace(0, 1, batch))
    rule = {
        "policy": RegionPolicy(discard_below=0.08, confidence=confidence),
        "tail": tail,
        "temperature": temperature,
        "mix": mix,
        "reduction": "none",
        "stats": True,
    }
    loss, gradient, stats = loss_and_gradient(x, (ids, probs), target, **rule)
    expected_loss, expected_gradient, expected_stats = loss_and_gradient(x, (ids, probs), target, impl="reference", **rule)
    assert 0 < int(loss.isnan().sum()) < batch
    torch.testing.assert_close(loss, expected_loss, rtol=4e-6, atol=4e-6, equal_nan=True)
    torch.testing.assert_close(gradient, expected_gradient, rtol=4e-6, atol=4e-6, equal_nan=True)
    assert torch.equal(stats.region, expected_stats.region)
    assert torch.equal(stats.correct, expected_stats.correct)


# ---------------------------------------------------------------------------------------------- launches


class Questions(TorchDispatchMode):
    """Records what makes the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._opname in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_to_copy", "copy_"):
            self.asked.append(function._opname)
        return function(*args, **(kwargs or {}))


def test_the_launches_ask_the_device_nothing_and_are_two():
    ids, probs, target = labels(8, 20, 3)
    x, number, mix = logits(8, 20), torch.tensor(2.0), (torch.arange(8).flip(0), torch.full((8,), 0.5))
    for reduction, normalizer in (("mean", None), ("mean", number), ("sum", None), ("none", None)):
        answer = reference.Answer(
            torch.empty(8 if reduction == "none" else ()), torch.empty(8, 20), torch.empty(0), torch.empty(0), torch.empty(0)
        )
        with Questions() as questions:
            made = kernels.launches(
                x, ids, probs, target, *mix, normalizer, number, answer, "pairs", 3, (0.0, 0.0, 1.0, 0.1), "max", 2.0, "smooth",
                reduction, True, 32,
            )  # fmt: skip
        assert questions.asked == []
        assert [launch.kernel for launch in made] == [label_kernels.adapt_labels, row_kernels.loss_rows]


def test_the_same_call_gives_the_same_bits():
    ids, probs, target = labels(33, 100, 5)
    x = logits(33, 100)
    first = loss_and_gradient(x, (ids, probs), target, policy=POLICY)
    for _ in range(2):
        again = loss_and_gradient(x, (ids, probs), target, policy=POLICY)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 3001])
@pytest.mark.parametrize("begin", [0, 1])
def test_the_stored_gradient_is_scaled_in_float32_and_rounded_once(begin, classes, dtype, monkeypatch):
    monkeypatch.setattr(scale, "PROGRAMS", 3)  # fewer programs than steps
    whole = logits(1, begin + 5 * classes + 8, dtype, scale=1e-3)[0]
    for upstream in (torch.tensor(0.3), torch.tensor(1.0), torch.linspace(-1, 1, 5), torch.tensor(7.0).expand(5)):
        found, expected = whole.clone(), whole.clone()
        grad, inside_expected = (tensor[begin : begin + 5 * classes].view(5, classes) for tensor in (found, expected))
        scale.scale_(grad, upstream)
        inside_expected.copy_(ops._scaled(inside_expected, upstream))
        assert torch.equal(found, expected)
    scale.scale_(torch.zeros(0, 7), torch.tensor(2.0))


def test_the_operator_itself_refuses_what_it_could_not_read_safely():
    ids, probs, target = labels(4, 10, 3)
    call = dict.fromkeys(argument.name for argument in torch.ops.ferkd.loss_triton.default._schema.arguments) | {
        "logits": logits(4, 10), "labels": ids, "probs": probs, "target": target, "codec": "pairs", "k": 3, "discard_below": 0.0,
        "calibrate_below": 0.0, "discard_above": 1.0, "smoothing": 0.1, "confidence": "max", "temperature": 1.0, "tail": "smooth",
        "reduction": "mean", "tau_squared": False, "with_grad": True, "stats": False, "validate": False,
    }  # fmt: skip
    torch.ops.ferkd.loss_triton(**call)
    for message, changed in (
        ("logits: .* last stride of 1", {"logits": logits(4, 10).t().contiguous().t()}),
        ("logits: they must be", {"logits": logits(4, 10).double()}),
        ("k: it must be", {"k": 65}),
        ("labels: wrong shape", {"k": 2}),
        ("labels: .* not contiguous", {"labels": ids.t().contiguous().t()}),
        ("labels: wrong shape", {"labels": ids[:-1]}),
        ("probs: they must be", {"probs": probs.half()}),
        ("probs: given with codec pairs", {"probs": None}),
        ("probs: given with codec pairs", {"codec": "half"}),
        ("codec: it must be", {"codec": "zip"}),
        ("labels: wrong shape", {"codec": "packed", "probs": None, "labels": torch.zeros(4, 1, dtype=torch.int32)}),
        ("target: it must be", {"target": target[:-1]}),
        ("mix: partner and lam", {"lam": torch.ones(4)}),
        ("must be 0-dim", {"normalizer": torch.ones(1)}),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.ferkd.loss_triton(**(call | changed))


def test_the_kernels_are_loaded_when_they_are_run_and_not_before():
    script = "import sys, ferkd, ferkd.loss; print([name for name in sys.modules if name.startswith('ferkd.kernels')])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"
