"""The denoising UNet (Dhariwal and Nichol 2021), with cross-attention (Rombach et al. 2022, section 3.3)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import SpatialTransformer
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
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)
from ldm.modules.sdpa import scaled_dot_product_attention

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def convert_module_to_f16(x: nn.Module) -> None:
    """Cast the weights of a convolution to float16; other modules stay."""
    if isinstance(x, CONVOLUTIONS):
        x.half()


def convert_module_to_f32(x: nn.Module) -> None:
    """Cast the weights of a convolution to float32; other modules stay."""
    if isinstance(x, CONVOLUTIONS):
        x.float()


# ---- blocks ----


class TimestepBlock(nn.Module):
    """A module whose `forward` takes the timestep embedding as its second argument."""

    @abstractmethod
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Apply the module to x (B, C, ...) given the embedding (B, emb_channels)."""


class Timestep(nn.Module):
    """Sinusoidal embedding of timesteps."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:  # (B,) -> (B, dim)
        return timestep_embedding(t, self.dim)


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """Layers in a row; each is given the embedding or the context if it takes one."""

    def forward(  # type: ignore[override]  # nn.Sequential's takes x alone
        self, x: Tensor, emb: Tensor, context: Tensor | None = None, size: Sequence[int] | None = None
    ) -> Tensor:
        """Map x (B, C, H, W), given emb (B, emb_channels) and context (B, M, D), to (B, C', H', W').

        size: what to upsample to, where that is not twice the size.
        """
        for layer in self:
            if isinstance(layer, TimestepBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif size is not None and isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class Upsample(nn.Module):
    """Double the size by nearest neighbor, then a convolution if `use_conv`; in 3-D the two inner axes only."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        if use_conv:
            self.conv = conv_nd(dims, channels, self.out_channels, 3, padding=padding)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:  # (B, C, H, W) -> (B, C', 2H, 2W)
        """Upsample to `size`, by default twice the size."""
        if size is None:
            factors = (1.0, 2.0, 2.0) if self.dims == 3 else 2.0
            x = F.interpolate(x, scale_factor=factors, mode="nearest")
        else:
            x = F.interpolate(x, size=size, mode="nearest")
        return self.conv(x) if self.use_conv else x


class TransposedUpsample(nn.Module):
    """Double the size by a learned transposed convolution without padding."""

    def __init__(self, channels: int, out_channels: int | None = None, ks: int = 5) -> None:
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.up = nn.ConvTranspose2d(channels, self.out_channels, kernel_size=ks, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


class Downsample(nn.Module):
    """Halve the size, by a strided convolution if `use_conv`, else by average pooling; in 3-D the two inner axes."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, self.out_channels, 3, stride=stride, padding=padding)
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H/2, W/2)
        if not self.use_conv and min(x.shape[-2:]) < 2:
            raise ValueError(
                "the image is too small for this network: average pooling (conv_resample: false or resblock_updown: "
                "true) cannot halve a side of 1; use a larger size"
            )
        return self.op(x)


class ResBlock(TimestepBlock):
    """Residual block modulated by the timestep embedding; with `up` or `down` it also resamples.

    Args:
        channels: of the input.
        emb_channels: width of the timestep embedding.
        dropout: probability of dropout.
        out_channels: of the output; None for the same.
        use_conv: where the channels differ, a 3x3 convolution on the residual path instead of a 1x1 one.
        use_scale_shift_norm: the embedding scales and shifts the second norm instead of being added before it.
        dims: 1, 2 or 3 spatial dimensions.
        use_checkpoint: recompute the block in the backward pass to save memory.
        up, down: double or halve the size.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.emb_channels = emb_channels
        self.dropout = dropout
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.updown = up or down

        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, self.out_channels, 3, padding=1)
        )
        if self.updown:
            resample = Upsample if up else Downsample
            self.h_upd, self.x_upd = resample(channels, False, dims), resample(channels, False, dims)
        self.emb_layers = nn.Sequential(
            nn.SiLU(), linear(emb_channels, 2 * self.out_channels if use_scale_shift_norm else self.out_channels)
        )
        self.out_layers = nn.Sequential(
            normalization(self.out_channels),
            nn.SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv_nd(dims, self.out_channels, self.out_channels, 3, padding=1)),
        )
        self.skip_connection: nn.Module = nn.Identity()
        if self.out_channels != channels:
            kernel, padding = (3, 1) if use_conv else (1, 0)
            self.skip_connection = conv_nd(dims, channels, self.out_channels, kernel, padding=padding)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map x (B, C, H, W), given emb (B, emb_channels), to (B, C', H', W')."""
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.updown:
            h = self.h_upd(self.in_layers[:-1](x))
            x = self.x_upd(x)
            h = self.in_layers[-1](h)
        else:
            h = self.in_layers(x)
        emb_out = self.emb_layers(emb).to(h.dtype)
        emb_out = emb_out.reshape(*emb_out.shape, *(1,) * (h.ndim - 2))  # (B, C', 1, 1)
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(x) + h


class QKVAttention(nn.Module):
    """Multi-head attention of a joint projection ordered [q, k, v] x heads."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        """Attend with a projection (B, 3 C, N), C = heads x width: (B, C, N)."""
        q, k, v = qkv.unflatten(1, (3, self.n_heads, -1)).movedim(1, 0).transpose(-1, -2)  # (B, heads, N, C / heads)
        return self.attend(q, k, v).transpose(-1, -2).flatten(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with q, k, v (B, heads, N, width)."""
        return scaled_dot_product_attention(q, k, v)

    @staticmethod
    def count_flops(model: nn.Module, _x: Sequence[Tensor], y: Sequence[Tensor]) -> None:
        """Count the multiplications of both products for a profiler (thop)."""
        batch, channels, *spatial = y[0].shape
        tokens = torch.Size(spatial).numel()
        model.total_ops += torch.DoubleTensor([2 * batch * tokens**2 * channels])  # type: ignore[operator]


class QKVAttentionLegacy(QKVAttention):
    """Multi-head attention of a joint projection ordered heads x [q, k, v]."""

    def forward(self, qkv: Tensor) -> Tensor:
        """Attend with a projection (B, heads x 3 x width, N): (B, heads x width, N)."""
        q, k, v = qkv.unflatten(1, (self.n_heads, 3, -1)).movedim(2, 0).transpose(-1, -2)
        return self.attend(q, k, v).transpose(-1, -2).flatten(1, 2)


class AttentionBlock(nn.Module):
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
        self.channels = channels
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, channels * 3, 1)
        self.attention = (QKVAttention if use_new_attention_order else QKVAttentionLegacy)(num_heads)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> same
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x.flatten(2)))  # (B, 3 C, N)
        h = self.proj_out(self.attention(qkv))
        return x + h.reshape(x.shape)


