"""Text-to-image and image-to-image as a Python user calls them, on a tiny model."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm import inference
from ldm.inference import img2img, load_model, txt2img
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.noise import SeededNoise
from ldm.models.diffusion.samplers import make_sampler
from ldm.models.model_info import SamplingDefaults
from tests.tiny import write_tiny

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(ckpt):
    return load_model(ckpt=ckpt, device="cpu")


@pytest.fixture(scope="module")
def photo():
    y, x = np.mgrid[0:96, 0:70]
    return Image.fromarray(np.stack([x * 3, y * 2, x + y], axis=-1).astype(np.uint8))


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_loading_says_what_it_does(ckpt, caplog):
    with caplog.at_level(logging.INFO, "ldm"):
        model = load_model(ckpt=ckpt, device="cpu")
    assert f"Loading model from {ckpt}" in caplog.text and "Global Step: 7" in caplog.text
    assert model.device == torch.device("cpu")
    assert not model.training and not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert next(model.parameters()).dtype == torch.float32


def test_bundled_model_stands_in_for_a_missing_default(ckpt, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(inference.loading, "BUNDLED_CKPT", str(ckpt))
    monkeypatch.setattr(inference.loading, "DEFAULT_CKPT", "nowhere/model.ckpt")
    with caplog.at_level(logging.INFO, "ldm"):
        assert load_model(device="cpu").info.checkpoint_path == str(ckpt)
    assert "small bundled model" in caplog.text
    with pytest.raises(FileNotFoundError, match="not-there.ckpt"):
        load_model(ckpt=tmp_path / "not-there.ckpt")


CONFIG_MISTAKES = [
    ("model: [", "not valid YAML"),
    ("data: {}", "no `model:` section"),
    ("just words", "no `model:` section"),
]


@pytest.mark.parametrize("text, message", CONFIG_MISTAKES)
def test_config_mistakes(tmp_path, ckpt, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_model(path, ckpt, device="cpu")
    with pytest.raises(FileNotFoundError, match="no-such.yaml"):
        load_model("no-such.yaml", ckpt, device="cpu")


def test_configs_that_are_no_diffusion_model(tmp_path, ckpt):
    path = tmp_path / "x.yaml"
    path.write_text("model: {target: torch.nn.Identity}")
    with pytest.raises(ValueError, match="torch.nn.Identity is no latent diffusion model"):
        load_model(path, ckpt, device="cpu")


@pytest.mark.parametrize("sampler", inference.SAMPLERS)
def test_seed_decides_everything(model, sampler):
    options = {"steps": 3, "sampler": sampler, "progress": False}
    first, again, other = (pixels(txt2img(model, PROMPTS, seed=seed, **options)) for seed in (1, 1, 2))
    assert first.shape == (2, 32, 32, 3)
    assert (first == again).all() and (first != other).any()


def test_what_a_txt2img_call_is(model):
    """The same by hand, from the parts."""
    inference.seed_everything(3)
    uc, c = model.get_learned_conditioning(["", ""]), model.get_learned_conditioning(PROMPTS)
    x, _ = DDIMSampler(model).sample(
        4,
        2,
        (4, 16, 16),
        c,
        unconditional_conditioning=uc,
        unconditional_guidance_scale=7.5,
        eta=0.5,
        verbose=False,
    )
    expected = (255 * ((model.decode_first_stage(x) + 1) / 2).clamp(0, 1)).byte().movedim(1, -1).numpy().astype(int)
    drawn = pixels(txt2img(model, PROMPTS, steps=4, eta=0.5, seed=3, progress=False))
    assert np.abs(drawn - expected).max() <= 1


def test_negative_prompt_counts(model):
    options = {"steps": 3, "seed": 1, "progress": False}
    plain = pixels(txt2img(model, ["a red circle"], **options))
    assert (plain == pixels(txt2img(model, ["a red circle"], negative_prompt="", **options))).all()
    assert (plain != pixels(txt2img(model, ["a red circle"], negative_prompt="blue square", **options))).any()
    unguided = pixels(txt2img(model, ["a red circle"], scale=1.0, **options))
    avoided = pixels(txt2img(model, ["a red circle"], scale=1.0, negative_prompt="blue", **options))
    assert (unguided == avoided).all()  # without guidance there is nothing to avoid


def test_models_name_their_own_sampling(ckpt, tmp_path):
    config = OmegaConf.load(ckpt.with_name("config.yaml"))
    path = tmp_path / "own.yaml"

    def loaded(**own):
        OmegaConf.save({"model": config.model, "sampling": own}, path)
        return load_model(path, ckpt, device="cpu")

    def settings(model, **options):
        resolved = inference.Pipeline(model).resolve(default_scale=5.0, **options)
        return resolved.steps, resolved.sampler, resolved.scale

    own = loaded(scale=4.0, sampler="dpm_solver", steps=3)
    given = {"scale": 4.0, "sampler": "dpm_solver", "steps": 3}
    quiet = {"seed": 1, "progress": False}
    plain = load_model(ckpt=ckpt, device="cpu")
    assert plain.info.sampling == SamplingDefaults() and settings(plain) == (50, "ddim", 5.0)
    assert (pixels(txt2img(own, PROMPTS, **quiet)) == pixels(txt2img(plain, PROMPTS, **given, **quiet))).all()
    assert settings(own, steps=9, scale=1.0) == (9, "dpm_solver", 1.0)
    assert settings(own, eta=0.5) == (3, "ddim", 4.0)
    for mistake in ({"scales": 4}, {"sampler": "nonsense"}, {"steps": 0}, {"steps": 2.5}, {"scale": "much"}):
        with pytest.raises(ValueError, match="it takes a number `scale`"):
            loaded(**mistake)


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 1.0), ("plms", 0.0), ("dpm_solver", 0.0)])
@pytest.mark.parametrize("fixed", [False, True])
def test_skip_noise_uses_the_same_random_numbers(model, sampler, eta, fixed):
    options = {"steps": 4, "sampler": sampler, "eta": eta, "height": 16, "width": 48}
    start = torch.zeros(2, 4, 8, 24) if fixed else None
    used, skipped = SeededNoise(5), SeededNoise(5)
    txt2img(model, PROMPTS, **options, noise=used, start_code=start, progress=False)
    pipe = inference.Pipeline(model)
    pipe.skip_noise(inference.Conditioning(None, shape=(2, 4, 8, 24), start=start), pipe.resolve(**options), skipped)
    assert torch.equal(used((4,), "cpu"), skipped((4,), "cpu"))


def test_sizes(model):
    assert txt2img(model, ["a"], height=22, width=50, steps=2, progress=False)[0].size == (50, 22)
    with pytest.raises(ValueError, match=r"height 33 .* multiple of 2.* 32 or 34"):
        txt2img(model, ["a"], height=33, steps=1)
    with pytest.raises(ValueError, match="width 1 "):
        txt2img(model, ["a"], width=1, steps=1)


@pytest.mark.parametrize("sampler", inference.SAMPLERS)
@pytest.mark.parametrize("strength", [0.0, 0.04, 0.5, 1.0])
def test_image_to_image_at_every_strength(model, photo, sampler, strength):
    small = photo.crop((0, 0, 38, 32))
    images = img2img(
        model, PROMPTS, small, strength=strength, steps=8, sampler=sampler, scale=2.0, seed=4, progress=False
    )
    assert pixels(images).shape == (2, 32, 32, 3)  # 38 floored to 32


def test_strength_zero_is_the_first_stage_round_trip(model, photo):
    (image,) = img2img(model, ["a red circle"], photo, strength=0.0, seed=4, progress=False)
    inference.seed_everything(4)
    latents = inference.encode_image(model, photo)
    assert (pixels([image]) == pixels(inference.Pipeline(model).decode(latents))).all()


def test_more_strength_changes_more(model, photo):
    def change(strength: float) -> float:
        (image,) = img2img(model, ["a"], photo, strength=strength, steps=20, scale=1.0, seed=4, progress=False)
        return float(np.abs(pixels([image]) - kept).mean())

    kept = pixels(img2img(model, ["a"], photo, strength=0.0, seed=4, progress=False))
    assert 0 < change(0.2) < change(0.6)


def test_image_to_image_sizes(model, photo):
    def size(**wanted):
        return img2img(model, ["a"], photo, strength=0.0, progress=False, **wanted)[0].size

    assert size(height=50, width=40) == (40, 50)
    assert size(height=48) == (34, 48)  # the picture's shape, to the model's multiple
    with pytest.raises(ValueError, match="width 41"):
        size(width=41)


STEP_COUNTS = [1, 2, 3, 9, 27, 36, 101, 333, 501, 999, 1000]


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver"])
@pytest.mark.parametrize("steps", STEP_COUNTS)
def test_every_step_count_has_a_schedule(model, sampler, steps):
    """Counts that indexed past the schedule in the public code among them; see also the schedule's own test."""
    names = ("alphas_cumprod", "num_timesteps", "parameterization", "device")
    quick = SimpleNamespace(**{name: getattr(model, name) for name in names}, apply_model=lambda x, t, cond: x * 0.1)
    solver = make_sampler(quick, sampler)
    result, _ = solver.sample(steps, 1, (4, 2, 2), x_T=torch.ones(1, 4, 2, 2), verbose=False)
    assert torch.isfinite(result).all() and t_range(solver)[0] >= 0 and t_range(solver)[1] <= 999


