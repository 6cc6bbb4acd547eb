"""Mixup, CutMix and SelfMix: who is paired with whom, by how much, and that pixels and labels agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ferkd.errors import InputError
from ferkd.mixing import MixedRows, Mixing, draw_mixing, mix_pixels


def draw(
    mixing: Mixing, *, step: int = 3, first_slot: int = 0, images: int = 8, crops: int = 4, size: int = 32, seed: int = 7
) -> MixedRows:
    mixed = draw_mixing(mixing, seed, step, first_slot, images, crops, size)
    assert mixed is not None
    return mixed


def test_nothing_is_drawn_without_mixing_and_for_selfmix_of_one_crop() -> None:
    assert draw_mixing(Mixing(), 0, 0, 0, 8, 4, 32) is None
    assert draw_mixing(Mixing("selfmix"), 0, 0, 0, 8, 1, 32) is None


def test_selfmix_pairs_a_row_with_another_crop_of_its_image() -> None:
    for step in range(20):
        partner = draw(Mixing("selfmix"), step=step).partner
        rows = torch.arange(32)
        assert torch.equal(partner // 4, rows // 4)
        assert (partner != rows).all()


@pytest.mark.parametrize("mix", ["mixup", "cutmix", "mixup_cutmix"])
def test_partners_are_a_permutation_inside_each_group(mix: str) -> None:
    partner = draw(Mixing(mix, mix_group=2)).partner  # type: ignore[arg-type]
    rows = torch.arange(32)
    assert torch.equal(partner // 8, rows // 8)
    assert torch.equal(partner.sort().values, rows)


def test_each_half_of_a_batch_draws_what_the_whole_would() -> None:
    """So that two processes mix exactly as one does."""
    mixing = Mixing("mixup_cutmix", mix_group=4, mix_per="row")
    whole = draw(mixing, images=8)
    first, second = draw(mixing, images=4), draw(mixing, images=4, first_slot=4)
    assert torch.equal(whole.partner, torch.cat([first.partner, second.partner + 16]))
    assert torch.equal(whole.lam, torch.cat([first.lam, second.lam]))
    assert torch.equal(whole.box, torch.cat([first.box, second.box]))


def test_one_lambda_a_batch_or_one_a_row() -> None:
    assert len(draw(Mixing("mixup")).lam.unique()) == 1
    assert len(draw(Mixing("mixup", mix_per="row")).lam.unique()) == 32


def test_the_same_key_draws_the_same_and_another_step_does_not() -> None:
    mixing = Mixing("mixup", mix_per="row")
    assert torch.equal(draw(mixing).lam, draw(mixing).lam)
    assert not torch.equal(draw(mixing).lam, draw(mixing, step=4).lam)
    assert not torch.equal(draw(mixing).lam, draw(mixing, seed=8).lam)


def test_cutmix_lambda_is_the_share_of_own_pixels() -> None:
    mixed = draw(Mixing("cutmix", mix_per="row"), images=64)
    rows = len(mixed.lam)
    images = torch.arange(rows, dtype=torch.float32)[:, None, None, None].expand(rows, 3, 32, 32).contiguous()
    out = mix_pixels(images, mixed)
    own = (out == images).float().mean((1, 2, 3))
    is_other = mixed.partner != torch.arange(rows)
    assert is_other.sum() > 100
    torch.testing.assert_close(own[is_other], mixed.lam[is_other], atol=1e-6, rtol=0)
    assert ((out == images) | (out == images[mixed.partner])).all()


def test_mixup_blends_with_the_weight_of_the_label() -> None:
    mixed = draw(Mixing("mixup", mix_per="row"))
    images = torch.randn(32, 3, 32, 32)
    expected = mixed.lam[:, None, None, None] * images + (1 - mixed.lam[:, None, None, None]) * images[mixed.partner]
    torch.testing.assert_close(mix_pixels(images, mixed), expected)


def test_probability_leaves_rows_alone() -> None:
    mixed = draw(Mixing("mixup_cutmix", mix_probability=0.25, mix_per="row"), images=512)
    assert abs(float((mixed.lam == 1).float().mean()) - 0.75) < 0.05
    images = torch.randn(2048, 3, 4, 4)
    untouched = mixed.lam == 1
    assert torch.equal(mix_pixels(images, mixed)[untouched], images[untouched])


def test_lambda_follows_the_beta_distribution() -> None:
    lam = np.concatenate([draw(Mixing("mixup", mixup_alpha=0.8, mix_per="row"), images=256, step=step).lam.numpy() for step in range(4)])
    assert abs(lam.mean() - 0.5) < 0.03
    assert abs(lam.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.01  # variance of Beta(a, a)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"mix": "blend"}, "mix: 'blend'"),
        ({"mixup_alpha": 0.0}, "mixup_alpha: 0.0"),
        ({"mix_probability": 1.5}, "mix_probability: 1.5"),
        ({"mix_group": 0}, "mix_group: 0"),
        ({"mix_per": "pixel"}, "mix_per: 'pixel'"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Mixing(**wrong)  # type: ignore[arg-type]


def test_a_group_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(InputError, match="mix_group: 16 images do not divide the 24"):
        draw(Mixing("mixup", mix_group=16), images=24)
