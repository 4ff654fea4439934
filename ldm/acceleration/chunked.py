"""Norm, activation and convolution of large maps, some rows at a time.

At an image's full size, maps are all the memory that a first stage takes, and clearing and filling that memory is a
good part of the time. A norm's statistics are of the complete map; all else sees a pixel's neighbors only, so that
what lies between can stay in the processor's cache. Results are those of complete maps, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.acceleration.onednn import PLAIN_3X3, Originals, PackedConv2d, has_only_our_kernels, packed_conv, usable
from ldm.attach import Override
from ldm.modules.diffusionmodules import model as first_stage
from ldm.modules.diffusionmodules.model import Decoder, Encoder, ResnetBlock

LARGE = 2**23  # numbers of a map (32 MB) from which on memory costs more than Python's loop over chunks
CHUNK = 2**21  # numbers of a chunk

NORM = Originals((nn.GroupNorm, "forward"), (F, "group_norm"), (F, "silu"), (first_stage, "nonlinearity"))


class ChunkedResnetBlock(Override):
    """`ResnetBlock` of large maps in chunks; of others, with activations and sums in place."""

    exact = True
    originals = Originals((ResnetBlock, "forward"), (nn.Dropout, "forward"))

    def __call__(self, x: Tensor, temb: Tensor | None = None) -> Tensor:  # (B, Cin, H, W) -> (B, Cout, H, W)
        """Apply the block, or fall back to the original forward."""
        block = self._module()
        if (
            temb is not None
            or type(block) is not ResnetBlock
            or (block.dropout.training and block.dropout.p > 0)
            or not usable(x, block.conv1._parameters.get("weight"))
            or not self.originals.unmodified()
            or not NORM.unmodified()
            or not all(
                has_only_our_kernels(part, nn.GroupNorm, nn.Conv2d, nn.Dropout)
                for name, part in block.named_children()
                if name != "temb_proj"  # which is for timestep embeddings
            )
        ):
            return self.original(x) if temb is None else self.original(x, temb)
        shortcut = block._modules.get("nin_shortcut") or block._modules.get("conv_shortcut")
        h = convolve(x, block.norm1, block.conv1)
        return convolve(h, block.norm2, block.conv2, residual=(x, shortcut))


class ChunkedOutput(Override):
    """Last norm, activation and convolution of an encoder or decoder, in chunks where the map is large."""

    exact = True

    def __call__(self, h: Tensor) -> Tensor:
        """Apply the last layers, or fall back to the original forward."""
        network = self._module()
        if (
            type(network) not in (Encoder, Decoder)
            or not usable(h, network.conv_out._parameters.get("weight"))
            or not NORM.unmodified()
            or not has_only_our_kernels(network.norm_out, nn.GroupNorm)
            or not has_only_our_kernels(network.conv_out, nn.Conv2d)
        ):
            return self.original(h)
        return convolve(h, network.norm_out, network.conv_out)


def convolve(x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d, residual: tuple[Tensor, Any] | None = None) -> Tensor:
    """Compute conv(SiLU(norm(x))) + shortcut(y) of layers without hooks, in chunks where x is large.

    Args:
        x: (B, C, H, W).
        norm: the norm.
        conv: a convolution that keeps the size.
        residual: y (B, C", H, W) and the shortcut, which takes it to C' channels; None where it has as many.

    Returns:
        (B, C', H, W).
    """
    kernel = packed_conv(conv, x, PLAIN_3X3) if x[0].numel() >= LARGE else None
    shortcut = None if residual is None else residual[1]
    if kernel is not None and (shortcut is None or shortcut.kernel_size == (1, 1)):
        return _convolve_chunks(x, norm, conv, kernel, residual)
    h = conv(F.silu(norm(x), inplace=True))
    if residual is None:
        return h
    y = residual[0] if shortcut is None else shortcut(residual[0])
    return h.add_(y) if h.stride() == y.stride() else y + h


def _convolve_chunks(
    x: Tensor,
    norm: nn.GroupNorm,
    conv: nn.Conv2d,
    kernel: PackedConv2d,
    residual: tuple[Tensor, Any] | None,
) -> Tensor:
    height, width = x.shape[2:]
    x = x.contiguous(memory_format=torch.channels_last)
    shape = (len(x), conv.out_channels, height, width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    for image, (one, result) in enumerate(zip(x.split(1), out.split(1))):
        moments = _moments(one, norm)
        for rows in _chunks(one):
            chunk = one[:, :, max(rows.start - 1, 0) : rows.stop + 1]  # with the neighbors that a convolution sees
            chunk = F.silu(F.batch_norm(chunk, *moments, norm.weight, norm.bias, False, 0.0, norm.eps), inplace=True)
            above, below = rows.start == 0, rows.stop == height
            if above or below:  # beyond the image are zeros
                chunk = F.pad(chunk, (0, 0, int(above), int(below)))
            part = kernel.convolve(conv, chunk, (0, 1))
            if residual is None:
                result[:, :, rows] = part
            else:
                y, shortcut = residual[0][image : image + 1, :, rows], residual[1]
                torch.add(y if shortcut is None else shortcut(y), part, out=result[:, :, rows])
    return out


def _chunks(x: Tensor) -> Iterator[slice]:
    """The rows of x (1, C, H, W), as slices."""
    _, channels, height, width = x.shape
    rows = max(CHUNK // (channels * width), 1)
    for start in range(0, height, rows):
        yield slice(start, min(start + rows, height))


def _moments(x: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel's group in x (1, C, H, W), two of (C,).

    Combined from chunks by Chan, Golub and LeVeque 1979, equation 2.1: no large sums are subtracted from one another.
    """
    means, variances, counts = [], [], []
    channels = x.shape[1]
    for rows in _chunks(x):
        chunk = x[:, :, rows]
        pixels = chunk.shape[2] * chunk.shape[3]
        _, mean, rstd = torch.native_group_norm(chunk, None, None, 1, channels, pixels, norm.num_groups, norm.eps)
        means.append(mean[0].double())
        variances.append(rstd[0].double() ** -2 - norm.eps)
        counts.append(pixels)
    weight = x.new_tensor(counts, dtype=torch.float64)[:, None] / sum(counts)
    mean = (torch.stack(means) * weight).sum(0)
    variance = ((torch.stack(variances) + (torch.stack(means) - mean) ** 2) * weight).sum(0).clamp(min=0)
    size = channels // norm.num_groups
    return mean.float().repeat_interleave(size), variance.float().repeat_interleave(size)
