"""SamplingOptions in every task: the sampler gets what was asked for; defaults; skipped random numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm import inference
from ldm.inference import Conditioning, Pipeline, SamplingOptions, pipeline
from ldm.models.diffusion.guidance import CFG_PP_SCALE, Guidance
from ldm.models.diffusion.noise import SeededNoise
from ldm.models.diffusion.samplers import SAMPLERS, make_sampler
from ldm.models.diffusion.schedules import SCHEDULES
from tests.inference.test_variations import unclip_config
from tests.tiny import RETRIEVAL, super_resolution_config, tiny_config, upscaler_config, write_model, write_tiny
from tests.unprompted import toy

PROMPTS = ["a red circle", "a blue square"]
PHOTO = Image.fromarray(np.arange(32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8))
HOLE = torch.zeros(1, 1, 32, 32)
HOLE[..., 8:24] = 1.0
CONFIGS = {
    "text": tiny_config(),
    "neighbours": tiny_config(**RETRIEVAL),
    "upscaler": upscaler_config(),
    "small picture": super_resolution_config(),
    "picture": unclip_config(),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    paths = {name: write_model(tmp_path_factory.mktemp("model"), config) for name, config in CONFIGS.items()}
    loaded = {name: inference.load_model(ckpt=path, device="cpu") for name, path in paths.items()}
    return loaded | {name: toy(name) for name in ("classes", "nothing", "layout", "segmentation")}


# Tasks with guidance and without: the model and the call.
GUIDED = {
    "txt2img": ("text", lambda m, **o: inference.txt2img(m, PROMPTS, **o)),
    "img2img": ("text", lambda m, **o: inference.img2img(m, PROMPTS, PHOTO, strength=1.0, **o)),
    "inpaint": ("text", lambda m, **o: inference.inpaint(m, PHOTO, HOLE, PROMPTS, **o)),
    "upscale": ("upscaler", lambda m, **o: inference.upscale(m, [PHOTO] * 2, PROMPTS, tile=16, **o)),
    "knn2img": ("neighbours", lambda m, **o: inference.knn2img(m, torch.ones(2, 3, 24) / 24**0.5, **o)),
    "variations": ("picture", lambda m, **o: inference.variations(m, [PHOTO], PROMPTS, **o)),
    "class2img": ("classes", lambda m, **o: inference.class2img(m, [3, 4], **o)),
}
UNGUIDED = {
    "noise2img": ("nothing", lambda m, **o: inference.noise2img(m, 2, **o)),
    "layout2img": ("layout", lambda m, **o: inference.layout2img(m, torch.zeros(2, 8, dtype=torch.long), **o)),
    "segmentation2img": (
        "segmentation",
        lambda m, **o: inference.segmentation2img(m, torch.zeros(32, 32, dtype=torch.long), 2, **o),
    ),
    "upscale": ("small picture", lambda m, **o: inference.upscale(m, [PHOTO] * 2, **o)),
}


@pytest.fixture
def runs(monkeypatch):
    """(kind of sampler, timesteps, guidance) of every run."""
    seen = []

    def recording(model, name, **options):
        sampler = make_sampler(model, name, **options)
        sample, decode = sampler.sample, sampler.decode

        def record(steps, guidance):
            seen.append((type(sampler), [float(t) for t in steps.timesteps], guidance))

        def recorded_sample(**given):
            result = sample(**given)
            record(sampler.sampling_schedule, given["guidance"])
            return result

        def recorded_decode(noised, cond, count, **given):
            record(sampler.sampling_schedule.until(count), given["guidance"])
            return decode(noised, cond, count, **given)

        sampler.sample, sampler.decode = recorded_sample, recorded_decode
        return sampler

    monkeypatch.setattr(pipeline, "make_sampler", recording)
    return seen


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.mark.parametrize("task", GUIDED)
def test_guidance_arrives(models, runs, task):
    model, call = GUIDED[task]
    options = {"steps": 2, "seed": 1, "progress": False}
    terms = {"pag": 2.0, "rescale": 0.7}
    asked = {
        "plain": {"scale": 3.0},
        "scales": {"scale": [5.0, 2.0]},
        "terms": {"scale": 3.0, "guidance": {"terms": terms, "interval": (0.01, 1e9)}},
        "cfg_pp": {"guidance": {"cfg_pp": True}},
        "schedule": {"scale": 3.0, "sampler": "euler", "schedule": [900, 100]},
    }
    drawn = {name: pixels(call(models[model], **options, **more)) for name, more in asked.items()}
    kinds, timesteps, guidances = zip(*runs)
    assert list(guidances) == [
        Guidance(3.0),
        Guidance([5.0, 2.0]),
        Guidance(3.0, (0.01, 1e9), terms=terms),
        Guidance(CFG_PP_SCALE, cfg_pp=True),
        Guidance(3.0),
    ]
    assert kinds[-1] is SAMPLERS["euler"].func and timesteps[-1] == [100, 900]
    assert all((drawn[name] != drawn["plain"]).any() for name in asked if name != "plain")


@pytest.mark.parametrize("task", UNGUIDED)
def test_without_a_scale_there_is_pag(models, runs, task):
    name, call = UNGUIDED[task]
    options = {"steps": 2, "seed": 1, "progress": False}
    drawn = [pixels(call(models[name], **options, guidance=g)) for g in (None, {"terms": {"pag": 5.0}})]
    call(models[name], **options, sampler="dpmpp_2m", schedule="trailing")
    assert [guidance for _, _, guidance in runs] == [Guidance(), Guidance(terms={"pag": 5.0}), Guidance()]
    assert runs[-1][:2] == (SAMPLERS["dpmpp_2m"].func, [499.0, 999.0]) and (drawn[0] != drawn[1]).any()
    with pytest.raises(ValueError, match="at scale 1 there is none: leave rescale out"):
        call(models[name], **options, guidance={"terms": {"rescale": 0.7}})
    with pytest.raises(ValueError, match="scale"):
        call(models[name], **options, scale=3.0)
    with pytest.raises(ValueError, match="needs an unconditional prediction"):
        call(models[name], **options, guidance={"cfg_pp": True})


def test_one_negative_prompt_per_image(models):
    options = {"steps": 2, "scale": 5.0, "progress": False, "start_code": torch.ones(2, 4, 16, 16)}
    both = pixels(inference.txt2img(models["text"], PROMPTS, negative_prompt=["blue", "a circle"], **options))
    for i, text in enumerate(("blue", "a circle")):
        alone = pixels(inference.txt2img(models["text"], PROMPTS, negative_prompt=text, **options))
        assert np.abs(alone[i] - both[i]).max() <= 1 and (alone[1 - i] != both[1 - i]).any()


@pytest.mark.parametrize("schedule", [None, *SCHEDULES, [900, 500, 100]])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_skip_noise_uses_the_same_random_numbers(models, sampler, schedule):
    """Whatever the sampler, schedule and guidance: the network's outputs do not matter."""
    model, options = models["text"], {"steps": 3, "sampler": sampler, "schedule": schedule}
    cfg_pp = SAMPLERS[sampler].func.cfg_pp
    guidance = {"cfg_pp": True} if cfg_pp else {"terms": {"rescale": 0.7}, "interval": (0.1, 9.0)}
    options |= {"guidance": guidance, "height": 16, "width": 16}
    used, skipped = SeededNoise(5), SeededNoise(5)
    inference.txt2img(model, PROMPTS, **options, noise=used, progress=False)
    pipe = Pipeline(model)
    pipe.skip_noise(Conditioning(None, shape=(2, 4, 8, 8)), pipe.resolve(**options), skipped)
    assert torch.equal(used((4,), "cpu"), skipped((4,), "cpu"))


