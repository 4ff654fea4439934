"""What a loaded model knows about itself: its file, its family, its own sampling defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class SamplingDefaults:
    """The `sampling:` section of a model's config; None where it leaves the choice to the library.

    Attributes:
        steps: Number of sampling steps.
        sampler: Name of a registered sampler.
        scale: Guidance scale.
        schedule: Name of a schedule, or timesteps.
        size: Side of a square image in pixels.
    """

    steps: int | None = None
    sampler: str | None = None
    scale: float | None = None
    schedule: str | Sequence[float] | None = None
    size: int | None = None


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a loaded model, set as `model.info` by `ldm.inference.load_model`.

    Attributes:
        checkpoint_path: The file that the weights are from.
        family: Description of the kind of model, such as "Stable Diffusion v1".
        global_step: Training step of the checkpoint, if it tells.
        autocast_dtype: Dtype for `torch.autocast` while sampling; None for no autocast.
        one_scale: Whether the model was trained at one scale only, so that images are resized to it.
        sampling: The model's own sampling defaults.
        mapped_file: Stamp of the file that weights are memory-mapped from, for `ldm.checkpoint.check_unchanged`.
    """

    checkpoint_path: str
    family: str = ""
    global_step: int | None = None
    autocast_dtype: torch.dtype | None = None
    one_scale: bool = False
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    mapped_file: Any = None
