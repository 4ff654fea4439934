"""Sampling schedules: which timesteps a sampler visits.

Noise levels come in three notations: alpha_bar (alphas_cumprod) in (0, 1], sigma = sqrt((1 - alpha_bar) / alpha_bar)
of Karras et al. 2022, and lambda = -log(sigma), half the log signal-to-noise ratio of Lu et al. 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ldm.modules.diffusionmodules.schedule import MIN_ALPHA_BAR, ddim_sigmas, make_ddim_timesteps, usable_timesteps

LONG_STEP = 0.02  # a step that leaves less than this fraction of sigma is too long to average eps over
RHO = 7.0  # Karras et al. 2022, eq. 5
FEW_STEPS = 15  # below this many steps multi-step solvers end in lower orders, which is more stable (Lu et al. 2022)

ScheduleChoice = str | Sequence[float]  # a name in `SCHEDULES`, or a list of timesteps


class Step(NamedTuple):
    """One step of a schedule, from timestep t down to t_prev; `remaining` more steps follow."""

    remaining: int
    t: float
    t_prev: float  # 0 at the last step
    alpha_bar: float
    alpha_bar_prev: float
    ddim_sigma: float  # standard deviation of the noise that DDIM adds


@dataclass(frozen=True)
class Schedule:
    """The steps of a sampling run as float64 numbers on the host, in ascending time.

    Entry i goes from `timesteps[i]`, at noise level `alphas_cumprod[i]`, to `alphas_cumprod_prev[i]`, and DDIM adds
    noise of standard deviation `ddim_sigmas[i]`. `alphas_cumprod_prev[0]` is 1 if the run ends at clean data.
    """

    timesteps: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    ddim_sigmas: np.ndarray

    def __len__(self) -> int:
        return len(self.timesteps)

    def until(self, steps: int) -> Schedule:
        """The last `steps` steps of the run, those nearest to the data."""
        columns = (self.timesteps, self.alphas_cumprod, self.alphas_cumprod_prev, self.ddim_sigmas)
        return Schedule(*(column[:steps] for column in columns))

    def steps(self) -> Iterator[Step]:
        """The steps in the order of sampling, from noise to data."""
        timesteps_prev = np.append(0.0, self.timesteps[:-1])
        columns = (self.timesteps, timesteps_prev, self.alphas_cumprod, self.alphas_cumprod_prev, self.ddim_sigmas)
        rows = list(zip(*(column.tolist() for column in columns)))
        return (Step(i, *rows[i]) for i in reversed(range(len(self))))


class NoiseLevels:
    """A model's noise level at every timestep, and between them: log alpha_bar is interpolated linearly."""

    def __init__(self, alphas_cumprod: np.ndarray) -> None:
        self.alphas_cumprod = np.asarray(alphas_cumprod, np.float64)
        self._log = np.log(np.maximum(self.alphas_cumprod, MIN_ALPHA_BAR))

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def alpha_bar_at(self, timesteps: np.ndarray) -> np.ndarray:
        """alpha_bar at timesteps from 0 to T - 1, which may be fractional."""
        return np.asarray(np.exp(np.interp(timesteps, np.arange(len(self)), self._log)))

    def sigma_to_t(self, sigma: np.ndarray | float) -> np.ndarray:
        """The fractional timesteps of noise levels `sigma`, clamped to the schedule: the inverse of `alpha_bar_at`."""
        return np.interp(np.log1p(np.square(sigma)), -self._log, np.arange(len(self)))

    def sigma_range(self) -> tuple[float, float]:
        """The lowest sigma, and the highest that is finite."""
        last = self.alphas_cumprod[-1] if self.alphas_cumprod[-1] > MIN_ALPHA_BAR else self.alphas_cumprod[-2]
        return float(sigma_from_alpha_bar(self.alphas_cumprod[0])), float(sigma_from_alpha_bar(last))


def sigma_from_alpha_bar(alpha_bar: np.ndarray | float) -> np.ndarray:
    """sigma = sqrt((1 - alpha_bar) / alpha_bar)."""
    alpha_bar = np.asarray(alpha_bar, np.float64)
    return np.asarray(np.sqrt((1 - alpha_bar) / alpha_bar))


def log_snr(alpha_bar: float) -> float:
    """lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)), half the log signal-to-noise ratio."""
    return 0.5 * (math.log(alpha_bar) - math.log1p(-alpha_bar))


def is_long_step(alpha_bar: float, alpha_bar_prev: float) -> bool:
    """Whether eps must not be averaged over a step: from pure noise, to the data, or in very short runs."""
    return float(sigma_from_alpha_bar(alpha_bar_prev) / sigma_from_alpha_bar(alpha_bar)) < LONG_STEP


# ---- schedules: (noise levels, steps) -> ascending timesteps, alpha_bar where the run ends ----

Timesteps = tuple[np.ndarray, float]


def uniform(levels: NoiseLevels, steps: int) -> Timesteps:
    """Published DDIM: evenly spaced from 1, sometimes one step more than requested, down to the first timestep."""
    timesteps = make_ddim_timesteps("uniform", steps, len(levels))
    return usable_timesteps(timesteps, len(levels)), levels.alphas_cumprod[0]


def quad(levels: NoiseLevels, steps: int) -> Timesteps:
    """Published DDIM: quadratic up to 0.8 T, for few steps."""
    return usable_timesteps(make_ddim_timesteps("quad", steps, len(levels)), len(levels)), levels.alphas_cumprod[0]


