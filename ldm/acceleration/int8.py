"""Layers that multiply in 8-bit integers: smaller and, on CPUs with instructions for it, several times as fast.

Weights are rounded once, to 127 levels up and down for each output channel; inputs are rounded at every call, to 255
levels between their least and their largest number. The weights of the layers stay as they are.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.acceleration.attention import LongAttentionBF16
from ldm.acceleration.onednn import (
    GELU,
    LINEAR,
    PLAIN,
    FusedGEGLU,
    Packed,
    PackedConv2d,
    PackedLinear,
    PackedWeight,
    can_convolve,
    fits,
    halve,
    is_dense,
    restore_memory_format,
    usable,
)
from ldm.attach import Handle, Override, Priority, override_chain
from ldm.modules.attention import GEGLU, CrossAttention

KERNELS = ("qlinear_prepack", "qlinear_pointwise", "qconv_prepack", "qconv2d_pointwise")
LEVELS = 254  # between the least number and the largest; one more is left for rounding
MIN_CHANNELS = 32  # channels below which a layer is left alone: the first and the last see and make the image itself
MIN_ROWS = 256  # rows below which rounding costs more than it saves: timesteps, and the tokens of a prompt


def quantize_int8(network: nn.Module) -> Handle:
    """Let the wide linear layers and 2-d convolutions of `network` multiply in int8 on a CPU, without gradients.

    Attention to many keys uses bfloat16 where the processor has it. Works with `accelerate` in any order: layers that
    int8 does not pay for use its kernels.

    Returns:
        The handle; it has an override for every such layer.

    Raises:
        ValueError: if this CPU or this build of torch has no fast int8, if there is no such layer, or if layers are
            quantized already.
    """
    if not has_int8():
        raise ValueError("int8 needs a CPU that multiplies it quickly (x86 with AVX512-VNNI) and a torch with oneDNN")
    overrides: list[Override] = []
    for part in network.modules():
        found = override_chain(part)
        if found is None:  # a foreign forward
            continue
        if any(isinstance(override, (Int8Linear, Int8Conv2d)) for override in found):
            raise ValueError("this network is quantized already")
        if type(part) is nn.Linear and _is_wide(part):
            overrides.append(Int8Linear(part))
        elif type(part) is nn.Conv2d and _is_wide(part):
            overrides.append(Int8Conv2d(part))
    if not overrides:
        raise ValueError(f"there is no layer of at least {MIN_CHANNELS} channels to quantize")
    for part in network.modules():
        if type(part) is GEGLU:
            overrides.append(Int8GEGLU(part))
        elif isinstance(part, CrossAttention):
            overrides.append(LongAttentionBF16(part))
    return Handle("int8", [override.attach() for override in overrides])


def _is_wide(part: nn.Linear | nn.Conv2d) -> bool:
    return min(part.weight.shape[:2]) >= MIN_CHANNELS and getattr(part, "groups", 1) == 1


def has_int8() -> bool:
    """Return whether int8 is faster than float32 here: the CPU has an instruction for it, and torch the kernels."""
    if not torch.backends.mkldnn.is_available() or not torch.cpu._is_vnni_supported():
        return False
    return all(hasattr(torch.ops.onednn, name) for name in KERNELS)


class QuantizedWeight(NamedTuple):
    """A weight packed for int8, and for each output channel its scale and its zero point."""

    values: Tensor
    scales: Tensor
    zero_points: Tensor


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (values, scales) with weight = values * scales, about: int8 of its shape, and (C',)."""
    flat = weight.detach().flatten(1)
    scales = (flat.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (flat / scales[:, None]).round().to(torch.int8).view(weight.shape), scales


def quantize_input(x: Tensor) -> tuple[Tensor, float, int]:
    """Return (values, scale, zero_point) with x = (values - zero_point) * scale, about.

    values are uint8 in the memory order of x.

    Raises:
        ArithmeticError: for NaN or infinite numbers.
    """
    ordered = x.movedim(1, -1) if x.is_contiguous(memory_format=torch.channels_last) else x  # faster to go through
    low, high = (float(end) for end in torch.aminmax(ordered))
    if not math.isfinite(high - low):
        raise ArithmeticError("an int8 layer was given NaN or infinite numbers: try without int8, or other weights")
    low, high = min(low, 0.0), max(high, 0.0)  # a convolution's padding is 0, and must be one of the levels
    scale = max((high - low) / LEVELS, torch.finfo(torch.float32).tiny)
    zero_point = round(-low / scale)
    if not _has_quantize_per_tensor():
        half = torch.full((), zero_point + 0.5, device="cpu")  # conversion cuts off
        return torch.add(half, x, alpha=1 / scale).to(torch.uint8), scale, zero_point
    quantized = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8)
    # its memory as it is: `int_repr` would take longer to copy it than all the rest takes
    values = torch.empty(0, dtype=torch.uint8, device="cpu")
    return values.set_(quantized.untyped_storage(), 0, quantized.shape, quantized.stride()), scale, zero_point


