"""The stages around latent diffusion: pictures to latents and back, conditions to what the network attends to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.autoencoder import VQModelInterface
from ldm.models.diffusion.cond_dropout import CONTEXT, ConditionDropout
from ldm.models.diffusion.distributed_rng import DistributedRNG
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import FIRST_STAGE, instantiate_from_config

TEXT_KEYS = ("txt", "caption")
PLAIN_KEYS = (*TEXT_KEYS, "coordinates_bbox")  # conditions that a batch holds as they are, not as images
CLASS_KEYS = ("class_label", "cls")  # conditions whose encoder takes the whole batch


def entry_of(batch: Mapping[str, Any], key: str) -> Any:
    """`batch[key]`; ValueError, naming what there is, without it."""
    if key not in batch:
        raise ValueError(
            f"batches have no {key!r}, only {', '.join(sorted(batch))}: "
            "give the data some (docs/own-pictures.md says how), or name another key in the model's params"
        )
    return batch[key]


def images_of(batch: Mapping[str, Any], key: str, device: torch.device) -> Tensor:
    """Images (B, H, W, C) or (B, H, W) of a batch as (B, C, H, W) float32 on `device`."""
    x = entry_of(batch, key)
    x = x[..., None] if x.ndim == 3 else x
    return x.movedim(-1, 1).to(device, memory_format=torch.contiguous_format).float()


def freeze(module: nn.Module) -> nn.Module:
    """`module` in evaluation mode, without gradients."""
    return module.eval().requires_grad_(False)


class LatentStages:
    """What `LatentDiffusion`, which makes them, does with its first stage and its condition's encoder."""

    first_stage_model: Any  # whatever its config names; so is the next
    cond_stage_model: Any
    cond_stage_key: str
    cond_stage_trainable: bool
    cond_stage_forward: str | None
    scale_factor: float | Tensor
    condition_dropout: ConditionDropout
    device: torch.device
    _empty_contexts: dict[Any, Tensor]

    def _make_cond_stage(self, config: Mapping[str, Any] | str) -> None:
        if config == FIRST_STAGE:
            self.cond_stage_model = self.first_stage_model
            return
        self.cond_stage_model = instantiate_from_config(config)
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            freeze(self.cond_stage_model)
        elif self.cond_stage_model is not None:
            self.cond_stage_model.requires_grad_(True)  # encoders that freeze themselves would not be trained
            for name in getattr(self.cond_stage_model, "spare_weights", ()):  # several processes would wait for these
                self.cond_stage_model.get_parameter(name).requires_grad_(False)

    # ---- first stage ----

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the latent of a picture; ValueError, naming the nearest sizes, if there is none."""
        f = self.first_stage_model.downsampling_factor
        for name, size in (("height", height), ("width", width)):
            if size < f or size % f:
                below, above = max(size // f, 1) * f, (size // f + 1) * f
                near = f"{below} or {above}" if size > f else str(f)
                raise ValueError(f"{name} {size} is not a multiple of {f}, which this model needs: use {near}")
        return height // f, width // f

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> DiagonalGaussianDistribution | Tensor:
        """Images (B, 3, H, W) in [-1, 1] to the first stage's own answer: a posterior, or latents."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoder_posterior: DiagonalGaussianDistribution | Tensor) -> Tensor:
        """Scaled latents (B, C, h, w): a draw from a posterior, or latents as they are."""
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            noise = DistributedRNG.of(self).randn(encoder_posterior.mean.shape, device="cpu")
            return self.scale_factor * encoder_posterior.sample(noise)
        if isinstance(encoder_posterior, Tensor):
            return self.scale_factor * encoder_posterior
        raise ValueError(f"cannot take latents from a {type(encoder_posterior).__name__}")

    def differentiable_decode_first_stage(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Scaled latents (B, C, h, w) to images (B, 3, f h, f w), about in [-1, 1]."""
        z = z / self.scale_factor
        if isinstance(self.first_stage_model, VQModelInterface):
            return self.first_stage_model.decode(z, force_not_quantize=force_not_quantize)
        return self.first_stage_model.decode(z)

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """The same without gradients."""
        return self.differentiable_decode_first_stage(z, force_not_quantize)

    @torch.no_grad()
    def get_latents(self, batch: Mapping[str, Any], k: str, bs: int | None = None) -> Tensor:
        """Scaled latents (B, C, h, w) of the images `batch[k]`, or of the `moments` or `latents` in their place."""
        if "moments" in batch:
            posterior = DiagonalGaussianDistribution(batch["moments"][:bs].to(self.device).float())
            return self.get_first_stage_encoding(posterior)
        if "latents" in batch:
            return self.get_first_stage_encoding(batch["latents"][:bs].to(self.device).float())
        return self.get_first_stage_encoding(self.encode_first_stage(images_of(batch, k, self.device)[:bs])).detach()

    # ---- condition ----

    def get_learned_conditioning(self, c: Any) -> Any:
        """What the condition's encoder makes of `c` (prompts, labels, images ...), or of the text in its `c_crossattn`.

        Without an encoder (torch.nn.Identity) a batch's labels (B,) are the condition, which `adm` networks embed.
        """
        if isinstance(c, Mapping) and "c_crossattn" in c:
            return {**c, "c_crossattn": [self.get_learned_conditioning(part) for part in c["c_crossattn"]]}
        if isinstance(self.cond_stage_model, nn.Identity) and isinstance(c, Mapping):
            return entry_of(c, self.cond_stage_key).to(self.device)
        if self.cond_stage_forward is not None:
            return getattr(self.cond_stage_model, self.cond_stage_forward)(c)
        encode = getattr(self.cond_stage_model, "encode", self.cond_stage_model)
        c = encode(c)
        return c.mode() if isinstance(c, DiagonalGaussianDistribution) else c

    def get_condition(self, batch: Mapping[str, Any], bs: int | None = None) -> Any:
        """What there is to encode (prompts, images, or the batch itself for labels), or the cached `context`."""
        key = self.cond_stage_key
        if CONTEXT in batch:
            if self.cond_stage_trainable:
                raise ValueError(
                    "batches hold a context that was computed beforehand, but cond_stage_trainable would change its "
                    "encoder: turn that off, or cache no context"
                )
            return batch[CONTEXT][:bs].to(self.device).float()
        if key in PLAIN_KEYS:
            return entry_of(batch, key)[:bs]
        if key in CLASS_KEYS:
            return {name: value[:bs] for name, value in batch.items()}
        return images_of(batch, key, self.device)[:bs]

    def get_unconditional_conditioning(self, batch_size: int, null_label: Any = None) -> Tensor:
        """The encoding (batch_size, L, D) of no condition: of `null_label`, or what training drops conditions to.

        Without either it is no text, or what the encoder itself offers; ValueError if it has none to offer.
        """
        if isinstance(null_label, (list, tuple)):  # public configs write [""]
            if len(null_label) != 1:
                raise ValueError(f"guidance needs one label for no {self.cond_stage_key}, not {null_label}")
            null_label = null_label[0]
        if null_label is None:
            null_label = self.condition_dropout.value_of(self.cond_stage_key)
        if null_label is None and self.cond_stage_key in TEXT_KEYS:
            null_label = ""
        if null_label is not None:
            encoding = self.empty_context(null_label)
            return encoding.expand(batch_size, *encoding.shape[1:])
        encoder = getattr(self.cond_stage_model, "get_unconditional_conditioning", None)
        if encoder is None:
            raise ValueError(
                f"guidance leads away from no {self.cond_stage_key}, and nothing says what that is for this model: "
                "name it (null_class; unconditional_guidance_label in log_images), or use scale 1"
            )
        return self.get_learned_conditioning(encoder(batch_size, device=self.device))

    @torch.no_grad()
    def empty_context(self, value: Any) -> Tensor:
        """The encoding (1, L, D) of a prompt or label that means none; computed once if the encoder is frozen."""
        known = self._empty_contexts.get(value)
        if known is None or known.device != self.device or self.cond_stage_trainable:
            key = self.cond_stage_key
            c = {key: torch.tensor([value], device=self.device)} if key in CLASS_KEYS else [value]
            known = self._empty_contexts[value] = self.get_learned_conditioning(c)
        return known
