"""Guidance: combine a model's outputs under several conditions into one.

A term is a function (output, outputs, strength) -> output. To add one, register it as `rescale` is below, and
add its name to `TERMS` in `ldm/cli/options.py`: then every script accepts it, as `--guidance name=strength`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ldm.attach import Handle, Override, Priority
from ldm.modules.attention import BasicTransformerBlock, CrossAttention
from ldm.modules.diffusionmodules.openaimodel import QKVAttention, QKVAttentionLegacy
from ldm.modules.diffusionmodules.schedule import eps_and_x0, output_of

Condition = Any  # a tensor, a list of tensors, or a dict of lists: c_concat, c_crossattn, and c_adm as a tensor


def join_conditions(first: Condition, second: Condition) -> Condition:
    """Concatenate two conditions of the same structure along the batch axis, `first` before `second`.

    Raises:
        ValueError: if they differ in structure or in the shape of an item.
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
    """The batch size of a condition, or None where it contains no tensor."""
    return next((tensor.shape[0] for tensor in _tensors(cond)), None)


def _tensors(cond: Condition) -> Iterator[Tensor]:
    """The tensors of a condition, in order."""
    if isinstance(cond, Tensor):
        yield cond
    elif isinstance(cond, (Mapping, list, tuple)):
        for entry in cond.values() if isinstance(cond, Mapping) else cond:
            yield from _tensors(entry)


# ---- model outputs ----


@dataclass(eq=False)
class ConditionalModel:
    """A model with the conditions of a sampling run.

    Args:
        apply_model: (x, t, cond) -> output.
        cond, uncond: the conditions; uncond is None where there is no guidance.
        parameterization: what the output is: "eps", "x0" or "v".
        middle_block: the network's middle block, for perturbed-attention guidance.
        sequential: evaluate cond and uncond one after the other, which takes less memory than one batch of both.
    """

    apply_model: Callable[[Tensor, Tensor, Condition], Tensor]
    cond: Condition
    uncond: Condition = None
    parameterization: str = "eps"
    middle_block: nn.Module | None = None
    sequential: bool = False
    _joined: tuple[list[tuple[Tensor, int]], Condition] | None = field(default=None, repr=False)

    def joined(self) -> Condition:
        """[uncond, cond] as one batch, as in the public code.

        The same tensors at every step while the conditions do not change, so that keys and values can be cached.
        """
        tensors = [*_tensors(self.uncond), *_tensors(self.cond)]
        if any(tensor.is_inference() for tensor in tensors):  # changes to these cannot be seen
            return join_conditions(self.uncond, self.cond)
        state = [(tensor, tensor._version) for tensor in tensors]
        before, joined = self._joined or ([], None)
        same = len(state) == len(before) and all(a is b and n == m for (a, n), (b, m) in zip(state, before))
        if not same or not state:
            joined = join_conditions(self.uncond, self.cond)
            self._joined = state, joined
        return joined


class ModelOutputs:
    """A model's outputs for x (B, ...) at timesteps t (B,) and noise level alpha_bar, each evaluated at most once."""

    def __init__(self, model: ConditionalModel, x: Tensor, t: Tensor, alpha_bar: float) -> None:
        self.model, self.x, self.t, self.alpha_bar = model, x, t, alpha_bar
        self._cache: dict[str, Tensor] = {}

    def cond(self) -> Tensor:
        """The output with the condition."""
        if "cond" not in self._cache:
            self._cache["cond"] = self.model.apply_model(self.x, self.t, self.model.cond)
        return self._cache["cond"]

    def cond_and_uncond(self) -> tuple[Tensor, Tensor]:
        """The outputs with and without the condition; ValueError if the run has no unconditional condition."""
        if self.model.uncond is None:
            raise ValueError("this guidance needs an unconditional prediction: pass unconditional_conditioning")
        if "uncond" not in self._cache and self.model.sequential:
            self._cache["uncond"] = self.model.apply_model(self.x, self.t, self.model.uncond)
        elif "uncond" not in self._cache:
            x, t = torch.cat([self.x] * 2), torch.cat([self.t] * 2)
            self._cache["uncond"], self._cache["cond"] = self.model.apply_model(x, t, self.model.joined()).chunk(2)
        return self.cond(), self._cache["uncond"]

    def identity_attention(self) -> Tensor:
        """The output with the condition and with identity self-attention in the middle block."""
        if "identity" not in self._cache:
            if self.model.middle_block is None:
                raise ValueError("perturbed-attention guidance needs a network with a middle block")
            with identity_self_attention(self.model.middle_block):
                self._cache["identity"] = self.model.apply_model(self.x, self.t, self.model.cond)
        return self._cache["identity"]