def t_range(solver) -> tuple[float, float]:
    return float(solver.sampling_schedule.timesteps.min()), float(solver.sampling_schedule.timesteps.max())


@pytest.mark.parametrize("part", ["model.diffusion_model.out.2.bias", "first_stage_model.decoder.conv_out.bias"])
def test_black_images_become_messages(ckpt, part):
    model = load_model(ckpt=ckpt, device="cpu")
    model.get_parameter(part).data.fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="--precision full"):
        txt2img(model, ["a"], steps=2, progress=False)


@pytest.mark.parametrize("sampler", inference.SAMPLERS)
def test_autocast(ckpt, photo, sampler):
    """The default path on a GPU, with the half precision that a CPU has."""
    model = load_model(ckpt=ckpt, device="cpu")
    options = {"steps": 4, "sampler": sampler, "scale": 2.0, "seed": 1, "progress": False, "height": 16, "width": 16}
    exact = pixels(txt2img(model, PROMPTS, **options))
    model.info = replace(model.info, autocast_dtype=torch.bfloat16)
    rough = pixels(txt2img(model, PROMPTS, **options))
    assert 0 < np.abs(rough - exact).mean() < 8
    assert img2img(model, ["a"], photo, **options)[0].size == (16, 16)


def test_half_precision_image_to_image(ckpt, photo):
    options = {"strength": 0.5, "steps": 4, "scale": 2.0, "seed": 1, "progress": False}
    exact, rough = (
        pixels(img2img(load_model(ckpt=ckpt, device="cpu", precision=precision), ["a"], photo, **options))
        for precision in ("full", "bf16")
    )
    assert 0 < np.abs(rough - exact).mean() < 8


