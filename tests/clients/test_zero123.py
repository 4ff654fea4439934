"""The pattern of zero123 (Liu et al. 2023): an image's embedding and a camera's move, projected, beside its latent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from tests.clients.common import SHAPE, assert_close, ddim, noise, tiny_model
from tests.tiny import tiny_config

WIDTH = 24


class ImageEncoder(nn.Module):
    """A stand-in for CLIP's image tower: (B, 3, H, W) to (B, 1, 24)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, WIDTH)

    def forward(self, image):
        pooled = nn.functional.adaptive_avg_pool2d(image, 8).flatten(1)
        return self.linear(pooled)[:, None]

    def encode(self, image):
        return self(image)


class ViewLDM(LatentDiffusion):
    """Conditions are the embedding of an image with the camera's move, and the image's latent."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cc_projection = nn.Linear(WIDTH + 4, WIDTH)

    @torch.no_grad()
    def get_input(self, batch, k, bs=None, uncond=0.0, **kwargs):
        x = batch["image_target"][:bs].movedim(-1, 1)
        image, move = batch["image_cond"][:bs].movedim(-1, 1), batch["T"][:bs]
        z = self.get_first_stage_encoding(self.encode_first_stage(x))
        with torch.enable_grad():
            c = self.conditions(image, move)
        return [z, c]

    def conditions(self, image, move):
        embedded = self.get_learned_conditioning(image).detach()
        return {
            "c_crossattn": [self.cc_projection(torch.cat([embedded, move[:, None]], dim=-1))],
            "c_concat": [self.encode_first_stage(image).mode().detach()],
        }

    def shared_step(self, batch, **kwargs):
        x, c = self.get_input(batch, self.first_stage_key)
        return self(x, c)

    def configure_optimizers(self):
        groups = [
            {"params": self.model.parameters(), "lr": self.learning_rate},
            {"params": self.cc_projection.parameters(), "lr": 10.0 * self.learning_rate},
        ]
        return torch.optim.AdamW(groups, lr=self.learning_rate)


@pytest.fixture
def model():
    unet = tiny_config()["params"]["unet_config"]
    unet["params"]["in_channels"] = 8
    encoder = {"target": "tests.clients.test_zero123.ImageEncoder"}
    target = "tests.clients.test_zero123.ViewLDM"
    return tiny_model(target, unet_config=unet, conditioning_key="hybrid", cond_stage_config=encoder)


def views():
    return {
        "image_target": noise(2, 32, 32, 3, seed=1).clamp(-1, 1),
        "image_cond": noise(2, 32, 32, 3, seed=2).clamp(-1, 1),
        "T": noise(2, 4, seed=3),
    }


def test_the_projection_is_trained(model):
    model.train()
    model.learning_rate = 1e-3
    optimizer = model.configure_optimizers()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.shared_step(views())[0].backward()
    optimizer.step()
    changed = {name.partition(".")[0] for name, v in model.state_dict().items() if not torch.equal(v, before[name])}
    assert changed == {"model", "cc_projection"}


@torch.no_grad()
def test_sampling(model):
    image, move = views()["image_cond"].movedim(-1, 1), views()["T"]
    c = model.conditions(image, move)
    u = {key: [torch.zeros_like(value[0])] for key, value in c.items()}
    x = noise(2, *SHAPE, seed=5)
    options = {"conditioning": c, "unconditional_conditioning": u, "unconditional_guidance_scale": 3.0}
    sampled, _ = DDIMSampler(model).sample(5, 2, SHAPE, x_T=x, verbose=False, **options)

    def eps(x, t):
        conditional, unconditional = model.apply_model(x, t, c), model.apply_model(x, t, u)
        return unconditional + 3.0 * (conditional - unconditional)

    assert_close(sampled, ddim(eps, model.alphas_cumprod, x, 5))
    other = model.conditions(image, -move)
    assert (model.apply_model(x, torch.tensor([5, 5]), other) - eps_of(model, x, c)).abs().max() > 1e-4


def eps_of(model, x, c):
    return model.apply_model(x, torch.tensor([5, 5]), c)
