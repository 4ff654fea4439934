"""The text encoder that learns to read captions before diffusion starts."""

from __future__ import annotations

import numpy as np
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


def test_it_learns_to_read() -> None:
    data, model = ShapesCaptions(100, object_weights=(1,)), reader()
    items = [data[i] for i in range(100)]
    batch = {
        "caption": [item["caption"] for item in items],
        "attributes": torch.tensor(np.stack([item["attributes"] for item in items])),
    }
    logged: dict[str, torch.Tensor] = {}
    model.log_dict = lambda values, **_: logged.update(values)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(40):
        loss = model.training_step(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    first = sum(np.log(classes) for classes in ATTRIBUTE_CLASSES)  # of a reader that guesses evenly
    model.validation_step(batch, 0)
    assert logged["val/loss"] < 0.4 * first
    assert 0 <= logged["val/read"] <= 1
