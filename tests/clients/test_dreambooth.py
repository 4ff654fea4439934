"""The pattern of DreamBooth (Ruiz et al. 2022): the loss of an instance's image and that of a class image, added."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.ddpm import LatentDiffusion
from tests.clients.common import assert_close, batch, noise, tiny_model


class DreamBooth(LatentDiffusion):
    """Batches are a pair: images of the instance, and of its class."""

    def __init__(self, reg_weight=1.0, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.reg_weight = reg_weight

    def shared_step(self, batch, **kwargs):
        x, c = self.get_input(batch, self.first_stage_key)
        return self(x, c)

    def training_step(self, batch, batch_idx):
        instance, prior = batch
        loss, log = self.shared_step(instance)
        prior_loss, _ = self.shared_step(prior)
        loss = loss + self.reg_weight * prior_loss
        self.logged = log
        return loss

    def configure_optimizers(self):
        params = [*self.model.parameters(), *self.cond_stage_model.parameters()]
        return torch.optim.AdamW(params, lr=self.learning_rate)


@pytest.fixture
def model():
    return tiny_model("tests.clients.test_dreambooth.DreamBooth", reg_weight=0.5, cond_stage_trainable=True).train()


def class_images():
    return {"jpg": noise(2, 32, 32, 3, seed=8).clamp(-1, 1), "txt": ["a circle", "a square"]}


def test_loss_is_the_sum(model):
    torch.manual_seed(3)
    loss = model.training_step((batch(), class_images()), 0)
    torch.manual_seed(3)
    parts = []
    for images in (batch(), class_images()):
        x, c = model.get_input(images, "jpg")
        c = model.get_learned_conditioning(c) if not isinstance(c, torch.Tensor) else c
        t = torch.randint(0, model.num_timesteps, (2,))
        noise = torch.randn_like(x)
        eps = model.apply_model(model.q_sample(x, t, noise), t, c)
        parts.append((eps - noise).square().mean())
    assert_close(loss, parts[0] + 0.5 * parts[1])
    assert "train/loss_simple" in model.logged and "train/loss" in model.logged


def test_text_encoder_and_network_are_trained(model):
    model.learning_rate = 1e-3
    optimizer = model.configure_optimizers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.training_step((batch(), class_images()), 0).backward()
    optimizer.step()
    changed = {name.partition(".")[0] for name, v in model.state_dict().items() if not torch.equal(v, before[name])}
    assert changed == {"model", "cond_stage_model"}
