"""Noise schedules: betas, their buffers, conversions between eps, x0 and v, DDIM timesteps.

alpha_bar_t is the cumulative product `alphas_cumprod[t]` of the papers:
x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps  (Ho et al. 2020, eq. 4).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

PARAMETERIZATIONS = ("eps", "x0", "v")
MAX_TIMESTEPS = 10**6  # a config with more would exhaust memory before anything else is checked
MIN_ALPHA_BAR = 1e-20  # stands for 0 where a division by alpha_bar must stay finite


def make_beta_schedule(
    schedule: str, n_timestep: int, linear_start: float = 1e-4, linear_end: float = 2e-2, cosine_s: float = 8e-3
) -> np.ndarray:
    """Betas (n_timestep,) in float64 of a schedule by its public name.

    Args:
        schedule: "linear" (linear in sqrt(beta)), "sqrt_linear" (linear in beta), "sqrt", or "cosine", also called
            "squaredcos_cap_v2" (Nichol and Dhariwal 2021, eq. 17).

    Raises:
        ValueError: for an unknown name or numbers out of range.
    """
    if n_timestep < 1 or linear_start <= 0 or linear_end <= 0:
        given = f"{n_timestep}, {linear_start}, {linear_end}"
        raise ValueError(f"a schedule needs timesteps, linear_start and linear_end above 0, not {given}")
    if n_timestep > MAX_TIMESTEPS:
        raise ValueError(f"a schedule has at most {MAX_TIMESTEPS} timesteps, not {n_timestep}")
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, n_timestep, dtype=np.float64) ** 2
    if schedule in ("cosine", "squaredcos_cap_v2"):
        steps = np.arange(n_timestep + 1, dtype=np.float64) / n_timestep
        alpha_bar = np.cos((steps + cosine_s) / (1 + cosine_s) * np.pi / 2) ** 2
        return np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, 0.999)
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64)
    if schedule == "sqrt":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64) ** 0.5
    raise ValueError(f"beta_schedule {schedule!r} is not one of linear, cosine, squaredcos_cap_v2, sqrt_linear, sqrt")


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas (T,) whose last timestep holds no signal at all, the first unchanged (Lin et al. 2023, algorithm 1)."""
    signal = np.sqrt(np.cumprod(1.0 - np.asarray(betas, dtype=np.float64)))
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    alpha_bar = signal**2
    return 1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1])


def schedule_buffers(betas: np.ndarray, v_posterior: float = 0.0) -> dict[str, Tensor]:
    """The 12 published float32 buffers of a schedule, on the CPU whatever the default device is.

    They hold values even in a model built on the meta device, since a checkpoint need not contain them. All are finite,
    also where alpha_bar is 0.

    Args:
        betas: (T,), each in (0, 1].
        v_posterior: 0 for the posterior variance of Ho et al. 2020, eq. 7; 1 for beta_t; between, a mix.
    """
    betas = np.asarray(betas, dtype=np.float64)
    if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
        raise ValueError("betas must be a vector of numbers in (0, 1]")
    alphas = 1.0 - betas
    alpha_bar = np.cumprod(alphas)
    alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
    variance = (1 - v_posterior) * betas * (1.0 - alpha_bar_prev) / (1.0 - alpha_bar) + v_posterior * betas
    values = {
        "betas": betas,
        **alphas_cumprod_buffers(alpha_bar),
        "posterior_variance": variance,
        # The variance is 0 at t = 0, so its logarithm is clipped.
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(alpha_bar_prev) / (1.0 - alpha_bar),
        "posterior_mean_coef2": (1.0 - alpha_bar_prev) * np.sqrt(alphas) / (1.0 - alpha_bar),
    }
    return {name: torch.tensor(value, dtype=torch.float32, device="cpu") for name, value in values.items()}


