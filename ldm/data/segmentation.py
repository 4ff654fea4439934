"""Segmentation maps: from files, and as one-hot channels."""

from __future__ import annotations

import tokenize
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.images import opened


def read_segmentation(path: str | Path) -> Tensor:
    """Read class ids (H, W) int64 from an integer .npy file, or from an image whose levels or palette indices they are.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it holds something else.
    """
    path = Path(path)
    ids = _from_array(path) if path.suffix == ".npy" else _from_image(path)
    return torch.from_numpy(ids.astype(np.int64))


def _from_array(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)  # np.load also reads archives and pickles
        ids = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, OverflowError, MemoryError, tokenize.TokenError) as error:
        raise ValueError(f"{path} is not an array of class ids: {error}") from None
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{path} must hold integers (H, W), one class id per pixel, not {ids.dtype} {ids.shape}")
    return ids


def _from_image(path: Path) -> np.ndarray:
    with opened(path) as image:
        ids = np.asarray(image)
    if ids.dtype == bool:  # 1 bit per pixel
        ids = ids.astype(np.uint8)
    if ids.ndim == 3 and (ids == ids[..., :1]).all():  # grey saved as RGB
        ids = ids[..., 0]
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{path} is a colour image: a segmentation map has class ids as grey levels or palette indices"
        )
    return ids


def one_hot_map(ids: Tensor, classes: int, multiple: int = 1) -> Tensor:
    """Encode class ids (H, W) one-hot, (1, classes, h, w) float32, h and w rounded down to multiples of `multiple`.

    Raises:
        ValueError: For ids outside 0 to classes - 1, and for maps smaller than one multiple.
    """
    if wrong := [i for i in ids.unique().tolist() if not 0 <= i < classes]:
        raise ValueError(f"the segmentation map has the class ids {wrong[:5]}, but this model's are 0 to {classes - 1}")
    height, width = (side - side % multiple for side in ids.shape)
    if min(height, width) == 0:
        raise ValueError(f"a map of {ids.shape[1]}x{ids.shape[0]} pixels is too small: each side needs {multiple}")
    if (height, width) != tuple(ids.shape):
        ids = F.interpolate(ids[None, None].double(), (height, width), mode="nearest-exact")[0, 0].long()
    return F.one_hot(ids, classes).movedim(-1, 0)[None].float()
