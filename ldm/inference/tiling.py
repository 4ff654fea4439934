"""Large pictures in pieces: a function of maps, applied to overlapping tiles whose results fade into each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from types import MethodType
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:
    from ldm.models.first_stage import FirstStage


def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, tile: int, *, multiple: int = 1, progress: str | None = None
) -> Tensor:
    """`function` of x (B, C, H, W), tile by tile: (B, C', s H, s W), where s is what `function` scales sizes by.

    function: (B, C, h, w) -> (B, C', s h, s w); only the work of one tile is in memory at a time. tile: the longest
    side of a tile; sides of x that are no longer are not cut, and with 0 none is. multiple: tiles begin and end at
    multiples of this, and H and W are some. progress: the title of a progress bar; None for none.

    Neighbours share at least a quarter of a tile and fade linearly into each other in the middle half of that. Where
    `function` looks no farther than a quarter of what is shared, the result is therefore the same as without tiles.
    """
    rows, columns = (spans(length, tile or length, multiple) for length in x.shape[2:])
    if len(rows) == len(columns) == 1:
        return function(x)
    result: Tensor | None = None
    with tqdm(total=len(rows) * len(columns), desc=progress, disable=progress is None) as bar:
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                part = function(x[:, :, row, column])
                if result is None:
                    scale = Fraction(part.shape[2], row.stop - row.start)
                    height, width = (int(length * scale) for length in x.shape[2:])
                    result = part.new_zeros((*part.shape[:2], height, width))
                    down, across = _faders(rows, scale), _faders(columns, scale)
                (to_row, high), (to_column, wide) = down[i], across[j]
                result[:, :, to_row, to_column] += part * (high[:, None] * wide).to(part)
                bar.update()
    assert result is not None  # every length has a span
    return result


def tile_first_stage(first_stage: FirstStage | nn.Module, tile: int) -> None:
    """From now on `first_stage` encodes and decodes pictures in overlapping tiles of at most `tile` pixels a side.

    0: in one piece again. Memory is that of a tile, whatever the size of a picture. Norms and attention see one tile at
    a time, so pictures change: the more, the smaller the tiles are and the less they have in common. Without a first
    stage there is nothing to do. Raises ValueError for tiles of less than four latents a side.
    """
    encoder, decoder = (getattr(first_stage, name, None) for name in ("encoder", "decoder"))
    if encoder is None or decoder is None:  # pixels are the latents
        return
    factor = cast("FirstStage", first_stage).downsampling_factor
    if tile and tile < 4 * factor:
        raise ValueError(f"tiles of {tile} pixels are too small: this first stage needs at least {4 * factor}")
    for network, side, multiple in ((encoder, tile, factor), (decoder, tile // factor, 1)):
        network.__dict__.pop("forward", None)
        if tile:
            network.forward = _InTiles(network, side, multiple)


class _InTiles:
    """`forward` of a network in tiles, on top of the one of its class."""

    def __init__(self, network: nn.Module, tile: int, multiple: int) -> None:
        self._whole = MethodType(type(network).forward, network)
        self._tile, self._multiple = tile, multiple

    def __call__(self, x: Tensor) -> Tensor:
        return tiled(self._whole, x, self._tile, multiple=self._multiple)


def padded(x: Tensor, multiple: int) -> Tensor:
    """x (B, C, H, W) with H and W brought up to multiples by mirroring what lies at the lower and right edge."""
    below, beside = (-length % multiple for length in x.shape[2:])
    # numpy's, unlike torch's, mirrors small pictures as often as it takes
    return torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (0, below), (0, beside)), mode="reflect"))


def spans(length: int, tile: int, multiple: int = 1) -> list[slice]:
    """Where tiles lie on a side of `length`: evenly, each as long as `tile` allows, the last one ending at the end.

    Neighbours share at least a quarter of a tile. ValueError for tiles too small for that, or a `length` that is no
    multiple.
    """
    if length <= tile:
        return [slice(0, length)]
    if tile < 2 * multiple or tile < 4:
        raise ValueError(f"tiles of {tile} are too small: they need at least {max(2 * multiple, 4)} a side")
    if length % multiple:
        raise ValueError(f"a side of {length} cannot be cut at multiples of {multiple}: pad it first")
    shared = -(-tile // 4 // multiple) * multiple
    tile -= tile % multiple
    free, stride = (length - tile) // multiple, (tile - shared) // multiple
    last = -(-free // stride)
    starts = [number * free // last * multiple for number in range(last + 1)]
    return [slice(start, start + tile) for start in starts]


def _faders(places: Sequence[slice], scale: Fraction) -> list[tuple[slice, Tensor]]:
    """For each tile of a side, at the output's scale: where it goes, and its weights, which sum to 1 everywhere."""
    places = [slice(int(place.start * scale), int(place.stop * scale)) for place in places]
    weights = [np.ones(place.stop - place.start) for place in places]
    for number, (place, after) in enumerate(zip(places, places[1:])):
        shared = place.stop - after.start
        depth = np.arange(shared) + 0.5  # of pixels' middles behind an edge
        ramp = np.clip(2 * depth / shared - 0.5, 0.0, 1.0)
        weights[number][-shared:] *= ramp[::-1]
        weights[number + 1][:shared] *= ramp
    total = np.zeros(places[-1].stop)  # not 1 where three tiles meet
    for place, weight in zip(places, weights):
        total[place] += weight
    return [(place, torch.from_numpy(weight / total[place]).float()) for place, weight in zip(places, weights)]
