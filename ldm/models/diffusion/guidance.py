"""Guidance: how predictions under several conditions become one. Its only home; samplers do not know it exists.

A term of guidance is a function (output, branches, strength) -> output. Register another one as `rescale` below is, and
the scripts take it: `--guidance name=strength`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.modules.diffusionmodules.schedule import eps_and_x0, output_of

Condition = Any  # a tensor, a list of tensors, or a dict of lists: c_concat, c_crossattn, and c_adm as a tensor


def join_conditions(first: Condition, second: Condition) -> Condition:
    """One batch of two conditions of the same structure: `first` on top of `second`.

    Tensors (or what they hold: lists and dicts of them, to any depth) are concatenated along the batch axis.
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        if first.keys() != second.keys():
            raise ValueError(f"conditions differ in their entries: {sorted(first)} and {sorted(second)}")
        return {name: join_conditions(first[name], second[name]) for name in first}
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        if len(first) != len(second):
            raise ValueError(f"conditions differ in length: {len(first)} and {len(second)}")
        return [join_conditions(a, b) for a, b in zip(first, second)]
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape[1:] != second.shape[1:]:
            raise ValueError(f"conditions differ in shape: {tuple(first.shape)} and {tuple(second.shape)}")
        return torch.cat([first, second])
    raise ValueError(f"cannot join conditions of types {type(first).__name__} and {type(second).__name__}")


def condition_batch_size(cond: Condition) -> int | None:
    """The batch size of a condition, or None where it holds no tensor."""
    if isinstance(cond, Tensor):
        return cond.shape[0]
    entries: Sequence[Any] = list(cond.values()) if isinstance(cond, Mapping) else cond or ()
    sizes = [condition_batch_size(entry) for entry in entries if not isinstance(entry, str)]
    return next((size for size in sizes if size is not None), None)


# ---- what guidance is made from ----


@dataclass(frozen=True)
class Network:
    """A network and the conditions to ask it under; parameterization: what it predicts.

    perturbed: a context in which its self-attention in the middle sees each place alone. one_by_one: ask it under one
    condition after the other where both are wanted, which takes less memory than both as one batch.
    """

    apply_model: Callable[[Tensor, Tensor, Condition], Tensor]
    cond: Condition
    uncond: Condition = None
    parameterization: str = "eps"
    perturbed: Callable[[], AbstractContextManager[Any]] | None = None
    one_by_one: bool = False

    @cached_property
    def both(self) -> Condition:
        """Both conditions as one batch: [unconditional, conditional], as published."""
        return join_conditions(self.uncond, self.cond)


class Branches:
    """What a network says of x (B, ...) at timesteps t (B,) and level a, under each condition; asked once for each."""

    def __init__(self, network: Network, x: Tensor, t: Tensor, a: float) -> None:
        self.network, self.x, self.t, self.a = network, x, t, a
        self._known: dict[str, Tensor] = {}

    def pair(self) -> tuple[Tensor, Tensor]:
        """The outputs without and with the condition, from one batch or `one_by_one`. ValueError without both."""
        if self.network.uncond is None:
            raise ValueError("this guidance leads away from an unconditional prediction, and there is none here")
        if "uncond" not in self._known and self.network.one_by_one:
            self._known["uncond"] = self.network.apply_model(self.x, self.t, self.network.uncond)
        elif "uncond" not in self._known:
            out = self.network.apply_model(torch.cat([self.x, self.x]), torch.cat([self.t, self.t]), self.network.both)
            self._known["uncond"], self._known["cond"] = out.chunk(2)
        return self._known["uncond"], self.cond()

    def cond(self) -> Tensor:
        """The output with the condition."""
        if "cond" not in self._known:
            self._known["cond"] = self.network.apply_model(self.x, self.t, self.network.cond)
        return self._known["cond"]

    def perturbed(self) -> Tensor:
        """The output with the condition, and with self-attention that sees each place alone."""
        if "perturbed" not in self._known:
            if self.network.perturbed is None:
                raise ValueError("perturbed-attention guidance needs a network with self-attention in its middle")
            with self.network.perturbed():
                self._known["perturbed"] = self.network.apply_model(self.x, self.t, self.network.cond)
        return self._known["perturbed"]


