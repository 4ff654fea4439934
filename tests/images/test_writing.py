"""ldm/images/writing.py: files that are whole, and nobody else's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from ldm import images
from tests.images import pixels


def test_next_free_index_is_after_the_highest(tmp_path):
    assert images.next_free_index(tmp_path, "{:05}.png") == 0
    for name in ("00003.png", "00007.png", "100000.png.bak", "notes.txt", "grid-0041.png", "x00099.png"):
        (tmp_path / name).touch()
    assert images.next_free_index(tmp_path, "{:05}.png") == 8
    assert images.next_free_index(tmp_path, "grid-{:04}.png") == 42
    (tmp_path / "123456.png").touch()
    assert images.next_free_index(tmp_path, "{:05}.png") == 123457


def test_save_png(tmp_path):
    image = Image.effect_noise((9, 5), 50).convert("RGB")
    metadata = {"parameters": "a cat\nSteps: 3", "ldm": "Katze, 猫, 🐈"}
    path = images.save_png(image, tmp_path, "{:05}.png", metadata)
    assert path == tmp_path / "00000.png"
    with Image.open(path) as saved:
        assert saved.format == "PNG" and saved.text == metadata
        assert np.array_equal(pixels(saved), pixels(image))
    assert images.save_png(image, tmp_path, "{:05}.png") == tmp_path / "00001.png"
    with Image.open(tmp_path / "00001.png") as saved:
        assert saved.text == {}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000.png", "00001.png"]


def test_named_files_get_a_suffix_if_they_exist(tmp_path):
    (tmp_path / "a{}.png").write_text("someone else's")
    names = [images.save_png_named(Image.new("RGB", (4, 4)), tmp_path, "a{}", {"k": "v"}).name for _ in range(2)]
    assert names == ["a{}-1.png", "a{}-2.png"]
    assert Image.open(tmp_path / "a{}-2.png").text == {"k": "v"}
    assert (tmp_path / "a{}.png").read_text() == "someone else's" and len(list(tmp_path.iterdir())) == 3


def _refuse_links(*args):
    raise PermissionError("no hard links here")


@pytest.mark.parametrize("hard_links", [True, False])
def test_writers_at_once_never_overwrite(tmp_path, monkeypatch, hard_links):
    if not hard_links:
        monkeypatch.setattr(images.writing.os, "link", _refuse_links)

    def write(level: int) -> None:
        images.save_png(Image.new("RGB", (4, 4), (level, 0, 0)), tmp_path, "{:05}.png")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    levels = {pixels(Image.open(path))[0, 0, 0] for path in tmp_path.glob("*.png")}
    assert levels == set(range(40))
    assert len(list(tmp_path.iterdir())) == 40


def test_a_name_that_exists_by_now_is_skipped(tmp_path, monkeypatch):
    (tmp_path / "00000.png").write_text("someone else's")
    monkeypatch.setattr(images.writing, "next_free_index", lambda *args: 0)  # as seen before the other process wrote
    assert images.save_png(Image.new("RGB", (4, 4)), tmp_path, "{:05}.png").name == "00001.png"
    assert (tmp_path / "00000.png").read_text() == "someone else's"


def test_a_broken_write_leaves_nothing(tmp_path, monkeypatch):
    def half(self, file, **kwargs):
        file.write(b"\x89PNG half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="disk full"):
        images.save_png(Image.new("RGB", (4, 4)), tmp_path, "{:05}.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind, tolerance", [("gif", 0), ("webp", 12)])
def test_animations_last_as_long_as_they_should_and_overwrite_nothing(tmp_path, kind, tolerance):
    frames = [Image.new("RGB", (8, 6), (40 * i, 0, 255 - 40 * i)) for i in range(6)]
    (tmp_path / f"a-0002.{kind}").write_text("kept")
    path = images.save_animation(frames, tmp_path, f"a-{{:04}}.{kind}", fps=15)
    assert path.name == f"a-0003.{kind}" and (tmp_path / f"a-0002.{kind}").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"a-0002.{kind}", f"a-0003.{kind}"]
    with Image.open(path) as animated:
        assert animated.n_frames == 6 and animated.info["loop"] == 0
        shown, durations = [], []
        for number in range(6):
            animated.seek(number)
            shown.append(np.asarray(animated.convert("RGB")).astype(int))
            durations.append(animated.info["duration"])
    assert sum(durations) == 400 and max(durations) - min(durations) <= 10
    assert max(np.abs(a - np.asarray(b)).max() for a, b in zip(shown, frames)) <= tolerance
    with pytest.raises(ValueError, match=r"a \.gif or \.webp of at least one image, not \.mp4 of 6"):
        images.save_animation(frames, tmp_path, "a-{:04}.mp4", fps=15)


def test_previews_replace_each_other(tmp_path):
    for colour in ("red", "blue"):
        images.replace_png(Image.new("RGB", (2, 2), colour), tmp_path / "preview.png")
    assert [path.name for path in tmp_path.iterdir()] == ["preview.png"]
    assert Image.open(tmp_path / "preview.png").getpixel((0, 0)) == (0, 0, 255)
