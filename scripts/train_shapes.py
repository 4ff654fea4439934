#!/usr/bin/env python
"""Train the bundled small model from nothing: first stage, diffusion, checkpoint, and a score by the judge.

Every stage saves its state each minute into the run folder and goes on from there when the command is repeated.
The settings of the bundled model are the defaults: about 70 minutes on two CPU cores with AVX512-BF16, 28 of them for
the first stage and 38 for diffusion.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def parse_args() -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/shapes64"), help="run folder; resumed if it exists")
    parser.add_argument("--config", type=Path, default=ROOT / "models/ldm/shapes64/config.yaml")
    parser.add_argument("--pictures", type=int, default=30_000, help="scenes to learn from")
    parser.add_argument("--first-stage-steps", type=int, default=8_000)
    parser.add_argument("--first-stage-batch", type=int, default=16)
    parser.add_argument("--first-stage-lr", type=float, default=2e-3)
    parser.add_argument("--diffusion-steps", type=int, default=7_700)
    parser.add_argument("--diffusion-batch", type=int, default=64)
    parser.add_argument("--diffusion-lr", type=float, default=1e-3)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 if fast here")
    parser.add_argument("--eval-prompts", type=int, default=200, help="prompts of each kind that the judge scores")
    parser.add_argument("--scale", type=float, default=4.0, help="guidance scale of the evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", type=Path, metavar="CKPT", help="train nothing, only score this checkpoint")
    return parser.parse_args()


opt = parse_args()  # before the heavy imports: --help answers at once

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from ldm import cli
from ldm.checkpoint import save_checkpoint
from ldm.data.shapes import ShapesDataset, describe, draw
from ldm.data.shapes_judge import judge
from ldm.images import make_grid
from ldm.inference import load_model
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.util import instantiate_from_config

SAVE_SECONDS = 60
WARM_UP = 200
# "plain": only colour and shape said; "one object", "two objects": everything said
KINDS = ("plain", "held-out pairs", "one object", "two objects")


def autocast() -> torch.autocast:
    """The context that training steps run in."""
    fast = "avx512_bf16" in _cpu_flags()
    return torch.autocast("cpu", torch.bfloat16, enabled=opt.precision == "bf16" or (opt.precision == "auto" and fast))


def _cpu_flags() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def pictures(data: ShapesDataset, cache: Path) -> Tensor:
    """All pictures of a data set, (N, 3, 64, 64) uint8, drawn once and kept in `cache`."""
    if not cache.exists():
        drawn = np.stack([draw(data.scene(i)) for i in tqdm(range(len(data)), desc="drawing")])
        np.save(cache.with_suffix(".part.npy"), drawn)
        os.replace(cache.with_suffix(".part.npy"), cache)
    return torch.from_numpy(np.load(cache)).permute(0, 3, 1, 2).contiguous()


def as_input(batch: Tensor) -> Tensor:
    """uint8 pictures to -1..1."""
    return batch.float() / 127.5 - 1


def as_pictures(batch: Tensor) -> np.ndarray:
    """(B, 3, H, W) in -1..1 to (B, H, W, 3) uint8."""
    return ((batch.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def contact_sheet(batch: np.ndarray, path: Path) -> None:
    """Pictures (N, 64, 64, 3) in rows of 16."""
    make_grid([Image.fromarray(picture) for picture in batch], nrow=16, padding=0).save(path)


def train(
    name: str,
    modules: nn.Module,
    parameters: list[nn.Parameter],
    loss_of: Callable[[int], Tensor],
    steps: int,
    lr: float,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """AdamW with warm-up and cosine decay on `loss_of(step)`; state in `<out>/<name>.pt`, resumed from there."""
    state_file = opt.out / f"{name}.pt"
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=1e-3, fused=True)
    step, seconds = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    saved = time.monotonic()
    with tqdm(total=steps, initial=step, desc=name, mininterval=5) as bar:
        while step < steps:
            rate = min((step + 1) / WARM_UP, 0.5 + 0.5 * float(np.cos(np.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            torch.manual_seed(opt.seed * 1_000_003 + step)  # a resumed run draws what an unbroken one would
            # bf16 has no quick fused attention on CPUs; at these sizes the plain one is twice as fast
            with autocast(), sdpa_kernel(SDPBackend.MATH):
                loss = loss_of(step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            after_step()
            step += 1
            bar.update()
            if step % 100 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
            if time.monotonic() - saved > SAVE_SECONDS or step == steps:
                seconds, saved = seconds + time.monotonic() - saved, time.monotonic()
                state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "step": step, "seconds": seconds}, state_file.with_suffix(".part"))
                os.replace(state_file.with_suffix(".part"), state_file)
    print(f"{name}: {step} steps in {seconds / 60:.1f} minutes")


def train_first_stage(first_stage: nn.Module, images: Tensor) -> None:
    """Reconstruction, where objects count for more than ground, and a trace of KL (Rombach et al. 2022, 3.1)."""
    with torch.no_grad():  # start with little noise: sigma = exp(-3)
        if not (opt.out / "first_stage.pt").exists():
            first_stage.quant_conv.bias[first_stage.embed_dim :] -= 6

    def loss_of(step: int) -> Tensor:
        x = as_input(images[torch.randint(len(images), (opt.first_stage_batch,))])
        x = x.flip(-1) if step % 2 else x  # every shape is its own mirror image
        y, posterior = first_stage(x)
        error = y.float() - x
        is_object = (x - x[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1  # the corner is always ground
        distance = (error.abs() + error.square()) * (1 + 3 * is_object)
        return distance.mean() + 1e-6 * posterior.kl().float().mean()

    first_stage.train().requires_grad_(True)
    parameters = list(first_stage.parameters())
    train("first_stage", first_stage, parameters, loss_of, opt.first_stage_steps, opt.first_stage_lr)
    first_stage.eval().requires_grad_(False)


@torch.no_grad()
def score_first_stage(first_stage: nn.Module) -> dict[str, float]:
    """PSNR of reconstructions of unseen scenes, and how many of them pass the judge whole."""
    data = ShapesDataset(320, seed=opt.seed + 1)
    originals = np.stack([draw(data.scene(i)) for i in range(len(data))])
    x = as_input(torch.from_numpy(originals).permute(0, 3, 1, 2))
    y = as_pictures(torch.cat([first_stage.decode(first_stage.encode(part).mode()) for part in x.split(64)]))
    passed = [judge(picture, describe(data.scene(i))).all for i, picture in enumerate(y)]
    mse = np.square((y.astype(float) - originals) / 255).mean()
    contact_sheet(np.stack([originals[:64], y[:64]], 1).reshape(-1, 64, 64, 3), opt.out / "reconstructions.png")
    return {"psnr": round(float(-10 * np.log10(mse)), 2), "judge": round(float(np.mean(passed)), 4)}


@torch.no_grad()
def moments(first_stage: nn.Module, images: Tensor, cache: Path) -> Tensor:
    """Posterior parameters of every picture, (N, 2C, 8, 8): the first stage runs once, not every step."""
    if not cache.exists():
        parts = tqdm(images.split(32), desc="encoding")
        with autocast():
            encoded = torch.cat([first_stage.encode(as_input(part)).parameters.float() for part in parts])
        torch.save(encoded, cache.with_suffix(".part"))
        os.replace(cache.with_suffix(".part"), cache)
    return torch.load(cache, weights_only=True)


def train_diffusion(model: nn.Module, data: ShapesDataset, latents: Tensor) -> None:
    """Noise prediction with the text encoder trained along; ends with the averaged weights in `model`."""
    scenes = [data.scene(i) for i in range(len(data))]
    networks = nn.ModuleDict({"model": model.model, "text": model.cond_stage_model})
    average = LitEma(networks, decay=0.999)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((opt.seed, step))
        chosen = rng.integers(len(scenes), size=opt.diffusion_batch)
        # one in ten without its caption, for classifier-free guidance (Ho and Salimans 2022)
        captions = ["" if rng.random() < 0.1 else describe(scenes[i], rng) for i in chosen]
        z = model.get_first_stage_encoding(DiagonalGaussianDistribution(latents[torch.from_numpy(chosen)]))
        return model(z, captions)[0]

    model.train()
    everything = nn.ModuleDict({"networks": networks, "average": average})
    parameters = list(model.trainable_parameters())
    steps, lr = opt.diffusion_steps, opt.diffusion_lr
    train("diffusion", everything, parameters, loss_of, steps, lr, after_step=lambda: average(networks))
    average.copy_to(networks)
    model.eval()


def prompts_of(kind: str) -> list[str]:
    """Prompts of one of the `KINDS`, always the same ones."""
    weights = (0, 1) if kind == "two objects" else (1,)
    data = ShapesDataset(opt.eval_prompts, opt.seed + 2, weights, held_out=kind == "held-out pairs")
    scenes = [data.scene(i) for i in range(len(data))]
    if kind in ("plain", "held-out pairs"):
        return [f"a {scene.items[0].colour} {scene.items[0].shape}" for scene in scenes]
    return [describe(scene) for scene in scenes]


@torch.no_grad()
def score(model: nn.Module, kind: str, batch: int = 50) -> dict[str, float]:
    """The shares of pictures of a kind of prompt that are right, by what is asked of them; DPM-Solver++, 20 steps."""
    prompts = prompts_of(kind)
    torch.manual_seed(opt.seed)
    sampler, drawn = DPMSolverSampler(model), []
    for start in tqdm(range(0, len(prompts), batch), desc=kind):
        texts = prompts[start : start + batch]
        z, _ = sampler.sample(
            S=20,
            batch_size=len(texts),
            shape=(model.channels, model.image_size, model.image_size),
            conditioning=model.get_learned_conditioning(texts),
            unconditional_guidance_scale=opt.scale,
            unconditional_conditioning=model.get_learned_conditioning([""] * len(texts)),
            verbose=False,
        )
        drawn.append(as_pictures(model.decode_first_stage(z)))
    drawn = np.concatenate(drawn)
    contact_sheet(drawn[:64], opt.out / f"samples_{kind.replace(' ', '_')}.png")
    verdicts = [judge(picture, prompt) for picture, prompt in zip(drawn, prompts)]
    names = ("objects", "sizes", "background", "relation", "all")
    return {name: round(float(np.mean([getattr(v, name) for v in verdicts])), 4) for name in names}


def evaluate(model: nn.Module) -> None:
    """Score both stages; the numbers go to `results.json` and to the screen."""
    results = {"first stage": score_first_stage(model.first_stage_model)}
    for kind in KINDS:
        results[kind] = score(model, kind)
    (opt.out / "results.json").write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))


def main(argv: Sequence[str] | None = None) -> None:
    """All stages in order."""
    opt.out.mkdir(parents=True, exist_ok=True)
    if opt.evaluate is not None:
        evaluate(load_model(opt.config, opt.evaluate, device="cpu"))
        return
    torch.manual_seed(opt.seed)
    config = OmegaConf.load(opt.config)
    data = ShapesDataset(opt.pictures, seed=opt.seed)
    images = pictures(data, opt.out / f"pictures-{opt.pictures}-{opt.seed}.npy")
    model = instantiate_from_config(config.model)
    train_first_stage(model.first_stage_model, images)
    cache = opt.out / f"latents-{opt.pictures}-{opt.seed}-{opt.first_stage_steps}.pt"
    train_diffusion(model, data, moments(model.first_stage_model, images, cache))
    save_checkpoint(opt.out / "model.ckpt", model.state_dict(), global_step=opt.diffusion_steps, overwrite=True)
    evaluate(model)


if __name__ == "__main__":
    sys.exit(cli.run(main))