def alphas_cumprod_buffers(alphas_cumprod: np.ndarray) -> dict[str, np.ndarray]:
    """The seven published buffers that follow from alphas_cumprod (T,), in float64."""
    reciprocal = 1.0 / np.maximum(alphas_cumprod, MIN_ALPHA_BAR)
    return {
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": np.append(1.0, alphas_cumprod[:-1]),
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - alphas_cumprod),
        "log_one_minus_alphas_cumprod": np.log(1.0 - alphas_cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(reciprocal),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(reciprocal - 1),
    }


def vlb_weights(buffers: dict[str, Tensor], parameterization: str) -> Tensor:
    """Weight (T,) of each timestep's squared error in the variational bound (Ho et al. 2020, eq. 12)."""
    betas, alpha_bar = buffers["betas"].double(), buffers["alphas_cumprod"].double()
    if parameterization == "x0":
        # Public code has 2 * 1 - alpha_bar, not 2 * (1 - alpha_bar); losses are compared between code bases.
        weights = 0.5 * alpha_bar.sqrt() / (2.0 * 1 - alpha_bar)
    elif parameterization == "eps":
        weights = betas**2 / (2 * buffers["posterior_variance"].double() * (1 - betas) * (1 - alpha_bar))
        weights[0] = weights[1] if len(weights) > 1 else 1.0  # the posterior variance at t = 0 is zero
    elif parameterization == "v":
        weights = torch.ones_like(betas)
    else:
        raise ValueError(f"parameterization {parameterization!r} is not one of {', '.join(PARAMETERIZATIONS)}")
    return weights.float()


def min_snr_weights(alphas_cumprod: Tensor, gamma: float, parameterization: str) -> Tensor:
    """Min-SNR loss weight (T,) of each timestep (Hang et al. 2023).

    min(SNR, gamma) for x0, divided by SNR for eps and by SNR + 1 for v.
    """
    if gamma <= 0:
        raise ValueError(f"min_snr_gamma must be above 0 (the paper uses 5), not {gamma}")
    alpha_bar = alphas_cumprod.double()
    snr = alpha_bar / (1 - alpha_bar)
    if parameterization == "eps":
        weights = (gamma / snr).clamp(max=1.0)  # defined where SNR is 0, too
    elif parameterization == "x0":
        weights = snr.clamp(max=gamma)
    elif parameterization == "v":
        weights = snr.clamp(max=gamma) / (snr + 1)
    else:
        raise ValueError(f"parameterization {parameterization!r} is not one of {', '.join(PARAMETERIZATIONS)}")
    return weights.float()


