"""ldm/images.py against hand-made pixels and files that Pillow writes."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import images

COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# ------------------------------------------------------------------------------------------------------------- loading


def test_load_turns_by_exif(tmp_path):
    image = Image.new("RGB", (16, 8), "blue")
    image.paste("red", (0, 0, 8, 8))  # red left, blue right
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    image.save(tmp_path / "phone.png", exif=exif)
    loaded = images.load_image(tmp_path / "phone.png")
    assert loaded.size == (8, 16)
    assert loaded.getpixel((4, 2)) == COLOURS["red"] and loaded.getpixel((4, 13)) == COLOURS["blue"]


def test_load_puts_transparency_on_white(tmp_path):
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    rgba.putpixel((1, 0), (0, 0, 255, 255))
    rgba.save(tmp_path / "a.png")
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([0, 255, 0])
    palette.save(tmp_path / "p.png", transparency=0)
    assert pixels(images.load_image(tmp_path / "a.png")).tolist() == [[[255, 255, 255], [0, 0, 255]]]
    assert pixels(images.load_image(tmp_path / "p.png")).tolist() == [[[255, 255, 255]]]


def test_load_scales_16_bit_grey(tmp_path):
    Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert pixels(images.load_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["L", "CMYK", "1", "YCbCr"])
def test_load_gives_rgb(tmp_path, mode):
    Image.new("RGB", (3, 2), "white").convert(mode).save(tmp_path / "x.tif")
    assert pixels(images.load_image(tmp_path / "x.tif")).min() >= 254


def test_load_errors(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no picture .*nothing.png"):
        images.load_image(tmp_path / "nothing.png")
    with pytest.raises(ValueError, match="is a folder"):
        images.load_image(tmp_path)
    (tmp_path / "text.png").write_text("<html>")
    with pytest.raises(ValueError, match="text.png is not a picture"):
        images.load_image(tmp_path / "text.png")
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cut.png is cut short or damaged"):
        images.load_image(tmp_path / "cut.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="whole.png has too many pixels"):
        images.load_image(whole)


@pytest.mark.filterwarnings("error")
def test_load_is_silent_about_large_photos(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # warns from 1000 pixels on, refuses from 2000 on
    assert images.load_image(tmp_path / "large.png").size == (40, 40)


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("given", "height", "width", "expected"),
    [
        ((100, 70), None, None, (96, 64)),
        ((64, 32), None, None, (64, 32)),
        ((100, 70), 130, 33, (32, 128)),
        ((400, 300), None, 128, (128, 96)),
        ((400, 300), 96, None, (128, 96)),
    ],
)
def test_fit_to_multiple(given, height, width, expected):
    assert images.fit_to_multiple(Image.new("RGB", given), 32, height, width).size == expected


def test_fit_to_multiple_resizes_with_lanczos():
    image = Image.effect_noise((70, 70), 80).convert("RGB")
    expected = image.resize((64, 64), resample=Image.Resampling.LANCZOS)
    assert np.array_equal(pixels(images.fit_to_multiple(image, 64)), pixels(expected))
    assert np.array_equal(pixels(images.fit_to_multiple(expected, 64)), pixels(expected))


@pytest.mark.parametrize(
    ("size", "height", "width"), [((31, 64), None, None), ((64, 64), 8, 64), ((999, 33), None, 64)]
)
def test_fit_to_multiple_refuses_tiny_sizes(size, height, width):
    with pytest.raises(ValueError, match="too small: each side needs at least 32"):
        images.fit_to_multiple(Image.new("RGB", size), 32, height, width)


# ------------------------------------------------------------------------------------------------------------- tensors


def test_image_to_tensor():
    image = Image.new("RGB", (3, 2), (0, 51, 255))
    x = images.image_to_tensor(image)
    assert x.shape == (1, 3, 2, 3) and x.dtype == torch.float32
    assert torch.allclose(x[0, :, 1, 2], torch.tensor([-1.0, -0.6, 1.0]), atol=1e-6)


def test_tensor_to_images_truncates_and_clamps():
    levels = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0, 7.0])  # 0, 0, 127.5, 254.87, 255, 255
    x = levels.view(1, 1, 1, 6).expand(2, 3, 1, 6)
    first, second = images.tensor_to_images(x)
    assert pixels(first)[0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    assert np.array_equal(pixels(first), pixels(second))
    assert np.array_equal(pixels(images.tensor_to_images(x.to(torch.bfloat16))[0])[0, :3, 1], [0, 0, 127])


def test_tensor_to_images_keeps_channels_in_place():
    image = Image.effect_noise((5, 4), 50).convert("RGB")
    image.putpixel((4, 0), (10, 20, 30))
    back = images.tensor_to_images(images.image_to_tensor(image))[0]
    assert np.abs(pixels(back) - pixels(image)).max() <= 1  # truncation may lose one level
    assert back.size == (5, 4)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8)])
def test_tensor_to_images_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        images.tensor_to_images(torch.zeros(shape))


# --------------------------------------------------------------------------------------------------------------- masks


def test_a_mask_is_white_from_a_half_on_at_any_size():
    mask = torch.tensor([[0.0, 127 / 255, 128 / 255, 1.0]]).expand(1, 1, 4, 4)
    assert images.fit_mask(mask, 4, 4)[0, 0, 0].tolist() == [0, 0, 1, 1]
    for side in (2, 8, 6):
        fitted = images.fit_mask(mask.round(), side, side)
        assert fitted.shape == (1, 1, side, side) and fitted[0, 0, 0].tolist() == [0] * (side // 2) + [1] * (side // 2)


@pytest.mark.parametrize("size", [(100, 50), (200, 100), (33, 17), (7, 3)])
def test_masks_may_be_scaled(size):
    images.check_mask(torch.zeros(1, 1, size[1], size[0]), Image.new("RGB", (100, 50)))


@pytest.mark.parametrize("size", [(50, 100), (96, 50), (100, 52)])
def test_masks_of_another_shape_are_refused(size):
    message = f"m.png is {size[0]}x{size[1]} pixels, but a.png is 100x50: make it as large as the picture"
    with pytest.raises(ValueError, match=message):
        images.check_mask(torch.zeros(1, 1, size[1], size[0]), Image.new("RGB", (100, 50)), "m.png", "a.png")


@pytest.mark.parametrize("pixels", [0, 1, 3, 40])
def test_feather_falls_linearly_with_the_distance(pixels):
    mask = torch.zeros(1, 1, 19, 24)
    mask[..., 6:9, 4:7] = 1
    mask[..., 17, 20] = 1
    spots = mask[0, 0].nonzero()
    y, x = torch.meshgrid(torch.arange(19), torch.arange(24), indexing="ij")
    distance = ((y[..., None] - spots[:, 0]) ** 2 + (x[..., None] - spots[:, 1]) ** 2).amin(-1).sqrt()
    expected = (1 - distance / (pixels + 1)).clamp(min=0)
    assert torch.allclose(images.feathered(mask, pixels)[0, 0], expected, atol=1e-6)
    assert images.feathered(torch.zeros_like(mask), pixels).eq(0).all()


def test_blend_is_exact_where_the_weight_is_0_or_1():
    under, over = (Image.effect_noise((256, 3), 90).convert("RGB") for _ in range(2))
    weight = torch.tensor([0.0, 0.25, 1.0])[None, None, :, None].expand(1, 1, 3, 256)
    rows = pixels(images.blend(under, over, weight))
    assert np.array_equal(rows[0], pixels(under)[0]) and np.array_equal(rows[2], pixels(over)[2])
    assert np.abs(rows[1] - (0.75 * pixels(under)[1] + 0.25 * pixels(over)[1])).max() <= 0.5


# ---------------------------------------------------------------------------------------------------------------- grid


def test_grid_layout():
    tiles = [Image.new("RGB", (2, 1), colour) for colour in ("red", "lime", "blue")]
    grid = images.make_grid(tiles, nrow=2, padding=2)
    expected = np.zeros((8, 10, 3), dtype=int)  # rows 2 * (1 + 2) + 2, columns 2 * (2 + 2) + 2
    expected[2, 2:4] = COLOURS["red"]
    expected[2, 6:8] = COLOURS["lime"]
    expected[5, 2:4] = COLOURS["blue"]
    assert np.array_equal(pixels(grid), expected)


def test_grid_sizes_of_the_public_scripts():
    tiles = [Image.new("RGB", (512, 512))] * 3
    assert images.make_grid(tiles, nrow=3).size == (1544, 516)
    assert images.make_grid(tiles, nrow=8).size == (1544, 516)  # no longer than there are pictures
    assert images.make_grid(tiles, nrow=1).size == (516, 1544)
    assert images.make_grid(tiles[:1], nrow=3).size == (512, 512)  # one picture is left alone


def test_grid_errors():
    with pytest.raises(ValueError, match="needs pictures"):
        images.make_grid([])
    with pytest.raises(ValueError, match="nrow=0"):
        images.make_grid([Image.new("RGB", (2, 2))], nrow=0)
    with pytest.raises(ValueError, match="one size"):
        images.make_grid([Image.new("RGB", (2, 2)), Image.new("RGB", (3, 2))])


# -------------------------------------------------------------------------------------------------------------- saving


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


def test_named_files_give_way(tmp_path):
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
        monkeypatch.setattr(images.os, "link", _refuse_links)

    def write(level: int) -> None:
        images.save_png(Image.new("RGB", (4, 4), (level, 0, 0)), tmp_path, "{:05}.png")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    levels = {pixels(Image.open(path))[0, 0, 0] for path in tmp_path.glob("*.png")}
    assert levels == set(range(40))
    assert len(list(tmp_path.iterdir())) == 40


def test_a_name_taken_meanwhile_is_skipped(tmp_path, monkeypatch):
    (tmp_path / "00000.png").write_text("someone else's")
    monkeypatch.setattr(images, "next_free_index", lambda *args: 0)  # as seen before the other process wrote
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


# ------------------------------------------------------------------------------------------------------------ metadata


def test_parameters_text_is_what_other_tools_read():
    settings = {
        "prompt": "a cat, sitting",
        "negative_prompt": "dogs",
        "steps": 20,
        "sampler": "dpm_solver",
        "scale": 7.5,
        "seed": 42,
        "size": "512x512",
        "model": "cats: v1, pruned",
        "strength": 0.75,
        "index": 0,
        "version": "ldm 1.0",
    }
    assert images.parameters_text(settings) == (
        "a cat, sitting\n"
        "Negative prompt: dogs\n"
        'Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 42, Size: 512x512, Model: "cats: v1, pruned", '
        "Denoising strength: 0.75, Image index: 0, Version: ldm 1.0"
    )


def test_parameters_text_leaves_out_what_is_not_there():
    settings = {"prompt": "", "negative_prompt": "", "steps": 5, "sampler": "ddim", "eta": 0.0, "seed": 0}
    assert images.parameters_text(settings) == "\nSteps: 5, Sampler: DDIM, Eta: 0, Seed: 0"


def test_png_metadata_holds_everything_as_json():
    settings = {"prompt": "猫", "steps": 5, "init_image": "photo.jpg"}
    metadata = images.png_metadata(settings)
    assert json.loads(metadata["ldm"]) == settings
    assert metadata["parameters"] == "猫\nSteps: 5"


def test_load_gray_gives_brightness_from_0_to_1_with_the_precision_of_the_file(tmp_path):
    ramp = np.linspace(0, 1, 32).reshape(1, 1, 4, 8)
    Image.fromarray((ramp[0, 0] * 255).astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray((ramp[0, 0] * 65535).astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray((ramp[0, 0] * 7 + 3).astype(np.float32)).save(tmp_path / "f.tiff")
    for name, bound in (("8.png", 1 / 255), ("16.png", 1 / 65535), ("f.tiff", 1e-6)):
        gray = images.load_gray(tmp_path / name)
        assert gray.shape == (1, 1, 4, 8) and gray.dtype == torch.float32
        assert np.abs(gray.numpy() - ramp).max() <= bound
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert images.load_gray(tmp_path / "clear.png").eq(1).all()  # an erased part of a mask is one to fill
    with pytest.raises(FileNotFoundError, match="there is no picture"):
        images.load_gray(tmp_path / "none.png")


def test_load_gray_refuses_what_is_not_finite(tmp_path):
    Image.fromarray(np.array([[0.5, np.nan]], np.float32)).save(tmp_path / "depth.tif")
    with pytest.raises(ValueError, match="depth.tif holds NaN or infinity"):
        images.load_gray(tmp_path / "depth.tif")


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
    with pytest.raises(ValueError, match=r"a \.gif or \.webp of at least one picture, not \.mp4 of 6"):
        images.save_animation(frames, tmp_path, "a-{:04}.mp4", fps=15)


def test_previews_replace_each_other(tmp_path):
    for colour in ("red", "blue"):
        images.replace_png(Image.new("RGB", (2, 2), colour), tmp_path / "preview.png")
    assert [path.name for path in tmp_path.iterdir()] == ["preview.png"]
    assert Image.open(tmp_path / "preview.png").getpixel((0, 0)) == (0, 0, 255)


# ------------------------------------------------------------------------------------------------ pictures of all kinds


RAMP = np.array([[0, 32896, 65535]], np.uint16)
DEEP = {
    "16.png": Image.fromarray(RAMP),
    "16.tif": Image.fromarray(RAMP),
    "32.tif": Image.fromarray(RAMP.astype(np.int32)),
    "16.pgm": Image.fromarray(RAMP),
    "float.tif": Image.fromarray((RAMP / 65535).astype(np.float32)),
    "hdr.tif": Image.fromarray((RAMP / 100 - 50).astype(np.float32)),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_pictures_are_scaled_not_cut_off(tmp_path, name):
    DEEP[name].save(tmp_path / name)
    assert pixels(images.load_image(tmp_path / name))[0, :, 0].tolist() == [0, 128, 255]
    assert images.load_gray(tmp_path / name)[0, 0, 0].tolist() == pytest.approx([0, 32896 / 65535, 1], abs=1e-6)


@pytest.mark.parametrize("big", [">u2", "<u2"])
def test_both_byte_orders(tmp_path, big):
    Image.frombytes("I;16B" if big == ">u2" else "I;16", (3, 1), RAMP.astype(big).tobytes()).save(tmp_path / "a.tif")
    assert pixels(images.load_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 128, 255]


def test_cmyk_photos_are_not_inverted(tmp_path):
    for colour in ("white", "red"):
        Image.new("RGB", (16, 16), colour).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
        assert np.abs(pixels(images.load_image(tmp_path / "a.jpg")) - COLOURS[colour]).max() <= 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_masks_of_any_mode(tmp_path, mode):
    gray = Image.new("L", (6, 4), 0)
    gray.paste(255, (3, 0, 6, 4))
    mask = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257) if mode == "I;16" else gray.convert(mode)
    mask.save(tmp_path / "mask.png")
    found = images.load_gray(tmp_path / "mask.png")
    assert found.shape == (1, 1, 4, 6) and found[0, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert images.fit_mask(found, 8, 12)[0, 0, 0].tolist() == [0] * 6 + [1] * 6


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_of_several_pictures_the_first_is_used_and_that_is_said_once(tmp_path, caplog, kind):
    path = tmp_path / f"moving.{kind}"
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "webp" else {}))
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert images.load_image(path).getpixel((8, 8)) == COLOURS["red"]
    assert caplog.text.count("moving") == 1 and "several pictures: the first is used" in caplog.text


def test_formats_that_are_not_expected_are_refused(tmp_path):
    image = Image.new("RGB", (8, 8))
    for kind in ("eps", "pdf", "ico", "tga", "pcx", "dds", "sgi", "icns", "jp2"):
        try:
            image.save(tmp_path / f"a.{kind}")
        except (KeyError, OSError, ValueError):
            continue  # this Pillow writes no such files
        (tmp_path / f"a.{kind}").rename(tmp_path / "a.png")
        with pytest.raises(
            ValueError, match="a.png is not a picture .* in a format of AVIF, BMP, .*: convert it to PNG"
        ):
            images.load_image(tmp_path / "a.png")


def test_a_head_that_promises_too_much(tmp_path):
    """A file of a hundred bytes that says it is 60000x60000."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.bmp")
    data = bytearray((tmp_path / "a.bmp").read_bytes())
    data[18:26] = (60000).to_bytes(4, "little") * 2
    (tmp_path / "a.bmp").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.bmp has too many pixels \(3600000000 pixels\): make it smaller first"):
        images.load_image(tmp_path / "a.bmp")


