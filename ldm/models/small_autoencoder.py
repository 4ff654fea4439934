"""A first stage for narrow networks."""

from __future__ import annotations

from typing import Any

from torch import nn

from ldm.models.autoencoder import AutoencoderKL


class SmallAutoencoderKL(AutoencoderKL):
    """`AutoencoderKL` with `channels_per_group` channels in every group norm, in place of 32 groups.

    32 groups leave one or two channels of a narrow network to a group. Each map then loses its own mean, which is
    what says how bright a plain area is, and colours converge late. The state dict is the same.
    """

    def __init__(self, *args: Any, channels_per_group: int = 4, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, module in self.named_modules():
            if isinstance(module, nn.GroupNorm):
                if module.num_channels % channels_per_group:
                    raise ValueError(
                        f"channels_per_group {channels_per_group} does not divide the {module.num_channels} of {name}"
                    )
                module.num_groups = module.num_channels // channels_per_group
