"""CLIP's text transformer (Radford et al. 2021, arXiv:2103.00020, section 2.4) with the names of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.limits import check_number
from ldm.modules.encoders.base import TowerConfig, check_heads
from ldm.modules.sdpa import scaled_dot_product_attention


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class CLIPTextConfig(TowerConfig):
    """Sizes of a text tower under the names of transformers. The defaults are those of ViT-L/14."""

    vocab_size: int = 49408
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {sorted(ACTIVATIONS)}, got {self.hidden_act!r}")
        check_heads(self.hidden_size, self.num_attention_heads, "hidden_size", "num_attention_heads")
        if not 0 <= self.eos_token_id < self.vocab_size:
            raise ValueError(f"eos_token_id {self.eos_token_id} is outside the vocabulary of {self.vocab_size} ids")


class CLIPTextOutput(NamedTuple):
    """Output of a text tower for B prompts, L tokens, D channels, N layers."""

    last_hidden_state: Tensor
    """(B, L, D), after the final norm"""
    pooler_output: Tensor
    """(B, D), last_hidden_state at each row's first end token"""
    hidden_states: tuple[Tensor, ...]
    """N + 1 of (B, L, D): the embeddings, then every layer's output, all before the final norm"""


class CLIPTextModel(nn.Module):
    """CLIP's causal transformer over token ids.

    Weights are named `text_model.embeddings`, `text_model.encoder.layers.N`, ... as in published checkpoints. Loading
    also accepts names without `text_model.`, and files without `position_ids`.
    """

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)
        self.register_load_state_dict_pre_hook(_accept_every_layout)

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = True,
        return_dict: bool = True,
    ) -> CLIPTextOutput:
        """Encode token ids (B, L). The last two arguments exist for callers of transformers' model.

        Raises:
            ValueError: If L exceeds `max_position_embeddings`.
        """
        return self.text_model(input_ids=input_ids, position_ids=position_ids)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.text_model.final_layer_norm.weight.device

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.text_model.embeddings.token_embedding = value

    def resize_token_embeddings(self, new_num_tokens: int) -> nn.Module:
        """Grow or shrink the token embedding, keeping its first rows; new rows are N(0, 0.02)."""
        old = self.text_model.embeddings.token_embedding
        new = nn.Embedding(new_num_tokens, old.embedding_dim, device=old.weight.device, dtype=old.weight.dtype)
        nn.init.normal_(new.weight, std=0.02)
        count = min(new_num_tokens, old.num_embeddings)
        new.weight.data[:count] = old.weight.data[:count]
        new.weight.requires_grad_(old.weight.requires_grad)
        self.set_input_embeddings(new)
        self.config = replace(self.config, vocab_size=new_num_tokens)
        return new


def _accept_every_layout(tower: CLIPTextModel, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Add `text_model.` to names of transformers 5 in a state dict, and supply position_ids."""
    inner = prefix + "text_model."
    for part, _module in tower.text_model.named_children():
        for key in [key for key in state if key.startswith(f"{prefix}{part}.")]:
            published = inner + key.removeprefix(prefix)
            if published not in state:
                state[published] = state.pop(key)
    # merged half-precision files have rounded position_ids (40.97 for 41)
    own = tower.text_model.embeddings.position_ids
    state[inner + "embeddings.position_ids"] = _position_ids(tower.config).to(own.device)


def _position_ids(config: CLIPTextConfig) -> Tensor:
    # on the CPU even under torch.device("meta"): checkpoints may lack it
    places = check_number(config.max_position_embeddings, "max_position_embeddings", 10**6)
    return torch.arange(places, device="cpu")[None]


class CLIPTextTransformer(nn.Module):
    """Embeddings, layers and final norm. The classes are named as in transformers: LoRA is injected by these names."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.eos_token_id = config.eos_token_id
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        _initialise(self, config)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> CLIPTextOutput:  # ids (B, L)
        states = self.encoder(inputs_embeds=self.embeddings(input_ids=input_ids, position_ids=position_ids))
        last = self.final_layer_norm(states[-1])
        end = (input_ids == self.eos_token_id).int().argmax(dim=-1)  # (B,) the first end token: v1 pads with it too
        pooled = last[torch.arange(len(last), device=last.device), end]
        return CLIPTextOutput(last, pooled, states)


class CLIPTextEmbeddings(nn.Module):
    """Embeddings of tokens and of their places."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding: Any = nn.Embedding(config.vocab_size, config.hidden_size)  # users replace it
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.position_ids: Tensor
        self.register_buffer("position_ids", _position_ids(config))  # (1, L), read by other tools

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:  # (B, L) -> (B, L, D)
        x = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        length, limit = x.shape[1], self.position_embedding.num_embeddings
        if length > limit:
            raise ValueError(f"{length} tokens, but the text tower reads at most {limit}")
        if position_ids is not None:
            return x + self.position_embedding(position_ids)
        return x + self.position_embedding.weight[:length]


class CLIPEncoder(nn.Module):
    """The transformer's layers."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, inputs_embeds: Tensor) -> tuple[Tensor, ...]:
        """Return the input (B, L, D) and the output of every layer."""
        states = [inputs_embeds]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class CLIPEncoderLayer(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> same
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPAttention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> same
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, D / heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        # padding is not masked: v1 was trained that way, and it comes after the text
        out = scaled_dot_product_attention(q, k, v, causal=True)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # (B, L, D)


class CLIPMLP(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> same
        return self.fc2(self.activation(self.fc1(x)))


@torch.no_grad()
def _initialise(model: CLIPTextTransformer, config: CLIPTextConfig) -> None:
    """Initialise as CLIP does: residual branches are scaled down with depth."""
    width = config.hidden_size
    residual = width**-0.5 * (2 * config.num_hidden_layers) ** -0.5
    stds = {"token_embedding": 0.02, "position_embedding": 0.01, "out_proj": residual, "fc2": residual}
    stds |= {"q_proj": width**-0.5, "k_proj": width**-0.5, "v_proj": width**-0.5, "fc1": (2 * width) ** -0.5}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=stds[name.rpartition(".")[2]])
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