# ---- terms ----


class Term(NamedTuple):
    """A term of guidance: `apply` gives the new output for (output, branches, strength).

    corrects: it only undoes what other guidance overdoes. low, high: between which its strength lies.
    """

    apply: Callable[[Tensor, Branches, float], Tensor]
    corrects: bool = False
    low: float = -math.inf
    high: float = math.inf


TERMS: dict[str, Term] = {}


def register(name: str, **about: Any) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a term known as `name`; `about` as in `Term`."""

    def _register(apply: Callable[..., Tensor]) -> Callable[..., Tensor]:
        TERMS[name] = Term(apply, **about)
        return apply

    return _register


@register("pag")
def perturbed_attention(output: Tensor, branches: Branches, strength: float) -> Tensor:
    """Leads away from a network whose self-attention in the middle is the identity (Ahn et al. 2024, eq. 15)."""
    return output + strength * (branches.cond() - branches.perturbed())


@register("rescale", corrects=True, low=0, high=1)
def rescale(output: Tensor, branches: Branches, strength: float) -> Tensor:
    """Brings the output's spread back to that of the conditional one (Lin et al. 2023, eq. 15 and 16)."""
    axes = tuple(range(1, output.ndim))
    cond = branches.cond()
    rescaled = output * (cond.std(dim=axes, keepdim=True) / output.std(dim=axes, keepdim=True))
    return strength * rescaled + (1 - strength) * output


@register("threshold", corrects=True, low=0.5, high=1)
def dynamic_threshold(output: Tensor, branches: Branches, strength: float) -> Tensor:
    """Clips x0 to [-s, s] and scales it by u / s, s = max(p, u), where p is a percentile of x0's magnitudes.

    So do Saharia et al. 2022 (section 2.3) with u = 1, the range of pixels. Latents have no such range: u is here the
    same percentile of the conditional x0, in pixels too, so that nothing ends up beyond what it would be unguided.
    strength: the percentile as a share, such as 0.995.
    """
    x, a, kind = branches.x, branches.a, branches.network.parameterization
    _, x0 = eps_and_x0(output, x, a, kind)
    _, own = eps_and_x0(branches.cond(), x, a, kind)
    unit = _percentile(own, strength)
    bound = torch.maximum(_percentile(x0, strength), unit)
    return output_of(x0.clamp(-bound, bound) * (unit / bound), x, a, kind)


def _percentile(x: Tensor, share: float) -> Tensor:
    """The least magnitude (B, 1, ...) in x (B, ...) that a share of its magnitudes does not exceed."""
    magnitudes = x.flatten(1).abs().float()  # torch.quantile refuses more than 2^24 numbers
    bound = magnitudes.sort(dim=1).values[:, math.ceil(share * magnitudes.shape[1]) - 1]
    return bound.clamp(min=1e-6).to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


# ---- guidance ----

CFG_PP_SCALE = 0.6  # what Chung et al. find to go as far as a scale of 7.5 without CFG++


