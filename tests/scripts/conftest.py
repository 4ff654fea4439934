"""A stand-in for ldm.inference that records its calls, so that the scripts' own logic is tested without a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ldm import cli
from ldm import inference as real
from ldm.cli.image_run import StartNoise
from ldm.models.diffusion.noise import PerImageNoise, SeededNoise
from ldm.models.model_info import ModelInfo


class FakeModel:
    """A model with 4 channels and factor 8 that generates 32x32 by default."""

    channels, image_size, device = 4, 4, torch.device("cpu")
    first_stage_model = SimpleNamespace(downsampling_factor=8)

    def __init__(self, path: Path) -> None:
        self.info = ModelInfo(str(path))

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        if height % 8:
            low = height // 8 * 8
            raise ValueError(f"height {height} does not fit: the nearest are {low} and {low + 8}")
        return height // 8, width // 8


class FakeInference:
    """Stands for the slow parts of ldm.inference. `calls` lists (function name, arguments) in order.

    Images are in the color of their running number. `fail_at` raises `failure` instead of the sampling call of that
    number.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []
        self.noises = []  # of each sampling call
        self.sampled = 0
        self.fail_at, self.failure = None, None

    def named(self, *names: str) -> list[dict]:
        return [arguments for name, arguments in self.calls if name in names]

    def load_model(self, config, ckpt, *, device, precision, overrides, tasks, lowvram=False, verify=False):
        self.calls.append(("load_model", {"config": config, "ckpt": ckpt, "device": device, "precision": precision}))
        return FakeModel(Path(ckpt or "models/ldm/shapes64/model.ckpt"))

    def _sample(self, name, prompts, size, options, *, noise, on_step, progress, **arguments):
        assert progress is False and isinstance(on_step, cli.Progress)  # one bar for the run
        names = ("negative_prompt", "steps", "sampler", "eta", "scale")
        arguments |= {name: getattr(options, name) for name in names}
        self.noises.append(noise)
        if name == "txt2img":
            arguments["start_code"] = noise.start if isinstance(noise, StartNoise) else None
        if isinstance(noise, PerImageNoise):
            arguments["seed"] = [generator.initial_seed() for generator in noise.generators]
        if isinstance(noise, SeededNoise):
            assert noise.seed == options.seed
        if options.tiling:
            arguments["tiling"] = options.tiling
        if options.prompt_options != real.PromptOptions():
            arguments["prompt_options"] = options.prompt_options
        self.calls.append((name, {"prompts": list(prompts), **arguments}))
        if self.fail_at == len(self.named("txt2img", "img2img")):
            raise self.failure
        images = [Image.new("RGB", size, (self.sampled + i, 0, 0)) for i in range(len(prompts))]
        self.sampled += len(images)
        return images

    def txt2img(self, pipe, prompts, options, **arguments):
        size = {"height": options.height, "width": options.width}
        return self._sample("txt2img", prompts, (options.width, options.height), options, **size, **arguments)

    def encode_image(self, pipe, image, batch, options, noise):
        height, width = options.height, options.width
        self.calls.append(("encode_image", {"image": image, "batch": batch, "height": height, "width": width}))
        shape = (batch, 4, (height or image.height) // 8, (width or image.width) // 8)
        return torch.arange(batch).view(batch, 1, 1, 1).expand(shape)

    def img2img(self, model, prompts, init, *, options, **arguments):
        size = init.size if isinstance(init, Image.Image) else (init.shape[3] * 8, init.shape[2] * 8)
        return self._sample("img2img", prompts, size, options, init=init, **arguments)


@pytest.fixture
def inference(monkeypatch, tmp_path) -> FakeInference:
    """The stand-in, installed; the current folder is an empty one."""
    fake = FakeInference()
    monkeypatch.setattr(real, "load_model", lambda *args, **kwargs: fake.load_model(*args, **kwargs))
    monkeypatch.setattr(real, "needs_depth", lambda model: False)
    monkeypatch.setattr(real, "img2img", fake.img2img)
    monkeypatch.setattr(real.Pipeline, "__call__", lambda pipe, *args, **kwargs: fake.txt2img(pipe, *args, **kwargs))
    monkeypatch.setattr(
        real.Pipeline, "encode_image", lambda pipe, *args, **kwargs: fake.encode_image(pipe, *args, **kwargs)
    )
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def script(request, inference):
    """Runs the script that the test module is named after, with a command line as a list: gives its exit code."""
    name = request.module.__name__.rpartition("test_")[2]
    module = __import__(f"scripts.{name}", fromlist=["main"])
    return lambda *argv: cli.run(module.main, [str(arg) for arg in argv])
