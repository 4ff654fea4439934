"""CLIP image encoders and the noise augmentation of their embeddings (Stable unCLIP)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoint.trainer_state import read_tensors
from ldm.modules.diffusionmodules.schedule import timestep_embedding
from ldm.modules.diffusionmodules.upscaling import ImageConcatWithNoiseAugmentation
from ldm.modules.encoders.base import AbstractEncoder
from ldm.modules.encoders.open_clip import CLIP, VIT_H_14, TextTowerConfig, VisionTowerConfig
from ldm.util import public_path

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's images, RGB


def prepare(images: Tensor, size: int, antialias: bool = True) -> Tensor:
    """Preprocess images (B, 3, H, W) in [-1, 1] to CLIP's input (B, 3, size, size): resize without crop, normalise."""
    images = (resize(images.float(), size, antialias) + 1.0) / 2.0
    mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std


def resize(images: Tensor, size: int, antialias: bool = True) -> Tensor:
    """Resize images (B, C, H, W) to (B, C, size, size): bicubic with aligned corners.

    With `antialias`, axes that shrink are blurred first by a Gaussian of sigma (factor - 1) / 2 pixels, as in the
    published preprocessing, which differs from PIL's.
    """
    factors = [side / size for side in images.shape[2:]]
    if antialias and max(factors) > 1:
        for axis, factor in enumerate(factors, start=2):
            images = _smooth(images, max((factor - 1) / 2, 0.001), axis)
    return F.interpolate(images, (size, size), mode="bicubic", align_corners=True)


def _smooth(images: Tensor, sigma: float, axis: int) -> Tensor:
    taps = int(max(4 * sigma, 3)) | 1
    at = torch.arange(taps, device=images.device) - taps // 2
    weights = torch.softmax(-(at**2) / (2 * sigma**2), dim=0).to(images.dtype)
    kernel = weights.view(-1, 1) if axis == 2 else weights.view(1, -1)
    edge = taps // 2
    padded = F.pad(images, (0, 0, edge, edge) if axis == 2 else (edge, edge, 0, 0), mode="reflect")
    channels = images.shape[1]
    return F.conv2d(padded, kernel.expand(channels, 1, *kernel.shape), groups=channels)


class AbstractImageEmbedder(AbstractEncoder):
    """Base class of the image encoders.

    Args:
        model: Both towers of a CLIP; the text tower is not used.
        antialias: Blur images before they are shrunk, see `resize`.
        ucg_rate: Probability of replacing an embedding by zeros, in training mode.
    """

    def __init__(self, model: CLIP, antialias: bool, ucg_rate: float) -> None:
        super().__init__()
        self.model = model
        self.antialias = antialias
        self.ucg_rate = ucg_rate

    @property
    def spare_weights(self) -> list[str]:
        """Names of published weights that are not used: the text tower's."""
        return [f"model.{name}" for name, _ in self.model.named_parameters() if not name.startswith("visual.")]

    def preprocess(self, x: Tensor) -> Tensor:
        """Resize and normalise images (B, 3, H, W) in [-1, 1] to (B, 3, image_size, image_size)."""
        return prepare(x, self.model.image_size, self.antialias)

    def _dropout(self, z: Tensor, no_dropout: bool) -> Tensor:
        if self.training and self.ucg_rate > 0.0 and not no_dropout:
            return torch.bernoulli(z.new_full((len(z), 1), 1.0 - self.ucg_rate)) * z
        return z


