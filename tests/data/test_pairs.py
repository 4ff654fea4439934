"""Pictures and their masks in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ldm.data.masks import find_pairs, load_pair


def folder_of(tmp_path: Path, *names: str) -> Path:
    for name in names:
        Image.new("RGB", (8, 4)).save(tmp_path / name)
    return tmp_path


def test_pairs_are_found_by_name_whatever_their_types(tmp_path):
    names = ["b.jpg", "b_mask.png", "a.PNG", "a_mask.webp", "my_mask_art.bmp", "my_mask_art_mask.gif"]
    folder = folder_of(tmp_path, *names)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".a_mask.png").write_text("of another program")
    found = [(picture.name, mask.name) for picture, mask in find_pairs(str(folder))]
    assert found == [("a.PNG", "a_mask.webp"), ("b.jpg", "b_mask.png"), ("my_mask_art.bmp", "my_mask_art_mask.gif")]


def test_missing_files_are_named(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        find_pairs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no masks: the mask of X.png is X_mask.png"):
        find_pairs(folder_of(tmp_path, "a.png", "b.png"))
    assert [picture.name for picture, _ in find_pairs(folder_of(tmp_path, "a_mask.png"))] == ["a.png"]
    assert "no mask for b.png" in caplog.text
    with pytest.raises(FileNotFoundError, match="no image for c_mask.png, d_mask.gif"):
        find_pairs(folder_of(tmp_path, "c_mask.png", "d_mask.gif"))


def test_a_pair_that_does_not_fit_is_named(tmp_path):
    folder = folder_of(tmp_path, "a.png")
    Image.new("L", (4, 8), 255).save(folder / "a_mask.png")
    Image.new("L", (16, 8), 255).save(folder / "twice.png")
    with pytest.raises(ValueError, match="the mask .*a_mask.png is 4x8 pixels, but .*a.png is 8x4"):
        load_pair(folder / "a.png", folder / "a_mask.png")
    image, mask = load_pair(folder / "a.png", folder / "twice.png")
    assert image.size == (8, 4) and mask.shape == (1, 1, 8, 16) and mask.eq(1).all()
