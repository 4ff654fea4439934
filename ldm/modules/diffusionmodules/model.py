"""Convolutional encoder and decoder of the first stage (Esser et al. 2021, "Taming Transformers", appendix)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.limits import check_number
from ldm.modules.attending import attend
from ldm.modules.layout import can_draw, doubled
from ldm.modules.strips import add, convolve


def Normalize(channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """The first stage's group norm: eps 1e-6. Fewer groups only where 32 do not divide a small model's channels."""
    return nn.GroupNorm(math.gcd(num_groups, channels), channels, eps=1e-6)


def regroup(module: nn.Module, channels_per_group: int) -> None:
    """Give every group norm in `module` groups of this many channels, in place of 32 groups.

    In a narrow network 32 groups are of one or two channels. Each map then loses its own mean, which says how bright
    a plain area is, and colours are learnt late.
    """
    for name, norm in module.named_modules():
        if isinstance(norm, nn.GroupNorm):
            if norm.num_channels % channels_per_group:
                raise ValueError(
                    f"channels_per_group={channels_per_group} does not divide {name}'s {norm.num_channels}"
                )
            norm.num_groups = norm.num_channels // channels_per_group


def channels_last(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, C, H, W) in the order that a CPU's convolutions by `weight` are quickest in while nothing is trained.

    The layers keep the order that they are given.
    """
    return x.contiguous(memory_format=torch.channels_last) if can_draw(x, weight) else x


class Upsample(nn.Module):
    """Twice the size by nearest neighbour, then a 3x3 convolution if `with_conv`."""

    def __init__(self, channels: int, with_conv: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, 2H, 2W)
        return doubled(x, self.conv)


class Downsample(nn.Module):
    """Half the size, by a strided 3x3 convolution if `with_conv`, else by average pooling."""

    def __init__(self, channels: int, with_conv: bool = True) -> None:
        super().__init__()
        # Published weights expect one row and column of zeros at the far edges only.
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H/2, W/2)
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return self.conv(self.pad(x))


