"""DPT-Hybrid: monocular depth estimation by a vision transformer over ResNet features.

Ranftl et al. 2021, "Vision Transformers for Dense Prediction", section 3. Weight names are those of MiDaS 3.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import normalization
from ldm.modules.sdpa import scaled_dot_product_attention


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad x (B, C, H, W) with zeros, more on the right and bottom, for outputs of ceil(side / stride)."""
    h, w = (max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:])
    return F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2))


class StandardizedConv(nn.Conv2d):
    """Convolution with standardised weights (Qiao et al. 2019) and `pad_same`."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(width_in, width_out, kernel, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H / stride, W / stride)
        weight = self.weight.float()  # 1e-8 underflows in half precision
        var, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = ((weight - mean) * torch.rsqrt(var + 1e-8)).to(self.weight.dtype)
        return F.conv2d(pad_same(x, self.kernel_size[0], self.stride[0]), weight, stride=self.stride)


def conv_norm(width_in: int, width_out: int, kernel: int, stride: int) -> nn.Sequential:
    """Build a convolution and its norm."""
    parts = {"conv": StandardizedConv(width_in, width_out, kernel, stride), "norm": normalization(width_out)}
    return nn.Sequential(OrderedDict(parts))


class Bottleneck(nn.Module):
    """Residual bottleneck block (He et al. 2016)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        inner = width // 4
        self.downsample = conv_norm(width_in, width, 1, stride) if width_in != width else nn.Identity()
        self.conv1, self.norm1 = StandardizedConv(width_in, inner, 1), normalization(inner)
        self.conv2, self.norm2 = StandardizedConv(inner, inner, 3, stride), normalization(inner)
        self.conv3, self.norm3 = StandardizedConv(inner, width, 1), normalization(width)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, width, H / stride, W / stride)
        y = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(y)).relu()
        return (self.norm3(self.conv3(y)) + self.downsample(x)).relu()