class Answer(NamedTuple):
    """A guided output, and the one whose eps leads on from its x0, if that is another (CFG++)."""

    output: Tensor
    onward: Tensor | None = None


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2021), uncond + scale * (cond - uncond), and what goes with it.

    scale: 1 for none; or several that a run goes through evenly, from its first step to its last. interval: (low, high)
    in sigma = noise / signal, without any guidance outside of it (Kynkaanniemi et al. 2024). cfg_pp: CFG++ (Chung et
    al. 2024): x0 is guided, at scales from 0 to 1, and the step goes on along the unconditional eps. terms: strengths
    of `TERMS` by their names, or pairs; one after the other, those that correct others last.

    ValueError for what has no meaning, or none together.
    """

    scale: float | Sequence[float] = 1.0
    interval: Sequence[float] | None = None
    cfg_pp: bool = False
    terms: Mapping[str, float] | Sequence[tuple[str, float]] = ()

    def __post_init__(self) -> None:
        terms, scales = dict(self.terms), self._scales
        if unknown := [name for name in terms if name not in TERMS]:
            raise ValueError(f"guidance {unknown[0]!r} is not one of {', '.join(TERMS)}")
        for name, strength in terms.items():
            if not TERMS[name].low <= strength <= TERMS[name].high:
                raise ValueError(f"guidance {name} is from {TERMS[name].low} to {TERMS[name].high}, not {strength}")
        if not scales or not all(math.isfinite(number) for number in (*scales, *terms.values())):
            raise ValueError(f"guidance is in finite numbers, not scale={self.scale} with {terms}")
        if self.interval is not None and not (len(self.interval) == 2 and 0 <= self.interval[0] < self.interval[1]):
            raise ValueError(f"a guidance interval is a low and a high sigma, from 0 up, not {tuple(self.interval)}")
        if self.cfg_pp:
            self._check_plus_plus(terms, scales)
        elif not self.needs_uncond:
            self._check_without_scale(terms)

    def _check_plus_plus(self, terms: Mapping[str, float], scales: Sequence[float]) -> None:
        if wrong := [scale for scale in scales if not 0 <= scale <= 1]:
            raise ValueError(f"CFG++ takes scales from 0 to 1 ({CFG_PP_SCALE} is usual), not {wrong[0]:g}")
        if self.interval:
            raise ValueError("CFG++ goes along the unconditional noise in every step: leave the interval out")
        if "rescale" in terms:
            raise ValueError("CFG++ stays between two predictions, so there is nothing to rescale: leave rescale out")
        if "pag" in terms:
            raise ValueError("CFG++ stays between two predictions, and pag leads away from both: leave one of them out")

    def _check_without_scale(self, terms: Mapping[str, float]) -> None:
        leading = [name for name in terms if not TERMS[name].corrects]
        if terms and not leading:
            name = next(iter(terms))
            raise ValueError(f"{name} corrects what guidance overdoes, and at scale 1 there is none: leave {name} out")
        if self.interval and not leading:
            raise ValueError("an interval limits guidance, and at scale 1 there is none: leave the interval out")

    @property
    def _scales(self) -> Sequence[float]:
        return [self.scale] if isinstance(self.scale, (int, float)) else list(self.scale)

    @property
    def needs_uncond(self) -> bool:
        """Whether the network is to be asked without the condition, too."""
        return self.cfg_pp or any(scale != 1.0 for scale in self._scales)

    def over(self, steps: int) -> Guidance:
        """The same for a run of so many steps, with one scale for each if there are several."""
        scales = self._scales
        if isinstance(self.scale, (int, float)) or len(scales) == steps:
            return self
        places = np.linspace(0, len(scales) - 1, steps)
        return replace(self, scale=np.interp(places, np.arange(len(scales)), scales).tolist())

    def scale_at(self, step: int) -> float:
        """The scale of a run's step `step`, counted from its beginning."""
        return float(self.scale if isinstance(self.scale, (int, float)) else self.scale[step])

    def __call__(self, branches: Branches, step: int) -> Answer:
        """The guided output at one point of a run that this is laid out `over`."""
        if not self._inside(branches.a):
            return Answer(branches.cond())
        scale = self.scale_at(step)
        if not self.cfg_pp and (scale == 1.0 or branches.network.uncond is None):
            return Answer(self._with_terms(branches.cond(), branches))
        without, with_ = branches.pair()
        output = self._with_terms(without + scale * (with_ - without), branches)
        return Answer(output, without if self.cfg_pp else None)

    def _inside(self, a: float) -> bool:
        return self.interval is None or self.interval[0] < ((1 - a) / a) ** 0.5 <= self.interval[1]

    def _with_terms(self, output: Tensor, branches: Branches) -> Tensor:
        for name, strength in sorted(dict(self.terms).items(), key=lambda term: TERMS[term[0]].corrects):
            output = TERMS[name].apply(output, branches, strength)
        return output
