"""Ways to draw quicker that change the picture."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ldm.acceleration import cache_features, has_int8, merge_tokens, quantize_int8

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shortcuts:
    """What a model does while it draws, set as `model.shortcuts`; the defaults change nothing.

    cache_features: compute the inner part of the UNet at every so many steps only (see `cache_features`).
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
                stack.enter_context(cache_features(network, self.cache_features))
            if self.merge_tokens > 0:
                stack.enter_context(merge_tokens(network, self.merge_tokens))
            yield


def quantize_network(model: LatentDiffusion) -> bool:
    """Have the network draw in int8 (see `ldm.acceleration.int8`); where that pays not, say so and leave it as it is.

    Whether it does now. The first stage, whose errors would be seen at once, stays in its precision.
    """
    if model.device.type != "cpu" or not has_int8():
        what = f"on {model.device.type}" if model.device.type != "cpu" else "on a CPU without AVX512-VNNI"
        logger.warning("int8 is not quicker %s: drawing without it", what)
        return False
    try:
        quantize_int8(model.model.diffusion_model).list_on(model)
    except ValueError as error:
        logger.warning("%s: drawing without int8", error)
        return False
    return True
