"""Features of a UNet's inner part, kept from one step of a sampler to the next (Ma et al. 2023, "DeepCache")."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.attach import Handle, Override, Priority, override_chain, own_method
from ldm.models.diffusion.guidance import IdentityAttention
from ldm.modules.diffusionmodules.openaimodel import UNetModel

OUTER = 1  # how many of the input blocks, and of the output blocks, are computed around cached features


def cache_features(network: nn.Module, every: int) -> Handle:
    """Compute the inner part of a `UNetModel` every N steps only, and at the first.

    At the other steps its outermost blocks are computed alone, around what the inner part gave last. A sampler that
    evaluates two timesteps in a step (heun, dpm2 ...) has so many more steps here. For one run of a sampler, in the
    calling thread: what runs next must begin with a higher timestep. On a GPU every call waits for the timestep.

    Raises:
        ValueError: for `every` below 1, for another kind of network, or for a UNet whose `forward` somebody has
            replaced: what that does cannot be computed in parts.
    """
    if every < 1:
        raise ValueError(f"features are computed every N steps, N at least 1, not {every}")
    if not isinstance(network, UNetModel):
        raise ValueError(f"features can be cached for a UNetModel, not for {type(network).__name__}")
    if type(network).forward is not own_method(UNetModel) or override_chain(network) is None:
        raise ValueError("features cannot be cached for a UNet whose forward has been replaced")
    return Handle("feature cache", [FeatureCache(network, every).attach()] if every > 1 else [])


class _Entry(NamedTuple):
    """Features, the step that they are of, and the conditions they were computed under, which so keep their ids."""

    features: Tensor
    step: int
    conditions: tuple[Tensor | None, ...]


class FeatureCache(Override):
    """Override of `UNetModel.forward` that keeps features for less than `every` steps.

    A step begins where the timestep changes, a new image where it rises. Calls at one timestep are told apart by the
    shape of x, by their conditions (the same tensors, not the same numbers), by whether self-attention is the identity
    (perturbed-attention guidance), and where all this is the same (tiles), by their order.
    """

    priority = Priority.FEATURE_CACHE
    thread_local = True
    state = ("every",)

    def __init__(self, network: UNetModel, every: int) -> None:
        super().__init__(network)
        self.every = every

    def reset(self) -> None:
        """Forget all features."""
        self._entries: dict[Hashable, _Entry] = {}
        self._counts: Counter[Hashable] = Counter()  # of calls at the present timestep, by kind
        self._timestep, self._step = math.inf, 0

    def __call__(
        self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Compute the network completely, or its outer blocks around cached features."""
        replaced = type(self.module).forward is not own_method(UNetModel)  # since then
        if replaced or not self.is_active() or not len(x):
            return self.original(x, timesteps, context=context, y=y, **kwargs)
        key = self._key(x, timesteps, context, y)
        if key in self._entries:
            return self._outer(x, timesteps, context, y, self._entries[key].features)
        features: list[Tensor] = []
        last_inner = self.module.output_blocks[-1 - OUTER]

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            if self.is_active():  # and not for another thread that uses the network meanwhile
                features.append(output)

        hook = last_inner.register_forward_hook(keep)
        try:
            out = self.original(x, timesteps, context=context, y=y, **kwargs)
        finally:
            hook.remove()
        self._entries[key] = _Entry(features[-1], self._step, (context, y))
        return out

    def _key(self, x: Tensor, timesteps: Tensor, *conditions: Tensor | None) -> Hashable:
        """Begin a call, at timesteps that are all the same, and tell it apart from others."""
        timestep = float(timesteps[0])
        if timestep > self._timestep:
            self._entries.clear()
        if timestep != self._timestep:
            self._timestep, self._step = timestep, self._step + 1
            self._counts.clear()
            self._entries = {key: entry for key, entry in self._entries.items() if self._step - entry.step < self.every}
        kind = (x.shape, x.dtype, self._is_perturbed(), *map(id, conditions))
        self._counts[kind] += 1
        return *kind, self._counts[kind]

    def _is_perturbed(self) -> bool:
        return any(
            isinstance(method, IdentityAttention) and method.is_active()
            for part in self.module.middle_block.modules()
            if (method := part.__dict__.get("forward")) is not None
        )

    def _outer(
        self, x: Tensor, timesteps: Tensor, context: Tensor | None, y: Tensor | None, features: Tensor
    ) -> Tensor:
        """`UNetModel.forward` with `features` in place of its inner part."""
        network: Any = self.module
        emb = network._embed(timesteps, y)
        context = None if context is None else context.to(network.dtype)
        h = x.to(network.dtype)
        hs = []
        for module in network.input_blocks[:OUTER]:
            h = module(h, emb, context)
            hs.append(h)
        h = features
        for module in network.output_blocks[-OUTER:]:
            h = torch.cat([network.fit(h, hs[-1]), hs.pop()], dim=1)
            h = module(h, emb, context)
        return network._predict(h).to(x.dtype)
