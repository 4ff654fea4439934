"""Segmentation maps from files of every kind, and as planes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.segmentation import one_hot_map, read_segmentation

IDS = np.array([[0, 1, 2], [5, 5, 181]])


def test_files(tmp_path):
    gray = Image.fromarray(IDS.astype(np.uint8))
    gray.save(tmp_path / "gray.png")
    gray.convert("RGB").save(tmp_path / "colours.png")
    indexed = gray.copy()
    indexed.putpalette([255 - i // 3 for i in range(768)])  # colours that say nothing
    indexed.save(tmp_path / "indexed.png")
    Image.fromarray(IDS.astype(np.uint16)).save(tmp_path / "deep.png")
    np.save(tmp_path / "ids.npy", IDS)
    for name in ("gray.png", "colours.png", "indexed.png", "deep.png", "ids.npy"):
        ids = read_segmentation(tmp_path / name)
        assert ids.dtype == torch.long and ids.tolist() == IDS.tolist(), name


def test_one_bit_per_pixel(tmp_path):
    Image.fromarray(IDS == 5).save(tmp_path / "bits.png")
    assert read_segmentation(tmp_path / "bits.png").tolist() == [[0, 0, 0], [1, 1, 0]]


def test_other_files_are_not_segmentation_maps(tmp_path, monkeypatch):
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)).save(tmp_path / "photo.png")
    np.save(tmp_path / "floats.npy", IDS / 2)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "text.png").write_text("no picture")
    Image.effect_noise((64, 64), 50).save(tmp_path / "bomb.png")
    Image.new("L", (20, 20), 7).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:50])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    messages = {
        "photo.png": "is a colour image",
        "floats.npy": r"must hold integers \(H, W\), one class id per pixel, not float64 \(2, 3\)",
        "objects.npy": "is not an array of class ids",
        "cut.png": "cut.png is cut short or damaged",
        "bomb.png": r"bomb.png has too many pixels \(4096 pixels\): make it smaller",
        "text.png": "is not an image that Pillow can read",
        "": "is a folder",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            read_segmentation(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_segmentation(tmp_path / "not-there.png")


def test_planes():
    planes = one_hot_map(torch.from_numpy(IDS), 182)
    assert planes.shape == (1, 182, 2, 3) and planes.sum(1).eq(1).all()
    assert torch.equal(planes.argmax(1)[0], torch.from_numpy(IDS))
    wide = torch.arange(6).repeat_interleave(3).expand(9, 18)  # 18x9 pixels
    fitted = one_hot_map(wide, 6, multiple=4)
    assert fitted.shape == (1, 6, 8, 16) and fitted.argmax(1).unique().tolist() == [0, 1, 2, 3, 4, 5]


def test_maps_that_do_not_fit():
    with pytest.raises(ValueError, match=r"class ids \[181\], but this model's are 0 to 180"):
        one_hot_map(torch.from_numpy(IDS), 181)
    with pytest.raises(ValueError, match=r"class ids \[-1, 7\]"):
        one_hot_map(torch.tensor([[7, -1]]), 4)
    with pytest.raises(ValueError, match="a map of 3x2 pixels is too small: each side needs 4"):
        one_hot_map(torch.from_numpy(IDS), 182, multiple=4)
