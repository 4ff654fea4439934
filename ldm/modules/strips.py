"""Norm, activation and convolution of large maps, some rows at a time.

At a picture's full size, maps are all the memory that a first stage takes, and clearing and filling that memory is a
good part of the time. A norm's statistics are of the whole map; all else looks at a pixel's neighbours only, so that
what lies between can stay in the cache. Results are those of whole maps, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.layout import LaidOutConv2d, can_draw

LARGE = 2**23  # numbers of a map (32 MB) from which on memory costs more than Python's loop over strips
STRIP = 2**21  # numbers of a strip


def activate(x: Tensor) -> Tensor:
    """SiLU of what a norm has just made; in its memory, unless gradients need that."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def add(h: Tensor, x: Tensor) -> Tensor:
    """x + h, where h has just been made; in its memory, unless gradients may be asked for."""
    return x + h if torch.is_grad_enabled() or h.dtype != x.dtype else h.add_(x)


def convolve(
    x: Tensor,
    norm: nn.GroupNorm,
    conv: nn.Conv2d,
    *,
    dropout: nn.Dropout | None = None,
    residual: tuple[Tensor, nn.Module] | None = None,
) -> Tensor:
    """conv(dropout(SiLU(norm(x)))) of x (B, C, H, W), which keeps its size: (B, C', H, W).

    residual: (a map (B, C", H, W), what makes C' channels of each of its pixels), to be added. In strips where x is
    large and a laid-out 3x3 convolution draws on a CPU (see `ldm.modules.layout`).
    """
    drops = dropout is not None and dropout.training and dropout.p > 0
    if (
        isinstance(conv, LaidOutConv2d)
        and not drops
        and conv.takes_strips()
        and can_draw(x, conv.weight)
        and x[0].numel() >= LARGE
    ):
        return _convolve_in_strips(x, norm, conv, residual)
    h = activate(norm(x))
    h = conv(h if dropout is None else dropout(h))
    return h if residual is None else add(h, residual[1](residual[0]))


def _convolve_in_strips(
    x: Tensor, norm: nn.GroupNorm, conv: LaidOutConv2d, residual: tuple[Tensor, nn.Module] | None
) -> Tensor:
    height, width = x.shape[2:]
    x = x.contiguous(memory_format=torch.channels_last)
    shape = (len(x), conv.out_channels, height, width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    for image, (one, result) in enumerate(zip(x.split(1), out.split(1))):
        moments = _moments(one, norm)
        for rows in _strips(one):
            strip = one[:, :, max(rows.start - 1, 0) : rows.stop + 1]  # with the neighbours that a convolution sees
            strip = F.silu(F.batch_norm(strip, *moments, norm.weight, norm.bias, False, 0.0, norm.eps), inplace=True)
            above, below = rows.start == 0, rows.stop == height
            if above or below:  # beyond the picture are zeros
                strip = F.pad(strip, (0, 0, int(above), int(below)))
            part = conv.strip(strip)
            if residual is None:
                result[:, :, rows] = part
            else:
                y, shortcut = residual
                torch.add(shortcut(y[image : image + 1, :, rows]), part, out=result[:, :, rows])
    return out


def _strips(x: Tensor) -> Iterator[slice]:
    """The rows of x (1, C, H, W), as slices."""
    _, channels, height, width = x.shape
    rows = max(STRIP // (channels * width), 1)
    for start in range(0, height, rows):
        yield slice(start, min(start + rows, height))


def _moments(x: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel's group in x (1, C, H, W), two of (C,).

    Of strips' moments, by Chan, Golub and LeVeque 1979, equation 2.1: no large sums are subtracted from one another.
    """
    means, variances, counts = [], [], []
    channels = x.shape[1]
    for rows in _strips(x):
        strip = x[:, :, rows]
        places = strip.shape[2] * strip.shape[3]
        _, mean, rstd = torch.native_group_norm(strip, None, None, 1, channels, places, norm.num_groups, norm.eps)
        means.append(mean[0].double())
        variances.append(rstd[0].double() ** -2 - norm.eps)
        counts.append(places)
    weight = x.new_tensor(counts, dtype=torch.float64)[:, None] / sum(counts)
    mean = (torch.stack(means) * weight).sum(0)
    variance = ((torch.stack(variances) + (torch.stack(means) - mean) ** 2) * weight).sum(0).clamp(min=0)
    each = channels // norm.num_groups
    return mean.float().repeat_interleave(each), variance.float().repeat_interleave(each)
