"""Noise augmentation of conditions (Ho et al. 2021, arXiv:2106.15282, section 4): a network that is shown its
condition noised, and told how much, forgives conditions that are not perfect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.schedule import extract_into_tensor, make_beta_schedule, schedule_buffers

BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
)


class AbstractLowScaleModel(nn.Module):
    """What is done to a condition before a network sees it; with a noise schedule of its own.

    noise_schedule_config: arguments of `register_schedule`; None for no schedule, where nothing is noised.
    """

    max_noise_level = 0
    num_timesteps = 1

    def __init__(self, noise_schedule_config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if noise_schedule_config is not None:
            self.register_schedule(**noise_schedule_config)

    def register_schedule(
        self,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Compute and register the published buffers of a schedule."""
        betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        self.num_timesteps = len(betas)
        buffers = schedule_buffers(betas)
        for name in BUFFERS:
            self.register_buffer(name, buffers[name])

    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_start (B, ...) with the noise of levels t (B,) (Ho et al. 2020, eq. 4), given or new."""
        noise = torch.randn_like(x_start) if noise is None else noise
        signal = extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.shape)
        return signal * x_start + extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * noise

    def levels(self, noise_level: int | Tensor, count: int, device: torch.device) -> Tensor:
        """Noise levels (count,) int64, of one or of as many. ValueError for levels that the network has not learnt."""
        level = torch.as_tensor(noise_level, device=device).long().expand(count)
        last = min(self.max_noise_level, self.num_timesteps - 1)
        if wrong := level[(level < 0) | (level > last)].tolist():
            raise ValueError(f"this model's noise levels are 0 to {last}, not {wrong[0]}")
        return level

    def forward(
        self, x: Tensor, noise_level: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A condition (B, ...) as the network is to see it, and its noise level (B,), 0 for none."""
        raise NotImplementedError

    def decode(self, x: Tensor) -> Tensor:
        """Return a condition as it is."""
        return x


class SimpleImageConcat(AbstractLowScaleModel):
    """A condition as it is."""

    def forward(
        self, x: Tensor, noise_level: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, ...) and levels (B,) of 0, whatever they are said to be."""
        return x, torch.zeros(x.shape[0], dtype=torch.long, device=x.device)


class ImageConcatWithNoiseAugmentation(AbstractLowScaleModel):
    """A condition with noise of a random or given level.

    max_noise_level: random levels are below it. to_cuda: accepted for public configs and ignored: the work is done
    where the condition is.
    """

    def __init__(
        self,
        noise_schedule_config: Mapping[str, Any] | None = None,
        max_noise_level: int = 1000,
        to_cuda: bool = False,
    ) -> None:
        super().__init__({} if noise_schedule_config is None else noise_schedule_config)
        if not 1 <= max_noise_level <= self.num_timesteps:
            raise ValueError(f"max_noise_level must be 1 to {self.num_timesteps} (timesteps), not {max_noise_level}")
        self.max_noise_level = max_noise_level

    def forward(
        self, x: Tensor, noise_level: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, ...) noised, and the level (B,) int64; what is not given, level or noise, is random, in this order."""
        if noise_level is None:
            noise_level = torch.randint(0, self.max_noise_level, (x.shape[0],), device=x.device)
        return self.q_sample(x, noise_level, noise), noise_level