def test_models_name_their_own_schedule(tmp_path, runs):
    ckpt = write_tiny(tmp_path)
    config = OmegaConf.load(tmp_path / "config.yaml")

    def loaded(**own):
        OmegaConf.save({"model": config.model, "sampling": own}, tmp_path / "own.yaml")
        return inference.load_model(tmp_path / "own.yaml", ckpt, device="cpu")

    model = loaded(sampler="dpmpp_3m", schedule="trailing", steps=4)
    resolved = Pipeline(model).resolve()
    expected = SamplingOptions(steps=4, sampler="dpmpp_3m", eta=0.0, schedule="trailing", scale=7.5)
    assert resolved == expected and Pipeline(model).resolve(resolved) == resolved
    assert Pipeline(model).resolve(schedule="karras").schedule == "karras"
    inference.txt2img(model, ["a"], progress=False)
    inference.img2img(model, ["a"], PHOTO, strength=0.5, progress=False)
    assert runs[0][:2] == (SAMPLERS["dpmpp_3m"].func, [249.0, 499.0, 749.0, 999.0]) and runs[1][1] == [249.0, 499.0]
    assert loaded(schedule=[999, 500.5, 1]).info.sampling.schedule == [999, 500.5, 1]
    for mistake in ("caras", [], ["x"], 3):
        with pytest.raises(ValueError, match="a `schedule` of uniform, .* or timesteps in a list"):
            loaded(schedule=mistake)


