"""The transforms of configs, against their closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.image_transforms import (
    CenterCrop,
    Compose,
    Normalize,
    RandomCrop,
    RandomHorizontalFlip,
    Resize,
    ToTensor,
    build_transforms,
    resampling,
    to_array,
)
from ldm.util import get_obj_from_str

IMAGE = Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint32).reshape(40, 60, 3).astype(np.uint8))


def test_resize():
    assert Resize(20)(IMAGE).size == (30, 20)
    assert Resize(20, max_size=24)(IMAGE).size == (24, 16)
    assert Resize([10, 15], interpolation=3)(IMAGE).size == (15, 10)
    expected = IMAGE.resize((30, 20), Image.Resampling.BICUBIC)
    assert (np.asarray(Resize(20, 3)(IMAGE)) == np.asarray(expected)).all()
    with pytest.raises(ValueError, match="interpolation 9"):
        resampling(9)
    assert resampling("linear") is Image.Resampling.BILINEAR


def test_crops():
    pixels = np.asarray(IMAGE)
    assert (np.asarray(CenterCrop(20)(IMAGE)) == pixels[10:30, 20:40]).all()
    assert (np.asarray(CenterCrop((60, 20))(IMAGE))[:10] == 0).all()
    np.random.seed(0)
    crops = [np.asarray(RandomCrop(20)(IMAGE)) for _ in range(20)]
    windows = {crop.tobytes() for crop in crops}
    every = {pixels[y : y + 20, x : x + 20].tobytes() for y in range(21) for x in range(41)}
    assert len(windows) > 10 and windows <= every
    with pytest.raises(ValueError, match="put a Resize before it"):
        RandomCrop(50)(IMAGE)
    assert RandomCrop(50, pad_if_needed=True)(IMAGE).size == (50, 50)


def test_flip():
    assert (np.asarray(RandomHorizontalFlip(1.0)(IMAGE)) == np.asarray(IMAGE)[:, ::-1]).all()
    assert RandomHorizontalFlip(0.0)(IMAGE) is IMAGE


def test_tensors():
    x = Compose([ToTensor(), Normalize([0.5] * 3, [0.25] * 3)])(IMAGE)
    pixels = torch.from_numpy(np.asarray(IMAGE).copy()).movedim(-1, 0) / 255
    assert torch.allclose(x, (pixels - 0.5) / 0.25)
    array = to_array(ToTensor()(IMAGE))
    assert np.allclose(array, to_array(IMAGE), atol=1e-6)


def test_targets_of_torchvision():
    for name in ("Resize", "CenterCrop", "RandomCrop", "RandomHorizontalFlip", "ToTensor", "Normalize"):
        assert get_obj_from_str(f"torchvision.transforms.{name}").__module__ == "ldm.data.image_transforms"
    transform = build_transforms([{"target": "torchvision.transforms.Resize", "params": {"size": 20}}, CenterCrop(20)])
    assert transform(IMAGE).size == (20, 20)
    assert build_transforms(None)(IMAGE) is IMAGE
