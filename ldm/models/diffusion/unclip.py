"""Stable unCLIP (after Ramesh et al. 2022, arXiv:2204.06125): the network is told CLIP's embedding of a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.distributed_rng import DistributedRNG
from ldm.models.diffusion.gaussian import Condition
from ldm.models.diffusion.noise import NoiseSource
from ldm.models.diffusion.stages import freeze, images_of
from ldm.models.diffusion.upscaling import augmented
from ldm.util import instantiate_from_config


class ImageEmbeddingConditionedLatentDiffusion(LatentDiffusion):
    """Latent diffusion under a prompt and the embedding of a picture, noised, which enters with the timestep.

    embedder_config: pictures to embeddings, `FrozenOpenCLIPImageEmbedder` or `ClipImageEmbedder`. embedding_key: the
    batch's entry to embed. embedding_dropout: in training, the chance of an item to have zeros instead.
    freeze_embedder: public, and always so. noise_aug_config: what adds the noise, `CLIPEmbeddingNoiseAugmentation`;
    None for embeddings as they are.
    """

    def __init__(
        self,
        embedder_config: Mapping[str, Any],
        embedding_key: str = "jpg",
        embedding_dropout: float = 0.5,
        freeze_embedder: bool = True,
        noise_aug_config: Mapping[str, Any] | None = None,
        conditioning_key: str = "crossattn-adm",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        *,
        train_only: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if not 0.0 <= embedding_dropout <= 1.0:
            raise ValueError(f"embedding_dropout must be from 0 to 1, not {embedding_dropout}")
        if not freeze_embedder:
            raise ValueError("freeze_embedder: false is not for training: no optimiser is given the embedder's weights")
        super().__init__(conditioning_key=conditioning_key, **kwargs)
        self.embedding_key = embedding_key
        self.embedding_dropout = embedding_dropout
        self.embedder = freeze(instantiate_from_config(embedder_config))
        if getattr(self.embedder, "ucg_rate", 0.0) > 0.0:
            raise ValueError("embedder_config: ucg_rate has no effect on a frozen embedder: use embedding_dropout")
        self.noise_augmentor = None if noise_aug_config is None else instantiate_from_config(noise_aug_config)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)
        if train_only is not None:
            self.train_only(train_only)

    def train(self, mode: bool = True) -> ImageEmbeddingConditionedLatentDiffusion:
        """As `nn.Module.train`, but frozen stages stay in evaluation mode."""
        super().train(mode)
        self.embedder.eval()
        return self

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], of any size, to embeddings (B, D)."""
        return self.embedder(images)

    @torch.no_grad()
    def embedding_condition(
        self, embeddings: Tensor, noise_level: int | Tensor | None = None, noise: NoiseSource | None = None
    ) -> Tensor:
        """Embeddings (B, D) as the network takes them (`c_adm`): noised, beside the level's own embedding, (B, 2 D).

        noise_level: one, levels (B,), or None for random ones. Zeros are what stands for no picture in guidance.
        Raises ValueError for levels that are not 0 to the augmentation's `max_noise_level`.
        """
        if self.noise_augmentor is None:
            return embeddings
        return torch.cat(augmented(self, self.noise_augmentor, embeddings, noise_level, noise), dim=1)

    @torch.no_grad()
    def get_input(self, batch: Mapping[str, Any], k: str, bs: int | None = None) -> tuple[Tensor, Any]:
        """(latents, {"c_crossattn", "c_adm"}) of the first `bs` items."""
        z, c = super().get_input(batch, k, bs)
        images = images_of(batch, self.embedding_key, self.device)[:bs]
        adm = self.embedding_condition(self.embed_images(images))
        if self.training:
            dropped = DistributedRNG.of(self).bernoulli(len(adm), self.embedding_dropout)
            adm = adm.masked_fill(dropped.to(adm.device)[:, None], 0.0)
        return z, {"c_crossattn": [c], "c_adm": adm}

    def _unconditional(self, cond: Condition, count: int, label: Any) -> Condition:
        return {**super()._unconditional(cond, count, label), "c_adm": torch.zeros_like(cond["c_adm"])}