class ResNet(nn.Module):
    """Features at 1/4 of the image size, halved by every further stage (width, blocks)."""

    def __init__(self, stem: int, stages: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.stem = conv_norm(3, stem, 7, 2)
        self.stages = nn.ModuleList()
        width_in = stem
        for number, (width, depth) in enumerate(stages):
            first = Bottleneck(width_in, width, 2 if number else 1)
            blocks = nn.Sequential(first, *(Bottleneck(width, width, 1) for _ in range(depth - 1)))
            self.stages.append(nn.Sequential(OrderedDict(blocks=blocks)))
            width_in = width

    def forward(self, x: Tensor) -> list[Tensor]:  # (B, 3, H, W) -> (B, width, H / 4, W / 4), ...
        x = F.max_pool2d(pad_same(self.stem(x).relu(), 3, 2), 3, 2)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, D)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer layer (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        parts = {"fc1": nn.Linear(width, 4 * width), "act": nn.GELU(), "fc2": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, D)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """ResNet and projection to tokens."""

    def __init__(self, stem: int, stages: Sequence[tuple[int, int]], width: int) -> None:
        super().__init__()
        self.backbone = ResNet(stem, stages)
        self.proj = nn.Conv2d(stages[-1][0], width, 1)


class Transformer(nn.Module):
    """Vision transformer over the ResNet's last features."""

    def __init__(
        self, width: int, depth: int, heads: int, grid: int, stem: int, stages: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(stem, stages, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)  # in published files; not used

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the ResNet's features of x (B, 3, H, W) and every block's tokens (B, 1 + H / 16 * W / 16, D)."""
        features = self.patch_embed.backbone(x)
        x = self.patch_embed.proj(features[-1])  # (B, D, H / 16, W / 16)
        place = self._positions(*x.shape[2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1) + place
        tokens = []
        for block in self.blocks:
            x = block(x)
            tokens.append(x)
        return features, tokens

    def _positions(self, height: int, width: int) -> Tensor:
        """Interpolate the positional embedding to (1, 1 + height * width, D)."""
        first, places = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        side = math.isqrt(places.shape[1])
        places = places.transpose(1, 2).unflatten(2, (side, side))  # (1, D, side, side)
        places = F.interpolate(places, size=(height, width), mode="bilinear")
        return torch.cat([first, places.flatten(2).transpose(1, 2)], dim=1)


class Reassemble(nn.ModuleDict):
    """Reassemble tokens, with the class token projected into each, to a feature map (Ranftl et al. 2021, 3.2)."""

    def __init__(self, width: int, halve: bool) -> None:
        project = nn.Sequential(nn.Linear(2 * width, width), nn.GELU())
        parts: dict[str, nn.Module] = {"0": nn.ModuleDict({"project": project}), "3": nn.Conv2d(width, width, 1)}
        super().__init__(parts | ({"4": nn.Conv2d(width, width, 3, stride=2, padding=1)} if halve else {}))

    def forward(self, tokens: Tensor, size: Sequence[int]) -> Tensor:
        """Reassemble tokens (B, 1 + h * w, D) to (B, D, h, w), or half of that."""
        readout, x = tokens[:, :1], tokens[:, 1:]
        x = self.get_submodule("0.project")(torch.cat([x, readout.expand_as(x)], dim=2))
        x = self["3"](x.transpose(1, 2).unflatten(2, tuple(size)))
        return self["4"](x) if "4" in self else x


class ResidualUnit(nn.Module):
    """Residual unit of two pre-activation convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        return x + self.conv2(self.conv1(x.relu()).relu())


class Fusion(nn.Module):
    """Fusion block: add features of the next finer level, refine, upsample twice. The coarsest adds nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(width, width, 1)
        self.resConfUnit1 = ResidualUnit(width)
        self.resConfUnit2 = ResidualUnit(width)

    def forward(self, x: Tensor, finer: Tensor | None = None) -> Tensor:  # (B, C, H, W) -> (B, C, 2 H, 2 W)
        x = x if finer is None else x + self.resConfUnit1(finer)
        x = F.interpolate(self.resConfUnit2(x), scale_factor=2, mode="bilinear", align_corners=True)
        return self.out_conv(x)


class DPTHybrid(nn.Module):
    """Relative inverse depth of images; larger is nearer. The defaults are the published sizes.

    Args:
        width: Width of the transformer.
        depth: Its layers.
        heads: Its attention heads.
        hooks: Its layers whose tokens the decoder uses.
        grid: Side of the learned positional embedding.
        stem: Width of the ResNet's stem.
        stages: Its three stages as (width, blocks).
        features: Width of the decoder.
    """

    def __init__(
        self,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        hooks: Sequence[int] = (8, 11),
        grid: int = 24,
        stem: int = 64,
        stages: Sequence[tuple[int, int]] = ((256, 3), (512, 4), (1024, 9)),
        features: int = 256,
    ) -> None:
        super().__init__()
        self.hooks = tuple(hooks)
        self.pretrained = nn.ModuleDict(
            {
                "model": Transformer(width, depth, heads, grid, stem, stages),
                "act_postprocess3": Reassemble(width, halve=False),
                "act_postprocess4": Reassemble(width, halve=True),
            }
        )
        widths = (stages[0][0], stages[1][0], width, width)  # at 1/4, 1/8, 1/16, 1/32
        scratch: dict[str, nn.Module] = {
            f"layer{i}_rn": nn.Conv2d(w, features, 3, padding=1, bias=False) for i, w in enumerate(widths, 1)
        }
        scratch |= {f"refinenet{i}": Fusion(features) for i in range(1, 5)}
        scratch["output_conv"] = nn.Sequential(
            nn.Conv2d(features, features // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(features // 2, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 1, 1),
            nn.ReLU(),
        )
        self.scratch = nn.ModuleDict(scratch)

    def forward(self, x: Tensor) -> Tensor:
        """Estimate depth (B, 1, H, W) >= 0 of x (B, 3, H, W) in [-1, 1] with sides that are multiples of 32."""
        maps, tokens = self.pretrained["model"](x)
        size = maps[-1].shape[2:]  # H / 16, W / 16
        levels = maps[:2]
        for name, hook in zip(("act_postprocess3", "act_postprocess4"), self.hooks):
            levels.append(self.pretrained[name](tokens[hook], size))
        levels = [self.scratch[f"layer{i}_rn"](level) for i, level in enumerate(levels, 1)]
        x = self.scratch["refinenet4"](levels[3])
        for i in (3, 2, 1):
            x = self.scratch[f"refinenet{i}"](x, levels[i - 1])
        return self.scratch["output_conv"](x)
