"""Where a sampler's steps lie: one choice for every sampler.

A level is a cumulative alpha a in (0, 1]; sigma = sqrt((1 - a) / a) is the same in the notation of Karras et al. 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ldm.modules.diffusionmodules.schedule import make_ddim_timesteps, usable_timesteps

TINY = 1e-20  # where a schedule ends in pure noise, a trace of signal stands for none
FAR = 0.02  # a step that leaves a smaller share of the noise goes far: eps at its ends says little of the way
RHO = 7.0  # how Karras et al. (2022, eq. 5) crowd steps towards the data


@dataclass(frozen=True)
class Schedule:
    """The steps of a run, in ascending time, as float64 host numbers.

    Step i leaves timestep `timesteps[i]`, where the cumulative alpha is `a[i]`, for the level `a_prev[i]` at timestep
    `timesteps_prev[i]`, and adds noise of standard deviation `sigma[i]`. The last level is 1 for the data itself.
    """

    timesteps: np.ndarray
    a: np.ndarray
    a_prev: np.ndarray
    sigma: np.ndarray

    def __len__(self) -> int:
        return len(self.timesteps)

    def until(self, steps: int) -> Schedule:
        """The last `steps` steps of a run, those nearest to the data."""
        return Schedule(self.timesteps[:steps], self.a[:steps], self.a_prev[:steps], self.sigma[:steps])

    def time_after(self, index: int) -> float:
        """The timestep that step `index` arrives at; 0 at the end, which no network is asked about if it is clean."""
        return float(self.timesteps[index - 1]) if index > 0 else 0.0


class Levels:
    """A model's levels at all of its timesteps, whole and between: log a is linear from each to the next."""

    def __init__(self, alphas_cumprod: np.ndarray) -> None:
        self.a = np.asarray(alphas_cumprod, np.float64)
        self._log = np.log(np.maximum(self.a, TINY))

    def __len__(self) -> int:
        return len(self.a)

    def at(self, timesteps: np.ndarray) -> np.ndarray:
        """Levels at timesteps from 0 to T - 1, which may be fractional."""
        return np.asarray(np.exp(np.interp(timesteps, np.arange(len(self.a)), self._log)))

    def time_of(self, sigma: np.ndarray | float) -> np.ndarray:
        """The timesteps at which there is so much noise, fractional: `at` inverted; the nearest end beyond the ends."""
        return np.interp(np.log1p(np.square(sigma)), -self._log, np.arange(len(self.a)))

    def sigmas(self) -> tuple[float, float]:
        """The least noise, and the most that is still finite."""
        top = self.a[-1] if self.a[-1] > TINY else self.a[-2]
        return float(sigma_of(self.a[0])), float(sigma_of(top))


def sigma_of(a: np.ndarray | float) -> np.ndarray:
    """The noise of a level as a multiple of its signal."""
    a = np.asarray(a, np.float64)
    return np.asarray(np.sqrt((1 - a) / a))


def far(a: float, a_next: float) -> bool:
    """Whether a step goes so far that eps at its ends must not be mixed: from pure noise, to data, in short runs."""
    return float(sigma_of(a_next) / sigma_of(a)) < FAR


def ddim_sigmas(a: np.ndarray | float, a_prev: np.ndarray | float, eta: float) -> np.ndarray:
    """The noise that a step from a to a_prev adds (Song et al. 2021, eq. 16)."""
    return np.asarray(eta * np.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev)))


# ---- the choices: (levels, steps) -> ascending timesteps, the last level ----

Nodes = tuple[np.ndarray, float]


def uniform(levels: Levels, steps: int) -> Nodes:
    """As DDIM was published: evenly from 1, sometimes one step more than asked for, and down to the first level."""
    return usable_timesteps(make_ddim_timesteps("uniform", steps, len(levels)), len(levels)), levels.a[0]


def quad(levels: Levels, steps: int) -> Nodes:
    """As published: quadratic up to 0.8 of the time, for few steps."""
    return usable_timesteps(make_ddim_timesteps("quad", steps, len(levels)), len(levels)), levels.a[0]


