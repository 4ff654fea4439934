"""Images to files: PNG with metadata, and animations, written atomically under unused names."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.files import atomic_write, write_exclusive


def next_free_index(folder: str | Path, pattern: str) -> int:
    """Return one more than the highest number among the files of `folder` that match `pattern`, e.g. "{:05}.png"."""
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
    """Write `image` to `folder` under the next free name of `pattern`.

    An existing file is never replaced, even with several processes writing at once, and no name ever belongs to an
    incomplete file, not even after a power cut.

    Args:
        image: The image.
        folder: An existing folder.
        pattern: File name with a number, such as "{:05}.png".
        metadata: PNG text chunks.
        index: Number to use, or the first to try if it is taken; by default one more than the highest.
        before: Called with the complete file just before it gets its name.

    Returns:
        The path.

    Raises:
        OSError: If the folder is not writable.
    """
    folder = Path(folder)
    return write_exclusive(folder, _numbered(folder, pattern, index), _png(image, metadata), before)


def save_png_named(
    image: Image.Image, folder: str | Path, name: str, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write `image` to folder/NAME.png, or if it exists NAME-1.png, NAME-2.png ..., like `save_png`."""
    folder = Path(folder)
    names = (folder / f"{name}{tail}.png" for tail in itertools.chain([""], (f"-{n}" for n in itertools.count(1))))
    return write_exclusive(folder, names, _png(image, metadata))


def replace_png(image: Image.Image, path: str | Path) -> None:
    """Write `image` to `path` atomically, replacing what is there."""
    with atomic_write(path) as partial, partial.open("wb") as file:
        _png(image)(file)


def save_animation(images: Sequence[Image.Image], folder: str | Path, pattern: str, fps: float) -> Path:
    """Write images of one size as an endless animation with `fps` images per second; returns its path.

    The suffix of `pattern`, such as "{:04}.gif", is .gif (256 colours per image, times in hundredths of a second) or
    .webp. The number is the next free one, as in `save_png`. ValueError for no images or another suffix.
    """
    kind = Path(pattern).suffix.lower()
    kinds: dict[str, dict[str, Any]] = {
        ".gif": {"format": "GIF", "disposal": 1},
        ".webp": {"format": "WEBP", "quality": 90},
    }
    if not images or kind not in kinds:
        raise ValueError(f"an animation is a .gif or .webp of at least one image, not {kind} of {len(images)}")
    first, *others = images
    # round the times of changes, not the durations, so that errors do not accumulate
    unit = 10 if kind == ".gif" else 1  # milliseconds
    changes = [round(1000 * number / fps / unit) * unit for number in range(len(images) + 1)]
    durations = [after - before for before, after in zip(changes, changes[1:])]

    def write(file: BinaryIO) -> None:
        first.save(file, save_all=True, append_images=others, duration=durations, loop=0, **kinds[kind])

    folder = Path(folder)
    return write_exclusive(folder, _numbered(folder, pattern, None), write)


def _numbered(folder: Path, pattern: str, index: int | None) -> Iterator[Path]:
    first = next_free_index(folder, pattern) if index is None else index  # evaluated when the first name is needed
    yield from (folder / pattern.format(number) for number in itertools.count(first))


def _png(image: Image.Image, metadata: Mapping[str, str] | None = None) -> Callable[[BinaryIO], None]:
    text = PngInfo()
    for key, value in (metadata or {}).items():
        text.add_text(key, value.encode("utf-8", "backslashreplace").decode())  # file names may not be UTF-8
    return lambda file: image.save(file, format="PNG", pnginfo=text)


# ---- metadata ----

# our names of settings and those of the A1111 web UI, in the order of the text
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
    """Format settings as the A1111 web UI does: the prompt, the negative prompt, a line of "Name: value"."""
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
    """Return an image's text chunks: A1111's `parameters`, and all settings as JSON under `ldm`."""
    return {"parameters": parameters_text(settings), "ldm": json.dumps(dict(settings), ensure_ascii=False)}