def _originals(folder) -> list[bytes]:
    """A small file of each kind, with what makes decoders busy."""
    noise = Image.effect_noise((24, 18), 90).convert("RGB")
    noise.putpixel((3, 3), (255, 0, 90))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "png": {"exif": exif}, "jpg": {"exif": exif}, "gif": {"save_all": True, "append_images": [noise.rotate(90)]},
        "webp": {"exif": exif}, "tiff": {"compression": "tiff_lzw"}, "bmp": {}, "ppm": {},
    }  # fmt: skip
    for kind, options in kinds.items():
        noise.save(folder / f"original.{kind}", **options)
    noise.convert("P").save(folder / "original.p.png", transparency=3)
    noise.save(folder / "original.progressive.jpg", progressive=True)
    Image.fromarray(np.asarray(noise.convert("L")).astype(np.uint16) * 257).save(folder / "original.16.png")
    return [path.read_bytes() for path in sorted(folder.glob("original.*"))]


def _mutated(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """Bits flipped, numbers replaced, the end cut off, or parts of another file put in; more often in the head."""
    result = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(chance.choice((min(64, len(result)), len(result))) or 1)
        kind = chance.randrange(5)
        if kind == 0:
            result[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            result[place : place + 4] = chance.choice(
                (b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", chance.randbytes(4))
            )
        elif kind == 2:
            del result[place + 1 :]
        elif kind == 3:
            other = chance.choice(others)
            start = chance.randrange(len(other))
            result[place:place] = other[start : start + 40]
        else:
            del result[place : place + chance.randrange(1, 9)]
        if not result:
            return b"\0"
    return bytes(result)


@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("error")
def test_mutated_files_are_read_or_refused(tmp_path, count):
    originals, chance = _originals(tmp_path), random.Random(0)
    path, read = tmp_path / "mutated", 0
    for _ in range(count):
        path.write_bytes(_mutated(chance.choice(originals), chance, originals))
        try:
            image, gray = images.load_image(path), images.load_gray(path)
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        else:
            read += 1
            assert image.mode == "RGB" and gray.shape[2:] == (image.height, image.width)
            assert 0 <= gray.min() <= gray.max() <= 1
    assert count / 20 < read < count
