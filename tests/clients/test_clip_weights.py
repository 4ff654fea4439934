"""Weights of open_clip and of transformers in our text towers, loaded by name, at small sizes."""

from __future__ import annotations

import torch

from ldm.modules.encoders.modules import FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder
from tests.clients.common import PROMPTS, assert_close, import_or_skip

WIDTH, HEADS, LAYERS, LENGTH, VOCABULARY = 24, 2, 3, 16, 49408


@torch.no_grad()
def test_open_clip():
    open_clip = import_or_skip("open_clip")
    text = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": WIDTH, "heads": HEADS, "layers": LAYERS}
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 14, "image_size": 28}
    theirs = open_clip.CLIP(16, vision, text).eval()
    state = {f"model.{name}": value for name, value in theirs.state_dict().items() if not name.startswith("visual.")}
    for layer, keep in (("last", LAYERS), ("penultimate", LAYERS - 1)):
        ours = FrozenOpenCLIPEmbedder(layer=layer, max_length=LENGTH, config={**text, "embed_dim": 16})
        ours.load_state_dict(state)
        tokens = open_clip.tokenize(PROMPTS, context_length=LENGTH)
        x = theirs.token_embedding(tokens) + theirs.positional_embedding
        for block in theirs.transformer.resblocks[:keep]:
            x = block(x, attn_mask=theirs.attn_mask)
        assert_close(ours(PROMPTS), theirs.ln_final(x))


@torch.no_grad()
def test_transformers():
    transformers = import_or_skip("transformers")
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": LENGTH}
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes)).eval()
    ours = FrozenCLIPEmbedder(max_length=LENGTH, config=sizes)
    state = {f"transformer.text_model.{name.removeprefix('text_model.')}": v for name, v in theirs.state_dict().items()}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected and not [name for name in missing if "position_ids" not in name]
    ids = ours.tokenizer(PROMPTS, LENGTH)
    assert_close(ours(PROMPTS), theirs(input_ids=ids).last_hidden_state)
