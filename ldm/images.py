"""Pictures at the edges of the system: files to tensors, tensors to pictures, grids, PNG files and their metadata."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import math
import os
import re
import struct
import textwrap
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.files import whole_file, write_new

logger = logging.getLogger(__name__)

# What pictures come in. Pillow knows more: rare decoders are little tested, and some, such as EPS, run programs.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def load_image(path: str | Path, shrink_to: int | None = None) -> Image.Image:
    """The picture in a file as RGB, turned the way its EXIF orientation says, transparent parts on white.

    Of several, as in an animation, the first. 16 bits a level become 8; floats go from black, the least, to white.

    shrink_to: let JPEG files come out smaller, which decodes them faster, but with no side below this many pixels.

    Raises FileNotFoundError if there is no such file, ValueError if it is a folder, not a picture in one of `FORMATS`,
    damaged, or larger than Pillow's limit against decompression bombs.
    """
    return _to_rgb(_loaded(path, shrink_to))


def load_gray(path: str | Path) -> Tensor:
    """A mask or a depth map: the brightness in a picture file as float32 (1, 1, H, W) from 0 to 1.

    Files of 16 bits keep their precision. Turned and composed as by `load_image`, with the same errors.
    """
    image = _loaded(path)
    levels = _deep_levels(image) if _is_deep(image) else np.asarray(_to_rgb(image).convert("L"), np.float32) / 255
    return torch.from_numpy(levels.copy())[None, None]


def _loaded(path: str | Path, shrink_to: int | None = None) -> Image.Image:
    """A picture as it is in its file, but turned."""
    with opened(path) as image:
        if shrink_to is not None:
            image.draft(None, (shrink_to, shrink_to))
        image.load()
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise ValueError(f"{path} holds NaN or infinity: put numbers in their place")
    return image


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """The picture file, open; what goes wrong in the block is said as `load_image` says it."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a picture")
    if not path.exists():
        raise FileNotFoundError(f"there is no picture {path}")
    try:
        with warnings.catch_warnings():
            # Pillow warns at half the size that it refuses at; photos of that size are common.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # what is broken ends in an error
            with Image.open(path, formats=_formats()) as image:
                if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a photo and its previews
                    _say_first(str(path))
                yield image
    except UnidentifiedImageError:
        raise ValueError(
            f"{path} is not a picture that Pillow can read, in a format of {', '.join(FORMATS)}: convert it to PNG"
        ) from None
    except Image.DecompressionBombError as error:
        size = re.search(r"\d+ pixels", str(error))
        raise ValueError(f"{path} has too many pixels ({size[0] if size else error}): make it smaller first") from None
    except PermissionError:
        raise
    except _DAMAGED as error:
        raise ValueError(f"{path} is cut short or damaged: {error}") from error


# What Pillow's decoders raise on broken data.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, OverflowError, TypeError, struct.error, zlib.error)


@functools.cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@functools.lru_cache(maxsize=10_000)  # once a file, even if a training reads it in every epoch
def _say_first(path: str) -> None:
    logger.info("%s holds several pictures: the first is used", path)


def _is_deep(image: Image.Image) -> bool:
    """Whether levels have more than 8 bits, which Pillow would cut off at 255 instead of scaling them."""
    return image.mode.startswith("I") or image.mode == "F"


