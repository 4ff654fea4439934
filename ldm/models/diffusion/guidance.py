"""Guidance: how predictions under several conditions become one. Its only home; samplers do not know it exists.

A term of guidance is a function (output, branches, strength) -> output. Register another one as `rescale` below is, and
the scripts take it: `--guidance name=strength`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

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

    perturbed: a context in which its self-attention in the middle sees each place alone.
    """

    apply_model: Callable[[Tensor, Tensor, Condition], Tensor]
    cond: Condition
    uncond: Condition = None
    parameterization: str = "eps"
    perturbed: Callable[[], AbstractContextManager[Any]] | None = None

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
        """The outputs without and with the condition, from one batch."""
        if "uncond" not in self._known:
            out = self.network.apply_model(torch.cat([self.x, self.x]), torch.cat([self.t, self.t]), self.network.both)
            self._known["uncond"], self._known["cond"] = out.chunk(2)
        return self._known["uncond"], self._known["cond"]

    def cond(self) -> Tensor:
        """The output with the condition."""
        if "cond" not in self._known:
            self._known["cond"] = self.network.apply_model(self.x, self.t, self.network.cond)
        return self._known["cond"]

    def perturbed(self) -> Tensor:
        """The output with the condition, and with self-attention that sees each place alone."""
        if self.network.perturbed is None:
            raise ValueError("perturbed-attention guidance needs a network with self-attention in its middle")
        if "perturbed" not in self._known:
            with self.network.perturbed():
                self._known["perturbed"] = self.network.apply_model(self.x, self.t, self.network.cond)
        return self._known["perturbed"]


# ---- terms ----

Term = Callable[[Tensor, Branches, float], Tensor]
TERMS: dict[str, Term] = {}


def register(name: str) -> Callable[[Term], Term]:
    """Make a term known as `name`."""

    def _register(term: Term) -> Term:
        TERMS[name] = term
        return term

    return _register


@register("rescale")
def rescale(output: Tensor, branches: Branches, strength: float) -> Tensor:
    """Brings the output's spread back to that of the conditional one (Lin et al. 2023, eq. 15 and 16)."""
    axes = tuple(range(1, output.ndim))
    cond = branches.cond()
    rescaled = output * (cond.std(dim=axes, keepdim=True) / output.std(dim=axes, keepdim=True))
    return strength * rescaled + (1 - strength) * output


@register("threshold")
def dynamic_threshold(output: Tensor, branches: Branches, strength: float) -> Tensor:
    """Bounds x0 to the conditional x0's own range, and scales it into that (after Saharia et al. 2022, section 2.3).

    strength: the share of values, such as 0.995, that a range holds. Pixels have a range; latents take the conditional
    prediction's, so that guidance cannot oversaturate them.
    """
    x, a, kind = branches.x, branches.a, branches.network.parameterization
    _, x0 = eps_and_x0(output, x, a, kind)
    _, own = eps_and_x0(branches.cond(), x, a, kind)
    bound, limit = (_quantile(y, strength) for y in (x0, own))
    limit = torch.minimum(limit, bound)
    return output_of(x0.clamp(-bound, bound) * (limit / bound), x, a, kind)


def _quantile(x: Tensor, share: float) -> Tensor:
    """The bound (B, 1, ...) that a share of the magnitudes in x (B, ...) does not exceed."""
    magnitudes = x.flatten(1).abs().float()
    bound = magnitudes.sort(dim=1).values[:, min(int(share * magnitudes.shape[1]), magnitudes.shape[1] - 1)]
    return bound.clamp(min=1e-8).to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


@register("pag")
def perturbed_attention(output: Tensor, branches: Branches, strength: float) -> Tensor:
    """Leads away from a network whose self-attention in the middle is the identity (Ahn et al. 2024, eq. 15)."""
    return output + strength * (branches.cond() - branches.perturbed())


# ---- guidance ----


class Answer(NamedTuple):
    """A guided output, and the one whose eps leads on from its x0, if that is another (CFG++)."""

    output: Tensor
    onward: Tensor | None = None


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2021), uncond + scale * (cond - uncond), and what goes with it.

    scale: 1 for none; or one a step. interval: (low, high) in sigma = noise / signal, without guidance outside of it
    (Kynkaanniemi et al. 2024). plus_plus: CFG++ (Chung et al. 2024): x0 is guided, at scales from 0 to 1, and the step
    goes on along the unconditional eps. terms: (name, strength) of `TERMS`, one after the other.

    ValueError for what has no meaning together.
    """

    scale: float | Sequence[float] = 1.0
    interval: tuple[float, float] | None = None
    plus_plus: bool = False
    terms: Sequence[tuple[str, float]] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if unknown := [name for name, _ in self.terms if name not in TERMS]:
            raise ValueError(f"guidance {unknown[0]!r} is not one of {', '.join(TERMS)}")
        scales = [self.scale] if isinstance(self.scale, (int, float)) else list(self.scale)
        if self.plus_plus and not all(0 <= scale <= 1 for scale in scales):
            raise ValueError(f"CFG++ takes scales from 0 to 1 (0.6 is usual), not {max(scales):g}")
        if self.plus_plus and (self.interval or any(name in ("rescale", "pag") for name, _ in self.terms)):
            raise ValueError("CFG++ keeps x0 where it should be, and goes with neither an interval, rescale nor pag")
        if self.interval and not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(f"a guidance interval is low and high sigma, from 0 up, not {self.interval}")

    def scale_at(self, step: int) -> float:
        """The scale of the run's step `step`, counted from its beginning."""
        return float(self.scale if isinstance(self.scale, (int, float)) else self.scale[step])

    def __call__(self, branches: Branches, step: int) -> Answer:
        """The guided output at one point."""
        scale = self.scale_at(step)
        if branches.network.uncond is None or not (self.plus_plus or (scale != 1.0 and self._inside(branches.a))):
            return Answer(self._with_terms(branches.cond(), branches))
        without, with_ = branches.pair()
        output = self._with_terms(without + scale * (with_ - without), branches)
        return Answer(output, without if self.plus_plus else None)

    def _inside(self, a: float) -> bool:
        return self.interval is None or self.interval[0] < ((1 - a) / a) ** 0.5 <= self.interval[1]

    def _with_terms(self, output: Tensor, branches: Branches) -> Tensor:
        for name, strength in self.terms:
            output = TERMS[name](output, branches, strength)
        return output
