"""Convolutional encoder and decoder of the first stage (Esser et al. 2021, "Taming Transformers", appendix)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import LinearAttention, MemoryEfficientCrossAttention
from ldm.modules.sdpa import scaled_dot_product_attention


def get_timestep_embedding(timesteps: Tensor, embedding_dim: int) -> Tensor:
    """Sinusoidal embeddings of timesteps (B,), sines first (Ho et al. 2020): (B, embedding_dim)."""
    half = embedding_dim // 2
    frequencies = torch.exp(torch.arange(half, device=timesteps.device) * -(math.log(10000) / (half - 1)))
    angles = timesteps.float()[:, None] * frequencies
    emb = torch.cat([angles.sin(), angles.cos()], dim=1)
    return F.pad(emb, (0, embedding_dim % 2))


def nonlinearity(x: Tensor) -> Tensor:
    """Swish: x * sigmoid(x)."""
    return F.silu(x)


def Normalize(in_channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """Build the first stage's group norm: eps 1e-6, 32 groups where 32 divides the channels."""
    return nn.GroupNorm(math.gcd(num_groups, in_channels), in_channels, eps=1e-6, affine=True)


def regroup(module: nn.Module, channels_per_group: int) -> None:
    """Give every group norm in `module` groups of this many channels, in place of 32 groups.

    In a narrow network 32 groups have one or two channels each. Every map then loses its own mean, which holds the
    brightness of a plain area, and colors are learned late.
    """
    for name, norm in module.named_modules():
        if isinstance(norm, nn.GroupNorm):
            if norm.num_channels % channels_per_group:
                raise ValueError(
                    f"channels_per_group={channels_per_group} does not divide {name}'s {norm.num_channels}"
                )
            norm.num_groups = norm.num_channels // channels_per_group


class Upsample(nn.Module):
    """Double the size by nearest neighbor, then a 3x3 convolution if `with_conv`."""

    def __init__(self, in_channels: int, with_conv: bool = True) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, 2H, 2W)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x


class Downsample(nn.Module):
    """Halve the size, by a strided 3x3 convolution if `with_conv`, else by average pooling."""

    def __init__(self, in_channels: int, with_conv: bool = True) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            # Published weights expect one row and column of zeros at the far edges only.
            self.pad = nn.ZeroPad2d((0, 1, 0, 1))
            self.conv = nn.Conv2d(in_channels, in_channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H/2, W/2)
        return self.conv(self.pad(x)) if self.with_conv else F.avg_pool2d(x, 2)


class ResnetBlock(nn.Module):
    """Pre-activation residual block: twice (group norm, swish, 3x3 convolution).

    Args:
        in_channels, out_channels: channels of the input, and of the output (None: the same).
        conv_shortcut: where they differ, a 3x3 convolution on the residual path instead of a 1x1 one.
        dropout: probability of dropout before the second convolution.
        temb_channels: width of a timestep embedding that is added between the convolutions; 0 for none.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float = 0.0,
        temb_channels: int = 512,
    ) -> None:
        super().__init__()
        out_channels = out_channels or in_channels
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.use_conv_shortcut = conv_shortcut
        self.norm1 = Normalize(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = Normalize(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            if conv_shortcut:
                self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 3, padding=1)
            else:
                self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """Map x (B, Cin, H, W), with a timestep embedding (B, temb_channels) if it takes one, to (B, Cout, H, W)."""
        h = self.conv1(nonlinearity(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class LinAttnBlock(LinearAttention):
    """Linear attention with the constructor of `AttnBlock`."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(dim=in_channels, heads=1, dim_head=in_channels)


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels, residual."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.norm = Normalize(in_channels)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> same
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (B, HW, C)
        h = self.attend(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with q, k, v (B, 1, HW, C), one head as wide as the channels -> (B, 1, HW, C)."""
        return scaled_dot_product_attention(q, k, v)


MemoryEfficientAttnBlock = AttnBlock  # published for xFormers, which was another kernel for the same function


class MemoryEfficientCrossAttentionWrapper(MemoryEfficientCrossAttention):
    """Cross-attention over the pixels of a map, residual."""

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend from x (B, C, H, W) to the context (B, M, D), or to itself."""
        out = super().forward(x.flatten(2).transpose(1, 2), context=context, mask=mask)
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])


