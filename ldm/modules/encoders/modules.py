"""Conditioning encoders: what turns a batch's condition into the context that the UNet attends to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint import init_from_checkpoint
from ldm.modules.encoders.base import (
    AbstractEncoder,
    check_clip_skip,
    check_length,
    check_vocabulary,
    resolve_tokenizer,
)
from ldm.modules.encoders.clip_features import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
from ldm.modules.encoders.clip_image import (
    CLIPEmbeddingNoiseAugmentation,
    ClipImageEmbedder,
    FrozenOpenCLIPImageEmbedder,
)
from ldm.modules.encoders.clip_text import CLIPTextConfig, CLIPTextModel
from ldm.modules.encoders.open_clip import FrozenOpenCLIPEmbedder
from ldm.modules.encoders.tokenizer import Tokenizer
from ldm.modules.encoders.wordpiece import BERTTokenizer
from ldm.modules.x_transformer import TransformerWrapper

__all__ = [
    "AbstractEncoder",
    "BERTEmbedder",
    "CLIPEmbeddingNoiseAugmentation",
    "ClassEmbedder",
    "ClipImageEmbedder",
    "FrozenCLIPEmbedder",
    "FrozenCLIPTextEmbedder",
    "FrozenClipImageEmbedder",
    "FrozenOpenCLIPEmbedder",
    "FrozenOpenCLIPImageEmbedder",
    "SpatialRescaler",
]

VIT_L_14 = "openai/clip-vit-large-patch14"


class FrozenCLIPEmbedder(AbstractEncoder):
    """Prompts to CLIP text features: the conditioning of Stable Diffusion v1 (ViT-L/14, 77 tokens of width 768).

    Nothing is downloaded: the tower is built from `config` and gets its weights from the model's checkpoint.

    Args:
        version: the public name of the tower; only ViT-L/14's is known, and `config` overrides it.
        device: accepted for old configs and ignored: the encoder works where its weights are.
        max_length: tokens a prompt is cut or padded to, start and end included.
        freeze: eval mode and no gradients; False makes the encoder trainable.
        layer: "last" (after the final norm), "pooled" (the end token's features, as one token) or "hidden".
        layer_idx: only for "hidden": 0 is the embeddings, n the n-th layer's output without the final norm;
            negative numbers count from the end.
        config: None for ViT-L/14, or a mapping of `CLIPTextConfig` options.
        tokenizer: None for CLIP's own, a `{target, params}` config, or a `Tokenizer`.
        ckpt_path: a checkpoint to take the weights from, of any model that has them under `cond_stage_model.`.

    Raises ValueError for options that contradict one another or that the tower cannot serve.
    """

    LAYERS = ("last", "pooled", "hidden")

    def __init__(
        self,
        version: str = VIT_L_14,
        device: object = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        layer_idx: int | None = None,
        config: Mapping[str, Any] | None = None,
        tokenizer: Tokenizer | Mapping[str, Any] | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        super().__init__()
        if config is None and version != VIT_L_14:
            raise ValueError(f"unknown text tower {version!r}: use {VIT_L_14!r}, or give its sizes as `config`")
        self.tokenizer = resolve_tokenizer(tokenizer)
        tower = _tower_config(config or {}, self.tokenizer)
        check_length(max_length, tower.max_position_embeddings)
        _check_layer(layer, layer_idx, tower.num_hidden_layers)
        self.max_length = max_length
        self.layer = layer
        self.layer_idx = layer_idx
        self.transformer = CLIPTextModel(tower)
        if ckpt_path is not None:
            init_from_checkpoint(self, ckpt_path, prefix="cond_stage_model.")
        if freeze:
            self.freeze()

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """B prompts to (B, max_length, D), or (B, 1, D) for the pooled layer, on the device of the weights.

        Raises TypeError for anything but a string or a list of them. Prompts too long are cut, with a warning.
        """
        return self.encode_tokens(self.tokenizer(text, self.max_length))

    def encode_tokens(self, tokens: Tensor, clip_skip: int = 1) -> Tensor:
        """Ids (B, L) to (B, L, D), or (B, 1, D) for the pooled layer. ValueError unless it can leave out layers.

        clip_skip: which layer from the end to take, the final norm applied: 1 is the last.
        """
        norm = self.transformer.text_model.final_layer_norm
        output = self.transformer(tokens.to(norm.weight.device))
        if clip_skip != 1:
            if self.layer != "last":
                raise ValueError(f"clip_skip counts from the last layer, and this encoder gives the {self.layer!r} one")
            check_clip_skip(clip_skip, self.transformer.config.num_hidden_layers)
            return norm(output.hidden_states[-clip_skip])
        if self.layer == "pooled":
            return output.pooler_output[:, None]
        return output.last_hidden_state if self.layer == "last" else output.hidden_states[self.layer_idx]


class BERTEmbedder(AbstractEncoder):
    """Text to the features of a transformer trained along: the conditioning of the LAION-400M model.

    n_embed, n_layer: width and depth. vocab_size: tokens that there are embeddings for. max_seq_len: tokens a text is
    cut or padded to. device: accepted for old configs and ignored. use_tokenizer: False if batches hold token ids
    (B, L) instead of texts. embedding_dropout: of the embeddings. tokenizer: None for BERT's own, a `{target, params}`
    config, or a `Tokenizer`.
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30522,
        max_seq_len: int = 77,
        device: object = None,
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
        tokenizer: Tokenizer | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = resolve_tokenizer(tokenizer, BERTTokenizer) if use_tokenizer else None
        if self.tokenizer is not None and self.tokenizer.vocab_size > vocab_size:
            raise ValueError(f"the tokenizer has {self.tokenizer.vocab_size} ids, vocab_size is only {vocab_size}")
        self.transformer = TransformerWrapper(vocab_size, max_seq_len, n_embed, n_layer, embedding_dropout)

    def forward(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """B texts, or token ids (B, L) where there is no tokenizer, to (B, L, n_embed); texts have L = max_seq_len."""
        tokens: Any = text  # where there is no tokenizer
        return self.encode_tokens(tokens if self.tokenizer is None else self.tokenizer(tokens, self.max_length))

    @property
    def max_length(self) -> int:
        """Tokens a text is cut or padded to."""
        return self.transformer.max_seq_len

    def encode_tokens(self, tokens: Tensor, clip_skip: int = 1) -> Tensor:
        """Ids (B, L) to (B, L, n_embed). ValueError for any clip_skip but 1: this is no CLIP."""
        if clip_skip != 1:
            raise ValueError(f"clip_skip {clip_skip} is for CLIP text encoders, and this one is BERT's: leave it out")
        return self.transformer(tokens.to(self.transformer.norm.weight.device))


class ClassEmbedder(AbstractEncoder):
    """Class labels to learnt vectors, as a context of one token.

    embed_dim: their width. n_classes: how many there are; for classifier-free guidance one more than the data has. key:
    the batch's entry with the labels.
    """

    IMAGENET = 1000  # classes of the data that the public models know

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class") -> None:
        super().__init__()
        self.key = key
        self.n_classes = n_classes
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Mapping[str, Tensor], key: str | None = None) -> Tensor:
        """Labels (B,) of a batch to (B, 1, embed_dim). ValueError for labels that there are no classes for."""
        labels = batch[self.key if key is None else key]
        if wrong := labels[(labels < 0) | (labels >= self.n_classes)].tolist():
            raise ValueError(f"class labels must be 0 to {self.n_classes - 1} (n_classes), not {wrong[:5]}")
        return self.embedding(labels[:, None])

    def get_unconditional_conditioning(self, batch_size: int) -> Tensor:
        """The vector (batch_size, 1, embed_dim) of no class: with one more class than ImageNet has, the last.

        Raises ValueError where none of the classes is known to mean that.
        """
        if self.n_classes != self.IMAGENET + 1:
            raise ValueError(
                f"none of this model's {self.n_classes} classes is known to mean no class, which guidance leads away "
                "from: use scale 1, or name the class as null_class if there is one"
            )
        null = torch.full((batch_size,), self.IMAGENET, device=self.embedding.weight.device)
        return self({self.key: null})


class SpatialRescaler(AbstractEncoder):
    """Maps to the size of the latents, and by a 1x1 convolution to fewer channels: layouts as conditions.

    n_stages: how often the size is multiplied by `multiplier`. method: of interpolation. in_channels: of the map.
    out_channels: after the convolution; None for no convolution. bias: whether it has one.
    """

    METHODS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if n_stages < 0 or method not in self.METHODS:
            raise ValueError(f"n_stages is {n_stages}, at least 0; method is {method!r}, one of {self.METHODS}")
        self.n_stages = n_stages
        self.method = method
        self.multiplier = multiplier
        self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias) if out_channels is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, h, w)."""
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return x if self.channel_mapper is None else self.channel_mapper(x)


def _tower_config(config: Mapping[str, Any], tokenizer: Tokenizer) -> CLIPTextConfig:
    """The tower that `config` describes; it must know every id of the tokenizer and the same end token."""
    vocab_size = config.get("vocab_size", CLIPTextConfig.vocab_size)
    check_vocabulary(tokenizer, vocab_size)
    if config.get("eos_token_id", tokenizer.end_id) != tokenizer.end_id:
        raise ValueError(f"eos_token_id is {config['eos_token_id']}, the tokenizer ends with {tokenizer.end_id}")
    return CLIPTextConfig.from_mapping({**config, "eos_token_id": tokenizer.end_id})


def _check_layer(layer: str, layer_idx: int | None, layers: int) -> None:
    if layer not in FrozenCLIPEmbedder.LAYERS:
        raise ValueError(f"layer must be one of {FrozenCLIPEmbedder.LAYERS}, got {layer!r}")
    if layer == "hidden" and (layer_idx is None or not -layers <= layer_idx <= layers):
        raise ValueError(f"layer 'hidden' needs a layer_idx from {-layers} to {layers}, got {layer_idx}")
