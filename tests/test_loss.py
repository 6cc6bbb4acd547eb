"""ferkd_loss computes the loss and gradient of the label rule: every backend against a dense float64 oracle."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from loss_cases import (
    DTYPES,
    IMPLS,
    ON_GPU,
    POLICY,
    OpsRun,
    assert_close,
    dense_label,
    device,
    labels,
    logits,
    loss_and_gradient,
    oracle,
    random,
    words_of,
)

from ferkd import FerKDLoss, Records, Region, RegionPolicy, ferkd_loss, ops
from ferkd.loss import label_mass
from ferkd.records import unpack_labels

pytestmark = pytest.mark.usefixtures("poisoned")

# (batch, classes, k): the least of everything; k = C, where there is no tail; CIFAR; 668 and 1,128 fill no power of two, and 1,001 no
# 16-byte vector in any dtype, so that every second row is misaligned; ImageNet-1k; one class more than a block of float32 sums and the most
# stored classes; ImageNet-21k, which a GPU's kernels share among blocks; vocabularies of GPT-2 and Llama 3, more than 65,536 classes, where
# a record's ids no longer fit 16 bits; more classes than a cluster of blocks holds in registers.
SHAPES = [(1, 2, 1), (3, 2, 2), (9, 10, 10), (24, 10, 3), (7, 668, 5), (40, 1000, 5), (5, 1001, 10), (3, 1128, 64)]
SHAPES += [(6, 4097, 64), (5, 21841, 5), (3, 50257, 10), (3, 70001, 7), (1, 128256, 1), (1, 262147, 5)]


def records(ids, probs, classes, codec):
    """Records of these answers, and the ids and probabilities that they hold."""
    words, k = words_of(ids, probs, codec, classes), ids.shape[1]
    found_ids, found_probs = unpack_labels(words.cpu().numpy().view("uint32"), codec, k, classes)
    return Records(words, codec, k, classes), torch.from_numpy(found_ids).to(device()), torch.from_numpy(found_probs).to(device())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_equal_the_dense_oracle(shape, dtype, impl):
    batch, classes, k = shape
    ids, probs, target = labels(batch, classes, k)
    x = logits(batch, classes, dtype)
    for settings_ in ({}, {"temperature": 3.0, "tail": "renorm", "tau_squared": True}):
        with OpsRun() as ran:
            found = loss_and_gradient(x, (ids, probs), target, policy=POLICY, impl=impl, **settings_)
        assert f"loss_{impl}" in ran.names
        assert_close(*found, *oracle(x, ids, probs, target, policy=POLICY, **settings_)[:2], dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("confidence", ["max", "target"])
@pytest.mark.parametrize("tail", ["smooth", "renorm"])
@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_setting_equals_the_dense_oracle(reduction, is_mixed, temperature, tail, confidence, impl):
    batch, classes, k = 30, 37, 4
    ids, probs, target = labels(batch, classes, k, seed=2)
    x = logits(batch, classes, seed=3)
    policy = RegionPolicy(0.05, 0.3, 0.97, smoothing=0.2, confidence=confidence)
    mix = None
    if is_mixed:
        lam = random(batch, seed=4)
        lam[:2] = torch.tensor([0.0, 1.0])
        mix = (torch.arange(batch).roll(7), lam)
    rule = {"policy": policy, "temperature": temperature, "tail": tail, "mix": mix, "reduction": reduction}
    expected_loss, expected_gradient, regions, _ = oracle(x, ids, probs, target, **rule)
    assert set(regions.tolist()) == {0, 1, 2}, "the case must hold every region"
    assert_close(*loss_and_gradient(x, (ids, probs), target, impl=impl, **rule), expected_loss, expected_gradient, x.dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("codec", ["half", "packed"])
@pytest.mark.parametrize("shape", [(24, 10, 3), (24, 2, 2), (40, 1000, 5), (7, 65536, 5), (7, 65537, 5), (6, 70001, 64)], ids=str)
def test_records_give_what_their_unpacked_pairs_give(shape, codec, impl):
    batch, classes, k = shape
    ids, probs, target = labels(batch, classes, k, seed=5)
    packed, found_ids, found_probs = records(ids, probs, classes, codec)
    x = logits(batch, classes, torch.float32, seed=6)
    found = loss_and_gradient(x, packed, target, policy=POLICY, impl=impl)
    expected = loss_and_gradient(x, (found_ids, found_probs), target, policy=POLICY, impl=impl)
    tolerance = {"rtol": 0, "atol": 0} if codec == "half" else {"rtol": 2e-5, "atol": 1e-7}  # packed: a decoder's own exp
    torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_damaged_record_is_refused_not_read_beyond_the_logits(impl):
    words = words_of(torch.tensor([[3]]), torch.tensor([[0.5]]), "half", 10)
    x = logits(1, 10)
    with pytest.raises(ValueError, match=r"labels: class id 2563 in row 0; the logits have 10 classes"):
        ferkd_loss(x, Records(words | 2560, "half", 1, 10), torch.tensor([0]), impl=impl, validate=True)
    with pytest.raises(ValueError, match=r"labels: probability -0\.5.* in row 0"):
        ferkd_loss(x, Records(words | -(2**31), "half", 1, 10), torch.tensor([0]), impl=impl, validate=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_hard_labels_give_torch_cross_entropy(impl):
    x, target = logits(50, 1000), (random(50) * 1000).long()
    certain = (target[:, None], torch.ones(50, 1))
    assert ferkd_loss(x, certain, target, impl=impl).item() == pytest.approx(F.cross_entropy(x.double(), target).item(), rel=1e-6)
    everything_calibrated = RegionPolicy(calibrate_below=1.0, smoothing=0.1)
    unsure = (target[:, None], torch.full((50, 1), 0.5))
    # torch spreads label_smoothing over all classes, ferkd over the others: s of C - 1 is s C / (C - 1) of C.
    smoothed = F.cross_entropy(x.double(), target, label_smoothing=0.1 * 1000 / 999)
    assert ferkd_loss(x, unsure, target, policy=everything_calibrated, impl=impl).item() == pytest.approx(smoothed.item(), rel=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_confident_student_on_a_confident_label_keeps_its_digits(dtype, impl):
    p = torch.tensor([[0.9, 0.05], [0.999, 0.0005], [0.99999, 0.000004]])
    ids = torch.tensor([[3, 7]] * 3)
    x = torch.zeros(3, 1000)
    x[:, 3] = torch.tensor([9.0, 14.0, 18.5])  # the student nearly agrees: loss and gradient are differences of near numbers
    x = x.to(dtype)
    expected = oracle(x, ids, p, ids[:, 0], policy=RegionPolicy(), reduction="none")
    loss, gradient = loss_and_gradient(x, (ids, p), ids[:, 0], reduction="none", impl=impl)
    torch.testing.assert_close(loss.double(), expected[0], rtol=2e-6, atol=0)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2e-6
    for row, truth, logit in zip(gradient.double(), expected[1], x.double(), strict=True):
        # Allowed is float32's error in the sum of the small exponentials, nothing of the size of float32's error at 1 (6e-8).
        doubt = 1.0 - torch.softmax(logit, 0)[3].item()
        torch.testing.assert_close(row, truth, rtol=rounding, atol=1e-6 * doubt)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "classes", "k"), [(32, 1000, 5), (6, 21841, 5)])
def test_the_error_is_never_above_that_of_pytorchs_own_loss_in_the_same_dtype(batch, classes, k, dtype, impl):
    ids, probs, target = labels(batch, classes, k)
    x = logits(batch, classes, dtype)
    expected_loss, expected_gradient = oracle(x, ids, probs, target, policy=RegionPolicy())[:2]
    leaf = x.clone().requires_grad_()
    tail = (1.0 - probs.sum(dim=1, keepdim=True)).clamp_min(0.0) / (classes - k)
    eager = F.cross_entropy(leaf, tail.expand(-1, classes).scatter(1, ids, probs).to(dtype))
    (eager_gradient,) = torch.autograd.grad(eager, leaf)
    loss, gradient = loss_and_gradient(x, (ids, probs), target, impl=impl)
    last_bit = 2.0**-23 * float(expected_loss)  # float32 can hold the answer no better
    assert abs(loss.double() - expected_loss) <= abs(eager.detach().double() - expected_loss) + 2 * last_bit
    largest = expected_gradient.abs().max()
    assert (gradient.double() - expected_gradient).abs().max() <= (eager_gradient.double() - expected_gradient).abs().max() + 1e-7 * largest


@pytest.mark.parametrize("impl", IMPLS)
def test_logits_near_ten_thousand_lose_nothing(impl):
    ids, probs, target = labels(8, 100, 5)
    x = logits(8, 100)
    shifted = x + 8192.0  # what float32 keeps of x at this height is what the loss must be computed from
    back = shifted - 8192.0
    found = loss_and_gradient(shifted, (ids, probs), target, impl=impl, reduction="none")
    expected = loss_and_gradient(back, (ids, probs), target, impl=impl, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_extreme_temperatures_stay_finite_and_right(temperature, impl):
    ids, probs, target = labels(20, 50, 5)
    x = logits(20, 50, scale=1.0)
    rule = {"temperature": temperature, "policy": POLICY}
    assert_close(*loss_and_gradient(x, (ids, probs), target, impl=impl, **rule), *oracle(x, ids, probs, target, **rule)[:2], x.dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_float64_probabilities_are_tempered_in_float64(impl):
    ids, target, x = torch.tensor([[0, 1]]), torch.tensor([0]), torch.tensor([[0.0, 8.0, 2.0]])
    probs = torch.tensor([[1.0, 1e-60]], dtype=torch.float64)  # at temperature 20 one thousandth; float32 would make it nothing
    rule = {"temperature": 20.0, "tail": "renorm", "policy": RegionPolicy()}
    assert_close(*loss_and_gradient(x, (ids, probs), target, impl=impl, **rule), *oracle(x, ids, probs, target, **rule)[:2], x.dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_each_gradient_row_sums_to_zero(impl):
    ids, probs, target = labels(30, 500, 5)
    _, gradient = loss_and_gradient(logits(30, 500), (ids, probs), target, policy=POLICY, impl=impl, reduction="sum", temperature=2.0)
    assert gradient.abs().sum() > 1.0
    assert gradient.double().sum(dim=1).abs().max() < 3e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_ids_add_up(dtype, impl):
    ids = torch.tensor([[4, 4, 9], [2, 2, 2]])
    probs = torch.tensor([[0.5, 0.2, 0.1], [0.3, 0.3, 0.3]])
    target = torch.tensor([4, 2])
    x = logits(2, 12, dtype)
    for policy in (RegionPolicy(), RegionPolicy(discard_above=0.65, confidence="target")):  # 0.7 and 0.9 as sums: both discarded
        expected = oracle(x, ids, probs, target, policy=policy)
        assert_close(*loss_and_gradient(x, (ids, probs), target, policy=policy, impl=impl), *expected[:2], dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tail", ["smooth", "renorm"])
def test_sums_slightly_above_one_keep_their_mass_and_no_negative_tail(tail, impl):
    ids, probs = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0.7, 0.3005], [0.9, 0.11]])
    x, target = logits(2, 9), torch.tensor([1, 4])
    rule = {"tail": tail, "policy": RegionPolicy(), "reduction": "sum"}
    assert_close(*loss_and_gradient(x, (ids, probs), target, impl=impl, **rule), *oracle(x, ids, probs, target, **rule)[:2], x.dtype)
    mass = label_mass((ids, probs), target, classes=9, tail=tail)
    torch.testing.assert_close(mass, probs.sum(dim=1) if tail == "smooth" else torch.ones(2))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_label_of_nothing_is_discarded_by_renorm_and_uniform_by_smooth(impl):
    ids, probs, target, x = torch.tensor([[1, 2]]), torch.zeros(1, 2), torch.tensor([0]), logits(1, 5)
    loss, stats = ferkd_loss(x, (ids, probs), target, tail="renorm", impl=impl, stats=True)
    assert loss.item() == 0.0
    assert stats.region.tolist() == [Region.DISCARDED]
    for rule in ({"tail": "smooth", "policy": RegionPolicy()}, {"tail": "smooth", "policy": RegionPolicy(), "temperature": 2.0}):
        assert_close(*loss_and_gradient(x, (ids, probs), target, impl=impl, **rule), *oracle(x, ids, probs, target, **rule)[:2], x.dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_threshold_itself_is_neither_below_nor_above(impl):
    ids, probs = torch.zeros(3, 1, dtype=torch.int64), torch.tensor([[0.3], [0.3], [0.3]])
    for policy, region in (
        (RegionPolicy(discard_below=0.3), Region.KEPT),
        (RegionPolicy(calibrate_below=0.3), Region.KEPT),
        (RegionPolicy(discard_above=0.3), Region.KEPT),
        (RegionPolicy(discard_below=0.3000001), Region.DISCARDED),
        (RegionPolicy(calibrate_below=0.3000001), Region.CALIBRATED),
        (RegionPolicy(discard_above=0.2999999), Region.DISCARDED),
    ):
        _, stats = ferkd_loss(logits(3, 4), (ids, probs), torch.zeros(3, dtype=torch.int64), policy=policy, impl=impl, stats=True)
        assert stats.region.tolist() == [region] * 3, policy


# ---------------------------------------------------------------------------------------------- discarded rows


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_when_every_row_is_discarded_loss_and_gradient_are_zero(reduction, dtype, impl):
    ids, probs, target = labels(6, 20, 3)
    x = logits(6, 20, dtype)
    x[0, 0], x[1, 1], x[2, 2] = math.inf, -math.inf, math.nan  # a discarded row's logits are nobody's business
    loss, gradient = loss_and_gradient(x, (ids, probs), target, policy=RegionPolicy(1.0, 0.0, 1.0), reduction=reduction, impl=impl)
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_discarded_row_does_not_dilute_the_mean(impl):
    ids, probs, target = labels(12, 20, 3)
    x = logits(12, 20)
    kept = probs[:, 0] >= 0.5
    assert 0 < kept.sum() < 12
    some = loss_and_gradient(x, (ids, probs), target, policy=RegionPolicy(discard_below=0.5), impl=impl)
    alone = loss_and_gradient(x[kept], (ids[kept], probs[kept]), target[kept], impl=impl)
    torch.testing.assert_close(some[0], alone[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(some[1][kept], alone[1], rtol=1e-6, atol=1e-9)
    assert not some[1][~kept].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_an_empty_batch_has_loss_zero_and_an_empty_gradient(impl):
    pairs = (torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3))
    for reduction in ("mean", "sum", "none"):
        loss, gradient = loss_and_gradient(torch.zeros(0, 7), pairs, torch.zeros(0, dtype=torch.int64), reduction=reduction, impl=impl)
        assert torch.equal(loss, torch.zeros(0) if reduction == "none" else torch.zeros(()))
        assert gradient.shape == (0, 7)


# ---------------------------------------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
def test_nan_and_infinity_in_a_kept_row_show_as_nan_and_stay_in_it(poison, dtype, impl):
    ids, probs, target = labels(3, 5000, 3)
    x = logits(3, 5000, dtype)
    x[1, 4500] = poison
    loss, gradient = loss_and_gradient(x, (ids, probs), target, reduction="none", impl=impl)
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(dim=1).tolist() == [False, True, False]
    assert ferkd_loss(x, (ids, probs), target, impl=impl).isnan()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_classes_at_minus_infinity_work_where_they_have_no_label(dtype, impl):
    x = logits(2, 10, dtype)
    x[:, 5:] = -math.inf
    ids, probs, target = torch.tensor([[0, 1], [2, 9]]), torch.tensor([[0.6, 0.4], [1.0, 0.0]]), torch.tensor([0, 2])
    found = loss_and_gradient(x, (ids, probs), target, tail="renorm", impl=impl)
    expected = loss_and_gradient(x[:, :5], (ids.clamp_max(4), probs), target, tail="renorm", impl=impl)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1][:, :5], expected[1])
    assert not found[1][:, 5:].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_label_on_a_class_at_minus_infinity_costs_infinity(impl):
    x = torch.tensor([[0.0, 1.0, -math.inf]])
    loss, gradient = loss_and_gradient(x, (torch.tensor([[0]]), torch.tensor([[0.5]])), torch.tensor([0]), impl=impl)
    assert loss.item() == math.inf
    assert gradient.isfinite().all()


# ---------------------------------------------------------------------------------------------- layout, reductions, statistics


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_be_strided(dtype, impl):
    ids, probs, target = labels(6, 100, 5)
    x = logits(6, 100, dtype)
    wide = torch.full((6, 128), math.nan, dtype=dtype)
    wide[:, 3:103] = x
    expected = loss_and_gradient(x, (ids, probs), target, impl=impl)
    for view in (wide[:, 3:103], x.t().contiguous().t(), x[:1].expand(6, 100)):
        at = expected if torch.equal(view, x) else loss_and_gradient(view.contiguous(), (ids, probs), target, impl=impl)
        found = loss_and_gradient(view, (ids, probs), target, impl=impl)
        # On a GPU a row's alignment decides which thread adds up which classes.
        tolerance = (
            {"rtol": {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(dtype, 2e-6), "atol": 1e-7}
            if impl in ON_GPU
            else {"rtol": 0, "atol": 0}
        )
        torch.testing.assert_close(found, at, **tolerance)


@pytest.mark.parametrize("impl", IMPLS)
def test_labels_may_be_strided_int32_and_half_precision(impl):
    ids, probs, target = labels(6, 100, 5)
    x = logits(6, 100)
    expected = ferkd_loss(x, (ids, probs.half().float()), target, impl=impl)

    def strided(tensor):
        view = torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]
        assert not view.is_contiguous()
        return view

    for these, those in ((ids, probs.half().float()), (ids.int(), probs.half())):
        assert torch.equal(ferkd_loss(x, (strided(these), strided(those)), strided(target), impl=impl), expected)
    packed, _, _ = records(ids, probs, 100, "half")
    found = ferkd_loss(x, dataclasses.replace(packed, words=strided(packed.words)), target, impl=impl)
    assert torch.equal(found, ferkd_loss(x, packed, target, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_normalizer_replaces_the_mass(impl):
    ids, probs, target = labels(12, 20, 3)
    x = logits(12, 20)
    mass = label_mass((ids, probs), target, classes=20, policy=POLICY)
    total = loss_and_gradient(x, (ids, probs), target, policy=POLICY, reduction="sum", impl=impl)
    mean = loss_and_gradient(x, (ids, probs), target, policy=POLICY, normalizer=mass.sum(), impl=impl)
    own = loss_and_gradient(x, (ids, probs), target, policy=POLICY, impl=impl)
    torch.testing.assert_close(mean, own, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(mean, tuple(part / mass.sum() for part in total), rtol=1e-6, atol=1e-9)
    nothing = loss_and_gradient(x, (ids, probs), target, policy=RegionPolicy(1.0, 0.0, 1.0), normalizer=torch.tensor(0.0), impl=impl)
    assert nothing[0] == 0
    assert not nothing[1].any()


@pytest.mark.parametrize("confidence", ["max", "target"])
def test_label_mass_is_what_the_oracle_sums(confidence):
    ids, probs, target = labels(30, 37, 4)
    mix = (torch.arange(30).roll(3), random(30))
    policy = RegionPolicy(0.1, 0.3, 0.97, confidence=confidence)
    expected = oracle(logits(30, 37), ids, probs, target, policy=policy, mix=mix)[3]
    torch.testing.assert_close(
        label_mass((ids, probs), target, classes=37, policy=policy, mix=mix).double(), expected, rtol=1e-6, atol=1e-7
    )
    packed, found_ids, found_probs = records(ids, probs, 37, "half")
    torch.testing.assert_close(
        label_mass(packed, target, classes=37, policy=policy), label_mass((found_ids, found_probs), target, classes=37, policy=policy)
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_mixed", [False, True])
def test_statistics_are_the_rows_own(is_mixed, dtype, impl):
    ids, probs, target = labels(40, 300, 4)
    x = logits(40, 300, dtype)
    x[::2, :] = x[::2, :].scatter(1, target[::2, None], 20.0)  # half of the rows are right
    x[4, min(int(target[4]) + 7, 299)] = 20.0  # a tie: right only where the target is the lower id
    x[6, max(int(target[6]) - 7, 0)] = 20.0
    x[8, 3] = math.nan
    mix = (torch.arange(40).flip(0), torch.full((40,), 0.3)) if is_mixed else None
    rule = {"policy": POLICY, "temperature": 2.0, "mix": mix}
    loss, stats = ferkd_loss(x, (ids, probs), target, impl=impl, stats=True, **rule)
    regions = oracle(x, ids, probs, target, **rule)[2]
    assert stats.region.dtype == torch.int8
    assert torch.equal(stats.region, regions)
    expected = torch.tensor(
        [bool(row[t] == row.max()) and not bool((row[:t] == row.max()).any()) for row, t in zip(x, target, strict=True)]
    )
    assert stats.correct.dtype == torch.bool
    assert torch.equal(stats.correct, expected)
    assert 0 < int(expected.sum()) < 40
    lse = torch.logsumexp(x.double() / 2.0, dim=1)
    torch.testing.assert_close(stats.logsumexp.double(), lse, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.equal(loss.isnan(), torch.tensor(True)) or bool(regions[8] == Region.DISCARDED)
    without = ferkd_loss(x, (ids, probs), target, impl=impl, **rule)
    torch.testing.assert_close(without, loss, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_scalar_does_not_depend_on_the_number_of_threads(impl):
    ids, probs, target = labels(64, 1000, 5)
    x = logits(64, 1000)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(loss_and_gradient(x, (ids, probs), target, policy=POLICY, impl=impl))
    finally:
        torch.set_num_threads(threads)
    if impl == "cpu":  # the oracle sums over classes with torch.sum, which promises nothing
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)


def test_the_module_is_the_function_with_its_settings_fixed():
    ids, probs, target = labels(8, 20, 3)
    x = logits(8, 20)
    module = FerKDLoss(POLICY, temperature=2.0, tail="renorm", reduction="sum", tau_squared=True, stats=True, impl="reference")
    mix = (torch.arange(8).flip(0), torch.full((8,), 0.4))
    found, stats = module(x, (ids, probs), target, mix=mix)
    expected = ferkd_loss(
        x, (ids, probs), target, policy=POLICY, temperature=2.0, tail="renorm", reduction="sum", tau_squared=True, mix=mix, impl="reference"
    )
    assert torch.equal(found, expected)
    assert stats.region.shape == (8,)
    assert "discard_below=0.2" in repr(module)


# ---------------------------------------------------------------------------------------------- instruction sets


@pytest.fixture(params=["plain", "avx2", "avx512"])
def isa(request, monkeypatch):
    """The CPU kernel forced to one instruction set; skipped, with the kernel's own reason, on a processor that lacks it."""
    if (reason := ops.why_not("cpu", "cpu")) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("FERKD_CPU", request.param)
    try:
        assert ops.cpu_isa() == request.param
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_gives_the_oracles_figures(isa, dtype):
    for classes in (3, 1000, 4097 + 15, 8193 + 15):  # the last: longer than the exponentials of half types that are kept
        ids, probs, target = labels(10, classes, 3)
        x = logits(10, classes, dtype)
        if dtype == torch.float16:
            x[0, :2] = torch.tensor([6e-8, -3e-5])  # float16 subnormals
        found = loss_and_gradient(x, (ids, probs), target, policy=POLICY, reduction="sum", impl="cpu")
        assert_close(*found, *oracle(x, ids, probs, target, policy=POLICY, reduction="sum")[:2], dtype)
        x = x.requires_grad_()
        (scaled,) = torch.autograd.grad(ferkd_loss(x, (ids, probs), target, policy=POLICY, reduction="sum", impl="cpu") * 0.37, x)
        assert_close(found[0], scaled, found[0].double(), found[1].double() * 0.37, dtype)