def test_images_are_resized_for_models_of_one_scale(ckpt, photo):
    model = load_model(ckpt=ckpt, device="cpu")
    model.info = replace(model.info, one_scale=True)
    assert img2img(model, ["a"], photo, strength=0.0, progress=False)[0].size == (32, 32)  # 70x96 at 32 is 32x44
    with pytest.raises(ValueError, match="900x2 would become 14400x32"):
        img2img(model, ["a"], Image.new("RGB", (900, 2)))


def test_latents_that_do_not_fit_the_prompts(model, photo):
    latents = inference.encode_image(model, photo, 3)
    assert latents.shape == (3, 4, 48, 32) and not latents[0].equal(latents[1])
    with pytest.raises(ValueError, match="3 latents for 2 prompts"):
        img2img(model, PROMPTS, latents)


def test_half_precision_weights(ckpt):
    model = load_model(ckpt=ckpt, device="cpu", precision="bf16")
    assert next(model.model.parameters()).dtype == torch.bfloat16
    assert model.alphas_cumprod.dtype == torch.float32
    assert txt2img(model, ["a red circle"], steps=2, seed=1, progress=False)[0].size == (32, 32)


def test_averaged_weights_serve_where_the_config_says_so(tmp_path):
    ckpt = write_tiny(tmp_path, use_ema=True)
    model = load_model(ckpt=ckpt, device="cpu")
    trained = model.model.diffusion_model.out[2].weight.clone()
    used = []
    model.model.register_forward_pre_hook(lambda *_: used.append(model.model.diffusion_model.out[2].weight.clone()))
    txt2img(model, ["a"], steps=1, scale=1.0, progress=False)
    assert torch.equal(used[0], model.model_ema.get_buffer("diffusion_modelout2weight"))
    assert not torch.equal(used[0], trained) and torch.equal(model.model.diffusion_model.out[2].weight, trained)


MISUSES = [
    ({"prompts": "a red circle"}, "list of at least one"),
    ({"prompts": []}, "list of at least one"),
    ({"prompts": ["a"], "sampler": "nonsense"}, "'nonsense' is not one of ddim, "),
    ({"prompts": ["a"], "steps": 0}, "from 1 to 1000"),
    ({"prompts": ["a"], "sampler": "plms", "eta": 0.5}, "eta: it must be 0"),
    (
        {"prompts": ["a"], "start_code": torch.zeros(2, 4, 16, 16)},
        r"start_code is \(2, 4, 16, 16\), .* \(1, 4, 16, 16\)",
    ),
]


@pytest.mark.parametrize("call, message", MISUSES)
def test_misuse_is_named(model, call, message):
    with pytest.raises(ValueError, match=message):
        txt2img(model, **{"steps": 1, "progress": False, **call})
    with pytest.raises(ValueError, match="strength must be from 0 to 1"):
        img2img(model, ["a"], Image.new("RGB", (32, 32)), strength=1.5)