class IdentityAttention(Override):
    """Override of self-attention that gives every position its own value, in the calling thread."""

    priority = Priority.IDENTITY_ATTENTION
    thread_local = True

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the values of x (B, N, D), or of a joint projection (B, 3 C, N)."""
        attention: Any = self.module
        if not self.is_active():
            output: Tensor = self.original(x, *args, **kwargs)
            return output
        if isinstance(attention, CrossAttention):
            values: Tensor = attention.to_out(attention.to_v(x))
            return values
        if isinstance(attention, QKVAttentionLegacy):
            heads: int = attention.n_heads
            return x.reshape(len(x), heads, 3, -1, x.shape[-1])[:, :, 2].flatten(1, 2)
        return x.chunk(3, dim=1)[2]


def identity_self_attention(network: nn.Module) -> Handle:
    """Replace self-attention in `network` by the identity on the values (Ahn et al. 2024, section 4.2).

    Raises:
        ValueError: if it has none.
    """
    found: list[nn.Module] = []
    for part in network.modules():
        if isinstance(part, BasicTransformerBlock) and not part.disable_self_attn:
            found.append(part.attn1)
        elif isinstance(part, QKVAttention):
            found.append(part)
    if not found:
        raise ValueError("perturbed-attention guidance needs self-attention in the middle block: it has none")
    return Handle("identity self-attention", [IdentityAttention(part).attach() for part in found])


# ---- terms ----


class Term(NamedTuple):
    """A term of guidance.

    Args:
        apply: (output, outputs, strength) -> the new output.
        corrects: whether it only limits the effect of other guidance; such terms come last.
        low, high: the range of its strength.
    """

    apply: Callable[[Tensor, ModelOutputs, float], Tensor]
    corrects: bool = False
    low: float = -math.inf
    high: float = math.inf


TERMS: dict[str, Term] = {}


def register(name: str, **about: Any) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a term as `name`; `about`: other fields of `Term`."""

    def _register(apply: Callable[..., Tensor]) -> Callable[..., Tensor]:
        TERMS[name] = Term(apply, **about)
        return apply

    return _register


@register("pag")
def perturbed_attention(output: Tensor, outputs: ModelOutputs, strength: float) -> Tensor:
    """Guide away from the output with identity self-attention in the middle block (Ahn et al. 2024, eq. 15)."""
    return output + strength * (outputs.cond() - outputs.identity_attention())


@register("rescale", corrects=True, low=0, high=1)
def rescale(output: Tensor, outputs: ModelOutputs, strength: float) -> Tensor:
    """Rescale the output to the standard deviation of the conditional one (Lin et al. 2023, eq. 15 and 16)."""
    axes = tuple(range(1, output.ndim))
    cond = outputs.cond()
    rescaled = output * (cond.std(dim=axes, keepdim=True) / output.std(dim=axes, keepdim=True))
    return strength * rescaled + (1 - strength) * output


@register("threshold", corrects=True, low=0.5, high=1)
def dynamic_threshold(output: Tensor, outputs: ModelOutputs, strength: float) -> Tensor:
    """Clip x0 to [-s, s] and scale it by u / s, s = max(p, u), where p is a percentile of |x0|.

    Saharia et al. 2022 (section 2.3) have u = 1, the range of pixels. Latents have no fixed range, so u is the same
    percentile of the conditional x0. strength: the percentile as a fraction, such as 0.995.
    """
    x, alpha_bar, kind = outputs.x, outputs.alpha_bar, outputs.model.parameterization
    _, x0 = eps_and_x0(output, x, alpha_bar, kind)
    _, x0_cond = eps_and_x0(outputs.cond(), x, alpha_bar, kind)
    unit = _percentile(x0_cond, strength)
    bound = torch.maximum(_percentile(x0, strength), unit)
    return output_of(x0.clamp(-bound, bound) * (unit / bound), x, alpha_bar, kind)


def _percentile(x: Tensor, fraction: float) -> Tensor:
    """The percentile (B, 1, ...) of |x| for x (B, ...)."""
    magnitudes = x.flatten(1).abs().float()  # torch.quantile refuses more than 2^24 numbers
    bound = magnitudes.sort(dim=1).values[:, math.ceil(fraction * magnitudes.shape[1]) - 1]
    return bound.clamp(min=1e-6).to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


# ---- guidance ----

CFG_PP_SCALE = 0.6  # Chung et al. 2024 match it to scale 7.5 without CFG++


