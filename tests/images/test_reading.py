"""ldm/images/reading.py against files that Pillow writes."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Iterator
from importlib.metadata import version

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from ldm import images
from tests.images import COLOURS, pixels


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


@contextlib.contextmanager
def skipped_if_pillow_cannot() -> Iterator[None]:
    """Old releases cannot write 16 bits as PGM, nor read what they write as YCbCr."""
    try:
        yield
    except OSError as error:
        if int(version("pillow").split(".")[0]) < 12:
            pytest.skip(f"this Pillow says: {error}")
        raise


@pytest.mark.parametrize("mode", ["L", "CMYK", "1", "YCbCr"])
def test_load_gives_rgb(tmp_path, mode):
    Image.new("RGB", (3, 2), "white").convert(mode).save(tmp_path / "x.tif")
    with Image.open(tmp_path / "x.tif") as image, skipped_if_pillow_cannot():
        image.load()
    assert pixels(images.load_image(tmp_path / "x.tif")).min() >= 254


def test_load_errors(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no image .*nothing.png"):
        images.load_image(tmp_path / "nothing.png")
    with pytest.raises(ValueError, match="is a folder"):
        images.load_image(tmp_path)
    (tmp_path / "text.png").write_text("<html>")
    with pytest.raises(ValueError, match="text.png is not an image"):
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
    with pytest.raises(FileNotFoundError, match="there is no image"):
        images.load_gray(tmp_path / "none.png")


def test_load_gray_refuses_non_finite_values(tmp_path):
    Image.fromarray(np.array([[0.5, np.nan]], np.float32)).save(tmp_path / "depth.tif")
    with pytest.raises(ValueError, match="depth.tif holds NaN or infinity"):
        images.load_gray(tmp_path / "depth.tif")


# ---- pictures of all kinds ----


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
def test_deep_images_are_scaled_not_clipped(tmp_path, name):
    with skipped_if_pillow_cannot():
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
def test_the_first_frame_is_used_and_logged_once(tmp_path, caplog, kind):
    path = tmp_path / f"moving.{kind}"
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "webp" else {}))
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert images.load_image(path).getpixel((8, 8)) == COLOURS["red"]
    assert caplog.text.count("moving") == 1 and "several images: the first is used" in caplog.text


def test_formats_that_are_not_expected_are_refused(tmp_path):
    image = Image.new("RGB", (8, 8))
    for kind in ("eps", "pdf", "ico", "tga", "pcx", "dds", "sgi", "icns", "jp2"):
        try:
            image.save(tmp_path / f"a.{kind}")
        except (KeyError, OSError, ValueError):
            continue  # this Pillow writes no such files
        (tmp_path / f"a.{kind}").rename(tmp_path / "a.png")
        with pytest.raises(
            ValueError, match="a.png is not an image .* in a format of AVIF, BMP, .*: convert it to PNG"
        ):
            images.load_image(tmp_path / "a.png")


def test_a_header_with_an_excessive_size_is_refused(tmp_path):
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


# ---- colour profiles, text, masks with alpha, shapes ----


def profile(red, green, blue, gamma: float = 2.2) -> bytes:
    """A minimal ICC display profile: primaries in XYZ (D50) and a gamma."""

    def fixed(values) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    white = (0.9642, 1.0, 0.8249)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + b"\0" * 78, b"cprt": b"text\0\0\0\0-\0"}
    tags |= {name: b"XYZ \0\0\0\0" + fixed(xyz) for name, xyz in
             ((b"wtpt", white), (b"rXYZ", red), (b"gXYZ", green), (b"bXYZ", blue))}  # fmt: skip
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        value += b"\0" * (-len(value) % 4)
        table += name + struct.pack(">II", start + len(data), len(value))
        data += value
    head = struct.pack(">I4xI", start + len(data), 0x02100000) + b"mntrRGB XYZ " + b"\0" * 12 + b"acsp" + b"\0" * 28
    return head + fixed(white) + b"\0" * 48 + table + data


ADOBE = profile((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457), 2.19921875)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp"])
def test_colours_are_converted_to_srgb(tmp_path, name):
    options = {"quality": 95} if name.endswith("jpg") else {"lossless": True} if name.endswith("webp") else {}
    Image.new("RGB", (32, 32), (60, 200, 60)).save(tmp_path / name, icc_profile=ADOBE, **options)
    found = pixels(images.load_image(tmp_path / name))[16, 16]
    assert np.abs(found - (0, 201, 37)).max() <= 12  # what viewers show
    Image.new("RGB", (32, 32), (60, 200, 60)).save(tmp_path / name, icc_profile=ADOBE[:200], **options)  # damaged
    assert np.abs(pixels(images.load_image(tmp_path / name))[16, 16] - (60, 200, 60)).max() <= 6


def test_profiles_keep_transparency_and_srgb_exact(tmp_path):
    image = Image.new("RGBA", (4, 1), (60, 200, 60, 255))
    image.putpixel((0, 0), (60, 200, 60, 0))
    image.save(tmp_path / "a.png", icc_profile=ADOBE)
    found = pixels(images.load_image(tmp_path / "a.png"))
    assert found[0, 0].tolist() == [255, 255, 255] and np.abs(found[0, 1] - (0, 201, 37)).max() <= 12
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "s.png", icc_profile=srgb)
    assert np.array_equal(pixels(images.load_image(tmp_path / "s.png")), noise)
    Image.fromarray(noise[..., 0]).save(tmp_path / "gray.png", icc_profile=ADOBE)  # of another colour space
    assert np.array_equal(pixels(images.load_image(tmp_path / "gray.png"))[..., 0], noise[..., 0])


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_long_text_in_a_png_is_no_damage(tmp_path, kind):
    text = PngImagePlugin.PngInfo()
    if kind == "zTXt":
        text.add_text("history", "x" * 3_000_000, zip=True)
    elif kind == "iTXt":
        text.add_itxt("history", "x" * 3_000_000, zip=True)
    noise = Image.effect_noise((20, 10), 90).convert("RGB")
    noise.save(tmp_path / "a.png", pnginfo=text, icc_profile=b"\0" * 3_000_000 if kind == "iCCP" else None)
    assert np.array_equal(pixels(images.load_image(tmp_path / "a.png")), pixels(noise))
    assert images.load_gray(tmp_path / "a.png").shape == (1, 1, 10, 20)
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[:-400])
    with pytest.raises(ValueError, match="cut short or damaged"):
        images.load_image(tmp_path / "a.png")


@pytest.mark.parametrize("colour", ["white", "black", "red"])
def test_strokes_on_a_transparent_canvas_are_the_mask(tmp_path, colour):
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    mask.paste(colour, (16, 16, 48, 48))
    mask.save(tmp_path / "m.png")
    found = images.load_gray(tmp_path / "m.png")[0, 0]
    assert found[16:48, 16:48].eq(1).all() and found.sum() == 32**2


def test_an_erased_part_of_a_photo_is_a_hole(tmp_path):
    photo = Image.effect_noise((16, 16), 90).convert("RGBA")
    photo.putalpha(Image.new("L", (16, 16), 255))
    photo.paste((0, 0, 0, 0), (4, 4, 8, 8))
    photo.save(tmp_path / "p.png")
    assert images.load_gray(tmp_path / "p.png")[0, 0, 4:8, 4:8].eq(1).all()


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([0, 128, 255], np.int32, [0, 128, 255]),
        ([200, 200, 200], np.int32, [200, 200, 200]),
        ([0, 2**30, 2**31 - 1], np.int32, [0, 128, 255]),
        ([0, 2**31, 2**32 - 1], np.uint32, [0, 128, 255]),
        ([100_000, 100_000, 50_000], np.int32, [255, 255, 128]),
        ([-10, 0, 10], np.int32, [0, 128, 255]),
    ],
)
def test_integers_of_32_bits(tmp_path, values, kind, expected):
    signed = np.array([values], kind).view(np.int32)
    tags = {339: 1 if kind == np.uint32 else 2}
    Image.fromarray(signed).save(tmp_path / "a.tif", tiffinfo=tags)
    with Image.open(tmp_path / "a.tif") as image:
        if image.tag_v2.get(339) != tags[339]:  # Pillow writes the sample format of its mode
            _patch_sample_format(tmp_path / "a.tif", tags[339])
    assert pixels(images.load_image(tmp_path / "a.tif"))[0, :, 0].tolist() == pytest.approx(expected, abs=1)


def _patch_sample_format(path, value: int) -> None:
    data = path.read_bytes()
    entry = struct.pack("<HHI", 339, 3, 1)
    at = data.index(entry) + len(entry)
    path.write_bytes(data[:at] + struct.pack("<H", value) + data[at + 2 :])


def test_extreme_shapes_are_refused(tmp_path):
    Image.new("1", (70_000, 1)).save(tmp_path / "line.png")
    with pytest.raises(ValueError, match=r"too many pixels \(70000x1 pixels\)"):
        images.load_image(tmp_path / "line.png")


def test_a_damaged_avif_is_called_damaged(tmp_path, monkeypatch):
    """Pillow's AVIF decoder raises RuntimeError."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def fail(self):
        raise RuntimeError("Failed to decode frame 0: Decoding of color planes failed")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(ValueError, match="a.png is cut short or damaged: Failed to decode"):
        images.load_image(tmp_path / "a.png")
