"""Pictures and their masks as files: X.png with X_mask.png, as the public inpainting script pairs them."""

from __future__ import annotations

import logging
from pathlib import Path

from PIL import Image
from torch import Tensor

from ldm.data.folder import SUFFIXES
from ldm.images import check_mask, load_gray, load_image

logger = logging.getLogger(__name__)


def find_pairs(folder: str | Path) -> list[tuple[Path, Path]]:
    """(picture, mask) of every picture in a folder, by name; those without a mask are named in a warning and left out.

    The two files may be of different types. Raises FileNotFoundError if there is no folder, or no picture for a mask,
    ValueError if there is no mask at all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    masks = {path.stem.removesuffix("_mask"): path for path in files if path.stem.endswith("_mask")}
    pictures = [path for path in files if not path.stem.endswith("_mask")]
    lonely = sorted(masks.keys() - {path.stem for path in pictures})
    if lonely:
        names = ", ".join(masks[stem].name for stem in lonely)
        raise FileNotFoundError(f"{folder} has no picture for {names}: X_mask.png is the mask of X.png")
    bare = ", ".join(path.name for path in pictures if path.stem not in masks)
    if not masks:
        raise ValueError(f"{folder} has no masks: the mask of X.png is X_mask.png beside it, white where to fill")
    if bare:
        logger.warning("%s has no mask for %s, so these stay as they are: X_mask.png is that of X.png", folder, bare)
    return [(path, masks[path.stem]) for path in pictures if path.stem in masks]


def load_pair(picture: str | Path, mask: str | Path) -> tuple[Image.Image, Tensor]:
    """A picture and its mask (1, 1, H, W) from 0 to 1; ValueError, naming both, if they do not go together.

    Further errors are those of `load_image`.
    """
    image, levels = load_image(picture), load_gray(mask)
    check_mask(levels, image, f"the mask {mask}", str(picture))
    return image, levels