def _deep_levels(image: Image.Image) -> np.ndarray:
    """(H, W), float32 from 0 to 1."""
    levels = np.asarray(image, dtype=np.float32)
    if image.mode == "F":
        return (levels - levels.min()) / max(np.ptp(levels), 1e-12)  # floats have no range of their own
    return np.clip(levels / 65535, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        image = Image.fromarray(np.rint(_deep_levels(image) * 255).astype(np.uint8))
    elif _is_deep(image):
        image = Image.fromarray(np.clip(np.asarray(image) // 257, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def fit_to_multiple(
    image: Image.Image, multiple: int, height: int | None = None, width: int | None = None
) -> Image.Image:
    """`image` resized (Lanczos) to `height` x `width` pixels, both floored to a multiple of `multiple`.

    With one side given the other follows the picture's shape; with neither the picture keeps its size but for the
    flooring. Raises ValueError if a side comes out below one multiple.
    """
    if height is None and width is None:
        height, width = image.height, image.width
    elif height is None and width is not None:
        height = round(width * image.height / image.width)
    elif width is None and height is not None:
        width = round(height * image.width / image.height)
    assert height is not None and width is not None
    if min(height, width) < multiple:
        raise ValueError(
            f"a picture of {width}x{height} pixels is too small: each side needs at least {multiple}; "
            f"give a larger picture or a larger size"
        )
    return image.resize((width - width % multiple, height - height % multiple), resample=Image.Resampling.LANCZOS)


def check_mask(mask: Tensor, image: Image.Image, mask_name: str = "the mask", image_name: str = "the picture") -> None:
    """ValueError, naming both, unless a mask (1, 1, H, W) is as large as its picture, but for a scale."""
    height, width = mask.shape[2:]
    if abs(height / image.height - width / image.width) > 0.5 / image.height + 0.5 / image.width:
        raise ValueError(
            f"{mask_name} is {width}x{height} pixels, but {image_name} is {image.width}x{image.height}: "
            "make it as large as the picture"
        )


def fit_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """A mask (1, 1, H, W) with values from 0 to 1, resized and made one of 0 and 1, which is from a half on."""
    if mask.shape[2:] != (height, width):
        mask = F.interpolate(mask, (height, width), mode="bilinear", antialias=True)
    return (mask >= 0.5).float()


def feathered(mask: Tensor, pixels: int) -> Tensor:
    """A mask (1, 1, H, W) of 0 and 1 with a soft edge outside of what it covers, `pixels` wide.

    At the distance d from the nearest 1 it is max(0, 1 - d / (pixels + 1)).
    """
    squared = torch.where(mask > 0, 0.0, math.inf)  # distances: exact, as the square of each axis adds up
    for axis, sides in ((3, (pixels, pixels)), (2, (0, 0, pixels, pixels))):
        padded = F.pad(squared, sides, value=math.inf)
        shifts = range(-pixels, pixels + 1)
        moved = (padded.narrow(axis, pixels + k, mask.shape[axis]) + k * k for k in shifts)
        squared = functools.reduce(torch.minimum, moved)
    return (1 - squared.sqrt() / (pixels + 1)).clamp(min=0)


def blend(under: Image.Image, over: Image.Image, weight: Tensor) -> Image.Image:
    """`over` on `under`, RGB of one size, with a weight (1, 1, H, W): where it is 0 or 1, bit for bit one of them."""
    below, above = (np.asarray(image, dtype=np.float32) for image in (under, over))
    return Image.fromarray(np.rint(below + weight[0, 0, :, :, None].numpy() * (above - below)).astype(np.uint8))


def image_to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as float32 (1, 3, H, W) from -1 to 1."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
    return 2.0 * torch.from_numpy(rearrange(pixels, "h w c -> 1 c h w").copy()) - 1.0


def tensor_to_images(x: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) with values from -1 to 1, cut off beyond, as B pictures.

    Levels are truncated, not rounded, as in the public scripts. Raises ValueError for any other shape.
    """
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"pictures have the shape (B, 3, H, W), not {tuple(x.shape)}")
    pixels = torch.clamp((x.detach().float() + 1.0) / 2.0, min=0.0, max=1.0).cpu().numpy()
    return [Image.fromarray((255.0 * rearrange(p, "c h w -> h w c")).astype(np.uint8)) for p in pixels]


def text_to_tensor(texts: Sequence[str], height: int, width: int) -> Tensor:
    """Texts in lines that fit, black on white, as pictures (B, 3, height, width) from -1 to 1; the end may be cut."""
    size = max(8, width // 24)
    font = ImageFont.load_default(size)
    columns = max(1, int(width / font.getlength("abcdefgh ") * 9))
    drawn = []
    for text in texts:
        image = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(image).text((1, 0), textwrap.fill(text, columns), fill="black", font=font)
        drawn.append(image_to_tensor(image))
    return torch.cat(drawn)


def make_grid(images: Sequence[Image.Image], nrow: int = 8, padding: int = 2) -> Image.Image:
    """RGB pictures of one size in rows of `nrow`, on black, `padding` pixels around each.

    Laid out as torchvision.utils.make_grid does it: a row is never longer than there are pictures, and a single
    picture is returned without padding. Raises ValueError for no pictures, unequal sizes or nrow < 1.
    """
    if not images or nrow < 1:
        raise ValueError(f"a grid needs pictures and at least one a row, got {len(images)} pictures and nrow={nrow}")
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise ValueError(f"the pictures of a grid need one size, got {sizes}")
    if len(images) == 1:
        return images[0].copy()
    width, height = (side + padding for side in sizes[0])
    columns = min(nrow, len(images))
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (width * columns + padding, height * rows + padding))
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        grid.paste(image, (column * width + padding, row * height + padding))
    return grid


def next_free_index(folder: str | Path, pattern: str) -> int:
    """One more than the highest number among the files of `folder` that `pattern`, such as "{:05}.png", names."""
    before, after = re.split(r"\{.*?\}", pattern)
    number = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    matches = (number.fullmatch(name) for name in os.listdir(folder))
    return max((int(match[1]) for match in matches if match), default=-1) + 1


def save_png(
    image: Image.Image,
    folder: str | Path,
    pattern: str,
    metadata: Mapping[str, str] | None = None,
    index: int | None = None,
    before: Callable[[Path], None] | None = None,
) -> Path:
    """Write `image` to `folder` under the next free name of `pattern`, such as "{:05}.png"; returns its path.

    `metadata` goes into PNG text chunks. `index` is the number to use, or the first to try if that is taken; None goes
    on after the highest there. A file that exists is never replaced, even when several processes write to
    the folder at once, and no name ever belongs to a half-written file, not even after a power cut. Raises OSError if
    the folder is not writable. before: called with the whole file, just before that gets its name.
    """
    folder = Path(folder)
    return write_new(folder, _numbered(folder, pattern, index), _png(image, metadata), before)


def save_png_named(
    image: Image.Image, folder: str | Path, name: str, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write `image` to folder/NAME.png, or where that is taken NAME-1.png, NAME-2.png ...; otherwise as `save_png`."""
    folder = Path(folder)
    names = (folder / f"{name}{tail}.png" for tail in itertools.chain([""], (f"-{n}" for n in itertools.count(1))))
    return write_new(folder, names, _png(image, metadata))


def replace_png(image: Image.Image, path: str | Path) -> None:
    """Write `image` to `path` in place of what is there, whole at any time: for previews and reports."""
    with whole_file(path) as partial, partial.open("wb") as file:
        _png(image)(file)


def save_animation(images: Sequence[Image.Image], folder: str | Path, pattern: str, fps: float) -> Path:
    """Write pictures of one size as one that moves, `fps` of them a second, for ever; returns its path.

    `pattern`, such as "{:04}.gif", says which kind: GIF (256 colours a picture, times in hundredths of a second) or
    WebP. Its number is the next free one, as in `save_png`. ValueError for no pictures, or another kind.
    """
    kind = Path(pattern).suffix.lower()
    kinds: dict[str, dict[str, Any]] = {
        ".gif": {"format": "GIF", "disposal": 1},
        ".webp": {"format": "WEBP", "quality": 90},
    }
    if not images or kind not in kinds:
        raise ValueError(f"an animation is a .gif or .webp of at least one picture, not {kind} of {len(images)}")
    first, *others = images
    # the times when pictures change are rounded, not how long one lasts: no error adds up
    unit = 10 if kind == ".gif" else 1  # in milliseconds
    changes = [round(1000 * number / fps / unit) * unit for number in range(len(images) + 1)]
    durations = [after - before for before, after in zip(changes, changes[1:])]

    def write(file: BinaryIO) -> None:
        first.save(file, save_all=True, append_images=others, duration=durations, loop=0, **kinds[kind])

    folder = Path(folder)
    return write_new(folder, _numbered(folder, pattern, None), write)


def _numbered(folder: Path, pattern: str, index: int | None) -> Iterator[Path]:
    first = next_free_index(folder, pattern) if index is None else index  # when the first name is asked for
    yield from (folder / pattern.format(number) for number in itertools.count(first))


def _png(image: Image.Image, metadata: Mapping[str, str] | None = None) -> Callable[[BinaryIO], None]:
    text = PngInfo()
    for key, value in (metadata or {}).items():
        text.add_text(key, value.encode("utf-8", "backslashreplace").decode())  # of names that are no UTF-8
    return lambda file: image.save(file, format="PNG", pnginfo=text)


# Our names of settings, and what the A1111 web UI calls them. The order is the order of the text.
_PARAMETER_NAMES = {
    "steps": "Steps",
    "sampler": "Sampler",
    "schedule": "Schedule type",
    "scale": "CFG scale",
    "cfg_pp": "CFG++",
    "guidance": "Guidance",
    "guidance_interval": "Guidance interval",
    "eta": "Eta",
    "seed": "Seed",
    "size": "Size",
    "model": "Model",
    "strength": "Denoising strength",
    "seed_mode": "Seed mode",
    "variation_seed": "Variation seed",
    "variation_strength": "Variation seed strength",
    "noise_device": "RNG",
    "tiling": "Tiling",
    "clip_skip": "Clip skip",
    "batch_size": "Batch size",
    "index": "Image index",
    "version": "Version",
}
_SAMPLER_NAMES = {
    **{"ddim": "DDIM", "plms": "PLMS", "ddpm": "DDPM", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun"},
    **{"dpm2": "DPM2", "lms": "LMS", "unipc": "UniPC", "dpm_solver": "DPM++ 2M", "dpmpp_2m": "DPM++ 2M"},
    **{"dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_2s": "DPM++ 2S", "dpmpp_3m": "DPM++ 3M"},
}


def parameters_text(settings: Mapping[str, Any]) -> str:
    """How a picture was made, in the text form of the A1111 web UI, which other tools read too.

    Lines for `prompt` and, if it is not empty, `negative_prompt`, then one line of "Name: value" for the rest.
    """
    lines = [settings.get("prompt", "")]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    values = {name: settings[key] for key, name in _PARAMETER_NAMES.items() if settings.get(key) is not None}
    if "Sampler" in values:
        values["Sampler"] = _SAMPLER_NAMES.get(values["Sampler"], values["Sampler"])
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in values.items()))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text


def png_metadata(settings: Mapping[str, Any]) -> dict[str, str]:
    """The text chunks for a picture made with `settings`: A1111's `parameters`, and all of it as JSON under `ldm`."""
    return {"parameters": parameters_text(settings), "ldm": json.dumps(dict(settings), ensure_ascii=False)}
