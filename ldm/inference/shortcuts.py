"""Ways to draw quicker that change the picture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ldm.modules.feature_caching import caching_features
from ldm.modules.token_merging import merging_tokens


@dataclass(frozen=True)
class Shortcuts:
    """What a model does while it draws, set as `model.shortcuts`; the defaults change nothing.

    cache_features: compute the inner part of the UNet at every so many steps only (see `caching_features`).
    merge_tokens: the share of places that do not attend for themselves, up to 0.75 (see `merging_tokens`).

    ValueError for other values, and, once it draws, for a network that has no such part.
    """

    cache_features: int = 1
    merge_tokens: float = 0.0

    def __post_init__(self) -> None:
        if self.cache_features < 1:
            raise ValueError(f"cache_features counts steps from 1, which is all of them, not {self.cache_features}")
        if not 0 <= self.merge_tokens <= 0.75:
            raise ValueError(f"merge_tokens is a share from 0 to 0.75, not {self.merge_tokens}")

    @contextlib.contextmanager
    def taken(self, network: nn.Module) -> Iterator[None]:
        """While this lasts, a network takes them; for one run of a sampler at a time."""
        with contextlib.ExitStack() as stack:
            if self.cache_features > 1:
                stack.enter_context(caching_features(network, self.cache_features))
            if self.merge_tokens > 0:
                stack.enter_context(merging_tokens(network, self.merge_tokens))
            yield
