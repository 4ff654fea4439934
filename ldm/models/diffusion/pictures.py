"""`log_images`: what a model in training does with a batch, as pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.images import text_to_tensor
from ldm.models.autoencoder import VQModelInterface
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.gaussian import Condition, GaussianDiffusion
from ldm.models.diffusion.stages import CLASS_KEYS, PLAIN_KEYS, LatentStages, images_of
from ldm.models.diffusion.wrapper import DiffusionWrapper


def row(panels: Sequence[Tensor]) -> Tensor:
    """One picture (1, C, n H, T W) of T panels (n, C, H, W): a row for every item, time from left to right."""
    wide = torch.cat(list(panels), dim=3)  # (n, C, H, T W)
    return torch.cat(list(wide.split(1)), dim=2)


def first(cond: Condition, count: int) -> Condition:
    """The first `count` rows of a condition."""
    if isinstance(cond, Mapping):
        return {name: first(entry, count) for name, entry in cond.items()}
    return (
        [first(c, count) for c in cond] if isinstance(cond, (list, tuple)) else cond if cond is None else cond[:count]
    )


def chosen(log: dict[str, Tensor], return_keys: Iterable[str] | None) -> dict[str, Tensor]:
    """The entries called `return_keys`; all of them where that names none, as published."""
    wanted = {key: log[key] for key in return_keys or () if key in log}
    return wanted or log


class DiffusionPictures(GaussianDiffusion):
    """Pictures of diffusion in pixels."""

    model: DiffusionWrapper
    first_stage_key: str
    get_input: Callable[..., Any]

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Any],
        N: int = 8,
        n_row: int = 2,
        sample: bool = True,
        return_keys: Iterable[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Pictures (B, C, H, W) about in [-1, 1], by name: inputs, diffusion_row, samples, denoise_row.

        N: how many items; n_row: how many of them in a row's picture. kwargs: of latent models, and of no use here.
        """
        x = self.get_input(batch, self.first_stage_key)[:N]
        log = {"inputs": x, "diffusion_row": row(self._noised_more_and_more(x[:n_row]))}
        if sample:
            with self.ema_scope("Plotting"):
                log["samples"], steps = self.sample(batch_size=len(x), return_intermediates=True)
            log["denoise_row"] = row([x[:n_row] for x in steps])
        return chosen(log, return_keys)

    def _noised_more_and_more(self, x: Tensor) -> list[Tensor]:
        """x (B, ...) at every `log_every_t`-th timestep and the last, under one and the same noise."""
        last = self.num_timesteps - 1
        noise = torch.randn_like(x)
        times = sorted({*range(0, self.num_timesteps, self.log_every_t), last})
        return [self.q_sample(x, torch.full((len(x),), t, device=x.device), noise) for t in times]