@functools.cache
def _has_quantize_per_tensor() -> bool:
    """Whether torch still has the one function that rounds in a single pass, which warns once of its deprecation."""
    if not hasattr(torch, "quantize_per_tensor"):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.quantize_per_tensor(torch.zeros(1, device="cpu"), 1.0, 0, torch.quint8)
    return True


def _is_foreign(previous: Any, kind: type[Override]) -> bool:
    """Whether something other than the exact kernel lies below an int8 override, and must not be bypassed."""
    return previous is not None and (type(previous) is not kind or previous.previous is not None)


class Int8Linear(Packed):
    """`nn.Linear` in int8."""

    priority = Priority.INT8

    def __call__(self, input: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        """Multiply in int8, or by what lies below."""
        layer = self._module()
        weight: Any = layer._parameters.get("weight")
        if (
            type(layer) is not nn.Linear
            or input.numel() < MIN_ROWS * layer.in_features
            or not usable(input, weight)
            or input.shape[-1] != weight.shape[1]
            or not fits(layer._parameters.get("bias"), weight)
            or not is_dense(weight)
            or not LINEAR.unmodified()
            or _is_foreign(self.previous, PackedLinear)
        ):
            return self.original(input)
        packed = self.packed
        if packed is None or not packed.matches(weight):
            self.packed = packed = PackedWeight(weight, _prepack(weight))
        return _product(quantize_input(input), packed.value, layer._parameters.get("bias"), PLAIN)


class Int8GEGLU(FusedGEGLU):
    """`GEGLU` in int8, whose halves round their input once."""

    priority = Priority.INT8

    def __call__(self, x: Tensor) -> Tensor:  # (..., dim_in) -> (..., dim_out)
        """Compute the gated halves in int8, or by what lies below."""
        proj = self._module()._modules.get("proj")
        top = None if proj is None else proj.__dict__.get("forward")
        if (
            type(top) is not Int8Linear
            or _is_foreign(top.previous, PackedLinear)
            or _is_foreign(self.previous, FusedGEGLU)
            or not self.allowed(x, proj)
            or x.numel() < MIN_ROWS * proj.in_features
        ):
            return self.original(x)
        weight = proj._parameters["weight"]
        packed = self.packed
        if packed is None or not packed.matches(weight):
            self.packed = packed = PackedWeight(weight, [_prepack(half) for half in weight.chunk(2)])
        inputs = quantize_input(x)
        (value, gate), (b, c) = packed.value, halve(proj._parameters.get("bias"))
        return _product(inputs, value, b, PLAIN).mul_(_product(inputs, gate, c, GELU))


def _prepack(weight: Tensor) -> QuantizedWeight:
    values, scales = quantize_weight(weight)
    order = torch.ops.onednn.qlinear_prepack(values, None)
    return QuantizedWeight(order, scales, torch.zeros_like(scales, dtype=torch.int32))


def _product(
    inputs: tuple[Tensor, float, int], weight: QuantizedWeight, bias: Tensor | None, then: tuple[str, list[Any], str]
) -> Tensor:
    """Multiply quantized inputs (..., D) by a weight (D', D), and apply an operation to that: (..., D')."""
    product: Tensor = torch.ops.onednn.qlinear_pointwise(*inputs, *weight, bias, 1.0, 0, torch.float32, *then)
    return product


class Int8Conv2d(Packed):
    """`nn.Conv2d` in int8.

    Chunks and the upsampling kernel are float32 and not used with it: nine products in int8 are faster than four of
    those.
    """

    priority = Priority.INT8

    def __call__(self, input: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H', W') in the memory format of the input
        """Convolve in int8, or by what lies below."""
        conv = self._module()
        if not can_convolve(conv, input) or _is_foreign(self.previous, PackedConv2d):
            return self.original(input)
        weight, options = conv._parameters["weight"], (conv.stride, conv.padding, conv.dilation, conv.groups)
        x = input.contiguous(memory_format=torch.channels_last)
        values, scale, zero_point = quantize_input(x)
        packed = self.packed
        if packed is None or not packed.matches(weight, options):
            rounded, scales = quantize_weight(weight)
            order = torch.ops.onednn.qconv_prepack(rounded, scales, 1.0, 128, *options, list(x.shape))
            quantized = QuantizedWeight(order, scales, torch.zeros_like(scales, dtype=torch.int32))
            self.packed = packed = PackedWeight(weight, quantized, options)
        out = torch.ops.onednn.qconv2d_pointwise(
            *(values, scale, zero_point, *packed.value, conv._parameters.get("bias")),
            *(*options, 1.0, 0, torch.float32, *PLAIN),
        )
        return restore_memory_format(out, input)