def even(levels: Levels, steps: int) -> Nodes:
    """As DPM-Solver was published: evenly from the last timestep to the first, most of them fractional."""
    return np.linspace(0, len(levels) - 1, steps + 1)[1:], levels.a[0]


def leading(levels: Levels, steps: int) -> Nodes:
    """`uniform` with as many steps as asked for, spread over all of the time whether they divide it or not."""
    if steps == len(levels):
        return np.arange(steps), 1.0
    return np.arange(steps) * len(levels) // steps + 1, levels.a[0]


def trailing(levels: Levels, steps: int) -> Nodes:
    """Evenly from the last timestep, which models trained to pure noise need, to the data (Lin et al. 2023, 3.3)."""
    return np.round(np.linspace(len(levels) / steps, len(levels), steps)) - 1, 1.0


def karras(levels: Levels, steps: int) -> Nodes:
    """Evenly in sigma^(1/7), which crowds steps at little noise (Karras et al. 2022, eq. 5), to the data."""
    low, high = (sigma ** (1 / RHO) for sigma in levels.sigmas())
    return _at_sigmas(levels, np.linspace(low, high, steps) ** RHO if steps > 1 else np.array([high**RHO]))


def exponential(levels: Levels, steps: int) -> Nodes:
    """Evenly in log sigma, to the data."""
    low, high = levels.sigmas()
    return _at_sigmas(levels, np.geomspace(low, high, steps) if steps > 1 else np.array([high]))


def _at_sigmas(levels: Levels, sigmas: np.ndarray) -> Nodes:
    timesteps = levels.time_of(sigmas)
    timesteps[-1] = len(levels) - 1  # pure noise, where the model knows it, is where a run begins
    return timesteps, 1.0


SCHEDULES: dict[str, Callable[[Levels, int], Nodes]] = {
    f.__name__: f for f in (uniform, quad, even, leading, trailing, karras, exponential)
}


def from_table(levels: Levels, steps: int, table: Sequence[float]) -> Nodes:
    """Timesteps as a table says, such as those of Sabour et al. 2024 ("Align Your Steps"), to the data.

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
    sigma = np.log(sigma_of(levels.at(given)))
    places = np.linspace(0, len(given) - 1, steps) if steps > 1 else np.array([len(given) - 1.0])
    timesteps = levels.time_of(np.exp(np.interp(places, np.arange(len(given)), sigma)))
    timesteps[-1] = given[-1]  # to the bit: log and exp, there and back, may leave a little less
    return timesteps, 1.0


def lay_out(choice: str | Sequence[float], steps: int, alphas_cumprod: np.ndarray, eta: float = 0.0) -> Schedule:
    """The schedule of `steps` steps, by a name in `SCHEDULES` or a table of timesteps; eta: see `ddim_sigmas`.

    Timesteps that the published choices repeat, for many steps, count once: from one to itself there is no step.
    ValueError for an unknown name, a table of timesteps that are none, or more steps than there are timesteps.
    """
    levels = Levels(alphas_cumprod)
    if not 1 <= steps <= len(levels):
        raise ValueError(f"the number of steps must be from 1 to {len(levels)}, not {steps}")
    if not isinstance(choice, str):
        timesteps, last = from_table(levels, steps, choice)
    elif choice in SCHEDULES:
        timesteps, last = SCHEDULES[choice](levels, steps)
    else:
        raise ValueError(f"schedule {choice!r} is not one of {', '.join(SCHEDULES)}, or a list of timesteps")
    timesteps = np.unique(timesteps)
    whole = np.equal(timesteps, np.round(timesteps)).all()
    # between timesteps a is interpolated; at them it is the model's own, and 0 only where nothing divides by it
    a = np.maximum(levels.a[timesteps.astype(int)], TINY) if whole else levels.at(timesteps)
    a_prev = np.append(last, a[:-1])
    return Schedule(timesteps, a, a_prev, ddim_sigmas(a, a_prev, eta))
