"""Random masks for training: their kinds, and items that hold them."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.data.loading import SeededItems
from ldm.data.masks import MaskedImages, random_mask
from tests.training.toys import Pictures


class Grey:
    def __len__(self):
        return 3

    def get(self, i, rng):
        return {"image": np.full((24, 32, 3), rng.uniform(0.5, 1.0), np.float32), "caption": str(i)}


def test_masks_cover_all_or_a_part():
    rng = np.random.default_rng(0)
    masks = [random_mask(48, 64, rng) for _ in range(1000)]
    assert {mask.shape for mask in masks} == {(48, 64, 1)} and {mask.dtype.name for mask in masks} == {"float32"}
    assert set(np.unique(masks)) == {0.0, 1.0}
    shares = np.array([mask.mean() for mask in masks])
    assert 0.2 < (shares == 1).mean() < 0.3  # a quarter is whole
    assert 0.2 < np.median(shares[shares < 1]) < 0.6 and shares.min() > 0


def test_items_hold_mask_and_masked_image():
    data = MaskedImages(Grey())
    item = data.get(1, np.random.default_rng(5))
    assert len(data) == 3 and item["caption"] == "1"
    inside = item["mask"][:, :, 0] == 1
    assert (item["masked_image"][inside] == 0).all()
    assert (item["masked_image"][~inside] == item["image"][~inside]).all()


def test_masks_differ_by_epoch_and_are_reproducible():
    first, again = (SeededItems(MaskedImages(Grey()), seed=1) for _ in range(2))
    masks = [first[epoch, 0]["mask"] for epoch in range(8)]
    assert len({mask.tobytes() for mask in masks}) > 4
    assert all((again[epoch, 0]["mask"] == mask).all() for epoch, mask in enumerate(masks))


def test_datasets_with_global_rng_are_reproducible():
    data = SeededItems(MaskedImages(Pictures(2), image_key="jpg"), seed=1)
    before = np.random.get_state()[1].copy()
    first, again, later = (data[epoch, 0]["masked_image"] for epoch in (0, 0, 1))
    assert (first == again).all() and (first != later).any()
    assert (np.random.get_state()[1] == before).all()


def test_other_datasets():
    data = MaskedImages({"target": "tests.training.toys.Pictures", "params": {"length": 2}}, image_key="jpg")
    assert data[0]["masked_image"].shape == (16, 16, 3)
    with pytest.raises(ValueError, match="no 'image' to mask, only jpg, txt: set image_key"):
        MaskedImages(Pictures())[0]
