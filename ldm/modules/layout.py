"""Weights laid out once for the CPU's kernels.

oneDNN multiplies by weights in an order of its own. torch's `F.conv2d` brings them into it anew at every call, and
`F.linear` goes through another library, which on some processors does half of what oneDNN does. Here the order is kept,
beside the weights themselves: what a state dict holds does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

KERNELS = (
    *("_linear_pointwise", "_reorder_linear_weight"),
    *("_convolution_pointwise", "_reorder_convolution_weight"),
    *("_convolution_transpose_pointwise", "_reorder_convolution_transpose_weight"),
)
PLAIN: tuple[str, list[Any], str] = ("none", [], "")  # nothing is done to what comes out
GELU: tuple[str, list[Any], str] = ("gelu", [], "none")  # the exact one
PLAIN_3X3 = ((3, 3), (1, 1), (1, 1), (1, 1), 1)  # kernel, padding, stride, dilation, groups


def lay_out(module: nn.Module) -> None:
    """Have every linear layer and 2-d convolution in `module` keep its weight in oneDNN's order while it draws.

    That is at the first call without gradients in float32 on a CPU; any other call goes on as before. A weight that
    changes is laid out anew, unless it does so behind torch's back (through `.data`, in place).
    """
    for part in module.modules():
        kind = LAID_OUT.get(type(part))
        if kind is not None:
            part.__class__ = kind


def has_kernels() -> bool:
    """Whether this build of torch has oneDNN, and the names by which its compiler calls it."""
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in KERNELS)


class Kept:
    """What was made of a weight, as long as that is the same weight. Copies and pickles of a module go without."""

    def __init__(self, weight: Tensor, value: Any) -> None:
        self.weight = weight.detach()  # holding on to it, its address stays its own
        self.version = _version(weight)
        self.value = value

    def is_of(self, weight: Tensor) -> bool:
        """Whether `weight` is what it was then."""
        return (weight.data_ptr(), _version(weight)) == (self.weight.data_ptr(), self.version)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def can_draw(x: Tensor, weight: Tensor) -> bool:
    """Whether a layer may use what it keeps for an input x (B, ...): no gradients, one device and kind, the CPU."""
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class LaidOutLinear(nn.Linear):
    """A linear layer that `lay_out` has seen to."""

    _kept: Kept | None = None
    _halves: Kept | None = None

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        if x.ndim < 2 or not can_draw(x, self.weight) or not has_kernels():
            return super().forward(x)
        if self._kept is None or not self._kept.is_of(self.weight):
            self._kept = Kept(self.weight, torch.ops.mkldnn._reorder_linear_weight(self.weight.detach()))
        return torch.ops.mkldnn._linear_pointwise(x, self._kept.value, self.bias, *PLAIN)

    def gated(self, x: Tensor) -> Tensor | None:  # (..., in_features) -> (..., out_features / 2)
        """The first half of what comes out, times the GELU of the second; None where that takes no fewer passes."""
        if x.ndim < 2 or not can_draw(x, self.weight) or not has_kernels():
            return None
        if self._halves is None or not self._halves.is_of(self.weight):
            reorder = torch.ops.mkldnn._reorder_linear_weight
            self._halves = Kept(self.weight, [reorder(half) for half in self.weight.detach().chunk(2)])
        (value, gate), (b, c) = self._halves.value, halves(self.bias)
        kernel = torch.ops.mkldnn._linear_pointwise
        return kernel(x, value, b, *PLAIN).mul_(kernel(x, gate, c, *GELU))


def halves(bias: Tensor | None) -> Sequence[Tensor | None]:
    """A bias (D,) in two halves, or no two biases."""
    return (None, None) if bias is None else bias.chunk(2)


class LaidOutConv2d(nn.Conv2d):
    """A convolution that `lay_out` has seen to."""

    _kept: Kept | None = None
    _spread: Kept | None = None

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H', W'), in channels-last order
        if x.ndim != 4 or not self.is_plain() or not can_draw(x, self.weight) or not has_kernels():
            return super().forward(x)
        return self._convolve(x, self.padding)

    def takes_strips(self) -> bool:
        """Whether this is a plain 3x3 convolution, which keeps the size and can do so some rows at a time."""
        return self.is_plain() and self._how() == PLAIN_3X3 and has_kernels()

    def strip(self, x: Tensor) -> Tensor:  # (B, C, H + 2, W) -> (B, C', H, W)
        """Rows of what a large map becomes, of those rows and one above and below; where it `takes_strips`."""
        return self._convolve(x, (0, 1))

    def _convolve(self, x: Tensor, padding: str | tuple[int, ...]) -> Tensor:
        how = (padding, self.stride, self.dilation, self.groups)
        if self._kept is None or not self._kept.is_of(self.weight):
            # the size of an input is a hint: another one costs at most what it cost before
            order = torch.ops.mkldnn._reorder_convolution_weight(self.weight.detach(), *how, list(x.shape))
            self._kept = Kept(self.weight, order)
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(x, self._kept.value, self.bias, *how, *PLAIN)

    def _how(self) -> tuple[object, ...]:
        return self.kernel_size, self.padding, self.stride, self.dilation, self.groups

    def after_doubling(self, x: Tensor) -> Tensor | None:
        """What this 3x3 convolution makes of x (B, C, H, W) at twice its size, by nearest neighbour: (B, C', 2H, 2W).

        Both are one transposed convolution by a 4x4 kernel, which has 4/9 of the products, and no large map comes in
        between. Its weight is sums of this one, so results agree up to rounding. None where that is not for this layer.
        """
        if not self.takes_strips() or not can_draw(x, self.weight):
            return None
        options = ((1, 1), (0, 0), (2, 2), (1, 1), 1)  # padding, output_padding, stride, dilation, groups
        if self._spread is None or not self._spread.is_of(self.weight):
            weight = _spread(self.weight.detach()).contiguous()
            order = torch.ops.mkldnn._reorder_convolution_transpose_weight(weight, *options, list(x.shape))
            self._spread = Kept(self.weight, order)
        x = x.contiguous(memory_format=torch.channels_last)
        kernel = torch.ops.mkldnn._convolution_transpose_pointwise
        return kernel(x, self._spread.value, self.bias, *options, *PLAIN)

    def is_plain(self) -> bool:
        """Whether what lies beyond the edges is zeros, in numbers that are given."""
        return self.padding_mode == "zeros" and not isinstance(self.padding, str)


def _spread(weight: Tensor) -> Tensor:
    """The weight (C, C', 4, 4) of the transposed convolution that is doubling and a convolution by (C', C, 3, 3).

    Along an axis a pixel has two copies, side by side, so it adds to four places: by the weight, and by the same
    weight shifted by one.
    """
    for axis in (2, 3):
        weight = torch.cat([weight, torch.zeros_like(weight.narrow(axis, 0, 1))], axis)
        weight = weight + weight.roll(1, axis)
    return weight.flip(2, 3).transpose(0, 1)


def doubled(x: Tensor, conv: nn.Module) -> Tensor:
    """x (B, C, H, W) at twice its size by nearest neighbour, and `conv` of that: (B, C', 2H, 2W)."""
    h = conv.after_doubling(x) if isinstance(conv, LaidOutConv2d) else None
    return conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")) if h is None else h


LAID_OUT: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: LaidOutLinear, nn.Conv2d: LaidOutConv2d}
