"""Public methods are override points: each is called where the originals call it, as often, with its arguments.

`reference/api/calls.tsv` has the calls of 19 scenes, recorded from CompVis stable-diffusion and Stability-AI
stablediffusion; `calls_excused.tsv` has the methods that need not be called, with reasons.
"""

from __future__ import annotations

import copy
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.util import REPOSITORY, instantiate_from_config
from tests.golden import filled, tensor

API = Path(__file__).parent / "reference" / "api"
PACKAGE = f"{REPOSITORY / 'ldm'}/"


def table(name: str) -> list[list[str]]:
    return [line.split("\t") for line in (API / name).read_text().splitlines()[1:]]


METHODS = {name for _, name, *_ in table("public_api.tsv") if "." in name}
EXCUSED = {name for name, *_ in table("calls_excused.tsv")}
CALLS: dict[str, dict[str, int]] = defaultdict(dict)
for scene, name, count, _ in table("calls.tsv"):
    if name not in EXCUSED:
        CALLS[scene][name] = int(count)


class TinyText(torch.nn.Module):
    """A text encoder: seven embeddings by a checksum of the prompt."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(64, dim)

    def forward(self, text: list[str]) -> torch.Tensor:
        ids = [[zlib.crc32(f"{prompt}{i}".encode()) % 64 for i in range(7)] for prompt in text]
        return self.emb(torch.tensor(ids))

    encode = forward


UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": {
        **{"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1},
        **{"attention_resolutions": [1, 2], "channel_mult": [1, 2], "num_heads": 4, "use_spatial_transformer": True},
        **{"transformer_depth": 1, "context_dim": 16, "use_checkpoint": False, "legacy": False},
    },
}
FIRST_STAGE = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 4,
        "ddconfig": {
            **{"double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32},
            **{"ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0},
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}
SETTINGS: dict[str, Any] = {
    **{"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000, "first_stage_key": "image"},
    **{"cond_stage_key": "caption", "image_size": 8, "channels": 4, "conditioning_key": "crossattn"},
    **{"scale_factor": 0.18215, "use_ema": False, "unet_config": UNET, "first_stage_config": FIRST_STAGE},
    "cond_stage_config": {"target": f"{__name__}.TinyText", "params": {"dim": 16}},
}


def build(target: str | type = LatentDiffusion, **changes: Any) -> Any:
    params = copy.deepcopy(SETTINGS) | changes
    target = f"{target.__module__}.{target.__qualname__}" if isinstance(target, type) else target
    model = filled(instantiate_from_config({"target": target, "params": params})).eval()
    model.learning_rate = 1e-4
    return model


@pytest.fixture(scope="module")
def plain() -> LatentDiffusion:
    return build()


@pytest.fixture(scope="module")
def averaged() -> LatentDiffusion:
    return build(use_ema=True)


@pytest.fixture(scope="module")
def v_model() -> LatentDiffusion:
    return build(parameterization="v")


X, C, U = tensor("x", 2, 4, 8, 8), tensor("c", 2, 7, 16), tensor("u", 2, 7, 16)
MASK = (tensor("mask", 2, 1, 8, 8) > 0).float()
BATCH = {"image": tensor("image", 2, 64, 64, 3).clamp(-1, 1), "caption": ["a dog", "two cats"]}
UNGUIDED: dict[str, Any] = {"conditioning": C, "verbose": False}
GUIDED = UNGUIDED | {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": U}
MASKED = GUIDED | {"mask": MASK, "x0": X}
SHAPE = (2, 4, 8, 8)
ANCESTRAL: dict[str, Any] = {"timesteps": 12, "verbose": False}


def sample(sampler: type, options: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda model: sampler(model).sample(10, 2, SHAPE[1:], **options)


def image_to_image(model: LatentDiffusion) -> None:
    sampler = DDIMSampler(model)
    sampler.make_schedule(10, ddim_eta=0.0, verbose=False)
    z = sampler.stochastic_encode(X, torch.tensor([5, 5]))
    sampler.decode(z, C, 5, unconditional_guidance_scale=3.0, unconditional_conditioning=U)


def stages(model: LatentDiffusion) -> None:
    z = model.get_first_stage_encoding(model.encode_first_stage(X[:, :3].repeat(1, 1, 4, 4)))
    model.decode_first_stage(z)
    model.get_learned_conditioning(["a", "b"])


def train(model: LatentDiffusion) -> None:
    model.train()
    model.shared_step(BATCH)[0].backward()
    model.eval()


def train_with_average(model: LatentDiffusion) -> None:
    train(model)
    model.on_train_batch_end(None, None, 0)


def average_and_optimizer(model: LatentDiffusion) -> None:
    model.configure_optimizers()
    with model.ema_scope():
        pass


SCENES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "ddim": ("plain", sample(DDIMSampler, GUIDED)),
    "ddim_eta": ("plain", sample(DDIMSampler, GUIDED | {"eta": 0.5})),
    "ddim_unguided": ("plain", sample(DDIMSampler, UNGUIDED)),
    "ddim_mask": ("plain", sample(DDIMSampler, MASKED)),
    "ddim_img2img": ("plain", image_to_image),
    "ddim_v": ("v_model", sample(DDIMSampler, GUIDED)),
    "plms": ("plain", sample(PLMSSampler, GUIDED)),
    "plms_mask": ("plain", sample(PLMSSampler, MASKED)),
    "dpm": ("plain", sample(DPMSolverSampler, GUIDED)),
    "ancestral": ("plain", lambda model: model.p_sample_loop([C], SHAPE, **ANCESTRAL)),
    "sample": ("plain", lambda model: model.sample([C], batch_size=2, shape=SHAPE, **ANCESTRAL)),
    "sample_log": ("plain", lambda model: model.sample_log(cond=C, batch_size=2, ddim=True, ddim_steps=10)),
    "progressive": ("plain", lambda model: model.progressive_denoising([C], SHAPE, verbose=False, start_T=12)),
    "stages": ("plain", stages),
    "train": ("plain", train),
    "train_v": ("v_model", train),
    "train_ema": ("averaged", train_with_average),
    "ema_and_optimizer": ("averaged", average_and_optimizer),
    "log_images": ("averaged", lambda m: m.log_images(BATCH, N=2, ddim_steps=10, plot_progressive_rows=False)),
}


def public_name(code: Any, owner: object) -> str | None:
    """The public method that a frame runs: its own name, or that of a public class its object derives from."""
    if code.co_qualname in METHODS:
        return code.co_qualname
    short = code.co_name
    return next(
        (f"{base.__name__}.{short}" for base in type(owner).__mro__ if f"{base.__name__}.{short}" in METHODS), None
    )


def counted(run: Callable[[], Any]) -> Counter[str]:
    """How often each public method is called."""
    seen: Counter[str] = Counter()

    def watch(frame: Any, event: str, arg: Any) -> None:
        code = frame.f_code
        owner = frame.f_locals.get("self") if event == "call" and code.co_filename.startswith(PACKAGE) else None
        if owner is None or "." not in code.co_qualname or "<" in code.co_qualname:
            return
        if (name := public_name(code, owner)) is not None:
            seen[name] += 1

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return seen


def test_every_scene_is_here() -> None:
    assert SCENES.keys() == CALLS.keys()


@pytest.mark.parametrize("scene", SCENES)
def test_calls_are_those_of_the_originals(scene: str, request: pytest.FixtureRequest) -> None:
    fixture, run = SCENES[scene]
    model = request.getfixturevalue(fixture)
    seen = counted(lambda: run(model))
    missed = {name: (seen[name], count) for name, count in CALLS[scene].items() if seen[name] < count}
    assert not missed, f"called too rarely (found, in the originals): {missed}"


# ---- arguments: an override with the published signature, and nothing else, must work ----

LATENT_RUNS: list[tuple[Callable[[Any], Any], tuple[str, ...]]] = [
    (train, ("get_input", "shared_step", "forward", "p_losses", "get_learned_conditioning", "encode_first_stage")),
    (train, ("get_first_stage_encoding", "apply_model")),
    (SCENES["sample"][1], ("sample", "p_sample_loop", "p_sample", "p_mean_variance")),
    (SCENES["progressive"][1], ("progressive_denoising",)),
    (
        lambda m: m.log_images(BATCH, N=1, ddim_steps=2, inpaint=False, plot_progressive_rows=False),
        ("log_images", "sample_log", "decode_first_stage", "_get_denoise_row_from_list"),
    ),
    (average_and_optimizer, ("configure_optimizers",)),
]
PIXEL_RUNS: list[tuple[Callable[[Any], Any], tuple[str, ...]]] = [
    (train, ("get_input", "shared_step", "forward", "p_losses", "q_sample", "get_loss")),
    (lambda m: m.sample(batch_size=2), ("sample", "p_sample_loop", "p_sample", "p_mean_variance", "q_posterior")),
    (lambda m: m.sample(batch_size=2), ("predict_start_from_noise",)),
    (lambda m: m.log_images(BATCH, N=2), ("log_images", "_get_rows_from_list")),
]
SIGNATURES: dict[str, list[str]] = defaultdict(list)
for _, full, _, _, signature in table("public_api.tsv"):
    SIGNATURES[full].append(signature)


def overrides(kind: str, runs: list[tuple[Callable[[Any], Any], tuple[str, ...]]]) -> list[Any]:
    """A test case for each method and each of its published signatures."""
    return [
        pytest.param(name, signature, run, id=f"{name}{i or ''}")
        for run, names in runs
        for name in names
        for i, signature in enumerate(SIGNATURES[f"{kind}.{name}"])
    ]


def override(model: Any, name: str, signature: str) -> list[int]:
    """Give `model` a subclass whose method has exactly the published signature; count its calls."""
    calls: list[int] = []
    names = [part.split("=")[0].strip() for part in signature.strip("()").split(",")][1:]
    by_position = any(n.startswith("*") and not n.startswith("**") for n in names)
    passed = ", ".join(n if n.startswith("*") or by_position else f"{n}={n}" for n in names)
    scope: dict[str, Any] = {"calls": calls}
    exec(  # from our own table
        f"def {name}{signature}:\n    calls.append(1)\n    return super(cls, self).{name}({passed})\n", scope
    )
    kind = type(model)
    scope["cls"] = model.__class__ = type(kind.__name__, (kind,), {name: scope[name]})
    return calls


@pytest.mark.parametrize("name, signature, run", overrides("LatentDiffusion", LATENT_RUNS))
def test_overrides_with_published_signatures_are_called(averaged, name, signature, run) -> None:
    kind = type(averaged)
    calls = override(averaged, name, signature)
    try:
        run(averaged)
    finally:
        averaged.__class__ = kind
    assert calls


class Pixels(torch.nn.Module):
    """A network of pixels with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.weight * x


@pytest.mark.parametrize("name, signature, run", overrides("DDPM", PIXEL_RUNS))
def test_overrides_of_the_pixel_model_are_called(name, signature, run) -> None:
    model = DDPM({"target": f"{__name__}.Pixels"}, timesteps=8, image_size=64, log_every_t=4)
    calls = override(model, name, signature)
    run(model)
    assert calls
