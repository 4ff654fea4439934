"""CLIP (Radford et al. 2021, arXiv:2103.00020) under the weight names of OpenAI and OpenCLIP: the picture side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint.trainer_state import read_tensors
from ldm.modules.diffusionmodules.schedule import timestep_embedding
from ldm.modules.diffusionmodules.upscaling import ImageConcatWithNoiseAugmentation
from ldm.modules.encoders.base import AbstractEncoder, TowerConfig, check_heads
from ldm.modules.encoders.open_clip import VIT_H_14, TextTower, TextTowerConfig, Transformer
from ldm.util import public_path

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's pictures, RGB


@dataclass(frozen=True)
class VisionTowerConfig(TowerConfig):
    """Size of a vision tower, in OpenCLIP's names; the defaults are ViT-H-14's. embed_dim: of its embeddings."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1280
    heads: int = 16
    layers: int = 32
    embed_dim: int = 1024
    quick_gelu: bool = False

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads, "width", "heads")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")


class VisionTransformer(nn.Module):
    """A transformer over a picture's patches and one token more, whose features become the picture's embedding."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        width, size = config.width, config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(size**2 + 1, width) * width**-0.5)
        self.proj = nn.Parameter(torch.randn(width, config.embed_dim) * width**-0.5)
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.layers, config.heads, config.quick_gelu)
        self.ln_post = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, image_size, image_size), normalised, to embeddings (B, embed_dim)."""
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, patches, width)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(TextTower):
    """Both towers; the text tower's weights are named as if it stood alone."""

    def __init__(self, text: TextTowerConfig, vision: VisionTowerConfig) -> None:
        super().__init__(text)
        self.image_size = vision.image_size
        self.visual = VisionTransformer(vision)

    def encode_image(self, images: Tensor, antialias: bool = True) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to embeddings (B, embed_dim), not normalised."""
        return self.visual(prepare(images, self.image_size, antialias).to(self.visual.proj.dtype))


def prepare(images: Tensor, size: int, antialias: bool = True) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] as CLIP sees them: (B, 3, size, size), squeezed, with its mean and spread."""
    images = (resize(images.float(), size, antialias) + 1.0) / 2.0
    mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std


def resize(images: Tensor, size: int, antialias: bool = True) -> Tensor:
    """Pictures (B, C, H, W) to (B, C, size, size): bicubic, the corners staying corners.

    antialias: what gets smaller is smoothed first by a Gaussian of (factor - 1) / 2 pixels. Both are the public
    numbers, which PIL's resizing differs from.
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
    """Pictures to CLIP's embeddings of them.

    antialias: see `resize`. ucg_rate: the chance of an embedding to be replaced by zeros, while training only.
    """

    def __init__(self, model: CLIP, antialias: bool, ucg_rate: float) -> None:
        super().__init__()
        self.model = model
        self.antialias = antialias
        self.ucg_rate = ucg_rate

    @property
    def spare_weights(self) -> list[str]:
        """Published weights that nothing here reads: the text tower's."""
        return [f"model.{name}" for name, _ in self.model.named_parameters() if not name.startswith("visual.")]

    def forward(self, image: Tensor, no_dropout: bool = False) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to embeddings (B, embed_dim)."""
        z = self.model.encode_image(image, self.antialias)
        if self.training and self.ucg_rate > 0.0 and not no_dropout:
            z = torch.bernoulli(z.new_full((len(z), 1), 1.0 - self.ucg_rate)) * z
        return z


class FrozenOpenCLIPImageEmbedder(AbstractImageEmbedder):
    """Pictures to OpenCLIP's embeddings: the second condition of Stable unCLIP (ViT-H-14, 1024 numbers).

    The published weights are those of the vision tower, and of the text tower all but its blocks.

    arch: the public name; only ViT-H-14 is known, and `config` overrides it. version, device, max_length: accepted for
    public configs and ignored. freeze: eval mode and no gradients. layer: "pooled", the embedding.
    config: None for ViT-H-14, or `{text_cfg, vision_cfg}`, options of `TextTowerConfig` and `VisionTowerConfig`.

    Raises ValueError for a tower or layer that is unknown.
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


class ClipImageEmbedder(AbstractImageEmbedder):
    """Pictures to the embeddings of OpenAI's CLIP: the second condition of the smaller Stable unCLIP (768 numbers).

    The published weights are those of the whole of CLIP, the text tower that is not used here included.

    model: the public name; only ViT-L/14 is known, and `config` overrides it. jit, device: accepted for public configs
    and ignored. config: None for ViT-L/14, or `{text_cfg, vision_cfg}` as for `FrozenOpenCLIPImageEmbedder`.

    Raises ValueError for an unknown model.
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


class CLIPEmbeddingNoiseAugmentation(ImageConcatWithNoiseAugmentation):
    """CLIP embeddings with noise of a random or given level, which is added to what has mean 0 and spread 1.

    clip_stats_path: a file of torch's with two tensors (D,), the mean and spread of embeddings; None for 0 and 1. It
        is read when first needed, and may be where public paths are: here, in a clone, in an installation.
    timestep_dim: width of the level's embedding. Further arguments: of `ImageConcatWithNoiseAugmentation`.
    """

    def __init__(self, *args: Any, clip_stats_path: str | None = None, timestep_dim: int = 256, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clip_stats_path = clip_stats_path
        self.timestep_dim = timestep_dim
        self._stats: tuple[Tensor, Tensor] | None = None

    def stats(self) -> tuple[Tensor, Tensor]:
        """Mean and spread (D,), on the CPU. FileNotFoundError, saying what belongs there; ValueError for another."""
        if self._stats is None:
            assert self.clip_stats_path is not None  # else there is nothing to ask for
            self._stats = _read_stats(self.clip_stats_path)
        return self._stats

    def forward(
        self, x: Tensor, noise_level: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings x (B, D) noised, and the embedding (B, timestep_dim) of the level (B,)."""
        mean, std = (0.0, 1.0) if self.clip_stats_path is None else (y.to(x) for y in self.stats())
        z, noise_level = super().forward((x - mean) / std, noise_level, noise)
        return z * std + mean, timestep_embedding(noise_level, self.timestep_dim)


def _read_stats(path: str) -> tuple[Tensor, Tensor]:
    found = public_path(path)
    if found is None:
        raise FileNotFoundError(
            f"{path} is missing: the mean and spread of CLIP's image embeddings, which Karlo published as "
            "ViT-L-14_stats.th. Put the file there, or name its place in the config: "
            "noise_aug_config.params.clip_stats_path"
        )
    try:
        mean, std = read_tensors(found)
        return mean.float().flatten(), std.float().flatten()
    except ValueError as error:
        raise ValueError(f"{found} does not hold two tensors, the mean and spread of embeddings: {error}") from error