def make_attn(in_channels: int, attn_type: str = "vanilla", attn_kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """Build the attention block that a config's `attn_type` names; "none" is the identity."""
    if attn_type in ("vanilla", "vanilla-xformers"):
        return AttnBlock(in_channels)
    if attn_type == "memory-efficient-cross-attn":
        return MemoryEfficientCrossAttentionWrapper(**{**(attn_kwargs or {}), "query_dim": in_channels})
    if attn_type == "linear":
        return LinAttnBlock(in_channels)
    if attn_type == "none":
        return nn.Identity()
    known = "vanilla, vanilla-xformers, memory-efficient-cross-attn, linear, none"
    raise ValueError(f"attn_type must be one of {known}, not {attn_type!r}")


# Keys of a public `ddconfig` that only one of encoder and decoder reads, or neither.
SHARED_KEYS = {"out_ch", "in_channels", "double_z", "give_pre_end", "tanh_out", "resolution", "use_linear_attn"}


def check_ignored(ignored: Mapping[str, object]) -> None:
    """Raise ValueError for entries of a `ddconfig` that mean nothing to encoder and decoder."""
    if unknown := sorted(ignored.keys() - SHARED_KEYS):
        raise ValueError(f"ddconfig has no option {', '.join(unknown)}")


class Encoder(nn.Module):
    """Encode an image (B, in_channels, H, W) to moments or features (B, z_channels or twice that, H/f, W/f).

    f = 2^(levels - 1). `attn_resolutions` are sides in pixels counted from `resolution`; they fix where attention
    stands, not the size of the input. The decoder's keys of a shared `ddconfig` are accepted and ignored.
    """

    mid: Any  # blocks by name, see `make_middle`

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int | None = None,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        **ignore_kwargs: object,
    ) -> None:
        super().__init__()
        check_ignored(ignore_kwargs)
        attn_type = "linear" if use_linear_attn else attn_type
        self.ch = ch
        self.temb_ch = 0
        self.num_resolutions = len(ch_mult)
        self.num_res_blocks = num_res_blocks
        self.resolution = resolution
        self.in_channels = in_channels

        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for level, mult in enumerate(ch_mult):
            down = nn.Module()
            down.block, down.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(num_res_blocks):
                down.block.append(
                    ResnetBlock(in_channels=width, out_channels=ch * mult, temb_channels=0, dropout=dropout)
                )
                width = ch * mult
                if resolution // 2**level in attn_resolutions:
                    down.attn.append(make_attn(width, attn_type))
            if level < len(ch_mult) - 1:
                down.downsample = Downsample(width, resamp_with_conv)
            self.down.append(down)
        self.mid = make_middle(width, dropout, attn_type)
        self.norm_out = Normalize(width)
        self.conv_out = nn.Conv2d(width, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, in_channels, H, W) -> (B, z, H/f, W/f)
        temb = None  # first stages have no timestep
        h = self.conv_in(x)
        down: Any
        for level, down in enumerate(self.down):
            for i, block in enumerate(down.block):
                h = block(h, temb)
                if len(down.attn) > 0:
                    h = down.attn[i](h)
            if level < self.num_resolutions - 1:
                h = down.downsample(h)
        h = self.mid.block_1(h, temb)
        h = self.mid.attn_1(h)
        h = self.mid.block_2(h, temb)
        return self._output(h)

    def _output(self, h: Tensor) -> Tensor:
        return self.conv_out(nonlinearity(self.norm_out(h)))


class Decoder(nn.Module):
    """Decode a latent (B, z_channels, h, w) to an image (B, out_ch, f h, f w).

    The encoder's mirror with one block more a level.
    """

    mid: Any  # blocks by name, see `make_middle`

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int | None = None,
        resolution: int,
        z_channels: int,
        give_pre_end: bool = False,
        tanh_out: bool = False,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        **ignorekwargs: object,
    ) -> None:
        super().__init__()
        check_ignored(ignorekwargs)
        attn_type = "linear" if use_linear_attn else attn_type
        self.ch = ch
        self.temb_ch = 0
        self.num_resolutions = len(ch_mult)
        self.num_res_blocks = num_res_blocks
        self.resolution = resolution
        self.in_channels = in_channels
        self.give_pre_end = give_pre_end
        self.tanh_out = tanh_out
        lowest = resolution // 2 ** (len(ch_mult) - 1)
        self.z_shape = (1, z_channels, lowest, lowest)

        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = make_middle(width, dropout, attn_type)
        levels: list[nn.Module] = []
        for level, mult in reversed(list(enumerate(ch_mult))):
            up = nn.Module()
            up.block, up.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                up.block.append(
                    ResnetBlock(in_channels=width, out_channels=ch * mult, temb_channels=0, dropout=dropout)
                )
                width = ch * mult
                if resolution // 2**level in attn_resolutions:
                    up.attn.append(make_attn(width, attn_type))
            if level > 0:
                up.upsample = Upsample(width, resamp_with_conv)
            levels.append(up)
        self.up = nn.ModuleList(reversed(levels))  # published numbering: up.0 is the full resolution
        self.norm_out = Normalize(width)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """The weight that adversarial training balances its gradients on."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:  # (B, z_channels, h, w) -> (B, out_ch, f h, f w)
        temb = None  # first stages have no timestep
        h = self.conv_in(z)
        h = self.mid.block_1(h, temb)
        h = self.mid.attn_1(h)
        h = self.mid.block_2(h, temb)
        for level in reversed(range(self.num_resolutions)):
            up: Any = self.up[level]
            for i, block in enumerate(up.block):
                h = block(h, temb)
                if len(up.attn) > 0:
                    h = up.attn[i](h)
            if level > 0:
                h = up.upsample(h)
        if self.give_pre_end:
            return h
        h = self._output(h)
        return torch.tanh(h) if self.tanh_out else h

    def _output(self, h: Tensor) -> Tensor:
        return self.conv_out(nonlinearity(self.norm_out(h)))


def make_middle(channels: int, dropout: float, attn_type: str) -> nn.Module:
    """Build the lowest resolution: residual block `block_1`, attention `attn_1`, residual block `block_2`."""
    middle = nn.Module()
    middle.block_1 = ResnetBlock(in_channels=channels, temb_channels=0, dropout=dropout)
    middle.attn_1 = make_attn(channels, attn_type)
    middle.block_2 = ResnetBlock(in_channels=channels, temb_channels=0, dropout=dropout)
    return middle
