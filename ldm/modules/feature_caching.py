"""Features of a UNet's inner part, kept from one step of a sampler to the next (Ma et al. 2023, "DeepCache")."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, NamedTuple, cast

from torch import Tensor, nn

from ldm.modules.attention import SelfAttending

if TYPE_CHECKING:
    from ldm.modules.diffusionmodules.openaimodel import UNetModel


class _Kept(NamedTuple):
    """Features, the step that they are of, and the conditions they were computed under, which so keep their ids."""

    features: Tensor
    step: int
    conditions: tuple[Tensor | None, ...]


class FeatureCache:
    """What a UNet keeps of its calls for those to come, for less than `every` steps.

    A step begins where the timestep changes, a new picture where it rises. Calls at one timestep are told apart by the
    shape of x, by their conditions (the same tensors, not the same numbers), by whether self-attention is out of the
    way, and where all this is the same (tiles), by their order.
    """

    def __init__(self, every: int, attending: list[SelfAttending]) -> None:
        """attending: the network's self-attention."""
        self._every = every
        self._attending = attending
        self._kept: dict[Hashable, _Kept] = {}
        self._counts: Counter[Hashable] = Counter()  # of calls at the present timestep, by kind
        self._timestep, self._step = math.inf, 0
        self._call: tuple[Hashable, tuple[Tensor | None, ...]] = (None, ())  # that has begun

    def begin(self, x: Tensor, timesteps: Tensor, *conditions: Tensor | None) -> Tensor | None:
        """Begin a call with x (B, C, H, W) at timesteps (B,), all the same: the features kept for it, or None."""
        timestep = float(timesteps[0])
        if timestep > self._timestep:
            self._kept.clear()
        if timestep != self._timestep:
            self._timestep, self._step = timestep, self._step + 1
            self._counts.clear()
            self._kept = {key: kept for key, kept in self._kept.items() if self._step - kept.step < self._every}
        kind = (x.shape, self._perturbed(), *map(id, conditions))
        self._counts[kind] += 1
        key = (*kind, self._counts[kind])
        self._call = key, conditions
        return self._kept[key].features if key in self._kept else None

    def _perturbed(self) -> bool:
        """Whether the forward of self-attention is overridden, as perturbed-attention guidance does."""
        parts = (getattr(part, "attn1", part) for part in self._attending)
        return any("forward" in vars(part) for part in parts)

    def keep(self, features: Tensor) -> None:
        """Keep features of the call that began last."""
        key, conditions = self._call
        self._kept[key] = _Kept(features, self._step, conditions)


@contextlib.contextmanager
def caching_features(network: nn.Module, every: int) -> Iterator[None]:
    """While this lasts, a `UNetModel` computes its inner part at every `every`-th step only, and its first.

    At the others it computes its outermost blocks alone, around what the inner part gave last. A sampler that asks at
    two timesteps in a step (heun, dpm2 ...) has so many more steps here. For one run of a sampler: what runs next must
    begin with a higher timestep, which on a GPU is waited for at every call. ValueError for a network of another kind.
    """
    if every < 1:
        raise ValueError(f"features are computed at every N-th step, N from 1 up, not {every}")
    if not hasattr(network, "feature_cache"):
        raise ValueError(f"features can be cached of a UNet, not of {type(network).__name__}")
    attending = [part for part in network.modules() if isinstance(part, SelfAttending)]
    unet = cast("UNetModel", network)  # or one like it
    unet.feature_cache = FeatureCache(every, attending) if every > 1 else None
    try:
        yield
    finally:
        unet.feature_cache = None
