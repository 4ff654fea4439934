"""Self-attention among fewer places (Bolya and Hoffman 2023, "Token Merging for Fast Stable Diffusion")."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from ldm.modules.attention import BasicTransformerBlock, SpatialTransformer

LIMIT = 0.75  # of four neighbours one stays


class Merging:
    """Which of the tokens h (B, H W, C) of a feature map of `size` (H, W) become one, a `share` of them all.

    In every 2x2 places the first stays (the paper draws one). Of the others those go that are most like one that stays,
    by the cosine (section 3). Nothing is drawn, and no sum is taken in an order that could change: the same h always
    gives the same.
    """

    def __init__(self, h: Tensor, size: Sequence[int], share: float) -> None:
        height, width = size
        places = torch.arange(height * width, device=h.device).view(height, width)
        self._stay = places[::2, ::2].flatten()
        self._others = torch.cat([places[::2, 1::2].flatten(), places[1::2].flatten()])
        staying, others = len(self._stay), len(self._others)
        going = min(int(share * height * width), others)
        unit = F.normalize(h, dim=-1, eps=1e-6)  # which float16 has
        alike, into = (unit[:, self._others] @ unit[:, self._stay].transpose(1, 2)).max(dim=-1)  # (B, others)
        ranked = alike.argsort(dim=-1, descending=True, stable=True)
        self._go, self._left = ranked[:, :going], ranked[:, going:]  # (B, .), places among the others
        into = into.gather(1, self._go)  # (B, going), places among those that stay
        left = torch.arange(staying, staying + others - going, device=h.device)
        where = torch.empty_like(ranked).scatter(1, self._go, into)
        where = where.scatter(1, self._left, left.expand_as(self._left))  # (B, others), as `merge` has them
        self._where = torch.empty_like(places.flatten()).expand(len(h), -1).clone()
        self._where[:, self._stay] = torch.arange(staying, device=h.device)
        self._where[:, self._others] = where
        self._add = h.new_zeros(len(h), staying, going).scatter(1, into[:, None], 1.0)  # (B, staying, going) of 0 and 1

    def merge(self, h: Tensor) -> Tensor:
        """Those that stay, each the mean of itself and what goes there, and the others that are left: (B, M, C)."""
        stay, others = h[:, self._stay], h[:, self._others]
        means = (stay + self._add @ _taken(others, self._go)) / (1 + self._add.sum(dim=-1, keepdim=True))
        return torch.cat([means, _taken(others, self._left)], dim=1)

    def unmerge(self, h: Tensor) -> Tensor:
        """(B, M, C) as (B, H W, C): each token has what it became part of."""
        return _taken(h, self._where)


def _taken(h: Tensor, places: Tensor) -> Tensor:
    """The tokens of h (B, N, C) at places (B, M): (B, M, C)."""
    return h.gather(1, places[..., None].expand(-1, -1, h.shape[-1]))


@contextlib.contextmanager
def merging_tokens(network: nn.Module, share: float) -> Iterator[None]:
    """While this lasts, self-attention in a UNet's outermost transformers is among merged tokens.

    share: of all tokens, how many go, from 0 to 0.75. Only attention is spared them: all else sees every place.
    ValueError for another share, or a network without such transformers.
    """
    if not 0 <= share <= LIMIT:
        raise ValueError(f"the share of tokens to merge is from 0 to {LIMIT}, not {share}")
    outermost: Callable[[], list[SpatialTransformer]] | None = getattr(network, "outermost_transformers", None)
    transformers = [] if outermost is None else outermost()
    blocks = (cast("Iterable[BasicTransformerBlock]", part.transformer_blocks) for part in transformers)
    found = [block for part in blocks for block in part if block.attends_to_itself]
    if not found:
        raise ValueError("merging tokens needs a UNet whose transformers attend to themselves: this network has none")
    try:
        for block in found:
            block.merged_share = share
        yield
    finally:
        for block in found:
            block.merged_share = 0.0