def even(levels: NoiseLevels, steps: int) -> Timesteps:
    """Published DPM-Solver: evenly spaced from the last timestep to the first, most of them fractional.

    Like `timestep_spacing="linspace"` of diffusers, which rounds them.
    """
    return np.linspace(0, len(levels) - 1, steps + 1)[1:], levels.alphas_cumprod[0]


def leading(levels: NoiseLevels, steps: int) -> Timesteps:
    """`uniform` with exactly the requested number of steps, spread over all timesteps.

    Like `timestep_spacing="leading"` with `steps_offset=1` of diffusers, which spaces them by a rounded-down number.
    """
    if steps == len(levels):
        return np.arange(steps), 1.0
    return np.arange(steps) * len(levels) // steps + 1, levels.alphas_cumprod[0]


def trailing(levels: NoiseLevels, steps: int) -> Timesteps:
    """Evenly from the last timestep, as models with zero terminal SNR need, to the data (Lin et al. 2023, 3.3).

    Like `timestep_spacing="trailing"` of diffusers.
    """
    return np.round(np.linspace(len(levels) / steps, len(levels), steps)) - 1, 1.0


def karras(levels: NoiseLevels, steps: int) -> Timesteps:
    """Evenly in sigma^(1/7), to the data (Karras et al. 2022, eq. 5)."""
    low, high = (sigma ** (1 / RHO) for sigma in levels.sigma_range())
    return _at_sigmas(levels, np.linspace(low, high, steps) ** RHO if steps > 1 else np.array([high**RHO]))


def exponential(levels: NoiseLevels, steps: int) -> Timesteps:
    """Evenly in log sigma, to the data."""
    low, high = levels.sigma_range()
    return _at_sigmas(levels, np.geomspace(low, high, steps) if steps > 1 else np.array([high]))


def _at_sigmas(levels: NoiseLevels, sigmas: np.ndarray) -> Timesteps:
    timesteps = levels.sigma_to_t(sigmas)
    timesteps[-1] = len(levels) - 1  # a model with zero terminal SNR starts at pure noise, whose sigma is infinite
    return timesteps, 1.0


SCHEDULES: dict[str, Callable[[NoiseLevels, int], Timesteps]] = {
    f.__name__: f for f in (uniform, quad, even, leading, trailing, karras, exponential)
}


def from_table(levels: NoiseLevels, steps: int, table: Sequence[float]) -> Timesteps:
    """Timesteps from a table, such as those of Sabour et al. 2024 ("Align Your Steps"), to the data.

    For another number of steps than the table's, log sigma is interpolated, as they do.
    """
    given = np.sort(np.asarray(table, np.float64))
    if given.ndim != 1 or not len(given) or len(np.unique(given)) < len(given):
        raise ValueError(f"a schedule is a list of different timesteps, not {list(table)}")
    if given[0] < 0 or given[-1] > len(levels) - 1:
        raise ValueError(f"timesteps are from 0 to {len(levels) - 1}, not {given[0]:g} to {given[-1]:g}")
    if len(given) == steps:
        return given, 1.0
    if len(given) < 2:
        raise ValueError(f"a schedule of one timestep is for one step, not for {steps}")
    log_sigmas = np.log(sigma_from_alpha_bar(levels.alpha_bar_at(given)))
    positions = np.linspace(0, len(given) - 1, steps) if steps > 1 else np.array([len(given) - 1.0])
    timesteps = levels.sigma_to_t(np.exp(np.interp(positions, np.arange(len(given)), log_sigmas)))
    timesteps[-1] = given[-1]  # exactly: the way over logarithms may round it down
    return timesteps, 1.0


def make_schedule(choice: ScheduleChoice, steps: int, alphas_cumprod: np.ndarray, eta: float = 0.0) -> Schedule:
    """The schedule of a sampling run.

    Args:
        choice: a name in `SCHEDULES`, or a list of timesteps.
        steps: the number of steps. "uniform" and "quad" may give more or fewer; duplicate timesteps are dropped.
        alphas_cumprod: the model's, (T,).
        eta: DDIM's noise, see `ddim_sigmas`.

    Raises:
        ValueError: for an unknown name, timesteps out of range, or more steps than timesteps.
    """
    levels = NoiseLevels(alphas_cumprod)
    if not 1 <= steps <= len(levels):
        raise ValueError(f"the number of steps must be from 1 to {len(levels)}, not {steps}")
    if not isinstance(choice, str):
        timesteps, final = from_table(levels, steps, choice)
    elif choice in SCHEDULES:
        timesteps, final = SCHEDULES[choice](levels, steps)
    else:
        raise ValueError(f"schedule {choice!r} is not one of {', '.join(SCHEDULES)}, or a list of timesteps")
    timesteps = np.unique(timesteps)
    if np.equal(timesteps, np.round(timesteps)).all():  # take the model's own levels exactly
        alphas = np.maximum(levels.alphas_cumprod[timesteps.astype(int)], MIN_ALPHA_BAR)
    else:
        alphas = levels.alpha_bar_at(timesteps)
    alphas_prev = np.append(final, alphas[:-1])
    return Schedule(timesteps, alphas, alphas_prev, ddim_sigmas(alphas, alphas_prev, eta))


def original_schedule(alphas_cumprod: np.ndarray, eta: float = 0.0) -> Schedule:
    """Every timestep of the model, ending at clean data."""
    alphas = np.maximum(alphas_cumprod, MIN_ALPHA_BAR)
    alphas_prev = np.append(1.0, alphas[:-1])
    return Schedule(np.arange(len(alphas)), alphas, alphas_prev, ddim_sigmas(alphas, alphas_prev, eta))
