"""Schedule maths: betas, the buffers made of them, eps / x0 / v conversions, DDIM timesteps. torch and numpy only.

Notation follows the papers: a_t is the cumulative product `alphas_cumprod[t]`, and
x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps  (Ho et al. 2020, eq. 4).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

PARAMETERIZATIONS = ("eps", "x0", "v")


MAX_TIMESTEPS = 10**6  # a thousand times the public ones; tables of them are made before anything else


def make_beta_schedule(
    schedule: str,
    n_timestep: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> np.ndarray:
    """Betas (n_timestep,) in float64 of the schedule called "linear", "cosine", "sqrt_linear" or "sqrt".

    The names are the public ones: "linear" is linear in sqrt(beta), and "sqrt_linear" is linear in beta.
    "cosine" is Nichol and Dhariwal 2021, eq. 17, and "squaredcos_cap_v2" another public name of it.
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
        a = np.cos((steps + cosine_s) / (1 + cosine_s) * np.pi / 2) ** 2
        return np.clip(1 - a[1:] / a[:-1], 0, 0.999)
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64)
    if schedule == "sqrt":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64) ** 0.5
    raise ValueError(f"beta_schedule {schedule!r} is not one of linear, cosine, squaredcos_cap_v2, sqrt_linear, sqrt")


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas (T,) whose last timestep holds no signal at all, the first unchanged (Lin et al. 2023, algorithm 1)."""
    signal = np.sqrt(np.cumprod(1.0 - np.asarray(betas, dtype=np.float64)))
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    a = signal**2
    return 1.0 - a / np.append(1.0, a[:-1])


def schedule_buffers(betas: np.ndarray, v_posterior: float = 0.0) -> dict[str, Tensor]:
    """The 12 published float32 buffers of a schedule, on the CPU whatever the default device is.

    They are real even in a model that is built on the meta device, since a checkpoint need not hold them. All are
    finite, also where a_t is 0: then 1 / a_t is that of 1e-20, for nothing can ask what signal there was.
    v_posterior: 0 is the true posterior variance of Ho et al. 2020, eq. 7; 1 is beta_t; between, a mix.
    """
    betas = np.asarray(betas, dtype=np.float64)
    if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
        raise ValueError("betas must be a vector of numbers in (0, 1]")
    alphas = 1.0 - betas
    a = np.cumprod(alphas)
    a_prev = np.append(1.0, a[:-1])
    recip = 1.0 / np.maximum(a, 1e-20)
    variance = (1 - v_posterior) * betas * (1.0 - a_prev) / (1.0 - a) + v_posterior * betas
    values = {
        "betas": betas,
        "alphas_cumprod": a,
        "alphas_cumprod_prev": a_prev,
        "sqrt_alphas_cumprod": np.sqrt(a),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - a),
        "log_one_minus_alphas_cumprod": np.log(1.0 - a),
        "sqrt_recip_alphas_cumprod": np.sqrt(recip),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(recip - 1),
        "posterior_variance": variance,
        # The variance is 0 at t = 0, so its logarithm is clipped.
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(a_prev) / (1.0 - a),
        "posterior_mean_coef2": (1.0 - a_prev) * np.sqrt(alphas) / (1.0 - a),
    }
    return {name: torch.tensor(value, dtype=torch.float32, device="cpu") for name, value in values.items()}


def vlb_weights(buffers: dict[str, Tensor], parameterization: str) -> Tensor:
    """Weight (T,) of every timestep's squared error in the variational bound (Ho et al. 2020, eq. 12)."""
    betas, a = buffers["betas"].double(), buffers["alphas_cumprod"].double()
    if parameterization == "x0":
        # Published as 2 * 1 - a, not 2 * (1 - a); kept, since losses are compared between code bases.
        weights = 0.5 * a.sqrt() / (2.0 * 1 - a)
    elif parameterization == "eps":
        weights = betas**2 / (2 * buffers["posterior_variance"].double() * (1 - betas) * (1 - a))
        weights[0] = weights[1] if len(weights) > 1 else 1.0  # the posterior variance at t = 0 is zero
    elif parameterization == "v":
        weights = torch.ones_like(betas)
    else:
        raise ValueError(f"parameterization {parameterization!r} is not one of {', '.join(PARAMETERIZATIONS)}")
    return weights.float()


