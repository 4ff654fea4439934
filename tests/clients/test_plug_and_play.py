"""The pattern of plug-and-play (Tumanyan et al. 2023): latents and features of one run are put into another."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from tests.clients.common import SHAPE, assert_close, noise, tiny_model

STEPS = 5


class EditingSampler(DDIMSampler):
    """Keeps part of every latent as another run had it."""

    def __init__(self, model, path, mask):
        super().__init__(model)
        self.path, self.mask, self.calls = path, mask, []

    def p_sample_ddim(self, x, c, t, index, **kwargs):
        self.calls.append((index, int(t[0])))
        x = self.mask * self.path[index] + (1 - self.mask) * x
        return super().p_sample_ddim(x, c, t, index, **kwargs)


class Recording(DDIMSampler):
    def __init__(self, model):
        super().__init__(model)
        self.path = {}

    def p_sample_ddim(self, x, c, t, index, **kwargs):
        self.path[index] = x
        x_prev, pred_x0 = super().p_sample_ddim(x, c, t, index, **kwargs)
        return x_prev, pred_x0


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def prompt(model, text):
    return model.get_learned_conditioning([text])


def test_latents_are_edited(model):
    x = noise(1, *SHAPE)
    source = Recording(model)
    expected, _ = source.sample(STEPS, 1, SHAPE, conditioning=prompt(model, "a red circle"), x_T=x, verbose=False)
    assert sorted(source.path) == list(range(STEPS))
    target = prompt(model, "a blue square")
    mask = torch.ones(1, 1, 16, 16)
    held = EditingSampler(model, source.path, mask)
    held.sample(STEPS, 1, SHAPE, conditioning=target, x_T=noise(1, *SHAPE, seed=9), verbose=False)
    assert held.calls == [(index, int(held.ddim_timesteps[index])) for index in reversed(range(STEPS))]
    free, _ = EditingSampler(model, source.path, 0 * mask).sample(
        STEPS, 1, SHAPE, conditioning=target, x_T=x, verbose=False
    )
    plain, _ = DDIMSampler(model).sample(STEPS, 1, SHAPE, conditioning=target, x_T=x, verbose=False)
    assert_close(free, plain)
    same, _ = EditingSampler(model, source.path, mask).sample(
        STEPS, 1, SHAPE, conditioning=prompt(model, "a red circle"), x_T=x + 1, verbose=False
    )
    assert_close(same, expected)


def test_features_are_injected(model):
    """A block's output of one run, kept by a hook, replaces that of another run."""
    network = model.model.diffusion_model
    block = network.output_blocks[1][0]
    features, injecting = [], iter(())
    x = noise(1, *SHAPE)

    def keep(module, args, output):
        features.append(output)

    def inject(module, args, output):
        return next(injecting)

    handle = block.register_forward_hook(keep)
    DDIMSampler(model).sample(STEPS, 1, SHAPE, conditioning=prompt(model, "a red circle"), x_T=x, verbose=False)
    handle.remove()
    assert len(features) == STEPS
    target = prompt(model, "a blue square")
    plain, _ = DDIMSampler(model).sample(STEPS, 1, SHAPE, conditioning=target, x_T=x, verbose=False)
    injecting = iter(features)
    handle = block.register_forward_hook(inject)
    edited, _ = DDIMSampler(model).sample(STEPS, 1, SHAPE, conditioning=target, x_T=x, verbose=False)
    handle.remove()
    assert (edited - plain).abs().max() > 1e-4


def test_inversion(model):
    """DDIM walked towards the noise, and back, is nearly the image again."""
    sampler = DDIMSampler(model)
    sampler.make_schedule(200, ddim_eta=0.0, verbose=False)
    c = prompt(model, "a red circle")
    x0 = noise(1, *SHAPE) * 0.3
    latent, _ = sampler.encode(x0, c, 60)
    back = sampler.decode(latent, c, 60)
    assert (back - x0).abs().mean() < 0.2 * (latent - x0).abs().mean()


def test_callbacks(model):
    seen, images = [], []
    DDIMSampler(model).sample(
        STEPS,
        1,
        SHAPE,
        conditioning=prompt(model, "a red circle"),
        verbose=False,
        callback=seen.append,
        img_callback=lambda pred_x0, i: images.append((pred_x0.shape, i)),
    )
    assert seen == list(range(STEPS)) and images == [(torch.Size((1, *SHAPE)), i) for i in range(STEPS)]
