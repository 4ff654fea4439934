"""Parts of `log_images`: images of what a diffusion model does with a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.images import text_to_tensor
from ldm.models.diffusion.batches import CLASS_KEYS, PLAIN_KEYS, image_sides
from ldm.models.diffusion.guidance import Condition

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion


def image_row(panels: Sequence[Tensor]) -> Tensor:
    """One image (1, C, n H, T W) of T panels (n, C, H, W): a row for every item, time from left to right."""
    wide = torch.cat(list(panels), dim=3)  # (n, C, H, T W)
    return torch.cat(list(wide.split(1)), dim=2)


def select_logs(log: dict[str, Tensor], return_keys: Iterable[str] | None) -> dict[str, Tensor]:
    """The entries called `return_keys`; all of them if that matches none, as published."""
    return {key: log[key] for key in return_keys or () if key in log} or log


def diffuse(model: DDPM, x: Tensor) -> list[Tensor]:
    """x (B, C, H, W) at every `log_every_t`-th timestep and the last, with the same noise."""
    noise = torch.randn_like(x)
    times = sorted({*range(0, model.num_timesteps, model.log_every_t), model.num_timesteps - 1})
    return [model.q_sample(x_start=x, t=torch.full((len(x),), t, device=x.device), noise=noise) for t in times]


def condition_images(
    model: LatentDiffusion, batch: Mapping[str, Any], xc: Any, reconstruction: Tensor
) -> dict[str, Tensor]:
    """The condition as images (B, 3, H, W): its text, or the image or map that it is.

    Args:
        model: its `cond_stage_key` says what the condition is.
        batch: labels may have names in its `human_label`.
        xc: the condition before encoding.
        reconstruction: (B, 3, H, W), for the size.
    """
    key, (count, _, *size) = model.cond_stage_key, reconstruction.shape
    if key in PLAIN_KEYS + CLASS_KEYS:
        texts = batch.get("human_label", batch.get(key)) if key in CLASS_KEYS else batch.get(key)
        if texts is None:  # only its encoding was cached
            return {}
        texts = texts.tolist() if isinstance(texts, Tensor) else texts
        images = text_to_tensor([str(text) for text in texts[:count]], size[0], size[1])
        return {"conditioning": images.to(reconstruction.device)}
    if key == model.first_stage_key or not isinstance(xc, Tensor) or xc.ndim != 4:
        return {}
    if xc.shape[1] in (1, 3):
        return {"conditioning": xc.expand(-1, 3, -1, -1)}
    return {"original_conditioning": model.to_rgb(xc)}


def sampling_options(model: LatentDiffusion, c: Condition, z: Tensor, steps: int | None, eta: float) -> dict[str, Any]:
    """Keywords of `sample_log` for samples like z (B, C, h, w); ancestral sampling if `steps` is None."""
    options: dict[str, Any] = {"cond": c, "batch_size": len(z), "ddim": steps is not None, "ddim_steps": steps}
    if steps is not None:
        options |= {"ddim_steps": min(max(steps, 1), model.num_timesteps), "eta": eta}
    if tuple(z.shape[1:]) != (model.channels, *image_sides(model.image_size)):
        options["shape"] = tuple(z.shape[1:])  # left out where it is the default: overrides may not take it
    return options


def outer_mask(z: Tensor) -> Tensor:
    """A mask (B, 1, h, w) for latents z: 1, to keep them, but 0 in the middle."""
    h, w = z.shape[2:]
    mask = torch.ones(len(z), 1, h, w, device=z.device)
    mask[:, :, h // 4 : 3 * h // 4, w // 4 : 3 * w // 4] = 0.0
    return mask
