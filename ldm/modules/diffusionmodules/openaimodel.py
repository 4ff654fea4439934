"""The denoising UNet (Dhariwal and Nichol 2021), with cross-attention (Rombach et al. 2022, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attending import attend
from ldm.modules.attention import SelfAttending, SpatialTransformer
from ldm.modules.diffusionmodules.options import (
    check_context,
    check_heads,
    divide,
    make_label_embedding,
    per_level,
    split_heads,
)
from ldm.modules.diffusionmodules.util import (
    avg_pool_nd,
    checkpoint,
    conv_nd,
    normalization,
    timestep_embedding,
    zero_module,
)
from ldm.modules.feature_caching import FeatureCache
from ldm.modules.layout import doubled

Size = Sequence[int]

OUTER = 1  # how many of the input blocks, and of the output blocks, are computed around cached features


class Upsample(nn.Module):
    """Nearest-neighbour enlargement to `size`, or to twice the size, then a convolution if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None) -> None:
        super().__init__()
        self.conv = conv_nd(dims, channels, out_channels or channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:  # (B, C, H, W) -> (B, C', *size)
        if size is None or tuple(size) == tuple(2 * length for length in x.shape[2:]):
            return doubled(x, self.conv)
        return self.conv(F.interpolate(x, size, mode="nearest"))


class Downsample(nn.Module):
    """Half the size, by a strided convolution if `use_conv`, else by average pooling."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None) -> None:
        super().__init__()
        out_channels = out_channels or channels
        if use_conv:
            self.op = conv_nd(dims, channels, out_channels, 3, stride=2, padding=1)
        else:
            self.op = avg_pool_nd(dims, kernel_size=2, stride=2)
        self.pools = not use_conv

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:  # (B, C, H, W) -> (B, C', H/2, W/2)
        if self.pools and min(x.shape[2:]) < 2:
            raise ValueError(
                "the picture is too small for this network, which halves its sides by averaging (conv_resample: false "
                "or resblock_updown: true) and has come to a side of 1: make it larger"
            )
        return self.op(x)


class ResBlock(nn.Module):
    """Residual block modulated by the timestep embedding; with `up` or `down` it also resamples.

    use_scale_shift_norm: the embedding scales and shifts the second norm instead of being added before it.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_scale_shift_norm: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        out_channels = out_channels or channels
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        self.resample: nn.Module | None = None
        if up or down:
            self.resample = (Upsample if up else Downsample)(channels, False, dims)
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        )
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        same = out_channels == channels
        self.skip_connection = nn.Identity() if same else conv_nd(dims, channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, size: Size | None = None) -> Tensor:
        """x (B, C, H, W), emb (B, emb_channels) -> (B, C', H', W')."""
        return checkpoint(self._forward, (x, emb, size), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor, size: Size | None) -> Tensor:
        norm, activation, conv = self.in_layers
        h = activation(norm(x))
        if self.resample is not None:
            h, x = self.resample(h, size), self.resample(x, size)
        h = conv(h)
        emb = self.emb_layers(emb).to(h.dtype)
        emb = emb.reshape(*emb.shape, *(1,) * (h.ndim - 2))  # (B, C', 1, 1)
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


