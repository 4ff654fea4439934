"""Large images in overlapping tiles, and images that repeat without a seam."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ldm.attach import Override, override_chain

if TYPE_CHECKING:
    from ldm.models.autoencoder import FirstStage
    from ldm.models.diffusion.ddpm import LatentDiffusion


def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, tile: int, *, multiple: int = 1, progress: str | None = None
) -> Tensor:
    """Apply `function` to x (B, C, H, W) in overlapping tiles: (B, C', s H, s W), where it scales sizes by s.

    Neighbors overlap by at least a quarter of a tile and are blended linearly in the middle half of that. Where
    `function` looks no farther than a quarter of the overlap, the result is the same as without tiles. Only the
    work of one tile is in memory at a time.

    Args:
        function: (B, C, h, w) -> (B, C', s h, s w).
        x: The input.
        tile: Longest side of a tile; shorter sides of x are not cut, and with 0 none is.
        multiple: Tiles begin and end at multiples of this, and H and W are multiples.
        progress: Title of a progress bar; None for none.
    """
    rows, columns = (tile_spans(length, tile or length, multiple) for length in x.shape[2:])
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
                    down, across = _blend_weights(rows, scale), _blend_weights(columns, scale)
                (to_row, vertical), (to_column, horizontal) = down[i], across[j]
                result[:, :, to_row, to_column] += part * (vertical[:, None] * horizontal).to(part)
                bar.update()
    assert result is not None  # every length has a span
    return result


def tile_spans(length: int, tile: int, multiple: int = 1) -> list[slice]:
    """Spread tiles evenly over a side: each as long as `tile` allows, the last one ending at the end.

    Raises:
        ValueError: for tiles too small to overlap by a quarter, or a `length` that is not a multiple.
    """
    if length <= tile:
        return [slice(0, length)]
    if tile < 2 * multiple or tile < 4:
        raise ValueError(f"tiles of {tile} are too small: they need at least {max(2 * multiple, 4)} a side")
    if length % multiple:
        raise ValueError(f"a side of {length} cannot be cut at multiples of {multiple}: pad it first")
    overlap = -(-tile // 4 // multiple) * multiple
    tile -= tile % multiple
    free, stride = (length - tile) // multiple, (tile - overlap) // multiple
    last = -(-free // stride)
    starts = [number * free // last * multiple for number in range(last + 1)]
    return [slice(start, start + tile) for start in starts]


def _blend_weights(spans: Sequence[slice], scale: Fraction) -> list[tuple[slice, Tensor]]:
    """For each tile of a side, at the output's scale: its place, and its weights, which sum to 1 everywhere."""
    spans = [slice(int(span.start * scale), int(span.stop * scale)) for span in spans]
    weights = [np.ones(span.stop - span.start) for span in spans]
    for number, (span, after) in enumerate(zip(spans, spans[1:])):
        overlap = span.stop - after.start
        depth = np.arange(overlap) + 0.5  # of pixel centers behind the edge
        ramp = np.clip(2 * depth / overlap - 0.5, 0.0, 1.0)
        weights[number][-overlap:] *= ramp[::-1]
        weights[number + 1][:overlap] *= ramp
    total = np.zeros(spans[-1].stop)  # not 1 where three tiles meet
    for span, weight in zip(spans, weights):
        total[span] += weight
    return [(span, torch.from_numpy(weight / total[span]).float()) for span, weight in zip(spans, weights)]


def padded(x: Tensor, multiple: int) -> Tensor:
    """Pad x (B, C, H, W) to multiples of `multiple` by mirroring the lower and right edge."""
    bottom, right = (-length % multiple for length in x.shape[2:])
    # numpy's reflection, unlike torch's, may be wider than the image
    return torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (0, bottom), (0, right)), mode="reflect"))


# ---- first stages in tiles ----


class TiledForward(Override):
    """Run a network's forward in overlapping tiles."""

    state = ("tile", "multiple")

    def __init__(self, module: nn.Module, tile: int, multiple: int) -> None:
        super().__init__(module)
        self.tile, self.multiple = tile, multiple

    def __call__(self, x: Tensor) -> Tensor:
        return tiled(self.original, x, self.tile, multiple=self.multiple)


def tile_first_stage(first_stage: FirstStage | nn.Module, tile: int) -> None:
    """Make `first_stage` encode and decode in overlapping tiles of at most `tile` pixels a side; 0: in one piece.

    Memory is then that of a tile, whatever the image's size. Norms and attention see one tile at a time, so images
    change: the more, the smaller the tiles. Identity first stages stay as they are.

    Raises:
        ValueError: for tiles of less than four latents a side.
    """
    encoder, decoder = (getattr(first_stage, name, None) for name in ("encoder", "decoder"))
    if encoder is None or decoder is None:  # pixels are the latents
        return
    factor = cast("FirstStage", first_stage).downsampling_factor
    if tile and tile < 4 * factor:
        raise ValueError(f"tiles of {tile} pixels are too small: this first stage needs at least {4 * factor}")
    for network, side, multiple in ((encoder, tile, factor), (decoder, tile // factor, 1)):
        for override in override_chain(network) or ():
            if isinstance(override, TiledForward):
                override.remove()
        if tile:
            TiledForward(network, side, multiple).attach()


# ---- seamless images ----

AXES = {"x": "x", "y": "y", "both": "xy"}


@contextlib.contextmanager
def seamless(model: LatentDiffusion, axes: str | None) -> Iterator[None]:
    """Pad the convolutions of network and first stage circularly, so that images repeat without a seam.

    Args:
        model: The model; it is restored at the end.
        axes: "x", "y" or "both"; None does nothing.
    """
    if axes is not None and axes not in AXES:
        raise ValueError(f"tiling {axes!r} is not one of {', '.join(AXES)}")
    with contextlib.ExitStack() as restore:
        for part in (model.model, model.first_stage_model) if axes is not None else ():
            for module in part.modules():
                if axes is not None and isinstance(module, (nn.Conv2d, nn.ZeroPad2d)):
                    _pad_circularly(module, AXES[axes], restore)
        yield


def _pad_circularly(module: nn.Conv2d | nn.ZeroPad2d, axes: str, restore: contextlib.ExitStack) -> None:
    before: Any = module.padding
    if isinstance(module, nn.Conv2d):
        down, across = before
        sides = (across, across, down, down)
        after: Any = (0 if "y" in axes else down, 0 if "x" in axes else across)
    else:
        sides = before  # left, right, top, bottom
        after = tuple(0 if axis in axes else side for axis, side in zip("xxyy", sides))
    circular = tuple(side if axis in axes else 0 for axis, side in zip("xxyy", sides))

    def pad(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (F.pad(inputs[0], circular, mode="circular"),)

    if any(circular):
        restore.callback(setattr, module, "padding", before)
        restore.callback(module.register_forward_pre_hook(pad).remove)
        module.padding = after