class FrozenOpenCLIPImageEmbedder(AbstractImageEmbedder):
    """OpenCLIP image encoder: the second condition of Stable unCLIP (ViT-H-14, 1024 numbers).

    The published weights are those of the vision tower, and of the text tower without its blocks.

    Args:
        arch: Name of the tower. Only ViT-H-14 is known; `config` overrides it.
        version: Ignored, like `device` and `max_length`.
        device: Ignored: the encoder works on the device of its weights.
        max_length: Ignored.
        freeze: Set eval mode and disable gradients.
        layer: "pooled", the embedding.
        antialias: Blur images before they are shrunk, see `resize`.
        ucg_rate: Probability of replacing an embedding by zeros, in training mode.
        config: `{text_cfg, vision_cfg}`, options of `TextTowerConfig` and `VisionTowerConfig`, instead of ViT-H-14's.

    Raises:
        ValueError: If the tower or the layer is unknown.
    """

    def __init__(
        self,
        arch: str = VIT_H_14,
        version: str = "laion2b_s32b_b79k",
        device: object = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "pooled",
        antialias: bool = True,
        ucg_rate: float = 0.0,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if config is None and arch != VIT_H_14:
            raise ValueError(f"unknown vision tower {arch!r}: use {VIT_H_14!r}, or give its sizes as `config`")
        if layer != "pooled":
            raise ValueError(f"layer must be 'pooled', got {layer!r}")
        config = config or {}
        text = TextTowerConfig.from_mapping({**config.get("text_cfg", {}), "layers": 0})
        vision = VisionTowerConfig.from_mapping(config.get("vision_cfg", {}))
        super().__init__(CLIP(text, vision), antialias, ucg_rate)
        if freeze:
            self.freeze()

    def forward(self, image: Tensor, no_dropout: bool = False) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to embeddings (B, embed_dim)."""
        return self._dropout(self.encode_with_vision_transformer(image), no_dropout)

    def encode_with_vision_transformer(self, img: Tensor) -> Tensor:
        """Preprocess and encode images, without dropout."""
        return self.model.encode_image(self.preprocess(img))


class ClipImageEmbedder(AbstractImageEmbedder):
    """OpenAI's CLIP image encoder: the second condition of the smaller Stable unCLIP (ViT-L/14, 768 numbers).

    The published weights include the text tower, which is not used.

    Args:
        model: Name of the model. Only ViT-L/14 is known; `config` overrides it.
        jit: Ignored.
        device: Ignored: the encoder works on the device of its weights.
        antialias: Blur images before they are shrunk, see `resize`.
        ucg_rate: Probability of replacing an embedding by zeros, in training mode.
        config: `{text_cfg, vision_cfg}` instead of ViT-L/14's sizes, as for `FrozenOpenCLIPImageEmbedder`.

    Raises:
        ValueError: If the model is unknown.
    """

    VIT_L_14 = "ViT-L/14"
    TEXT = {"width": 768, "heads": 12, "layers": 12, "embed_dim": 768, "quick_gelu": True}
    VISION = {"width": 1024, "heads": 16, "layers": 24, "embed_dim": 768, "quick_gelu": True}

    def __init__(
        self,
        model: str = VIT_L_14,
        jit: bool = False,
        device: object = None,
        antialias: bool = True,
        ucg_rate: float = 0.0,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if config is None and model != self.VIT_L_14:
            raise ValueError(f"unknown CLIP {model!r}: use {self.VIT_L_14!r}, or give its sizes as `config`")
        config = config or {}
        text = TextTowerConfig.from_mapping({**self.TEXT, **config.get("text_cfg", {})})
        vision = VisionTowerConfig.from_mapping({**self.VISION, **config.get("vision_cfg", {})})
        super().__init__(CLIP(text, vision), antialias, ucg_rate)

    def forward(self, x: Tensor, no_dropout: bool = False) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to embeddings (B, embed_dim)."""
        return self._dropout(self.model.encode_image(self.preprocess(x)), no_dropout)


class CLIPEmbeddingNoiseAugmentation(ImageConcatWithNoiseAugmentation):
    """Noise augmentation of CLIP embeddings, which are standardised before and restored after.

    Args:
        *args: Arguments of `ImageConcatWithNoiseAugmentation`, as `**kwargs`.
        clip_stats_path: File of torch with two tensors (D,), mean and standard deviation of embeddings; None for 0
            and 1. Read when first needed; may lie where public paths do: here, in a clone, in an installation.
        timestep_dim: Width of the noise level's embedding.
    """

    def __init__(self, *args: Any, clip_stats_path: str | None = None, timestep_dim: int = 256, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clip_stats_path = clip_stats_path
        self.timestep_dim = timestep_dim
        self._stats: tuple[Tensor, Tensor] | None = None

    def stats(self) -> tuple[Tensor, Tensor]:
        """Read mean and standard deviation (D,). FileNotFoundError or ValueError if the file is missing or another."""
        if self.clip_stats_path is None:
            return torch.zeros(()), torch.ones(())
        if self._stats is None:
            self._stats = _read_stats(self.clip_stats_path)
        return self._stats

    @property
    def data_mean(self) -> Tensor:
        """Mean of embeddings (D,)."""
        return self.stats()[0]

    @property
    def data_std(self) -> Tensor:
        """Standard deviation of embeddings (D,)."""
        return self.stats()[1]

    def scale(self, x: Tensor) -> Tensor:
        """Standardise embeddings (B, D)."""
        return (x - self.data_mean.to(x)) / self.data_std.to(x)

    def unscale(self, x: Tensor) -> Tensor:
        """Undo `scale`."""
        return x * self.data_std.to(x) + self.data_mean.to(x)

    def forward(
        self, x: Tensor, noise_level: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add noise to embeddings x (B, D); also returns the embedding (B, timestep_dim) of the levels (B,)."""
        z, noise_level = super().forward(self.scale(x), noise_level, noise)
        return self.unscale(z), timestep_embedding(noise_level, self.timestep_dim)


def _read_stats(path: str) -> tuple[Tensor, Tensor]:
    found = public_path(path)
    if found is None:
        raise FileNotFoundError(
            f"{path} is missing: mean and standard deviation of CLIP's image embeddings, published by Karlo as "
            "ViT-L-14_stats.th. Put the file there, or set noise_aug_config.params.clip_stats_path in the config"
        )
    try:
        mean, std = read_tensors(found)
        return mean.float().flatten(), std.float().flatten()
    except ValueError as error:
        raise ValueError(
            f"{found} does not hold two tensors, mean and standard deviation of embeddings: {error}"
        ) from error
