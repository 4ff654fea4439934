"""The patch discriminator of adversarial first stages, and its losses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class NLayerDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, section 3.2.2): one logit for every overlapping patch of the picture.

    input_nc: channels of the picture. ndf: width of the first layer; it doubles up to 8 times that. n_layers: strided
    layers; 3 give patches of 70 pixels.
    """

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = ndf
        for n in range(1, n_layers + 1):
            stride = 2 if n < n_layers else 1
            before, width = width, ndf * min(2**n, 8)
            # the norm has a bias of its own
            layers += [
                nn.Conv2d(before, width, 4, stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))
        self.apply(weights_init)

    def forward(self, x: Tensor) -> Tensor:  # (B, input_nc, H, W) -> (B, 1, h, w)
        return self.main(x)


def weights_init(module: nn.Module) -> None:
    """The start of adversarial training: convolutions from N(0, 0.02), norms from N(1, 0.02) (Radford et al. 2016)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator (Lim and Ye 2017)."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Cross entropy of the discriminator (Goodfellow et al. 2014, eq. 1), by softplus."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


D_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}
