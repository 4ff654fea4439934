"""Segmentation maps: the class of every pixel, from a file and as the planes that a network takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.images import opened


def read_segmentation(path: str | Path) -> Tensor:
    """Class ids (H, W) int64 from a .npy file of whole numbers, or from a picture whose levels are the ids.

    Of a picture with a palette the indices count, not the colours. Raises FileNotFoundError or ValueError for a file
    that holds no such map.
    """
    path = Path(path)
    ids = _from_array(path) if path.suffix == ".npy" else _from_picture(path)
    return torch.from_numpy(ids.astype(np.int64))


def _from_array(path: Path) -> np.ndarray:
    try:
        ids = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no array of class ids: {error}") from None
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{path} must hold whole numbers (H, W), one class id a pixel, not {ids.dtype} {ids.shape}")
    return ids


def _from_picture(path: Path) -> np.ndarray:
    with opened(path) as image:
        ids = np.asarray(image)
    if ids.dtype == bool:  # of 1 bit a pixel
        ids = ids.astype(np.uint8)
    if ids.ndim == 3 and (ids == ids[..., :1]).all():  # grey, saved as colours
        ids = ids[..., 0]
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{path} is a picture in colours: a segmentation map has class ids as grey levels or indices")
    return ids


def one_hot_map(ids: Tensor, classes: int, multiple: int = 1) -> Tensor:
    """Class ids (H, W) as planes (1, classes, h, w) float32 of 0 and 1, h and w floored to a multiple of `multiple`.

    Raises ValueError, naming them, for ids that are not 0 to classes - 1, and for maps smaller than one multiple.
    """
    if wrong := [i for i in ids.unique().tolist() if not 0 <= i < classes]:
        raise ValueError(f"the segmentation map has the class ids {wrong[:5]}, but this model's are 0 to {classes - 1}")
    height, width = (side - side % multiple for side in ids.shape)
    if min(height, width) == 0:
        raise ValueError(f"a map of {ids.shape[1]}x{ids.shape[0]} pixels is too small: each side needs {multiple}")
    if (height, width) != tuple(ids.shape):
        ids = F.interpolate(ids[None, None].double(), (height, width), mode="nearest-exact")[0, 0].long()
    return F.one_hot(ids, classes).movedim(-1, 0)[None].float()
