"""Pictures that repeat without a seam: convolutions that go on at the other side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

AXES = {"x": "x", "y": "y", "both": "xy"}


@contextlib.contextmanager
def seamless(model: LatentDiffusion, axes: str | None) -> Iterator[None]:
    """Within it, the network and the first stage take what they draw for one tile of many.

    axes: "x", "y" or "both" are those along which to repeat; None is neither. Nothing else in them knows of edges, so a
    picture that is rolled stays one that they could have drawn. ValueError for other axes.
    """
    if axes is not None and axes not in AXES:
        raise ValueError(f"tiling {axes!r} is not one of {', '.join(AXES)}")
    with contextlib.ExitStack() as restored:
        for part in (model.model, model.first_stage_model) if axes is not None else ():
            for module in part.modules():
                if axes is not None and isinstance(module, (nn.Conv2d, nn.ZeroPad2d)):
                    _wrap(module, AXES[axes], restored)
        yield


def _wrap(module: nn.Conv2d | nn.ZeroPad2d, axes: str, restored: contextlib.ExitStack) -> None:
    """Have `module` take from the other side what it would pad with zeros along `axes`, until `restored` closes."""
    before: Any = module.padding
    if isinstance(module, nn.Conv2d):
        down, across = before
        sides = (across, across, down, down)
        after: Any = (0 if "y" in axes else down, 0 if "x" in axes else across)
    else:
        sides = before  # left, right, top, bottom
        after = tuple(0 if axis in axes else side for axis, side in zip("xxyy", sides))
    around = tuple(side if axis in axes else 0 for axis, side in zip("xxyy", sides))

    def pad(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (F.pad(inputs[0], around, mode="circular"),)

    if any(around):
        restored.callback(setattr, module, "padding", before)
        restored.callback(module.register_forward_pre_hook(pad).remove)
        module.padding = after
