"""Folders of pictures: where captions come from, what pictures become, what is skipped, what is refused."""

from __future__ import annotations

import json
import logging
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data.folder import ImageFolder, scan
from ldm.data.loading import SeededItems

RED = (255, 0, 0)


def draw(path: Path, colour: tuple[int, int, int] = RED, size: tuple[int, int] = (20, 16), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def folder(root: Path, names: str = "a.png b.png c.png") -> Path:
    for i, name in enumerate(names.split()):
        draw(root / name, (10 * i, 0, 0))
    return root


def write_metadata(root: Path, *entries: dict | str) -> None:
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---- items ----


def test_items_by_the_protocol(tmp_path) -> None:
    data = ImageFolder(folder(tmp_path), 8, crop="random", flip=0.5, seed=3)
    assert len(data) == 3
    item = data[1]
    assert item.keys() == {"image"}
    assert (item["image"].shape, item["image"].dtype) == ((8, 8, 3), np.float32)
    np.testing.assert_allclose(item["image"][0, 0], [10 / 127.5 - 1, -1, -1], atol=1e-6)
    assert np.array_equal(item["image"], data.get(1, np.random.default_rng((3, 1)))["image"])
    with pytest.raises(IndexError, match="index 3 is outside 0..2"):
        data[3]


def test_a_loader_makes_batches_of_it(tmp_path) -> None:
    for name in ("cat/a.png", "dog/b.png", "dog/c.png"):
        draw(tmp_path / name)
    data = SeededItems(ImageFolder(tmp_path, 8), seed=1)
    batch = next(iter(DataLoader(data, batch_size=3, sampler=[(0, 0), (0, 1), (0, 2)])))
    assert batch["image"].shape == (3, 8, 8, 3)
    assert batch["class_label"].tolist() == [0, 1, 1]
    assert batch["caption"] == ["a photo of a cat", "a photo of a dog", "a photo of a dog"]


def test_every_kind_of_image_becomes_rgb(tmp_path) -> None:
    draw(tmp_path / "a.jpg", quality=95)
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "b.jpg", quality=95)
    Image.new("RGBA", (20, 20), (*RED, 0)).save(tmp_path / "c.png")  # transparent: white
    Image.new("RGB", (20, 20), RED).quantize(4).save(tmp_path / "d.png")
    Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(tmp_path / "e.png")  # 16 bits
    Image.new("L", (20, 20), 7).save(tmp_path / "f.TIF")
    data = ImageFolder(tmp_path, 8)
    expected = [RED, RED, (255, 255, 255), RED, (155, 155, 155), (7, 7, 7)]
    for item, colour in zip(data, expected, strict=True):
        np.testing.assert_allclose((item["image"][4, 4] + 1) * 127.5, colour, atol=3)


def test_images_are_turned_upright(tmp_path) -> None:
    picture = Image.new("RGB", (20, 20))
    picture.paste(RED, (0, 0, 20, 10))  # the upper half; turned by 180 degrees the lower
    exif = Image.Exif()
    exif[274] = 3
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = ImageFolder(tmp_path, 20)[0]["image"]
    assert image[15, 10, 0] > 0.9 and image[5, 10, 0] < -0.9


