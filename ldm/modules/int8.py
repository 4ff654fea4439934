"""Layers that multiply in 8-bit integers: smaller and, on CPUs with instructions for it, several times as quick.

Weights are rounded once, to 127 steps up and down for each output channel; what comes in is rounded at every call, to
255 steps between its least and its largest number. The weights themselves stay as they are beside that: what a state
dict holds does not change.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.modules.attention import CrossAttention
from ldm.modules.layout import GELU, PLAIN, Kept, LaidOutConv2d, LaidOutLinear, can_draw, halves

KERNELS = ("qlinear_prepack", "qlinear_pointwise", "qconv_prepack", "qconv2d_pointwise")
STEPS = 254  # between the least number and the largest; one more is left for rounding
NARROW = 32  # channels below which a layer is left alone: the first and the last see and make the picture itself
FEW = 256  # rows below which rounding costs more than it saves: timesteps, and the tokens of a prompt


def quantize(module: nn.Module) -> int:
    """Have the wide linear layers and 2-d convolutions in `module` multiply in int8 while it draws; how many they are.

    That is without gradients, on a CPU; elsewhere they go on in their weights' precision. Attention to many keys makes
    do with bfloat16. ValueError if this CPU or this build of torch cannot, or if there is no such layer.
    """
    if not has_int8():
        raise ValueError(
            "int8 is for CPUs that multiply it quickly (x86 with AVX512-VNNI), by a torch with oneDNN: not so here"
        )
    count = 0
    for part in module.modules():
        kind = QUANTIZED.get(type(part))
        if kind is not None and _is_wide(part):
            part.__class__ = kind
            count += 1
        elif isinstance(part, CrossAttention):
            part.coarse = True
    if not count:
        raise ValueError(f"there is no layer of {NARROW} channels and more to quantize")
    return count


def _is_wide(part: nn.Module) -> bool:
    return isinstance(part, (nn.Linear, nn.Conv2d)) and (
        min(part.weight.shape[:2]) >= NARROW and getattr(part, "groups", 1) == 1
    )


def has_int8() -> bool:
    """Whether int8 is quicker than float32 here: there are an instruction for it and torch's names for the kernels."""
    if not torch.backends.mkldnn.is_available() or not torch.cpu._is_vnni_supported():
        return False
    return all(hasattr(torch.ops.onednn, name) for name in KERNELS)


class Rounded(NamedTuple):
    """A weight in oneDNN's order for int8: its numbers, and for each output channel its step and its zero."""

    values: Tensor
    steps: Tensor
    zeros: Tensor


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(values, steps) with a weight (C', ...) about values * steps: int8 of its shape, and (C',)."""
    flat = weight.detach().flatten(1)
    steps = (flat.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (flat / steps[:, None]).round().to(torch.int8).view(weight.shape), steps


def rounded_input(x: Tensor) -> tuple[Tensor, float, int]:
    """(values, step, zero) with x about (values - zero) * step, where values are uint8 in the memory order of x."""
    packed = x.movedim(1, -1) if x.is_contiguous(memory_format=torch.channels_last) else x  # quicker to go through
    low, high = (float(end) for end in torch.aminmax(packed))
    if not math.isfinite(high - low):
        raise ArithmeticError("a layer in int8 was given NaN or infinite numbers: try without int8, or other weights")
    low, high = min(low, 0.0), max(high, 0.0)  # a convolution's padding is 0, and must be one of the steps
    step = max((high - low) / STEPS, torch.finfo(torch.float32).tiny)
    zero = round(-low / step)
    if not _quantizes():
        half = torch.full((), zero + 0.5, device="cpu")  # conversion cuts off
        return torch.add(half, x, alpha=1 / step).to(torch.uint8), step, zero
    steps = torch.quantize_per_tensor(x, step, zero, torch.quint8)
    # its memory as it is: `int_repr` would take longer to copy it than all the rest takes
    values = torch.empty(0, dtype=torch.uint8, device="cpu")
    return values.set_(steps.untyped_storage(), 0, steps.shape, steps.stride()), step, zero


@functools.cache
def _quantizes() -> bool:
    """Whether torch still has the one function that rounds in a single pass, which it calls deprecated, once."""
    if not hasattr(torch, "quantize_per_tensor"):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.quantize_per_tensor(torch.zeros(1, device="cpu"), 1.0, 0, torch.quint8)
    return True


class Int8Linear(LaidOutLinear):
    """A linear layer that `quantize` has seen to."""

    _rounded: Kept | None = None
    _rounded_halves: Kept | None = None

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        if not self._pays(x):
            return super().forward(x)
        if self._rounded is None or not self._rounded.is_of(self.weight):
            self._rounded = Kept(self.weight, _prepared(self.weight))
        return _product(rounded_input(x), self._rounded.value, self.bias, PLAIN)

    def gated(self, x: Tensor) -> Tensor | None:  # (..., in_features) -> (..., out_features / 2)
        """The first half of what comes out, times the GELU of the second."""
        if not self._pays(x):
            return super().gated(x)
        if self._rounded_halves is None or not self._rounded_halves.is_of(self.weight):
            self._rounded_halves = Kept(self.weight, [_prepared(half) for half in self.weight.chunk(2)])
        inputs = rounded_input(x)
        (value, gate), (b, c) = self._rounded_halves.value, halves(self.bias)
        return _product(inputs, value, b, PLAIN).mul_(_product(inputs, gate, c, GELU))

    def _pays(self, x: Tensor) -> bool:
        return x.numel() >= FEW * self.in_features and can_draw(x, self.weight)


def _prepared(weight: Tensor) -> Rounded:
    values, steps = rounded(weight)
    order = torch.ops.onednn.qlinear_prepack(values, None)
    return Rounded(order, steps, torch.zeros_like(steps, dtype=torch.int32))


def _product(
    inputs: tuple[Tensor, float, int], weight: Rounded, bias: Tensor | None, then: tuple[str, list[Any], str]
) -> Tensor:
    """Inputs (..., D) as `rounded_input` gives them times a weight (D', D), and what is done to that: (..., D')."""
    product: Tensor = torch.ops.onednn.qlinear_pointwise(*inputs, *weight, bias, 1.0, 0, torch.float32, *then)
    return product


class Int8Conv2d(LaidOutConv2d):
    """A convolution that `quantize` has seen to."""

    _rounded: Kept | None = None

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H', W'), in channels-last order
        if x.ndim != 4 or not self.is_plain() or not can_draw(x, self.weight):
            return super().forward(x)
        how = (self.stride, self.padding, self.dilation, self.groups)
        inputs, step, zero = rounded_input(x.contiguous(memory_format=torch.channels_last))
        if self._rounded is None or not self._rounded.is_of(self.weight):
            values, steps = rounded(self.weight)
            order = torch.ops.onednn.qconv_prepack(values, steps, 1.0, 128, *how, list(x.shape))
            self._rounded = Kept(self.weight, Rounded(order, steps, torch.zeros_like(steps, dtype=torch.int32)))
        return torch.ops.onednn.qconv2d_pointwise(
            inputs, step, zero, *self._rounded.value, self.bias, *how, 1.0, 0, torch.float32, *PLAIN
        )

    def takes_strips(self) -> bool:
        """Neither those nor `after_doubling`, which are float32: nine products in int8 are quicker than four in it."""
        return False


QUANTIZED: dict[type[nn.Module], Any] = {
    nn.Linear: Int8Linear,
    LaidOutLinear: Int8Linear,
    nn.Conv2d: Int8Conv2d,
    LaidOutConv2d: Int8Conv2d,
}
