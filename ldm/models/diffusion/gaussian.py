"""Gaussian diffusion (Ho et al. 2020): the schedule's buffers and every formula that depends on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm.lightning import pl
from ldm.models.diffusion.guidance import Condition
from ldm.modules.diffusionmodules.schedule import (
    PARAMETERIZATIONS,
    extract_into_tensor,
    make_beta_schedule,
    rescale_zero_terminal_snr,
    schedule_buffers,
    vlb_weights,
)
from ldm.modules.diffusionmodules.util import noise_like


class GaussianDiffusion(pl.LightningModule):
    """Owns the schedule. In all methods x is (B, ...), t is (B,) int64 and the answer broadcasts over x."""

    num_timesteps: int
    parameterization: str
    v_posterior: float
    image_size: int | Sequence[int]
    channels: int
    log_every_t: int
    clip_denoised: bool
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    first_stage_model: Any  # of those that have one

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Condition = None) -> Tensor:
        """The network's output for x_noisy (B, C, H, W) at timesteps t (B,), which may be fractional."""
        raise NotImplementedError

    def ema_scope(self, context: str | None = None) -> AbstractContextManager[None]:
        """Within it the network has its averaged weights, if there are any."""
        raise NotImplementedError

    def register_schedule(
        self,
        given_betas: Sequence[float] | np.ndarray | None = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        """Compute and register the buffers of a schedule, named or given as betas.

        rescale_betas_zero_snr: stretch it until its last timestep is nothing but noise (Lin et al. 2023).
        """
        if self.parameterization not in PARAMETERIZATIONS:
            names = ", ".join(PARAMETERIZATIONS)
            raise ValueError(f"parameterization {self.parameterization!r} is not one of {names}")
        if given_betas is None:
            betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        else:
            betas = np.asarray(given_betas, dtype=np.float64)
        if rescale_betas_zero_snr:
            if self.parameterization == "eps":
                raise ValueError(
                    "rescale_betas_zero_snr needs parameterization v or x0: at the last timestep the input is the "
                    "noise, and predicting it teaches an eps model nothing"
                )
            betas = rescale_zero_terminal_snr(betas)
        self.num_timesteps = len(betas)
        buffers = schedule_buffers(betas, self.v_posterior)
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self.register_buffer("lvlb_weights", vlb_weights(buffers, self.parameterization), persistent=False)

    def _at(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        return extract_into_tensor(getattr(self, name), t, x.shape)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_0)."""
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = 1.0 - self._at("alphas_cumprod", t, x_start)
        return mean, variance, self._at("log_one_minus_alphas_cumprod", t, x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """A draw from q(x_t | x_0), with the given or new noise (eq. 4)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        signal = self._at("sqrt_alphas_cumprod", t, x_start)
        return signal * x_start + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 from x_t and eps."""
        return (
            self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
            - self._at("sqrt_recipm1_alphas_cumprod", t, x_t) * noise
        )

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = sqrt(a) eps - sqrt(1 - a) x_0 (Salimans and Ho 2022)."""
        return self._at("sqrt_alphas_cumprod", t, x) * noise - self._at("sqrt_one_minus_alphas_cumprod", t, x) * x

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_0 from x_t and v."""
        return self._at("sqrt_alphas_cumprod", t, x_t) * x_t - self._at("sqrt_one_minus_alphas_cumprod", t, x_t) * v

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """eps from x_t and v."""
        return self._at("sqrt_alphas_cumprod", t, x_t) * v + self._at("sqrt_one_minus_alphas_cumprod", t, x_t) * x_t

    def predict_start(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """x_0 from x_t and what the network said, whatever it predicts."""
        if self.parameterization == "eps":
            return self.predict_start_from_noise(x_t, t, output)
        if self.parameterization == "v":
            return self.predict_start_from_z_and_v(x_t, t, output)
        return output

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0) (eq. 6 and 7)."""
        mean = self._at("posterior_mean_coef1", t, x_t) * x_start + self._at("posterior_mean_coef2", t, x_t) * x_t
        return (
            mean,
            self._at("posterior_variance", t, x_t),
            self._at("posterior_log_variance_clipped", t, x_t),
        )

    # ---- ancestral sampling ----

    def condition_at(self, cond: Condition, t: Tensor) -> Condition:
        """What the network is told at timesteps t (B,) when sampling under `cond`: the condition itself."""
        return cond

    def p_mean_variance(
        self,
        x: Tensor,
        c: Condition,
        t: Tensor,
        clip_denoised: bool,
        quantize_denoised: bool = False,
        return_x0: bool = False,
    ) -> tuple[Tensor, ...]:
        """Mean, variance and log variance of p(x_{t-1} | x_t), and the network's x_0 if `return_x0`.

        clip_denoised, quantize_denoised: the network's x_0 is clipped to [-1, 1], or put through the first stage's
        codebook, first.
        """
        x0 = self.predict_start(x, t, self.apply_model(x, t, c))
        if clip_denoised:
            x0 = x0.clamp(-1.0, 1.0)
        if quantize_denoised:
            x0 = self.first_stage_model.quantize(x0)[0]
        return (*self.q_posterior(x0, x, t), *([x0] if return_x0 else []))

    @torch.no_grad()
    def p_sample(
        self,
        x: Tensor,
        c: Condition,
        t: Tensor,
        clip_denoised: bool = False,
        repeat_noise: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        return_x0: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """A draw from p(x_{t-1} | x_t), and the network's x_0 if `return_x0`; at t = 0 the mean.

        temperature scales the noise, noise_dropout thins it.
        """
        mean, _, log_variance, x0 = self.p_mean_variance(x, c, t, clip_denoised, quantize_denoised, return_x0=True)
        noise = temperature * noise_like(x.shape, x.device, repeat_noise)
        if noise_dropout > 0.0:
            noise = F.dropout(noise, p=noise_dropout)
        keep = (t != 0).float().reshape(-1, *(1,) * (x.ndim - 1))
        x = mean + keep * (0.5 * log_variance).exp() * noise
        return (x, x0) if return_x0 else x

    def _walk(
        self,
        cond: Condition,
        x: Tensor,
        steps: int,
        verbose: bool,
        quantize_denoised: bool,
        mask: Tensor | None,
        known: Tensor | None,
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Algorithm 2 from timestep steps - 1 down to 0: (t, x_{t-1}, the network's x_0) of every step."""
        if mask is not None and (known is None or known.shape[2:] != mask.shape[2:]):
            raise ValueError("mask needs x0, of the same height and width")
        for i in tqdm(reversed(range(steps)), desc="Sampling t", total=steps, disable=not verbose, leave=None):
            t = torch.full((x.shape[0],), i, device=self.device, dtype=torch.long)
            c = self.condition_at(cond, t)
            x, x0 = self.p_sample(x, c, t, self.clip_denoised, quantize_denoised=quantize_denoised, return_x0=True)
            if mask is not None and known is not None:
                x = self.q_sample(known, t) * mask + (1.0 - mask) * x
            yield i, x, x0

    @torch.no_grad()
    def p_sample_loop(
        self,
        cond: Condition,
        shape: Sequence[int],
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        verbose: bool = True,
        callback: Callable[[int], None] | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        start_T: int | None = None,
        log_every_t: int | None = None,
    ) -> Any:
        """Ancestral sampling (Ho et al. 2020, algorithm 2) of a latent of `shape` (B, C, H, W).

        timesteps, start_T: start this far up instead of at the schedule's end. mask, x0: keep x0 where mask is 1.
        Returns a Tensor; with return_intermediates a pair of it and of a list of what was on the way.
        """
        start = torch.randn(tuple(shape), device=self.device) if x_T is None else x_T
        log_every_t = log_every_t or self.log_every_t
        steps = min(n for n in (timesteps, start_T, self.num_timesteps) if n is not None)
        x, intermediates = start, [start]
        for i, x, _ in self._walk(cond, start, steps, verbose, quantize_denoised, mask, x0):
            if i % log_every_t == 0 or i == steps - 1:
                intermediates.append(x)
            if callback:
                callback(i)
            if img_callback:
                img_callback(x, i)
        return (x, intermediates) if return_intermediates else x

    @torch.no_grad()
    def progressive_denoising(
        self,
        cond: Condition,
        shape: Sequence[int],
        verbose: bool = True,
        callback: Callable[[int], None] | None = None,
        quantize_denoised: bool = False,
        x_T: Tensor | None = None,
        log_every_t: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Ancestral samples of `shape` (B, C, H, W), and the x_0 that the network saw on the way, first to last."""
        start = torch.randn(tuple(shape), device=self.device) if x_T is None else x_T
        log_every_t = log_every_t or self.log_every_t
        sample, seen = start, []
        for i, x, x0 in self._walk(cond, start, self.num_timesteps, verbose, quantize_denoised, None, None):
            sample = x
            if i % log_every_t == 0 or i == self.num_timesteps - 1:
                seen.append(x0)
            if callback:
                callback(i)
        return sample, seen

    @torch.no_grad()
    def sample(self, batch_size: int = 16, return_intermediates: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Unconditional samples of the model's own size."""
        shape = (batch_size, self.channels, *square(self.image_size))
        return self.p_sample_loop(None, shape, return_intermediates)


def square(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a config's `image_size`, which is one number or two; ValueError for anything else."""
    sides = list(size) if hasattr(size, "__iter__") else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"image_size must be one number of latent pixels or two, height and width, not {size!r}")
    return sides[0], sides[1]
