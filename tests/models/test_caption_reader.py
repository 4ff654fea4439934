"""The text encoder that learns to read captions before diffusion starts."""

from __future__ import annotations

import torch

from ldm.data.shapes import ATTRIBUTE_CLASSES, WORDS, ShapesCaptions
from ldm.models.caption_reader import CaptionReader


def reader() -> CaptionReader:
    torch.manual_seed(0)
    tower = {"vocab_size": 35, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower |= {"intermediate_size": 64, "max_position_embeddings": 24, "hidden_act": "quick_gelu"}
    words = {"target": "ldm.modules.encoders.tokenizer.WordTokenizer", "params": {"words": list(WORDS)}}
    params = {"config": tower, "max_length": 24, "tokenizer": words}
    encoder = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": params}
    return CaptionReader(encoder, ATTRIBUTE_CLASSES, width=32)


def test_logits_have_a_value_for_each_class_and_gradients_reach_the_encoder() -> None:
    model = reader()
    logits = model(["a red circle", "a star above a small blue square on a tan background"])
    assert [tuple(logit.shape) for logit in logits] == [(2, n) for n in ATTRIBUTE_CLASSES]
    sum(logit.sum() for logit in logits).backward()
    embedding = model.cond_stage_model.transformer.text_model.embeddings.token_embedding.weight
    assert embedding.grad.abs().sum() > 0  # also where the config says nothing of `freeze`


def test_it_learns_to_read_single_objects() -> None:
    data, model = ShapesCaptions(300, object_weights=(1,)), reader()
    items = [data[i] for i in range(300)]
    captions, attributes = [i["caption"] for i in items], torch.stack([torch.tensor(i["attributes"]) for i in items])
    model.log_dict = lambda logged, **_: model.__dict__.update(logged=logged)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        rows = torch.randint(300, (64,), generator=torch.Generator().manual_seed(step))
        loss = model.training_step({"caption": [captions[i] for i in rows], "attributes": attributes[rows]}, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.validation_step({"caption": captions, "attributes": attributes}, 0)
    assert model.logged["val/read"] > 0.9
