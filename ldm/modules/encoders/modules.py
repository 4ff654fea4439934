"""Conditioning encoders: from a batch's condition to the context that the UNet attends to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
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
    disabled_train,
    resolve_tokenizer,
    token_ids,
)
from ldm.modules.encoders.clip_features import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
from ldm.modules.encoders.clip_image import (
    CLIPEmbeddingNoiseAugmentation,
    ClipImageEmbedder,
    FrozenOpenCLIPImageEmbedder,
)
from ldm.modules.encoders.clip_text import CLIPTextConfig, CLIPTextModel
from ldm.modules.encoders.open_clip import FrozenOpenCLIPEmbedder
from ldm.modules.encoders.tokenizer import Tokenizer, WordPieceTokenizer
from ldm.modules.x_transformer import TransformerWrapper

__all__ = [
    "AbstractEncoder",
    "BERTEmbedder",
    "BERTTokenizer",
    "CLIPEmbeddingNoiseAugmentation",
    "ClassEmbedder",
    "ClipImageEmbedder",
    "FrozenCLIPEmbedder",
    "FrozenCLIPT5Encoder",
    "FrozenCLIPTextEmbedder",
    "FrozenClipImageEmbedder",
    "FrozenOpenCLIPEmbedder",
    "FrozenOpenCLIPImageEmbedder",
    "FrozenT5Embedder",
    "IdentityEncoder",
    "SpatialRescaler",
    "TransformerEmbedder",
    "disabled_train",
]

VIT_L_14 = "openai/clip-vit-large-patch14"
T5 = "google/t5-v1_1-large"


class IdentityEncoder(AbstractEncoder):
    """Return conditions unchanged."""

    def encode(self, x: Any) -> Any:
        """Return `x`."""
        return x


class FrozenCLIPEmbedder(AbstractEncoder):
    """CLIP text encoder of Stable Diffusion v1 (ViT-L/14, 77 tokens of width 768).

    Nothing is downloaded: weights come with the model's checkpoint, or from `ckpt_path`. `tokenizer` and `transformer`
    are called as their namesakes in transformers, which may replace them.

    Args:
        version: Name of the tower. Only ViT-L/14 is known; `config` overrides it.
        device: Ignored: the encoder works on the device of its weights.
        max_length: Tokens that prompts are truncated or padded to, start and end included.
        freeze: Set eval mode and disable gradients.
        layer: "last" (after the final norm), "pooled" (the end token's features, one token) or "hidden".
        layer_idx: For "hidden": 0 is the embeddings, n the n-th layer's output without the final norm; negative
            numbers count from the end.
        config: `CLIPTextConfig` options instead of ViT-L/14's.
        tokenizer: None for CLIP's own, a `{target, params}` config, or a tokenizer.
        ckpt_path: Checkpoint with the weights under `cond_stage_model.`.

    Raises:
        ValueError: If options contradict each other or the tower.
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
        if layer not in self.LAYERS:
            raise ValueError(f"layer must be one of {self.LAYERS}, got {layer!r}")
        count = tower.num_hidden_layers
        if layer == "hidden" and (layer_idx is None or not -count <= layer_idx <= count):
            raise ValueError(f"layer 'hidden' needs a layer_idx from {-count} to {count}, got {layer_idx}")
        self.max_length = max_length
        self.layer = layer
        self.layer_idx = layer_idx
        self.transformer = CLIPTextModel(tower)
        if ckpt_path is not None:
            init_from_checkpoint(self, ckpt_path, prefix="cond_stage_model.")
        if freeze:
            self.freeze()

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Encode B prompts to (B, max_length, D), or (B, 1, D) for the pooled layer.

        Prompts that are too long are truncated, with a warning. TypeError for anything but strings.
        """
        return self.encode_tokens(token_ids(self.tokenizer, text, self.max_length))

    def encode_tokens(self, tokens: Tensor, clip_skip: int = 1) -> Tensor:
        """Encode token ids (B, L) to (B, L, D), or (B, 1, D) for the pooled layer.

        Args:
            tokens: Ids (B, L).
            clip_skip: Layer to use, counted from the end; the final norm is applied. 1 is the last.

        Raises:
            ValueError: If there is no such layer, or `layer` is not "last".
        """
        hidden = self.layer == "hidden" or clip_skip != 1
        output = self.transformer(input_ids=tokens.to(self.device), output_hidden_states=hidden)
        if clip_skip != 1:
            if self.layer != "last":
                raise ValueError(f"clip_skip counts from the last layer, and this encoder uses the {self.layer!r} one")
            check_clip_skip(clip_skip, len(output.hidden_states) - 1)
            return self.transformer.text_model.final_layer_norm(output.hidden_states[-clip_skip])
        if self.layer == "pooled":
            return output.pooler_output[:, None, :]
        return output.last_hidden_state if self.layer == "last" else output.hidden_states[self.layer_idx]


def _tower_config(config: Mapping[str, Any], tokenizer: Tokenizer) -> CLIPTextConfig:
    """Read a tower's sizes and check that they fit the tokenizer."""
    check_vocabulary(tokenizer, config.get("vocab_size", CLIPTextConfig.vocab_size))
    end = tokenizer.eos_token_id
    if config.get("eos_token_id", end) != end:
        raise ValueError(f"eos_token_id is {config['eos_token_id']}, the tokenizer ends with {end}")
    return CLIPTextConfig.from_mapping({**config, "eos_token_id": end})


class FrozenT5Embedder(AbstractEncoder):
    """T5 text encoder (Raffel et al. 2020) from transformers.

    Args:
        version: Name on the Hugging Face hub, of which the cache must hold the files, or a folder with them.
        device: Ignored: the encoder works on the device of its weights.
        max_length: Tokens that prompts are truncated or padded to.
        freeze: Set eval mode and disable gradients.

    Raises:
        FileNotFoundError: If the files are not there: nothing is downloaded.
    """

    def __init__(self, version: str = T5, device: object = None, max_length: int = 77, freeze: bool = True) -> None:
        super().__init__()
        from transformers import AutoTokenizer, T5Config, T5EncoderModel

        name = str(Path(version).expanduser()) if Path(version).expanduser().is_dir() else version
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
            if torch.empty(0).is_meta:  # weights will come from the model's checkpoint
                self.transformer = T5EncoderModel(T5Config.from_pretrained(name, local_files_only=True))
            else:
                self.transformer = T5EncoderModel.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"T5's files are not at {version} or in the Hugging Face cache: download config.json, the tokenizer "
                f"and model.safetensors of {T5 if name != version else version} and pass their folder as version "
                f"({error})"
            ) from error
        self.max_length = max_length
        if freeze:
            self.freeze()

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Encode B prompts to (B, max_length, D)."""
        tokens = token_ids(self.tokenizer, text, self.max_length).to(self.device)
        return self.transformer(input_ids=tokens).last_hidden_state


class FrozenCLIPT5Encoder(AbstractEncoder):
    """CLIP and T5 encodings of the same prompts; arguments as for `FrozenCLIPEmbedder` and `FrozenT5Embedder`."""

    def __init__(
        self,
        clip_version: str = VIT_L_14,
        t5_version: str = "google/t5-v1_1-xl",
        device: object = None,
        clip_max_length: int = 77,
        t5_max_length: int = 77,
        clip_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.clip_encoder = FrozenCLIPEmbedder(clip_version, device, clip_max_length, config=clip_config)
        self.t5_encoder = FrozenT5Embedder(t5_version, device, t5_max_length)

    def forward(self, text: str | Sequence[str]) -> list[Tensor]:
        """Encode B prompts to [(B, clip_max_length, D), (B, t5_max_length, D')]."""
        return [self.clip_encoder.encode(text), self.t5_encoder.encode(text)]


class TransformerEmbedder(AbstractEncoder):
    """Transformer over token ids, trained with the diffusion model.

    Args:
        n_embed: Width.
        n_layer: Number of layers.
        vocab_size: Number of token ids.
        max_seq_len: Number of positions.
        device: Ignored: the encoder works on the device of its weights.
    """

    def __init__(
        self, n_embed: int, n_layer: int, vocab_size: int, max_seq_len: int = 77, device: object = None
    ) -> None:
        super().__init__()
        self.transformer = TransformerWrapper(vocab_size, max_seq_len, n_embed, n_layer)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode ids (B, L) to (B, L, n_embed)."""
        return self.transformer(tokens.to(self.device), return_embeddings=True)


class BERTTokenizer(AbstractEncoder):
    """BERT's WordPiece tokenizer as a module.

    Args:
        device: Ignored: ids are on the CPU.
        vq_interface: Let `encode` return the tuple of a vector-quantised first stage.
        max_length: Tokens that texts are truncated or padded to.
        vocab: The vocabulary's place, see `WordPieceTokenizer`.
        tokenizer: Another tokenizer, or its `{target, params}` config.
    """

    def __init__(
        self,
        device: object = None,
        vq_interface: bool = True,
        max_length: int = 77,
        vocab: str | None = None,
        tokenizer: Tokenizer | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = resolve_tokenizer(tokenizer if tokenizer is not None else WordPieceTokenizer(vocab))
        self.vq_interface = vq_interface
        self.max_length = max_length

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Tokenize B texts to ids (B, max_length). Texts that are too long are truncated, with a warning."""
        return token_ids(self.tokenizer, text, self.max_length)

    @torch.no_grad()
    def encode(self, text: str | Sequence[str]) -> Any:
        """Return ids, or with `vq_interface` (None, None, [None, None, ids])."""
        tokens = self(text)
        return (None, None, [None, None, tokens]) if self.vq_interface else tokens

    def decode(self, text: Any) -> Any:
        """Return `text`."""
        return text


class BERTEmbedder(AbstractEncoder):
    """Text encoder trained with the diffusion model: the conditioning of the LAION-400M model.

    Args:
        n_embed: Width.
        n_layer: Number of layers.
        vocab_size: Number of token ids.
        max_seq_len: Tokens that texts are truncated or padded to.
        device: Ignored: the encoder works on the device of its weights.
        use_tokenizer: False if batches hold token ids (B, L) instead of texts.
        embedding_dropout: Dropout of the embeddings.
        tokenizer: None for BERT's own, a `{target, params}` config, or a tokenizer.
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
        self.use_tknz_fn = use_tokenizer
        if use_tokenizer:
            self.tknz_fn = BERTTokenizer(vq_interface=False, max_length=max_seq_len, tokenizer=tokenizer)
            if (ids := self.tknz_fn.tokenizer.vocab_size) > vocab_size:
                raise ValueError(f"the tokenizer has {ids} ids, vocab_size is only {vocab_size}")
        self.transformer = TransformerWrapper(vocab_size, max_seq_len, n_embed, n_layer, embedding_dropout)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of `tknz_fn`."""
        return self.tknz_fn.tokenizer if self.use_tknz_fn else None

    @property
    def max_length(self) -> int:
        """Tokens that texts are truncated or padded to."""
        return self.transformer.max_seq_len

    def forward(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """Encode B texts, or token ids (B, L) without a tokenizer, to (B, L, n_embed); texts have L = max_seq_len."""
        tokens: Any = self.tknz_fn(text) if self.use_tknz_fn else text
        return self.encode_tokens(tokens)

    def encode_tokens(self, tokens: Tensor, clip_skip: int = 1) -> Tensor:
        """Encode ids (B, L) to (B, L, n_embed). ValueError for any clip_skip but 1: this is not a CLIP."""
        if clip_skip != 1:
            raise ValueError(f"clip_skip {clip_skip} is for CLIP text encoders, and this one is BERT's: leave it out")
        return self.transformer(tokens.to(self.device), return_embeddings=True)


class ClassEmbedder(AbstractEncoder):
    """Learned embedding of class labels, as a context of one token.

    Args:
        embed_dim: Width.
        n_classes: Number of classes; for classifier-free guidance one more than the data has.
        key: The batch's entry with the labels.
        ucg_rate: Probability of replacing a label by the last class, in training mode.
    """

    IMAGENET = 1000  # classes of the public models' data

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class", ucg_rate: float = 0.0) -> None:
        super().__init__()
        self.key = key
        self.n_classes = n_classes
        self.ucg_rate = ucg_rate
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Mapping[str, Tensor], key: str | None = None, disable_dropout: bool = False) -> Tensor:
        """Embed a batch's labels (B,) to (B, 1, embed_dim). ValueError for labels outside 0 to n_classes - 1."""
        labels = batch[self.key if key is None else key]
        if wrong := labels[(labels < 0) | (labels >= self.n_classes)].tolist():
            raise ValueError(f"class labels must be 0 to {self.n_classes - 1} (n_classes), not {wrong[:5]}")
        if self.training and self.ucg_rate > 0.0 and not disable_dropout:
            dropped = torch.rand(labels.shape, device=labels.device) < self.ucg_rate
            labels = labels.masked_fill(dropped, self.n_classes - 1)
        return self.embedding(labels[:, None])

    def get_unconditional_conditioning(self, bs: int, device: Any = None) -> dict[str, Tensor]:
        """Return a batch {key: labels (bs,)} of the class that means no class: the last of ImageNet's 1001.

        Raises:
            ValueError: If the model has another number of classes, so that the null class is unknown.
        """
        if self.n_classes != self.IMAGENET + 1 and self.ucg_rate == 0.0:
            raise ValueError(
                f"none of this model's {self.n_classes} classes is known to mean no class, which guidance needs: use "
                "scale 1, or name the class as null_class if there is one"
            )
        device = self.device if device is None else device
        return {self.key: torch.full((bs,), self.n_classes - 1, device=device)}


class SpatialRescaler(AbstractEncoder):
    """Resize maps to the size of the latents and project their channels by a 1x1 convolution: layouts as conditions.

    Args:
        n_stages: How often the size is multiplied by `multiplier`.
        method: Interpolation method.
        multiplier: Scale factor of a stage.
        in_channels: Channels of the maps.
        out_channels: Channels after the convolution; None for no convolution.
        bias: Whether the convolution has a bias.
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
            raise ValueError(
                f"n_stages must be at least 0, got {n_stages}; method one of {self.METHODS}, got {method!r}"
            )
        self.n_stages = n_stages
        self.multiplier = multiplier
        self.interpolator = partial(F.interpolate, mode=method)
        self.remap_output = out_channels is not None
        self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias) if out_channels is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """Resize and project (B, in_channels, H, W) to (B, out_channels, h, w)."""
        for _ in range(self.n_stages):
            x = self.interpolator(x, scale_factor=self.multiplier)
        return x if self.channel_mapper is None else self.channel_mapper(x)
