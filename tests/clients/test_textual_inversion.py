"""The pattern of textual inversion (Gal et al. 2022): one new word's vector is all that training changes."""

from __future__ import annotations

import torch
from torch import nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from tests.clients.common import assert_close, batch, tiny_model


class EmbeddingManager(nn.Module):
    """Puts a trained vector in the place of a token."""

    def __init__(self, token, vector):
        super().__init__()
        self.token = token
        self.vector = nn.Parameter(vector.clone())

    def forward(self, tokens, embedded):
        return torch.where((tokens == self.token)[..., None], self.vector, embedded)


class PersonalizedLDM(LatentDiffusion):
    """Trains the vector of a placeholder instead of any weight."""

    def personalize(self, token):
        text_model = self.cond_stage_model.transformer.text_model
        embeddings = text_model.embeddings
        table = embeddings.token_embedding
        self.embedding_manager = EmbeddingManager(token, table.weight[token].detach())
        published = table.forward
        table.forward = lambda tokens: self.embedding_manager(tokens, published(tokens))
        self.requires_grad_(False)
        self.embedding_manager.requires_grad_(True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.embedding_manager.parameters(), lr=self.learning_rate)

    def training_step(self, batch, batch_idx):
        loss, _ = self.shared_step(batch)
        return loss


def personalized():
    model = tiny_model("tests.clients.test_textual_inversion.PersonalizedLDM", cond_stage_trainable=True)
    tokens = model.cond_stage_model.tokenizer(["circle"])
    token = int(torch.as_tensor(tokens["input_ids"] if isinstance(tokens, dict) else tokens)[0, 1])
    model.personalize(token)
    return model


def test_the_vector_is_that_of_the_word_at_first():
    expected = tiny_model(cond_stage_trainable=True).get_learned_conditioning(["a red circle"])
    assert_close(personalized().get_learned_conditioning(["a red circle"]), expected)


def test_only_the_vector_is_trained():
    model = personalized().train()
    model.learning_rate = 0.1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    words = {text: model.get_learned_conditioning([text]).detach() for text in ("a circle", "a square")}
    optimizer = model.configure_optimizers()
    for _ in range(3):
        optimizer.zero_grad()
        model.training_step(batch(), 0).backward()
        optimizer.step()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["embedding_manager.vector"]
    assert (model.get_learned_conditioning(["a circle"]) - words["a circle"]).abs().max() > 1e-2
    assert torch.equal(model.get_learned_conditioning(["a square"]), words["a square"])


def test_the_gradient_reaches_the_vector_through_the_text_encoder():
    model = personalized()
    model.get_learned_conditioning(["a circle"]).square().sum().backward()
    assert model.embedding_manager.vector.grad.abs().max() > 0
    model.embedding_manager.vector.grad = None
    model.get_learned_conditioning(["a square"]).square().sum().backward()
    assert model.embedding_manager.vector.grad is None or model.embedding_manager.vector.grad.abs().max() == 0