def test_every_instruction_set_keeps_a_confident_rows_digits(isa):
    for dtype in (torch.float32, torch.bfloat16):
        test_a_confident_student_on_a_confident_label_keeps_its_digits(dtype, "cpu")
    # 4,095 equal exponentials: a float32 sum in few lanes would drift by hundreds of last bits
    x = torch.zeros(1, 4096)
    x[0, 3] = 12.5
    loss = ferkd_loss(x, (torch.tensor([[3]]), torch.ones(1, 1)), torch.tensor([3]), impl="cpu")
    assert loss.item() == pytest.approx(math.log1p(4095 * math.exp(-12.5)), rel=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_round_as_torch_rounds(isa, dtype):
    """Scaling a gradient widens, multiplies in float32 and narrows: over values of every size it must equal torch bit for bit."""
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    for factor in (0.3, 1e-3, 3.0, 65536.0):
        found = every.clone()
        torch.ops.ferkd.scale_(found, torch.tensor(factor))
        expected = (every.float() * factor).to(dtype)
        assert torch.equal(found.isnan(), expected.isnan())
        keep = ~expected.isnan()
        assert torch.equal(found[keep].view(torch.int16), expected[keep].view(torch.int16)), factor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 300, 5000])
def test_a_rows_figures_do_not_depend_on_the_rows_beside_it(isa, classes, dtype):
    """The kernel takes rows in groups; some rows of a group are discarded, and the last group is short."""
    ids, probs, target = labels(37, classes, 4)
    x = logits(37, classes, dtype)
    rule = {"policy": POLICY, "reduction": "none", "impl": "cpu"}
    together = loss_and_gradient(x, (ids, probs), target, **rule)
    assert (together[0] == 0).any()
    for b in range(37):
        row = slice(b, b + 1)
        alone = loss_and_gradient(x[row], (ids[row], probs[row]), target[row], **rule)
        assert torch.equal(alone[0][0], together[0][b])
        assert torch.equal(alone[1][0], together[1][b])