def test_large_jpegs_are_decoded_small_and_look_the_same(tmp_path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8))
    noise.resize((1600, 1200), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as file:
        side = file.height
        whole = file.resize((64, 64), Image.Resampling.BICUBIC, box=(200, 0, 200 + side, side))
    found = ImageFolder(tmp_path, 64)[0]["image"]
    assert np.abs(found - (np.asarray(whole, np.float32) / 127.5 - 1)).mean() < 0.02


def test_no_image_is_read_before_it_is_asked_for(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("a picture was opened"))
    (tmp_path / "a.png").touch()
    (tmp_path / "b.JPEG").touch()
    data = ImageFolder(tmp_path, 8)
    assert data.names == ["a.png", "b.JPEG"]
    data.describe()


def test_scan_follows_subfolders_without_cycles(tmp_path) -> None:
    folder(tmp_path, "z.png x/y/b.webp x/a.png .hidden.png .git/c.png")
    (tmp_path / "x/loop").symlink_to(tmp_path)
    (tmp_path / "x/notes.txt").write_text("no picture")
    assert scan(tmp_path) == (["x/a.png", "x/y/b.webp", "z.png"], {"x/notes": "x/notes.txt"})
    assert scan(tmp_path, recursive=False)[0] == ["z.png"]


def test_parts_are_disjoint_and_complete(tmp_path) -> None:
    folder(tmp_path, " ".join(f"{i:02}.png" for i in range(20)))
    train, rest = (ImageFolder(tmp_path, 8, part=part) for part in ([0, 0.9], [0.9, 1]))
    assert (len(train), len(rest)) == (18, 2)
    assert sorted(train.names + rest.names) == [f"{i:02}.png" for i in range(20)]
    assert rest.names != ["18.png", "19.png"]  # mixed


def test_small_images_are_skipped(tmp_path) -> None:
    draw(tmp_path / "a.png", size=(40, 30))
    draw(tmp_path / "b.png", size=(40, 29))
    assert ImageFolder(tmp_path, 8, min_size=30).names == ["a.png"]
    with pytest.raises(ValueError, match=r"no image in .* is left with part=\[0.0, 1.0\] and min_size=31"):
        ImageFolder(tmp_path, 8, min_size=31)


def test_upscaling_is_logged_once(tmp_path, caplog) -> None:
    data = ImageFolder(folder(tmp_path), 64)
    for item in data:
        assert item["image"].shape == (64, 64, 3)
    assert [record.getMessage() for record in caplog.records if "enlarged" in record.getMessage()] == [
        f"{tmp_path / 'a.png'} has only 20x16 pixels and is enlarged to size=64, as others may be (min_size skips them)"
    ]


# ---- captions ----


def test_sidecar_files(tmp_path) -> None:
    folder(tmp_path, "a.png sub/b.c.png d.png")
    (tmp_path / "a.txt").write_text("﻿one\n\n  two \r\nthree\n", encoding="utf-8")
    (tmp_path / "sub/b.c.txt").write_text("schöne Grüße", encoding="utf-8")
    (tmp_path / "d.txt").touch()
    data = ImageFolder(tmp_path, 8)
    assert data.captions == "sidecar"
    chosen = Counter(data.caption(0, rng(seed)) for seed in range(300))
    assert chosen.keys() == {"one", "two", "three"} and min(chosen.values()) > 60
    assert data[1]["caption"] == "" and data[2]["caption"] == "schöne Grüße"
    assert ImageFolder(tmp_path, 8, caption_key="txt")[2]["txt"] == "schöne Grüße"
    assert "caption" not in ImageFolder(tmp_path, 8, captions="none")[2]


def test_caption_files_of_other_trainers(tmp_path, caplog) -> None:
    for name in "abc":
        draw(tmp_path / f"10_sks dog/{name}.png")
    (tmp_path / "10_sks dog/a.caption").write_text("a brown dog")
    (tmp_path / "10_sks dog/b.TXT").write_text("a black dog")
    (tmp_path / "10_sks dog/b.caption").write_text("the .txt file wins")
    (tmp_path / "10_sks dog/c.caption").write_text("a dog")
    with caplog.at_level(logging.WARNING):
        data = ImageFolder(tmp_path, 8)
    assert [item["caption"] for item in data] == ["a brown dog", "a black dog", "a dog"]
    assert "not read" not in caplog.text


@pytest.mark.parametrize("name", ["x/a.png.txt", "metadata.csv", "x/a.json", "captions.JSONL"])
def test_text_files_that_are_not_read_are_named(tmp_path, caplog, name) -> None:
    folder(tmp_path, "x/a.png y/b.png")
    (tmp_path / name).write_text("a dog")
    with caplog.at_level(logging.WARNING):
        assert ImageFolder(tmp_path, 8).captions == "classes"
    assert f"that are not read: {name} (captions of NAME.png are read from NAME.txt" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="ldm"):  # an earlier test may have lowered the level
        ImageFolder(tmp_path, 8, captions="none")
    assert not caplog.text
    with pytest.raises(ValueError, match=f"have no caption .* are not read: {name}"):
        ImageFolder(tmp_path, 8, captions="sidecar")


def test_metadata_file(tmp_path) -> None:
    folder(tmp_path, "a.png sub/b.png")
    write_metadata(tmp_path, {"file_name": "sub/b.png", "text": "a bee"}, "", {"file_name": "a.png", "caption": ["x"]})
    (tmp_path / "a.txt").write_text("not this")
    data = ImageFolder(tmp_path, 8)
    assert [item["caption"] for item in data] == ["x", "a bee"]


def test_class_folders(tmp_path) -> None:
    folder(tmp_path, "red_fox/deep/a.png ant/b.png")
    data = ImageFolder(tmp_path, 8, template="the {}, drawn", class_key="cls")
    assert [(item["caption"], item["cls"]) for item in data] == [("the ant, drawn", 0), ("the red fox, drawn", 1)]
    only_one = ImageFolder(tmp_path, 8, part=[0.5, 1])
    assert only_one.classes == ["ant", "red_fox"]  # labels do not depend on the part


def test_default_caption_replaces_missing_ones(tmp_path) -> None:
    folder(tmp_path, "a.png b.png")
    (tmp_path / "b.txt").write_text("there")
    data = ImageFolder(tmp_path, 8, default_caption="a thing")
    assert [item["caption"] for item in data] == ["a thing", "there"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (['{"file_name": "a.png", "text": "x"'], "metadata.jsonl, line 1 is not JSON"),
        (['{"text": "x"}'], 'line 1 has no "file_name"'),
        (['{"file_name": "a.png"}'], 'line 1 has no "text" or "caption"'),
        (['{"file_name": "a.png", "text": "x"}', '{"file_name": "z.png", "text": "x"}'], r"1 images .*\(z.png\)"),
        (['{"file_name": "a.png", "text": "x"}'], r"1 of 2 images .* no caption \(b.png\): add them to metadata"),
    ],
)
def test_bad_metadata(tmp_path, entries, message) -> None:
    folder(tmp_path, "a.png b.png")
    write_metadata(tmp_path, *entries)
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path, 8)