class LatentPictures(LatentStages, DiffusionPictures):
    """Pictures of diffusion in latents: mixed into `LatentDiffusion`."""

    @torch.no_grad()
    def log_images(  # type: ignore[override]  # more options than in pixels, in the public order
        self,
        batch: Mapping[str, Any],
        N: int = 8,
        n_row: int = 4,
        sample: bool = True,
        ddim_steps: int | None = 200,
        ddim_eta: float = 1.0,
        return_keys: Iterable[str] | None = None,
        quantize_denoised: bool = True,
        inpaint: bool = True,
        plot_denoise_rows: bool = False,
        plot_progressive_rows: bool = True,
        plot_diffusion_rows: bool = True,
        unconditional_guidance_scale: float = 1.0,
        unconditional_guidance_label: Any = None,
        use_ema_scope: bool = True,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Pictures (B, 3, H, W) about in [-1, 1], by name.

        Always inputs (where the batch holds images), reconstruction and, if there is one, conditioning. N: how many
        items; n_row: how many of them in the one picture that a `..._row` is. plot_diffusion_rows: diffusion_row,
        noise added. sample: samples by `ddim_steps` DDIM steps of noise `ddim_eta`, or ancestral where that is None;
        with them denoise_row (plot_denoise_rows); samples_x0_quantized, if the first stage has a codebook
        (quantize_denoised); samples_cfg_scale_X, if the guidance scale X is above 1, away from
        `unconditional_guidance_label`, by default no text; samples_inpainting, samples_outpainting and their mask
        (inpaint). plot_progressive_rows: progressive_row, the x_0 that ancestral sampling sees on its way.
        use_ema_scope: with the averaged weights.
        """
        with self.ema_scope("Plotting") if use_ema_scope else nullcontext():
            z, c, log = self._originals(batch, N)
            n_row = min(n_row, len(z))
            if plot_diffusion_rows:
                steps = self._noised_more_and_more(z[:n_row])
                log["diffusion_row"] = row([self.decode_first_stage(step) for step in steps])
            draw = {"cond": c, "shape": z.shape, "steps": ddim_steps, "eta": ddim_eta}
            if sample:
                samples, seen = self._draw(**draw)
                log["samples"] = self.decode_first_stage(samples)
                if plot_denoise_rows:
                    log["denoise_row"] = row([self.decode_first_stage(x[:n_row]) for x in seen])
                if quantize_denoised and isinstance(self.first_stage_model, VQModelInterface):
                    quantized, _ = self._draw(**draw, quantize=True)
                    log["samples_x0_quantized"] = self.decode_first_stage(quantized)
                if unconditional_guidance_scale > 1.0 and c is not None:
                    uncond = self._unconditional(c, len(z), unconditional_guidance_label)
                    guided, _ = self._draw(**draw, uncond=uncond, scale=unconditional_guidance_scale)
                    log[f"samples_cfg_scale_{unconditional_guidance_scale:.2f}"] = self.decode_first_stage(guided)
                if inpaint:
                    log |= self._filled_in(z, draw)
            if plot_progressive_rows:
                shape = (n_row, *z.shape[1:])
                _, seen = self.progressive_denoising(first(c, n_row), shape, verbose=False)
                log["progressive_row"] = row([self.decode_first_stage(x0) for x0 in seen])
        return chosen(log, return_keys)

    def _originals(self, batch: Mapping[str, Any], N: int) -> tuple[Tensor, Condition, dict[str, Tensor]]:
        """Latents, encoded condition, and the pictures of what the batch holds."""
        z, c = self.get_input(batch, self.first_stage_key, bs=N)
        log = {"reconstruction": self.decode_first_stage(z)}
        if self.first_stage_key in batch:
            log = {"inputs": images_of(batch, self.first_stage_key, self.device)[:N]} | log
        if self.model.conditioning_key is None:
            return z, None, log
        if self.cond_stage_trainable:
            c = self.get_learned_conditioning(c)
        shown = self._picture_of_condition(batch, len(z), log["reconstruction"].shape[2:])
        return z, c, log | ({} if shown is None else {"conditioning": shown})

    def _picture_of_condition(self, batch: Mapping[str, Any], count: int, size: Sequence[int]) -> Tensor | None:
        key = self.cond_stage_key
        if key in PLAIN_KEYS + CLASS_KEYS:
            texts = batch.get("human_label", batch.get(key)) if key in CLASS_KEYS else batch.get(key)
            if texts is None:  # only its encoding was cached
                return None
            texts = texts.tolist() if isinstance(texts, Tensor) else texts
            return text_to_tensor([str(text) for text in texts[:count]], *size).to(self.device)
        if key not in batch or key == self.first_stage_key:
            return None
        image = images_of(batch, key, self.device)[:count]
        return image.expand(-1, 3, -1, -1) if image.shape[1] in (1, 3) else None

    def _draw(
        self,
        cond: Condition,
        shape: Sequence[int],
        steps: int | None,
        eta: float,
        quantize: bool = False,
        uncond: Condition = None,
        scale: float = 1.0,
        **masked: Any,
    ) -> tuple[Tensor, list[Tensor]]:
        """Latents of `shape` (B, C, h, w), and how they came to be."""
        if steps is None and uncond is None:
            return self.p_sample_loop(cond, shape, True, verbose=False, quantize_denoised=quantize, **masked)
        steps = min(max(steps or self.num_timesteps, 1), self.num_timesteps)
        samples, seen = DDIMSampler(self).sample(
            steps,
            shape[0],
            shape[1:],
            cond,
            eta=eta,
            verbose=False,
            quantize_x0=quantize,
            unconditional_conditioning=uncond,
            unconditional_guidance_scale=scale,
            **masked,
        )
        return samples, seen["x_inter"]

    def _unconditional(self, cond: Condition, count: int, label: Any) -> Condition:
        uncond = self.get_unconditional_conditioning(count, label)
        return {**cond, "c_crossattn": [uncond]} if isinstance(cond, Mapping) else uncond

    def _filled_in(self, z: Tensor, draw: dict[str, Any]) -> dict[str, Tensor]:
        """Samples that keep all of z (B, C, h, w) but its middle, or only that."""
        h, w = z.shape[2:]
        mask = torch.ones(len(z), 1, h, w, device=z.device)
        mask[:, :, h // 4 : 3 * h // 4, w // 4 : 3 * w // 4] = 0.0  # 1 is kept
        inside, _ = self._draw(**draw, mask=mask, x0=z)
        outside, _ = self._draw(**draw, mask=1.0 - mask, x0=z)
        inside, outside = self.decode_first_stage(inside), self.decode_first_stage(outside)
        shown = F.interpolate(2.0 * mask - 1.0, size=inside.shape[2:]).expand(-1, 3, -1, -1)
        return {"samples_inpainting": inside, "mask": shown, "samples_outpainting": outside}