class AttentionBlock(SelfAttending):
    """Self-attention over all positions, residual.

    use_new_attention_order: the joint projection is ordered [q, k, v] x heads, rather than heads x [q, k, v].
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        if num_head_channels != -1:
            num_heads = divide(channels, num_head_channels, "channels", "num_head_channels")
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint
        self.use_new_attention_order = use_new_attention_order
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> same
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x.flatten(2)))  # (B, 3C, N)
        if self.use_new_attention_order:
            qkv = qkv.unflatten(1, (3, self.num_heads, -1)).movedim(1, 0)
        else:
            qkv = qkv.unflatten(1, (self.num_heads, 3, -1)).movedim(2, 0)
        q, k, v = qkv.transpose(-1, -2)  # each (B, heads, N, C / heads)
        h = v if self.alone else attend(q, k, v)
        h = h.transpose(-1, -2).flatten(1, 2)  # (B, C, N)
        return x + self.proj_out(h).reshape(x.shape)


class TimestepEmbedSequential(nn.Sequential):
    """Layers in a row, each given what its kind takes: the embedding, the context, the size to resample to."""

    def forward(  # type: ignore[override]  # nn.Sequential's takes x alone
        self, x: Tensor, emb: Tensor, context: Tensor | None = None, size: Size | None = None
    ) -> Tensor:
        """x (B, C, H, W), emb (B, emb_channels), context (B, M, D), size: (H', W') -> (B, C', H', W')."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb, size)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class UNetModel(nn.Module):
    """UNet that predicts noise, v or x0 from a noisy latent, its timestep and a condition.

    image_size: kept for public configs; the network takes any size.
    attention_resolutions: downsampling factors (1, 2, 4 ...) at which blocks have attention.
    num_res_blocks: residual blocks a level, one number or one a level; num_attention_blocks: how many of them attend.
    num_heads / num_head_channels: give one; the other follows from the width.
    use_spatial_transformer: attend on a context of width `context_dim`, with `transformer_depth` blocks.
    disable_self_attentions: per level, attend on the context where self-attention would be.
    num_classes: an int for class labels (B,), "continuous" for scalars (B,), "sequential" for vectors
        (B, adm_in_channels); the label's embedding is added to the timestep's.
    legacy, use_fp16, num_heads_upsample: kept for public configs. Heads come out the same either way, and the
        precision is that of the weights, chosen when a model is loaded.
    """

    feature_cache: FeatureCache | None = None  # see `caching_features`

    def __init__(
        self,
        image_size: int | Sequence[int] | None,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | str | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | Sequence[int] | None = None,
        legacy: bool = True,
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        use_linear_in_transformer: bool = False,
        adm_in_channels: int | None = None,
    ) -> None:
        super().__init__()
        check_context(use_spatial_transformer, context_dim)
        check_heads(num_heads, num_head_channels, num_heads_upsample)
        self.image_size = image_size
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.model_channels = model_channels
        self.num_classes = num_classes

        time_dim = model_channels * 4
        self.time_embed = nn.Sequential(nn.Linear(model_channels, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        if num_classes is not None:
            self.label_emb = make_label_embedding(num_classes, time_dim, adm_in_channels)

        levels = len(channel_mult)
        no_self_attention = per_level(disable_self_attentions or False, levels, "disable_self_attentions")
        limits = per_level(num_attention_blocks or 2**30, levels, "num_attention_blocks")

        def res(channels: int, out: int, **resample: bool) -> ResBlock:
            """A residual block from one width to another."""
            return ResBlock(channels, time_dim, dropout, out, dims, use_checkpoint, use_scale_shift_norm, **resample)

        def attention(channels: int, level: int | None) -> nn.Module:
            """What attends at a level, or in the middle (None)."""
            heads, width = split_heads(channels, num_heads, num_head_channels)
            if not use_spatial_transformer:
                return AttentionBlock(channels, heads, -1, use_checkpoint, use_new_attention_order)
            return SpatialTransformer(
                channels,
                heads,
                width,
                depth=transformer_depth,
                context_dim=context_dim,
                disable_self_attn=disable_middle_self_attn if level is None else bool(no_self_attention[level]),
                use_linear=use_linear_in_transformer,
                use_checkpoint=use_checkpoint,
            )

        def resample(channels: int, up: bool) -> nn.Module:
            """What stands between two levels."""
            if resblock_updown:
                return res(channels, channels, up=up, down=not up)
            return (Upsample if up else Downsample)(channels, conv_resample, dims)

        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(conv_nd(dims, in_channels, model_channels, 3, padding=1))]
        )
        self._build_levels(
            widths=[mult * model_channels for mult in channel_mult],
            blocks=per_level(num_res_blocks, levels, "num_res_blocks"),
            attending=[limits[level] if 2**level in attention_resolutions else 0 for level in range(levels)],
            res=res,
            attention=attention,
            resample=resample,
        )
        width = channel_mult[0] * model_channels
        last = zero_module(conv_nd(dims, width, out_channels, 3, padding=1))
        self.out = nn.Sequential(normalization(width), nn.SiLU(), last)

    def _build_levels(
        self,
        widths: Sequence[int],
        blocks: Sequence[int],
        attending: Sequence[int],
        res: Callable[..., nn.Module],
        attention: Callable[[int, int | None], nn.Module],
        resample: Callable[..., nn.Module],
    ) -> None:
        """Lay out the levels by three makers of parts: their widths, residual blocks, and how many of those attend."""
        width = self.model_channels
        skips = [width]
        for level, out in enumerate(widths):
            for i in range(blocks[level]):
                layers = [res(width, out)] + ([attention(out, level)] if i < attending[level] else [])
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                width = out
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(TimestepEmbedSequential(resample(width, up=False)))
                skips.append(width)

        self.middle_block = TimestepEmbedSequential(res(width, width), attention(width, None), res(width, width))

        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for i in range(blocks[level] + 1):
                layers = [res(width + skips.pop(), out)] + ([attention(out, level)] if i < attending[level] else [])
                if level > 0 and i == blocks[level]:
                    layers.append(resample(out, up=True))
                self.output_blocks.append(TimestepEmbedSequential(*layers))
                width = out

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """x (B, in_channels, H, W), timesteps (B,), context (B, M, context_dim), y as `num_classes` says.

        Returns (B, out_channels, H, W). Any H and W work: sizes that do not halve evenly are met again on the way up.
        Raises ValueError for a side that averaging (conv_resample off, resblock_updown) would halve below 1.
        """
        if (y is not None) != (self.num_classes is not None):
            raise ValueError(
                "this UNet is class-conditional (num_classes) and needs y"
                if y is None
                else "y was given to a UNet without num_classes"
            )
        dtype = next(self.time_embed.parameters()).dtype
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))  # (B, 4 model_channels)
        if y is not None:
            emb = emb + self.label_emb(self._label_input(y, dtype))
        cache = self.feature_cache
        inner = None if cache is None else cache.begin(x, timesteps, context, y)
        context = context.to(dtype) if context is not None else None
        depth = len(self.input_blocks) if inner is None else OUTER
        h = x.to(dtype)
        skips: list[Tensor] = []
        for block in islice(self.input_blocks, depth):
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context) if inner is None else inner
        for block in islice(self.output_blocks, len(self.output_blocks) - depth, None):
            if cache is not None and inner is None and len(skips) == OUTER:
                cache.keep(h)
            h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, emb, context, skips[-1].shape[2:] if skips else None)
        return self.out(h).to(x.dtype)

    def outermost_transformers(self) -> list[SpatialTransformer]:
        """The transformers at the largest of the sizes that have any."""
        inward = (layer for block in self.input_blocks for layer in block.children())
        outward = (layer for block in reversed(self.output_blocks) for layer in reversed(list(block.children())))
        return [layer for layers in (inward, outward) for layer in _before_resampling(layers)]

    def _label_input(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        if self.num_classes == "continuous":
            return y.to(dtype).reshape(-1, 1)
        return y.to(dtype) if self.num_classes == "sequential" else y


def _before_resampling(layers: Iterable[nn.Module]) -> list[SpatialTransformer]:
    """Of layers from the outside in, the first transformers, up to where the size changes after them."""
    found: list[SpatialTransformer] = []
    for layer in layers:
        if isinstance(layer, SpatialTransformer):
            found.append(layer)
        elif found and (isinstance(layer, (Upsample, Downsample)) or getattr(layer, "resample", None) is not None):
            break
    return found