def test_missing_captions_are_counted_and_named(tmp_path) -> None:
    folder(tmp_path, "a.png b.png c.png d.png e.png")
    (tmp_path / "e.txt").write_text("there")
    message = r"4 of 5 images in .* have no caption \(a.png, b.png, c.png, \.\.\.\): write a .txt .*default_caption"
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path, 8)
    with pytest.raises(ValueError, match="5 of 5 images .* have no class .*: move them into class folders or set"):
        ImageFolder(tmp_path, 8, captions="classes")
    with pytest.raises(FileNotFoundError, match="captions: metadata needs"):
        ImageFolder(tmp_path, 8, captions="metadata")


# ---- broken files ----


@pytest.fixture
def broken(tmp_path) -> Path:
    """b.png is cut short, c.png is no picture, d.png has a caption that is not UTF-8."""
    folder(tmp_path, "a.png b.png c.png d.png e.png")
    for name in "abcde":
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    (tmp_path / "c.png").write_text("not a picture")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xff")
    return tmp_path


def test_broken_files_are_logged_once_and_skipped(broken, caplog) -> None:
    data = ImageFolder(broken, 8)
    with caplog.at_level(logging.WARNING):
        assert [data[i]["caption"] for i in (1, 0, 2, 3, 4)] == ["e", "a", "e", "e", "e"]
        assert [data[i]["caption"] for i in range(5)] == ["a", "e", "e", "e", "e"]
    warnings = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert [next(name for name in ("b.png", "c.png", "d.txt") if name in text) for text in warnings] == [
        "b.png",
        "c.png",
        "d.txt",
    ]
    assert warnings[2].endswith("skipped (3 of 5 so far)")
    assert [data.resolve(i) for i in range(5)] == [0, 4, 4, 4, 4]


def test_the_last_broken_image_is_replaced_by_the_first(broken) -> None:
    (broken / "e.png").write_text("broken too")
    assert ImageFolder(broken, 8)[4]["caption"] == "a"


def test_workers_share_broken_files(broken) -> None:
    data = ImageFolder(broken, 8)
    batches = list(DataLoader(data, batch_size=1, num_workers=2))
    assert [batch["caption"][0] for batch in batches] == ["a", "e", "e", "e", "e"]
    assert data._broken.tolist() == [False, True, True, True, False]  # in this process, which read nothing
    assert pickle.loads(pickle.dumps(data)).names == data.names


def test_broken_files_stop_the_run_on_request(broken) -> None:
    data = ImageFolder(broken, 8, broken="stop")
    assert data[0]["caption"] == "a"
    with pytest.raises(ValueError, match=r"b\.png is .*skip would skip it"):
        data[1]


def test_only_broken_files(tmp_path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").touch()
    with pytest.raises(ValueError, match="none of the 2 images in .* can be read"):
        ImageFolder(tmp_path, 8)[0]


def test_disk_errors_do_not_mark_files_as_broken(tmp_path, monkeypatch) -> None:
    data = ImageFolder(folder(tmp_path), 8)

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ValueError, match="Input/output error"):
        data[0]
    assert not data._broken.any()


# ---- refusals ----


def test_no_folder_no_images(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        ImageFolder(tmp_path / "nowhere", 8)
    (tmp_path / "a.pdf").touch()
    with pytest.raises(ValueError, match=r"no images in .*\.jpeg, \.jpg"):
        ImageFolder(tmp_path, 8)
    with pytest.raises(NotADirectoryError, match="is a file"):
        ImageFolder(tmp_path / "a.pdf", 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": "text"}, "captions 'text' is not one of auto, sidecar"),
        ({"broken": "ignore"}, "broken 'ignore' is not one of skip, stop"),
        ({"part": [0.5, 0.5]}, r"part must be two increasing numbers .*\[0.5, 0.5\]"),
        ({"template": "a photo"}, "template 'a photo' has no {}"),
    ],
)
def test_refused_options(tmp_path, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        ImageFolder(folder(tmp_path), 8, **options)


def test_describe_changes_with_the_items(tmp_path) -> None:
    folder(tmp_path)
    before = ImageFolder(tmp_path, 8).describe()
    assert before == ImageFolder(tmp_path, 8).describe()
    assert {**before, "size": 16} == ImageFolder(tmp_path, 16).describe()
    draw(tmp_path / "b.png", size=(70, 70))
    assert ImageFolder(tmp_path, 8).describe()["files"] != before["files"]