def test_resolving():
    resolve = SamplingOptions().resolve
    assert resolve().guidance == Guidance(7.5) and resolve(default_scale=5.0).guidance == Guidance(5.0)
    cfg_pp = SamplingOptions.of(guidance={"cfg_pp": True})
    assert cfg_pp.resolve().guidance == Guidance(CFG_PP_SCALE, cfg_pp=True)
    assert SamplingOptions.of(cfg_pp, scale=0.3).resolve().scale == 0.3
    with pytest.raises(ValueError, match="leave rescale out"):
        _ = SamplingOptions(scale=1.0, terms={"rescale": 0.7}).resolve().guidance
    with pytest.raises(ValueError, match="resolve the options first"):
        _ = SamplingOptions().guidance


@pytest.mark.parametrize("guidance", [7.5, {"rescale": 0.7}, "pag"])
def test_guidance_of_another_type(guidance):
    with pytest.raises(ValueError, match="guidance must be a Guidance or a mapping with some of scale, interval, "):
        SamplingOptions.of(guidance=guidance)


def test_guidance_as_an_object():
    guidance = Guidance(3.0, (0.1, 9.0), terms={"rescale": 0.7})
    assert SamplingOptions.of(guidance=guidance).guidance == guidance
    assert SamplingOptions.of(guidance={"scale": 3.0}) == SamplingOptions(scale=3.0)
    assert SamplingOptions.of(guidance=guidance, scale=5.0).scale == 5.0


def test_options_do_not_change_with_what_they_were_made_from():
    given = {"seed": [1, 2], "scale": [7.0, 2.0], "schedule": [900, 100], "terms": {"pag": 1.0}, "interval": [1.0, 5.0]}
    options = SamplingOptions(**given)
    for value in given.values():
        value.clear()
    assert options.seed == [1, 2] and options.resolve().guidance == Guidance([7.0, 2.0], [1.0, 5.0], terms={"pag": 1.0})
    assert options.schedule == [900, 100]


def test_numbers_of_numpy_and_torch():
    options = SamplingOptions(seed=np.int64(3), steps=np.int32(2), scale=np.float32(3), schedule=np.array([900, 100]))
    assert options == SamplingOptions(seed=3, steps=2, scale=3.0, schedule=[900, 100])
    assert SamplingOptions(seed=torch.tensor([1, 2])).seed == [1, 2]


@pytest.mark.parametrize(
    "wrong",
    [{"seed": "12"}, {"seed": [1.5]}, {"steps": 2.5}, {"steps": True}, {"height": "64"}, {"cfg_pp": "no"}],
    ids=str,
)
def test_wrong_types_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be (a whole number|True or False), not "):
        SamplingOptions.of(**wrong)


def test_options_by_name(models):
    base = SamplingOptions(steps=2, scale=3.0)
    assert SamplingOptions.of(base, steps=None, seed=4) == SamplingOptions(steps=2, scale=3.0, seed=4)
    with pytest.raises(ValueError, match="unknown option 'step', did you mean 'steps'. the options are seed, "):
        inference.txt2img(models["text"], PROMPTS, step=3)
    for name, meant in (("num_inference_steps", "steps"), ("guidance_scale", "scale")):
        with pytest.raises(ValueError, match=f"unknown option '{name}', did you mean '{meant}'"):
            SamplingOptions.of(**{name: 3})
    same = pixels(inference.txt2img(models["text"], PROMPTS, options=base, seed=4, progress=False))
    keywords = pixels(inference.txt2img(models["text"], PROMPTS, steps=2, scale=3.0, seed=4, progress=False))
    assert (same == keywords).all()