def min_snr_weights(alphas_cumprod: Tensor, gamma: float, parameterization: str) -> Tensor:
    """Weight (T,) of every timestep's loss that caps the signal-to-noise ratio at `gamma` (Hang et al. 2023).

    min(SNR, gamma) is the weight of an error in x0; an error in eps is worth 1 / SNR of that, one in v 1 / (SNR + 1).
    """
    if gamma <= 0:
        raise ValueError(f"min_snr_gamma must be above 0 (the paper uses 5), not {gamma}")
    a = alphas_cumprod.double()
    snr = a / (1 - a)
    if parameterization == "eps":
        weights = (gamma / snr).clamp(max=1.0)  # defined where SNR is 0, too
    elif parameterization == "x0":
        weights = snr.clamp(max=gamma)
    elif parameterization == "v":
        weights = snr.clamp(max=gamma) / (snr + 1)
    else:
        raise ValueError(f"parameterization {parameterization!r} is not one of {', '.join(PARAMETERIZATIONS)}")
    return weights.float()


def extract_into_tensor(values: Tensor, t: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """`values[t]` for t (B,), shaped (B, 1, 1, ...) so that it broadcasts over a tensor of `shape`."""
    return values.gather(-1, t).reshape(t.shape[0], *(1,) * (len(shape) - 1))


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False) -> Tensor:
    """Sinusoidal embedding (B, dim) of timesteps (B,), which may be fractional: cosines first, then sines.

    repeat_only: no sinusoids, the timestep itself `dim` times.
    """
    if repeat_only:
        return timesteps[:, None].expand(-1, dim).float()
    angles = timesteps[:, None].float() * _frequencies(dim // 2, max_period, timesteps.device)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))


_KNOWN: dict[tuple[int, float, torch.device], Tensor] = {}


def _frequencies(count: int, max_period: float, device: torch.device) -> Tensor:
    """Angular frequencies (count,) from 1 to about 1 / max_period.

    Worked out on the CPU, in the public order of operations, so that every device sees the same; and kept, since a copy
    to a device has the host wait for it.
    """
    key = (count, max_period, device)
    if key not in _KNOWN:
        places = torch.arange(count, dtype=torch.float32, device="cpu")
        _KNOWN[key] = torch.exp(-math.log(max_period) * places / count).to(device)
    return _KNOWN[key]


def make_ddim_timesteps(
    ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int, verbose: bool = False
) -> np.ndarray:
    """Ascending int64 timesteps of a shortened schedule, "uniform" or "quad".

    The public spacing, quirks included: "uniform" gives a few more steps than asked where the count does not divide
    (30 gives 31), and its last entry can be `num_ddpm_timesteps` itself, one past the end. Users of the table clamp
    that entry (`usable_timesteps`), where the public code crashed.
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
    """`timesteps` with the entry one past the end of the schedule, where there is one, moved to its last index."""
    return np.minimum(timesteps, num_ddpm_timesteps - 1)


def make_ddim_sampling_parameters(
    alphacums: np.ndarray, ddim_timesteps: np.ndarray, eta: float, verbose: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sigmas, alphas, alphas_prev) at `ddim_timesteps`, float64 (Song et al. 2021, eq. 16).

    `alphas_prev[0]` is `alphacums[0]`, not 1, as published.
    """
    alphacums = np.asarray(alphacums, dtype=np.float64)
    alphas = alphacums[usable_timesteps(ddim_timesteps, len(alphacums))]
    alphas_prev = np.append(alphacums[0], alphas[:-1])
    sigmas = eta * np.sqrt((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev))
    return sigmas, alphas, alphas_prev


def eps_and_x0(output: Tensor, x: Tensor, a: float | Tensor, parameterization: str) -> tuple[Tensor, Tensor]:
    """What a network's `output` at noise level `a` (a number, or broadcastable to x) says about x_t = `x`.

    Returns (eps, x0). For v = sqrt(a) eps - sqrt(1 - a) x0 see Salimans and Ho 2022, appendix D.
    """
    signal, noise = (s.sqrt() if isinstance(s, Tensor) else math.sqrt(s) for s in (a, 1 - a))
    if parameterization == "eps":
        return output, (x - noise * output) / signal
    if parameterization == "x0":
        return (x - signal * output) / noise, output
    if parameterization == "v":
        return signal * output + noise * x, signal * x - noise * output
    raise ValueError(f"parameterization {parameterization!r} is not one of {', '.join(PARAMETERIZATIONS)}")


def output_of(x0: Tensor, x: Tensor, a: float, parameterization: str) -> Tensor:
    """What a network would have to say of x_t = `x` at level `a` to mean `x0`: the inverse of `eps_and_x0`."""
    signal, noise = math.sqrt(a), math.sqrt(1 - a)
    if parameterization == "x0":
        return x0
    eps = (x - signal * x0) / noise
    if parameterization == "eps":
        return eps
    if parameterization == "v":
        return signal * eps - noise * x0
    raise ValueError(f"parameterization {parameterization!r} is not one of {', '.join(PARAMETERIZATIONS)}")