class GuidedOutput(NamedTuple):
    """A guided output. `uncond`: the output whose eps a CFG++ step adds back, None for the same."""

    output: Tensor
    uncond: Tensor | None = None


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance, uncond + scale * (cond - uncond) (Ho and Salimans 2021), and its variants.

    Args:
        scale: 1 for none; a list is interpolated over the run, from its first step to its last.
        interval: (low, high): apply guidance only while low < sigma <= high (Kynkaanniemi et al. 2024).
        cfg_pp: CFG++ (Chung et al. 2024): guide x0, at a scale from 0 to 1, and renoise it with the unconditional eps.
        terms: strengths of `TERMS` by name, applied in order; terms that correct others come last.

    Raises:
        ValueError: for settings that are out of range, or have no meaning together.
    """

    scale: float | Sequence[float] = 1.0
    interval: Sequence[float] | None = None
    cfg_pp: bool = False
    terms: Mapping[str, float] | Sequence[tuple[str, float]] = ()

    def __post_init__(self) -> None:
        terms, scales = dict(self.terms), self.scales
        if unknown := [name for name in terms if name not in TERMS]:
            raise ValueError(f"guidance {unknown[0]!r} is not one of {', '.join(TERMS)}")
        for name, strength in terms.items():
            if not TERMS[name].low <= strength <= TERMS[name].high:
                raise ValueError(
                    f"guidance {name} must be from {TERMS[name].low} to {TERMS[name].high}, not {strength}"
                )
        if not scales or not all(math.isfinite(number) for number in (*scales, *terms.values())):
            raise ValueError(f"guidance takes finite numbers, not scale={self.scale} with {terms}")
        if self.interval is not None and not (len(self.interval) == 2 and 0 <= self.interval[0] < self.interval[1]):
            raise ValueError(f"the guidance interval is a low and a high sigma, 0 <= low < high, not {self.interval}")
        if self.cfg_pp:
            self._check_cfg_pp(terms, scales)
        elif not self.needs_uncond:
            self._check_without_scale(terms)

    def _check_cfg_pp(self, terms: Mapping[str, float], scales: Sequence[float]) -> None:
        if wrong := [scale for scale in scales if not 0 <= scale <= 1]:
            raise ValueError(f"CFG++ takes scales from 0 to 1 ({CFG_PP_SCALE} is usual), not {wrong[0]:g}")
        if self.interval:
            raise ValueError("CFG++ needs the unconditional prediction at every step: leave the interval out")
        if "rescale" in terms:
            raise ValueError("CFG++ interpolates between two predictions and needs no rescaling: leave rescale out")
        if "pag" in terms:
            raise ValueError("CFG++ interpolates between two predictions, pag extrapolates: leave one of them out")

    def _check_without_scale(self, terms: Mapping[str, float]) -> None:
        guiding = [name for name in terms if not TERMS[name].corrects]
        if terms and not guiding:
            name = next(iter(terms))
            raise ValueError(f"{name} corrects other guidance, and at scale 1 there is none: leave {name} out")
        if self.interval and not guiding:
            raise ValueError("an interval limits guidance, and at scale 1 there is none: leave the interval out")

    @property
    def scales(self) -> Sequence[float]:
        """The scale as a list."""
        return [self.scale] if isinstance(self.scale, (int, float)) else list(self.scale)

    @property
    def needs_uncond(self) -> bool:
        """Whether the unconditional output is needed."""
        return self.cfg_pp or any(scale != 1.0 for scale in self.scales)

    def over(self, steps: int) -> Guidance:
        """The same guidance with a list of scales interpolated to `steps` steps."""
        scales = self.scales
        if isinstance(self.scale, (int, float)) or len(scales) == steps:
            return self
        positions = np.linspace(0, len(scales) - 1, steps)
        return replace(self, scale=np.interp(positions, np.arange(len(scales)), scales).tolist())

    def scale_at(self, step: int) -> float:
        """The scale at step `step` of the run, counted from its beginning."""
        return float(self.scale if isinstance(self.scale, (int, float)) else self.scale[step])

    def __call__(self, outputs: ModelOutputs, scale: float) -> GuidedOutput:
        """Combine a model's outputs at one step, at this scale."""
        if not self._in_interval(outputs.alpha_bar):
            return GuidedOutput(outputs.cond())
        if not self.cfg_pp and (scale == 1.0 or outputs.model.uncond is None):
            return GuidedOutput(self._with_terms(outputs.cond(), outputs))
        cond, uncond = outputs.cond_and_uncond()
        output = self._with_terms(uncond + scale * (cond - uncond), outputs)
        return GuidedOutput(output, uncond if self.cfg_pp else None)

    def _in_interval(self, alpha_bar: float) -> bool:
        return self.interval is None or self.interval[0] < ((1 - alpha_bar) / alpha_bar) ** 0.5 <= self.interval[1]

    def _with_terms(self, output: Tensor, outputs: ModelOutputs) -> Tensor:
        for name, strength in sorted(dict(self.terms).items(), key=lambda term: TERMS[term[0]].corrects):
            output = TERMS[name].apply(output, outputs, strength)
        return output
