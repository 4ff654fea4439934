"""A stand-in for ldm.inference that records its calls, so that the scripts' own logic is tested without a model."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

import ldm
from ldm import cli
from ldm import inference as real
from ldm.models.diffusion.noise import PerImageNoise
from ldm.models.model_info import ModelInfo


class FakeInference(ModuleType):
    """The functions of ldm.inference that scripts call. `calls` lists (function name, arguments) in order.

    The model has 4 channels and factor 8, draws 32x32 by default and a picture in the colour of its running number.
    `fail_at` raises `failure` instead of the drawing call of that number.
    """

    def __init__(self) -> None:
        super().__init__("ldm.inference")
        self.calls: list[tuple[str, dict]] = []
        self.noises = []  # of each drawing call
        self.drawn = 0
        self.fail_at, self.failure = None, None

    def named(self, *names: str) -> list[dict]:
        return [arguments for name, arguments in self.calls if name in names]

    def load_model(self, config, ckpt, *, device, precision, overrides, tasks, lowvram=False, verify=False):
        self.calls.append(("load_model", {"config": config, "ckpt": ckpt, "device": device, "precision": precision}))
        path = Path(ckpt or "models/ldm/shapes64/model.ckpt")
        return SimpleNamespace(channels=4, latent_size=lambda h, w: (h // 8, w // 8), info=ModelInfo(str(path)))

    sampling_settings = staticmethod(real.sampling_settings)
    PromptOptions, Shortcuts = real.PromptOptions, real.Shortcuts

    def needs_depth(self, model):
        return False

    def default_size(self, model):
        return 32

    def resolve_size(self, model, height, width):
        if (height or 32) % 8:
            raise ValueError(
                f"height {height} does not fit: the nearest are {height // 8 * 8} and {height // 8 * 8 + 8}"
            )
        return height or 32, width or 32

    def seed_everything(self, seed):
        self.calls.append(("seed_everything", {"seed": seed}))

    Seeding, Previews = real.Seeding, real.Previews

    def seamless(self, model, axes):
        return contextlib.nullcontext()

    def start_latent(self, model, batch, height, width, noise):
        self.calls.append(("start_latent", {"batch": batch, "size": (height, width)}))
        return torch.arange(batch).view(batch, 1, 1, 1).expand(batch, 4, height // 8, width // 8)

    def _draw(self, name, prompts, size, *, noise, on_step, tiling, progress, **arguments):
        assert progress is False and isinstance(on_step, cli.Watch)  # one bar for the run
        self.noises.append(noise)
        if isinstance(noise, PerImageNoise):
            arguments["seed"] = [generator.initial_seed() for generator in noise.generators]
        if tiling:
            arguments["tiling"] = tiling
        self.calls.append((name, {"prompts": list(prompts), **arguments}))
        if self.fail_at == len(self.named("txt2img", "img2img")):
            raise self.failure
        images = [Image.new("RGB", size, (self.drawn + i, 0, 0)) for i in range(len(prompts))]
        self.drawn += len(images)
        return images

    def txt2img(self, model, prompts, *, height, width, **arguments):
        return self._draw("txt2img", prompts, (width, height), height=height, width=width, **arguments)

    def encode_image(self, model, image, batch, height, width):
        self.calls.append(("encode_image", {"image": image, "batch": batch, "height": height, "width": width}))
        shape = (batch, 4, (height or image.height) // 8, (width or image.width) // 8)
        return torch.arange(batch).view(batch, 1, 1, 1).expand(shape)

    def img2img(self, model, prompts, init, **arguments):
        size = init.size if isinstance(init, Image.Image) else (init.shape[3] * 8, init.shape[2] * 8)
        return self._draw("img2img", prompts, size, init=init, **arguments)


@pytest.fixture
def inference(monkeypatch, tmp_path) -> FakeInference:
    """The stand-in, installed; the current folder is an empty one."""
    fake = FakeInference()
    monkeypatch.setitem(sys.modules, "ldm.inference", fake)
    monkeypatch.setattr(ldm, "inference", fake, raising=False)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def script(request, inference):
    """Runs the script that the test module is named after, with a command line as a list: gives its exit code."""
    name = request.module.__name__.rpartition("test_")[2]
    module = __import__(f"scripts.{name}", fromlist=["main"])
    return lambda *argv: cli.run(module.main, [str(arg) for arg in argv])