def test_nan_of_any_kind_stays_nan_in_half_types(isa):
    for dtype in (torch.bfloat16, torch.float16):
        for bits in (0x7FC00000, 0x7FFFFFFF, -1):  # the usual one; all ones, which rounding by an integer addition would make a number
            found = torch.ones(1, 40, dtype=dtype)
            torch.ops.ferkd.scale_(found, torch.tensor(bits, dtype=torch.int32).view(torch.float32))
            assert found.isnan().all()
            ids, probs, target = labels(2, 40, 3)
            promised = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
            x = logits(2, 40, dtype).requires_grad_()
            loss = ferkd_loss(x, (ids, probs), target, impl="cpu", upstream=promised)
            assert loss.grad_fn.saved_tensors[0].isnan().all()


@pytest.mark.skipif(ops.why_not("cpu", "cpu") is not None, reason="the extension is not built")
def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("FERKD_CPU", "mmx")
    with pytest.raises(ValueError, match=r"FERKD_CPU: 'mmx' is unknown; choose plain, avx2 or avx512"):
        ferkd_loss(logits(1, 2), (torch.tensor([[0]]), torch.tensor([[0.5]])), torch.tensor([0]), impl="cpu")


def test_the_oracle_itself_knows_the_papers_rule():
    """FKD's marginal smoothing and FerKD's three regions, on a row small enough to write down."""
    ids, probs = torch.tensor([2, 0]), torch.tensor([0.5, 0.3])
    y, region = dense_label(ids, probs, 1, 4, RegionPolicy())
    assert region == Region.KEPT
    assert y.tolist() == pytest.approx([0.3, 0.1, 0.5, 0.1])
    y, region = dense_label(ids, probs, 1, 4, RegionPolicy(calibrate_below=0.6, smoothing=0.3))
    assert region == Region.CALIBRATED
    assert y.tolist() == pytest.approx([0.1, 0.7, 0.1, 0.1])
    y, region = dense_label(ids, probs, 1, 4, RegionPolicy(discard_below=0.6, calibrate_below=0.6))
    assert region == Region.DISCARDED
    assert not y.any()
    _, region = dense_label(ids, probs, 1, 4, RegionPolicy(calibrate_below=0.2, confidence="target"))
    assert region == Region.CALIBRATED  # the target is not among the k: its confidence is its share of the tail, 0.1