def extract_into_tensor(a: Tensor, t: Tensor, x_shape: torch.Size | tuple[int, ...]) -> Tensor:
    """a[t] for t (B,), reshaped to (B, 1, 1, ...) to broadcast over a tensor of `x_shape`."""
    return a.gather(-1, t).reshape(t.shape[0], *(1,) * (len(x_shape) - 1))


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False) -> Tensor:
    """Sinusoidal embedding (B, dim) of timesteps (B,), which may be fractional: cosines, then sines.

    repeat_only: repeat the timestep itself `dim` times instead.
    """
    if repeat_only:
        return timesteps[:, None].expand(-1, dim).float()
    angles = timesteps[:, None].float() * _frequencies(dim // 2, max_period, timesteps.device)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))


_FREQUENCIES: dict[tuple[int, float, torch.device], Tensor] = {}


def _frequencies(count: int, max_period: float, device: torch.device) -> Tensor:
    """Angular frequencies (count,) from 1 to about 1 / max_period.

    Computed on the CPU so that every device has the same, and cached, since the host waits for a copy to a device.
    """
    key = (count, max_period, device)
    if key not in _FREQUENCIES:
        exponents = torch.arange(count, dtype=torch.float32, device="cpu")
        _FREQUENCIES[key] = torch.exp(-math.log(max_period) * exponents / count).to(device)
    return _FREQUENCIES[key]


def make_ddim_timesteps(
    ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int, verbose: bool = True
) -> np.ndarray:
    """Ascending int64 timesteps of a shortened schedule, "uniform" or "quad".

    The public spacing: "uniform" gives a few more steps than requested where the count does not divide (30 gives 31),
    and its last entry can be `num_ddpm_timesteps` itself, one past the end, where the public code crashes; see
    `usable_timesteps`.
    """
    if not 1 <= num_ddim_timesteps <= num_ddpm_timesteps:
        raise ValueError(f"the number of steps must be from 1 to {num_ddpm_timesteps}, not {num_ddim_timesteps}")
    if ddim_discr_method == "uniform":
        steps = np.arange(0, num_ddpm_timesteps, num_ddpm_timesteps // num_ddim_timesteps)
    elif ddim_discr_method == "quad":
        steps = (np.linspace(0, np.sqrt(num_ddpm_timesteps * 0.8), num_ddim_timesteps) ** 2).astype(np.int64)
    else:
        raise ValueError(f"ddim_discretize {ddim_discr_method!r} is not one of uniform, quad")
    return steps.astype(np.int64) + 1


def usable_timesteps(timesteps: np.ndarray, num_ddpm_timesteps: int) -> np.ndarray:
    """`timesteps` with an entry past the end of the schedule moved to its last index."""
    return np.minimum(timesteps, num_ddpm_timesteps - 1)


def make_ddim_sampling_parameters(
    alphacums: np.ndarray | Tensor, ddim_timesteps: np.ndarray, eta: float, verbose: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sigmas, alphas, alphas_prev) at `ddim_timesteps`, in float64.

    The last step ends at `alphas_prev[0] = alphacums[0]`, not at 1, as in the public code.
    """
    alphacums = np.asarray(alphacums, dtype=np.float64)
    alphas = np.maximum(alphacums[usable_timesteps(ddim_timesteps, len(alphacums))], MIN_ALPHA_BAR)
    alphas_prev = np.append(alphacums[0], alphas[:-1])
    return ddim_sigmas(alphas, alphas_prev, eta), alphas, alphas_prev


def ddim_sigmas(alphas: np.ndarray | float, alphas_prev: np.ndarray | float, eta: float) -> np.ndarray:
    """Standard deviation of the noise of steps from `alphas` to `alphas_prev` (Song et al. 2021, eq. 16)."""
    return np.asarray(eta * np.sqrt((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev)))


def sqrt(value: float | Tensor) -> Any:
    """Square root of a number or a tensor; rounding below 0 counts as 0."""
    return value.clamp(min=0).sqrt() if isinstance(value, Tensor) else math.sqrt(max(value, 0.0))


def eps_and_x0(output: Tensor, x: Tensor, alpha_bar: float | Tensor, parameterization: str) -> tuple[Tensor, Tensor]:
    """Convert a model's `output` for x_t = `x` to (eps, x0).

    v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans and Ho 2022, appendix D).

    Args:
        alpha_bar: a number, or a tensor that broadcasts to x.
    """
    signal, noise = sqrt(alpha_bar), sqrt(1 - alpha_bar)
    if parameterization == "eps":
        return output, (x - noise * output) / signal
    if parameterization == "x0":
        return (x - signal * output) / noise, output
    if parameterization == "v":
        return signal * output + noise * x, signal * x - noise * output
    raise ValueError(f"parameterization {parameterization!r} is not one of {', '.join(PARAMETERIZATIONS)}")


def output_of(x0: Tensor, x: Tensor, alpha_bar: float | Tensor, parameterization: str) -> Tensor:
    """The model output that predicts `x0` for x_t = `x`: the inverse of `eps_and_x0`."""
    signal, noise = sqrt(alpha_bar), sqrt(1 - alpha_bar)
    if parameterization == "x0":
        return x0
    eps = (x - signal * x0) / noise
    if parameterization == "eps":
        return eps
    if parameterization == "v":
        return signal * eps - noise * x0
    raise ValueError(f"parameterization {parameterization!r} is not one of {', '.join(PARAMETERIZATIONS)}")