class ResnetBlock(nn.Module):
    """Pre-activation residual block: twice (group norm, SiLU, 3x3 convolution)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = Normalize(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = Normalize(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, Cin, H, W) -> (B, Cout, H, W)
        h = convolve(x, self.norm1, self.conv1)
        return convolve(h, self.norm2, self.conv2, dropout=self.dropout, residual=(x, self.nin_shortcut))


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Normalize(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> same
        h = self.norm(x)
        # (B, C, H, W) -> (B, 1, HW, C): one head as wide as the channels
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        h = attend(q, k, v)
        return add(self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape)), x)


ATTENTION_TYPES = (
    "vanilla",
    "vanilla-xformers",
    "none",
)  # xformers was only another kernel for the same function


def make_attn(channels: int, attn_type: str = "vanilla") -> nn.Module:
    """The attention block that a config's `attn_type` names; "none" is the identity."""
    if attn_type not in ATTENTION_TYPES:
        raise ValueError(f"attn_type must be one of {', '.join(ATTENTION_TYPES)}, not {attn_type!r}")
    return nn.Identity() if attn_type == "none" else AttnBlock(channels)


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention where the config asks for it, then a resampling."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: int,
        dropout: float,
        attn_type: str | None,
        **resample: nn.Module,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * check_number(blocks, "num_res_blocks")
        self.block = nn.ModuleList(ResnetBlock(a, b, dropout) for a, b in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(make_attn(out_channels, attn_type) for _ in range(blocks) if attn_type is not None)
        # Named by the caller ("downsample" or "upsample"): the name is part of the published state dict.
        for name, module in resample.items():
            self.add_module(name, module)
        self._resample = tuple(resample)

    def stages(self) -> Iterator[nn.Module]:
        """What a map goes through, one after the other.

        Whoever calls them in turn lets go of each result at the next. A call of the whole level would hold on to the
        map that it began with, and at the full resolution maps are all the memory there is.
        """
        for i, block in enumerate(self.block):
            yield block
            if self.attn:
                yield self.attn[i]
        for name in self._resample:
            yield getattr(self, name)

    def forward(self, x: Tensor) -> Tensor:  # (B, Cin, H, W) -> (B, Cout, H', W')
        for stage in self.stages():
            x = stage(x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float, attn_type: str) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = make_attn(channels, attn_type)
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> same
        return self.block_2(self.attn_1(self.block_1(x)))


# Keys of a public `ddconfig` that only one of encoder and decoder reads, or neither.
SHARED_KEYS = {"out_ch", "in_channels", "double_z", "give_pre_end", "tanh_out", "resolution", "use_linear_attn"}


def check_ignored(ignored: Mapping[str, object]) -> None:
    """ValueError for entries of a `ddconfig` that mean nothing to encoder and decoder."""
    if unknown := sorted(ignored.keys() - SHARED_KEYS):
        raise ValueError(f"ddconfig has no option {', '.join(unknown)}")
    if ignored.get("use_linear_attn"):
        raise ValueError("ddconfig.use_linear_attn is not supported: no published first stage has it")


class Encoder(nn.Module):
    """Image (B, in_channels, H, W) to moments or features (B, z_channels or twice that, H/f, W/f), f = 2^(levels-1).

    `attn_resolutions` are pixel sizes counted from `resolution`; they fix where attention stands, not the input size.
    The decoder's keys of a shared `ddconfig` are accepted and ignored.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        attn_type: str = "vanilla",
        **ignored: object,
    ) -> None:
        super().__init__()
        check_ignored(ignored)
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for i, mult in enumerate(ch_mult):
            attn = attn_type if resolution // 2**i in attn_resolutions else None
            last = i == len(ch_mult) - 1
            resample = {} if last else {"downsample": Downsample(ch * mult, resamp_with_conv)}
            self.down.append(Level(width, ch * mult, num_res_blocks, dropout, attn, **resample))
            width = ch * mult
        self.mid = Middle(width, dropout, attn_type)
        self.norm_out = Normalize(width)
        self.conv_out = nn.Conv2d(width, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, in_channels, H, W) -> (B, z, H/f, W/f)
        h = self.conv_in(channels_last(x, self.conv_in.weight))
        for level in cast(Iterable[Level], self.down):
            for stage in level.stages():
                h = stage(h)
        return convolve(self.mid(h), self.norm_out, self.conv_out).contiguous()


class Decoder(nn.Module):
    """Latent (B, z_channels, h, w) to image (B, out_ch, f h, f w); the encoder's mirror with one block more a level."""

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
        resolution: int,
        z_channels: int,
        give_pre_end: bool = False,
        tanh_out: bool = False,
        attn_type: str = "vanilla",
        **ignored: object,
    ) -> None:
        super().__init__()
        check_ignored(ignored)
        self.give_pre_end = give_pre_end
        self.tanh_out = tanh_out
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = Middle(width, dropout, attn_type)
        levels: list[Level] = []
        for i, mult in reversed(list(enumerate(ch_mult))):
            attn = attn_type if resolution // 2**i in attn_resolutions else None
            resample = {} if i == 0 else {"upsample": Upsample(ch * mult, resamp_with_conv)}
            levels.append(Level(width, ch * mult, num_res_blocks + 1, dropout, attn, **resample))
            width = ch * mult
        self.up = nn.ModuleList(reversed(levels))  # published numbering: up.0 is the full resolution
        self.norm_out = Normalize(width)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """The weight that adversarial training balances its gradients on."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:  # (B, z_channels, h, w) -> (B, out_ch, f h, f w)
        h = self.mid(self.conv_in(channels_last(z, self.conv_in.weight)))
        for level in reversed(cast(Sequence[Level], self.up)):
            for stage in level.stages():
                h = stage(h)
        if self.give_pre_end:
            return h
        h = convolve(h, self.norm_out, self.conv_out).contiguous()
        return torch.tanh(h) if self.tanh_out else h
