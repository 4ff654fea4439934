"""The pattern of InstructPix2Pix (Brooks et al. 2023): the image to edit in four more channels, and two guidances."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from tests.clients.common import PROMPTS, SHAPE, assert_close, ddim, noise, tiny_model
from tests.tiny import tiny_config


class EditingLDM(LatentDiffusion):
    """Batches are {"edited": images, "edit": {"c_concat": images, "c_crossattn": texts}}."""

    @torch.no_grad()
    def get_input(
        self,
        batch,
        k,
        return_first_stage_outputs=False,
        force_c_encode=False,
        cond_key=None,
        return_original_cond=False,
        bs=None,
        uncond=0.05,
    ):
        x = batch["edited"][:bs].movedim(-1, 1)
        edit = batch["edit"]
        images, texts = edit["c_concat"][:bs].movedim(-1, 1), edit["c_crossattn"][:bs]
        z = self.get_first_stage_encoding(self.encode_first_stage(x)).detach()
        random = torch.rand(len(x))
        no_text = (random < 2 * uncond)[:, None, None]
        keep_image = 1 - ((random >= uncond) & (random < 3 * uncond)).float()[:, None, None, None]
        null = self.get_learned_conditioning([""])
        c = torch.where(no_text, null, self.get_learned_conditioning(texts).detach())
        encoded = self.encode_first_stage(images).mode().detach()
        out = [z, {"c_crossattn": [c], "c_concat": [keep_image * encoded]}]
        if return_first_stage_outputs:
            out += [x, self.decode_first_stage(z)]
        if return_original_cond:
            out.append(texts)
        return out

    def shared_step(self, batch, **kwargs):
        x, c = self.get_input(batch, self.first_stage_key)
        return self(x, c)


def model_of(**params):
    unet = tiny_config()["params"]["unet_config"]
    unet["params"]["in_channels"] = 8
    target = "tests.clients.test_instruct_pix2pix.EditingLDM"
    return tiny_model(target, unet_config=unet, conditioning_key="hybrid", **params)


@pytest.fixture(scope="module")
def model():
    return model_of()


def edits():
    images = noise(2, 32, 32, 3, seed=4).clamp(-1, 1)
    return {
        "edited": noise(2, 32, 32, 3, seed=1).clamp(-1, 1),
        "edit": {"c_concat": images, "c_crossattn": list(PROMPTS)},
    }


def test_input(model):
    torch.manual_seed(0)
    z, c, x, rebuilt, texts = model.get_input(
        edits(), "edited", return_first_stage_outputs=True, return_original_cond=True, bs=1
    )
    assert z.shape == (1, *SHAPE) and c["c_concat"][0].shape == (1, *SHAPE) and texts == PROMPTS[:1]
    assert x.shape == rebuilt.shape == (1, 3, 32, 32)


def test_loss(model):
    """The loss with noise from the global generator equals the formula with `randn_like` of the same latents."""
    torch.manual_seed(7)
    loss, log = model.shared_step(edits())
    torch.manual_seed(7)
    z, c = model.get_input(edits(), "edited")
    t = torch.randint(0, model.num_timesteps, (2,))
    added = torch.randn_like(z)
    x = torch.cat([model.q_sample(z, t, added), *c["c_concat"]], dim=1)
    eps = model.model.diffusion_model(x, t, context=torch.cat(c["c_crossattn"], 1))
    assert_close(loss, (eps - added).square().mean())
    assert log


def test_latents_have_the_memory_format_of_their_images(model):
    """Images that are (H, W, C) in memory give such latents, as in the originals, so that `randn_like` is the same."""
    images = edits()["edited"].movedim(-1, 1)
    assert images.is_contiguous(memory_format=torch.channels_last)
    for image, memory_format in ((images, torch.channels_last), (images.contiguous(), torch.contiguous_format)):
        latent = model.get_first_stage_encoding(model.encode_first_stage(image))
        assert latent.is_contiguous(memory_format=memory_format)
        assert torch.randn_like(latent).is_contiguous(memory_format=memory_format)


@torch.no_grad()
def test_two_guidances(model):
    """eps = e(0, 0) + s_I (e(image, 0) - e(0, 0)) + s_T (e(image, text) - e(image, 0)), equation 3."""

    class Guided(torch.nn.Module):
        """A model around the model, as the project's denoiser is."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.num_timesteps, self.alphas_cumprod = inner.num_timesteps, inner.alphas_cumprod
            self.betas, self.alphas_cumprod_prev = inner.betas, inner.alphas_cumprod_prev
            self.device, self.parameterization = inner.device, inner.parameterization

        def apply_model(self, x, t, cond):
            text, image = cond["c_crossattn"][0], cond["c_concat"][0]
            stacked = {
                "c_crossattn": [torch.cat([text, null, null])],
                "c_concat": [torch.cat([image, image, 0 * image])],
            }
            full, image_only, none = self.inner.apply_model(x.repeat(3, 1, 1, 1), t.repeat(3), stacked).chunk(3)
            return none + 5.0 * (full - image_only) + 1.5 * (image_only - none)

    null = model.get_learned_conditioning([""] * 2)
    c = {
        "c_crossattn": [model.get_learned_conditioning(PROMPTS)],
        "c_concat": [model.encode_first_stage(edits()["edit"]["c_concat"].movedim(-1, 1)).mode()],
    }
    x, guided = noise(2, *SHAPE, seed=2), Guided(model)
    sampled, _ = DDIMSampler(guided).sample(5, 2, SHAPE, conditioning=c, x_T=x, verbose=False)
    assert_close(sampled, ddim(lambda x, t: guided.apply_model(x, t, c), model.alphas_cumprod, x, 5))


def test_four_channels_become_eight():
    """A text-to-image checkpoint with zeros for the new channels gives the same answers."""
    plain, model = tiny_model(), model_of()
    state = plain.state_dict()
    name = "model.diffusion_model.input_blocks.0.0.weight"
    state[name] = torch.cat([state[name], torch.zeros_like(state[name])], dim=1)
    model.load_state_dict(state)
    x, t = noise(2, *SHAPE), torch.tensor([10, 700])
    text = plain.get_learned_conditioning(PROMPTS)
    with torch.no_grad():
        answer = model.apply_model(x, t, {"c_crossattn": [text], "c_concat": [noise(2, *SHAPE, seed=3)]})
        assert_close(answer, plain.apply_model(x, t, text))