class AttentionPool2d(nn.Module):
    """Attention pooling of a square map (Radford et al. 2021): the mean attends to all positions."""

    def __init__(
        self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None
    ) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)
        self.num_heads = divide(embed_dim, num_heads_channels, "embed_dim", "num_heads_channels")
        self.attention = QKVAttention(self.num_heads)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, output_dim)
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1)  # (B, C, HW + 1)
        x = x + self.positional_embedding.to(x.dtype)
        x = self.c_proj(self.attention(self.qkv_proj(x)))
        return x[:, :, 0]


# ---- networks ----


class _TimestepNetwork(nn.Module):
    """What the UNet and its encoder half share: the timestep embedding, and the precision of the blocks."""

    model_channels: int
    time_embed: nn.Sequential
    input_blocks: nn.ModuleList
    _dtype: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the blocks' inputs: that of their weights, unless it has been set."""
        return self._dtype or _dtype_of(self.input_blocks)

    @dtype.setter
    def dtype(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def convert_to_fp16(self) -> None:
        """Cast the blocks' weights to float16; embeddings and output layers stay."""
        for part in (self.input_blocks, self.middle_block, getattr(self, "output_blocks", None)):
            if part is not None:
                part.half()

    def convert_to_fp32(self) -> None:
        """Cast the blocks' weights to float32."""
        for part in (self.input_blocks, self.middle_block, getattr(self, "output_blocks", None)):
            if part is not None:
                part.float()

    def _embed_timesteps(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps (B,): (B, 4 model_channels)."""
        emb = timestep_embedding(timesteps, self.model_channels)
        return self.time_embed(emb.to(_dtype_of(self.time_embed)))


def _dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's weights; float32 where they are no parameters, as in dynamically quantized layers."""
    return next((parameter.dtype for parameter in module.parameters()), torch.float32)


class UNetModel(_TimestepNetwork):
    """UNet that predicts noise, v or x0 from a noisy latent, its timestep and a condition.

    Args:
        image_size: kept for public configs; the network takes any size.
        in_channels, out_channels: channels of the input and the output.
        model_channels: width of the outermost level.
        num_res_blocks: residual blocks a level, one number or one a level.
        attention_resolutions: downsampling factors (1, 2, 4 ...) at which blocks have attention.
        dropout: probability of dropout in the residual blocks.
        channel_mult: width of each level, as a multiple of `model_channels`.
        conv_resample: resample by convolutions between levels; else by pooling and nearest neighbor.
        dims: 1, 2 or 3 spatial dimensions.
        num_classes: an int for class labels (B,), "continuous" for scalars (B,), "sequential" for vectors
            (B, adm_in_channels); the label's embedding is added to the timestep's.
        use_checkpoint: recompute blocks in the backward pass to save memory.
        use_fp16, use_bf16: kept for public configs; the precision is that of the weights, chosen at loading.
        num_heads, num_head_channels: give one; the other follows from the width.
        num_heads_upsample: heads of the attention blocks on the way up (`legacy`, without transformers); -1: the same.
        use_scale_shift_norm: the embedding scales and shifts norms instead of being added.
        resblock_updown: resample by residual blocks.
        use_new_attention_order: order of the joint projection in attention blocks (see `AttentionBlock`).
        use_spatial_transformer: attend to a context of width `context_dim`, with `transformer_depth` blocks.
        n_embed: predict the ids of a codebook of this size instead of an output.
        legacy: how public configs count heads; it only matters for `num_heads_upsample`.
        disable_self_attentions: per level, attend to the context where self-attention would be.
        num_attention_blocks: per level, how many of the residual blocks are followed by attention.
        disable_middle_self_attn: the same as `disable_self_attentions` for the middle block.
        use_linear_in_transformer: linear projections in transformers (Stable Diffusion 2).
        adm_in_channels: width of the vectors of `num_classes="sequential"`.
    """

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
        n_embed: int | None = None,
        legacy: bool = True,
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        use_linear_in_transformer: bool = False,
        adm_in_channels: int | None = None,
        use_bf16: bool = False,
    ) -> None:
        super().__init__()
        check_context(use_spatial_transformer, context_dim)
        check_heads(num_heads, num_head_channels)
        levels = len(channel_mult)
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = per_level(num_res_blocks, levels, "num_res_blocks")
        self.attention_resolutions = attention_resolutions
        self.dropout = dropout
        self.channel_mult = channel_mult
        self.conv_resample = conv_resample
        self.num_classes = num_classes
        self.use_checkpoint = use_checkpoint
        self.num_heads = num_heads
        self.num_head_channels = num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.predict_codebook_ids = n_embed is not None

        time_embed_dim = model_channels * 4
        self.time_embed = nn.Sequential(
            linear(model_channels, time_embed_dim), nn.SiLU(), linear(time_embed_dim, time_embed_dim)
        )
        if num_classes is not None:
            self.label_emb = make_label_embedding(num_classes, time_embed_dim, adm_in_channels)

        no_self_attention = per_level(disable_self_attentions or False, levels, "disable_self_attentions")
        attending = per_level(num_attention_blocks or 2**30, levels, "num_attention_blocks")

        def res_block(channels: int, out: int, **resample: bool) -> ResBlock:
            return ResBlock(
                channels,
                time_embed_dim,
                dropout,
                out_channels=out,
                dims=dims,
                use_checkpoint=use_checkpoint,
                use_scale_shift_norm=use_scale_shift_norm,
                **resample,
            )

        def attention(channels: int, no_self: bool, up: bool = False) -> nn.Module:
            heads, width = split_heads(channels, num_heads, num_head_channels)
            if not use_spatial_transformer:
                if up and legacy and num_head_channels == -1:
                    heads = self.num_heads_upsample
                    divide(channels, heads, "channels", "num_heads_upsample")
                return AttentionBlock(channels, heads, -1, use_checkpoint, use_new_attention_order)
            return SpatialTransformer(
                channels,
                heads,
                width,
                depth=transformer_depth,
                context_dim=context_dim,
                disable_self_attn=no_self,
                use_linear=use_linear_in_transformer,
                use_checkpoint=use_checkpoint,
            )

        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(conv_nd(dims, in_channels, model_channels, 3, padding=1))]
        )
        ch = model_channels
        skips = [ch]
        for level, mult in enumerate(channel_mult):
            for i in range(self.num_res_blocks[level]):
                layers: list[nn.Module] = [res_block(ch, mult * model_channels)]
                ch = mult * model_channels
                if 2**level in attention_resolutions and i < attending[level]:
                    layers.append(attention(ch, bool(no_self_attention[level])))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skips.append(ch)
            if level < levels - 1:
                down = res_block(ch, ch, down=True) if resblock_updown else Downsample(ch, conv_resample, dims, ch)
                self.input_blocks.append(TimestepEmbedSequential(down))
                skips.append(ch)

        self.middle_block = TimestepEmbedSequential(
            res_block(ch, ch), attention(ch, disable_middle_self_attn), res_block(ch, ch)
        )

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(self.num_res_blocks[level] + 1):
                layers = [res_block(ch + skips.pop(), mult * model_channels)]
                ch = mult * model_channels
                if 2**level in attention_resolutions and i < attending[level]:
                    layers.append(attention(ch, bool(no_self_attention[level]), up=True))
                if level > 0 and i == self.num_res_blocks[level]:
                    layers.append(
                        res_block(ch, ch, up=True) if resblock_updown else Upsample(ch, conv_resample, dims, ch)
                    )
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(
            normalization(ch), nn.SiLU(), zero_module(conv_nd(dims, ch, out_channels, 3, padding=1))
        )
        if n_embed is not None:
            self.id_predictor = nn.Sequential(normalization(ch), conv_nd(dims, ch, n_embed, 1))

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        y: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Predict from a noisy latent.

        Any size works: maps on the way up are fitted to skips whose sides did not halve evenly.

        Args:
            x: noisy latent (B, in_channels, H, W).
            timesteps: (B,).
            context: (B, M, context_dim).
            y: labels as `num_classes` says.
            **kwargs: ignored, as published.

        Returns:
            (B, out_channels, H, W) in the dtype of `x`; logits (B, n_embed, H, W) of a network with `n_embed`.

        Raises:
            ValueError: where labels are missing, or given to a network without `num_classes`, or a side is too small
                for average pooling.
        """
        emb = self._embed(timesteps, y)
        context = None if context is None else context.to(self.dtype)
        h = x.to(self.dtype)
        hs: list[Tensor] = []
        for module in self.input_blocks:
            h = module(h, emb, context)
            hs.append(h)
        h = self.middle_block(h, emb, context)
        for module in self.output_blocks:
            h = torch.cat([self.fit(h, hs[-1]), hs.pop()], dim=1)
            if hs and _is_uneven(module, h, hs[-1]):
                h = module(h, emb, context, hs[-1].shape[2:])
            else:
                h = module(h, emb, context)
        return self._predict(h).to(x.dtype)

    def _embed(self, timesteps: Tensor | None, y: Tensor | None) -> Tensor:
        """Embed timesteps (B,) and labels: (B, 4 model_channels)."""
        if (y is not None) != (self.num_classes is not None):
            raise ValueError(
                "this UNet is class-conditional (num_classes) and needs y"
                if y is None
                else "y was given to a UNet without num_classes"
            )
        if timesteps is None:
            raise ValueError("this UNet needs timesteps")
        emb = self._embed_timesteps(timesteps)
        if y is not None:
            if self.num_classes == "continuous":
                y = y.reshape(-1, 1)
            emb = emb + self.label_emb(y if isinstance(self.num_classes, int) else y.to(emb.dtype))
        return emb.to(self.dtype)

    def _predict(self, h: Tensor) -> Tensor:
        out = self.id_predictor if self.predict_codebook_ids else self.out
        return out(h.to(_dtype_of(out)))

    @staticmethod
    def fit(h: Tensor, skip: Tensor) -> Tensor:
        """Fit a map to the size of a skip whose sides did not halve evenly, where a residual block upsampled it."""
        return h if h.shape[2:] == skip.shape[2:] else F.interpolate(h, size=skip.shape[2:], mode="nearest")


def _is_uneven(module: nn.Module, h: Tensor, skip: Tensor) -> bool:
    """Whether `module` is to upsample a map to less than twice its size, that of `skip`; the originals cannot."""
    if not isinstance(module, TimestepEmbedSequential) or not any(isinstance(layer, Upsample) for layer in module):
        return False
    return any(side != 2 * length for side, length in zip(skip.shape[2:][-2:], h.shape[2:][-2:]))


class EncoderUNetModel(_TimestepNetwork):
    """The UNet's encoder half with pooled outputs: a classifier of noisy images (Dhariwal and Nichol 2021).

    pool: "adaptive" (mean), "attention" (see `AttentionPool2d`), "spatial" or "spatial_v2" (a perceptron on the means
    of all blocks' outputs). Other arguments are those of `UNetModel`.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = attention_resolutions
        self.dropout = dropout
        self.channel_mult = channel_mult
        self.conv_resample = conv_resample
        self.use_checkpoint = use_checkpoint
        self.num_heads = num_heads
        self.num_head_channels = num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.pool = pool

        time_embed_dim = model_channels * 4
        self.time_embed = nn.Sequential(
            linear(model_channels, time_embed_dim), nn.SiLU(), linear(time_embed_dim, time_embed_dim)
        )

        def res_block(channels: int, out: int, down: bool = False) -> ResBlock:
            return ResBlock(
                channels,
                time_embed_dim,
                dropout,
                out_channels=out,
                dims=dims,
                use_checkpoint=use_checkpoint,
                use_scale_shift_norm=use_scale_shift_norm,
                down=down,
            )

        def attention(channels: int) -> AttentionBlock:
            return AttentionBlock(channels, num_heads, num_head_channels, use_checkpoint, use_new_attention_order)

        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(conv_nd(dims, in_channels, model_channels, 3, padding=1))]
        )
        ch = model_channels
        features = ch  # of all blocks together
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [res_block(ch, mult * model_channels)]
                ch = mult * model_channels
                if 2**level in attention_resolutions:
                    layers.append(attention(ch))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                features += ch
            if level < len(channel_mult) - 1:
                down = res_block(ch, ch, down=True) if resblock_updown else Downsample(ch, conv_resample, dims, ch)
                self.input_blocks.append(TimestepEmbedSequential(down))
                features += ch
        self.middle_block = TimestepEmbedSequential(res_block(ch, ch), attention(ch), res_block(ch, ch))
        features += ch
        side = image_size // 2 ** (len(channel_mult) - 1)
        self.out = _make_pool(pool, dims, ch, features, side, num_head_channels, out_channels)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Classify noisy images (B, C, H, W) at timesteps (B,): (B, out_channels)."""
        emb = self._embed_timesteps(timesteps).to(self.dtype)
        h = x.to(self.dtype)
        means = []
        for module in (*self.input_blocks, self.middle_block):
            h = module(h, emb)
            if self.pool.startswith("spatial"):
                means.append(h.to(x.dtype).mean(dim=tuple(range(2, h.ndim))))
        return self.out(torch.cat(means, dim=-1) if means else h.to(x.dtype))


def _make_pool(
    pool: str, dims: int, channels: int, features: int, side: int, head_channels: int, out_channels: int
) -> nn.Module:
    """Build the output layers that `EncoderUNetModel`'s `pool` names."""
    if pool == "adaptive":
        last = zero_module(conv_nd(dims, channels, out_channels, 1))
        mean = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1](1)
        return nn.Sequential(normalization(channels), nn.SiLU(), mean, last, nn.Flatten())
    if pool == "attention":
        attention = AttentionPool2d(side, channels, head_channels, out_channels)
        return nn.Sequential(normalization(channels), nn.SiLU(), attention)
    if pool == "spatial":
        return nn.Sequential(nn.Linear(features, 2048), nn.ReLU(), nn.Linear(2048, out_channels))
    if pool == "spatial_v2":
        return nn.Sequential(nn.Linear(features, 2048), normalization(2048), nn.SiLU(), nn.Linear(2048, out_channels))
    raise ValueError(f"pool must be adaptive, attention, spatial or spatial_v2, not {pool!r}")
