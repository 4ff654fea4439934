"""Latent diffusion models whose network gets more than a prompt: masks, depth, small images, image embeddings, boxes.

Their public names are in `ldm.models.diffusion.ddpm`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.diffusion.batches import entry_of, images_of
from ldm.models.diffusion.ddpm import LatentDiffusion, pop_loading
from ldm.models.diffusion.distributed_rng import DistributedRNG
from ldm.models.diffusion.guidance import Condition
from ldm.models.diffusion.noise import NoiseSource
from ldm.models.training import freeze
from ldm.modules.diffusionmodules.upscaling import AbstractLowScaleModel
from ldm.modules.midas.api import fit
from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)

FIRST_CONVOLUTION = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "model_ema.diffusion_modelinput_blocks00weight",
)
DEPTH_WEIGHTS = "model.params.depth_stage_config.params.path takes weights of MiDaS"


def augment(
    model: LatentDiffusion,
    augmentor: AbstractLowScaleModel,
    x: Tensor,
    noise_level: int | Tensor | None,
    noise: NoiseSource | None = None,
) -> tuple[Tensor, Tensor]:
    """Noise conditions x (B, ...) of `model`, and the noise levels (B,); random levels if `noise_level` is None."""
    rng = DistributedRNG.for_module(model)
    if noise_level is None:
        noise_level = rng.timesteps(len(x), max(augmentor.max_noise_level, 1), x.device)
    level = augmentor.levels(noise_level, len(x), x.device)
    return augmentor(x, level, rng.randn_like(x) if noise is None else noise(x.shape, x.device).to(x.dtype))


# ---- conditions beside the latent ----


class LatentFinetuneDiffusion(LatentDiffusion):
    """Latent diffusion conditioned on a prompt and, concatenated to the latent, the entries `concat_keys` of a batch.

    Args:
        finetune_keys, keep_finetune_dims: these weights may have fewer input channels in `ckpt_path`; the first
            `keep_finetune_dims` are loaded and the new ones are zero, so that the network starts unchanged. None allows
            that for no weight.
        c_concat_log_start, c_concat_log_end: the channels of the concatenated tensor that are a latent, for logging.
    """

    def __init__(
        self,
        concat_keys: Sequence[str],
        finetune_keys: Sequence[str] | None = FIRST_CONVOLUTION,
        keep_finetune_dims: int = 4,
        c_concat_log_start: int | None = None,
        c_concat_log_end: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        loading = pop_loading(kwargs)
        super().__init__(*args, **kwargs)
        self.concat_keys = tuple(concat_keys)
        self.finetune_keys = tuple(finetune_keys or ())
        self.keep_dims = keep_finetune_dims
        self.c_concat_log_start = c_concat_log_start
        self.c_concat_log_end = c_concat_log_end
        self._load(**loading)

    def widened_keys(self) -> dict[str, int]:
        """`finetune_keys`, and how many of the file's input channels to load."""
        return dict.fromkeys(self.finetune_keys, self.keep_dims)

    @torch.no_grad()
    def concat_condition(self, batch: Mapping[str, Any], size: Sequence[int], bs: int | None = None) -> Tensor:
        """The batch's `concat_keys` as one tensor (B, C', h, w) at the latent's `size` (h, w)."""
        entries = ((key, images_of(batch, key, self.device)[:bs]) for key in self.concat_keys)
        return torch.cat([self.concat_entry(key, entry, size) for key, entry in entries], dim=1)

    def concat_entry(self, key: str, entry: Tensor, size: Sequence[int]) -> Tensor:
        """One entry (B, C, H, W) of a batch at the latent's `size`."""
        return F.interpolate(entry, size=tuple(size))

    @torch.no_grad()
    def get_input(  # type: ignore[override]
        self,
        batch: Mapping[str, Any],
        k: str,
        cond_key: str | None = None,
        bs: int | None = None,
        return_first_stage_outputs: bool = False,
    ) -> list[Any]:
        """Latents and condition `[z, {"c_concat", "c_crossattn"}, (x, xrec, xc)]` of the first `bs` items."""
        z, c, *more = super().get_input(
            batch,
            k,
            return_first_stage_outputs=return_first_stage_outputs,
            force_c_encode=return_first_stage_outputs,
            cond_key=cond_key,
            return_original_cond=return_first_stage_outputs,
            bs=bs,
        )
        return [z, {"c_concat": [self.concat_condition(batch, z.shape[2:], bs)], "c_crossattn": [c]}, *more]

    def _get_input_to_log(self, batch: Mapping[str, Any], N: int) -> Sequence[Any]:
        return self.get_input(batch, self.first_stage_key, bs=N, return_first_stage_outputs=True)

    def _log_inputs(self, batch: Mapping[str, Any], N: int) -> tuple[Tensor, Condition, dict[str, Tensor]]:
        z, c, log = super()._log_inputs(batch, N)
        if (self.c_concat_log_start, self.c_concat_log_end) != (None, None):
            latent = c["c_concat"][0][:, self.c_concat_log_start : self.c_concat_log_end]
            log["c_concat_decoded"] = self.decode_first_stage(latent)
        return z, c, log


