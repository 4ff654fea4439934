"""Images with their own seeds: the same alone or in any batch, and interpolation between seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import inference
from ldm.inference import Conditioning, Pipeline, SamplingOptions, SeedOptions
from ldm.models.diffusion.noise import InterpolatedNoise, PerImageNoise, global_noise, slerp
from tests.tiny import write_tiny

PROMPTS = ["a red circle", "a blue square", "a red square"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return inference.load_model(ckpt=write_tiny(tmp_path_factory.mktemp("tiny")), device="cpu")


@pytest.fixture
def latents(monkeypatch):
    """Makes pipelines return latents instead of images, whose 256 levels would hide errors."""
    monkeypatch.setattr(Pipeline, "decode", lambda self, latents: list(latents))


@pytest.fixture(scope="module")
def photo():
    y, x = np.mgrid[0:32, 0:32]
    return Image.fromarray(np.stack([x * 7, y * 5, x + y], axis=-1).astype(np.uint8))


SAMPLERS = [("ddim", 0.0), ("ddim", 1.0), ("plms", 0.0), ("euler_a", 0.0), ("dpmpp_2m_sde", 0.0), ("unipc", 0.0)]


@pytest.fixture(scope="module")
def trained():
    """The bundled model: numbers of an untrained network grow, and rounding errors with them."""
    return inference.load_model(device="cpu")


@pytest.mark.parametrize("sampler, eta", SAMPLERS)
def test_image_i_alone_equals_image_i_in_a_batch(trained, latents, photo, sampler, eta):
    options = {"steps": 4, "sampler": sampler, "eta": eta, "scale": 2.0, "progress": False}

    def sample(rows: list[int]) -> list[list[torch.Tensor]]:
        prompts, seeds = [PROMPTS[row] for row in rows], [7 + row for row in rows]
        text = inference.txt2img(trained, prompts, seed=seeds, **options)
        return [text, inference.img2img(trained, prompts, photo, seed=seeds, **options)]

    together, alone, apart = sample([0, 1, 2]), sample([1]), sample([2, 1])
    for batch, one, other in zip(together, alone, apart):
        torch.testing.assert_close(one[0], batch[1], rtol=0, atol=1e-5)
        torch.testing.assert_close(other, [batch[2], batch[1]], rtol=0, atol=1e-5)
        assert (batch[0] - batch[1]).abs().max() > 0.1


def test_masks_have_noise_of_each_image(model):
    """What is known enters with noise at every step."""
    shape, mask = (4, 8, 8), torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    known = torch.linspace(-1, 1, 4 * 64).view(1, *shape)

    def sample(seeds: list[int]) -> torch.Tensor:
        cond = model.get_learned_conditioning(["a red circle"]).expand(len(seeds), -1, -1)
        conditioning = Conditioning(cond, init=known.expand(len(seeds), -1, -1, -1), mask=mask)
        pipe, options = Pipeline(model), SamplingOptions(steps=4, sampler="ddim", scale=1.0)
        with pipe.inference_mode(options):
            return pipe.sample(conditioning, options, PerImageNoise(seeds), progress=False)

    torch.testing.assert_close(sample([5])[0], sample([3, 5])[1], rtol=0, atol=1e-5)


def test_a_seed_for_each_prompt(model):
    with pytest.raises(ValueError, match="there are 2 seeds for a batch of 3"):
        inference.txt2img(model, PROMPTS, seed=[1, 2], steps=1, progress=False)


def test_the_run_may_be_batched_anyhow():
    varied = SeedOptions(40, "image", variation_seed=5, variation_strength=0.25)
    complete = varied.noise(3)((3, 4), CPU)
    assert torch.equal(complete[2:], varied.noise(1, first=2)((1, 4), CPU))
    plain = SeedOptions(40, "image")
    assert torch.equal(plain.noise(3)((3, 4), CPU)[1], PerImageNoise([41])((1, 4), CPU)[0])
    assert [settings["seed"] for settings in plain.image_settings(2, 2)] == [42, 43]
    assert [settings["seed"] for settings in SeedOptions(2**32 - 1, "image").image_settings(0, 2)] == [2**32 - 1, 0]
    again = SeedOptions(40, "image", fixed_code=True)
    assert torch.equal(again.noise(3, first=6)((3, 4), CPU), plain.noise(3)((3, 4), CPU))
    assert torch.equal(SeedOptions([8, 9]).noise(2)((2, 4), CPU), PerImageNoise([8, 9])((2, 4), CPU))
    assert [settings["seed"] for settings in SeedOptions([8, 9]).image_settings(4, 2)] == [8, 9]


def test_variations_go_from_seed_to_seed(model, latents):
    options = {"steps": 3, "sampler": "euler_a", "height": 16, "width": 16, "progress": False}

    def sample(strength: float) -> torch.Tensor:
        seeds = {"seed": 3, "seed_mode": "image", "variation_seed": 9, "variation_strength": strength}
        return inference.txt2img(model, PROMPTS[:1], **seeds, **options)[0]

    ends, middle = [sample(0.0), sample(1.0)], sample(0.5)
    for end, seed in zip(ends, (3, 9)):
        assert torch.equal(end, inference.txt2img(model, PROMPTS[:1], seed=[seed], **options)[0])
    near, far = (middle - ends[0]).norm(), (ends[1] - ends[0]).norm()
    assert 0 < near < far
    (settings,) = SeedOptions(3, "image", variation_seed=9, variation_strength=0.5).image_settings(4, 1)
    assert settings | {"seed": 3, "variation_seed": 13, "variation_strength": 0.5} == settings
    with pytest.raises(ValueError, match="variation_strength must be from 0 to 1, not 1.5"):
        SeedOptions(3, variation_strength=1.5)


def test_a_fixed_start_varies_once():
    """Mode "batch": the shared generator's image, varied; the noise of later steps is the batches' own."""
    seeds = SeedOptions(3, variation_seed=9, variation_strength=0.5, fixed_code=True)
    shared = seeds.shared_noise()
    start = seeds.start(2, shared)((2, 16), CPU)
    torch.manual_seed(3)
    expected = slerp(torch.randn(2, 16), PerImageNoise([9, 10])((2, 16), CPU), 0.5)
    assert torch.equal(start, expected)
    assert seeds.noise(2, 2, shared) is shared
    assert [row["variation_seed"] for row in seeds.image_settings(2, 2)] == [9, 10]


def test_batches_continue_the_noise_of_the_run():
    """As the global generators do that a script of the public code seeds once."""
    torch.manual_seed(4)
    expected = [torch.randn(2, 3) for _ in range(2)]
    for seeds in (SeedOptions(4), SeedOptions(4, noise_device="cpu")):
        shared = seeds.shared_noise()
        assert [seeds.noise(2, first, shared)((2, 3), CPU).tolist() for first in (0, 2)] == [
            noise.tolist() for noise in expected
        ]
    assert SeedOptions().shared_noise() is global_noise


def test_the_cpu_may_generate_noise_for_every_device():
    sampled = SeedOptions(4, noise_device="cpu").noise(2)((2, 3), torch.device("meta"))
    assert sampled.device.type == "meta"


def test_noise_between_sources_stays_noise():
    noise = InterpolatedNoise(PerImageNoise(range(64)), PerImageNoise(range(100, 164)), [i / 63 for i in range(64)])
    drawn = noise((64, 4096), CPU)
    assert torch.equal(drawn[0], PerImageNoise([0])((1, 4096), CPU)[0])
    assert torch.equal(drawn[-1], PerImageNoise([163])((1, 4096), CPU)[0])
    assert (drawn.std(dim=1) - 1).abs().max() < 0.06 and drawn.mean(dim=1).abs().max() < 0.08
    a, b = torch.eye(2)[:1], torch.eye(2)[1:]
    torch.testing.assert_close(slerp(a, b, 1 / 3), torch.tensor([[np.cos(np.pi / 6), np.sin(np.pi / 6)]]).float())
    torch.testing.assert_close(slerp(a, 2 * a, 0.5), 1.5 * a)  # one direction: straight