class LatentInpaintDiffusion(LatentFinetuneDiffusion):
    """Latent diffusion conditioned on a prompt, a mask (1 to fill) and the image without what the mask covers.

    Args:
        masked_image_key: which of `concat_keys` is an image to encode; the others are resized to the latent.
    """

    def __init__(
        self,
        concat_keys: Sequence[str] = ("mask", "masked_image"),
        masked_image_key: str = "masked_image",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if masked_image_key not in concat_keys:
            raise ValueError(f"masked_image_key {masked_image_key!r} is not among concat_keys {list(concat_keys)}")
        super().__init__(concat_keys, *args, **kwargs)
        self.masked_image_key = masked_image_key

    def concat_entry(self, key: str, entry: Tensor, size: Sequence[int]) -> Tensor:
        """The masked image as a latent; the mask (B, 1, H, W) at the latent's `size`."""
        if key == self.masked_image_key:
            entry = entry.to(next(self.first_stage_model.parameters()).dtype)
            return self.get_first_stage_encoding(self.encode_first_stage(entry))
        return super().concat_entry(key, entry, size)

    def _log_inputs(self, batch: Mapping[str, Any], N: int) -> tuple[Tensor, Condition, dict[str, Tensor]]:
        z, c, log = super()._log_inputs(batch, N)
        return z, c, log | {"masked_image": images_of(batch, self.masked_image_key, self.device)[:N]}


class LatentDepth2ImageDiffusion(LatentFinetuneDiffusion):
    """Latent diffusion conditioned on a prompt and a depth map of one channel from -1 (far) to 1 (near).

    Args:
        depth_stage_config: the estimator, `MiDaSInference`. It becomes `depth_model`, which is None if neither the
            checkpoint nor its own `path` had weights.
        concat_keys: the one entry of a batch that depth comes from: images (B, H, W, 3) to estimate it from, or depth
            itself, (B, H, W) or (B, H, W, 1). Without it the image to learn is used.
    """

    optional_parts = ("depth_model",)  # for `fill_model`: some fine-tuned models were saved without it

    depth_model: Any

    def __init__(
        self,
        depth_stage_config: Mapping[str, Any],
        concat_keys: Sequence[str] = ("midas_in",),
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if len(concat_keys) != 1:
            raise ValueError(f"concat_keys names the one entry that depth comes from, not {list(concat_keys)}")
        loading = pop_loading(kwargs)
        super().__init__(concat_keys, *args, **kwargs)
        self.depth_stage_key = concat_keys[0]
        self.add_frozen_stage("depth_model", depth_stage_config)
        self._load(**loading)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> list[str]:
        """As in `DDPM`; an estimator without weights is removed, because its depth would be noise."""
        missing = super().init_from_ckpt(path, ignore_keys, only_model)
        loaded = not only_model and not any(key.startswith("depth_model.") for key in missing)
        filled_later = any(parameter.is_meta for parameter in self.depth_model.parameters())
        if not loaded and not filled_later and self.depth_model.path is None:
            logger.warning("%s has no weights to estimate depth: batches must hold depth; or %s", path, DEPTH_WEIGHTS)
            self.depth_model = None
        return missing

    @torch.no_grad()
    def estimate_depth(self, images: Tensor) -> Tensor:
        """Relative depth (B, 1, H', W'), larger is nearer, of images (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: the model was loaded without weights for that.
        """
        if self.depth_model is None:
            raise ValueError(
                "this model's checkpoint has no weights to estimate depth (depth_model.*): give the depth itself, "
                f"as an image (--depth) or as the batch's {self.concat_keys[0]!r}; or in the config {DEPTH_WEIGHTS}"
            )
        return self.depth_model(fit(images))

    @torch.no_grad()
    def depth_condition(self, depth: Tensor, size: Sequence[int]) -> Tensor:
        """Depth (B, 1, H, W) of any scale, larger is nearer, as the network's condition (B, 1, h, w) at `size` (h, w).

        Each map is scaled to [-1, 1] after resizing; a flat one is -1.
        """
        depth = F.interpolate(depth.float(), size=tuple(size), mode="bicubic", align_corners=False)
        low, high = depth.amin(dim=(1, 2, 3), keepdim=True), depth.amax(dim=(1, 2, 3), keepdim=True)
        span = torch.where(high > low, high - low, 1.0)
        return 2.0 * (depth - low) / span - 1.0

    @torch.no_grad()
    def concat_condition(self, batch: Mapping[str, Any], size: Sequence[int], bs: int | None = None) -> Tensor:
        """The depth (B, 1, h, w) of a batch's images at the latent's `size` (h, w)."""
        key = self.depth_stage_key if self.depth_stage_key in batch else self.first_stage_key
        entry = images_of(batch, key, self.device)[:bs]
        depth = entry if entry.shape[1] == 1 else self.estimate_depth(entry)
        return self.depth_condition(depth, size)

    def _log_inputs(self, batch: Mapping[str, Any], N: int) -> tuple[Tensor, Condition, dict[str, Tensor]]:
        z, c, log = super()._log_inputs(batch, N)
        depth = F.interpolate(c["c_concat"][0], size=log["reconstruction"].shape[2:])
        return z, c, log | {"depth": depth.expand(-1, 3, -1, -1)}


class LatentUpscaleFinetuneDiffusion(LatentFinetuneDiffusion):
    """Latent diffusion conditioned on a prompt and a small image as large as the latent, which may be noised.

    Args:
        concat_keys: the one entry of a batch with images (B, H, W, 3) in [-1, 1].
        reshuffle_patch_size: p: fold images (B, C, p h, p w) into (B, p p C, h, w) first.
        low_scale_config: adds noise, see `LatentUpscaleDiffusion`; None for images as they are.
        low_scale_key: as published, without effect: `concat_keys` names the entry.
    """

    low_scale_model: Any

    def __init__(
        self,
        concat_keys: Sequence[str] = ("lr",),
        reshuffle_patch_size: int | None = None,
        low_scale_config: Mapping[str, Any] | None = None,
        low_scale_key: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if len(concat_keys) != 1:
            raise ValueError(f"concat_keys names the one entry with small images, not {list(concat_keys)}")
        loading = pop_loading(kwargs)
        super().__init__(concat_keys, *args, **kwargs)
        self.reshuffle_patch_size = reshuffle_patch_size
        self.low_scale_model = None
        self.low_scale_key = low_scale_key
        if low_scale_config is not None:
            self.instantiate_low_stage(low_scale_config)
        self._load(**loading)

    def instantiate_low_stage(self, config: Mapping[str, Any]) -> None:
        """Build `low_scale_model`, frozen."""
        self.low_scale_model = freeze(instantiate_from_config(config))

    def concat_entry(self, key: str, entry: Tensor, size: Sequence[int]) -> Tensor:
        """The small image, its patches folded into channels if `reshuffle_patch_size` is set."""
        if p := self.reshuffle_patch_size:
            b, c, height, width = entry.shape
            if height % p or width % p:
                raise ValueError(f"{key!r} is {height}x{width} (height x width), no multiple of patches of {p}")
            patches = entry.reshape(b, c, p, height // p, p, width // p).permute(0, 2, 4, 1, 3, 5)
            return patches.reshape(b, p * p * c, height // p, width // p)
        return entry

    @torch.no_grad()
    def get_input(self, *args: Any, **kwargs: Any) -> list[Any]:
        """As `LatentFinetuneDiffusion.get_input`, noised and with `c_adm`, the noise level, if there is a low stage."""
        z, cond, *more = super().get_input(*args, **kwargs)
        if self.low_scale_model is not None:
            noised, level = augment(self, self.low_scale_model, cond["c_concat"][0], None)
            cond |= {"c_concat": [noised], "c_adm": level}
        return [z, cond, *more]

    def _log_inputs(self, batch: Mapping[str, Any], N: int) -> tuple[Tensor, Condition, dict[str, Tensor]]:
        z, c, log = super()._log_inputs(batch, N)
        return z, c, log | {"lr": images_of(batch, self.concat_keys[0], self.device)[:N]}


class LatentUpscaleDiffusion(LatentDiffusion):
    """Latent diffusion conditioned on a prompt, a small image as large as the latent, and the noise added to that.

    Args:
        low_scale_config: adds the noise, `ImageConcatWithNoiseAugmentation`.
        low_scale_key: the batch's entry with small images (B, h, w, 3) in [-1, 1].
        noise_level_key: its entry with noise levels (B,); None for random ones.
    """

    low_scale_model: Any

    def __init__(
        self,
        *args: Any,
        low_scale_config: Mapping[str, Any],
        low_scale_key: str = "LR",
        noise_level_key: str | None = None,
        conditioning_key: str = "hybrid-adm",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, conditioning_key=conditioning_key, **kwargs)  # type: ignore[misc]  # args: those before
        self.instantiate_low_stage(low_scale_config)
        self.low_scale_key = low_scale_key
        self.noise_level_key = noise_level_key

    def instantiate_low_stage(self, config: Mapping[str, Any]) -> None:
        """Build `low_scale_model`: a noise schedule, without weights to load."""
        self.low_scale_model = freeze(instantiate_from_config(config))

    @property
    def max_noise_level(self) -> int:
        """The highest noise level of small images; random levels are below it."""
        return self.low_scale_model.max_noise_level

    @torch.no_grad()
    def low_scale_condition(
        self, x_low: Tensor, noise_level: int | Tensor | None = None, noise: NoiseSource | None = None
    ) -> tuple[Tensor, Tensor]:
        """Noise small images (B, 3, h, w) in [-1, 1].

        Args:
            x_low: the images.
            noise_level: one, levels (B,), or None for random ones.
            noise: random numbers from elsewhere than torch's global generator.

        Returns:
            The network's `c_concat`, of the same shape, and `c_adm`, the levels (B,) int64.

        Raises:
            ValueError: a level is not 0 to `max_noise_level`.
        """
        return augment(self, self.low_scale_model, x_low, noise_level, noise)

    @torch.no_grad()
    def get_input(  # type: ignore[override]
        self,
        batch: Mapping[str, Any],
        k: str,
        cond_key: str | None = None,
        bs: int | None = None,
        log_mode: bool = False,
    ) -> list[Any]:
        """Latents and condition `[z, {"c_concat", "c_crossattn", "c_adm"}]` of the first `bs` items.

        With `log_mode` also x, xrec, xc, the small images, these as the network gets them, and their noise levels.
        """
        z, c, *more = super().get_input(
            batch,
            k,
            return_first_stage_outputs=log_mode,
            force_c_encode=log_mode,
            cond_key=cond_key,
            return_original_cond=log_mode,
            bs=bs,
        )
        x_low = images_of(batch, self.low_scale_key, self.device)[:bs]
        if x_low.shape[2:] != z.shape[2:]:
            raise ValueError(
                f"the batch's {self.low_scale_key!r} is {x_low.shape[2]}x{x_low.shape[3]} (height x width), but this "
                f"model takes small images as large as the latent, {z.shape[2]}x{z.shape[3]}"
            )
        level = None if self.noise_level_key is None else entry_of(batch, self.noise_level_key)[:bs]
        noised, level = self.low_scale_condition(x_low, level)
        cond = {"c_concat": [noised], "c_crossattn": [c], "c_adm": level}
        return [z, cond, *more, x_low, noised, level] if log_mode else [z, cond]

    def log_images(  # type: ignore[override]
        self, batch: Mapping[str, Any], N: int = 8, n_row: int = 4, **kwargs: Any
    ) -> dict[str, Tensor]:
        """As `LatentDiffusion.log_images`, and low_scale; options by keyword."""
        return super().log_images(batch, N=N, n_row=n_row, **kwargs)

    def _get_input_to_log(self, batch: Mapping[str, Any], N: int) -> Sequence[Any]:
        return self.get_input(batch, self.first_stage_key, bs=N, log_mode=True)[:5]

    def _log_inputs(self, batch: Mapping[str, Any], N: int) -> tuple[Tensor, Condition, dict[str, Tensor]]:
        z, c, log = super()._log_inputs(batch, N)
        return z, c, log | {"low_scale": F.interpolate(c["c_concat"][0], size=log["reconstruction"].shape[2:])}


# ---- image embeddings, boxes ----


class ImageEmbeddingConditionedLatentDiffusion(LatentDiffusion):
    """Stable unCLIP: conditioned on a prompt and an image embedding, noised, which enters with the timestep.

    After Ramesh et al. 2022, arXiv:2204.06125.

    Args:
        embedder_config: images to embeddings: `FrozenOpenCLIPImageEmbedder` or `ClipImageEmbedder`.
        embedding_key: the batch's entry with images to embed.
        embedding_dropout: in training, the probability of zeros in place of an embedding.
        freeze_embedder: as published; must be true.
        noise_aug_config: adds the noise, `CLIPEmbeddingNoiseAugmentation`; None for embeddings as they are.
    """

    def __init__(
        self,
        embedder_config: Mapping[str, Any],
        embedding_key: str = "jpg",
        embedding_dropout: float = 0.5,
        freeze_embedder: bool = True,
        noise_aug_config: Mapping[str, Any] | None = None,
        *args: Any,
        conditioning_key: str = "crossattn-adm",
        **kwargs: Any,
    ) -> None:
        if not 0.0 <= embedding_dropout <= 1.0:
            raise ValueError(f"embedding_dropout must be from 0 to 1, not {embedding_dropout}")
        if not freeze_embedder:
            raise ValueError("freeze_embedder: false cannot train: the optimizer does not get the embedder's weights")
        loading = pop_loading(kwargs)
        super().__init__(*args, conditioning_key=conditioning_key, **kwargs)  # type: ignore[misc]  # args: those before
        self.embed_key = embedding_key
        self.embedding_dropout = embedding_dropout
        self._init_embedder(embedder_config, freeze_embedder)
        self._init_noise_aug(noise_aug_config)
        self._load(**loading)

    embedder: Any

    def _init_embedder(self, config: Mapping[str, Any], freeze: bool = True) -> None:
        self.add_frozen_stage("embedder", config)
        if getattr(self.embedder, "ucg_rate", 0.0) > 0.0:
            raise ValueError("embedder_config: ucg_rate has no effect on a frozen embedder: use embedding_dropout")

    def _init_noise_aug(self, config: Mapping[str, Any] | None) -> None:
        self.noise_augmentor = None if config is None else instantiate_from_config(config)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], of any size, to embeddings (B, D)."""
        return self.embedder(images)

    @torch.no_grad()
    def embedding_condition(
        self, embeddings: Tensor, noise_level: int | Tensor | None = None, noise: NoiseSource | None = None
    ) -> Tensor:
        """The network's `c_adm` (B, 2 D): noised embeddings (B, D) and the embedding of the noise level.

        Zeros mean no image, for guidance.

        Args:
            embeddings: of images.
            noise_level: one, levels (B,), or None for random ones.
            noise: random numbers from elsewhere than torch's global generator.

        Raises:
            ValueError: a level is not 0 to the augmentation's `max_noise_level`.
        """
        if self.noise_augmentor is None:
            return embeddings
        return torch.cat(augment(self, self.noise_augmentor, embeddings, noise_level, noise), dim=1)

    @torch.no_grad()
    def get_input(  # type: ignore[override]
        self,
        batch: Mapping[str, Any],
        k: str,
        cond_key: str | None = None,
        bs: int | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Latents and condition `[z, {"c_crossattn", "c_adm"}, ...]`; the rest as in `LatentDiffusion.get_input`."""
        z, c, *more = super().get_input(batch, k, cond_key=cond_key, bs=bs, **kwargs)
        images = images_of(batch, self.embed_key, self.device)[:bs]
        adm = self.embedding_condition(self.embed_images(images))
        if self.training:
            dropped = DistributedRNG.for_module(self).bernoulli(len(adm), self.embedding_dropout)
            adm = adm.masked_fill(dropped.to(adm.device)[:, None], 0.0)
        return [z, {"c_crossattn": [c], "c_adm": adm}, *more]

    def _unconditional_like(self, cond: Condition, count: int, label: Any) -> Condition:
        return {**super()._unconditional_like(cond, count, label), "c_adm": torch.zeros_like(cond["c_adm"])}


class Layout2ImgDiffusion(LatentDiffusion):
    """Latent diffusion conditioned on objects in boxes, as tokens of their classes and coordinates."""

    def __init__(self, cond_stage_key: str, *args: Any, **kwargs: Any) -> None:
        if cond_stage_key != "coordinates_bbox":
            raise ValueError(f"Layout2ImgDiffusion needs cond_stage_key coordinates_bbox, not {cond_stage_key!r}")
        super().__init__(*args, cond_stage_key=cond_stage_key, **kwargs)  # type: ignore[misc]  # args: those before

    def log_images(self, batch: Mapping[str, Any], N: int = 8, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As `LatentDiffusion.log_images`, and bbox_image, the boxes, if the data set can plot them."""
        log = super().log_images(batch, N, *args, **kwargs)
        datasets = getattr(getattr(self._trainer, "datamodule", None), "datasets", {})
        dataset: Any = datasets.get("train" if self.training else "validation")
        builders = getattr(dataset, "conditional_builders", {})
        if self.cond_stage_key in builders:
            plot = builders[self.cond_stage_key].plot
            boxes = [
                plot(tokens.detach().cpu(), lambda n: dataset.get_textual_label(dataset.get_category_id(n)), (256, 256))
                for tokens in batch[self.cond_stage_key][:N]
            ]
            log["bbox_image"] = torch.stack(boxes)
        return log
